"""Loads the explorer's server with many, large, slow and disconnecting clients.

    python scripts/load_server.py --checkpoint=runs/quickstart

Starts ``python -m conlens_jax.explore`` on a free local port and prints a table: responses by
status, their latency, and the server's peak memory in each trial (Linux; the peak is reset between
trials). Number of requests and time are bounded.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HOST = "127.0.0.1"
WORDS = "the cat saw one red fox and two blue owl then a small dog ran home".split()
Answer = tuple[int, float]
"""Status (0: the connection ended without one) and seconds until the last byte."""


class Server:
    """The server process, and requests to it."""

    def __init__(self, process: subprocess.Popen, port: int, seconds: int):
        self.process, self.port, self.seconds = process, port, seconds

    def connect(self) -> socket.socket:
        return socket.create_connection((HOST, self.port), timeout=self.seconds)

    def ask(self, path: str, body: dict | None = None, **headers: str) -> Answer:
        content = b"" if body is None else json.dumps(body).encode()
        return self.send(
            "GET" if body is None else "POST", path, [content], len(content), **headers
        )

    def send(self, method: str, path: str, pieces, size: int | None, **headers: str) -> Answer:
        """``size`` None: chunked, without a Content-Length."""
        length = "Transfer-Encoding: chunked" if size is None else f"Content-Length: {size}"
        named = {"Host": HOST, "Content-Type": "application/json", "Connection": "close", **headers}
        lines = [f"{method} {path} HTTP/1.1", length, *(f"{n}: {v}" for n, v in named.items())]
        began, found = time.monotonic(), b""
        with self.connect() as connection, contextlib.suppress(OSError):
            connection.sendall("\r\n".join([*lines, "", ""]).encode())
            with contextlib.suppress(OSError):  # the response may come before all is sent
                for piece in pieces:
                    connection.sendall(piece)
            while piece := connection.recv(65536):
                found = found or piece
        status = int(found.split()[1]) if found.startswith(b"HTTP/") else 0
        return status, time.monotonic() - began

    def reset_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def memory(self, name: str) -> float:
        """MiB: ``VmHWM``, the peak, or ``VmRSS``, now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith(name))
        return int(line.split()[1]) / 1024


@contextlib.contextmanager
def served(checkpoint: str, seconds: int) -> Iterator[Server]:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "conlens_jax.explore", f"--checkpoint={checkpoint}"]
    process = subprocess.Popen([*command, f"--port={port}"], stdout=subprocess.DEVNULL)
    server = Server(process, port, seconds)
    try:
        for _ in range(10 * seconds):
            if process.poll() is not None:
                raise RuntimeError("the server ended; its message is above")
            with contextlib.suppress(OSError), server.connect():
                break
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        process.wait(30)


# --- trials -------------------------------------------------------------------------------------


def text_of(number: int) -> str:
    words = [WORDS[(number + 3 * n + n * number) % len(WORDS)] for n in range(8)]
    return " ".join(words)


def explain(server: Server, number: int) -> Answer:
    """Greedy and sampled; of the page, and over the hosted API, streamed and not."""
    if number % 2:
        decoding = "sample" if number % 4 == 1 else "greedy"
        body = {"text": text_of(number), "position": -1, "decoding": decoding, "seed": number}
        return server.ask("/api/explain", body)
    body = {"text": text_of(number), "temperature": float(number % 4 == 0)}
    return server.ask("/nla/explain", {**body, "positions": [-1], "stream": number % 8 < 4})


def at_once(server: Server, many: int, one: Callable[[Server, int], Answer]) -> list[Answer]:
    with concurrent.futures.ThreadPoolExecutor(many) as pool:
        return list(pool.map(lambda number: one(server, number), range(many)))


def large(server: Server, megabytes: int, *, chunked: bool) -> list[Answer]:
    piece = b" " * 2**20
    if chunked:
        pieces = (b"100000\r\n" + piece + b"\r\n" for _ in range(megabytes))
        return [server.send("POST", "/api/tokens", pieces, None)]
    pieces = (piece for _ in range(megabytes))
    return [server.send("POST", "/api/tokens", pieces, megabytes * 2**20)]


def as_large_as_may_be(server: Server, number: int) -> Answer:
    """The most that is read, and has to be parsed."""
    content = json.dumps({"text": "x" * 1_199_980}).encode()
    return server.send("POST", "/api/tokens", [content], len(content))


def beside_slow_ones(server: Server, many: int) -> list[Answer]:
    """Short requests, while others have sent part of a head or body, or do not read."""
    halves = (
        b"POST /api/tokens HTTP/1.1\r\nHost: 127",
        b"POST /api/tokens HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{",
    )
    with contextlib.ExitStack() as stack:
        for number in range(many):
            stack.enter_context(server.connect()).sendall(halves[number % 2])
        return [server.ask("/api/tokens", {"text": text_of(n)}) for n in range(20)]


def after_those_who_left(server: Server, many: int) -> list[Answer]:
    """An explanation after many clients have disconnected after their first byte."""

    def leave(server: Server, number: int) -> Answer:
        content = json.dumps({"text": text_of(number), "temperature": 0, "stream": True}).encode()
        head = f"POST /nla/explain HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        with server.connect() as connection:
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            return int(connection.recv(4096).split()[1]), 0.0

    at_once(server, many, leave)
    began = time.monotonic()
    while (answer := explain(server, 1))[0] in (429, 503) and time.monotonic() - began < 60:
        time.sleep(0.05)
    return [(answer[0], time.monotonic() - began)]


def foreign(server: Server) -> list[Answer]:
    return [
        server.ask("/api/lens", Host="evil.example"),
        server.ask("/api/tokens", {"text": "one"}, Origin="https://evil.example"),
    ]


def bounded(most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not 1 <= (value := int(text)) <= most:
            raise argparse.ArgumentTypeError(f"{value} must be 1 to {most}")
        return value

    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="what the server serves")
    parser.add_argument("--at-once", type=bounded(200), default=50, help="requests at once")
    parser.add_argument("--megabytes", type=bounded(500), default=100, help="of the large body")
    parser.add_argument("--seconds", type=bounded(600), default=120, help="to wait for an answer")
    flags = parser.parse_args()
    many, size = flags.at_once, flags.megabytes
    trials: dict[str, Callable[[Server], list[Answer]]] = {
        "first explanations, compiled": lambda s: [explain(s, n) for n in range(8)],
        "explanations, one after the other": lambda s: [explain(s, n) for n in range(20)],
        f"{many} explanations at once": lambda s: at_once(s, many, explain),
        f"the same {many} again": lambda s: at_once(s, many, explain),
        f"{many} bodies of 1.2 MB at once": lambda s: at_once(s, many, as_large_as_may_be),
        f"a body of {size} MiB": lambda s: large(s, size, chunked=False),
        f"a body of {size} MiB in chunks": lambda s: large(s, size, chunked=True),
        f"20 short requests with {many} slow clients": lambda s: beside_slow_ones(s, many),
        f"one after {many} disconnected": lambda s: after_those_who_left(s, many),
        "another Host; another Origin": foreign,
    }
    print(
        "| trial | responses | latency, median / longest | server's peak memory |\n"
        "|---|---|---|---|"
    )
    with served(flags.checkpoint, flags.seconds) as server:
        print(f"| before any request | | | {server.memory('VmHWM'):.0f} MiB |", flush=True)
        for name, trial in trials.items():
            server.reset_peak()
            before, answers = server.memory("VmRSS"), trial(server)
            counts = collections.Counter(status for status, _ in answers)
            shown = ", ".join(f"{count} × {status}" for status, count in sorted(counts.items()))
            seconds = [second for _, second in answers]
            middle, longest = statistics.median(seconds), max(seconds)
            peak = server.memory("VmHWM")
            memory = f"{peak:.0f} MiB ({peak - before:+.0f})"
            print(f"| {name} | {shown} | {middle:.3f} / {longest:.3f} s | {memory} |", flush=True)


if __name__ == "__main__":
    main()
