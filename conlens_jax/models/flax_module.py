"""The transformer as a Flax module: ``init``, ``apply``, ``tabulate``, and hooks on its layers.

The variables are the package's own parameters, under their own names: ``{"params": params}`` of a
loaded model can be applied, and what ``init`` returns can be run by
:func:`conlens_jax.models.transformer.forward`. The modules declare parameters and call the pure
functions of :mod:`conlens_jax.models.block` and :mod:`conlens_jax.models.transformer`; the rest of
the package calls these functions directly.

``capture_intermediates=True`` returns the output of every layer, stacked:
``intermediates["layers"]["__call__"][0][0]`` is [N, B, S, D]. ``flax.linen.intercept_methods``
reads or replaces the input and the output of a layer.
"""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Bool, Float, Int

from conlens_jax.models.block import run_block
from conlens_jax.models.families import family_of
from conlens_jax.models.layer_kinds import LayerIndex, MaskAndRope, mask_and_rope_of
from conlens_jax.models.param_table import Params
from conlens_jax.models.transformer import (
    add_position_embeddings,
    all_positions,
    checkpointed,
    embed_tokens,
    positions_of,
    unembed,
)
from conlens_jax.models.transformer_config import TransformerConfig


class Block(nn.Module):
    """One layer. :class:`Transformer` scans over it, so that its parameters are stacked."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x_BSD: Float[Array, "B S D"], index: LayerIndex, mask_and_rope: MaskAndRope
    ) -> tuple[Float[Array, "B S D"], None]:
        weights = _declare(self, stacked=True)
        inputs = (x_BSD, None, None, None, index, mask_and_rope, None)
        return run_block(weights, *inputs, config=self.config)[0], None


class Transformer(nn.Module):
    """Tokens to logits, as :func:`conlens_jax.models.transformer.forward`."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, tokens_BS: Int[Array, "B S"], mask_BS: Bool[Array, "B S"] | None = None
    ) -> Float[Array, "B S V"]:
        """Next-token logits, fp32. ``mask_BS`` is False on padding (left or right)."""
        config = self.config
        if config.layer_shapes or config.n_sharing_layers or config.d_layer_input:
            raise ValueError(
                f"{config.family}: there is no Flax module of layers that have several shapes, "
                "share keys or have inputs of their own; use conlens_jax.models.transformer"
            )
        params = _declare(self, stacked=False)
        positions_BS = all_positions(*tokens_BS.shape) if mask_BS is None else positions_of(mask_BS)
        embeddings_BSD = embed_tokens(params, tokens_BS, config)
        x_BSD = add_position_embeddings(params, embeddings_BSD, positions_BS, config)
        mask_and_rope, index_N = mask_and_rope_of(slice(None), positions_BS, None, config)
        layers = nn.scan(
            checkpointed(Block, config, nn.remat),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=config.n_layers,
            unroll=config.unroll or config.n_layers,
        )
        x_BSD, _ = layers(config, name="layers")(x_BSD, index_N, mask_and_rope)
        return unembed(params, x_BSD, config=config)


def _declare(module: Block | Transformer, stacked: bool) -> Params:
    """Declares the parameters of the family's table: of one layer, or those outside the layers."""
    config = module.config
    table = family_of(config).param_table(config)
    return {
        row.path[-1]: module.param(row.path[-1], row.initial, config, row.layer_shape(config))
        for row in table
        if row.stacked == stacked
    }
