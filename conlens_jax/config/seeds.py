"""Seeds: any integer is a seed, and different seeds give different random numbers.

JAX keeps the last 32 bits of a seed (without 64-bit types) and refuses more than 63 of them; NumPy
refuses negative seeds, and in a list of seeds concatenates their 32-bit words. So seeds from 0 to
2³² − 1 are used directly, and any other is replaced by a hash of its digits.
"""

from __future__ import annotations

import hashlib
import operator

import jax
import numpy as np

_PLAIN = 1 << 32


def checked_seed(seed: object, name: str = "seed") -> int:
    """``seed`` as a Python integer; integers of NumPy and JAX are accepted too.

    Raises:
      ValueError: not a whole number.
    """
    try:
        if isinstance(seed, bool | np.bool_):
            raise TypeError
        return operator.index(seed)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, not {seed!r:.80}") from None


def random_key(seed: int) -> jax.Array:
    """``jax.random.key(seed)`` for any whole number; see the top of this module.

    Raises:
      ValueError: not a whole number.
    """
    seed = checked_seed(seed)
    if 0 <= seed < _PLAIN:
        return jax.random.key(seed)
    digest = _digest(seed)
    words = np.frombuffer(digest, np.uint32)
    key = jax.random.key(int(words[0]))
    for word in words[1:]:
        key = jax.random.fold_in(key, word)
    return key


def numpy_seed(seed: int) -> int:
    """The number to give NumPy's generators for any whole number ``seed``, alone or in a list.

    Raises:
      ValueError: not a whole number.
    """
    seed = checked_seed(seed)
    # With the top bit set it always has more words than NumPy pads a short list to.
    return seed if 0 <= seed < _PLAIN else int.from_bytes(_digest(seed), "big") | 1 << 127


def _digest(seed: int) -> bytes:
    # Hexadecimal: Python refuses to write very long numbers in decimal.
    return hashlib.blake2b(f"{seed:x}".encode(), digest_size=16).digest()
