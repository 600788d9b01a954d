"""Documents that the model itself writes (``corpus.kind="model"``), and then reads like others.

They are written in batches; each batch becomes a file when it is complete, so after an interruption
the next call goes on with the missing ones. Document i has its own random key and its prompt, both
of the seed and i alone. Its batch decides only the shapes of the computation, which are the same
whenever it is written.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from conlens_jax.config import MODEL_TEXT_FIELDS, ConfigError, CorpusConfig
from conlens_jax.config.seeds import random_key
from conlens_jax.corpora.corpus import Corpus
from conlens_jax.corpora.model_texts import RECIPE_FILE, batch_file
from conlens_jax.corpora.opening import open_corpus
from conlens_jax.corpora.prompts import Prompts, read_prompts
from conlens_jax.files.paths import cache_folder, local_path, write_problems
from conlens_jax.files.whole import naming_full_disk, write_atomically, write_whole
from conlens_jax.models.chat import chat_template, render_chat
from conlens_jax.models.decoding import Drawing, TextWriter
from conlens_jax.models.matrix_sizes import weights_per_token
from conlens_jax.models.model import LanguageModel
from conlens_jax.models.transformer_config import array_dtype
from conlens_jax.parallel.mesh import batch_sharding, check_batch, replicated
from conlens_jax.parallel.preemption import Preempted, watching_for_sigterm
from conlens_jax.parallel.processes import (
    barrier,
    broadcast_from_first,
    is_first,
    local_rows,
    on_devices,
    to_host,
)
from conlens_jax.tracking.console import Console

_FORMAT = 1  # to be raised when the same recipe would give other texts
_PROMPT_STEP, _SLOT_STEP = 8, 32
_PRODUCT_WIDTH = {"cpu": 2048}


def open_texts(config: CorpusConfig, model: LanguageModel, mesh: Mesh, console: Console) -> Corpus:
    """The corpus of a config; ``model`` writes what is missing of its own documents first.

    Raises:
      ValueError, OSError, Preempted: as :func:`ensure_documents`; CorpusError as
        :func:`~conlens_jax.corpora.opening.open_corpus`.
    """
    if config.kind != "model":
        return open_corpus(config)
    return open_corpus(config, ensure_documents(config, model, mesh, console))


def ensure_documents(
    config: CorpusConfig, model: LanguageModel, mesh: Mesh, console: Console
) -> Path:
    """The folder with the first ``corpus.n_documents`` documents; missing ones are written now.

    Raises:
      ValueError: a prompt does not fit into the model, the model has no bos token and needs one,
        or a setting does not fit the mesh.
      OSError: the folder cannot be written; complete batches are safe.
      Preempted: SIGTERM; complete batches are safe.
    """
    check_batch("corpus.batch_size", config.batch_size, mesh)
    prompts = read_prompts(config)
    recipe = recipe_of(config, model, prompts)
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    name = re.sub(r"[^\w.-]+", "-", Path(model.model_id).name)
    root = local_path(config.path) if config.path else cache_folder()
    folder = root / f"texts-{name}-{digest}"
    numbers = range(-(-config.n_documents // config.batch_size))
    missing = broadcast_from_first(
        lambda: [number for number in numbers if not batch_file(folder, number).exists()]
    )
    if not missing:
        console.line("corpus", found=folder)
        return folder
    broadcast_from_first(lambda: _make_folder(folder, recipe))
    if config.writes == "answers" and not recipe["chat_template"]:
        console.line("corpus", note="without a chat template, prompts are continued as plain text")
    _write_batches(_Batches(config, model, mesh, prompts), missing, len(numbers), folder, console)
    barrier("documents")
    console.line("corpus", documents=config.n_documents, saved=folder)
    return folder


def recipe_of(config: CorpusConfig, model: LanguageModel, prompts: Prompts) -> dict[str, Any]:
    """Everything that determines the documents except their number, as JSON values."""
    settings = {name: getattr(config, name) for name in MODEL_TEXT_FIELDS}
    template = chat_template(model.folder)[1] if config.writes == "answers" else None
    return {
        **settings,
        "format": _FORMAT,
        "seed": config.seed,
        "prompts": prompts.digest,
        "chat_template": template and hashlib.sha256(template.encode()).hexdigest(),
        "weights_hash": model.weights_hash,
        "tokenizer_hash": model.tokenizer.fingerprint,
        "ends": sorted(model.config.eos_token_ids),
        "dtype": model.config.dtype,
        "quantise": model.config.quantise,
    }


def _make_folder(folder: Path, recipe: dict[str, Any]) -> None:
    if problems := list(write_problems("corpus.path", folder)):
        raise ConfigError(problems)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RECIPE_FILE, json.dumps(recipe, indent=2) + "\n")


def _write_batches(
    batches: _Batches, missing: Sequence[int], total: int, folder: Path, console: Console
) -> None:
    size, tokens = batches.config.batch_size, 0
    done = total - len(missing)
    rate = matrix_product_rate(batches.mesh, batches.model)
    started = time.time()
    with (
        console.progress(total * size, "corpus", initial=done * size) as progress,
        watching_for_sigterm(f"the documents in {folder} are complete") as stops,
    ):
        for count, number in enumerate(missing, start=1):
            rows, written = batches.write(number)
            if is_first():
                path = batch_file(folder, number)
                with naming_full_disk(path):
                    write_atomically(path, (json.dumps(row).encode() + b"\n" for row in rows))
            if count == 1 < len(missing):  # it waited for the compiler
                started = time.time()
            else:
                tokens += written
            speed = tokens / (time.time() - started)
            progress.update(size, **({"tokens_per_s": speed} if tokens else {}))
            if count < len(missing) and stops():
                raise Preempted(
                    f"SIGTERM: the complete batches in {folder} are safe; the same command goes on"
                )
    rate = max(rate, matrix_product_rate(batches.mesh, batches.model))
    needed = 2 * weights_per_token(batches.model.config)
    console.line(
        "corpus",
        tokens_per_s=speed,
        gflops_of_tokens=speed * needed / 1e9,
        gflops_of_matrix_products=rate / 1e9,
        share=speed * needed / rate,
    )


class _Batches:
    """Writes batches of documents by their number."""

    def __init__(self, config: CorpusConfig, model: LanguageModel, mesh: Mesh, prompts: Prompts):
        self.config, self.model, self.mesh, self.prompts = config, model, mesh, prompts
        self.writer = TextWriter(model.params, model.config)
        self.sharding = batch_sharding(mesh)
        self.encode = self._encoder()

    def write(self, number: int) -> tuple[Iterator[dict[str, str]], int]:
        """The rows of batch ``number``, and how many tokens the model wrote for it."""
        config, size = self.config, self.config.batch_size
        documents = np.arange(number * size, (number + 1) * size)
        given = [self._tokens(int(document)) for document in documents]
        shortest, longest = min(map(len, given)), max(map(len, given))
        shared = min(len(os.path.commonprefix(given)), shortest - 1)
        # All in one of few shapes: each is another program.
        width = 1 if longest == shared + 1 else _rounded(longest - shared, _PROMPT_STEP)
        tokens_BS = np.full((size, width), self.model.tokenizer.pad_id, np.int32)
        lengths_B = np.array([len(tokens) - shared for tokens in given])
        for row, tokens in zip(tokens_BS, given, strict=True):
            row[width - len(tokens) + shared :] = tokens[shared:]
        mask_BS = np.arange(width)[None] >= width - lengths_B[:, None]
        key = random_key(config.seed)
        drawing = Drawing(
            keys_B=jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(documents, jnp.uint32)),
            temperature=jnp.float32(config.temperature) if config.temperature else None,
            top_p=jnp.float32(config.top_p) if config.top_p < 1 else None,
        )
        here = local_rows(self.sharding, size)
        written_BT = to_host(
            self.writer.write(
                np.asarray(given[0][:shared], np.int32),
                *(on_devices(array[here], self.sharding, size) for array in (tokens_BS, mask_BS)),
                drawing,
                jnp.asarray(self.model.config.eos_token_ids, jnp.int32),
                length=config.max_tokens,
                slots=_rounded(shared + width + config.max_tokens, _SLOT_STEP),
            )
        )
        ends_BT = np.isin(written_BT, self.model.config.eos_token_ids)
        lengths_B = np.where(ends_BT.any(axis=1), ends_BT.argmax(axis=1), config.max_tokens)
        rows = (
            self._row(int(document), tokens, written[:length])
            for document, tokens, written, length in zip(
                documents, given, written_BT, lengths_B, strict=True
            )
        )
        return rows, int(np.sum(np.minimum(lengths_B + 1, config.max_tokens)))

    def _encoder(self) -> Callable[[str], list[int]]:
        """From a prompt to the tokens that the model reads."""
        model, tokenizer = self.model, self.model.tokenizer
        if self.config.writes == "answers" and chat_template(model.folder)[1] is not None:
            chat = lambda prompt: [{"role": "user", "content": prompt}]
            return lambda prompt: tokenizer.encode(
                render_chat(chat(prompt), model.folder, answer=True)
            )
        if self.config.writes == "answers":
            return lambda prompt: tokenizer.encode(prompt + "\n\n", "auto")
        return lambda beginning: tokenizer.encode(beginning, "auto" if beginning else True)

    def _tokens(self, document: int) -> list[int]:
        prompt, config, model = self.prompts[document], self.config, self.model
        tokens = self.encode(prompt)
        if not tokens:
            raise ConfigError(
                "corpus.prompts must be given: the model's tokenizer has no bos token to begin a "
                "text with"
            )
        if len(tokens) + config.max_tokens > model.config.max_positions:
            raise ConfigError(
                f"corpus.max_tokens={config.max_tokens} and the {len(tokens)} tokens of the prompt "
                f"{prompt[:60]!r} are more than the {model.config.max_positions} positions of "
                f"{model.model_id}: lower it, or shorten the prompt"
            )
        return tokens

    def _row(self, document: int, given: list[int], written: np.ndarray) -> dict[str, str]:
        with_beginning = self.config.writes == "continuations"
        text = self.model.tokenizer.decode([*(given if with_beginning else ()), *written])
        # The last token may end within a character.
        return {"text": text.rstrip("\ufffd").strip(), "prompt": self.prompts[document]}


def matrix_product(mesh: Mesh, model: LanguageModel) -> tuple[Callable[[], Array], int]:
    """A plain product of large matrices in the model's dtype on all devices, and its FLOPs: its
    speed is the limit that writing is compared with."""
    sharding, width = batch_sharding(mesh), _PRODUCT_WIDTH.get(jax.default_backend(), 8192)
    rows = width * sharding.num_devices
    ones = lambda rows: np.ones((rows, width), array_dtype(model.config))
    left = on_devices(ones(rows)[local_rows(sharding, rows)], sharding, rows)
    right = on_devices(ones(width), replicated(mesh), width)
    return functools.partial(jax.jit(jnp.matmul), left, right), 2 * rows * width**2


def matrix_product_rate(mesh: Mesh, model: LanguageModel) -> float:
    """FLOP/s of :func:`matrix_product`."""
    product, flops = matrix_product(mesh, model)
    jax.block_until_ready(product())
    started = time.perf_counter()
    jax.block_until_ready([product() for _ in range(4)])
    return 4 * flops / (time.perf_counter() - started)


def _rounded(length: int, step: int) -> int:
    return -(-length // step) * step
