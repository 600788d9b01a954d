"""What a server does before anybody asks: the example is explained, and its programs compile."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from conlens_jax.explorer.examples import keep_example, kept_example
from conlens_jax.explorer.text_runs import Asked, TextRuns
from conlens_jax.explorer.turns import Busy
from conlens_jax.files.paths import cache_folder, local_path
from conlens_jax.lens.saved import SHIPPED

_log = logging.getLogger(__name__)


class Warming:
    """Explains the example with every lens, in the background; a context of the server's run.

    An example that is kept from an earlier start is there at once.

    Args:
      example: the text; empty: there is nothing to do.
      names: of the lenses, in the order of ``runs.lenses``.
    """

    def __init__(self, runs: TextRuns, example: str, names: Sequence[str]):
        self.runs, self.names = runs, names
        lenses = range(len(runs.lenses)) if example else ()
        self.asked = [Asked(example, lens=number) for number in lenses]
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._warm, name="warming", daemon=True)
        for asked in self.asked:
            lens = runs.lenses[asked.lens]
            found = kept_example(lens, example, places_of(names[asked.lens]))
            if found is not None:
                runs.put(asked, found)

    def __enter__(self) -> Warming:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()
        self.runs.close()
        # Python must not end while XLA compiles in another thread.
        self._thread.join()
        self.runs.join()

    def _warm(self) -> None:
        try:
            for asked in self.asked:
                self._warm_lens(asked)
        except Exception as error:  # the page works without, and shows the same error
            _log.warning("the example could not be explained: %s", error)

    def _warm_lens(self, asked: Asked) -> None:
        run, lens = self.runs.run_of(asked, kept=True), self.runs.lenses[asked.lens]
        if run.missing:
            explained = self.runs.explain_whole(asked, run)
            if not run.missing:
                places = places_of(self.names[asked.lens], writing=True)
                keep_example(lens, asked.text, explained, places)
        for step in (lambda: self.runs.compile(asked, run), *self._edit(asked)):
            if self._closed.is_set():
                return
            try:
                step()
            except Busy:  # others compile it, then
                return

    def _edit(self, asked: Asked) -> list[Callable[[], None]]:
        """What an edit needs, in turns of its own."""
        lens = self.runs.lenses[asked.lens]
        text_T = [0] * lens.spec.text_len

        def with_turn(work: Callable[[], object]) -> None:
            with self.runs.turns.turn():
                work()

        vectors = np.ones((2, lens.spec.model.d_model), np.float32)
        swaps = [(-1, vector) for vector in vectors]
        return [
            lambda: with_turn(lambda: lens.encode([text_T, text_T])),
            lambda: with_turn(lambda: lens.swaps(asked.content, swaps)),
            lambda: with_turn(lambda: lens.alternatives(asked.content, -1, text_T)),
        ]


def places_of(name: str, writing: bool = False) -> list[Path]:
    """The folders that may have a lens's example; the last one is the cache.

    Args:
      writing: those where it may be written: not among the lenses of the package.
    """
    folders = [local_path(name), *([] if writing else [SHIPPED / name])]
    known = [folder for folder in folders if (folder / "config.json").is_file()]
    return [*known, cache_folder() / "examples"]
