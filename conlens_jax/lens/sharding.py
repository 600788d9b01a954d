"""The sharding of a lens: clones like the model, the lens's own matrices over ``fsdp``.

Arrays with a dimension D are split along it over ``fsdp``, as the model's parameters are; an
adapter matrix without one is split along its rank, if ``mesh.fsdp`` divides that. Prompts, biases
and statistics are replicated.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from conlens_jax.config.rules import LORA_TARGETS
from conlens_jax.models.families import family_of
from conlens_jax.models.param_table import ParamRow
from conlens_jax.models.sharding import param_shardings
from conlens_jax.models.transformer_config import TransformerConfig
from conlens_jax.parallel.mesh import param_spec, shardings_like

# O is the second D of a square matrix: a mesh axis splits one dimension only.
_OWN_PARTS = {
    "projection": {"kernel": param_spec("DO")},
    "input_patches": {"kernel": param_spec("NDO")},
    "output_head": param_spec("DV"),
}


def lens_shardings(tree: Any, config: TransformerConfig, mesh: Mesh) -> Any:
    """Shardings for a lens or its train state: parameters and their moments, matched by name.

    Args:
      tree: arrays, or their shapes.

    Raises:
      ConfigError: the model does not fit the mesh.
    """
    # Clones are floats, even if the model is int8.
    floats = dataclasses.replace(config, quantise="")
    table = family_of(config).param_table(config)
    adapters = {row.path[-1]: _adapter(row) for row in table if row.path[-1] in LORA_TARGETS}
    own = {**_OWN_PARTS, "lora": adapters}
    named = {
        **jax.tree.map(lambda spec: NamedSharding(mesh, spec), own),
        **param_shardings(table, floats, mesh),
    }
    return jax.tree.map(_where_it_divides, tree, shardings_like(tree, named, mesh))


def _adapter(row: ParamRow) -> dict[str, P]:
    """Partition specs of ``in`` [N, (E), *inputs, r] and ``out`` [N, (E), r, *outputs]."""
    leading = row.dims[: 1 + row.has_experts]
    inputs, outputs = row.matrix_dims

    def split(before: str, after: str) -> P:
        others = param_spec(before + after)
        rank = None if "fsdp" in others else "fsdp"
        return P(*others[: len(before)], rank, *others[len(before) :])

    return {"in": split(leading + inputs, ""), "out": split(leading, outputs)}


def _where_it_divides(leaf: Any, sharding: NamedSharding) -> NamedSharding:
    """The sharding without the axes that do not divide their dimension. That can only be an
    adapter's rank: the model's dimensions have been checked."""
    parts = [
        axis if axis is None or size % sharding.mesh.shape[axis] == 0 else None
        for axis, size in zip(sharding.spec, leaf.shape, strict=False)
    ]
    return NamedSharding(sharding.mesh, P(*parts))
