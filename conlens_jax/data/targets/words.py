"""Targets of words: what M is about to say, then content words of the context.

    Paris, the | capital France | is

First M's likeliest next tokens at P, the likeliest first, then whole words of the context up to P,
in the order of the text, then the last tokens up to P, if there are to be any. All can be checked
on any text: the first against M, the others against the context.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from conlens_jax.config import TargetConfig
from conlens_jax.data.rows import Rows
from conlens_jax.data.targets.protocol import NextTokens, Targets, filled
from conlens_jax.data.targets.whole_words import WholeWords, Word
from conlens_jax.models.tokenizer import Tokenizer
from conlens_jax.models.written import before_end

COUNTED_DOCUMENTS = 20_000


class WordTargets(Targets):
    """Makes the target of each row.

    Args:
      comma, separator: token ids; None: nothing is written there. A separator is left out where
        no word of the context follows, unless there are last tokens: then there are always two.
      end: the end token.
      text_len: the most tokens of a target, its end included.
      contexts: the tokens of the training documents' contexts, from the first one; the first 20,000
        are counted for the words' idf, when it is needed first.
    """

    def __init__(
        self,
        config: TargetConfig,
        tokenizer: Tokenizer,
        comma: int | None,
        separator: int | None,
        end: int,
        text_len: int,
        contexts: Callable[[], Iterable[Sequence[int]]],
    ):
        self.n_next = config.next_words + 1  # the end token is none of them
        self._config, self._end, self._text_len = config, end, text_len
        self._comma = [] if comma is None else [comma]
        self._separator = [] if separator is None else [separator]
        self._words = WholeWords(tokenizer)
        self._contexts = contexts
        self._least_idf = -math.log(config.most_common)

    @functools.cached_property
    def _idf(self) -> defaultdict[str, float]:
        """log(N / n) of each word that n of the N counted documents have, log N of any other."""
        counts, n_documents = Counter(), 0
        for tokens in itertools.islice(self._contexts(), COUNTED_DOCUMENTS):
            counts.update({word.key for word in self._words.of(tokens)})
            n_documents += 1
        idf = {key: math.log(n_documents / count) for key, count in counts.items()}
        return defaultdict(lambda: math.log(max(n_documents, 1)), idf)

    def texts(self, rows: Rows, next_tokens: NextTokens | None) -> list[Sequence[int]]:
        """See :meth:`~.protocol.Targets.texts`."""
        assert next_tokens is not None
        texts = []
        documents = itertools.groupby(range(len(rows)), lambda row: rows.documents_N[row])
        for _, group in documents:  # rows of one document share its words
            numbers = list(group)
            first = numbers[0]
            words = list(self._words.of(rows.tokens_NS[first, : rows.lengths_N[first]].tolist()))
            idf_W = np.array([self._idf[word.key] for word in words])
            last_W = np.array([word.last for word in words])
            first_W = last_W + 1 - np.array([len(word.tokens) for word in words])
            for row in numbers:
                position = int(rows.positions_N[row])
                recent = self._recent(rows.tokens_NS[row], position)
                said = self._said(
                    next_tokens.ids_Nk[row], next_tokens.probabilities_Nk[row], len(recent)
                )
                room = self._text_len - len(said) - len(self._separator) - len(recent) - 1
                # What the last part shows is not named twice.
                shown_W = first_W > position - self._config.recent_tokens
                idf_of_others_W = np.where(shown_W, -np.inf, idf_W)
                named = self._named(words, idf_of_others_W, last_W, position, room)
                separator = self._separator if named or recent else ()
                texts.append([*said, *separator, *named, *recent])
        return texts

    def _recent(self, tokens_S: np.ndarray, position: int) -> list[int]:
        """The last tokens up to P, after a separator of their own."""
        if not self._config.recent_tokens:
            return []
        first = max(0, position + 1 - self._config.recent_tokens)
        return [*self._separator, *tokens_S[first : position + 1].tolist()]

    def _said(self, ids_k: np.ndarray, probabilities_k: np.ndarray, n_recent: int) -> list[int]:
        """The next tokens with commas between them; the less likely ones are left out if they do
        not fit before the last part of ``n_recent`` tokens, its separator included."""
        likely = [
            (int(token), float(probability))
            for token, probability in zip(ids_k, probabilities_k, strict=True)
            if token != self._end
        ]
        least = self._config.next_probability
        said = [token for i, (token, p) in enumerate(likely) if i == 0 or p >= least]
        step = 1 + len(self._comma)
        # Without a last part, a text that next words fill needs no separator.
        taken = n_recent + len(self._separator) if n_recent else 0
        most = max(1, (self._text_len - 1 - taken + len(self._comma)) // step)
        said = said[: min(self._config.next_words, most)]
        return [token for word in said for token in (*self._comma, word)][len(self._comma) :]

    def _named(
        self,
        words: Sequence[Word],
        idf_W: np.ndarray,
        last_W: np.ndarray,
        position: int,
        room: int,
    ) -> list[int]:
        """The tokens of the chosen words of the context up to P, at most ``room``: one that does
        not fit leaves its place to the next. A word that goes on after P is none of them."""
        score_W = idf_W - self._config.nearness * (position - last_W)
        possible_W = (last_W <= position) & (idf_W >= self._least_idf)
        # Of equal scores the later word.
        order = sorted(np.flatnonzero(possible_W), key=lambda i: (-score_W[i], -i))
        chosen: dict[int, tuple[int, ...]] = {}
        keys: set[str] = set()
        for index in order:
            if len(chosen) == self._config.context_words:
                break
            tokens = self._words.after_space(words[index])
            if words[index].key not in keys and len(tokens) <= room:
                keys.add(words[index].key)
                chosen[int(index)] = tokens
                room -= len(tokens)
        return [token for index in sorted(chosen) for token in chosen[index]]


def next_words_only(texts_NT: np.ndarray, separator: int, end: int) -> np.ndarray:
    """The first part of each text, the words that M is about to say, with the end; [N, T]."""
    after_NT = np.cumsum(texts_NT == separator, axis=1) > 0
    return np.where(after_NT, np.int32(end), texts_NT)


def context_words_only(texts_NT: np.ndarray, separator: int, end: int) -> np.ndarray:
    """The second part of each text, the separator and the words of the context, with the end; of a
    text without it the end alone; [N, T]."""
    texts = [before_end(text, end) for text in texts_NT]
    starts = [text.index(separator) if separator in text else len(text) for text in texts]
    parts = [text[start:] for text, start in zip(texts, starts, strict=True)]
    return filled(parts, texts_NT.shape[1], end)
