"""Whole texts while they are explained, batch by batch, for any number of readers.

A run belongs to the server, not to the request that began it: a second reader of the same text gets
what is done and then the rest, a page that is loaded again goes on where it was, and a text that is
finished is answered at once. A run whose last reader has left stops after its batch; asked for
again, it explains what is missing.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from conlens_jax.explorer.shown import shown_row
from conlens_jax.explorer.streams import failure
from conlens_jax.explorer.turns import Busy, Turns
from conlens_jax.inspection.explanations import Explanations
from conlens_jax.inspection.lens import Lens
from conlens_jax.inspection.readings import ExplainedToken
from conlens_jax.inspection.texts import token_indices, token_lists
from conlens_jax.models.generate import bucket

BATCH = 16
"""Tokens at once: each batch colours that many. Of larger ones a laptop makes no more a second."""
_BEAT_SECONDS = 0.5
"""How often a waiting reader is told what is going on."""
_RETRY_SECONDS = 0.2
MOST_TOKENS = 20_000
"""Of all texts in memory, explained or not; of more, the runs that were read longest ago go."""


class Asked(NamedTuple):
    """What is explained, and how.

    Attributes:
      lens: its number.
      text: the text, or the chat messages as JSON.
      chat: whether ``text`` is that of messages.
    """

    text: str
    decoding: str = "greedy"
    seed: int = 0
    lens: int = 0
    chat: bool = False

    @property
    def content(self) -> Any:
        """As :meth:`Lens.explain` takes it."""
        return json.loads(self.text) if self.chat else self.text


class TextRun:
    """One text, with the tokens that are explained so far.

    Attributes:
      tokens: all of them, printable.
      positions: those that are explained in the end.
      rows: position → explained token, of those that are done.
      state: ``"waiting"`` (for other requests), ``"compiling"``, ``"explaining"``, ``"stopped"`` or
        ``"done"``.
      kept: goes on without readers.
    """

    def __init__(self, tokens: Sequence[str], positions: Sequence[int], kept: bool = False):
        self.tokens, self.positions, self.kept = list(tokens), list(positions), kept
        self.rows: dict[int, ExplainedToken] = {}
        self.state, self.error = "stopped", ""
        self._changed = threading.Condition()
        self._order: list[int] = []  # positions as they were done
        self._readers, self._since = 0, time.monotonic()

    @property
    def missing(self) -> list[int]:
        return [position for position in self.positions if position not in self.rows]

    @property
    def wanted(self) -> bool:
        return self.kept or self._readers > 0

    def add(self, rows: Sequence[ExplainedToken]) -> None:
        with self._changed:
            self.rows |= {row.position: row for row in rows}
            self._order += [row.position for row in rows]
            self._changed.notify_all()

    def say(self, state: str, error: str = "") -> None:
        with self._changed:
            if state != self.state:
                self.state, self._since = state, time.monotonic()
            self.error = error
            self._changed.notify_all()

    def explanations(self, facts: dict[str, Any]) -> Explanations:
        rows = tuple(self.rows[position] for position in self.positions if position in self.rows)
        return Explanations(rows, (tuple(self.tokens),), facts)

    @property
    def over(self) -> bool:
        return self.state in ("done", "stopped")

    def enter(self) -> None:
        with self._changed:
            self._readers += 1

    def leave(self) -> None:
        with self._changed:
            self._readers -= 1

    def news(self) -> Iterator[dict[str, Any]]:
        """The tokens, then the rows as they are done, and in between what is going on."""
        yield {"tokens": self.tokens, "total": len(self.positions)}
        seen = 0
        while True:
            with self._changed:
                if len(self._order) == seen and not self.over:
                    self._changed.wait(_BEAT_SECONDS)
                rows = [self.rows[position] for position in self._order[seen:]]
                seconds = round(time.monotonic() - self._since, 1)
                about = {"state": self.state, "seconds": seconds, "done": len(self._order)}
                over, error = self.over, self.error
            seen += len(rows)
            if rows:
                about["rows"] = rows
            if error:
                about["error"] = error
            yield about
            if over and seen == len(self._order):
                return


class TextRuns:
    """All runs of a server.

    Args:
      turns: shared with the other users of the lenses.
    """

    def __init__(self, lenses: Sequence[Lens], turns: Turns):
        self.lenses, self.turns = lenses, turns
        self._runs: OrderedDict[Asked, TextRun] = OrderedDict()
        self._working: set[int] = set()
        self._lock = threading.Lock()
        self._compiled: set[tuple] = set()
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []

    def put(self, asked: Asked, explained: Explanations) -> None:
        """A run that was explained earlier."""
        run = self.run_of(asked, kept=True)
        if list(explained.documents[0]) == run.tokens:
            run.add(explained.rows)

    def run_of(self, asked: Asked, kept: bool = False) -> TextRun:
        """The run, begun if it is not going on.

        Raises:
          ValueError: an invalid text.
        """
        lens = self.lenses[asked.lens]
        with self._lock:
            run = self._runs.get(asked)
        if run is None:
            (ids,) = token_lists([asked.content], lens.model, lens.add_bos)
            positions = token_indices("all", ids, lens.model.tokenizer.bos_id)
            run = TextRun(lens.tokens(ids), positions)
        with self._lock:
            run = self._runs.setdefault(asked, run)
            self._runs.move_to_end(asked)
            self._forget()
            run.kept = run.kept or kept
        return run

    def begin(self, asked: Asked, run: TextRun) -> None:
        """Explains what is missing of the run in a thread of its own, unless one does."""
        with self._lock:
            if id(run) in self._working or self._closed.is_set():
                return
            if not run.missing:
                run.say("done")
                return
            self._working.add(id(run))
            run.say("waiting")
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            work = threading.Thread(target=self._work, args=(asked, run), name="text", daemon=True)
            self._threads.append(work)
            work.start()

    def news(self, asked: Asked, run: TextRun) -> Iterator[str]:
        """JSON lines for one reader."""
        lens = self.lenses[asked.lens]
        run.enter()
        try:
            self.begin(asked, run)
            for piece in run.news():
                if "rows" in piece:
                    rows = [shown_row(row, lens.calibration is not None) for row in piece["rows"]]
                    piece = {**piece, "rows": rows}
                yield json.dumps(piece, ensure_ascii=False) + "\n"
        finally:
            run.leave()

    def explain_whole(self, asked: Asked, run: TextRun) -> Explanations:
        """Everything, when it is done.

        Raises:
          ValueError: it could not be explained.
        """
        run.enter()
        try:
            self.begin(asked, run)
            for _ in run.news():
                pass
        finally:
            run.leave()
        if run.error:
            raise ValueError(run.error)
        lens = self.lenses[asked.lens]
        settings = {"decoding": asked.decoding, "samples": 1, "seed": asked.seed}
        return run.explanations({**lens.facts, **settings})

    def compile(self, asked: Asked, run: TextRun) -> None:
        """Compiles the programs for a text of this length, unless that is done.

        Raises:
          Busy: others have every place.
        """
        if self.is_compiled(asked, run):
            return
        lens, options = self.lenses[asked.lens], {"batch_size": BATCH, "whole": True}
        with self.turns.turn():
            next(lens.explain_in_batches(asked.content, run.positions[:1], **options), None)
            self._compiled.add(self._shape(asked, run))

    def close(self) -> None:
        """Stops every run after its batch."""
        self._closed.set()

    def join(self) -> None:
        """Waits for the batches that are being explained."""
        for thread in list(self._threads):
            thread.join()

    def is_compiled(self, asked: Asked, run: TextRun) -> bool:
        return self._shape(asked, run) in self._compiled

    def _shape(self, asked: Asked, run: TextRun) -> tuple:
        length = bucket(max(len(run.tokens), self.lenses[asked.lens].least_length))
        return asked.lens, asked.decoding, length

    def _work(self, asked: Asked, run: TextRun) -> None:
        while True:
            error = self._explain(asked, run)
            with self._lock:  # a reader who has come since finds the run begun, or begins it
                if run.missing and self._goes_on(run) and not error:
                    continue
                self._working.discard(id(run))
                run.say("stopped" if run.missing else "done", error)
                return

    def _goes_on(self, run: TextRun) -> bool:
        return run.wanted and not self._closed.is_set()

    def _explain(self, asked: Asked, run: TextRun) -> str:
        """Explains what is missing while somebody reads; returns why it failed, if it did."""
        options = {"decoding": asked.decoding, "seed": asked.seed, "batch_size": BATCH}
        try:
            lens = self.lenses[asked.lens]
            batches = lens.explain_in_batches(asked.content, run.missing, **options, whole=True)
            while self._goes_on(run) and self._next(asked, run, batches):
                pass
        except Exception as problem:
            return failure(problem)
        return ""

    def _next(self, asked: Asked, run: TextRun, batches: Iterator[list[ExplainedToken]]) -> bool:
        """One batch in one turn; whether there was one."""
        compiled = self.is_compiled(asked, run)
        run.say("compiling" if not compiled else "explaining" if run.rows else "waiting")
        try:
            with self.turns.turn():
                if not self._goes_on(run):  # the last reader has left in the meantime
                    return False
                run.say("explaining" if self.is_compiled(asked, run) else "compiling")
                batch = next(batches, None)
                self._compiled.add(self._shape(asked, run))
        except Busy:  # a run has begun: it waits for a place
            time.sleep(_RETRY_SECONDS)
            return True
        if batch is None:
            return False
        run.add(batch)
        return True

    def _forget(self) -> None:
        total = sum(len(run.tokens) for run in self._runs.values())
        for asked, run in list(self._runs.items())[:-1]:
            if total <= MOST_TOKENS:
                return
            if not run.wanted:
                total -= len(run.tokens)
                del self._runs[asked]
