"""The lenses that a server loads: of one model, which they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from conlens_jax.config import ConfigError
from conlens_jax.inspection.lens import Lens

LEAST_LENGTH = 128
"""Texts of up to this many tokens share their compiled programs."""


def load_lenses(names: Sequence[str], step: str) -> list[Lens]:
    """One lens of each name, as :meth:`Lens.load` takes it.

    Raises:
      ConfigError: their models have different tokenizers.
    """
    first = _padding(Lens.load(names[0], step=step))
    lenses = [first]
    for name in names[1:]:
        lens = _padding(Lens.load(name, step=step))
        if lens.model.tokenizer.fingerprint != first.model.tokenizer.fingerprint:
            raise ConfigError(
                f"--checkpoint={name}: its model, {lens.model.model_id}, has another tokenizer "
                f"than that of {names[0]}, {first.model.model_id}; give lenses of one model"
            )
        lenses.append(with_model_of(lens, first))
    return lenses


def with_model_of(lens: Lens, first: Lens) -> Lens:
    """The lens with the arrays of ``first``'s model in place of its own, if they are the same."""
    own, shared = lens.model, first.model
    kinds = lambda model: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.params)
    if own.weights_hash != shared.weights_hash or kinds(own) != kinds(shared):
        return lens
    pairs = zip(jax.tree.leaves(own.params), jax.tree.leaves(shared.params), strict=True)
    place_of = {id(mine): other for mine, other in pairs}
    frozen = jax.tree.map(lambda leaf: place_of.get(id(leaf), leaf), lens.frozen)
    model = dataclasses.replace(own, params=shared.params)
    return dataclasses.replace(lens, model=model, frozen=frozen)


def _padding(lens: Lens) -> Lens:
    least = min(LEAST_LENGTH, lens.spec.model.max_positions)
    return dataclasses.replace(lens, least_length=least)
