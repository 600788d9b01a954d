"""Accuracy of a model on a task with known answers."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from conlens_jax.corpora.corpus import Document
from conlens_jax.corpora.statements import NOTHING, TokenVariable
from conlens_jax.data.batches import pad_tokens
from conlens_jax.models.param_table import Params
from conlens_jax.models.tokenizer import Tokenizer
from conlens_jax.models.transformer import forward
from conlens_jax.models.transformer_config import TransformerConfig

_BATCH = 64


def answer_statistics(
    params: Params,
    model: TransformerConfig,
    tokenizer: Tokenizer,
    variables: Iterable[TokenVariable],
    documents: Sequence[Document],
) -> dict[str, float]:
    """Accuracy of M's top predictions at the positions that state a value determined by the task.

    Args:
      documents: each with its ``given``; they are read completely.

    Returns:
      ``answers_right``, the fraction of correct values, and ``exact_answers``, the fraction of
      documents with all values correct.
    """
    encoded = tokenizer.encode_batch([document.text for document in documents], add_bos=True)
    tokens_NS, _ = pad_tokens(encoded, max(map(len, encoded)), tokenizer.pad_id)
    given = tokenizer.encode_batch([document.given for document in documents], add_bos=True)
    after_NS = np.arange(tokens_NS.shape[1]) >= np.array([[len(ids)] for ids in given])
    stated_NS = np.any([v.stated(tokens_NS) != NOTHING for v in variables], axis=0) & after_NS
    predict = jax.jit(functools.partial(_top_predictions, model=model))
    pieces = [tokens_NS[i : i + _BATCH] for i in range(0, len(tokens_NS), _BATCH)]
    predicted_NS = np.concatenate([np.asarray(predict(params, piece)) for piece in pieces])
    right_NS = predicted_NS[:, :-1] == tokens_NS[:, 1:]
    asked_NS = stated_NS[:, 1:]
    return {
        "answers_right": float(right_NS[asked_NS].mean()),
        "exact_answers": float(np.all(right_NS | ~asked_NS, axis=1).mean()),
    }


def _top_predictions(params: Params, tokens_BS: jax.Array, *, model: TransformerConfig):
    return jnp.argmax(forward(params, tokens_BS, config=model), axis=-1)
