"""The explorer over HTTP: streams, edits, refusals, and requests at the same time."""

from __future__ import annotations

import concurrent.futures
import csv
import dataclasses
import io
import json
import re
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import entry_points
import numpy as np
import pytest
from pipeline import quick_compilation
from servers import serving
from tiny_user import TEXT, TEXTS, tiny_user_lens

from conlens_jax.evaluation.support import Calibration
from conlens_jax.inspection.explanations import Explanations
from conlens_jax.inspection.lens import Lens

pytest.importorskip("fastapi", reason="the page needs the extra 'explore'")
pytest.importorskip("uvicorn", reason="the page needs the extra 'explore'")


@pytest.fixture(scope="module")
def lens(tmp_path_factory):
    with quick_compilation(tmp_path_factory):
        yield tiny_user_lens(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def address(lens):
    from conlens_jax.explorer.server import make_app

    with serving(make_app(lens, max_tokens=24, hosts=("127.0.0.1",))) as address:
        yield address


def fetch(address, body=None, **headers):
    """(status, content)."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(address, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def streamed(address, **body):
    status, content = fetch(f"{address}/api/explain", body)
    assert status == 200, content
    return [json.loads(line) for line in content.splitlines()]


def plain(row):
    return json.loads(json.dumps(dataclasses.asdict(row)))


def test_page_and_facts(lens, address):
    status, page = fetch(address)
    assert status == 200 and "<title>Consistency lens</title>" in page
    facts = json.loads(fetch(f"{address}/api/lens")[1])
    assert (facts["layer"], facts["text_len"]) == (lens.spec.layer, lens.spec.text_len)
    tokens = json.loads(fetch(f"{address}/api/tokens", {"text": TEXT})[1])["tokens"]
    assert tokens == lens.tokens(TEXT)


KINDS = {"css": "text/css", "js": "text/javascript", "html": "text/html"}


def test_the_files_of_the_page_and_what_they_may_do(address):
    from conlens_jax.explorer.page_files import page_files

    files = page_files()
    assert {"index.html", "app.js", "style.css", "base.css", "words.css", "words.js"} <= {*files}
    assert ".word.doubtful" in files["words.css"] and "export { hideBelow }" in files["words.js"]
    for name, content in files.items():
        plain = content.replace("http://www.w3.org/2000/svg", "")  # a name, not an address
        assert "://" not in plain, f"{name} must need nothing from elsewhere"
        with urllib.request.urlopen(f"{address}/static/{name}") as answer:
            assert answer.read().decode() == content
            assert answer.headers.get_content_type() == KINDS[name.rpartition(".")[2]]
            policy = answer.headers["Content-Security-Policy"]
            assert "script-src 'self'" in policy and "unsafe" not in policy
    used = re.findall(r'(?:href|src)="/static/([^"]+)"', files["index.html"])
    modules = [n for c in files.values() for n in re.findall(r' from "\./([^"]+)"', c)]
    assert used and {*used, *modules} <= {*files}
    assert not re.search(r"<script>|<style|\son\w+=|style=", files["index.html"])
    assert fetch(f"{address}/static/../server.py")[0] == 404
    assert json.loads(fetch(f"{address}/static/none.js")[1])["error"]


def test_a_wheel_has_the_files_of_the_page():
    from conlens_jax.explorer import page_files

    root = Path(page_files.__file__).parent
    project = tomllib.loads((root.parents[1] / "pyproject.toml").read_text("utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["conlens_jax.explorer"]
    packed = {file for pattern in patterns for file in root.glob(pattern)}
    assert {file for file in (root / "static").iterdir() if file.is_file()} <= packed


@pytest.mark.parametrize("decoding", ["greedy", "sample"])
def test_an_explanation_comes_as_it_is_written(lens, address, decoding):
    lines = streamed(address, text=TEXT, position=4, decoding=decoding, seed=2)
    written = list(lens.write(TEXT, 4, decoding=decoding, seed=2))
    assert [line["text"] for line in lines[:-1]] == written
    assert [tuple(line["tokens"]) for line in lines[:-1]] == [text.tokens for text in written]
    assert lines[-1]["row"] == plain(lens.swap(TEXT, 4, written[-1]))
    own, found = lens.explain(TEXT, 4, decoding=decoding, seed=2)[0].best, lines[-1]["row"]
    assert (found["readings"][0]["text"], tuple(found["readings"][0]["tokens"])) == (
        own.text,
        own.tokens,
    )
    assert found["readings"][0]["kl"] == pytest.approx(own.kl, rel=1e-3, abs=1e-5)


def test_the_last_line_has_the_words_with_their_support(lens, address):
    assert "no_support" in json.loads(fetch(f"{address}/api/lens")[1])
    assert streamed(address, text=TEXT, position=4, decoding="sample")[-1]["words"] is None
    (raw, *_) = streamed(address, text=TEXT, position=4)[-1]["words"]
    assert raw["support"] is None and raw["note"].startswith("the decoder's own probability 0.")
    from conlens_jax.explorer.server import make_app

    calibration = Calibration({"comma": None, "separator": None}, {"next": ((0, 0.1), (1, 0.99))})
    believed = dataclasses.replace(lens, calibration=calibration)
    with serving(make_app(believed)) as own:
        assert "no_support" not in json.loads(fetch(f"{own}/api/lens")[1])
        found = streamed(own, text=TEXT, position=4)[-1]["words"]
        reading = believed.explain(TEXT, 4)[0].best
        assert "".join(word["space"] + word["text"] for word in found) == reading.text
        supports = [word.support for word in reading.words]
        assert [word["support"] for word in found] == pytest.approx(supports, rel=1e-5)
        frame = json.loads(
            fetch(
                f"{own}/nla/explain",
                {
                    "text": TEXT,
                    "positions": [4],
                    "temperature": 0,
                },
            )[1]
        )["results"][0]
        assert [w["support"] for w in frame["words"]] == pytest.approx(supports, abs=1e-4)


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
    monkeypatch.setattr(text_runs, "MOST_ROWS", 1)
    runs.run_of(text_runs.Asked(TEXTS[1]))
    assert runs.run_of(asked) is not run, "the oldest is forgotten"


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


def test_an_edited_explanation_is_swapped_in(lens, address):
    body = {"text": TEXT, "position": 4, "explanation": "two red fox saw"}
    status, content = fetch(f"{address}/api/swap", body)
    assert status == 200
    assert json.loads(content)["row"] == plain(lens.swap(TEXT, 4, "two red fox saw"))


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("tokens", {"text": "one " * 40}, 413, "has 41 tokens; at most 24"),
        ("tokens", {"text": "x" * 100_001}, 413, "has 100001 characters"),
        ("tokens", {"txt": "one"}, 422, "text: Field required"),
        ("tokens", b"no json", 422, "JSON"),
        ("explain", {"text": TEXT, "position": 99}, 400, "position"),
        ("explain", {"text": TEXT, "position": 1, "decoding": "beam"}, 422, "decoding"),
        ("explain", {"text": TEXT, "position": True}, 422, "position"),
        ("explain", {"text": TEXT, "position": 3.5}, 422, "position"),
        ("explain", b'{"text": "one", "position": NaN}', 400, "NaN is no JSON number"),
        ("explain", b'{"text": "one", "position": 1, "seed": NaN}', 400, "NaN is no JSON number"),
        ("explain", {"text": TEXT, "position": 2**70}, 400, "position"),
        ("swap", {"text": TEXT, "position": [1], "explanation": "fox"}, 422, "position"),
        ("swap", {"text": TEXT, "position": 1, "explanation": "  "}, 400, "empty"),
        ("swap", {"text": TEXT, "position": 1, "explanation": "one " * 40}, 413, "at most 24"),
        ("text", {"text": "one " * 40}, 413, "has 41 tokens; at most 24"),
        ("text", {}, 400, "either text or messages"),
        ("text", {"messages": [{"role": "user", "content": "hi"}]}, 400, "no chat template"),
        ("claims", {"text": TEXT, "position": 1}, 400, "no calibration of claims"),
        ("claims", {"text": TEXT, "position": 1, "samples": 65}, 422, "samples"),
        ("export", {"text": TEXT, "format": "exe"}, 422, "format"),
        ("compare", {"text": TEXT, "positions": [1, 99]}, 400, "position"),
        ("edit", {"text": TEXT, "position": 1, "written": [5]}, 400, "tokens or explanation"),
        (
            "edit",
            {"text": TEXT, "position": 1, "written": [5], "tokens": [10**6]},
            400,
            "token ids",
        ),
        ("steer", {"text": TEXT, "position": 1, "written": [5], "strength": 1e9}, 422, "strength"),
    ],
)
def test_what_is_refused_and_why(address, path, body, status, message):
    code, content = fetch(f"{address}/api/{path}", body)
    assert code == status and message in json.loads(content)["error"]


def test_seeds_of_any_size(lens, address):
    texts = []
    for seed in (2**63, 2**64 + 7, -1, 7):
        body = dict(text=TEXT, position=4, decoding="sample")
        lines = streamed(address, **body, seed=seed)
        row = lens.explain(TEXT, 4, decoding="sample", seed=seed)[0]
        assert lines[-1]["row"] == plain(lens.swap(TEXT, 4, row.best))
        texts.append(row.explanation)
    assert len(set(texts)) > 2


def test_long_requests_are_refused_before_they_are_read(address):
    status, content = fetch(f"{address}/api/tokens", b"{}", **{"Content-Length": "2000000"})
    assert status == 413 and "at most 1200000 bytes" in json.loads(content)["error"]


def test_other_names_for_the_server_reach_nothing(address):
    status, content = fetch(f"{address}/api/lens", Host="evil.example")
    assert status == 421 and "--allow_hosts" in json.loads(content)["error"]


def test_requests_at_the_same_time_are_not_mixed(lens, address):
    places = [(text, position) for text in TEXTS for position in (1, 2, -1)]
    with concurrent.futures.ThreadPoolExecutor(len(places)) as pool:
        ask = lambda place: streamed(address, text=place[0], position=place[1])[-1]["row"]
        answers = list(pool.map(ask, places))
    expected = []
    for text, position in places:
        *_, written = lens.write(text, position)
        expected.append(plain(lens.swap(text, position, written)))
    assert answers == expected


def test_when_too_many_wait_the_next_one_is_told(lens):
    from conlens_jax.explorer.server import make_app
    from conlens_jax.explorer.turns import Busy, Turns

    turns = Turns(1)
    with turns.turn(), pytest.raises(Busy, match="too many"), turns.turn():
        pass
    with serving(make_app(lens, most_waiting=0)) as address:
        status, content = fetch(f"{address}/api/explain", {"text": TEXT, "position": 1})
        assert status == 503 and "try again" in json.loads(content)["error"]
