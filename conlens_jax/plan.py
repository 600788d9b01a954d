"""What a run will need, without weights: python -m conlens_jax.plan --config=configs/lens_simple.py

From a config.json alone: parameters, bytes per device, FLOPs per step; with ``--compile`` also
XLA's memory analysis of the real train steps. ``model.path`` may be the hub id of a model in
``third_party/model_configs``, any other hub id (its config.json is downloaded), a folder, or
``"embedded"``; ``--model-config`` sets a file instead. The mesh needs no devices, see
:func:`~conlens_jax.parallel.mesh.planned_mesh`. ``--compile`` compiles for virtual CPU devices, or
with ``--target=h100`` for GPUs, which need not be present (but two wheels are needed).
"""

from __future__ import annotations

from absl import flags

from conlens_jax import cli
from conlens_jax.planning.command import show_plan

_CONFIG = cli.define_config()
MODEL_CONFIG = flags.DEFINE_string(
    "model-config", "", "A config.json, or a folder with one, instead of model.path."
)
COMPILE = flags.DEFINE_bool("compile", False, "Compile the train steps for virtual devices.")
TARGET = flags.DEFINE_string("target", "", "Compile them for this GPU: h100.")


def main() -> None:
    config, compiled = cli.load_config(_CONFIG), COMPILE.value or bool(TARGET.value)
    show_plan(config, MODEL_CONFIG.value, compiled=compiled, target=TARGET.value)


if __name__ == "__main__":
    cli.run(main)
