"""The lens along one document: its explanation at every token, and the KL of swapping it in."""

from __future__ import annotations

import numpy as np

from conlens_jax.data.rows import Rows
from conlens_jax.evaluation.report.heat_map import HeatMap, HeatToken
from conlens_jax.evaluation.studies.text_changes import Lexicon
from conlens_jax.evaluation.suite import Suite
from conlens_jax.models.param_table import Params
from conlens_jax.models.tokenizer import Tokenizer
from conlens_jax.models.written import written_texts


def rows_of_document(rows: Rows, first_position: int, after: int) -> Rows:
    """A row at every position of the longest context (the first one of that length), from
    ``first_position`` on, each followed by at least ``after`` tokens; without activations."""
    row = int(np.argmax(rows.lengths_N))
    length = int(rows.lengths_N[row])
    positions_N = np.arange(min(first_position, length - after - 1), length - after, dtype=np.int32)
    count = len(positions_N)
    alike = lambda array: np.repeat(array[row : row + 1], count, axis=0)
    return Rows(
        np.zeros((count, 0), np.float32),
        alike(rows.tokens_NS),
        positions_N,
        alike(rows.lengths_N),
        alike(rows.documents_N),
    )


def document_heat(suite: Suite, trainable: Params, frozen: Params, tokenizer: Tokenizer) -> HeatMap:
    """KL(M ‖ M with the reconstruction at P) for every P of one held-out document, with the greedy
    explanation there."""
    measurer, original = suite.measurer, frozen["original"]
    after = max(measurer.horizon - 1, 1)
    bare = rows_of_document(suite.rows, suite.warm.before - 1, after)
    rows = measurer.with_activations(original, bare)
    explained = measurer.explain(trainable, frozen, rows)
    vectors = {"greedy": explained.reconstructions["greedy"]}
    kl_N = measurer.effects(original, rows, vectors)["greedy"].kl_at
    of_position = dict(zip(rows.positions_N.tolist(), range(len(rows)), strict=True))
    tokens = []
    for position, token in enumerate(rows.tokens_NS[0, : rows.lengths_N[0]]):
        row = of_position.get(position)
        shown = tokenizer.token(token)
        if row is None:
            tokens.append(HeatToken(shown))
        else:
            written = explained.texts["greedy"][row]
            (text,) = written_texts([written], tokenizer, measurer.spec.end)
            tokens.append(HeatToken(shown, float(kl_N[row]), text))
    return HeatMap(
        f"Document {int(rows.documents_N[0])}, the longest of the held-out rows",
        "The stronger the colour of a token, the more M's next prediction changes when the "
        "reconstruction replaces the activation there. Point at a token, or tap it, for its "
        "explanation; gray tokens were not read.",
        "nats",
        tokens,
        spaced=bool(Lexicon.of(tokenizer, {}).starts_word.all()),
    )
