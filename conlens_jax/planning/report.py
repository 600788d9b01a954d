"""The plan of a run as tables."""

from __future__ import annotations

from conlens_jax.config import MeshConfig
from conlens_jax.models.families import family_of
from conlens_jax.models.param_table import count_zeros
from conlens_jax.parallel.footprint import count, device_bytes, in_units, total_bytes
from conlens_jax.parallel.mesh import MESH_PRESETS, abstract_mesh
from conlens_jax.planning.compiled import compile_step
from conlens_jax.planning.flops import dump_flops, step_flops, supervised_flops
from conlens_jax.planning.lens import Plan, make_plan
from conlens_jax.planning.memory import peak, step_memory
from conlens_jax.planning.model_source import WordCounter
from conlens_jax.tracking.console import Console
from conlens_jax.training.accounting import parameter_table
from conlens_jax.training.state import Stage, stages_of


def print_plan(plan: Plan, console: Console, *, compiled: bool = False) -> None:
    """Prints everything known without weights; with ``compiled`` also XLA's analysis."""
    model, mesh = plan.model, plan.mesh
    shape = "×".join(str(mesh.shape[axis]) for axis in mesh.axis_names)
    console.line("model", name=model.name, shape_from=model.source, dtype=model.shape.dtype)
    console.line("mesh", devices=mesh.size, data_fsdp_tensor=shape)
    if isinstance(model.tokenizer, WordCounter):
        console.line("prompts", counted="one token per word, as there is no tokenizer.json")
    console.table("model", *model_table(plan))
    console.table("lens", *parameter_table(plan.trainable, plan.frozen, plan.spec))
    stages = [stage for stage in stages_of(plan.config) if stage.steps]
    for stage in stages:
        parts = step_memory(plan, stage)
        rows = [[part.name, part.phase, in_units(part.n_bytes), part.how] for part in parts]
        rows.append(["peak, estimated", "", in_units(peak(parts)), "stored plus the larger phase"])
        title = f"memory per device, {stage.name}, {stage.batch_size} rows per step"
        console.table(title, ["part", "phase", "bytes", "how it is counted"], rows)
        console.table(f"compute per step, {stage.name}", *flops_table(plan, stage))
    console.table("on other meshes: stored per device", *meshes_table(plan))
    if compiled:
        console.table("compiled by XLA, bytes per device", *compiled_table(plan, stages))


def model_table(plan: Plan) -> tuple[list[str], list[list[str]]]:
    """Parameters of the original model by part."""
    original = plan.frozen["original"]
    parts = {name: part for name, part in original.items() if name != "layers"}
    parts[f"{plan.spec.model.n_layers} layers"] = original["layers"]
    parts["total"] = original
    rows = [
        [name, f"{count(part):,}", in_units(total_bytes(part)), in_units(device_bytes(part))]
        for name, part in parts.items()
    ]
    model = plan.spec.model
    if zeros := count_zeros(family_of(model).param_table(model), model):
        rows.append(["of the layers, zeros beside smaller ones", f"{zeros:,}", "", ""])
    return ["part", "parameters", "bytes", "bytes per device"], rows


def flops_table(plan: Plan, stage: Stage) -> tuple[list[str], list[list[str]]]:
    """The least matrix-product FLOPs per step, over all devices."""
    work = plan.workload(stage)
    if stage.supervised:
        found = supervised_flops(work)
        found["total"] = sum(found.values())
    else:
        found = step_flops(work)
    if plan.config.data.source == "stream":
        capture = dump_flops(work)["dump"]
        found = {"capture": capture, **found, "total": found["total"] + capture}
    rows = [
        [name, f"{value:.3e}", f"{value / plan.mesh.size:.3e}"] for name, value in found.items()
    ]
    return ["phase", "FLOPs", "per device"], rows


def meshes_table(plan: Plan) -> tuple[list[str], list[list[str]]]:
    """Bytes stored between steps of the joint stage on each of :data:`MESH_PRESETS`."""
    rows = []
    for name, mesh in MESH_PRESETS.items():
        rows.append([name, _axes(mesh), _stored_on(plan, mesh)])
    return ["mesh", "data×fsdp×tensor", "bytes"], rows


def _stored_on(plan: Plan, mesh: MeshConfig) -> str:
    """Bytes, or why the model does not fit this mesh."""
    devices = mesh.data * mesh.fsdp * mesh.tensor
    try:
        other = make_plan(plan.config, plan.model, abstract_mesh(mesh, devices))
    except ValueError as error:
        return "cannot: " + str(error).strip().removeprefix("- ").splitlines()[0]
    parts = step_memory(other, stages_of(plan.config)[1])
    return in_units(sum(part.n_bytes for part in parts if part.phase == "stored"))


def _axes(mesh: MeshConfig) -> str:
    return f"{mesh.data}×{mesh.fsdp}×{mesh.tensor}"


def compiled_table(plan: Plan, stages: list[Stage]) -> tuple[list[str], list[list[str]]]:
    """XLA's analysis of each stage's step."""
    rows = []
    for stage in stages:
        found = compile_step(plan, stage)
        sizes = (found.arguments, found.temporary, found.outputs, found.aliased, found.peak)
        rows.append([stage.name, *map(in_units, sizes), f"{found.seconds:.0f} s"])
    header = ["step", "arguments", "temporary", "outputs", "− aliased", "= peak", "compiling"]
    return header, rows
