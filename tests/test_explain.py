"""The lens as a library: against the decoder, the full forward pass, and one by one."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from entry_points import run
from pipeline import quick_compilation
from tiny_user import LAYER, TEXT, TEXTS, tiny_user_lens

from conlens_jax.config import ConfigError, MeshConfig
from conlens_jax.evaluation.support import Calibration, SampleKnots
from conlens_jax.evaluation.words import note_of, words_of
from conlens_jax.inspection.explanations import Explanations
from conlens_jax.inspection.lens import Lens
from conlens_jax.inspection.programs import TOP
from conlens_jax.inspection.readings import ExplainedToken, Prediction, Reading
from conlens_jax.inspection.terminal import render, render_claims
from conlens_jax.lens.decoder import generate
from conlens_jax.lens.encoder import encode_tokens
from conlens_jax.lens.spec import decoder_of, encoder_of
from conlens_jax.measurement.programs import text_log_probs
from conlens_jax.measurement.training_range import TrainingRange, tokens_seen
from conlens_jax.parallel.mesh import make_mesh


@pytest.fixture(scope="module")
def lens(tmp_path_factory):
    with quick_compilation(tmp_path_factory):
        yield tiny_user_lens(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def explained(lens):
    return lens.explain(TEXT, progress=False)


@pytest.fixture(scope="module")
def sampled(lens):
    return lens.explain(TEXTS, slice(-2, None), samples=2, decoding="sample", seed=3)


@pytest.fixture(scope="module")
def oracle(lens):
    """The activations of every token of TEXT, what D writes of each, and what E makes of that;
    from the plain capture and the lens's own functions."""

    @jax.jit
    def run(trainable, frozen, states_SD):
        texts = generate(decoder_of(trainable, frozen), states_SD, None, spec=lens.spec)
        encoder = encoder_of(trainable, frozen, lens.spec)
        return texts, encode_tokens(encoder, texts, spec=lens.spec)

    states_SD = lens.model.capture([ids_of(lens, TEXT)], LAYER)[0]
    return states_SD, *run(lens.trainable, lens.frozen, states_SD)


def ids_of(lens, text):
    return lens.model.tokenizer.encode(text, add_bos=True)


# --- oracles ------------------------------------------------------------------------------------


def test_explanations_are_the_decoders_of_the_captured_activations(lens, explained, oracle):
    tokens, (states_SD, texts, _) = ids_of(lens, TEXT), oracle
    assert [row.explanation for row in explained] == lens.model.decode(texts)[1:]
    assert [row.position for row in explained] == list(range(1, len(tokens)))
    assert len({row.explanation for row in explained}) > 3
    np.testing.assert_allclose(lens.capture(TEXT, 4), states_SD[4], rtol=1e-5, atol=1e-5)


def test_kl_and_predictions_are_those_of_the_full_forward_with_the_swap(lens, explained, oracle):
    tokens, (states_SD, _, vectors) = np.array([ids_of(lens, TEXT)]), oracle
    clean = jax.nn.log_softmax(lens.model.logits(tokens)[0])
    for row in explained:
        at, reading = row.position, row.readings[0]
        logits = lens.model.swap(tokens, LAYER, at, vectors[at][None])[0, at]
        swapped = jax.nn.log_softmax(logits)
        kl = float(jnp.sum(jnp.exp(clean[at]) * (clean[at] - swapped)))
        assert reading.kl == pytest.approx(kl, rel=1e-3, abs=1e-5)
        a, b = np.asarray(states_SD[at]), np.asarray(vectors[at])
        cos = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert reading.cos == pytest.approx(cos, abs=1e-5)
        for found, log_p in ((row.before, clean[at]), (reading.after, swapped)):
            best = np.argsort(-np.asarray(log_p))[:TOP]
            assert [p.token for p in found] == [lens.model.tokenizer.token(t) for t in best]
            np.testing.assert_allclose(
                [p.probability for p in found], np.exp(log_p[best]), rtol=1e-3, atol=1e-6
            )
    assert max(row.best.kl for row in explained) > 0.01


def test_a_text_that_disturbs_m_more_than_the_mean_activation_is_said(lens, explained, tmp_path):
    """Against the full forward pass with the mean swapped in."""
    tokens = np.array([ids_of(lens, TEXT)])
    mean_D = lens.frozen["statistics"]["mean"]
    clean = jax.nn.log_softmax(lens.model.logits(tokens)[0])
    worse = []
    for row in explained:
        at, reading = row.position, row.best
        swapped = jax.nn.log_softmax(lens.model.swap(tokens, LAYER, at, mean_D[None])[0, at])
        kl = float(jnp.sum(jnp.exp(clean[at]) * (clean[at] - swapped)))
        assert row.kl_mean == pytest.approx(kl, rel=1e-3, abs=1e-5)
        worse.append(reading.kl > kl)
        assert [("more than the mean" in w) for w in row.warnings_of(reading)] == [True] * worse[-1]
        again = lens.swap(TEXT, at, reading)
        assert again.best.warnings and worse[-1] or not (again.best.warnings or worse[-1])
    assert any(worse) and not all(worse)
    assert lens.swap(TEXT, 5, lens.capture(TEXT, 5)).best.warnings == ()


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_the_mean_is_swapped_into_any_model(family, tmp_path):
    lens = tiny_user_lens(tmp_path, family)
    row, tokens = lens.swap(TEXT, 5, "fox"), np.array([ids_of(lens, TEXT)])
    mean_D = lens.frozen["statistics"]["mean"]
    clean = jax.nn.log_softmax(lens.model.logits(tokens)[0, 5])
    swapped = jax.nn.log_softmax(lens.model.swap(tokens, LAYER, 5, mean_D[None])[0, 5])
    kl = float(jnp.sum(jnp.exp(clean) * (clean - swapped)))
    assert row.kl_mean == pytest.approx(kl, rel=1e-3, abs=1e-5) and kl > 1e-3
    assert bool(row.best.warnings) == (row.best.kl > kl)


def test_what_training_never_had_is_said(lens, tmp_path):
    norms = np.linalg.norm(lens.capture(TEXT, "all"), axis=-1)
    order = np.argsort(norms[3:8]) + 3
    low, high = norms[order[1]], norms[order[-2]]
    tokens = ids_of(lens, TEXT)
    context = np.array([tokens[:6] + tokens[7:] + [tokens[6]]])  # the last is padding
    seen = tokens_seen([(context, np.array([len(tokens) - 1]))], lens.spec.model.vocab_size)
    trained_on = TrainingRange(3, 7, (float(low) - 1e-4, float(high) + 1e-4), seen)
    known = dataclasses.replace(lens, trained_on=trained_on)
    known = Lens.load(known.save(tmp_path / "lens"))
    assert known.trained_on == trained_on
    found = known.explain(TEXT, progress=False)
    for row in found:
        reasons = "".join(row.warnings)
        assert ("no position before 3" in reasons) == (row.position < 3)
        assert ("no position after 7" in reasons) == (row.position > 7)
        assert ("had the token" in reasons) == (row.position == 6)
        if 3 <= row.position <= 7:
            side = {order[0]: "is below", order[-1]: "is above"}.get(row.position)
            assert ("norm" in reasons) == (side is not None) and (side or "") in reasons
    assert found[0].warnings == known.swap(TEXT, 1, "fox").warnings
    assert Explanations.from_json(found.to_json()) == found
    assert found.records()[0]["warnings"] == list(found[0].warnings_of(found[0].best))
    plain = render(found, colour=False)
    assert plain.count("! 1 to 2: Training had no position before 3.") == 1
    marked = {row.position: "!" if row.warnings_of(row.best) else "" for row in found}
    assert all(f"\n{position}{mark} " in plain for position, mark in marked.items())
    page = found.to_html()
    assert page.count("<b>!</b>") == sum(len(row.warnings_of(row.best)) for row in found)
    assert lens.explain(TEXT, 1)[0].warnings == ()  # nothing is recorded


def test_one_by_one_is_the_same_as_together(lens, sampled):
    """Neither the list, nor padding, nor the size of a batch is seen; samples included."""
    found = []
    settings = dict(samples=2, decoding="sample", seed=3)
    for number, text in enumerate(TEXTS):
        for position in (-2, -1):
            alone = lens.explain(text, position, batch_size=1, **settings)
            found += [dataclasses.replace(row, document=number) for row in alone]
    assert len(found) == len(sampled)
    for one, other in zip(found, sampled, strict=True):
        assert (one.document, one.position, one.token) == (
            other.document,
            other.position,
            other.token,
        )
        assert [r.text for r in one.readings] == [r.text for r in other.readings]
        np.testing.assert_allclose(
            [r.kl for r in one.readings], [r.kl for r in other.readings], rtol=1e-3, atol=1e-5
        )
    assert any(row.readings[0].text != row.readings[1].text for row in sampled)


def test_swapping_the_activation_for_itself_changes_nothing(lens):
    row = lens.swap(TEXT, 5, lens.capture(TEXT, 5))
    assert row.best.kl == pytest.approx(0, abs=1e-6) and row.best.cos == pytest.approx(1, abs=1e-5)
    assert row.token == lens.tokens(TEXT)[5] == "red"


def test_swapping_an_explanation_is_what_explain_measured(lens, explained):
    row = next(row for row in explained if len(row.explanation.split()) == lens.spec.text_len)
    again = lens.swap(TEXT, row.position, row.explanation)
    assert again.best.kl == pytest.approx(row.best.kl, rel=1e-3, abs=1e-5)
    assert again.best.text == row.explanation


def test_encode_reads_like_the_encoder_at_any_length(lens):
    texts = ["fox", "the owl and the bee saw"]
    together = lens.encode(texts)
    read = jax.jit(
        lambda trainable, frozen, tokens: encode_tokens(
            encoder_of(trainable, frozen, lens.spec), tokens, spec=lens.spec
        )
    )
    for text, vector in zip(texts, together, strict=True):
        tokens = jnp.array([lens.model.tokenizer.encode(text)])
        expected = read(lens.trainable, lens.frozen, tokens)[0]
        np.testing.assert_allclose(vector, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(lens.encode("fox"), together[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decoding", ["greedy", "sample"])
def test_writing_token_by_token_ends_in_the_explanation(lens, decoding):
    *_, last = pieces = list(lens.write(TEXT, 3, decoding=decoding, seed=3))
    explanation = lens.explain(TEXT, 3, decoding=decoding, seed=3)[0].explanation
    assert last == explanation and len(pieces) == lens.spec.text_len
    assert all(last.startswith(piece) for piece in pieces)


def test_alternatives_are_what_the_decoder_could_have_written(lens, explained):
    best = explained[2].best
    rows = lens.alternatives(TEXT, explained[2].position, best, count=3)
    assert [row[0].token for row in rows] == list(best.tokens)  # greedy: each is the likeliest
    assert [row[0].probability for row in rows] == pytest.approx(best.probabilities, rel=1e-4)
    assert [row[0].text for row in rows] == list(best.pieces)
    assert all(sorted(row, key=lambda a: -a.probability) == list(row) for row in rows)
    changed = [rows[0][1].token, *best.tokens[1:]]
    assert lens.alternatives(TEXT, explained[2].position, changed, count=3)[0] == rows[0]
    with pytest.raises(ValueError, match="count must be at least 1"):
        lens.alternatives(TEXT, 2, best, count=0)


def test_batches_come_as_they_are_done_and_padding_changes_nothing(lens, explained):
    padded = dataclasses.replace(lens, least_length=64)
    batches = list(padded.explain_in_batches(TEXT, batch_size=4, whole=True))
    assert [len(batch) for batch in batches] == [4, 4, len(explained) - 8]
    for row, own in zip([row for batch in batches for row in batch], explained, strict=True):
        assert row.explanation == own.explanation
        assert row.best.kl == pytest.approx(own.best.kl, rel=1e-3, abs=1e-5)
        assert own.norm == pytest.approx(np.linalg.norm(lens.capture(TEXT, own.position)), rel=1e-5)
    with pytest.raises(ValueError, match="decoding"):
        lens.explain_in_batches(TEXT, decoding="beam")


def test_compare_says_what_it_did(lens):
    a, b = (TEXT, 3), (TEXTS[1], -1)
    found = lens.compare(a, b)
    a_D, b_D = lens.capture(*a), lens.capture(*b)
    mean_D = np.asarray(lens.frozen["statistics"]["mean"])
    vectors = np.stack([a_D, b_D, mean_D + a_D - b_D, mean_D + b_D - a_D])
    assert [found.a, found.b, found.towards_a, found.towards_b] == lens.decode(vectors)
    read = lens.encode(found.a) - lens.encode(found.b)
    cos = read @ (a_D - b_D) / np.linalg.norm(read) / np.linalg.norm(a_D - b_D)
    assert found.cos == pytest.approx(cos, abs=1e-4)


def test_steering_moves_the_activation_by_the_edit(lens):
    found = lens.steer(TEXT, 6, lambda text: text + " fox fox", strength=2.0, new_tokens=3)
    move = lens.encode(found.edited) - lens.encode(found.written)
    again = lens.swap(TEXT, 6, lens.capture(TEXT, 6) + 2 * move)
    assert found.effect.best.kl == pytest.approx(again.best.kl, rel=1e-3) and again.best.kl > 0
    tokens = lens.model.generate([ids_of(lens, TEXT)], 3, stop=())
    assert found.before == lens.model.decode(tokens)[0]
    edited, written = found.edited, found.written
    more = dict(written=written, strength=2.0, new_tokens=0)
    same = lens.steer(TEXT, 6, str(written) + " fox fox", **more)
    assert same.edited == edited and same.effect.best.kl == pytest.approx(found.effect.best.kl)
    assert same.after == "" and same.control == found.control != found.effect
    assert lens.steer(TEXT, 6, edited, **more, seed=1).control != found.control
    # As far from the activation, elsewhere: at strength 0 it is the activation itself.
    still = lens.steer(TEXT, 6, edited, written=written, strength=0.0, new_tokens=0)
    assert abs(still.control.best.kl) < 1e-6 < found.control.best.kl
    with pytest.raises(ValueError, match="edit changes nothing"):
        lens.steer(TEXT, 6, ("no such word", "x"))


def test_on_a_mesh_it_says_the_same(lens, explained, tmp_path):
    spread = Lens.load(lens.save(tmp_path / "lens"), make_mesh(MeshConfig(data=4, fsdp=2)))
    leaf = spread.trainable["decoder"]["base"]["output_head"]
    assert not leaf.sharding.is_fully_replicated
    found = spread.explain(TEXT, progress=False)
    assert [row.explanation for row in found] == [row.explanation for row in explained]
    for one, other in zip(found, explained, strict=True):
        assert one.best.kl == pytest.approx(other.best.kl, rel=1e-3, abs=1e-5)


# --- results ------------------------------------------------------------------------------------


def test_a_low_temperature_is_greedy_and_a_high_one_is_not(lens, explained, sampled):
    settings = dict(samples=2, decoding="sample", progress=False)
    texts = lambda **changes: {
        reading.text
        for row in lens.explain(TEXT, [3, -1], **settings, **changes)
        for reading in row.readings
    }
    greedy = {lens.explain(TEXT, [3, -1])[n].explanation for n in range(2)}
    assert texts(temperature=1e-4) == greedy
    assert texts(temperature=1.0) == texts() != texts(temperature=50.0)


def test_results_as_json_and_pandas(lens, sampled, tmp_path):
    text = sampled.to_json(tmp_path / "explained.json")
    assert (tmp_path / "explained.json").read_text(encoding="utf-8") == text
    assert Explanations.from_json(text) == sampled
    assert json.loads(text)["facts"]["layer"] == LAYER
    pandas = pytest.importorskip("pandas")
    table = sampled.to_pandas()
    assert isinstance(table, pandas.DataFrame) and len(table) == 2 * len(sampled)
    assert list(table["kl"][:2]) == [r.kl for r in sampled[0].readings]
    for wrong in ("nonsense", '{"schema": 9}', '{"schema": 1}'):
        with pytest.raises(ValueError, match="not the JSON of Explanations"):
            Explanations.from_json(wrong)


def test_support_is_calibrated_from_the_decoders_probabilities(lens, explained, tmp_path):
    """Of greedy texts, token by token; written with the lens, and as JSON."""
    calibration = Calibration({"comma": None, "separator": None}, {"next": ((0, 0.1), (1, 0.9))})
    believed = dataclasses.replace(lens, calibration=calibration)
    believed = Lens.load(believed.save(tmp_path / "lens"))
    assert believed.calibration == calibration
    found = believed.explain(TEXT, progress=False)
    log_probs = jax.jit(functools.partial(text_log_probs, spec=lens.spec))
    for row, plain in zip(found, explained, strict=True):
        reading = row.best
        assert str(reading.text) == str(plain.best.text) and plain.best.support is None
        activation = lens.capture(TEXT, row.position)[None]
        text = jnp.asarray([reading.tokens], jnp.int32)
        p = np.exp(log_probs(lens.trainable, lens.frozen, activation, text))[0]
        np.testing.assert_allclose(reading.support, 0.1 + 0.8 * p, rtol=1e-4)
        assert "".join(reading.pieces).strip() == str(reading.text).strip()
    assert Explanations.from_json(found.to_json()) == found
    assert found.records()[0]["support"] == list(found[0].best.support)
    assert believed.explain(TEXTS[0], [1], decoding="sample")[0].best.support is None


def test_rows_with_a_warning_are_counted(lens, tmp_path, capsys):
    calibration = Calibration({"comma": None, "separator": None}, {"next": ((0, 0.1), (1, 0.9))})
    known = dataclasses.replace(lens, calibration=calibration, trained_on=TrainingRange(2, 4))
    folder = known.save(tmp_path / "lens")
    script = Path(__file__).parent.parent / "scripts" / "measure_warnings.py"
    run(str(script), [f"--checkpoint={folder}", "--documents=2", "--words=6"])
    table = capsys.readouterr().out.splitlines()
    lines = {line[:22].strip(): line[22:].split() for line in table}
    # Of six words and the bos token, which is not explained, in each: 1, 5 and 6.
    assert lines["position"][:2] == ["6", str(6 * lens.spec.text_len)]
    warned, rest = int(lines["any warning"][0]), int(lines["no warning"][0])
    assert warned + rest == 12 and warned >= 6


def test_claims_are_what_the_samples_state(lens, explained, monkeypatch, capsys):
    """Every token of a text is a next word: shares, neighbours and lifts counted by hand."""
    calibration = Calibration(
        {"comma": None, "separator": None},
        {"next": ((0, 0.1), (1, 0.9))},
        agreement={
            2: SampleKnots({"next": ((0.0, 0.0), (1.0, 0.5))}, {"next": ((0.5, 0.25), (1.0, 0.75))})
        },
        said={"next": {explained[4].best.tokens[0]: 8}},
        said_rows=16,
    )
    with pytest.raises(ValueError, match="no calibration of claims.*conlens_jax.evaluate"):
        lens.claims(TEXT, 3)
    believed = dataclasses.replace(lens, calibration=calibration)
    several = believed.claims(TEXT, "all", 2, seed=3, progress=False)
    samples = lens.explain(TEXT, "all", samples=2, decoding="sample", seed=3, progress=False)
    greedy = {row.position: set(row.best.tokens) for row in explained}
    assert [found.position for found in several] == list(greedy)
    name = lens.model.tokenizer.piece
    for found, row in zip(several, samples, strict=True):
        assert found.samples == 2 and found.token == row.token
        own = explained[found.position - 1]
        assert own.position == found.position and found.warnings == own.warnings_of(own.best)
        stated = [set(reading.tokens) for reading in row.readings]
        texts = {name(t).strip(): t for t in set.union(*stated, greedy[row.position])}
        assert {claim.text for claim in found} == set(texts)
        for claim in found:
            token = texts[claim.text]
            assert claim.share == sum(token in tokens for tokens in stated) / 2
            assert claim.in_greedy == (token in greedy[row.position])
            assert claim.lift == claim.share * (2 if token == explained[4].best.tokens[0] else 16)
            near = [o for o in (-1, 1) if token in greedy.get(row.position + o, ())]
            assert claim.neighbours == tuple(near)
            if not claim.in_greedy:
                assert claim.support == {0.5: 0.25, 1.0: 0.75}[claim.share]
            else:  # by probability, between 0.1 and 0.9
                assert claim.share + 0.1 < 4 * claim.support < claim.share + 0.9
    alone = believed.claims(TEXT, 3, 2, seed=3, progress=False)
    among = several[[found.position for found in several].index(3)]
    assert [c._replace(support=0) for c in alone] == [c._replace(support=0) for c in among]
    supports = [[claim.support for claim in found] for found in (alone, among)]
    np.testing.assert_allclose(*supports, rtol=1e-4)
    with pytest.raises(ValueError, match="least_share must be 0 to 1, not 2"):
        believed.claims(TEXT, 3, least_share=2)
    _check_claims_command(believed, several, monkeypatch, capsys)


def _check_claims_command(believed, several, monkeypatch, capsys):
    """``explain --claims`` prints them, as a table and as JSON, and writes no page."""
    monkeypatch.setattr(Lens, "load", lambda *_, **__: believed)
    command = ["--checkpoint=x", "--claims", "--samples=2", "--seed=3", TEXT]
    run("conlens_jax.explain", command)
    assert capsys.readouterr().out == render_claims(several, colour=False) + "\n"
    run("conlens_jax.explain", [*command, "--json", "--positions=3"])
    values = json.loads(capsys.readouterr().out)
    (((record,),)) = values["texts"]
    among = next(found for found in several if found.position == 3)
    assert record["claims"][0]["text"] == among[0].text and record["samples"] == 2
    assert values["facts"] == believed.facts
    with pytest.raises(ConfigError, match="--html has no claims"):
        run("conlens_jax.explain", [*command, "--html=page.html"])


def test_support_in_the_terminal():
    pieces, support = (" a", "nna", " |", " fox", " sled"), (0.95, 0.95, None, 0.3, 0.7)
    reading = Reading("anna | fox sled", 0.9, 0.1, (Prediction("x", 1.0),), None, None)
    row = ExplainedToken(0, 1, "t", (Prediction("x", 1.0),), (reading,))
    shown = lambda row, **kind: render(Explanations((row,), (("b", "t"),)), **kind, width=100)
    assert "anna | fox sled" in shown(row, colour=False) and "?" not in shown(row, colour=False)
    reading = dataclasses.replace(reading, pieces=pieces, support=support)
    row = dataclasses.replace(row, readings=(reading,))
    plain = shown(row, colour=False)
    assert "anna+ | fox? sled " in plain and "+ right in at least nine of ten" in plain
    bright = shown(row, colour=True)
    assert "\x1b[1manna\x1b[0m | \x1b[2mfox\x1b[0m sled " in bright and "bold: right" in bright
    # Without a calibration: the decoder's own probabilities, which say so; gaps have none.
    raw = dataclasses.replace(reading, support=None, probabilities=(0.98, 0.95, 0.99, 0.4, 0.7))
    plain = shown(dataclasses.replace(row, readings=(raw,)), colour=False)
    assert "anna+ | fox? sled " in plain and "right in at least" not in plain
    assert "+ the decoder's own probability" in plain and "No support:" in plain
    # In a row that should not be believed no word is marked.
    plain = shown(dataclasses.replace(row, warnings=("No.",)), colour=False)
    assert "anna | fox sled " in plain and "! 1: No." in plain
    bright = shown(dataclasses.replace(row, warnings=("No.",)), colour=True)
    assert "\x1b[2manna\x1b[0m" in bright and "\x1b[1manna" not in bright


def test_words_of_pieces():
    found = lambda *pieces, **known: [(w.space, w.text) for w in words_of(pieces, **known)]
    assert found(" an", "na", ",", " |", " ·") == [("", "anna"), ("", ","), (" ", "|"), (" ", "·")]
    assert found("her", "", "s\n", " x") == [("", "hers"), (" ", "x")]
    assert found("日", "本", "a") == [("", "日"), ("", "本"), ("", "a")]
    assert found("red", "fox", support=[0.5, 0.6]) == [("", "red"), ("", "fox")]
    (word,) = words_of([" fo", "x"], [0.7, 0.7], [0.5, 0.5])
    assert (word.support, word.probability) == (0.7, 0.25)
    assert (word.value(True), word.value(False)) == (0.7, 0.25)
    assert words_of(["·"], None, [0.9])[0].value(False) is None
    assert note_of(0.9999, True) == "support 0.99" and note_of(0.9, True) == "support 0.90"


def test_words_on_the_page(lens, explained):
    reading = explained[0].best
    pieces, support = (" a", "<b>", " |", " fox", " sled"), (0.95, 0.93, None, 0.3, 0.7)
    known = dict(pieces=pieces, support=support, probabilities=None)
    reading = dataclasses.replace(reading, **known, warnings=())
    row = dataclasses.replace(explained[0], readings=(reading,), warnings=())
    page = Explanations((row,), (("b", "t"),)).to_html()
    shown = r'<span class="(word[^"]*)" tabindex="0"[^>]*title="([^"]*)"[^>]*>([^<]*)<'
    words = re.findall(shown, page)
    assert words == [
        ("word sure", "support 0.95", "a"),
        ("word sure", "support 0.93", "&lt;b&gt;"),
        ("word doubtful", "support 0.30", "fox"),
        ("word", "support 0.70", "sled"),
    ]
    assert "Hide words below support" in page and "</span> | <span" in page
    assert "No support" not in page
    warned = Explanations((dataclasses.replace(row, warnings=("<i>",)),), (("b", "t"),)).to_html()
    assert "not measured on rows with a warning" in warned and '<td class="warned">' in warned
    raw = explained.to_html()
    assert "Hide words below the decoder" in raw and "No support: how often" in raw
    assert raw.count("<script>") == 1 and "<script" not in explained._repr_html_()


def test_a_row_a_word(lens, explained):
    pandas = pytest.importorskip("pandas")
    table = explained.to_pandas(words=True)
    assert isinstance(table, pandas.DataFrame)
    words = [word for row in explained for word in row.best.words]
    assert table["word"].tolist() == [word.text for word in words]
    assert table["probability"].tolist() == [word.probability for word in words]
    first = table[table["position"] == 1]
    assert first["number"].tolist() == list(range(len(explained[0].best.words)))
    assert table["support"].isna().all() and set(table["kl"]) == {r.best.kl for r in explained}


def test_a_lens_draws_a_text(lens):
    pytest.importorskip("matplotlib")
    kl, probability = lens.plot(TEXT, [1, 2]).axes  # it has no support whose reliability is known
    assert len(kl.patches) == 2 and probability.get_ylabel() == "probability"


def test_html_is_whole_and_escaped(explained):
    evil = '<script>alert("x")</script>'
    row = dataclasses.replace(
        explained[0], token=evil, readings=(dataclasses.replace(explained[0].best, text=evil),)
    )
    warned = dataclasses.replace(row, position=1, warnings=(evil,))
    page = Explanations((row, warned), ((evil, evil),), {"model": evil}).to_html()
    assert evil not in page and page.count("&lt;script&gt;") >= 6
    assert page.count("<script") == 1  # the slider
    sampled = dataclasses.replace(row.best, pieces=None, support=None, probabilities=None)
    row = dataclasses.replace(row, readings=(sampled,))
    page = Explanations((row,), ((evil, evil),), {"model": evil}).to_html()
    assert "<script" not in page and page.count("&lt;script&gt;") >= 4
    assert "http" not in page and page.startswith("<!doctype html>")
    shown = explained._repr_html_()
    assert shown.count("<tr>") == len(explained) + 1 and "<html" not in shown


def test_callback_gets_whole_tokens_as_they_come(lens):
    batches = []
    result = lens.explain(
        TEXT, slice(8), samples=2, decoding="sample", batch_size=9, callback=batches.append
    )
    assert [len(batch) for batch in batches] == [4, 4]
    assert [row for batch in batches for row in batch] == list(result)


# --- inputs -------------------------------------------------------------------------------------


def test_token_ids_and_chats_are_read_too(lens, explained):
    tokens = ids_of(lens, TEXT)
    assert lens.explain(tokens, progress=False).rows == explained.rows
    chat = [{"role": "user", "content": "two blue owl"}]
    with pytest.raises(ValueError, match="no chat template"):
        lens.explain(chat)
    file = lens.model.folder / "chat_template.jinja"
    file.write_text("{{ bos_token }}{% for m in messages %}the cat saw {{ m.content }}{% endfor %}")
    try:
        row = lens.explain(chat, -1)[0]
        other = lens.explain("the cat saw two blue owl", -1)[0]
        assert row == other
    finally:
        file.unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": []}, "empty list"),
        ({"text": 3.5}, "must be a text"),
        ({"text": "one " * 100}, "more than the 64"),
        ({"text": [[1, 99]]}, "0 to 47; 1 are not, the first is 99"),
        ({"text": TEXT, "positions": 40}, "positions has 40"),
        ({"text": TEXT, "positions": "some"}, "'all'"),
        ({"text": TEXT, "positions": slice(50, 60)}, "positions has nothing"),
        ({"text": TEXT, "samples": 3}, "decoding='sample'"),
        ({"text": TEXT, "decoding": "sample", "temperature": 0.0}, "temperature must be above 0"),
        ({"text": TEXT, "decoding": "beam", "batch_size": 0}, "decoding must.*batch_size must"),
    ],
)
def test_what_cannot_be_explained_is_said(lens, arguments, message):
    with pytest.raises(ValueError, match=message):
        lens.explain(**arguments)
