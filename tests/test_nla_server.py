"""The NLA API: its fields and frames as the public description has them, its numbers the lens's."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pipeline import quick_compilation
from tiny_user import TEXT, tiny_user_lens

pytest.importorskip("fastapi", reason="the server needs the extra 'explore'")
testclient = pytest.importorskip("starlette.testclient", reason="needs httpx")

# The keys of apps/nla/openapi.json and tests/test_frame_contract.py.
RESULT = {
    *("token", "token_id", "position", "l2_norm", "description", "mse", "cosine_similarity"),
    *("generated", "fragment_index", "fragment_count", "role", "section", "channel"),
    "message_index",
}
TOKEN = RESULT - {"l2_norm", "description", "mse", "cosine_similarity", "generated"}
# What a lens adds to every description; clients that do not know these fields leave them be.
OWN = {"description_tokens", "reads_back", "warnings", "words"}


@pytest.fixture(scope="module")
def lens(tmp_path_factory):
    with quick_compilation(tmp_path_factory):
        yield tiny_user_lens(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def client(lens):
    from conlens_jax.explorer.server import make_app

    with testclient.TestClient(make_app(lens, max_tokens=24)) as client:
        yield client


def ask(client, path: str, **body):
    answer = client.post(f"/nla/{path}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def frames(client, path: str, **body) -> list[dict]:
    """The events of a stream, without the last one, which says that it is over."""
    answer = client.post(f"/nla/{path}", json={**body, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def test_health_and_tokens(lens, client):
    health = client.get("/nla/").json()
    assert health["status"] == "ok" and health["reconstructor_available"]
    assert (health["d_model"], health["extraction_layer"]) == (32, lens.spec.layer)
    found = ask(client, "tokenize", text=TEXT)
    assert [entry["token"] for entry in found["tokens"]] == lens.tokens(TEXT)
    assert set(found["tokens"][0]) == TOKEN and found["text"] == TEXT
    assert found["prompt_length"] == len(lens.tokens(TEXT))


def test_explain_says_what_the_lens_says(lens, client):
    found = ask(client, "explain", text=TEXT, positions=[2, -1], temperature=0)
    assert found["layer_index"] == lens.spec.layer
    last = len(lens.tokens(TEXT)) - 1
    assert [row["position"] for row in found["results"]] == [last, 2]  # reverse is the default
    for row in found["results"]:
        assert set(row) == RESULT | OWN and row["generated"] is False
        own = lens.explain(TEXT, row["position"])[0]
        assert row["description"] == own.explanation and row["token"] == own.token
        assert row["description_tokens"] == list(own.best.tokens)
        assert row["reads_back"] == own.best.reads_back
        assert row["cosine_similarity"] == pytest.approx(own.best.cos, abs=1e-6)
        assert row["mse"] == pytest.approx(2 - 2 * own.best.cos, abs=1e-5)
        words = [(word["text"], word["support"]) for word in row["words"]]
        assert words == [(word.text, word.support) for word in own.best.words]
        found_p = [word["probability"] for word in row["words"]]
        np.testing.assert_allclose(found_p, [w.probability for w in own.best.words], atol=1e-4)
        assert row["warnings"] == list(own.warnings_of(own.best))
        norm = np.linalg.norm(lens.capture(TEXT, row["position"]))
        assert row["l2_norm"] == pytest.approx(norm, rel=1e-5)
    in_order = ask(client, "explain", text=TEXT, positions=[2, -1], temperature=0, reverse=False)
    assert in_order["results"] == found["results"][::-1]


def test_a_stream_of_explanations(lens, client):
    """At a temperature: frames of a text as it grows, then the result, which is the lens's."""
    first, *rest = frames(client, "explain", text="one red fox", positions=[1, 3], temperature=0.5)
    assert first == {"layer_index": lens.spec.layer, "total": 2, "prompt_length": 4}
    grown, results = rest[:-2], rest[-2:]
    assert all(set(frame) == {"position", "text", "done"} for frame in grown)
    for position, result in zip((3, 1), results, strict=True):
        texts = [frame["text"] for frame in grown if frame["position"] == position]
        assert set(result) == RESULT | OWN and result["description"] == texts[-1]
        assert len(texts) == lens.spec.text_len and result["position"] == position
        own = lens.explain("one red fox", position, decoding="sample", temperature=0.5)[0]
        assert result["description"] == own.explanation
    body = {"text": "one red fox", "positions": [1, 3], "temperature": 0.5}
    assert ask(client, "explain", **body)["results"] == results  # to the last digit
    assert results[0]["words"] is None  # of sampled texts
    whole = ask(client, "explain", text="two cat", temperature=0)  # every position, bos too
    assert [row["position"] for row in whole["results"]] == [2, 1, 0]


def test_activations_go_out_and_come_back(lens, client):
    tokens = ask(client, "extract", text=TEXT)["tokens"]
    assert set(tokens[0]) == {"token", "token_id", "position", "activation", "l2_norm"}
    vectors = [token["activation"] for token in tokens[2:4]]
    np.testing.assert_allclose(vectors, lens.capture(TEXT, [2, 3]), rtol=1e-6)
    described = ask(client, "describe", activations=vectors, temperature=0)["results"]
    assert [row["description"] for row in described] == lens.decode(np.array(vectors))
    for vector, row in zip(vectors, described, strict=True):
        body = {name: row[name] for name in ("description", "description_tokens")}
        scored = ask(client, "score", **body, activation=vector)
        assert set(row) == {"description", "warnings", "words", *scored}
        assert scored == {name: row[name] for name in scored}
        read = lens.encode(row["description_tokens"])
        cos = read @ vector / np.linalg.norm(read) / np.linalg.norm(vector)
        assert scored["cosine_similarity"] == pytest.approx(cos, abs=1e-6)
    streamed = frames(client, "describe", activations=vectors, temperature=0)
    assert [frame for frame in streamed if "description" in frame] == described
    assert set(streamed[0]) == {"index", "text", "done"}


def test_chats_are_rendered_by_the_models_template(lens, client):
    body = {"messages": [{"role": "user", "content": "two blue owl"}]}
    assert client.post("/nla/tokenize", json=body).status_code == 400  # no template yet
    file = lens.model.folder / "chat_template.jinja"
    template = "{% for m in messages %}the {{ m.content }}{% endfor %}"
    file.write_text(template + "{{ ' and' if add_generation_prompt }}")
    try:
        assert ask(client, "tokenize", **body)["text"] == "the two blue owl and"
        found = ask(client, "tokenize", **body, add_generation_prompt=False)
        assert found["text"] == "the two blue owl"
        last = ask(client, "explain", **body, positions=[-1], temperature=0)["results"][0]
        own = lens.explain("the two blue owl and", -1)[0]
        assert last["description"] == own.explanation
        # A template's error is the request's fault, with the line and the reason.
        file.write_text("{{ bos_token }}\n{{ raise_exception('no owls') }}")
        answer = client.post("/nla/explain", json=body)
        assert answer.status_code == 400
        assert "chat_template.jinja, line 2) refuses" in answer.json()["detail"]
        assert answer.json()["detail"].endswith("no owls")
        file.write_text("{% if %}")
        assert client.post("/nla/extract", json=body).status_code == 400
    finally:
        file.unlink()


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("explain", {"text": TEXT, "positions": [99]}, 400, "Position 99 out of range"),
        ("explain", {"text": "one " * 40}, 400, "41 tokens; at most 24"),
        ("explain", {"text": TEXT, "max_new_tokens": 1}, 400, "this lens writes"),
        ("explain", {"text": TEXT, "temperature": 9}, 422, "less than or equal to 5"),
        ("explain", {"text": TEXT, "enable_thinking": True}, 400, "not supported"),
        ("explain", {}, 400, "give text or messages"),
        ("describe", {"activations": [[1.0, 2.0]]}, 400, "activation length 2 != d_model 32"),
        ("describe", {"activations": []}, 422, "at least 1"),
        ("score", {"description": "fox", "activation": [0.0] * 32}, 400, "zero"),
        ("score", {"description": " ", "activation": [1.0] * 32}, 400, "empty"),
        ("score", {"description": "fox " * 100, "activation": [1.0] * 32}, 400, "more than the 64"),
    ],
)
def test_what_is_refused_and_why(client, path, body, status, message):
    answer = client.post(f"/nla/{path}", json=body)
    assert answer.status_code == status and message in json.dumps(answer.json()["detail"])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("explain", '{"text": "one", "positions": [true, false]}'),
        ("explain", '{"text": "one", "positions": [1.5]}'),
        ("explain", '{"text": "one", "positions": [NaN]}'),
        ("explain", '{"text": "one", "temperature": NaN}'),
        ("describe", '{"activations": [[NaN]], "temperature": Infinity}'),
        ("describe", f'{{"activations": [[{"1, " * 31}1e39]]}}'),
        ("score", f'{{"description": "fox", "activation": [{"1, " * 31}NaN]}}'),
        ("score", f'{{"description": "fox", "activation": [{"1, " * 31}1e400]}}'),
    ],
)
def test_numbers_that_are_none_are_refused(client, path, body):
    """Python reads NaN and Infinity in JSON, and cannot write them in an answer."""
    answer = client.post(f"/nla/{path}", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422) and answer.json()["detail"]


def test_when_too_many_wait_the_next_one_is_told(lens):
    from conlens_jax.explorer.server import make_app

    with testclient.TestClient(make_app(lens, most_waiting=0)) as client:
        answer = client.post("/nla/explain", json={"text": TEXT})
        assert answer.status_code == 429 and "try again" in answer.json()["detail"]
