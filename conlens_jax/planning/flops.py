"""The least matrix-product FLOPs of a joint step, by phase (m×k by k×n: 2 m k n).

With W the number of weights in a layer's matrices, W_kv those of its key and value, H X the width
of attention, a stack of n layers over s new tokens costs

    2 [(n − 1) s W + s W_kv + r (W − W_kv)]  +  4 H X [(n − 1) q + q_r]

where r of the tokens are needed at its end (the last layer computes only key and value for the
others), q is the number of pairs of a query and a visible key, and q_r that of the r needed tokens.
Nothing after P + h − 1 is needed. In the backward pass, the gradient of the inputs costs as much as
the forward pass, and that of trained weights as much again; attention's backward costs twice its
forward. The gradient through the history costs nothing more: token by token from the last to the
first, one backward pass is exact. ``re-forward`` is counted, since text is first sampled and then
differentiated; work other than matrix products (softmax over the vocabulary, noise, optimizer) is
not, nor are low-rank adapters and input patches. In a mixture of experts only the chosen experts
count; the dense form (:mod:`conlens_jax.models.experts`) computes all of them.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from conlens_jax.config import ExperimentConfig
from conlens_jax.lens.batch import Batch
from conlens_jax.lens.objective import Objective
from conlens_jax.lens.spec import LensSpec
from conlens_jax.models.matrix_sizes import layer_matrix_sizes
from conlens_jax.models.param_table import Params
from conlens_jax.models.transformer_config import TransformerConfig

_KEY_VALUE = ("key", "value")


@dataclasses.dataclass(frozen=True)
class Workload:
    """The inputs of a training step, arrays or shapes, and the configuration of the step."""

    name: str
    config: ExperimentConfig
    objective: Objective
    trainable: Params
    frozen: Params
    batch: Batch

    @property
    def spec(self) -> LensSpec:
        return self.objective.spec


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs of products with weights, and of attention's products."""

    weights: float = 0.0
    attention: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.weights + other.weights, self.attention + other.attention)

    @property
    def total(self) -> float:
        return self.weights + self.attention

    def backward(self, trained: bool) -> float:
        return self.weights * (2 if trained else 1) + 2 * self.attention


def stack_cost(
    config: TransformerConfig,
    n_layers: int,
    tokens: float,
    pairs: float,
    read: float,
    read_pairs: float,
) -> Cost:
    """The formula above, for counts summed over the batch."""
    if n_layers == 0:
        return Cost()
    sizes = layer_matrix_sizes(config)
    every, key_value = sum(sizes.values()), sum(sizes[name] for name in _KEY_VALUE)
    weights = (n_layers - 1) * tokens * every + tokens * key_value + read * (every - key_value)
    width = config.n_heads * config.head_dim
    return Cost(2.0 * weights, 4.0 * width * ((n_layers - 1) * pairs + read_pairs))


def causal(first: float, count: float) -> float:
    """Query-key pairs of ``count`` tokens in causal attention, after ``first`` earlier tokens."""
    return count * first + count * (count + 1) / 2


def text_cost(config: TransformerConfig, n_layers: int, prompt: int, text: int, read: int) -> Cost:
    """One row of ``prompt + text`` tokens; only the outputs of the last ``read`` are needed."""
    length = prompt + text
    pairs, unread = causal(0, length), causal(0, length - read)
    return stack_cost(config, n_layers, length, pairs, read, pairs - unread)


def step_flops(work: Workload) -> dict[str, float]:
    """FLOPs of each phase, and their ``total``."""
    spec, objective = work.spec, work.objective
    config, lens, layer = spec.model, spec.lens, spec.layer
    rows, text_len = len(work.batch.positions_B), spec.text_len
    horizon = objective.loss.kl_horizon
    head = Cost(2.0 * config.d_model * config.vocab_size)
    square = Cost(2.0 * config.d_model**2)
    prompt = len(spec.decoder_left) + 1 + len(spec.decoder_right)
    around = len(spec.encoder_left) + len(spec.encoder_right)

    written = text_cost(config, config.n_layers, prompt, text_len - 1, text_len)
    heads = Cost(text_len * head.total)
    read_back = text_cost(config, layer + 1, around, text_len, 1)
    before = np.asarray(work.batch.positions_B, np.float64)
    upper = config.n_layers - layer - 1
    context = Cost()
    for rows_before in before.reshape(-1, work.batch.rows_per_document):  # documents of the batch
        length, read_tokens = max(rows_before) + horizon, horizon * len(rows_before)
        whole = causal(0, length)
        windows = sum(causal(first, horizon) for first in rows_before)
        # Layers above L read the whole context; without any, only the windows are needed.
        read = (length, whole) if upper else (read_tokens, windows)
        context += stack_cost(config, layer + 1, length, whole, *read)
        context += stack_cost(config, upper, length, whole, read_tokens, windows)
        context += Cost(read_tokens * head.total)
    swap = Cost(rows * horizon * head.total)
    for length in before:
        window = causal(length, horizon)
        swap += stack_cost(config, upper, horizon, window, horizon, window)

    full_decoder, full_encoder = lens.train_decoder == "full", lens.train_encoder == "full"
    head_trained = full_decoder or lens.train_output_head
    backward = (
        written.backward(full_decoder)
        + heads.backward(head_trained)
        + read_back.backward(full_encoder)
        + 2 * square.backward(lens.train_projections)
        # E ē of every token (encoder's table) and of all but the last (decoder's).
        + (2 * text_len - 1) * head.total
    )
    if objective.loss.lm_reference == "warm":
        reference = written.total + heads.total
    else:
        start = 0 if spec.bos is None else 1
        if objective.loss.lm_reference == "prompt":
            start = prompt - 1
        reference = text_cost(config, config.n_layers, start, text_len - 1, text_len).total
        reference += heads.total
    found = {
        "decode": rows * (written.total + heads.total + square.total),
        "re-forward": rows * (written.total + heads.total + square.total),
        "reference": rows * reference,
        "encode": rows * (read_back.total + square.total),
        "prefix pass": context.total,
        "swap": swap.total,
        "backward": rows * backward + swap.backward(trained=False),
    }
    if objective.uses("text"):
        found["text anchor"] = sum(supervised_flops(work).values())
    return {**found, "total": sum(found.values())}


def supervised_flops(work: Workload) -> dict[str, float]:
    """FLOPs of a step of the warm start, which is also the anchor term of the joint loss: D writes
    a window of real text, E reads it."""
    spec, lens = work.spec, work.spec.lens
    rows, text_len = len(work.batch.positions_B), spec.text_len
    prompt = len(spec.decoder_left) + 1 + len(spec.decoder_right)
    around = len(spec.encoder_left) + len(spec.encoder_right)
    written = text_cost(spec.model, spec.model.n_layers, prompt, text_len - 1, text_len)
    heads = Cost(2.0 * spec.model.d_model * spec.model.vocab_size * text_len)
    read_back = text_cost(spec.model, spec.layer + 1, around, text_len, 1)
    full_decoder = lens.train_decoder == "full"
    head_trained = full_decoder or lens.train_output_head
    return {
        "write": rows * (written.total + heads.total),
        "read": rows * read_back.total,
        "backward": rows
        * (
            written.backward(full_decoder)
            + heads.backward(head_trained)
            + read_back.backward(lens.train_encoder == "full")
        ),
    }


def dump_flops(work: Workload) -> dict[str, float]:
    """FLOPs of a batch of the dump (up to the output of block L), and of a full forward."""
    config, layer = work.spec.model, work.spec.layer
    rows, length = work.batch.tokens_GS.shape
    pairs = causal(0, length)
    lower = stack_cost(config, layer + 1, length, pairs, length, pairs)
    every = stack_cost(config, config.n_layers, length, pairs, length, pairs)
    head = 2.0 * config.d_model * config.vocab_size * length
    return {"dump": rows * lower.total, "full": rows * (every.total + head)}


def explain_flops(spec: LensSpec, positions: np.ndarray) -> float:
    """FLOPs of explaining these positions of one document: M reads it once, D writes a text for
    each, E reads that, and M predicts with the reconstruction and with the mean in its place."""
    config, text_len = spec.model, spec.text_len
    rows, length = len(positions), int(np.max(positions)) + 1
    head, square = 2.0 * config.d_model * config.vocab_size, 2.0 * config.d_model**2
    prompt = len(spec.decoder_left) + 1 + len(spec.decoder_right)
    around = len(spec.encoder_left) + len(spec.encoder_right)
    pairs = causal(0, length)
    read = stack_cost(config, config.n_layers, length, pairs, length, pairs)
    text = text_cost(config, config.n_layers, prompt, text_len - 1, text_len)
    text += text_cost(config, spec.layer + 1, around, text_len, 1)
    seen = float(np.sum(positions + 1))
    swap = stack_cost(config, config.n_layers - spec.layer - 1, rows, seen, rows, seen)
    heads = (text_len + 3) * head  # of the text; of M as it is and with the two swaps
    return read.total + rows * (text.total + heads + 2 * square) + 2 * swap.total
