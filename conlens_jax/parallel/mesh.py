"""The device mesh: axes ``data``, ``fsdp`` and ``tensor``, always present.

One table, :data:`AXES_OF_DIM`, maps the letter of a dimension to the mesh axes that split it, for
parameters (:func:`param_spec`) and for activations (:func:`activation_axes`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from conlens_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor")
AXIS_TYPES = (AxisType.Auto,) * len(AXES)
BATCH_AXES = ("data", "fsdp")
MESH_PRESETS = {
    "single": MeshConfig(data=1),
    "data8": MeshConfig(data=8),
    "fsdp8": MeshConfig(data=1, fsdp=8),
    "fsdp2_tensor4": MeshConfig(data=1, fsdp=2, tensor=4),
    "multislice": MeshConfig(data=2, fsdp=4),
}
"""What each ``mesh.preset`` is on one device or on eight; ``multislice`` grows with the devices."""
Axes = str | tuple[str, ...]
AXES_OF_DIM: dict[str, Axes] = {
    "B": BATCH_AXES,
    "D": "fsdp",
    "V": "tensor",
    "H": "tensor",
    "K": "tensor",
    "F": "tensor",
    "M": "fsdp",  # the width of a second table of embeddings
}
"""The mesh axes of each dimension that is split; the other dimensions are whole on every device."""
_PLANNED_SLICES, _PLANNED_SLICE = 2, 8


def make_mesh(config: MeshConfig | None = None, devices: Sequence[jax.Device] = ()) -> Mesh:
    """A mesh over all devices of the run (``preset="single"``: over the first), or over the
    given ones.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    config = config or MeshConfig()
    devices = list(devices or jax.devices())
    if config.preset == "single":
        devices = devices[:1]
    if config.preset == "multislice" and not config.slices:
        config = dataclasses.replace(config, slices=slice_count(devices))
    shape = mesh_shape(config, len(devices))
    if _slice_indices(devices) and config.preset == "multislice":
        ordered = create_hybrid_device_mesh((1, *shape[1:]), (shape[0], 1, 1), devices)
        return Mesh(ordered, AXES, axis_types=AXIS_TYPES)
    return jax.make_mesh(shape, AXES, axis_types=AXIS_TYPES, devices=devices)


def slice_count(devices: Sequence[jax.Device]) -> int:
    """Groups of devices with a fast network inside: the slices that devices report, else
    processes."""
    return len(_slice_indices(devices)) or len({device.process_index for device in devices})


def _slice_indices(devices: Sequence[jax.Device]) -> set[int]:
    """The slices of a TPU run on several slices; empty otherwise."""
    indices = {getattr(device, "slice_index", None) for device in devices} - {None}
    return indices if len(indices) > 1 else set()


def planned_mesh(config: MeshConfig) -> tuple[MeshConfig, int]:
    """The mesh for a plan, and its number of devices, which need not exist: ``mesh.data=0`` counts
    as 1, and there are 2 slices of 8 devices unless ``mesh.slices`` is set."""
    if config.preset == "multislice":
        slices = config.slices or _PLANNED_SLICES
        return dataclasses.replace(config, slices=slices), slices * _PLANNED_SLICE
    numbers = MESH_PRESETS[config.preset] if config.preset else config
    return config, (numbers.data or 1) * numbers.fsdp * numbers.tensor


def abstract_mesh(config: MeshConfig, devices: int) -> AbstractMesh:
    """The mesh of a run without its devices: for shapes and bytes.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    return AbstractMesh(mesh_shape(config, devices), AXES, axis_types=AXIS_TYPES)


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """The size of each of :data:`AXES`; ``multislice`` needs ``config.slices``.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    if config.preset == "multislice":
        if devices % (config.slices * config.tensor):
            raise ConfigError(
                f"mesh.slices × mesh.tensor = {config.slices} × {config.tensor} does not "
                f"divide the {devices} devices of the run"
            )
        return config.slices, devices // config.slices // config.tensor, config.tensor
    if config.preset:
        config = MESH_PRESETS[config.preset]
    others = config.fsdp * config.tensor
    data = config.data or max(devices // others, 1)
    if data * others != devices:
        raise ConfigError(
            f"mesh.data × mesh.fsdp × mesh.tensor = {data} × {config.fsdp} × {config.tensor} "
            f"must be the number of devices, {devices}; mesh.data=0 takes what the others leave"
        )
    return data, config.fsdp, config.tensor


def single_device_mesh() -> Mesh:
    """A mesh of the first device, for exploration."""
    return make_mesh(MeshConfig(preset="single"))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First dimension over ``data`` and ``fsdp``, the rest whole."""
    return NamedSharding(mesh, P(BATCH_AXES))


def check_batch(name: str, batch_size: int, mesh: Mesh) -> None:
    """Raises ConfigError if a batch does not divide over the mesh."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % parts:
        raise ConfigError(
            f"{name}={batch_size} must be a multiple of mesh.data × mesh.fsdp = {parts}"
        )


def target_platform() -> str:
    """The platform that the program is compiled for; this process may have another."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def param_spec(dims: str) -> P:
    """The partition of a parameter from its dimension letters.

    Raises:
      ValueError: two dimensions on one mesh axis.
    """
    return P(*_without_collision(dims, [AXES_OF_DIM.get(dim) for dim in dims]))


def activation_axes(dims: str) -> list[Axes | None]:
    """The mesh axes of an activation's dimensions, by their letters.

    The batch is over ``data`` and ``fsdp``, so any other dimension that a parameter has over these
    (its width) is whole in an activation.

    Raises:
      ValueError: two dimensions on one mesh axis.
    """
    axes = [AXES_OF_DIM.get(dim) for dim in dims]
    axes = [None if of in BATCH_AXES else of for of in axes]
    return _without_collision(dims, axes)


def _without_collision(dims: str, axes_of_dim: list[Axes | None]) -> list[Axes | None]:
    first: dict[str, str] = {}
    for dim, axes in zip(dims, axes_of_dim, strict=True):
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            if axis in first:
                raise ValueError(
                    f"colliding axes: dimensions {first[axis]} and {dim} of [{', '.join(dims)}] "
                    f"are both split over mesh axis {axis!r}"
                )
            first[axis] = dim
    return axes_of_dim


def shardings_like(tree, model_shardings: PyTree, mesh: Mesh):
    """Shardings for a tree that contains parameters under the model's names (clones of it, and
    their optimizer moments): these are split like the model's, everything else is replicated.
    """
    by_path = {
        tuple(key.key for key in path): sharding
        for path, sharding in jax.tree_util.tree_leaves_with_path(model_shardings)
    }

    def choose(path, leaf):
        names = tuple(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
        for start in range(len(names)):
            sharding = by_path.get(names[start:])
            if sharding is not None and len(sharding.spec) == leaf.ndim:
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(choose, tree)
