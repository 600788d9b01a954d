"""Texts that keep the tokens they were written with.

Tokens made into a text and read again are often other tokens: half a character becomes U+FFFD,
special tokens are left out, two tokens merge into one, a space in front gets lost. A number that
was measured on the tokens written is then not the number of the text read again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from conlens_jax.models.tokenizer import Tokenizer


class Written(str):
    """A text together with its tokens; otherwise a ``str``.

    Whatever makes another text of it (``+``, ``replace``, ``strip``) gives a plain ``str``, which
    has no tokens but those that a tokenizer reads in it.

    Attributes:
      tokens: the token ids that the text stands for.
      reads_back: whether the text alone, tokenised again, gives these tokens.
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


def written_texts(rows: Iterable[Sequence[int]], tokenizer: Tokenizer) -> list[Written]:
    """The text of each row of token ids, special tokens left out."""
    rows = [tuple(map(int, row)) for row in rows]
    texts = [tokenizer.decode(row) for row in rows]
    again = tokenizer.encode_batch(texts)
    return [
        Written(text, row, tuple(ids) == row)
        for text, row, ids in zip(texts, rows, again, strict=True)
    ]


def with_its_tokens(text: str, tokens: Sequence[int], tokenizer: Tokenizer) -> Written:
    """A text and its tokens that were kept or sent beside each other.

    Raises:
      ValueError: the tokens are those of another text or of another tokenizer.
    """
    (written,) = written_texts([tokens], tokenizer)
    if written != text:
        raise ValueError(
            f"the tokens of the explanation {text!r:.80} are {str(written)!r:.80} to this model's "
            "tokenizer: leave the tokens out where the text was edited or another model wrote it"
        )
    return written
