"""The shape of a decoder-only transformer, independent of the family it comes from."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding, with the scaling kinds of Hugging Face's ``rope_parameters``.

    Attributes:
      kind: ``"default"``, ``"linear"``, ``"dynamic"``, ``"llama3"`` or ``"yarn"``.
      theta: base of the frequencies.
      factor: how much longer the context is meant to be than in pretraining.
      original_max_positions: context length of pretraining.
      low_freq_factor, high_freq_factor: of ``llama3``.
      beta_fast, beta_slow, attention_factor, truncate: of ``yarn``; ``attention_factor`` scales
        cos and sin, and 0 means Hugging Face's default for the factor.
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


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and switches; ``dtype``, ``unroll``, ``remat`` and ``quantise`` say how it
    is run."""

    family: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_mlp: int
    max_positions: int
    n_experts: int = 0
    norm_eps: float = 1e-6
    activation: str = "silu"
    tied_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    rope: RopeConfig = RopeConfig()
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    dtype: str = "float32"
    unroll: int = 0
    remat: str = "none"
    quantise: str = ""

    @property
    def dim_sizes(self) -> dict[str, int]:
        """Size of each dimension letter of a parameter."""
        return {
            "V": self.vocab_size,
            "D": self.d_model,
            "N": self.n_layers,
            "H": self.n_heads,
            "K": self.n_kv_heads,
            "X": self.head_dim,
            "F": self.d_mlp,
            "E": self.n_experts,
        }


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def array_dtype(config: TransformerConfig) -> jnp.dtype:
    return jnp.dtype(config.dtype)
