"""Agreement of samples: hand-made texts of one activation; claims whose calibration is known."""

from __future__ import annotations

import dataclasses
import json
import types

import numpy as np
import pytest
from test_support import checked_rows, suite_of

from conlens_jax.evaluation.claims import CONTEXT, FACT, NEXT, Claim
from conlens_jax.evaluation.studies.agreement import (
    ONLY,
    WITH,
    Agreement,
    agreement_of_claims,
    sizes,
)
from conlens_jax.evaluation.studies.claims import Checked
from conlens_jax.evaluation.studies.support import in_test_half, said_by_rows
from conlens_jax.evaluation.support import Calibration, SampleKnots
from conlens_jax.inspection.agreement import AgreedClaim, AgreedClaims, agreed_claims
from conlens_jax.inspection.terminal import render_claims

PIECES = [" the", " The", " fox", "es", " sled", " |"]
# Words by their pieces: "the" is one claim in both spellings, "foxes" one of two tokens.
CALIBRATION = Calibration(
    {},
    {NEXT: ((0.0, 0.0), (1.0, 1.0))},
    agreement={
        4: SampleKnots({NEXT: ((0.0, 0.0), (1.0, 0.5))}, {CONTEXT: ((0.25, 0.1), (0.75, 0.6))})
    },
    said={NEXT: {0: 50}, CONTEXT: {"foxes": 5}},
    said_rows=100,
)


def claims_of(tokens):
    claims = []
    for place, token in enumerate(tokens):
        if token in (0, 1):
            claims.append(Claim(NEXT, 0, (place,)))
        if token == 2:
            claims.append(Claim(CONTEXT, "foxes", (place, place + 1)))
        if token == 4:
            claims.append(Claim(CONTEXT, "sled", (place,)))
    return claims


READER = types.SimpleNamespace(of=claims_of)


def agreed(greedy, support, samples, neighbours, least_share=0.25, calibration=CALIBRATION):
    return agreed_claims(
        *(READER, calibration, PIECES.__getitem__, (greedy, support), samples),
        *(neighbours, least_share),
    )


def test_claims_of_samples_by_hand():
    samples = [(0, 5, 2, 3), (1, 5, 2, 3), (0, 0), (1, 5, 2, 3)]
    found = agreed((1, 5), (0.8, None), samples, {-1: (0, 5, 4), 1: (5, 2, 3)})
    assert found == (
        AgreedClaim(CONTEXT, "foxes", 0.75, pytest.approx(0.6), 0.75 / 0.05, False, (1,)),
        # All samples of four, and of other rows every second text; half the mean of 0.8 and 1.
        AgreedClaim(NEXT, "The", 1.0, pytest.approx(0.45), 1.0 / 0.5, True, (-1,)),
    )


def test_few_samples_leave_a_claim_out_unless_it_is_in_the_greedy_text():
    samples = [(4,), (0,), (0,), (0,)]
    shares = lambda *args: {c.text: c.share for c in agreed(*args)}
    assert shares((2, 3), (0.3, 0.3), samples, {}, 0.5) == {"the": 0.75, "foxes": 0.0}
    assert shares((), (), samples, {}, 0.25) == {"the": 0.75, "sled": 0.25}


def test_a_claim_never_seen_has_the_rate_of_one_row():
    (sled,) = agreed((), (), [(4,), (4,)], {})
    assert sled.lift == 100.0
    # Two samples were not calibrated.
    assert sled.support is None
    bare = Calibration({}, CALIBRATION.knots)
    (sled,) = agreed((), (), [(4,)] * 4, {}, calibration=bare)
    assert sled.lift is None and sled.support is None


def test_the_better_of_two_equal_words_counts_and_the_sure_ones_come_first():
    samples = [(4,), (4,), (4,), (2, 3)]
    found = agreed((0, 1, 4), (0.2, 0.9, None), samples, {})
    # Half the mean of 0.9 and 0; the sled is of a kind that was not measured in greedy texts.
    expected = [("The", pytest.approx(0.225)), ("foxes", pytest.approx(0.1)), ("sled", None)]
    assert [(c.text, c.support) for c in found] == expected
    found = agreed((0, 1), (0.2, 0.9), samples[:3], {})  # three samples were not calibrated
    assert [(c.text, c.support) for c in found] == [("The", 0.9), ("sled", None)]


def test_a_fact_has_the_name_of_its_variable():
    reader = types.SimpleNamespace(of=lambda tokens: [Claim(FACT, ("animal", 2), (0,))])
    (fact,) = agreed_claims(
        reader, CALIBRATION, PIECES.__getitem__, ((2,), (0.5,)), [(2,)], {}, 0.25
    )
    assert fact.text == "animal: fox"


SHOWN = AgreedClaims(
    3,
    "anna\x1b",
    4,
    (
        AgreedClaim(NEXT, "had", 1.0, 0.95, 12.25, True, (-1, 1)),
        AgreedClaim(CONTEXT, "sled", 0.25, 0.3, None, False, ()),
        AgreedClaim(CONTEXT, "fox", 0.25, None, 1.0, False, ()),
    ),
)


def test_claims_as_json_and_in_the_terminal(tmp_path):
    values = json.loads(SHOWN.to_json(tmp_path / "claims.json"))
    assert json.loads((tmp_path / "claims.json").read_text()) == values == SHOWN.record()
    assert values["token"] == SHOWN.token and values["samples"] == 4
    assert [AgreedClaim(**{**c, "neighbours": tuple(c["neighbours"])}) for c in values["claims"]]
    assert values["claims"][0]["neighbours"] == [-1, 1]
    lines = render_claims([SHOWN], colour=False).splitlines()
    assert lines[1].split() == ["3", "anna·", "next", "had", "0.95+", "4/4", "12.2", "P-1", "P+1"]
    assert lines[2].split() == ["context", "sled", "0.30?", "1/4"]
    assert lines[3].split() == ["context", "fox", "1/4", "1.0"]
    assert "+ right in at least nine of ten" in lines[4]
    bright = render_claims([SHOWN], colour=True).splitlines()
    assert bright[1].startswith("\x1b[1m") and bright[2].startswith("\x1b[2m")
    assert not bright[3].startswith("\x1b")
    warned = dataclasses.replace(SHOWN, warnings=("No.",))
    assert warned.record()["warnings"] == ["No."]
    lines = render_claims([warned, SHOWN], colour=False).splitlines()
    assert lines[1].split()[:5] == ["3!", "anna·", "next", "had", "0.95"]
    assert lines[4] == "! No." and lines[5].split()[:5] == ["3", "anna·", "next", "had", "0.95+"]
    assert render_claims([warned], colour=True).splitlines()[1].startswith("\x1b[2m")


# --- the study ----------------------------------------------------------------------------------


def test_distinct_claims_and_their_scores():
    claim = lambda says, row=0: Checked(Claim(NEXT, says, (0,)), row, says > 5)
    greedy = [claim(1), claim(1), claim(7, row=1)]
    samples = [[claim(1), claim(7), claim(7)], [claim(7), claim(2, row=1)], [claim(7, row=1)]]
    found = Agreement.of(greedy, np.array([0.2, 0.5, 0.9]), samples)
    assert found.claims == [claim(1), claim(7, row=1), claim(7), claim(2, row=1)]
    np.testing.assert_array_equal(found.support_C, [0.5, 0.9, np.nan, np.nan])
    assert found.states_CK.astype(int).tolist() == [[1, 0, 0], [0, 0, 1], [1, 1, 0], [0, 1, 0]]
    first = found.of_first(1)
    assert first[WITH].score_C.tolist() == [(0.5 + 1) / 2, 0.9 / 2]
    assert first[ONLY].score_C.tolist() == [1.0] and first[ONLY].right_C.tolist() == [True]
    assert found.of_first(3)[ONLY].score_C.tolist() == pytest.approx([2 / 3, 1 / 3])


def test_how_many_samples_are_calibrated():
    assert sizes(16) == [4, 8, 16] and sizes(12) == [4, 8, 12] and sizes(3) == [3]


def test_said_counts_rows_not_words():
    claim = lambda kind, says, row: Checked(Claim(kind, says, (0,)), row, True)
    checked = [claim(NEXT, 4, 0), claim(NEXT, 4, 0), claim(NEXT, 5, 1), claim(NEXT, 5, 0)]
    found = said_by_rows([*checked, claim(CONTEXT, "fox", 0)])
    assert found == {NEXT: {5: 2, 4: 1}, CONTEXT: {"fox": 1}}


class Truth:
    """Every token is a claim; even ones are right."""

    reader = types.SimpleNamespace(
        of=lambda tokens: [Claim(NEXT, token, (place,)) for place, token in enumerate(tokens)]
    )

    def is_right(self, claim, row, clean):
        return claim.says % 2 == 0


@pytest.fixture(scope="module")
def measured():
    """Rows state 0 or 1 greedily, which the decoder finds equally likely; all samples state 0 too,
    none 1. And in 4 of 8 samples all rows state 2, in one sample 3 and in three others 5."""
    suite = suite_of(200, types.SimpleNamespace(spec=types.SimpleNamespace(end=None)))
    is_zero_N = np.arange(200) % 2 == 0
    samples = [np.full((200, 1), token) for token in (2, 2, 2, 2, 3, 5, 5, 5)]
    samples = [np.concatenate([np.where(is_zero_N, 0, s[:, 0])[:, None], s], 1) for s in samples]
    greedy = [
        Checked(Claim(NEXT, int(not zero), (0,)), row, bool(zero))
        for row, zero in enumerate(is_zero_N)
    ]
    bare = Calibration({}, {NEXT: ((0.0, 0.5), (1.0, 0.5))}, {"reliability": {"all": []}})
    return suite, greedy, samples, bare


def study(measured, **changes):
    suite, greedy, samples, calibration = measured
    calibration = dataclasses.replace(calibration, **changes)
    return agreement_of_claims(
        *(suite, Truth(), None, greedy, np.zeros((200, 1)), samples, calibration),
        is_fitted=bool(changes),
    )


def test_agreement_is_fitted_and_tested_apart(measured):
    found, metrics = study(measured)
    assert set(found.agreement) == {4, 8}
    rows = np.arange(200)
    is_fit = ~in_test_half(measured[0].rows.documents_N)
    n, n_zero = int(is_fit.sum()), int(np.sum(is_fit & (rows % 2 == 0)))
    # Isotonic, with one added claim at either end.
    others = lambda share, k: found.with_samples(NEXT, None, share, k)
    assert others(4 / 8, 8) == pytest.approx(n / (n + 1))
    assert others(3 / 8, 8) == pytest.approx(1 / (2 * n + 1))
    assert others(1.0, 4) == pytest.approx((n + 1) / (n + 2))
    assert others(0.5, 16) is None
    assert found.with_samples(NEXT, 0.5, 1.0, 8) == pytest.approx(n_zero / (n_zero + 1))
    assert found.with_samples(NEXT, 0.5, 0.0, 8) == pytest.approx(1 / (n - n_zero + 1))
    # What one sample of eight states is not shown, and not tested.
    tables = found.measured["reliability"]
    assert sum(b["claims"] for b in tables["only_samples"]) == 2 * (200 - n)
    assert sum(b["claims"] for b in tables["with_samples"]) == 200 - n
    assert metrics["support_right_at_90_only_8_samples"].value == 1.0
    assert metrics["support_share_at_90_only_8_samples"].value == 0.5
    assert metrics["support_ece_only_8_samples"].value < 0.02
    assert metrics["support_ece_with_8_samples"].value < 0.025
    # The decoder's probability does not tell them apart; the samples do.
    assert metrics["support_gain_8_samples"].value == pytest.approx(0.25, abs=0.002)


def test_agreement_of_other_documents_is_tested_on_all(measured):
    flat = {NEXT: ((0.0, 0.7), (1.0, 0.7))}
    found, metrics = study(measured, agreement={8: SampleKnots(flat, flat)})
    assert found.agreement == {8: SampleKnots(flat, flat)}
    table = lambda n: [{"claims": n, "support": pytest.approx(0.7), "right": 0.5}]
    assert found.measured["reliability"]["only_samples"] == table(400)
    assert found.measured["reliability"]["with_samples"] == table(200)
    assert metrics["support_ece_only_8_samples"].value == pytest.approx(0.2)
    assert metrics["support_gain_8_samples"].value == pytest.approx(0.25 - 0.29)


def test_nothing_but_the_greedy_texts_claims(measured):
    suite, _, _, calibration = measured
    greedy, samples = checked_rows(np.ones(200, bool)), [np.zeros((200, 1), np.int32)] * 4
    found, metrics = study((suite, greedy, samples, calibration))
    assert found.with_samples(NEXT, None, 1.0, 4) is None
    assert found.with_samples(NEXT, 0.5, 1.0, 4) > 0.98
    assert "only_samples" not in found.measured["reliability"]
    assert not any("only" in name for name in metrics)
