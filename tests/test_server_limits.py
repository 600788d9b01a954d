"""A server among many, large, slow, vanishing and foreign clients."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest
from pipeline import quick_compilation
from servers import serving
from tiny_user import TEXT, tiny_user_lens

pytest.importorskip("fastapi", reason="the server needs the extra 'explore'")
pytest.importorskip("uvicorn", reason="the server needs the extra 'explore'")
testclient = pytest.importorskip("starlette.testclient", reason="needs httpx")

WORDS = "one two three four five six seven eight nine ten".split()
OWN = {"Host": "127.0.0.1"}


@pytest.fixture(scope="module")
def lens(tmp_path_factory):
    with quick_compilation(tmp_path_factory):
        yield tiny_user_lens(tmp_path_factory.mktemp("model"))


def quick_limits():
    from conlens_jax.explorer.server_limits import Limits

    return Limits(
        body_bytes=100_000,
        all_bodies_bytes=250_000,
        header_seconds=1.0,
        body_seconds=1.0,
        write_seconds=1.0,
        connections=64,
    )


@pytest.fixture(scope="module")
def address(lens):
    from conlens_jax.explorer.server import make_app

    hosts, limits = ("127.0.0.1",), quick_limits()
    app = make_app(lens, max_tokens=24, most_waiting=64, hosts=hosts, limits=limits)
    with serving(app, limits) as address:
        yield address


@contextlib.contextmanager
def connected(address):
    place = urlsplit(address)
    with socket.create_connection((place.hostname, place.port), timeout=30) as connection:
        yield connection


def head(path: str, *headers: str) -> bytes:
    lines = (f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json")
    return "\r\n".join([*lines, *headers, "", ""]).encode()


def asked(path: str, body: dict) -> bytes:
    content = json.dumps(body).encode()
    return head(path, "Connection: close", f"Content-Length: {len(content)}") + content


def rest(connection) -> bytes:
    """What comes until the server hangs up."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            found += piece
    return found


def answer(address, path: str, body: dict) -> tuple[int, str]:
    """(status, content, whatever it is wrapped in)."""
    with connected(address) as connection:
        connection.sendall(asked(path, body))
        found = rest(connection).decode()
    return int(found.split()[1]), found


def waited_for(status: int, ask) -> str:
    for _ in range(100):
        found, content = ask()
        if found == status:
            return content
        time.sleep(0.02)
    raise AssertionError(f"no {status}, but {found}")


# --- many at once -------------------------------------------------------------------------------


def test_fifty_at_once_each_get_their_own(lens, address):
    """Distinct texts and seeds; greedy and sampled, streamed and not, in both dialects."""
    texts = [f"the {WORDS[n % 10]} {WORDS[n // 10]} cat saw" for n in range(50)]

    def ask(number: int) -> bool:
        text, sample = texts[number], number % 2 == 1
        if number % 3 == 0:
            decoding = "sample" if sample else "greedy"
            body = {"text": text, "position": -1, "decoding": decoding, "seed": number}
            status, found = answer(address, "/api/explain", body)
            own = expected[number].readings[0]
            row = json.loads(found[found.index('{"row"') :].partition("\n")[0])["row"]
            reading = row["readings"][0]
            # Its numbers come from a pass of its own, over one text.
            same = (reading["text"], tuple(reading["tokens"])) == (own.text, own.tokens)
            same &= reading["kl"] == pytest.approx(own.kl, rel=1e-3, abs=1e-5)
            return status == 200 and same and row["token"] == expected[number].token
        body = {"text": text, "positions": [-1], "temperature": float(sample)}
        status, found = answer(address, "/nla/explain", {**body, "stream": number % 3 == 1})
        own = json.dumps(expected[number].explanation)
        return status == 200 and f'"description":{own}' in found.replace('": ', '":')

    expected = [
        lens.explain(
            text,
            -1,
            decoding="sample" if number % 2 else "greedy",
            seed=number if number % 3 == 0 else 0,
        )[0]
        for number, text in enumerate(texts)
    ]
    assert len({row.explanation for row in expected}) > 10  # or a mix-up would not show
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        assert all(pool.map(ask, range(50)))


def test_too_many_are_told_and_those_that_began_are_finished(lens):
    from conlens_jax.explorer.server import make_app

    body = {"text": TEXT, "position": 1}
    with serving(make_app(lens, most_waiting=4)) as address:
        with concurrent.futures.ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(lambda _: answer(address, "/api/explain", body), range(24)))
        statuses = {status for status, _ in answers}
        assert statuses == {200, 503}
        for status, found in answers:
            assert ('{"row"' in found) if status == 200 else ("retry-after: 1" in found.lower())
            assert status != 200 or '{"error"' not in found
        assert answer(address, "/api/explain", body)[0] == 200  # every place is free again


def test_turns_come_in_the_order_of_asking():
    """Who leaves and asks again at once stands behind those who wait."""
    from conlens_jax.explorer.turns import Turns

    turns, order, started = Turns(3), [], threading.Event()

    def long_one():
        for _ in range(5):
            with turns.turn():
                started.set()
                time.sleep(0.15)
                order.append("long")

    def short_one():
        with turns.turn():
            order.append("short")

    threads = [threading.Thread(target=long_one), threading.Thread(target=short_one)]
    threads[0].start()
    started.wait()
    threads[1].start()
    for thread in threads:
        thread.join()
    assert order.index("short") <= 2


def test_who_has_left_loses_turn_and_place():
    from conlens_jax.explorer.turns import Busy, Gone, Turns, calling

    turns, outcome = Turns(2), []

    def wait():
        with calling() as caller:
            callers.append(caller)
            try:
                with turns.turn():
                    outcome.append("turn")
            except Gone:
                outcome.append("gone")

    callers = []
    with turns.turn():
        thread = threading.Thread(target=wait)
        thread.start()
        while not callers:
            time.sleep(0.01)
        callers[0].gone.set()
        thread.join(10)
        assert outcome == ["gone"]
        with calling():
            turns.reserve()  # its place is free again
            with pytest.raises(Busy), calling():
                turns.reserve()
    with calling(), turns.turn():
        pass


# --- large --------------------------------------------------------------------------------------


def test_large_bodies_are_refused_while_they_come(address):
    with connected(address) as connection:  # it says so, and need not send it
        connection.sendall(head("/api/tokens", "Content-Length: 100000000"))
        found = connection.recv(65536)
    assert b" 413 " in found and b"at most 100000 bytes" in found
    with connected(address) as connection:  # it does not say so, and does not end
        connection.sendall(head("/api/tokens", "Transfer-Encoding: chunked"))
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        connection.sendall(2 * chunk)
        assert b" 413 " in connection.recv(65536)
        with pytest.raises(OSError):  # what follows is thrown away, for a while
            for _ in range(100):
                connection.sendall(chunk)
                time.sleep(0.05)


def test_all_bodies_together_are_limited(lens):
    """Three that wait for their last byte fill what there is; a fourth is told to come again."""
    from conlens_jax.explorer.server import make_app

    limits = quick_limits()
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(serving(make_app(lens, limits=limits), limits))
        for _ in range(3):
            connection = stack.enter_context(connected(address))
            connection.sendall(head("/api/tokens", "Content-Length: 90000") + b" " * 80_000)
        found = waited_for(503, lambda: answer(address, "/api/tokens", {"text": " " * 90_000}))
        assert "retry-after" in found.lower()
        # When the three have had their time, there is room again.
        waited_for(400, lambda: answer(address, "/api/tokens", {"text": "one " * 20_000}))


@pytest.mark.parametrize("path", ["/api/explain", "/nla/explain"])
@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"[" * 50_000, 400, "nested too deeply"),
        (b'{"text": NaN}', 400, "NaN is no JSON number"),
        (b'{"text": "one", "position": 1, "positions": [-Infinity]}', 400, "-Infinity"),
        (
            b'{"text": "one", "position": 1e999, "temperature": 1e999}',
            422,
            "finite number|less|valid integer",
        ),
        (b'{"text": "\\ud800", "position": 1}', 400, "half of a surrogate pair"),
        (b'{"te\\udfffxt": "one"}', 400, "half of a surrogate pair"),
        (b'{"text": "\xff", "position": 1}', 400, "no JSON"),
        (b'{"text": "\xed\xa0\x80", "position": 1}', 400, "no JSON"),  # a surrogate as UTF-8
        (b'{"text": 1' + b"0" * 5000 + b', "position": 1}', 400, "no JSON"),
        (b"{", 422, "JSON"),
        (b"", 422, "required"),
        (b"[]", 422, "dictionary"),
    ],
)
def test_bodies_that_are_no_request(lens, path, content, status, message):
    import re

    from conlens_jax.explorer.server import make_app

    with testclient.TestClient(make_app(lens)) as client:
        found = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert found.status_code == status, found.text
    problem = json.dumps(found.json()["error" if "api" in path else "detail"])
    assert re.search(message, problem, re.IGNORECASE) and len(problem) < 1000


# --- slow, and gone -----------------------------------------------------------------------------


def test_slow_heads_and_bodies_end_and_block_no_one(address):
    with contextlib.ExitStack() as stack:
        heads = [stack.enter_context(connected(address)) for _ in range(20)]
        bodies = [stack.enter_context(connected(address)) for _ in range(20)]
        for connection in heads:
            connection.sendall(b"POST /api/tokens HTTP/1.1\r\nHost: 127")
        for connection in bodies:
            connection.sendall(head("/api/tokens", "Content-Length: 100") + b"{")
        began = time.monotonic()
        assert answer(address, "/api/tokens", {"text": TEXT})[0] == 200
        assert time.monotonic() - began < 0.9
        assert all(rest(connection) == b"" for connection in heads)
        assert all(b" 408 " in rest(connection) for connection in bodies)


def test_no_more_connections_than_there_may_be(address):
    with contextlib.ExitStack() as stack:
        many = [stack.enter_context(connected(address)) for _ in range(70)]
        found = [rest(connection) for connection in many]
    assert sum(b" 503 " in one for one in found) == 6
    assert answer(address, "/api/tokens", {"text": TEXT})[0] == 200


def test_a_reader_that_does_not_read_is_left():
    """The server's buffer stays bounded: the stream waits for the reader, then ends."""
    from starlette.applications import Starlette
    from starlette.routing import Route

    from conlens_jax.explorer.streams import ClosedStream

    sent, ended = [], threading.Event()

    def pieces():
        try:
            for _ in range(2000):
                sent.append(100_000)
                yield b"x" * 100_000
        finally:
            ended.set()

    app = Starlette(routes=[Route("/", lambda request: ClosedStream(pieces(), "text/plain"))])
    with serving(app, quick_limits()) as address, connected(address) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert ended.wait(20)  # nobody works for it any more
        assert sum(sent) < 50_000_000  # the system's buffers, not the process's


@pytest.mark.parametrize(
    ("path", "body", "whole"),
    [
        ("/api/explain", {"text": TEXT, "position": 2}, 5),
        ("/nla/explain", {"text": TEXT, "stream": True, "temperature": 0}, 44),
        ("/nla/explain", {"text": TEXT, "temperature": 0}, 44),
    ],
)
def test_who_hangs_up_is_not_worked_for(lens, address, path, body, whole, monkeypatch):
    """With a slowed lens, one text at a time: of all tokens only the first are written."""
    from conlens_jax.explorer import nla_api
    from conlens_jax.inspection.lens import Lens

    calls = []
    slow_token, slow_batch = Lens._written, Lens.explain

    def written(self, *arguments):
        for text in slow_token(self, *arguments):
            calls.append("token")
            time.sleep(0.1)
            yield text

    def explain(self, *arguments, **options):
        calls.append("batch")
        time.sleep(0.1)
        return slow_batch(self, *arguments, **options)

    monkeypatch.setattr(Lens, "_written", written)
    monkeypatch.setattr(Lens, "explain", explain)
    monkeypatch.setattr(nla_api, "_AT_ONCE", 1)
    with connected(address) as connection:
        connection.sendall(asked(path, body))
        while not calls:
            time.sleep(0.01)
    begun = 0
    while begun != len(calls):
        begun = len(calls)
        time.sleep(0.6)
    assert begun < whole
    assert answer(address, "/api/tokens", {"text": TEXT})[0] == 200


# --- other names, other sites -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "listens", "status"),
    [
        ("localhost:7860", "127.0.0.1", 200),
        ("127.0.0.1", "127.0.0.1", 200),
        ("[::1]:7860", "127.0.0.1", 200),
        ("LOCALHOST.", "127.0.0.1", 200),
        ("lens.example", "127.0.0.1", 200),  # allowed by name
        ("10.0.0.7:7860", "0.0.0.0", 200),
        ("10.0.0.7", "127.0.0.1", 421),
        ("evil.example", "127.0.0.1", 421),
        ("evil.example", "0.0.0.0", 421),
        ("localhost.evil.example", "127.0.0.1", 421),
        ("[::1", "127.0.0.1", 421),
        ("", "127.0.0.1", 421),
    ],
)
def test_which_names_are_served(lens, host, listens, status):
    from conlens_jax.explorer.server import make_app
    from conlens_jax.explorer.server_limits import served_hosts

    app = make_app(lens, hosts=served_hosts(listens, ["lens.example"]))
    with testclient.TestClient(app) as client:
        assert client.get("/api/lens", headers={"Host": host}).status_code == status


def test_pages_of_other_sites_may_not_ask(lens):
    from conlens_jax.explorer.server import make_app

    there, body = "https://there.example", {"text": TEXT}
    cross = {"Origin": there, "Access-Control-Request-Method": "POST"}
    with testclient.TestClient(make_app(lens), base_url="http://localhost:7860") as client:
        own = client.post("/api/tokens", json=body, headers={"Origin": "http://localhost:7860"})
        assert own.status_code == 200 and "access-control-allow-origin" not in own.headers
        for origin in (there, "null", "http://localhost:7861", "http://[::1", ""):
            for path in ("/api/tokens", "/nla/tokenize"):
                found = client.post(path, json=body, headers={"Origin": origin})
                assert found.status_code == 403 and "--allow_origins" in found.text
        assert client.options("/api/tokens", headers=cross).status_code == 403
    with testclient.TestClient(make_app(lens, origins=("*",))) as client:
        found = client.post("/nla/tokenize", json=body, headers={"Origin": there})
        assert found.headers["access-control-allow-origin"] == "*"
    with testclient.TestClient(make_app(lens, origins=(there,))) as client:
        assert client.options("/nla/score", headers=cross).status_code == 200
        found = client.post("/nla/tokenize", json=body, headers={"Origin": there})
        assert found.status_code == 200
        assert found.headers["access-control-allow-origin"] == there
        other = client.post("/nla/tokenize", json=body, headers={"Origin": "https://other.example"})
        assert other.status_code == 403


def test_the_pages_policy_lets_only_its_own_files_run(lens):
    from conlens_jax.explorer.server import make_app

    with testclient.TestClient(make_app(lens)) as client:
        page, facts = client.get("/"), client.get("/api/lens")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy
    assert "unsafe" not in policy and "<script>" not in page.text
    assert facts.headers["content-security-policy"].startswith("default-src 'none'")
    for answer in (page, facts):
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_what_fails_is_said_without_what_failed(lens, monkeypatch):
    from conlens_jax.explorer.server import make_app
    from conlens_jax.inspection.lens import Lens

    def fail(*arguments, **options):
        raise RuntimeError("secret")

    monkeypatch.setattr(Lens, "swap", fail)
    monkeypatch.setattr(Lens, "capture", fail)
    with testclient.TestClient(make_app(lens), raise_server_exceptions=False) as client:
        body = {"text": TEXT, "position": 1, "explanation": "one"}
        found = client.post("/api/swap", json=body)
        assert found.status_code == 500 and "RuntimeError" in found.json()["error"]
        assert "secret" not in found.text
        found = client.post("/nla/extract", json={"text": TEXT})
        assert found.status_code == 500 and "RuntimeError" in found.json()["detail"]


def test_a_stream_that_fails_says_so(lens, monkeypatch, caplog):
    from conlens_jax.explorer.server import make_app
    from conlens_jax.inspection.lens import Lens

    def fail(*arguments, **options):
        raise RuntimeError("secret")

    monkeypatch.setattr(Lens, "explain", fail)
    monkeypatch.setattr(Lens, "encode", fail)
    body = {"text": TEXT, "position": 1, "positions": [1], "temperature": 0, "stream": True}
    with testclient.TestClient(make_app(lens)) as client:
        last = [client.post(path, json=body).text for path in ("/api/explain", "/nla/explain")]
    for answer in last:
        problem = answer.strip().splitlines()[-1].removeprefix("data: ")
        assert "RuntimeError" in json.loads(problem)["error"] and "secret" not in answer
    assert "secret" in caplog.text
