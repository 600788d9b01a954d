"""Settings of every test: 8 virtual CPU devices, strict promotion, a compiler in a hurry."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

# Scripts import the modules beside them.
sys.path.append(str(Path(__file__).parent.parent / "scripts"))

# Tests compile much and compute little; what the library compiles is reached by the environment.
_QUICK_COMPILE = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",  # the cores have tests of their own
)


def _is_known(flags: str) -> bool:
    """A process whose XLA does not know a flag ends, so another one tries them."""
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return not subprocess.run(command, env=environment, capture_output=True).returncode


# With as many threads as devices, XLA's default, a host that is 32 programs ahead of the devices
# can deadlock them; two threads for each device suffice (scripts/studies/virtual_devices.py).
os.environ.setdefault("NPROC", "64")
if "XLA_FLAGS" not in os.environ:  # pytest-xdist's workers inherit it
    every = " ".join(_QUICK_COMPILE)
    known = every if _is_known(every) else " ".join(filter(_is_known, _QUICK_COMPILE))
    os.environ["XLA_FLAGS"] = known
# The hub's client reads this when it is imported; without it, it asks a network that is not there
# again and again.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Where an operation stands in the source takes some percent of tracing, and no test reads it.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # for subprocesses
jax.config.update("jax_traceback_in_locations_limit", 0)
# Tracing makes many objects that live long; Python's default looks through them every 700.
gc.set_threshold(20_000, 10, 10)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


# The files that take the longest, in the order in which they begin, so that no core waits long for
# another at the end. Those of the world of pipeline.py alternate with others: compiled programs are
# shared by the workers, but not while both compile them.
_LONGEST = """
    families_lens documents processes same_numbers smollm2 training_loop text_end evaluate_run
    benchmark_step full_suite resume stream places vocabulary objective step_memory starting_points
""".split()


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist's: the files of most tests first


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish(session):
    """What has been imported by now lives to the end: no collection need look through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _old_objects_stay():
    """A full collection, as after a failed read of a checkpoint, takes a second once a worker has
    compiled for some minutes; what earlier files made stays until the end in any case."""
    gc.collect(1)
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    """Tests never reach for a login."""
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
    """Every compiled program takes memory maps, of which Linux grants a process 65,530; beyond
    them XLA aborts. Programs that many files share are kept as long as there is room."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        if "pipeline" in sys.modules:
            sys.modules["pipeline"].COMPILED_STEPS.clear()
        gc.collect()
