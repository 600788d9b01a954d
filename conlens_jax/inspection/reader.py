"""The part of a lens that reads: activations of texts, reconstructions of explanations, swaps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from conlens_jax.evaluation.row_warnings import reading_warnings, row_warnings
from conlens_jax.inspection import batching
from conlens_jax.inspection.parts import LensParts
from conlens_jax.inspection.programs import Programs, SwapPrediction
from conlens_jax.inspection.readings import ExplainedToken, Prediction, Reading
from conlens_jax.inspection.texts import (
    Explanation,
    Positions,
    is_one,
    is_one_explanation,
    read_explanations,
    token_index,
    token_indices,
    token_lists,
)
from conlens_jax.lens.original import ContextStates
from conlens_jax.models.arguments import finite_array
from conlens_jax.models.written import Written, written_texts

Vector = Float[np.ndarray, "D"]


class LensReader(LensParts):
    """The part of :class:`~conlens_jax.inspection.lens.Lens` that reads texts and explanations.

    Indices are into the tokens of a text, where a bos token counts (:meth:`tokens` shows them).
    """

    @functools.cached_property
    def _programs(self) -> Programs:
        return Programs(self.spec)

    def tokens(self, text: Any) -> list[str]:
        """The tokens of one text, printable, in the order of their indices."""
        (tokens,) = token_lists([text], self.model, self.add_bos)
        return [self.model.tokenizer.token(token) for token in tokens]

    def capture(self, text: Any, position: Positions) -> Float[np.ndarray, "*N D"]:
        """Activations of one text, the output of the lens's block in fp32: [D] at one position, or
        [N, D] at several (``"all"``: at every token, also a bos token)."""
        (tokens,) = token_lists([text], self.model, self.add_bos)
        indices = token_indices(position, tokens, None, "position")
        (group,) = batching.groups_of([tokens], [indices], 1, self.least_length)
        states = self._read(group.tokens_GS, group.mask_GS)
        vectors_ND = np.asarray(states.residual_GSD[0, np.array(indices)], np.float32)
        return vectors_ND[0] if is_one(position) else vectors_ND

    def decode(self, activations: Float[np.ndarray, "*N D"]) -> Written | list[Written]:
        """The decoder's greedy text of one activation or of several; each text carries the tokens
        that were written."""
        vectors = np.atleast_2d(finite_array(activations, "activations"))
        self._check_width(vectors)
        size = batching.power_of_two(len(vectors))
        rows = jnp.asarray(batching.filled(vectors, size))
        written, _ = self._programs.write(self.trainable, self.frozen, rows, None)
        texts = written_texts(
            np.asarray(written)[: len(vectors)], self.model.tokenizer, self.spec.end
        )
        return texts[0] if np.ndim(activations) == 1 else texts

    def as_read(self, explanation: Explanation) -> Written:
        """An explanation as :meth:`encode`, :meth:`swap` and :meth:`steer` read it: the text, with
        the ``tokens`` that the encoder gets, and whether the text alone gives them
        (``reads_back``).

        A lens's own output (a reading of :meth:`explain`, its ``text``, a text of :meth:`decode` or
        :meth:`write`) is read as the tokens that were written, and token ids unchanged. Any other
        text is tokenised.

        Raises:
          ValueError: no explanation, or one without a token or with more than the model can read.
        """
        (written,) = read_explanations([explanation], self.model, self.spec.end)
        return written

    def encode(self, explanation: Explanation | Sequence[Explanation]) -> Float[np.ndarray, "*N D"]:
        """The encoder's reconstruction from an explanation, [D], or from several, [N, D]; in the
        units of the activation, fp32. The encoder was trained on texts of ``spec.text_len`` tokens.

        Args:
          explanation: read as in :meth:`as_read`.

        Raises:
          ValueError: as :meth:`as_read`.
        """
        one = is_one_explanation(explanation)
        values = [explanation] if one else list(explanation)
        explanations = read_explanations(values, self.model, self.spec.end)
        lists = [written.tokens for written in explanations]
        arrays = map(jnp.asarray, batching.aligned_right(lists))
        vectors = self._programs.encode(self.trainable, self.frozen, *arrays)
        vectors_ND = np.asarray(vectors)[: len(lists)]
        return vectors_ND[0] if one else vectors_ND

    def swap(self, text: Any, position: int, replacement: Explanation | Vector) -> ExplainedToken:
        """M's prediction with an activation replaced by an explanation's reconstruction or by a
        vector.

        Args:
          replacement: an explanation, read as in :meth:`as_read` (whole numbers are token ids); or
            an activation [D]. The result has the tokens that were read.

        Raises:
          ValueError: no such position, or a vector of another width or with NaN or infinity.
        """
        return self.swaps(text, [(position, replacement)])[0]

    def swaps(
        self, text: Any, replacements: Sequence[tuple[int, Explanation | Vector]]
    ) -> list[ExplainedToken]:
        """:meth:`swap` for several (position, replacement) of one text, each alone; M reads the
        text once."""
        explanations, vectors = [], []
        for _, replacement in replacements:
            if is_one_explanation(replacement):
                explanations.append(self.as_read(replacement))
                vectors.append(self.encode(explanations[-1].tokens))
            else:
                explanations.append("")
                vectors.append(finite_array(replacement, "replacement"))
            self._check_width(vectors[-1][None])
        (tokens,) = documents = token_lists([text], self.model, self.add_bos)
        indices = [token_index(position, tokens) for position, _ in replacements]
        (group,) = batching.groups_of(documents, [indices], 1, self.least_length)
        states = self._read(group.tokens_GS, group.mask_GS)
        size = batching.power_of_two(len(indices))
        effect = self._programs.swap(
            self.frozen,
            states,
            jnp.zeros(size, jnp.int32),
            jnp.asarray(batching.filled(np.array(indices, np.int32), size)),
            jnp.asarray(batching.filled(np.stack(vectors), size)),
        )
        effect = jax.tree.map(np.asarray, effect)
        return [
            self._explained(
                0, index, tokens[index], effect, row, (self._reading(explanation, effect, row),)
            )
            for row, (index, explanation) in enumerate(zip(indices, explanations, strict=True))
        ]

    def _read(self, tokens_GS: np.ndarray, mask_GS: np.ndarray) -> ContextStates:
        put = functools.partial(batching.on_every_device, mesh=self.mesh)
        return self._programs.read(self.frozen["original"], put(tokens_GS), put(mask_GS))

    def _reading(self, text: str, effect: SwapPrediction, row: int) -> Reading:
        cos, kl = float(effect.cos[row]), float(effect.kl[row])
        reading = Reading.of(text, cos, kl, self._predictions(effect.after, row))
        warnings = reading_warnings(kl, float(effect.kl_mean[row]))
        return dataclasses.replace(reading, warnings=warnings)

    def _explained(
        self,
        document: int,
        position: int,
        token_id: int,
        effect: SwapPrediction,
        row: int,
        readings: tuple[Reading, ...],
    ) -> ExplainedToken:
        """``row`` of ``effect``, with its readings."""
        token = self.model.tokenizer.token(token_id)
        norm = float(effect.norm[row])
        return ExplainedToken(
            document,
            position,
            token,
            self._predictions(effect.before, row),
            readings,
            float(effect.kl_mean[row]),
            row_warnings(self.trained_on, position, norm, token_id, token),
            norm,
        )

    def _predictions(self, most_probable, row: int) -> tuple[Prediction, ...]:
        name = self.model.tokenizer.token
        tokens, probabilities = most_probable
        pairs = zip(tokens[row], probabilities[row], strict=True)
        return tuple(Prediction(name(token), float(p)) for token, p in pairs)

    def _check_width(self, vectors: np.ndarray) -> None:
        width = self.spec.model.d_model
        if vectors.ndim != 2 or vectors.shape[1] != width:
            raise ValueError(f"an activation of this model has width {width}, not {vectors.shape}")
