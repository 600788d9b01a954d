"""Workloads: a model shape with random weights (or a model folder), a lens and a batch."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from conlens_jax.config import (
    EMBEDDED_MODEL,
    ConfigError,
    ExperimentConfig,
    from_config_dict,
    lookup,
    schedule,
    with_changes,
)
from conlens_jax.embedded.language_model import embedded_shape
from conlens_jax.lens.batch import Batch
from conlens_jax.lens.objective import Objective
from conlens_jax.lens.original import capture
from conlens_jax.lens.spec import LensSpec, init_lens, make_spec
from conlens_jax.models.families import llama
from conlens_jax.models.model import load_model
from conlens_jax.models.param_table import Params, init_params
from conlens_jax.models.transformer_config import TransformerConfig
from conlens_jax.planning.flops import Workload

# Llama's rule for the mlp, 2/3 · 4 d rounded up to a multiple of 256, gives 768 at d = 256.
SHAPES = {
    "tiny": dict(d_model=32, n_layers=3, n_heads=2, d_mlp=64, vocab_size=96, tied=False),
    "S": dict(d_model=256, n_layers=6, n_heads=4, d_mlp=768, vocab_size=4096, tied=False),
    # GPT-2 small's sizes with tied embeddings; a gated mlp has 1.5 times the weights.
    "M": dict(d_model=768, n_layers=12, n_heads=12, d_mlp=3072, vocab_size=50_257, tied=True),
    # Llama 3.2 1B and Llama 3.1 8B.
    "1B": dict(
        d_model=2048, n_layers=16, n_heads=32, kv=8, d_mlp=8192, vocab_size=128_256, tied=True
    ),
    "8B": dict(
        d_model=4096, n_layers=32, n_heads=32, kv=8, d_mlp=14_336, vocab_size=128_256, tied=False
    ),
}
MIN_POSITION = 8


def model_shape(name: str, max_positions: int, **run: object) -> TransformerConfig:
    """A shape of :data:`SHAPES`; ``run`` are fields such as dtype and unroll."""
    values = SHAPES[name]
    return TransformerConfig(
        family=llama.MODEL_TYPE,
        vocab_size=values["vocab_size"],
        d_model=values["d_model"],
        n_layers=values["n_layers"],
        n_heads=values["n_heads"],
        n_kv_heads=values.get("kv", values["n_heads"]),
        head_dim=values["d_model"] // values["n_heads"],
        d_mlp=values["d_mlp"],
        tied_embeddings=values["tied"],
        max_positions=max_positions,
        **run,
    )


def comparable(config: ExperimentConfig) -> tuple[ExperimentConfig, list[str]]:
    """The config without features that the naive step lacks, and the names of changed fields.

    The KL, MSE and LM terms are enabled if their weight is zero.
    """
    changes: dict[str, object] = {
        "lens.estimator": "straight_through",
        "lens.dual_path": True,
        "lens.stop_gradient_delta": True,
        "loss.prefix_share": 0.0,
        "joint.optimizer.accumulate": 1,
    }
    defaults = {"kl": 0.1, "mse": 1.0, "lm": 0.003}
    for term, weight in defaults.items():
        if getattr(config.loss, term).start == 0:
            changes |= {
                f"loss.{term}.{key}": value for key, value in schedule("constant", weight).items()
            }
    changed = [name for name, value in changes.items() if lookup(config, name) != value]
    return with_changes(config, changes), changed


def shape_workload(
    shape: str,
    config: ExperimentConfig,
    *,
    batch: int,
    context: int,
) -> Workload:
    """A workload with random weights; L is the middle layer."""
    model = model_shape(shape, context, **_run_fields(config))
    layer = model.n_layers // 2
    return _random_workload(shape, config, model, layer, batch=batch, context=context)


def _run_fields(config: ExperimentConfig) -> dict[str, object]:
    return {name: getattr(config.model, name) for name in ("dtype", "unroll", "remat", "attention")}


def _random_workload(
    name: str,
    config: ExperimentConfig,
    model: TransformerConfig,
    layer: int,
    *,
    batch: int,
    context: int,
) -> Workload:
    """Random weights; the prompts have the length of the default ones."""
    # "<bos> Short explanation of <embed>:" and "<bos> <text>", as ids.
    spec = LensSpec(
        model=model,
        layer=layer,
        lens=config.lens,
        decoder_left=(1, 5, 6, 7),
        decoder_right=(8,),
        encoder_left=(1,),
        encoder_right=(),
        bos=1,
    )
    rows = llama.param_table(model)
    original = jax.jit(lambda key: init_params(rows, model, key))(jax.random.key(0))
    return _workload(name, config, spec, original, batch, context)


def config_workload(path: str, config: ExperimentConfig, *, batch: int, context: int) -> Workload:
    """The model and lens of a config file; the embedded model has random weights."""
    if config.model.path == EMBEDDED_MODEL:
        model = dataclasses.replace(
            embedded_shape(config.embedded, config.embedded.vocab_size), **_run_fields(config)
        )
        layer = config.model.layer
        return _random_workload(path, config, model, layer, batch=batch, context=context)
    loaded = load_model(
        config.model.path,
        revision=config.model.revision,
        **_run_fields(config),
    )
    spec = make_spec(loaded.config, config.model.layer, config.lens, loaded.tokenizer)
    return _workload(path, config, spec, loaded.params, batch, context)


def read_config_file(path: str) -> ExperimentConfig:
    """The validated settings of a config file.

    Raises:
      ConfigError: the file does not exist, or has no ``get_config()``.
    """
    if not Path(path).is_file():
        raise ConfigError(f"--config={path!r}: there is no such file")
    names = runpy.run_path(path)
    if "get_config" not in names:
        raise ConfigError(f"--config={path!r} has no get_config()")
    return from_config_dict(names["get_config"]().to_dict())


def _workload(
    name: str,
    config: ExperimentConfig,
    spec: LensSpec,
    original: Params,
    batch_size: int,
    context: int,
) -> Workload:
    objective = Objective(config.loss, config.warm, spec, config.target.kind)
    after, first = config.loss.kl_horizon, MIN_POSITION
    if objective.uses("text") and objective.target == "window":
        after, first = max(after, config.warm.after), max(first, config.warm.before)
    if context <= first + after:
        raise ConfigError(
            f"context length {context} is too short: positions begin at {first}, and {after} "
             "tokens are read after them"
        )  # fmt: skip
    rng = np.random.default_rng(0)
    shared = config.joint.rows_per_document
    shape = (batch_size // shared, context)
    tokens_GS = rng.integers(0, spec.model.vocab_size, shape).astype(np.int32)
    positions_B = rng.integers(first, context - after, batch_size).astype(np.int32)
    target_BT = rng.integers(0, spec.model.vocab_size, (batch_size, spec.text_len), np.int32)
    read = jax.jit(capture, static_argnames="spec")
    states_GSD = read(original, tokens_GS, np.ones(shape, bool), spec=spec)
    documents_B = np.arange(batch_size) // shared
    activation_BD = states_GSD[documents_B, positions_B].astype(jnp.float32)
    mean_D = np.asarray(jnp.mean(activation_BD, axis=0))
    scale = float(jnp.std(activation_BD - mean_D[None]))
    trainable, frozen = init_lens(original, spec, mean_D, scale)
    # The step donates the trained weights; the reference is kept.
    frozen |= {"warm_decoder": jax.tree.map(jnp.copy, trainable["decoder"])}
    batch = Batch(
        activation_BD,
        jnp.asarray(tokens_GS),
        jnp.full(len(tokens_GS), context, jnp.int32),
        jnp.asarray(positions_B),
        jnp.arange(batch_size, dtype=jnp.int32),
        None if objective.target == "window" else jnp.asarray(target_BT),
    )
    return Workload(name, config, objective, trainable, frozen, batch)
