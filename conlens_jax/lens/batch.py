"""The rows of one step, on the devices."""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from conlens_jax.lens.original import capture, documents_of
from conlens_jax.lens.spec import LensSpec
from conlens_jax.models.param_table import Params


@flax.struct.dataclass
class Batch:
    """Rows of the cache on the device.

    The context of rows that share a document is stored once: ``tokens_GS`` and ``lengths_G`` have
    one entry per document, and B / G consecutive rows belong to each. ``examples_B`` is the index
    of each row in the global batch. ``target_BT`` is the text that the warm start teaches, or None
    where that is a window of the context.
    """

    activation_BD: Float[Array, "B D"]
    tokens_GS: Int[Array, "G S"]
    lengths_G: Int[Array, "G"]
    positions_B: Int[Array, "B"]
    examples_B: Int[Array, "B"]
    target_BT: Int[Array, "B T"] | None = None

    @property
    def mask_GS(self) -> Bool[Array, "G S"]:
        return jnp.arange(self.tokens_GS.shape[1])[None] < self.lengths_G[:, None]

    @property
    def rows_per_document(self) -> int:
        return len(self.positions_B) // len(self.lengths_G)


def with_activations(batch: Batch, original: Params, spec: LensSpec) -> Batch:
    """The batch with its activations captured from M, if it came without them
    (``data.source=stream``: then they have width 0)."""
    if batch.activation_BD.shape[1]:
        return batch
    states_GSD = capture(original, batch.tokens_GS, batch.mask_GS, spec=spec)
    documents_B = documents_of(batch.positions_B, batch.tokens_GS)
    activation_BD = states_GSD[documents_B, batch.positions_B].astype(jnp.float32)
    return batch.replace(activation_BD=activation_BD)


def filled(array: np.ndarray, size: int) -> np.ndarray:
    """The array with its last row repeated, up to ``size`` rows."""
    missing = size - len(array)
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing else array
