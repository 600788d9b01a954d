"""A document whose tokens are coloured by a value, with a text for each on hover, focus or tap.

No script: the text of a token is in the page and is shown by the style sheet, in a panel at the
bottom of the window, where it fits on a phone too.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Sequence

STEPS = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Where the next colour begins, in nats."""


@dataclasses.dataclass(frozen=True)
class HeatToken:
    """A token of the document; ``value`` is None where nothing was measured, ``tip`` the text that
    is shown for it."""

    token: str
    value: float | None = None
    tip: str = ""

    @property
    def colour(self) -> int | None:
        """How many of :data:`STEPS` the value has reached; None where nothing was measured."""
        if self.value is None or not math.isfinite(self.value):
            return None
        return bisect.bisect_right(STEPS, self.value)


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """``unit`` is that of the values; ``spaced`` is for tokens that are words without spaces of
    their own."""

    title: str
    note: str
    unit: str
    tokens: Sequence[HeatToken]
    spaced: bool = False
