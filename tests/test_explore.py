"""The explorer over HTTP: streams, edits, refusals, and requests at the same time."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import re
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from pipeline import quick_compilation
from servers import serving
from tiny_user import TEXT, TEXTS, tiny_user_lens

from conlens_jax.evaluation.support import Calibration

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
