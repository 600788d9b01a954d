"""What a user may give as text and as positions, made into token ids and indices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from conlens_jax.inspection.chat import render_chat
from conlens_jax.models.model import LanguageModel

Positions = str | int | Sequence[int] | slice


def token_lists(text: Any, model: LanguageModel, add_bos: bool | str) -> list[list[int]]:
    """The token ids of each document.

    Args:
      text: a text, a list of texts; chat messages (``{"role": …, "content": …}``), or a list of
        such chats; or token ids, taken as they stand.
      add_bos: begin every text with the tokenizer's bos token, as the lens was trained; see
        :meth:`conlens_jax.data.tokenizer.Tokenizer.encode`.

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
    """One entry a document."""
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


def _tokens(piece: Any, model: LanguageModel, add_bos: bool | str) -> list[int]:
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


def chat_tokens(
    messages: Sequence[Mapping],
    model: LanguageModel,
    add_bos: bool | str,
    *,
    answer: bool = False,
) -> list[int]:
    """Token ids of :func:`~conlens_jax.inspection.chat.render_chat`. ``add_bos`` puts a bos token
    in front of a chat too, where its template wrote none."""
    return model.tokenizer.encode(render_chat(messages, model.folder, answer=answer), add_bos)


def token_indices(positions: Positions, tokens: Sequence[int], bos_id: int | None) -> list[int]:
    """Indices into the tokens of one document.

    Args:
      positions: ``"all"`` (but for a bos token in front of others, which says nothing), an index,
        several of them (from the end, where negative), or a slice.

    Raises:
      ValueError: an index outside the document, or no index at all.
    """
    length = len(tokens)
    if isinstance(positions, str):
        if positions != "all":
            raise ValueError(f"positions must be 'all', indices or a slice, not {positions!r}")
        return list(range(1 if length > 1 and tokens[0] == bos_id else 0, length))
    if isinstance(positions, slice):
        chosen = list(range(length)[positions])
    else:
        chosen = [int(position) for position in np.atleast_1d(positions)]
    wrong = [position for position in chosen if not -length <= position < length]
    if wrong or not chosen:
        what = ", ".join(map(str, wrong)) if wrong else "nothing"
        raise ValueError(f"positions has {what}; a text of {length} tokens has 0 to {length - 1}")
    return [position % length for position in chosen]
