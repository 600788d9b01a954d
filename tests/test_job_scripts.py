"""The job scripts in dry mode, run by bash as sbatch would, and what they make of exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_plan import SETTINGS
from tiny_models import write_tiny_folder

ROOT = Path(__file__).parents[1]
SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """The tiny model; the mesh is left to the scripts."""
    folder = tmp_path_factory.mktemp("model")
    write_tiny_folder(folder)
    settings = {
        **{name: value for name, value in SETTINGS.items() if not name.startswith("mesh")},
        **{"model.path": folder, "warm.batch_size": 16, "joint.batch_size": 32},
        **{"dump.batch_size": 16, "evaluate.batch_size": 16, "joint.steps": 0, "warm.steps": 0},
    }
    given = [f"--config.{name}={value}" for name, value in settings.items()]
    return ["--config=configs/windows.py", *given]


def run(script: str, arguments: list[str], **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", script, *arguments],
        cwd=ROOT,
        env={**os.environ, **SLURM, "PYTHON": sys.executable, "PYTHONPATH": ".", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("script", "extra", "said"),
    [
        ("one_node", ["--config.mesh.preset=fsdp8", "--config.warm.steps=5"], ["1×8×1", "= peak"]),
        ("several_nodes", [], ["devices=16", "2×8×1"]),
        ("seeds", ["--config.mesh.preset=single"], ["devices=1", "1×1×1"]),
    ],
)
def test_dry_mode_compiles_and_prints_memory(script, extra, said, flags):
    done = run(f"scripts/slurm/{script}.sh", [*flags, *extra], DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    for text in said:
        assert text in done.stdout, done.stdout
    assert "compiled by XLA" in done.stdout


def test_dry_mode_says_what_does_not_fit(flags):
    done = run("scripts/slurm/one_node.sh", [*flags, "--config.mesh.tensor=3"], DRY_RUN="1")
    assert done.returncode == 2 and "mesh.tensor=3 does not divide dimension" in done.stderr


def test_kubernetes_job_runs_in_dry_mode(flags):
    """The manifest's own command, with the index that Kubernetes fills in."""
    text = (ROOT / "scripts/kubernetes/job.yaml").read_text(encoding="utf-8")
    service, job = yaml.safe_load_all(text)
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    args = [arg.replace("$(JOB_COMPLETION_INDEX)", "1") for arg in container["args"]]
    own = [arg for arg in args if not arg.startswith("--config=")]
    args = [flags[0], *own, *flags[1:]]
    done = subprocess.run(
        [sys.executable, *container["command"][1:], *args, "--config.launch.dry_run=true"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "2×8×1" in done.stdout, done.stderr
    # Pods find process 0 under the name that the service and the subdomain give it.
    assert f"{job['metadata']['name']}-0.{service['metadata']['name']}:" in " ".join(args)
    assert spec["subdomain"] == service["metadata"]["name"]
    rule = job["spec"]["podFailurePolicy"]["rules"][0]
    assert rule["action"] == "Ignore" and rule["onExitCodes"]["values"] == [75]


@pytest.mark.parametrize(
    ("code", "requeued", "command"),
    [(75, True, "train"), (0, False, "train"), (2, False, "train"), (75, True, "dump")],
)
def test_only_a_run_that_saved_is_requeued(code, requeued, command, tmp_path):
    """With srun and scontrol replaced."""
    called, started = tmp_path / "called", tmp_path / "started"
    chosen = {} if command == "train" else {"CONLENS_COMMAND": command}
    for name, body in (
        ("srun", f'echo "$@" > {started}; exit {code}'),
        ("scontrol", f'echo "$@" > {called}'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run("scripts/slurm/several_nodes.sh", ["--config=x.py"], PATH=path, **chosen)
    assert f"-m conlens_jax.{command} --config=x.py" in started.read_text()
    assert done.returncode == (0 if requeued else code)
    assert called.exists() == requeued
    if requeued:
        assert called.read_text() == "requeue 7\n"
