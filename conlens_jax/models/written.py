"""Texts that keep the tokens they were written with.

Decoding tokens and encoding the text again often gives other tokens: half a character becomes
U+FFFD, special tokens are left out, two tokens merge into one, a leading space is lost. A number
measured on the original tokens is then not that of the re-encoded text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from conlens_jax.models.tokenizer import Tokenizer


class Written(str):
    """A text together with its tokens; otherwise a ``str``.

    String operations (``+``, ``replace``, ``strip``) return a plain ``str``, whose tokens are those
    that a tokenizer gives.

    Attributes:
      tokens: the token ids that the text was decoded from, its end token included.
      reads_back: whether tokenising the text gives these tokens.
    """

    tokens: tuple[int, ...]
    reads_back: bool

    def __new__(cls, text: str, tokens: Sequence[int], reads_back: bool) -> Written:
        self = super().__new__(cls, text)
        self.tokens = tuple(map(int, tokens))
        self.reads_back = bool(reads_back)
        return self

    def __getnewargs__(self):  # for copies
        return str(self), self.tokens, self.reads_back


def written_texts(
    rows: Iterable[Sequence[int]], tokenizer: Tokenizer, end: int | None = None
) -> list[Written]:
    """The text of each row of token ids, special tokens left out; a row is over after its first
    token ``end``."""
    rows = [_up_to(tuple(map(int, row)), end) for row in rows]
    texts = [tokenizer.decode(without_last(row, end)) for row in rows]
    again = tokenizer.encode_batch(texts)
    return [
        Written(text, row, tuple(ids) == without_last(row, end))
        for text, row, ids in zip(texts, rows, again, strict=True)
    ]


def _up_to(tokens: tuple[int, ...], end: int | None) -> tuple[int, ...]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def without_last(tokens: Sequence[int], end: int | None) -> tuple[int, ...]:
    """The tokens without an end token at their end."""
    tokens = tuple(tokens)
    return tokens[:-1] if end is not None and tokens[-1:] == (end,) else tokens


def with_its_tokens(
    text: str, tokens: Sequence[int], tokenizer: Tokenizer, end: int | None = None
) -> Written:
    """A text with the tokens that were stored or sent with it.

    Raises:
      ValueError: the tokens are those of another text or of another tokenizer.
    """
    (written,) = written_texts([tokens], tokenizer, end)
    if written != text:
        raise ValueError(
            f"the tokens of the explanation {text!r:.80} are {str(written)!r:.80} to this model's "
            "tokenizer: leave the tokens out where the text was edited or another model wrote it"
        )
    return written
