"""How a model's parameters are sharded over a mesh, by the dimension letters of its table."""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax
from jax.sharding import Mesh, NamedSharding

from conlens_jax.config import ConfigError
from conlens_jax.models.families import family_of
from conlens_jax.models.param_table import (
    ParamRow,
    Params,
    abstract_params,
    build_tree,
    leaf,
)
from conlens_jax.models.quantized import Int8Matrix
from conlens_jax.models.transformer_config import TransformerConfig, array_dtype
from conlens_jax.parallel.mesh import AXES_OF_DIM, BATCH_AXES, param_spec


def param_shardings(table: list[ParamRow], config: TransformerConfig, mesh: Mesh) -> Params:
    """The sharding of every parameter of a model.

    Raises:
      ConfigError: a dimension that its mesh axis does not divide, or an axis that splits nothing;
        all are listed.
    """
    problems = list(_idle_axes(table, mesh))
    for row in table:
        for dim, size in zip(row.dims, row.shape(config), strict=True):
            axis = AXES_OF_DIM.get(dim)
            if axis and size % mesh.shape[axis]:
                problems.append(
                    f"mesh.{axis}={mesh.shape[axis]} does not divide dimension {dim}={size} of "
                    f"{'.'.join(row.path)}"
                )
    if problems:
        raise ConfigError(problems)
    return build_tree((row.path, _sharding(row, config, mesh)) for row in table)


def _idle_axes(table: list[ParamRow], mesh: Mesh) -> Iterator[str]:
    """Axes that split no parameter; ``data`` and ``fsdp`` split the batch in any case."""
    used = {AXES_OF_DIM.get(dim) for row in table for dim in row.dims}
    for axis in mesh.axis_names:
        if mesh.shape[axis] > 1 and axis not in used and axis not in BATCH_AXES:
            dims = ", ".join(dim for dim, of in AXES_OF_DIM.items() if of == axis)
            yield (
                f"mesh.{axis}={mesh.shape[axis]} splits nothing: no parameter of this model has "
                f"one of the dimensions {dims}; set mesh.{axis}=1"
            )


def _sharding(row: ParamRow, config: TransformerConfig, mesh: Mesh) -> NamedSharding | Int8Matrix:
    """An int8 matrix's scale is split like the matrix in the dimensions that it has."""
    whole = NamedSharding(mesh, param_spec(row.dims))
    if not row.is_int8(config):
        return whole
    return Int8Matrix(whole, NamedSharding(mesh, param_spec(row.scale_dims)), array_dtype(config))


def bytes_per_device(
    table: list[ParamRow], config: TransformerConfig, mesh: Mesh
) -> dict[tuple[str, ...], int]:
    """Bytes per device of each parameter, by its path; known before anything is loaded."""
    shapes = abstract_params(table, config)
    shardings = param_shardings(table, config, mesh)

    def of_leaf(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> int:
        return math.prod(sharding.shard_shape(shape.shape)) * shape.dtype.itemsize

    return {
        row.path: sum(
            map(
                of_leaf,
                jax.tree.leaves(leaf(shapes, row.path)),
                jax.tree.leaves(leaf(shardings, row.path)),
            )
        )
        for row in table
    }


def loading_report(config: TransformerConfig, mesh: Mesh) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table: a model's parameters, their split, and their bytes per device."""
    table = family_of(config).param_table(config)
    per_device = bytes_per_device(table, config, mesh)
    rows = []
    for row in table:
        stored = "int8" if row.is_int8(config) else config.dtype
        shape = " × ".join(f"{dim}={n}" for dim, n in zip(row.dims, row.shape(config), strict=True))
        axes = {AXES_OF_DIM[dim] for dim in row.dims if dim in AXES_OF_DIM}
        split = ", ".join(axis for axis in mesh.axis_names if axis in axes and mesh.shape[axis] > 1)
        rows.append([".".join(row.path), shape, stored, split, f"{per_device[row.path]:,}"])
    rows.append(["total", "", "", "", f"{sum(per_device.values()):,}"])
    return ["parameter", "shape", "stored as", "split over", "bytes per device"], rows
