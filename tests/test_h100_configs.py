"""The shipped configs of H100 machines fit, as far as shapes tell, and say what they are."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from conlens_jax.config import from_config_dict
from conlens_jax.parallel.mesh import abstract_mesh, planned_mesh
from conlens_jax.planning.lens import make_plan
from conlens_jax.planning.memory import peak, step_memory
from conlens_jax.planning.model_source import planned_model
from conlens_jax.training.state import stages_of

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(file.stem for file in CONFIGS.glob("*h100.py"))
H100 = 80e9


def page(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_are_there():
    assert len(NAMES) == 5


@pytest.mark.parametrize("name", NAMES)
def test_a_device_holds_its_part(name):
    config = from_config_dict(page(name).get_config().to_dict())
    mesh, devices = planned_mesh(config.mesh)
    assert devices == (1 if name.endswith("_1xh100") else 8)
    plan = make_plan(config, planned_model(config), abstract_mesh(mesh, devices))
    for stage in stages_of(config):
        assert 1e9 < peak(step_memory(plan, stage)) < 0.9 * H100


@pytest.mark.parametrize("name", NAMES)
def test_its_page_says_what_it_is_for(name):
    text = page(name).__doc__
    for word in ("What:", "Command:", "Hardware:", "Memory:", "not measured"):
        assert word in text
    assert f"--config=configs/{name}.py" in text
