"""A loaded lens at work: texts of activations, activations of texts, and what both are worth."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from conlens_jax.config.seeds import checked_seed
from conlens_jax.inspection import batching
from conlens_jax.inspection.explanations import Explanations
from conlens_jax.inspection.parts import LensParts
from conlens_jax.inspection.programs import Programs, Sampling, SwapPrediction, sampling_of
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
from conlens_jax.models.arguments import finite_array
from conlens_jax.models.generate import bucket
from conlens_jax.models.written import Written, written_texts

Vector = Float[np.ndarray, "D"]


class LensReader(LensParts):
    """The part of :class:`~conlens_jax.inspection.lens.Lens` that reads and writes explanations.

    Indices are into the tokens of a text, where a bos token counts (:meth:`tokens` shows them).
    """

    @functools.cached_property
    def _programs(self) -> Programs:
        return Programs(self.spec)

    # --- reading --------------------------------------------------------------------------------

    def tokens(self, text: Any) -> list[str]:
        """The tokens of one text, printable, in the order of their indices."""
        (tokens,) = token_lists([text], self.model, self.add_bos)
        return [self.model.tokenizer.token(token) for token in tokens]

    def explain(
        self,
        text: Any,
        positions: Positions = "all",
        *,
        samples: int = 1,
        decoding: str = "greedy",
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int = 32,
        progress: bool = True,
        callback: Callable[[list[ExplainedToken]], None] | None = None,
    ) -> Explanations:
        """Explains activations, and measures every explanation by swapping it back in.

        Args:
          text: a text, a list of texts, chat messages or a list of chats, or token ids.
          positions: ``"all"`` (but for a bos token in front), indices, a boolean mask over the
            tokens, or a slice; of every text.
          samples: explanations a token; more than one needs ``decoding="sample"``.
          decoding: ``"greedy"``, or ``"sample"`` from the decoder's probabilities.
          temperature: of the samples; 1, as in training, takes the probabilities as they are.
          seed: of the samples, any whole number. A text gets the same ones alone or in a list.
          batch_size: explanations written at once.
          progress: show a bar, where there is a terminal or more than one batch.
          callback: called with the explained tokens of every batch as soon as they are there.

        Raises:
          ValueError: texts or positions that there are not, or settings out of range.
        """
        _check_explain(samples, decoding, batch_size, temperature)
        seed = checked_seed(seed)
        documents = token_lists(text, self.model, self.add_bos)
        bos = self.model.tokenizer.bos_id
        indices = [token_indices(positions, tokens, bos) for tokens in documents]
        once = [list(dict.fromkeys(chosen)) for chosen in indices]
        # Samples of a token stay in one batch, so that a callback gets whole tokens.
        batch_size = max(batch_size // samples, 1) * samples
        found: dict[tuple[int, int], ExplainedToken] = {}
        total = samples * sum(map(len, once))
        hide = None if progress and total > batch_size else True
        with tqdm(total=total, desc="explaining", unit="text", disable=hide, leave=False) as bar:
            for group in batching.groups_of(documents, once, samples):
                reading = self._read(group.tokens_GS, group.mask_GS)
                for rows, arrays in batching.batches_of(group, batch_size, self.mesh):
                    explained = self._explain_batch(
                        documents, reading, rows, arrays, decoding, seed, temperature
                    )
                    found |= {(row.document, row.position): row for row in explained}
                    bar.update(len(rows))
                    if callback is not None:
                        callback(explained)
        order = [(d, p) for d, chosen in enumerate(indices) for p in chosen]
        settings = {"decoding": decoding, "samples": samples, "seed": seed}
        if temperature != 1.0:
            settings["temperature"] = temperature
        return Explanations(
            tuple(found[key] for key in order),
            tuple(tuple(map(self.model.tokenizer.token, tokens)) for tokens in documents),
            {**self.facts, **settings},
        )

    def _explain_batch(self, documents, reading, rows, arrays, decoding, seed, temperature):
        places_B, positions_B, samples_B = arrays
        sampling = None
        if decoding == "sample":
            sampling = sampling_of(seed, positions_B, samples_B, temperature)
        text_BT, effect = self._programs.explain(
            self.trainable, self.frozen, reading, places_B, positions_B, sampling
        )
        texts = written_texts(np.asarray(text_BT), self.model.tokenizer)
        effect = jax.tree.map(np.asarray, effect)
        tokens: dict[tuple[int, int], list[int]] = {}
        for number, row in enumerate(rows):
            tokens.setdefault((row.document, row.position), []).append(number)
        return [
            ExplainedToken(
                document,
                position,
                self.model.tokenizer.token(documents[document][position]),
                self._predictions(effect.before, numbers[0]),
                tuple(self._reading(texts[number], effect, number) for number in numbers),
            )
            for (document, position), numbers in tokens.items()
        ]

    def write(
        self,
        text: Any,
        position: int,
        *,
        decoding: str = "greedy",
        temperature: float = 1.0,
        seed: int = 0,
    ) -> Iterator[Written]:
        """Writes the explanation of one activation, token by token: yields the text so far, with
        its tokens."""
        (tokens,) = token_lists([text], self.model, self.add_bos)
        index = token_index(position, tokens)
        vector_D = self.capture(text, index)
        return self.write_vector(
            vector_D, decoding=decoding, temperature=temperature, seed=seed, position=index
        )

    def write_vector(
        self,
        vector: Vector,
        *,
        decoding: str = "greedy",
        temperature: float = 1.0,
        seed: int = 0,
        position: int = 0,
    ) -> Iterator[Written]:
        """:meth:`write` for an activation [D] that is there already. ``position`` only tells apart
        the samples of one seed."""
        several = self.write_vectors(
            finite_array(vector, "vector")[None],
            decoding=decoding,
            temperature=temperature,
            seed=seed,
            positions=[position],
        )
        return (texts[0] for texts in several)

    def write_vectors(
        self,
        vectors: Float[np.ndarray, "N D"],
        *,
        decoding: str = "greedy",
        temperature: float = 1.0,
        seed: int = 0,
        positions: Sequence[int],
    ) -> Iterator[list[Written]]:
        """:meth:`write_vector` for several activations at once: yields all texts so far."""
        _check_explain(1, decoding, 1, temperature)
        seed = checked_seed(seed)
        vectors = finite_array(vectors, "vectors")
        self._check_width(vectors)
        size, sampling = batching.power_of_two(len(vectors)), None
        if decoding == "sample":
            places = batching.filled(np.array(positions, np.int32), size)
            sampling = sampling_of(seed, jnp.asarray(places), jnp.zeros_like(places), temperature)
        return self._written(jnp.asarray(batching.filled(vectors, size)), len(vectors), sampling)

    def _written(
        self, vector_BD: jax.Array, count: int, sampling: Sampling | None
    ) -> Iterator[list[Written]]:
        state = self._programs.first_token(self.trainable, self.frozen, vector_BD, sampling)
        tokens_TB = [np.array(state.token_B)]  # a copy: the state is given away
        for step in range(1, self.spec.text_len):
            yield written_texts(np.stack(tokens_TB, axis=1)[:count], self.model.tokenizer)
            state = self._programs.next_token(
                self.trainable, self.frozen, state, jnp.int32(step), sampling
            )
            tokens_TB.append(np.array(state.token_B))
        yield written_texts(np.stack(tokens_TB, axis=1)[:count], self.model.tokenizer)

    def capture(self, text: Any, position: Positions) -> Float[np.ndarray, "*N D"]:
        """Activations of one text, the output of the lens's block, fp32: [D] of one position, or
        [N, D] of several (``"all"``: of every token, a bos token too)."""
        (tokens,) = token_lists([text], self.model, self.add_bos)
        indices = token_indices(position, tokens, None, "position")
        (group,) = batching.groups_of([tokens], [indices], 1)
        reading = self._read(group.tokens_GS, group.mask_GS)
        vectors_ND = np.asarray(reading.residual_GSD[0, np.array(indices)], np.float32)
        return vectors_ND[0] if is_one(position) else vectors_ND

    def decode(self, activations: Float[np.ndarray, "*N D"]) -> Written | list[Written]:
        """What the decoder writes, greedily, of one activation or of several; a text brings the
        tokens along that it was written with."""
        vectors = np.atleast_2d(finite_array(activations, "activations"))
        self._check_width(vectors)
        size = batching.power_of_two(len(vectors))
        rows = jnp.asarray(batching.filled(vectors, size))
        written = self._programs.write(self.trainable, self.frozen, rows, None)
        texts = written_texts(np.asarray(written)[: len(vectors)], self.model.tokenizer)
        return texts[0] if np.ndim(activations) == 1 else texts

    def as_read(self, explanation: Explanation) -> Written:
        """An explanation as :meth:`encode`, :meth:`swap` and :meth:`steer` read it: the text, with
        the ``tokens`` that the encoder gets, and whether the text alone gives them
        (``reads_back``).

        What a lens wrote (a reading of :meth:`explain`, its ``text``, a text of :meth:`decode` or
        :meth:`write`) is read as the tokens that were written, and token ids as they stand. Any
        other text is tokenised; it may have come from other tokens.

        Raises:
          ValueError: no explanation, or one without a token or with more than the model can read.
        """
        (written,) = read_explanations([explanation], self.model)
        return written

    def encode(self, explanation: Explanation | Sequence[Explanation]) -> Float[np.ndarray, "*N D"]:
        """What the encoder makes of an explanation, [D], or of several, [N, D]; in the units of
        the activation, fp32. The encoder was trained on texts of ``spec.text_len`` tokens.

        Args:
          explanation: read as :meth:`as_read` says.

        Raises:
          ValueError: as :meth:`as_read`.
        """
        one = is_one_explanation(explanation)
        read = read_explanations([explanation] if one else list(explanation), self.model)
        lists = [written.tokens for written in read]
        length = bucket(max(map(len, lists)))
        tokens_BT = np.zeros((len(lists), length), np.int32)
        mask_BT = np.zeros(tokens_BT.shape, bool)
        for row, tokens in enumerate(lists):  # on the right, where the encoder reads
            tokens_BT[row, length - len(tokens) :] = tokens
            mask_BT[row, length - len(tokens) :] = True
        size = batching.power_of_two(len(lists))
        arrays = (jnp.asarray(batching.filled(array, size)) for array in (tokens_BT, mask_BT))
        vectors = self._programs.encode(self.trainable, self.frozen, *arrays)
        vectors_ND = np.asarray(vectors)[: len(lists)]
        return vectors_ND[0] if one else vectors_ND

    def swap(self, text: Any, position: int, replacement: Explanation | Vector) -> ExplainedToken:
        """What M predicts where an explanation, or a vector, takes an activation's place.

        Args:
          replacement: an explanation, read as :meth:`as_read` says (whole numbers are token
            ids); or an activation [D]. The result has the tokens that were read.

        Raises:
          ValueError: no such position, or a vector of another width or with NaN or infinity.
        """
        if is_one_explanation(replacement):
            read = self.as_read(replacement)
            vector_D = self.encode(read.tokens)
        else:
            read, vector_D = "", finite_array(replacement, "replacement")
        self._check_width(vector_D[None])
        reading, index = self._read_one(text, position)
        effect = self._programs.swap(
            self.frozen,
            reading,
            jnp.zeros(1, jnp.int32),
            jnp.array([index], jnp.int32),
            jnp.asarray(vector_D)[None],
        )
        effect = jax.tree.map(np.asarray, effect)
        return ExplainedToken(
            0,
            index,
            self.tokens(text)[index],
            self._predictions(effect.before, 0),
            (self._reading(read, effect, 0),),
        )

    # --- pieces ---------------------------------------------------------------------------------

    def _read(self, tokens_GS: np.ndarray, mask_GS: np.ndarray):
        put = functools.partial(batching.on_every_device, mesh=self.mesh)
        return self._programs.read(self.frozen["original"], put(tokens_GS), put(mask_GS))

    def _read_one(self, text: Any, position: int):
        documents = token_lists([text], self.model, self.add_bos)
        index = token_index(position, documents[0])
        (group,) = batching.groups_of(documents, [[index]], 1)
        return self._read(group.tokens_GS, group.mask_GS), index

    def _reading(self, text: str, effect: SwapPrediction, row: int) -> Reading:
        cos, kl = float(effect.cos[row]), float(effect.kl[row])
        return Reading.of(text, cos, kl, self._predictions(effect.after, row))

    def _predictions(self, most_probable, row: int) -> tuple[Prediction, ...]:
        name = self.model.tokenizer.token
        tokens, probabilities = most_probable
        pairs = zip(tokens[row], probabilities[row], strict=True)
        return tuple(Prediction(name(token), float(p)) for token, p in pairs)

    def _check_width(self, vectors: np.ndarray) -> None:
        width = self.spec.model.d_model
        if vectors.ndim != 2 or vectors.shape[1] != width:
            raise ValueError(f"an activation of this model has width {width}, not {vectors.shape}")


def _check_explain(samples: int, decoding: str, batch_size: int, temperature: float) -> None:
    problems = []
    if not 0 < temperature < float("inf"):
        problems.append(f"temperature must be above 0, not {temperature}; greedy is a decoding")
    if decoding not in ("greedy", "sample"):
        problems.append(f"decoding must be 'greedy' or 'sample', not {decoding!r}")
    if samples < 1:
        problems.append(f"samples must be at least 1, not {samples}")
    if samples > 1 and decoding == "greedy":
        problems.append("samples > 1 needs decoding='sample': greedy texts are all the same")
    if batch_size < 1:
        problems.append(f"batch_size must be at least 1, not {batch_size}")
    if problems:
        raise ValueError("; ".join(problems))
