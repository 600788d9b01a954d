"""The number shown is of the text shown: written tokens travel with their text.

The oracle reads tokens with the lens's own encoder, one text at a time and without padding.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from awkward_texts import (
    KINDS,
    SPARE,
    TEXT,
    TEXT_LEN,
    awkward,
    awkward_lens,
    ids_of,
    tokenizer_of,
)
from pipeline import quick_compilation

from conlens_jax.inspection.explanations import Explanations
from conlens_jax.inspection.terminal import render
from conlens_jax.lens.encoder import encode_tokens
from conlens_jax.lens.spec import encoder_of
from conlens_jax.models.written import Written, with_its_tokens, written_texts

CASES = [(kind, name) for kind in KINDS for name in awkward(kind)]
WRONG = [case for case in CASES if not awkward(case[0])[case[1]][2]]
READ_ALIKE = dict(rtol=1e-4, atol=1e-4)
SAMPLED = dict(decoding="sample", samples=3, seed=1, progress=False)


@pytest.fixture(scope="module")
def lenses(tmp_path_factory):
    with quick_compilation(tmp_path_factory):
        found = {kind: awkward_lens(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}
        one, other = found.values()
        assert one.spec == other.spec
        vars(other)["_programs"] = one._programs  # so that they are compiled once
        yield found


@pytest.fixture(scope="module", params=KINDS)
def lens(request, lenses):
    return lenses[request.param]


@pytest.fixture(scope="module")
def explained(lens):
    return lens.explain(TEXT, **SAMPLED)


@pytest.fixture(scope="module")
def oracle(lenses):
    """The reconstruction from token ids, for any of the lenses."""
    spec = lenses[KINDS[0]].spec

    @jax.jit
    def read(trainable, frozen, tokens_BT):
        return encode_tokens(encoder_of(trainable, frozen, spec), tokens_BT, spec=spec)

    def of(lens, tokens):
        return np.asarray(read(lens.trainable, lens.frozen, jnp.array([tokens])))[0]

    return of


def case(kind: str, name: str):
    tokenizer = tokenizer_of(kind)
    tokens, text, reads_back = awkward(kind)[name]
    return ids_of(tokens, tokenizer), text, reads_back, tokenizer


def plain(row):
    return json.loads(json.dumps(dataclasses.asdict(row)))


# --- texts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_written_text_keeps_its_tokens_and_says_whether_it_gives_them_again(kind, name):
    ids, text, reads_back, tokenizer = case(kind, name)
    (written,) = written_texts([ids], tokenizer)
    assert (written, written.tokens, written.reads_back) == (text, tuple(ids), reads_back)
    assert (tokenizer.encode(text) == ids) == reads_back
    assert with_its_tokens(text, ids, tokenizer).tokens == tuple(ids)
    for twin in (copy.deepcopy(written), pickle.loads(pickle.dumps(written))):
        assert (twin, twin.tokens, twin.reads_back) == (text, tuple(ids), reads_back)
    assert type(written + " x") is type(written.strip()) is type(str(written)) is str
    assert json.loads(json.dumps(written)) == text


def test_tokens_of_another_text_are_refused():
    ids, _, _, tokenizer = case("byte_level", "half a character")
    with pytest.raises(ValueError, match="edited or another model wrote it"):
        with_its_tokens("cat!", ids, tokenizer)


# --- the lens -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_what_is_read_is_said_and_measured(lenses, oracle, kind, name):
    """Token ids, and a text with its tokens, are read as they are; a bare text as its own."""
    lens, (ids, text, reads_back, tokenizer) = lenses[kind], case(kind, name)
    activation = lens.capture(TEXT, 2)
    (written,) = written_texts([ids], tokenizer)
    for explanation in (ids, np.array(ids), written):
        found = lens.as_read(explanation)
        assert (found, found.tokens, found.reads_back) == (text, tuple(ids), reads_back)
        np.testing.assert_allclose(lens.encode(explanation), oracle(lens, ids), **READ_ALIKE)
    swapped = lens.swap(TEXT, 2, ids).best
    assert (swapped.text, swapped.tokens, swapped.reads_back) == (text, tuple(ids), reads_back)
    vector = oracle(lens, ids)
    cos = vector @ activation / np.linalg.norm(vector) / np.linalg.norm(activation)
    assert swapped.cos == pytest.approx(cos, abs=1e-4)
    assert lens.swap(TEXT, 2, swapped) == lens.swap(TEXT, 2, written) == lens.swap(TEXT, 2, ids)
    again = tokenizer.encode(text)
    if again:
        reread = lens.swap(TEXT, 2, text).best
        assert (reread.text, reread.tokens, reread.reads_back) == (text, tuple(again), True)
        np.testing.assert_allclose(lens.encode(text), oracle(lens, again), **READ_ALIKE)
        assert (reread.cos == pytest.approx(swapped.cos, abs=1e-4)) == reads_back


def test_the_numbers_of_explain_are_those_of_the_tokens_it_gives(lens, explained, oracle):
    assert not all(r.reads_back for row in explained for r in row.readings)
    for row in explained:
        activation = lens.capture(TEXT, row.position)
        for reading in row.readings:
            assert len(reading.tokens) == TEXT_LEN
            vector = oracle(lens, reading.tokens)
            cos = vector @ activation / np.linalg.norm(vector) / np.linalg.norm(activation)
            assert reading.cos == pytest.approx(cos, abs=1e-4)
            tokenizer = lens.model.tokenizer
            assert reading.text == tokenizer.decode(reading.tokens)
            assert reading.reads_back == (tokenizer.encode(reading.text) == list(reading.tokens))
            for same in (reading, reading.text, reading.tokens):
                swapped = lens.swap(TEXT, row.position, same).best
                assert swapped.tokens == reading.tokens
                assert swapped.kl == pytest.approx(reading.kl, rel=1e-3, abs=1e-5)
    assert lens.swap(TEXT, 2, explained[1]) == lens.swap(TEXT, 2, explained[1].best)


def test_tokens_survive_json_pandas_and_pages(lens, explained):
    back = Explanations.from_json(explained.to_json())
    assert back == explained and back[0].best.text.tokens == explained[0].best.tokens
    position = explained[0].position
    assert lens.swap(TEXT, position, back[0]) == lens.swap(TEXT, position, explained[0])
    readings = [reading for row in explained for reading in row.readings]
    records = explained.records()
    assert [(r["tokens"], r["reads_back"]) for r in records] == [
        (list(reading.tokens), reading.reads_back) for reading in readings
    ]
    other = sum(not reading.reads_back for reading in readings)
    page = explained.to_html()
    for reading in readings:
        assert f'data-tokens="{" ".join(map(str, reading.tokens))}"' in page
    assert page.count("gives other tokens") == other
    table = render(explained, colour=False, width=120)
    assert table.count("*") >= other + 1 and table.splitlines()[-1].startswith("* read again")


def test_json_of_earlier_versions_has_no_tokens(lens, explained):
    values = json.loads(explained.to_json())
    for row in values["rows"]:
        for reading in row["readings"]:
            del reading["tokens"], reading["reads_back"]
    row = Explanations.from_json(json.dumps(values))[-1]
    assert row.best.tokens is None and row.best.reads_back is None
    reread = lens.swap(TEXT, 2, row).best
    assert list(reread.tokens) == lens.model.tokenizer.encode(row.explanation)


def test_another_models_tokens_are_not_read(lenses):
    """Neither a text, which is read anew, nor a reading, which is refused."""
    one, other = lenses.values()
    row = one.swap(TEXT, 2, "the cat")
    assert other.as_read(row.explanation).tokens == other.as_read("the cat").tokens
    with pytest.raises(ValueError, match="another model wrote it"):
        other.encode(row)


@pytest.mark.parametrize(
    ("explanation", "message"),
    [
        ((), "empty list"),
        ([()], "token ids, not"),
        ("", "has no token"),
        ([3, 320], "0 to 319"),
        ([3] * 65, "more than the 64"),
        (["cat", 5], "token ids, not 5"),
    ],
)
def test_what_is_no_explanation(lenses, explanation, message):
    with pytest.raises(ValueError, match=message):
        lenses["byte_level"].encode(explanation)


# --- differences and edits ----------------------------------------------------------------------


def test_streams_and_decode_bring_their_tokens(lens):
    *_, last = pieces = list(lens.write(TEXT, 2, decoding="sample", seed=1))
    assert [len(piece.tokens) for piece in pieces] == [1, 2, 3, 4]
    own = lens.explain(TEXT, 2, decoding="sample", seed=1)[0].best
    assert (last.tokens, last.reads_back) == (own.tokens, own.reads_back)
    for text in lens.decode(lens.capture(TEXT, "all")):
        assert len(text.tokens) == TEXT_LEN and lens.as_read(text).tokens == text.tokens


def test_compare_reads_the_tokens_that_were_written(lens, oracle):
    found = lens.compare((TEXT, 1), (TEXT, -1))
    read = oracle(lens, found.a.tokens) - oracle(lens, found.b.tokens)
    difference = lens.capture(TEXT, 1) - lens.capture(TEXT, -1)
    cos = read @ difference / np.linalg.norm(read) / np.linalg.norm(difference)
    assert found.cos == pytest.approx(cos, abs=1e-4)


def test_an_edit_moves_by_the_edit_alone(lens, oracle):
    """Text against text, tokens against tokens; also where the two are not the same."""
    positions = range(len(lens.tokens(TEXT)))
    written = {p: lens.explain(TEXT, p)[0].best for p in positions}
    position = next(p for p in positions if not written[p].reads_back and written[p].text)
    activation, before = lens.capture(TEXT, position), written[position]
    tokenizer = lens.model.tokenizer

    def expected(new, old):
        return lens.swap(TEXT, position, activation + oracle(lens, new) - oracle(lens, old)).best

    found = lens.steer(TEXT, position, lambda words: words + " cat", new_tokens=1)
    assert (found.written.tokens, found.written.reads_back) == (before.tokens, False)
    assert list(found.edited.tokens) == tokenizer.encode(before.text + " cat")
    again = expected(found.edited.tokens, tokenizer.encode(before.text))
    assert found.effect.best.kl == pytest.approx(again.kl, rel=1e-2, abs=1e-5)
    (cat,) = ids_of(["cat"], tokenizer)
    found = lens.steer(TEXT, position, lambda words: [*words.tokens, cat], new_tokens=1)
    assert found.edited.tokens == (*before.tokens, cat)
    again = expected(found.edited.tokens, before.tokens)
    assert found.effect.best.kl == pytest.approx(again.kl, rel=1e-2, abs=1e-5)
    for nothing in (str(before.text), before, before.tokens, lambda words: words):
        with pytest.raises(ValueError, match="edit changes nothing"):
            lens.steer(TEXT, position, nothing)


# --- over HTTP ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(lens):
    pytest.importorskip("fastapi", reason="the server needs the extra 'explore'")
    testclient = pytest.importorskip("starlette.testclient", reason="needs httpx")
    from conlens_jax.explorer.server import make_app

    with testclient.TestClient(make_app(lens)) as client:
        yield client


def post(client, path, **body):
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer


def test_the_page_shows_and_swaps_what_was_written(lens, client):
    for seed in range(4):
        body = {"text": TEXT, "position": 2, "decoding": "sample", "seed": seed}
        lines = [json.loads(line) for line in post(client, "/api/explain", **body).iter_lines()]
        reading = lines[-1]["row"]["readings"][0]
        assert (reading["text"], reading["tokens"]) == (lines[-2]["text"], lines[-2]["tokens"])
        own = lens.explain(TEXT, 2, decoding="sample", seed=seed)[0].best
        assert (tuple(reading["tokens"]), reading["reads_back"]) == (own.tokens, own.reads_back)
        body = {"text": TEXT, "position": 2, "explanation": reading["text"]}
        again = post(client, "/api/swap", **body, tokens=reading["tokens"]).json()["row"]
        assert again == lines[-1]["row"]  # to the last digit
    edited = client.post("/api/swap", json={**body, "explanation": "cat", "tokens": [SPARE, 2]})
    assert edited.status_code == 400 and "was edited" in edited.json()["error"]
    row = post(client, "/api/swap", text=TEXT, position=2, explanation="cat").json()["row"]
    assert row == plain(lens.swap(TEXT, 2, "cat"))


def test_streamed_or_not_the_nla_api_has_the_same_numbers(lens, client):
    vectors = lens.capture(TEXT, "all")
    requests = {
        "explain": {"text": TEXT, "positions": [1, 2, -1]},
        "describe": {"activations": vectors.tolist()},
    }
    reads_back = []
    for path, body in requests.items():
        body |= {"temperature": 1.0}
        streamed = post(client, f"/nla/{path}", **body, stream=True).text.split("\n\n")[:-2]
        streamed = [json.loads(event.removeprefix("data: ")) for event in streamed]
        results = post(client, f"/nla/{path}", **body).json()["results"]
        assert [frame for frame in streamed if "description" in frame] == results
        for index, row in enumerate(results):
            vector = vectors[row.get("position", index)].tolist()
            reads_back.append(row["reads_back"])
            body = {"description": row["description"], "activation": vector}
            names = ("mse", "cosine_similarity", "description_tokens", "reads_back")
            scored = post(
                client, "/nla/score", **body, description_tokens=row["description_tokens"]
            )
            assert scored.json() == {name: row[name] for name in names}
            read = lens.encode(row["description_tokens"])
            cos = read @ vector / np.linalg.norm(read) / np.linalg.norm(vector)
            assert row["cosine_similarity"] == pytest.approx(cos, abs=1e-5)
            if row["description"].strip():  # an old client sends the text alone
                reread = post(client, "/nla/score", **body).json()
                assert reread["description_tokens"] == lens.model.tokenizer.encode(
                    row["description"]
                )
                same = reread["cosine_similarity"] == row["cosine_similarity"]
                assert same == row["reads_back"]
    assert not all(reads_back)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([5, 6], "was edited"), ([], "was edited"), ([-1, SPARE + 1], "was edited")],
)
def test_tokens_that_are_not_the_descriptions(lens, client, tokens, message):
    body = {"description": "cat", "description_tokens": tokens, "activation": [1.0] * 32}
    answer = client.post("/nla/score", json=body)
    assert answer.status_code == 400 and message in answer.json()["detail"]


def test_tokens_outside_the_model(client, lenses):
    for tokens in ([SPARE + 1], [-3], [2**70], []):
        body = {"description": "", "description_tokens": tokens, "activation": [1.0] * 32}
        answer = client.post("/nla/score", json=body)
        assert answer.status_code in (400, 422), answer.text


def test_written_is_a_str():
    written = Written("cat", [3], True)
    assert written == "cat" and hash(written) == hash("cat") and {written: 1}["cat"] == 1
