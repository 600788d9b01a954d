"""The shape of a decoder-only transformer, independent of the family it comes from."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from conlens_jax.config.dtypes import run_dtype


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding, with the scaling kinds of Hugging Face's ``rope_parameters``.

    Attributes:
      kind: ``"default"``, ``"linear"``, ``"dynamic"``, ``"llama3"``, ``"yarn"`` or ``"longrope"``.
      theta: base of the frequencies.
      factor: how much longer the context is than in pretraining.
      original_max_positions: context length of pretraining.
      low_freq_factor, high_freq_factor: of ``llama3``.
      beta_fast, beta_slow, truncate: of ``yarn``.
      attention_factor: of ``yarn`` and ``longrope``; scales cos and sin, and 0 means Hugging
        Face's default for the factor.
      short_factors, long_factors: of ``longrope``, one per frequency.
      fraction: the share of a head that is rotated, its first entries.
      interleaved: neighbours are rotated together, instead of an entry of the first half and one
        of the second.
    """

    kind: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    fraction: float = 1.0
    interleaved: bool = False


class LayerKind(NamedTuple):
    """How layers may differ besides their weights.

    Attributes:
      window: a query sees the keys less than this many positions before it; 0: all of them.
      rope: None for no rotation.
    """

    window: int
    rope: RopeConfig | None


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and switches; the defaults of the switches are Llama's. ``dtype``, ``unroll``,
    ``remat``, ``attention``, ``experts`` and ``quantise`` set how the network is run.

    Attributes:
      norm: ``"rms"``, or ``"layer"`` (which also subtracts the mean and may have a bias).
      norm_offset: added to the weight of a norm (Gemma's weights are around 0).
      norm_in_fp32: whether a norm's weight is multiplied before its result is rounded to ``dtype``.
      norm_weights: norms have a weight.
      pre_norms, post_norms: norms at the inputs, and at the outputs, of attention and MLP.
      qk_norm: norm of queries and keys: ``""`` none, ``"head"`` each head by itself, ``"heads"``
        the same with a weight for each, ``"width"`` all heads together.
      qkv_clip: queries, keys and values are clipped to ± this, after the norm; 0: they are not.
      parallel_residual: the MLP's input is attention's input, without attention's output.
      shared_norm: then also its norm: there is one norm at the input of both.
      gated_mlp: act(gate) · up, otherwise act(up).
      swiglu_limit: 0, or gpt-oss's gate: both halves clamped at this, and (up + 1) in place of up.
      swiglu_alpha: inner factor of that gate's sigmoid.
      n_experts, experts_per_token: of a mixture of experts; 0: one MLP.
      router_normalized: the chosen experts' weights sum to 1.
      embedding_scale: factor of token embeddings, rounded to ``dtype``.
      residual_scale: factor of what attention and MLP add to the residual stream.
      learned_positions: a table of position vectors is added to the embeddings.
      position_offset: the row of position 0 in that table; those before it are not used.
      rope: of all layers, or (with ``local_rope``) of those without a window.
      query_growth: β of the factor of queries that grows by steps of
        ``rope.original_max_positions`` (:func:`conlens_jax.models.rope.query_growth`); 0: none.
      rotated_layers: whether each layer is rotated, or empty if all are.
      windows: of each layer (see :class:`LayerKind`), or empty if no layer has one.
      attention_scale: factor of ⟨q, k⟩; 0: 1/√head_dim.
      scale_by_depth: layer i divides that by i + 1.
      attention_soft_cap, final_soft_cap: c in c·tanh(x / c), of scores and logits; 0: none.
      logit_divisor: logits are divided by it, before the cap.
      attention_sinks: one logit per head that takes part in the softmax and has no value.
      eos_token_ids: each of them ends a text.
      dtype: ``"float32"`` or ``"bfloat16"``; other spellings are converted to these.
      attention: ``"xla"`` or ``"cudnn"`` (:mod:`conlens_jax.models.flash`).
      experts: ``"blocks"``, ``"ragged"`` or ``"dense"`` (:mod:`conlens_jax.models.experts`); empty:
        by the platform.
      quantise: ``"int8"`` to load the matrices as int8
        (:mod:`conlens_jax.models.quantized`).
    """

    family: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_mlp: int
    max_positions: int
    norm: str = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    norm_in_fp32: bool = False
    norm_weights: bool = True
    pre_norms: bool = True
    post_norms: bool = False
    qk_norm: str = ""
    qkv_clip: float = 0.0
    parallel_residual: bool = False
    shared_norm: bool = False
    activation: str = "silu"
    gated_mlp: bool = True
    swiglu_limit: float = 0.0
    swiglu_alpha: float = 1.702
    n_experts: int = 0
    experts_per_token: int = 0
    router_normalized: bool = True
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    tied_embeddings: bool = False
    learned_positions: bool = False
    position_offset: int = 0
    rope: RopeConfig | None = RopeConfig()
    local_rope: RopeConfig | None = None
    query_growth: float = 0.0
    rotated_layers: tuple[bool, ...] = ()
    windows: tuple[int, ...] = ()
    attention_scale: float = 0.0
    scale_by_depth: bool = False
    attention_soft_cap: float = 0.0
    final_soft_cap: float = 0.0
    logit_divisor: float = 1.0
    attention_sinks: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"
    unroll: int = 0
    remat: str = "none"
    attention: str = "xla"
    experts: str = ""
    quantise: str = ""

    def __post_init__(self):
        object.__setattr__(self, "dtype", run_dtype(self.dtype))

    @property
    def dim_sizes(self) -> dict[str, int]:
        """Size of each dimension letter of a parameter."""
        return {
            "V": self.vocab_size,
            "P": self.max_positions + self.position_offset,
            "D": self.d_model,
            "N": self.n_layers,
            "H": self.n_heads,
            "K": self.n_kv_heads,
            "X": self.head_dim,
            "F": self.d_mlp,
            "E": self.n_experts,
        }

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        windows = self.windows or (0,) * self.n_layers
        rotated = self.rotated_layers or (True,) * self.n_layers
        local = self.local_rope or self.rope
        return tuple(
            LayerKind(window, (local if window else self.rope) if turned else None)
            for window, turned in zip(windows, rotated, strict=True)
        )

    @property
    def attention_scales(self) -> tuple[float, ...]:
        """The factor of ⟨q, k⟩ of each layer."""
        scale = self.attention_scale or self.head_dim**-0.5
        depths = range(1, self.n_layers + 1) if self.scale_by_depth else (1,) * self.n_layers
        return tuple(scale / depth for depth in depths)


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def array_dtype(config: TransformerConfig) -> jnp.dtype:
    return jnp.dtype(config.dtype)
