"""Models run in float32 and bfloat16, by any name; float16 is refused with the reason."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny_models import random_params, random_tokens, tiny_config, write_tiny_folder

import conlens_jax
from conlens_jax.config import config_problems
from conlens_jax.config.dtypes import run_dtype
from conlens_jax.inspection.lens import Lens
from conlens_jax.models.hf_io import save_model

WHY = r"one of float32, bfloat16, not .*range of float16 \(65504\).*use bfloat16"


@pytest.mark.parametrize(
    "value", ["bfloat16", "bf16", "BF16", "torch.bfloat16", jnp.bfloat16, ml_dtypes.bfloat16]
)
def test_bfloat16_by_any_name(value):
    assert run_dtype(value) == run_dtype(np.dtype(ml_dtypes.bfloat16)) == "bfloat16"


@pytest.mark.parametrize(
    "value", ["float32", "fp32", "f32", " Float32", "torch.float32", jnp.float32, np.float32]
)
def test_float32_by_any_name(value):
    assert run_dtype(value) == run_dtype(np.dtype(np.float32)) == "float32"


def test_torchs_own_objects():
    torch = pytest.importorskip("torch")
    assert run_dtype(torch.bfloat16) == "bfloat16"
    assert run_dtype(torch.float32) == "float32"
    with pytest.raises(ValueError, match=WHY):
        run_dtype(torch.float16)


@pytest.mark.parametrize(
    "value", ["float16", "fp16", "half", "FP16", "torch.half", jnp.float16, np.dtype(np.float16)]
)
def test_float16_is_refused_everywhere(tmp_path, value):
    calls = {
        "load_model": lambda: conlens_jax.load_model(tmp_path, dtype=value),
        "Lens.load": lambda: Lens.load(tmp_path, dtype=value),
        "config": lambda: tiny_config().__class__(**vars(tiny_config()) | {"dtype": value}),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=WHY):
            call()


@pytest.mark.parametrize("value", [None, "float64", "int8", "", "x", 3, object(), [1], float])
def test_others_are_refused_with_the_names(tmp_path, value):
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, not"):
        conlens_jax.load_model(tmp_path, dtype=value)


@pytest.mark.parametrize("field", ["model.dtype", "dump.dtype"])
def test_configs_take_the_full_names_only(field):
    import dataclasses

    section, name = field.split(".")
    config = conlens_jax.config.ExperimentConfig()

    def problems(value):
        changed = dataclasses.replace(getattr(config, section), **{name: value})
        return [
            problem
            for problem in config_problems(dataclasses.replace(config, **{section: changed}))
            if problem.startswith(field)
        ]

    assert problems("float32") == problems("bfloat16") == []
    assert "range of float16" in problems("float16")[0]
    assert problems("bf16") == [f"{field} must be one of float32, bfloat16, not 'bf16'"]
    assert problems(np.dtype(np.float32))


@pytest.mark.parametrize("dtype", ["fp32", jnp.bfloat16])
def test_massive_activations_stay_finite(tmp_path, dtype):
    """The first block writes values beyond float16's range, as large models do."""
    write_tiny_folder(tmp_path)
    config = tiny_config()
    params = random_params(config)
    layers = params["layers"]
    layers["down"] = layers["down"].at[0].multiply(1e8)
    save_model(tmp_path, config, params)
    model = conlens_jax.load_model(tmp_path, dtype=dtype, unroll=1)
    assert model.config.dtype == run_dtype(dtype)
    tokens = random_tokens(1, 6)
    assert np.abs(np.asarray(model.capture(tokens, 0), np.float32)).max() > 65504
    assert np.isfinite(np.asarray(model.logits(tokens), np.float32)).all()
