"""Settings that hold for every test: 8 virtual CPU devices, strict dtype promotion."""

from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    """Tests never reach for the network or a login."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
    """Every compiled program takes memory maps, of which Linux grants a process 65,530; beyond
    them XLA aborts. Programs that many files share are kept as long as there is room."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
