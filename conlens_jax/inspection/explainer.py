"""The part of a lens that writes explanations, whole or token by token."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from conlens_jax.config.seeds import checked_seed
from conlens_jax.evaluation.claims import ClaimReader, claim_reader
from conlens_jax.evaluation.words import Word, words_of
from conlens_jax.inspection import batching
from conlens_jax.inspection.explanations import Explanations
from conlens_jax.inspection.programs import Sampling, sampling_of
from conlens_jax.inspection.reader import LensReader, Vector
from conlens_jax.inspection.readings import Alternative, ExplainedToken
from conlens_jax.inspection.texts import (
    Explanation,
    Positions,
    token_index,
    token_indices,
    token_lists,
)
from conlens_jax.lens.original import ContextStates
from conlens_jax.models.arguments import finite_array
from conlens_jax.models.written import Written, before_end, written_texts


class LensExplainer(LensReader):
    """The part of :class:`~conlens_jax.inspection.lens.Lens` that writes explanations."""

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
        whole: bool = False,
        progress: bool = True,
        callback: Callable[[list[ExplainedToken]], None] | None = None,
    ) -> Explanations:
        """Explains activations, and scores every explanation by swapping its reconstruction in.

        Args:
          text: a text, a list of texts, chat messages or a list of chats, or token ids.
          positions: of every text: ``"all"`` (without the bos token), indices, a boolean mask over
            the tokens, or a slice.
          samples: explanations per token; more than one needs ``decoding="sample"``.
          decoding: ``"greedy"``, or ``"sample"`` from the decoder's probabilities.
          temperature: of the samples; 1 as in training.
          seed: of the samples, any whole number. A text gets the same ones alone or in a list.
          batch_size: explanations written at once.
          whole: fill the last batch up to ``batch_size``: no program is compiled for a smaller one.
          progress: show a progress bar, on a terminal and for more than one batch.
          callback: called with the explained tokens of every batch when it is done.

        Raises:
          ValueError: invalid texts or positions, or settings out of range.
        """
        _check_explain(samples, decoding, batch_size, temperature)
        documents, indices = self._places(text, positions)
        settings = {"decoding": decoding, "samples": samples, "seed": checked_seed(seed)}
        batches = self._batches(
            documents, indices, **settings, temperature=temperature, size=batch_size, whole=whole
        )
        explained: dict[tuple[int, int], ExplainedToken] = {}
        total = samples * sum(len(set(chosen)) for chosen in indices)
        hide = None if progress and total > batch_size else True
        with tqdm(total=total, desc="explaining", unit="text", disable=hide, leave=False) as bar:
            for batch in batches:
                explained |= {(token.document, token.position): token for token in batch}
                bar.update(samples * len(batch))
                if callback is not None:
                    callback(batch)
        order = [(d, p) for d, chosen in enumerate(indices) for p in chosen]
        if temperature != 1.0:
            settings["temperature"] = temperature
        return Explanations(
            tuple(explained[key] for key in order),
            tuple(tuple(map(self.model.tokenizer.token, tokens)) for tokens in documents),
            {**self.facts, **settings},
        )

    def explain_in_batches(
        self,
        text: Any,
        positions: Positions = "all",
        *,
        samples: int = 1,
        decoding: str = "greedy",
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int = 32,
        whole: bool = False,
    ) -> Iterator[list[ExplainedToken]]:
        """:meth:`explain`, but yields the explained tokens of every batch when it is done.

        Raises:
          ValueError: as :meth:`explain`, and before the first batch.
        """
        _check_explain(samples, decoding, batch_size, temperature)
        return self._batches(
            *self._places(text, positions),
            decoding=decoding,
            samples=samples,
            seed=checked_seed(seed),
            temperature=temperature,
            size=batch_size,
            whole=whole,
        )

    def _places(self, text: Any, positions: Positions) -> tuple[list[list[int]], list[list[int]]]:
        """The tokens of each document, and the indices of those to explain, as they were given."""
        documents = token_lists(text, self.model, self.add_bos)
        bos = self.model.tokenizer.bos_id
        return documents, [token_indices(positions, tokens, bos) for tokens in documents]

    def _batches(
        self,
        documents: Sequence[Sequence[int]],
        indices: Sequence[Sequence[int]],
        *,
        decoding: str,
        samples: int,
        seed: int,
        temperature: float,
        size: int,
        whole: bool,
    ) -> Iterator[list[ExplainedToken]]:
        once = [list(dict.fromkeys(chosen)) for chosen in indices]
        # All samples of a token are in one batch, so that every batch has whole tokens.
        size = max(size // samples, 1) * samples
        for group in batching.groups_of(documents, once, samples, self.least_length):
            states = self._read(group.tokens_GS, group.mask_GS)
            for rows, arrays in batching.batches_of(group, size, self.mesh, whole):
                yield self._explain_batch(
                    documents, states, rows, arrays, decoding, seed, temperature
                )

    def _explain_batch(
        self,
        documents: Sequence[Sequence[int]],
        states: ContextStates,
        rows: Sequence[batching.Row],
        arrays: Sequence[jax.Array],
        decoding: str,
        seed: int,
        temperature: float,
    ) -> list[ExplainedToken]:
        documents_B, positions_B, samples_B = arrays
        sampling = None
        if decoding == "sample":
            sampling = sampling_of(seed, positions_B, samples_B, temperature)
        programs, parts = self._programs, (self.trainable, self.frozen)
        activation_BD = programs.activations(states, documents_B, positions_B)
        text_BT, log_probs_BT = programs.write(*parts, activation_BD, sampling)
        vector_BD = programs.reconstruct(*parts, text_BT)
        effect = programs.swap(self.frozen, states, documents_B, positions_B, vector_BD)
        texts = written_texts(np.asarray(text_BT), self.model.tokenizer, self.spec.end)
        effect = jax.tree.map(np.asarray, effect)
        readings = [
            self._reading(text, effect, number) for number, text in enumerate(texts[: len(rows)])
        ]
        if decoding == "greedy":
            pairs = zip(readings, np.asarray(log_probs_BT)[: len(rows)], strict=True)
            readings = [
                dataclasses.replace(reading, **self._of_words(reading.tokens, log_probs_T))
                for reading, log_probs_T in pairs
            ]
        numbers_of: dict[tuple[int, int], list[int]] = {}  # of the samples of each token
        for number, row in enumerate(rows):
            numbers_of.setdefault((row.document, row.position), []).append(number)
        return [
            self._explained(
                document,
                position,
                documents[document][position],
                effect,
                numbers[0],
                tuple(readings[number] for number in numbers),
            )
            for (document, position), numbers in numbers_of.items()
        ]

    @functools.cached_property
    def text_claims(self) -> ClaimReader:
        """Finds the claims of its texts; only with a calibration."""
        assert self.calibration is not None
        return claim_reader(self.calibration.claims, self.model.tokenizer, self.spec.gap)

    @functools.cached_property
    def _piece(self) -> Callable[[int], str]:
        return functools.cache(self.model.tokenizer.piece)

    def _of_words(self, tokens: Sequence[int], log_probs_T: np.ndarray) -> dict[str, Any]:
        """The fields ``pieces``, ``support`` and ``probabilities`` of the reading of a text."""
        tokens = before_end(tokens, self.spec.end)
        support = None
        if self.calibration is not None:
            support = tuple(self.calibration.of_tokens(self.text_claims, tokens, log_probs_T))
        return {
            "pieces": tuple(map(self._piece, tokens)),
            "support": support,
            "probabilities": tuple(np.exp(log_probs_T[: len(tokens)]).tolist()),
        }

    def words(
        self, activations: Float[np.ndarray, "N D"], texts: Sequence[Written]
    ) -> list[tuple[Word, ...]]:
        """The words of the decoder's greedy texts of activations, each with its support (without a
        calibration None) and the decoder's probability."""
        end = 0 if self.spec.end is None else self.spec.end
        text_NT = np.full((len(texts), self.spec.text_len), end, np.int32)
        for number, text in enumerate(texts):
            text_NT[number, : len(text.tokens)] = text.tokens
        size = batching.power_of_two(len(texts))
        vectors_BD = jnp.asarray(batching.filled(finite_array(activations, "activations"), size))
        text_BT = jnp.asarray(batching.filled(text_NT, size))
        log_probs_BT = np.asarray(
            self._programs.text_log_probs(self.trainable, self.frozen, vectors_BD, text_BT)
        )
        rows = zip(texts, log_probs_BT[: len(texts)], strict=True)
        fields = [self._of_words(text.tokens, log_probs_T) for text, log_probs_T in rows]
        return [words_of(f["pieces"], f["support"], f["probabilities"]) for f in fields]

    def alternatives(
        self, text: Any, position: int, explanation: Explanation, count: int = 8
    ) -> list[tuple[Alternative, ...]]:
        """What the decoder would rather, or as soon, have written: of each token of an explanation
        the ``count`` likeliest ones at its place, given those before it.

        Args:
          explanation: read as in :meth:`as_read`; its first ``spec.text_len`` tokens count.

        Raises:
          ValueError: an invalid text, position or explanation, or ``count`` is not positive.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, not {count}")
        (ids,) = token_lists([text], self.model, self.add_bos)
        vector_D = self.capture(text, token_index(position, ids))
        tokens = before_end(self.as_read(explanation).tokens, self.spec.end)[: self.spec.text_len]
        text_1T = np.zeros((1, self.spec.text_len), np.int32)
        text_1T[0, : len(tokens)] = tokens
        ids_Tk, probabilities_Tk = self._programs.alternatives(
            self.trainable, self.frozen, jnp.asarray(vector_D[None]), jnp.asarray(text_1T)
        )
        ids, probabilities = (
            np.asarray(array_Tk)[: len(tokens), :count].tolist()
            for array_Tk in (ids_Tk, probabilities_Tk)
        )
        return [
            tuple(Alternative(i, self._piece(i), p) for i, p in zip(*row, strict=True))
            for row in zip(ids, probabilities, strict=True)
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
        """Writes the explanation of one activation token by token: yields the text so far, with its
        tokens."""
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
        """:meth:`write` for a given activation [D]. ``position`` only distinguishes the samples of
        one seed."""
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
            positions_B = batching.filled(np.array(positions, np.int32), size)
            samples_B = jnp.zeros_like(positions_B)
            sampling = sampling_of(seed, jnp.asarray(positions_B), samples_B, temperature)
        return self._written(jnp.asarray(batching.filled(vectors, size)), len(vectors), sampling)

    def _written(
        self, vector_BD: jax.Array, count: int, sampling: Sampling | None
    ) -> Iterator[list[Written]]:
        state = self._programs.first_token(self.trainable, self.frozen, vector_BD, sampling)
        tokens_TB = [np.array(state.token_B)]  # a copy: the state is donated
        for step in range(1, self.spec.text_len + 1):
            tokens_BT = np.stack(tokens_TB, axis=1)[:count]
            texts = written_texts(tokens_BT, self.model.tokenizer, self.spec.end)
            yield texts
            if step == self.spec.text_len or all(t.tokens[-1] == self.spec.end for t in texts):
                return
            state = self._programs.next_token(
                self.trainable, self.frozen, state, jnp.int32(step), sampling
            )
            tokens_TB.append(np.array(state.token_B))


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
