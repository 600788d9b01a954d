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
      kind: ``"default"``, ``"linear"``, ``"dynamic"``, ``"llama3"``, ``"yarn"``, ``"longrope"`` or
        ``"proportional"``.
      theta: base of the frequencies.
      factor: how much longer the context is than in pretraining.
      original_max_positions: context length of pretraining.
      low_freq_factor, high_freq_factor: of ``llama3``.
      beta_fast, beta_slow, truncate: of ``yarn``.
      attention_factor: of ``yarn`` and ``longrope``; scales cos and sin, and 0 means Hugging
        Face's default for the factor.
      short_factors, long_factors: of ``longrope``, one per frequency.
      fraction: the share of a head that is rotated, its first entries; of ``proportional``, the
        share of a whole head's angles that are not 0.
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
      head_dim: the true width of a head (see :class:`LayerShape`).
    """

    window: int
    rope: RopeConfig | None
    head_dim: int


class LayerShape(NamedTuple):
    """What a layer uses of the sizes of its model. The rest of its parameters is zero and stays so:
    a parameter is one array over all layers, as large as the largest of them needs.

    Attributes:
      head_dim: entries of a head; half of them at the beginning of each half, where the rotation
        has the two of a pair.
      n_kv_heads, d_mlp: the first ones.
    """

    head_dim: int
    n_kv_heads: int
    d_mlp: int


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
      layer_shapes: of each layer, or empty if all have ``head_dim``, ``n_kv_heads`` and ``d_mlp``.
      values_are_keys: whether each layer's values are its keys before norm and rotation, or empty
        if none's are.
      value_norm: a norm of each head's value, without a weight.
      n_sharing_layers: how many layers at the end have no keys and values of their own. Each uses
        those of the last earlier layer of its type, with or without a window.
      d_layer_input: width of what each layer reads of a token besides the residual stream
        (:func:`conlens_jax.models.transformer.add_position_embeddings`); 0: nothing.
      layer_input_pad: the token whose inputs a vector has that is no token's embedding.
      output_scales: a layer's output is multiplied by a number of its own.
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
    layer_shapes: tuple[LayerShape, ...] = ()
    values_are_keys: tuple[bool, ...] = ()
    value_norm: bool = False
    n_sharing_layers: int = 0
    d_layer_input: int = 0
    layer_input_pad: int = 0
    output_scales: bool = False
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
            "I": self.d_layer_input,
            # Of all layers' inputs: in their table, and where they are an output.
            "M": self.d_layer_input * self.n_layers,
            "L": self.d_layer_input * self.n_layers,
            "1": 1,
        }

    @property
    def d_embedding(self) -> int:
        """Width of a token's embedding: the inputs of all layers come after the residual stream."""
        return self.d_model + self.d_layer_input * self.n_layers

    @property
    def whole_shape(self) -> LayerShape:
        """The shape of a layer that uses all of every size."""
        return LayerShape(self.head_dim, self.n_kv_heads, self.d_mlp)

    def shape_of(self, layer: int) -> LayerShape:
        return self.layer_shapes[layer] if self.layer_shapes else self.whole_shape

    def dim_sizes_of(self, layer: int) -> dict[str, int]:
        """Those of :attr:`dim_sizes` that a layer uses."""
        shape = self.shape_of(layer)
        return self.dim_sizes | {"X": shape.head_dim, "K": shape.n_kv_heads, "F": shape.d_mlp}

    def shares(self, layer: int) -> bool:
        """Whether a layer has the keys and values of an earlier one."""
        return layer >= self.n_layers - self.n_sharing_layers

    def first_layers(self, count: int) -> TransformerConfig:
        """The shape of a model of the first layers only.

        Raises:
          ValueError: they are no model of this family, since its layers differ in shape, share keys
            or have inputs of their own.
        """
        if self.layer_shapes or self.n_sharing_layers or self.d_layer_input:
            raise ValueError(f"the first layers of a {self.family} model are no such model")
        windows = self.windows[:count] if any(self.windows[:count]) else ()
        rotated = self.rotated_layers[:count]
        return dataclasses.replace(self, n_layers=count, windows=windows, rotated_layers=rotated)

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        windows = self.windows or (0,) * self.n_layers
        rotated = self.rotated_layers or (True,) * self.n_layers
        local = self.local_rope or self.rope
        widths = [self.shape_of(layer).head_dim for layer in range(self.n_layers)]
        return tuple(
            LayerKind(window, (local if window else self.rope) if turned else None, width)
            for window, turned, width in zip(windows, rotated, widths, strict=True)
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
