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
    rows = [tuple(map(int, row)) for row in rows]
    read = [before_end(row, end) for row in rows]
    texts = [tokenizer.decode(tokens) for tokens in read]
    again = tokenizer.encode_batch(texts)
    return [
        Written(text, row[: len(tokens) + 1], tuple(ids) == tokens)
        for text, row, tokens, ids in zip(texts, rows, read, again, strict=True)
    ]


def before_end(tokens: Sequence[int], end: int | None) -> tuple[int, ...]:
    """The tokens before the first ``end``, all if there is none: what a person reads."""
    tokens = tuple(map(int, tokens))
    return tokens[: tokens.index(end)] if end in tokens else tokens


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
