"""The dtypes that a model can run in, and how they may be spelled."""

from __future__ import annotations

from typing import Any

import ml_dtypes  # noqa: F401  (makes NumPy know "bfloat16")
import numpy as np

RUN_DTYPES = ("float32", "bfloat16")
_SPELLINGS = {
    **dict.fromkeys(("float32", "fp32", "f32"), "float32"),
    **dict.fromkeys(("bfloat16", "bf16"), "bfloat16"),
}
_HALF = ("float16", "fp16", "f16", "half")


def run_dtype(value: Any, name: str = "dtype") -> str:
    """``"float32"`` or ``"bfloat16"``, however it was written: ``"bf16"``, ``jnp.bfloat16``,
    ``np.float32``, ``"torch.bfloat16"`` ...

    Args:
      name: what to call the value in messages.

    Raises:
      ValueError: another dtype.
    """
    spelled = _spelled(value)
    if spelled not in _SPELLINGS:
        raise ValueError(_refusal(value, name, spelled))
    return _SPELLINGS[spelled]


def dtype_problem(value: Any, name: str) -> str | None:
    """Why a field of a config cannot have this dtype, or None. Only the full names are allowed in
    a config, because it is recorded."""
    if isinstance(value, str) and value in RUN_DTYPES:
        return None
    return _refusal(value, name, _spelled(value))


def _spelled(value: Any) -> str:
    if isinstance(value, str):
        found = value
    else:
        try:
            # NumPy reads None as float64.
            found = str(value) if value is None else np.dtype(value).name
        except TypeError:  # a dtype of torch, or no dtype
            found = str(value)
    return found.strip().lower().rpartition(".")[2]


def _refusal(value: Any, name: str, spelled: str) -> str:
    message = f"{name} must be one of {', '.join(RUN_DTYPES)}, not {value!r}"
    if spelled in _HALF:
        message += (
            ": a float16 model file can be read, but activations of large models exceed the range "
            "of float16 (65504) and become infinite; use bfloat16, of the same size, or float32"
        )
    return message
