"""Texts and positions as users give them, converted to token ids and indices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from conlens_jax.inspection.readings import ExplainedToken, Reading
from conlens_jax.models.arguments import index_array
from conlens_jax.models.chat import render_chat
from conlens_jax.models.model import LanguageModel
from conlens_jax.models.written import Written, with_its_tokens, written_texts

Positions = str | int | Sequence[int] | slice
Explanation = str | Reading | ExplainedToken | Sequence[int]
"""A text; a lens's own output, which is read as the tokens that were written; or token ids."""


def token_lists(text: Any, model: LanguageModel, add_bos: bool | str) -> list[list[int]]:
    """The token ids of each document.

    Args:
      text: a text, a list of texts; chat messages (``{"role": …, "content": …}``), or a list of
        such chats; or token ids, used unchanged.
      add_bos: begin every text with the tokenizer's bos token, as the lens was trained; see
        :meth:`conlens_jax.models.tokenizer.Tokenizer.encode`.

    Raises:
      ValueError: something else, nothing, or more tokens than the model can read.
    """
    documents = [_tokens(piece, model, add_bos) for piece in _pieces(text)]
    if not documents:
        raise ValueError("text is an empty list; give at least one text")
    most = model.config.max_positions
    problems = [
        f"text {number} has no token"
        if not tokens
        else f"text {number} has {len(tokens)} tokens, more than the {most} that "
        f"{model.model_id} can read; cut it"
        for number, tokens in enumerate(documents)
        if not 0 < len(tokens) <= most
    ]
    if problems:
        raise ValueError("; ".join(problems))
    return documents


def _pieces(text: Any) -> list[Any]:
    """One entry per document."""
    if isinstance(text, str) or _is_chat(text) or _is_ids(text):
        return [text]
    if isinstance(text, Sequence | np.ndarray):
        return list(text)
    raise ValueError(
        f"text must be a text, a list of texts, chat messages or token ids, not {type(text)}"
    )


def _is_chat(value: Any) -> bool:
    is_message = lambda entry: isinstance(entry, Mapping) and "role" in entry
    return isinstance(value, Sequence) and bool(value) and all(map(is_message, value))


def _is_ids(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype.kind in "iu"
    is_id = lambda entry: isinstance(entry, int | np.integer)
    return isinstance(value, Sequence) and bool(value) and all(map(is_id, value))


def _refuse_half_characters(piece: Any) -> None:
    """Half a surrogate pair, which JSON can contain (\\ud83d), is no character for a tokenizer."""
    texts = [piece] if isinstance(piece, str) else []
    if _is_chat(piece):
        texts = [str(message.get("content", "")) for message in piece]
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"character {error.start + 1} of the text is {text[error.start]!r}, half a "
                "surrogate pair; give the whole character, or leave it out"
            ) from None


def _tokens(piece: Any, model: LanguageModel, add_bos: bool | str) -> list[int]:
    _refuse_half_characters(piece)
    tokenizer = model.tokenizer
    if isinstance(piece, str):
        return tokenizer.encode(piece, add_bos=add_bos)
    if _is_chat(piece):
        return chat_tokens(piece, model, add_bos)
    if _is_ids(piece):
        wrong = [int(token) for token in piece if not 0 <= token < model.config.vocab_size]
        if wrong:
            raise ValueError(
                f"token ids must be 0 to {model.config.vocab_size - 1}; {len(wrong)} are not, the "
                f"first is {wrong[0]}"
            )
        return [int(token) for token in piece]
    raise ValueError(f"text must be texts, chat messages or token ids, not {piece!r:.80}")


def is_one_explanation(value: Any) -> bool:
    """Whether ``value`` is one :data:`Explanation`, not several."""
    return isinstance(value, str | Reading | ExplainedToken) or _is_ids(value)


def read_explanations(
    values: Sequence[Explanation], model: LanguageModel, end: int | None = None
) -> list[Written]:
    """Every explanation with the tokens that the encoder reads.

    A text that does not carry the tokens of the model's tokenizer is tokenised, and ends with the
    token ``end``.

    Raises:
      ValueError: something else, an explanation without a token or with more than the model can
        read, or a reading with the tokens of another tokenizer.
    """
    pieces = [text_or_ids(value, model, end) for value in values]
    if any(not isinstance(piece, str) and not len(piece) for piece in pieces):
        raise ValueError("an explanation has no token")
    lists = token_lists(pieces, model, add_bos=False)
    if end is not None:
        lists = [
            [*ids, end] if isinstance(piece, str) else ids
            for piece, ids in zip(pieces, lists, strict=True)
        ]
    return [
        Written(piece, written.tokens, True) if isinstance(piece, str) else written
        for piece, written in zip(pieces, written_texts(lists, model.tokenizer, end), strict=True)
    ]


def text_or_ids(
    value: Explanation, model: LanguageModel, end: int | None = None
) -> str | Sequence[int]:
    """A text that has to be tokenised, or the tokens if there are any."""
    if isinstance(value, ExplainedToken):
        value = value.best
    if isinstance(value, Reading):
        if value.tokens is None:
            return str(value.text)
        return with_its_tokens(value.text, value.tokens, model.tokenizer, end).tokens
    if isinstance(value, Written):  # from another model's tokenizer it is a plain text
        (again,) = written_texts([value.tokens], model.tokenizer, end)
        return value.tokens if again == value else str(value)
    if isinstance(value, str) or _is_ids(value):
        return value
    raise ValueError(
        f"an explanation must be a text, a lens's own output, or token ids, not {value!r:.80}"
    )


def chat_tokens(
    messages: Sequence[Mapping],
    model: LanguageModel,
    add_bos: bool | str,
    *,
    answer: bool = False,
) -> list[int]:
    """Token ids of :func:`~conlens_jax.models.chat.render_chat`. ``add_bos`` also begins a chat
    with a bos token, unless its template wrote one."""
    return model.tokenizer.encode(render_chat(messages, model.folder, answer=answer), add_bos)


def token_indices(
    positions: Positions, tokens: Sequence[int], bos_id: int | None, name: str = "positions"
) -> list[int]:
    """Indices into the tokens of one document.

    Args:
      positions: ``"all"`` (without a bos token before others, which carries nothing), an index,
        several of them (negative ones count from the end), a boolean mask over the tokens, or a
        slice.
      name: of the caller's argument, for messages.

    Raises:
      ValueError: an index outside the document, no index at all, or something else.
    """
    length = len(tokens)
    if isinstance(positions, str):
        if positions != "all":
            raise ValueError(f"{name} must be 'all', indices or a slice, not {positions!r}")
        return list(range(1 if length > 1 and tokens[0] == bos_id else 0, length))
    if isinstance(positions, slice):
        try:
            chosen = list(range(length)[positions])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from None
    else:
        array = index_array(positions, name)
        if array.ndim > 1 or (array.dtype == bool and len(array) != length):
            raise ValueError(
                f"{name} has shape {array.shape}; give an index, a flat list of them, or a boolean "
                f"mask with an entry for each token ({length} in this text)"
            )
        chosen = (np.flatnonzero(array) if array.dtype == bool else np.atleast_1d(array)).tolist()
    wrong = [position for position in chosen if not -length <= position < length]
    if wrong or not chosen:
        what = ", ".join(map(str, wrong)) if wrong else "nothing"
        raise ValueError(f"{name} has {what}; a text of {length} tokens has 0 to {length - 1}")
    return [position % length for position in chosen]


def token_index(position: Any, tokens: Sequence[int]) -> int:
    """The single index that ``position`` refers to; see :func:`token_indices`."""
    chosen = token_indices(position, tokens, None, "position")
    if len(chosen) > 1:
        raise ValueError(f"position must be one index, not {len(chosen)}")
    return chosen[0]


def is_one(positions: Any) -> bool:
    """Whether ``positions`` is a single index, not a list of one."""
    return not isinstance(positions, str | slice) and np.ndim(positions) == 0
