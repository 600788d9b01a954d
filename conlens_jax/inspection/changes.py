"""Experiments with explanations: the difference of two activations, and edits that steer M.

:class:`~conlens_jax.inspection.lens.Lens` offers both as methods.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from conlens_jax.config.seeds import checked_seed, numpy_seed
from conlens_jax.inspection.explainer import LensExplainer
from conlens_jax.inspection.reader import LensReader, Vector
from conlens_jax.inspection.readings import ExplainedToken
from conlens_jax.inspection.texts import Explanation, text_or_ids, token_index, token_lists
from conlens_jax.measurement.metrics import cosine
from conlens_jax.models.arguments import finite_array
from conlens_jax.models.written import Written

TextPosition = tuple[Any, int]
"""A text and an index into its tokens."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What :meth:`Lens.compare` finds between activations a and b.

    Attributes:
      a, b: the decoder's text of each of them.
      towards_a, towards_b: its text of ``mean + (a − b)`` and of ``mean + (b − a)``: the mean
        training activation moved by the difference alone. All have the ``tokens`` that were
        written.
      cos: cosine of a − b and the difference of the encoder's reconstructions of a and b: how much
        of the difference the two explanations carry.
      cos_towards_a: cosine of a − b and the encoder's reconstruction of ``towards_a`` minus the
        mean.
    """

    a: Written
    b: Written
    towards_a: Written
    towards_b: Written
    cos: float
    cos_towards_a: float


@dataclasses.dataclass(frozen=True)
class Steered:
    """The effect of :meth:`Lens.steer` on M.

    Attributes:
      written: the explanation before the edit, with the ``tokens`` that were written and whether
        its text gives them (``reads_back``).
      edited: the explanation after it, with the ``tokens`` that were read.
      effect: what M predicts with the moved activation.
      before, after: M's greedy continuation of the text without and with it.
      control: what M predicts with the activation moved as far in a random direction.
      after_control: its continuation then.
    """

    written: Written
    edited: Written
    effect: ExplainedToken
    before: str
    after: str
    control: ExplainedToken
    after_control: str


def compare(lens: LensReader, a: TextPosition | Vector, b: TextPosition | Vector) -> Comparison:
    """See :meth:`~conlens_jax.inspection.lens.Lens.compare`."""
    mean_D = np.asarray(lens.frozen["statistics"]["mean"])
    a_D, b_D = _vector_of(lens, a, "a"), _vector_of(lens, b, "b")
    difference_D = a_D - b_D
    cosine_to = lambda x_D: float(cosine(x_D[None], difference_D[None])[0])
    texts = lens.decode(np.stack([a_D, b_D, mean_D + difference_D, mean_D - difference_D]))
    encoded_a, encoded_b, towards_a, _ = lens.encode(texts)
    return Comparison(
        *texts,
        cos=cosine_to(encoded_a - encoded_b),
        cos_towards_a=cosine_to(towards_a - mean_D),
    )


def _vector_of(lens: LensReader, value: TextPosition | Vector, name: str) -> Vector:
    if not isinstance(value, tuple):
        vector, width = finite_array(value, name), lens.spec.model.d_model
        if vector.shape != (width,):
            raise ValueError(
                f"{name} must be (text, position) or an activation of {width} numbers, not of "
                f"shape {vector.shape}"
            )
        return vector
    if len(value) != 2:
        raise ValueError(f"{name} must be (text, position), not {len(value)} values")
    text, position = value
    (tokens,) = token_lists([text], lens.model, lens.add_bos)
    return lens.capture(text, token_index(position, tokens))


def steer(
    lens: LensExplainer,
    text: Any,
    position: int,
    edit: Explanation | tuple[str, str] | Callable[[Written], Explanation],
    strength: float,
    new_tokens: int,
    written: Explanation | None,
    seed: int,
) -> Steered:
    """See :meth:`~conlens_jax.inspection.lens.Lens.steer`."""
    seed = checked_seed(seed)
    if not np.isfinite(strength):
        raise ValueError(f"strength must be a finite number, not {strength}")
    (tokens,) = token_lists([text], lens.model, lens.add_bos)
    position = token_index(position, tokens)
    if written is None:
        *_, written = lens.write(text, position)
    else:
        written = lens.as_read(written)
    if isinstance(edit, tuple) and all(isinstance(words, str) for words in edit):
        edit = written.replace(*edit)
    elif callable(edit):
        edit = edit(written)
    edited, base = lens.as_read(edit), written
    # A text is compared with a text, so that the edit alone moves the activation.
    is_text = isinstance(text_or_ids(edit, lens.model), str)
    if is_text and lens.model.tokenizer.encode(written):
        base = lens.as_read(str(written))
    if edited.tokens == base.tokens:
        raise ValueError(f"edit changes nothing in the explanation {str(written)!r}")
    move_D = lens.encode(edited.tokens) - lens.encode(base.tokens)
    activation_D = lens.capture(text, position)
    moved_D = (activation_D + strength * move_D).astype(np.float32)
    control_D = activation_D + random_direction(move_D, seed) * np.float32(strength)
    effect, control = lens.swaps(text, [(position, moved_D), (position, control_D)])
    vectors_3D = np.stack([activation_D, moved_D, control_D])
    before, after, after_control = _continued(lens, text, position, vectors_3D, new_tokens)
    return Steered(written, edited, effect, before, after, control, after_control)


def random_direction(move_D: Vector, seed: int) -> Vector:
    """A vector of the same length in a random direction."""
    drawn_D = np.random.default_rng(numpy_seed(seed)).standard_normal(move_D.shape)
    return (drawn_D / np.linalg.norm(drawn_D) * np.linalg.norm(move_D)).astype(np.float32)


def _continued(
    lens: LensReader, text: Any, position: int, vectors_ND: np.ndarray, count: int
) -> list[str]:
    """M's greedy continuation with each vector at the position."""
    if not count:
        return [""] * len(vectors_ND)
    (tokens,) = token_lists([text], lens.model, lens.add_bos)
    rows_NS = np.tile(np.asarray(tokens, np.int32), (len(vectors_ND), 1))
    swap = lens.spec.layer, position % len(tokens), vectors_ND
    return lens.model.decode(lens.model.generate(rows_NS, count, stop=(), swap=swap))
