"""The sharding of a model's parameters, from the dimension letters of its table."""

from __future__ import annotations

from jax.sharding import Mesh, NamedSharding

from conlens_jax.config import ConfigError
from conlens_jax.models.param_table import ParamRow, Params, build_tree
from conlens_jax.models.transformer_config import TransformerConfig
from conlens_jax.parallel.mesh import AXIS_OF_DIM, param_spec


def param_shardings(table: list[ParamRow], config: TransformerConfig, mesh: Mesh) -> Params:
    """The sharding of every parameter of a model.

    Raises:
      ConfigError: a dimension that its mesh axis does not divide, all of them listed.
    """
    problems = []
    for row in table:
        for dim, size in zip(row.dims, row.shape(config), strict=True):
            axis = AXIS_OF_DIM.get(dim)
            if axis and size % mesh.shape[axis]:
                problems.append(
                    f"mesh.{axis}={mesh.shape[axis]} does not divide dimension {dim}={size} of "
                    f"{'.'.join(row.path)}"
                )
    if problems:
        raise ConfigError(problems)
    return build_tree((row.path, NamedSharding(mesh, param_spec(row.dims))) for row in table)
