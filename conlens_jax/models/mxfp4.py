"""The 4-bit weights of gpt-oss as floats: OCP Microscaling Formats (MX) v1.0, MXFP4.

A block is 32 numbers of 4 bits (sign, 2 bits of exponent, 1 of mantissa; the low half of a byte
comes first) and one scale, the biased exponent of a power of two.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt8

MXFP4 = "mxfp4"
BLOCKS, SCALES = "_blocks", "_scales"
_BIAS = 127
_MAGNITUDES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_NUMBERS = np.concatenate([_MAGNITUDES, -_MAGNITUDES])
# Both numbers of each byte.
_PAIRS = np.stack([np.tile(_NUMBERS, 16), np.repeat(_NUMBERS, 16)], axis=-1)


def dequantise_mxfp4(
    blocks: UInt8[np.ndarray, "E outputs blocks 16"], scales: UInt8[np.ndarray, "E outputs blocks"]
) -> Float[np.ndarray, "E inputs outputs"]:
    """bfloat16, which represents every such number exactly. Experts keep their order; a matrix is
    [inputs, outputs] as in an unquantised file."""
    experts, outputs, n_blocks, n_bytes = blocks.shape
    dense = np.empty((experts, outputs, 2 * n_blocks * n_bytes), ml_dtypes.bfloat16)
    for expert in range(experts):
        power = np.ldexp(np.float32(1), scales[expert].astype(np.int32) - _BIAS)
        numbers = _PAIRS[blocks[expert]] * power[..., None, None]
        dense[expert] = numbers.reshape(outputs, -1)
    return dense.swapaxes(1, 2)
