"""The embedded language model: a small Llama, trained on the configured corpus at first use.

It is saved as an ordinary Hugging Face folder and then treated like any other model. The folder's
name has a hash of all settings that determine the model, so later runs find it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from conlens_jax.config import (
    GENERATED_CORPORA,
    ConfigError,
    CorpusConfig,
    EmbeddedConfig,
    ExperimentConfig,
    ScheduleConfig,
)
from conlens_jax.config.seeds import numpy_seed, random_key
from conlens_jax.corpora.corpus import Document
from conlens_jax.corpora.duplicates import Tally
from conlens_jax.corpora.generators import GENERATORS
from conlens_jax.corpora.opening import open_corpus
from conlens_jax.corpora.statements import token_variables
from conlens_jax.data.batches import batch_indices, pad_tokens
from conlens_jax.embedded.answers import answer_statistics
from conlens_jax.files.paths import cache_folder, local_path, write_problems
from conlens_jax.lens.losses import cross_entropy
from conlens_jax.lens.schedules import make_schedule
from conlens_jax.models import hf_io
from conlens_jax.models.families import llama
from conlens_jax.models.param_table import Params, init_params
from conlens_jax.models.tokenizer import Tokenizer, train_bpe_tokenizer, train_word_tokenizer
from conlens_jax.models.transformer import forward
from conlens_jax.models.transformer_config import RopeConfig, TransformerConfig
from conlens_jax.tracking.console import Console

STATISTICS_FILE = "training.json"
SHIPPED = Path(__file__).parent / "models"
"""Models that are part of the package, named as in the cache (scripts/ship_embedded.py)."""
RARE = 0.005
"""A token with a smaller share of the corpus is rare."""
MARKS = (",", "|", "·")
"""Tokens that a lens may write between words, or for what it cannot name: a model for such a lens
knows them."""
_FORMAT = 2  # to be raised when the same settings would give another model


def cache_root(config: EmbeddedConfig) -> Path:
    """The folder of embedded models, outside any checkout."""
    return local_path(config.cache_dir) if config.cache_dir else cache_folder()


def ensure_language_model(
    config: ExperimentConfig, console: Console, *, shipped: Path = SHIPPED
) -> Path:
    """The folder of the embedded model, which is trained now if it does not exist yet.

    Args:
      shipped: folder of the models that are part of the package.

    Raises:
      ValueError: the weights of one of these are not as they were shipped.
    """
    marks = MARKS if config.target.kind != "window" or config.lens.gap_token else ()
    recipe = {
        "format": _FORMAT,
        "corpus": open_corpus(config.corpus).description(),
        **{k: v for k, v in vars(config.embedded).items() if k != "cache_dir"},
        **({"marks": marks} if marks else {}),
    }
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_root(config.embedded) / f"llama-{config.corpus.kind}-{digest}"
    for found in (folder, shipped / folder.name):
        if (found / "config.json").exists():
            _check_weights(found)
            console.line("model", found=found)
            return found
    building = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    problems = list(write_problems("embedded.cache_dir", folder.parent))
    if problems:
        raise ConfigError(problems)
    shutil.rmtree(building, ignore_errors=True)
    statistics = train_language_model(config.corpus, config.embedded, building, console, marks)
    text = json.dumps({"recipe": recipe, **statistics}, indent=2) + "\n"
    (building / STATISTICS_FILE).write_text(text, encoding="utf-8")
    if not (folder / "config.json").exists():  # another process may have finished first
        building.rename(folder)
    console.line("model", saved=folder)
    return folder


def _check_weights(folder: Path) -> None:
    """Compares the weights with the hash that a model of the package records."""
    recorded = json.loads((folder / STATISTICS_FILE).read_text(encoding="utf-8")).get("sha256")
    if recorded and weights_digest(folder) != recorded:
        raise ValueError(f"{folder}: the weights are not those that were shipped; install again")


def weights_digest(folder: Path) -> str:
    """The sha256 of a model's weights file."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def train_language_model(
    corpus: CorpusConfig,
    config: EmbeddedConfig,
    folder: Path,
    console: Console,
    marks: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains tokenizer and model, and writes them to ``folder``; a tokenizer of words also knows
    the ``marks``.

    Returns:
      ``lm_loss``: nats per token on held-out documents (without the end-of-document token), and for
      a generated corpus ``generator_entropy``: the generator's own nats per token on the same
      documents, a lower bound for any model. If the beginning of a document determines the rest (a
      sum), also the accuracy of the values, see
      :func:`~conlens_jax.embedded.answers.answer_statistics`.
    """
    started = time.time()
    source = open_corpus(corpus)
    wanted = config.steps * config.batch_size
    tally = Tally()
    train = list(itertools.islice(source.documents("train", tally=tally), wanted))
    held_out = list(itertools.islice(source.documents("validation"), 512))
    tokenizer = _train_tokenizer(corpus, config, train, marks)
    model = dataclasses.replace(
        embedded_shape(config, tokenizer.vocab_size),
        bos_token_id=tokenizer.bos_id,
        eos_token_ids=() if tokenizer.eos_id is None else (tokenizer.eos_id,),
    )
    for note in source.notes:
        console.line("model", note=note)
    console.line(
        "model",
        documents=len(train),
        duplicates=tally.copies,
        vocabulary=tokenizer.vocab_size,
        corpus=source.name,
    )
    rows = _TokenRows(tokenizer, train, config)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            make_schedule(
                ScheduleConfig(
                    "cosine", config.learning_rate, config.learning_rate / 20, warmup=20
                ),
                stage_steps=config.steps,
                steps_per_epoch=1,
            ),
            b2=0.98,
            weight_decay=0.01,
        ),
    )
    params = copying_init(model, config.seed, config.copy_init)
    state = (params, optimizer.init(params))
    step = _make_step(model, optimizer, config.label_smoothing, rows.is_rare)
    copy_weight = np.where(np.arange(config.steps) < 0.8 * config.steps, config.copy_weight, 1.0)
    with console.progress(config.steps, "language model") as progress:
        for index in range(config.steps):
            weight = copy_weight[index].astype(np.float32)
            *state, loss = step(*state, *rows.batch(index), weight)
            shown = {"loss": float(loss)} if index % 20 == 19 else {}
            progress.update(1, **shown)
    params = state[0]
    hf_io.save_model(folder, model, params)
    tokenizer.save(folder)
    statistics = _statistics(params, model, tokenizer, held_out, config)
    if corpus.kind in GENERATED_CORPORA and all(document.given for document in held_out):
        variables = token_variables(GENERATORS[corpus.kind].variables, tokenizer).values()
        statistics |= answer_statistics(params, model, tokenizer, variables, held_out)
    console.line("model", **statistics, seconds=time.time() - started)
    return statistics


def _train_tokenizer(
    corpus: CorpusConfig,
    config: EmbeddedConfig,
    documents: list[Document],
    marks: Sequence[str],
) -> Tokenizer:
    texts = [document.text for document in documents]
    if corpus.kind in GENERATED_CORPORA:
        return train_word_tokenizer(texts, config.vocab_size, marks)
    return train_bpe_tokenizer(texts, config.vocab_size, marks)


def embedded_shape(config: EmbeddedConfig, vocab_size: int) -> TransformerConfig:
    """The shape of the embedded model."""
    return TransformerConfig(
        family=llama.MODEL_TYPE,
        vocab_size=vocab_size,
        d_model=config.d_model,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.d_model // config.n_heads,
        d_mlp=config.d_mlp,
        max_positions=max(2 * config.seq_len, 256),
        initializer_range=config.d_model**-0.5,
        rope=RopeConfig(theta=config.rope_theta),
    )


def copying_init(config: TransformerConfig, seed: int, strength: float) -> Params:
    """Random parameters from which copying an earlier word is quickly learned.

    Copying a word needs three things at once: attention that finds it, values that carry it, and an
    output head that recognises it. With independent random matrices none of them helps alone, and a
    small model does not copy for thousands of steps. Here the output head is initialised as the
    transpose of the embedding, and every attention layer maps the attended state to the residual
    stream by ``strength`` times the identity (its head subspaces are orthonormal), so that only
    *where to look* has to be learned. 0: plain random parameters.
    """
    params = init_params(llama.param_table(config), config, random_key(seed))
    if not strength:
        return params
    layers, group = params["layers"], config.n_heads // config.n_kv_heads
    shape = (config.n_layers, config.d_model, config.n_kv_heads * config.head_dim)
    key = jax.random.fold_in(random_key(seed), 1)
    basis = jax.nn.initializers.orthogonal()(key, shape, layers["value"].dtype)
    basis = basis.reshape(layers["value"].shape)
    back_NKXD = jnp.transpose(basis, (0, 2, 3, 1))
    layers = {
        **layers,
        "value": basis,
        "attention_out": jnp.repeat(back_NKXD, group, axis=1) * (strength / group),
    }
    return {**params, "layers": layers, "output_head": params["embedding"].T}


class _TokenRows:
    """Training rows: whole documents, and for some of them a crop that starts in the middle.

    The crops teach the model to read fragments, such as explanations; a large model can do so
    anyway.
    """

    def __init__(self, tokenizer: Tokenizer, documents: list[Document], config: EmbeddedConfig):
        self.config = config
        self.pad_id = tokenizer.pad_id
        self.bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        texts = [document.text for document in documents]
        self.documents = [ids + eos for ids in tokenizer.encode_batch(texts)]
        counts = np.bincount(list(itertools.chain(*self.documents)), minlength=tokenizer.vocab_size)
        self.is_rare = counts < RARE * counts.sum()

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        size = min(self.config.batch_size, len(self.documents))
        chosen = batch_indices(len(self.documents), size, self.config.seed, step)
        rng = np.random.default_rng([numpy_seed(self.config.seed), step])
        lists = [self.bos + self._crop(self.documents[index], rng) for index in chosen]
        return pad_tokens(lists, self.config.seq_len, self.pad_id)

    def _crop(self, ids: list[int], rng: np.random.Generator) -> list[int]:
        room = len(ids) - self.config.seq_len // 4
        cropped = rng.random() < self.config.crop_fraction and room > 0
        start = int(rng.integers(room)) if cropped else 0
        return ids[start:]


def _token_losses(
    params: Params,
    tokens_BS: Int[Array, "B S"],
    lengths_B: Int[Array, "B"],
    model: TransformerConfig,
    smoothing: float,
) -> tuple[Float[Array, "B s"], Float[Array, "B s"]]:
    """Cross-entropy of every next token, and a weight: 1.0, or 0.0 for padding."""
    logits = forward(params, tokens_BS[:, :-1], config=model)
    targets = tokens_BS[:, 1:]
    loss = (1 - smoothing) * cross_entropy(logits, targets)
    if smoothing:
        loss -= smoothing * jnp.mean(jax.nn.log_softmax(logits), axis=-1)
    counted = jnp.arange(1, tokens_BS.shape[1])[None] < lengths_B[:, None]
    return loss, counted.astype(jnp.float32)


def seen_before(tokens_BS: Int[Array, "B S"]) -> Bool[Array, "B s"]:
    """Whether each next token already occurs earlier in its row."""
    earlier = jnp.tri(tokens_BS.shape[1] - 1, dtype=bool)[None]
    same = tokens_BS[:, None, :-1] == tokens_BS[:, 1:, None]
    return jnp.any(same & earlier, axis=-1)


def _make_step(
    model: TransformerConfig,
    optimizer: optax.GradientTransformation,
    smoothing: float,
    is_rare: np.ndarray,
):
    def mean_loss(params, tokens_BS, lengths_B, copy_weight):
        losses, weights = _token_losses(params, tokens_BS, lengths_B, model, smoothing)
        copied = seen_before(tokens_BS) & jnp.asarray(is_rare)[tokens_BS[:, 1:]]
        weights *= jnp.where(copied, copy_weight, jnp.ones_like(copy_weight))
        return jnp.sum(losses * weights) / jnp.sum(weights)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, tokens_BS, lengths_B, copy_weight):
        loss, grads = jax.value_and_grad(mean_loss)(params, tokens_BS, lengths_B, copy_weight)
        # optax mixes its int32 counters with floats, which strict promotion does not allow.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


def _statistics(
    params: Params,
    model: TransformerConfig,
    tokenizer: Tokenizer,
    documents: list[Document],
    config: EmbeddedConfig,
) -> dict[str, float]:
    """Loss on documents that fit into the context, to be comparable with the entropy."""
    encoded = tokenizer.encode_batch([document.text for document in documents], add_bos=True)
    whole = [i for i, ids in enumerate(encoded) if len(ids) <= config.seq_len]
    kept = whole or range(len(encoded))
    tokens, lengths = pad_tokens([encoded[i] for i in kept], config.seq_len, tokenizer.pad_id)
    run = jax.jit(functools.partial(_token_losses, model=model, smoothing=0.0))
    total = count = 0.0
    for start in range(0, len(tokens), 64):
        losses, counted = run(params, tokens[start : start + 64], lengths[start : start + 64])
        total, count = total + float(jnp.sum(losses * counted)), count + float(jnp.sum(counted))
    statistics = {"lm_loss": total / count}
    nats = [documents[i].nats for i in kept]
    if whole and None not in nats:
        statistics["generator_entropy"] = sum(nats) / count
    return statistics
