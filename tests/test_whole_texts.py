"""Whole texts over HTTP, as batches are done, and experiments with one of their tokens."""

from __future__ import annotations

import concurrent.futures
import csv
import dataclasses
import io
import json

import entry_points
import numpy as np
import pytest
from pipeline import quick_compilation
from servers import serving
from test_explore import fetch
from tiny_user import TEXT, TEXTS, tiny_user_lens

from conlens_jax.inspection.explanations import Explanations
from conlens_jax.inspection.lens import Lens


@pytest.fixture(scope="module")
def lens(tmp_path_factory):
    with quick_compilation(tmp_path_factory):
        yield tiny_user_lens(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def address(lens):
    from conlens_jax.explorer.server import make_app

    with serving(make_app(lens, max_tokens=24, hosts=("127.0.0.1",))) as address:
        yield address


def whole(address, **body):
    status, content = fetch(f"{address}/api/text", body)
    assert status == 200, content
    head, *news = map(json.loads, content.splitlines())
    return head, news, [row for piece in news for row in piece.get("rows", [])]


@pytest.mark.parametrize("decoding", ["greedy", "sample"])
def test_a_whole_text_comes_in_batches(lens, address, decoding):
    head, news, rows = whole(address, text=TEXTS[1], decoding=decoding, seed=3)
    explained = lens.explain(TEXTS[1], decoding=decoding, seed=3)
    assert head == {"tokens": lens.tokens(TEXTS[1]), "total": len(explained)}
    assert news[-1]["state"] == "done" and news[-1]["done"] == len(explained)
    assert [row["position"] for row in rows] == [row.position for row in explained]
    for row, own in zip(rows, explained, strict=True):
        assert row["readings"][0]["text"] == own.explanation
        assert row["readings"][0]["kl"] == pytest.approx(own.best.kl, rel=1e-3, abs=1e-5)
        assert row["norm"] == pytest.approx(own.norm, rel=1e-4)
        assert (row["words"] is None) == (decoding == "sample")
    again = whole(address, text=TEXTS[1], decoding=decoding, seed=3)
    assert len(again[1]) == 1 and again[2] == rows, "what is known comes at once"


def test_a_run_without_readers_stops_and_goes_on(lens, monkeypatch):
    from conlens_jax.explorer import text_runs
    from conlens_jax.explorer.turns import Turns

    turns = Turns(8)
    runs, asked = text_runs.TextRuns([lens], turns), text_runs.Asked(TEXT)
    run = runs.run_of(asked)
    with turns.turn():  # others use the lens
        news = runs.news(asked, run)
        assert json.loads(next(news))["total"] == len(run.positions)
        assert json.loads(next(news))["state"] == "compiling"
        news.close()  # the reader leaves
    runs.join()
    assert run.state == "stopped" and run.missing == run.positions
    lines = [json.loads(line) for line in runs.news(asked, run)]
    assert lines[-1]["state"] == "done" and not run.missing and runs.run_of(asked) is run
    monkeypatch.setattr(text_runs, "MOST_TOKENS", 1)
    other = text_runs.Asked(TEXTS[1])
    unread = runs.run_of(other)
    assert runs.run_of(asked) is not run, "the oldest is forgotten"
    assert runs.run_of(other) is not unread, "and one that nobody waited for"


def test_an_example_is_explained_once_and_kept(lens, tmp_path, monkeypatch):
    from conlens_jax.explorer import examples, warming
    from conlens_jax.explorer.text_runs import TextRuns
    from conlens_jax.explorer.turns import Turns

    monkeypatch.setenv("CONLENS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "lens").mkdir()
    (tmp_path / "lens" / "config.json").write_text("{}")
    assert examples.example_text(lens) in examples.TEXTS

    def started(place):
        runs = TextRuns([lens], Turns(8))
        with warming.Warming(runs, TEXT, [str(place)]) as found:
            known = len(runs.run_of(found.asked[0]).rows)
            found._thread.join()
            assert not runs.run_of(found.asked[0]).missing
            assert runs.is_compiled(found.asked[0], runs.run_of(found.asked[0]))
        return known

    started(tmp_path / "lens")
    assert (tmp_path / "lens" / "example.json").is_file()
    assert started(tmp_path / "lens") == len(lens.explain(TEXT)), "it is there at once"
    started(tmp_path / "nowhere")
    assert len([*tmp_path.glob("cache/examples/*")]) == 1
    place = warming.places_of(str(tmp_path / "lens"))
    assert examples.kept_example(lens, TEXT, place) is not None
    other = dataclasses.replace(lens, facts={**lens.facts, "step": 8})
    assert examples.kept_example(other, TEXT, place) is None, "of another lens"
    (tmp_path / "lens" / "example.json").write_text("[]")
    assert examples.kept_example(lens, TEXT, [place[0], tmp_path]) is None


def test_the_page_is_there_while_the_lens_loads(lens, tmp_path):
    from conlens_jax.explorer import examples
    from conlens_jax.explorer.opening import Opening
    from conlens_jax.explorer.server import LIMITS, make_app

    (tmp_path / "config.json").write_text("{}")
    explained = lens.explain(TEXT)
    examples.keep_example(lens, TEXT, explained, [tmp_path, tmp_path / "cache"])
    opened = lambda text: Opening(str(tmp_path), text, LIMITS, ("127.0.0.1",), ())
    opening = opened("")
    with serving(opening) as address:
        assert fetch(address)[0] == 200 and fetch(f"{address}/static/app.js")[0] == 200
        facts = json.loads(fetch(f"{address}/api/lens")[1])
        assert facts["loading"] and facts["kept"]["text"] == TEXT
        shown = [row["readings"][0]["text"] for row in facts["kept"]["rows"]]
        assert shown == [row.explanation for row in explained]
        assert fetch(f"{address}/api/lens", Host="evil.example")[0] == 421
        with concurrent.futures.ThreadPoolExecutor() as pool:
            waiting = pool.submit(fetch, f"{address}/nla/tokenize", {"text": TEXT})
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.5)
            opening.ready(make_app(lens, hosts=("127.0.0.1",)))
            assert waiting.result()[0] == 200
        assert json.loads(fetch(f"{address}/api/lens")[1])["layer"] == lens.spec.layer
    with serving(opened(TEXTS[1])) as address:  # asked for another text
        assert json.loads(fetch(f"{address}/api/lens")[1])["kept"] is None


def test_a_lens_that_cannot_be_loaded_ends_the_server():
    with pytest.raises(ValueError, match="no-such-lens.* is neither a folder"):
        entry_points.run("conlens_jax.explore", ["--checkpoint=no-such-lens", "--port=0"])


def asked_for(address, path, **body):
    status, content = fetch(f"{address}/api/{path}", body)
    assert status == 200, content
    return json.loads(content)


def test_experiments_with_a_token(lens, address):
    place, best = {"text": TEXT, "position": 4}, lens.explain(TEXT, 4)[0].best
    places = asked_for(address, "alternatives", **place, tokens=best.tokens, count=3)["places"]
    own = lens.alternatives(TEXT, 4, best, 3)
    assert places == [[list(choice) for choice in row] for row in own]

    edited = [places[0][1][0], *best.tokens[1:]]
    found = asked_for(address, "edit", **place, written=best.tokens, tokens=edited)
    again = lens.swap(TEXT, 4, edited).best
    assert found["row"]["readings"][0]["kl"] == pytest.approx(again.kl, rel=1e-3, abs=1e-5)
    assert found["row"]["readings"][0]["tokens"] == edited
    moved = np.linalg.norm(lens.encode(edited) - lens.encode(best))
    assert found["moved"] == pytest.approx(moved, rel=1e-3)
    assert found["control"] != found["row"]
    typed = asked_for(address, "edit", **place, written=best.tokens, explanation="two red fox saw")
    assert typed["row"]["readings"][0]["text"] == "two red fox saw"

    more = {"written": best.tokens, "tokens": edited, "strength": 2.0, "new_tokens": 3}
    steered = asked_for(address, "steer", **place, **more)
    ids = lens.model.tokenizer.encode(TEXT, add_bos=True)[:5]
    own = lens.steer(ids, 4, edited, strength=2.0, new_tokens=3, written=best)
    continued = [own.before, own.after, own.after_control]
    assert [steered[n] for n in ("before", "after", "after_control")] == continued
    compared = asked_for(address, "compare", text=TEXT, positions=[4, 6])
    own = lens.compare((TEXT, 4), (TEXT, 6))
    assert compared["towards_a"] == own.towards_a and compared["cos"] == pytest.approx(own.cos)


def test_lenses_of_other_layers(lens):
    from conlens_jax.explorer.server import make_app

    other = dataclasses.replace(lens, facts={**lens.facts, "step": 8})
    with serving(make_app(lens, [other], names=["a", "b"], example=TEXT)) as address:
        facts = json.loads(fetch(f"{address}/api/lens")[1])
        assert [(each["name"], each["step"]) for each in facts["lenses"]] == [("a", 7), ("b", 8)]
        rows = asked_for(address, "layers", text=TEXT, position=4)["rows"]
        assert [row["lens"] for row in rows] == [0, 1]
        assert rows[0]["row"]["readings"][0]["text"] == lens.explain(TEXT, 4)[0].explanation
        status, content = fetch(f"{address}/api/text", {"text": TEXT, "lens": 2})
        assert status == 400 and "lenses 0 to 1" in json.loads(content)["error"]


def test_lenses_share_their_model(lens, tmp_path):
    from conlens_jax.explorer.lenses import load_lenses, with_model_of

    other = Lens.load(lens.save(tmp_path / "lens", include_model=True))
    shared = with_model_of(other, lens)
    for name, leaf in shared.frozen["original"].items():
        if name != "layers":
            assert leaf is lens.model.params[name] and leaf is not other.model.params[name]
    assert shared.trainable is other.trainable and shared.model.params is lens.model.params
    strange = dataclasses.replace(lens.model, weights_hash="another")
    assert with_model_of(other, dataclasses.replace(lens, model=strange)) is other
    (loaded,) = load_lenses([str(tmp_path / "lens")], "latest")
    assert loaded.least_length == lens.spec.model.max_positions  # fewer than 128


def test_files_of_a_text(lens, address):
    ask = lambda kind: fetch(f"{address}/api/export", {"text": TEXT, "format": kind})[1]
    explained, own = Explanations.from_json(ask("json")), lens.explain(TEXT)
    assert [row.explanation for row in explained] == [row.explanation for row in own]
    assert ask("html").startswith("<!doctype html>") and "://" not in ask("html")
    rows = list(csv.DictReader(io.StringIO(ask("csv"))))
    assert [int(row["position"]) for row in rows] == [row.position for row in own]
