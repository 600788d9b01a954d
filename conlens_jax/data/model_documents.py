"""Documents that the model itself writes (``corpus.kind="model"``), and then reads like others.

They are written in batches; each batch becomes a file when it is complete, so after an interruption
the next call goes on with the missing ones. Document i has its own random key and its prompt, both
of the seed and i alone. Its batch decides only the shapes of the computation, which are the same
whenever it is written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from conlens_jax.config import MODEL_TEXT_FIELDS, ConfigError, CorpusConfig
from conlens_jax.config.seeds import random_key
from conlens_jax.corpora.corpus import Corpus
from conlens_jax.corpora.model_texts import RECIPE_FILE, batch_file
from conlens_jax.corpora.opening import open_corpus
from conlens_jax.corpora.prompts import Prompts, read_prompts
from conlens_jax.data.prompt_writer import PromptWriter, WritingSpeed, tokens_written
from conlens_jax.files.paths import cache_folder, local_path, write_problems
from conlens_jax.files.whole import naming_full_disk, write_atomically, write_whole
from conlens_jax.models.chat import chat_template, render_chat
from conlens_jax.models.model import LanguageModel
from conlens_jax.parallel.mesh import check_batch
from conlens_jax.parallel.preemption import Preempted, watching_for_sigterm
from conlens_jax.parallel.processes import (
    barrier,
    broadcast_from_first,
    is_first,
)
from conlens_jax.tracking.console import Console

_FORMAT = 1  # to be raised when the same recipe would give other texts


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
    size, done = batches.config.batch_size, total - len(missing)
    speed = WritingSpeed(batches.model, batches.mesh)
    with (
        console.progress(total * size, "corpus", initial=done * size) as progress,
        watching_for_sigterm(f"the documents in {folder} are complete") as stops,
    ):
        for count, number in enumerate(missing, start=1):
            with speed.measured() as add_tokens:
                rows, written = batches.write(number)
                if is_first():
                    path = batch_file(folder, number)
                    with naming_full_disk(path):
                        write_atomically(path, (json.dumps(row).encode() + b"\n" for row in rows))
                add_tokens(written)
            progress.update(size, tokens_per_s=speed.tokens_per_s)
            if count < len(missing) and stops():
                raise Preempted(
                    f"SIGTERM: the complete batches in {folder} are safe; the same command goes on"
                )
    console.line("corpus", **speed.summary())


class _Batches:
    """Writes batches of documents by their number."""

    def __init__(self, config: CorpusConfig, model: LanguageModel, mesh: Mesh, prompts: Prompts):
        self.config, self.model, self.mesh, self.prompts = config, model, mesh, prompts
        self.writer = PromptWriter(model, mesh)
        self.encode = self._encoder()

    def write(self, number: int) -> tuple[Iterator[dict[str, str]], int]:
        """The rows of batch ``number``, and how many tokens the model wrote for it."""
        config, size = self.config, self.config.batch_size
        documents = np.arange(number * size, (number + 1) * size)
        given = [self._tokens(int(document)) for document in documents]
        key = random_key(config.seed)
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(documents, jnp.uint32))
        written = self.writer.write(
            given, keys_B, config.max_tokens, config.temperature, config.top_p
        )
        rows = (
            self._row(int(document), tokens, text)
            for document, tokens, text in zip(documents, given, written, strict=True)
        )
        return rows, tokens_written(written, config.max_tokens)

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
