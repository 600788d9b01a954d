"""Bytes per device during a training step: exact for what is stored, estimated for the rest.

Arrays stored between steps are exact. Temporary memory depends on the compiler; the estimates state
what they count, and ``--compile`` uses XLA's analysis. With b bytes per number in the model's
dtype, and rows and dimensions of one device (rows over ``data`` and ``fsdp``; heads and mlp over
``tensor``), a layer keeps for each token of its backward pass

    remat=full       b D                                              its input
    remat=products   b (3 D + H X + 2 K X + 2 F)                      and every matrix product
    remat=none       b (6 D + 3 H X + 3 K X + 4 F) + 8 H keys         and all between them

where 8 H keys are attention's scores and weights in fp32. In a mixture of experts F is the total
width of a token's k experts, and there are k − 1 more D: their outputs. A layer with an input of
its own, I wide, keeps I, D + 2 I or 2 D + 4 I more. The peak is the larger of the backward pass and
the optimizer, which do not overlap.

Against XLA's temporary memory on 8 CPU devices (Llama-3.2-1B, float32, remat=full, 64 rows, T = 8,
trained in full), in GiB, XLA / here: along data 15.3 / 15.3 (warm start) and 16.5 / 15.3 (joint),
along fsdp 1.9 / 3.0 and 3.6 / 3.0, fsdp 2 × tensor 4 2.0 / 2.0 and 2.7 / 2.0. Where activations
dominate, XLA uses up to fsdp times this estimate: by default it splits them along D, not rows.
"""

from __future__ import annotations

from typing import NamedTuple

from conlens_jax.lens.vocabulary import chunks_of
from conlens_jax.models.transformer_config import array_dtype
from conlens_jax.parallel.footprint import device_bytes
from conlens_jax.planning.lens import Plan
from conlens_jax.training.state import Stage

_FP32 = 4


class Part(NamedTuple):
    """One part of the memory of each device.

    Attributes:
      name: what they are.
      n_bytes: how many.
      how: how they are counted.
      phase: ``"stored"`` (kept between steps, exact), ``"backward"`` or ``"optimizer"``.
    """

    name: str
    n_bytes: float
    how: str
    phase: str = "backward"


class Pass(NamedTuple):
    """A differentiated pass of rows and tokens through layers."""

    name: str
    rows: int
    tokens: int
    n_layers: int
    keys: int


def step_memory(plan: Plan, stage: Stage) -> list[Part]:
    """Every part of a step's memory on one device."""
    return [*_stored(plan, stage), *_made(plan, stage)]


def peak(parts: list[Part]) -> float:
    """What is stored, plus the larger of the two phases of a step."""
    of = lambda phase: sum(part.n_bytes for part in parts if part.phase == phase)
    return of("stored") + max(of("backward"), of("optimizer"))


def _stored(plan: Plan, stage: Stage) -> list[Part]:
    state, frozen = plan.state(stage), plan.frozen
    others = {name: part for name, part in frozen.items() if name != "original"}
    parts = [
        ("original model", frozen["original"], "weights of M"),
        ("frozen parts of the lens", others, "projections, prompts, statistics"),
        ("trained weights", state.params, "decoder and encoder"),
        ("optimizer state", state.opt_state, "Adam's moments, fp32"),
        ("lens at the start of the stage", plan.trainable, "a copy that the run keeps"),
        ("batch", plan.batch(stage), "contexts and activations"),
    ]
    if plan.config.baseline.steps:
        encoder = plan.trainable["encoder"]
        parts.append(("encoder for the baseline", encoder, "its initial state, kept until then"))
    return [Part(name, device_bytes(tree), how, "stored") for name, tree, how in parts]


def _made(plan: Plan, stage: Stage) -> list[Part]:
    passes = passes_of(plan, stage)
    parts = [
        Part(
            "gradients and updates",
            2 * _FP32 * device_bytes(plan.trainable) / _itemsize(plan),
            "both in fp32",
            "optimizer",
        ),
        Part("gradients", device_bytes(plan.trainable), "in the weights' dtype"),
        Part("gathered weights", _gathered(plan), "tables [V, D] whole along fsdp"),
        Part(
            "activations",
            sum(_kept(plan, each) for each in passes),
            f"kept for the backward pass ({', '.join(each.name for each in passes)}), "
            f"remat={plan.spec.model.remat}",
        ),
        Part("logits", _logits(plan, stage), "fp32, those in memory at the same time"),
    ]
    if not stage.supervised:
        parts += [
            Part("context", _context(plan, stage), "keys and values above layer L, for each row"),
            Part("decode cache", decode_cache(plan, stage), "keys and values of D's text"),
        ]
    return parts


def passes_of(plan: Plan, stage: Stage) -> list[Pass]:
    """The passes that are differentiated in one micro-batch."""
    spec, config = plan.spec, plan.config
    rows = stage.batch_size // stage.optimizer.accumulate
    writes = len(spec.decoder_left) + len(spec.decoder_right) + spec.text_len
    reads = len(spec.encoder_left) + len(spec.encoder_right) + spec.text_len
    write = Pass("D", rows, writes, spec.model.n_layers, writes)
    read = Pass("E", rows, reads, spec.layer + 1, reads)
    if stage.supervised:
        return [write, read]
    group, horizon = plan.objective.texts_per_row, config.loss.kl_horizon
    passes = [write._replace(rows=rows * group), read._replace(rows=rows * group)]
    upper = spec.model.n_layers - spec.layer - 1
    if plan.objective.uses("kl") and upper:
        keys = config.dump.seq_len + horizon
        passes.append(Pass("M after the swap", rows * group, horizon, upper, keys))
    if plan.objective.uses("text"):
        passes.append(write._replace(name="D, anchor"))
        if config.loss.text_read:
            passes.append(read._replace(name="E, anchor"))
    return passes


def decode_cache(plan: Plan, stage: Stage) -> float:
    """Keys and values of every layer for D's prompt and text."""
    spec = plan.spec
    rows = _local_rows(plan, stage) * plan.objective.texts_per_row
    slots = len(spec.decoder_left) + 1 + len(spec.decoder_right) + spec.text_len - 1
    return rows * slots * spec.model.n_layers * _keys_and_values(plan)


def _context(plan: Plan, stage: Stage) -> float:
    """Zero if the loss has no KL, or no layer is above L."""
    if not plan.objective.uses("kl"):
        return 0.0
    spec = plan.spec
    rows = _local_rows(plan, stage) * plan.objective.texts_per_row
    upper = spec.model.n_layers - spec.layer - 1
    return rows * plan.config.dump.seq_len * upper * _keys_and_values(plan)


def _kept(plan: Plan, each: Pass) -> float:
    """The formula above, for one pass."""
    model, tensor = plan.spec.model, plan.mesh.shape["tensor"]
    experts = max(model.experts_per_token, 1)
    width, mlp = model.d_model, model.d_mlp * experts / tensor
    query, key = (n * model.head_dim / tensor for n in (model.n_heads, model.n_kv_heads))
    numbers = {
        "full": width,
        "products": (2 + experts) * width + query + 2 * key + 2 * mlp,
        "none": (5 + experts) * width + 3 * query + 3 * key + 4 * mlp,
    }[model.remat]
    if own := model.d_layer_input:
        more = {"full": own, "products": width + 2 * own, "none": 2 * width + 4 * own}
        numbers += more[model.remat]
    n_bytes = numbers * _itemsize(plan)
    if model.remat == "none":
        n_bytes += 2 * _FP32 * model.n_heads / tensor * each.keys
    return each.rows / _batch_parts(plan) * each.tokens * each.n_layers * n_bytes


def _logits(plan: Plan, stage: Stage) -> float:
    """Four arrays for the text (D's logits, the reference's, noise, gradient), in chunks by
    :func:`~conlens_jax.lens.vocabulary.chunks_of`; and the logits of both passes of M."""
    spec, group = plan.spec, plan.objective.texts_per_row
    rows, vocab = stage.batch_size // stage.optimizer.accumulate, spec.model.vocab_size
    chunks = chunks_of(rows * group, spec.text_len, vocab)
    text = 4 * rows * group * spec.text_len / chunks
    swap = 0 if stage.supervised else 3 * rows * group * plan.config.loss.kl_horizon
    parts = _batch_parts(plan) * plan.mesh.shape["tensor"]
    return _FP32 * vocab * (text + swap) / parts


def _gathered(plan: Plan) -> float:
    """A table [V, D] in use, and the summed gradient of a trained one, are gathered along ``fsdp``,
    since the batches that look up its rows or are multiplied by it are split over ``fsdp``."""
    if plan.mesh.shape["fsdp"] == 1:
        return 0.0
    model = plan.spec.model
    tables = 1 + any("base" in plan.trainable[side] for side in ("decoder", "encoder"))
    numbers = tables * model.vocab_size * model.d_embedding
    return numbers * _itemsize(plan) / plan.mesh.shape["tensor"]


def _keys_and_values(plan: Plan) -> float:
    """Bytes per token and layer of a cache."""
    model = plan.spec.model
    return 2 * model.n_kv_heads * model.head_dim * _itemsize(plan) / plan.mesh.shape["tensor"]


def _itemsize(plan: Plan) -> int:
    return array_dtype(plan.spec.model).itemsize


def _batch_parts(plan: Plan) -> int:
    return plan.mesh.shape["data"] * plan.mesh.shape["fsdp"]


def _local_rows(plan: Plan, stage: Stage) -> float:
    return stage.batch_size / stage.optimizer.accumulate / _batch_parts(plan)
