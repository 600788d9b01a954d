"""Text for the report: escaping, and numbers that are short, comparable and safe."""

from __future__ import annotations

import html
import importlib.resources
import math
import re
from collections.abc import Callable, Sequence

import jinja2
from markupsafe import Markup

from conlens_jax.evaluation.words import NO_SUPPORT, Word, level, note_of
from conlens_jax.measurement.bootstrap import Interval
from conlens_jax.models.written import Written

_TEMPLATES = importlib.resources.files(__package__).joinpath("templates")
BASE_CSS = _TEMPLATES.joinpath("base.css").read_text("utf-8")
"""Type and colours, light and dark, of the report and of the explorer."""

WORDS_CSS = _TEMPLATES.joinpath("words.css").read_text("utf-8")
WORDS_JS = _TEMPLATES.joinpath("words.js").read_text("utf-8")
"""How words with a support are shown and hidden, on every page."""

# Not allowed in HTML text, or not encodable as UTF-8 (lone surrogates): tokens of a byte-level
# vocabulary can contain any of them.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def printable(text: object) -> str:
    """Any text, with U+FFFD for each character that a page cannot contain. Not escaped."""
    return _FORBIDDEN.sub("\ufffd", str(text))


def escape(text: object) -> str:
    """Any text, safe as HTML content and inside a quoted attribute."""
    return html.escape(printable(text), quote=True)


def token_marks(text: str) -> tuple[str, str]:
    """The tokens of a written text as an attribute ``data-tokens="5 17"`` of its element, and a
    note after it where the text, tokenised again, gives others. Empty for any other text."""
    if not isinstance(text, Written):
        return "", ""
    attribute = f' data-tokens="{" ".join(map(str, text.tokens))}"'
    note = "(read again, this gives other tokens; the numbers are of those written)"
    return attribute, "" if text.reads_back else f" <small>{note}</small>"


def show_words(words: Sequence[Word], calibrated: bool, warned: bool = False) -> str:
    """The words of a text, those with a number as elements that show it on hover, focus and tap.
    Escaped.

    Args:
      calibrated, warned: see :func:`~conlens_jax.evaluation.words.note_of`.
    """
    return "".join(escape(word.space) + _show_word(word, calibrated, warned) for word in words)


def _show_word(word: Word, calibrated: bool, warned: bool) -> str:
    text, value = escape(word.text), word.value(calibrated)
    if value is None:
        return text
    kind = f"word {level(value)}".strip()
    note = escape(note_of(value, calibrated, warned))
    return (
        f'<span class="{kind}" tabindex="0" role="note" data-value="{value:.4f}" '
        f'data-note="{note}" title="{note}" aria-label="{text}, {note}">{text}</span>'
    )


def show_token(token: str) -> str:
    """A token with its white space made visible where there is nothing else to see. Escaped."""
    if not token.strip():
        token = token.replace(" ", "␣").replace("\t", "⇥") or "∅"
    return escape(token.replace("\r", "").replace("\n", "⏎"))


def show_name(name: str) -> str:
    """The name of a metric; a line may break after an underscore. Escaped."""
    return escape(name).replace("_", "_<wbr>")


def _decimals(magnitude: float) -> int:
    """Decimals for three or four significant digits; −1 for scientific notation."""
    if magnitude == 0:
        return 0
    if magnitude < 5e-4 or magnitude >= 1e6:
        return -1
    return 3 if magnitude < 10 else 2 if magnitude < 100 else 1 if magnitude < 1000 else 0


def _with_decimals(value: float, decimals: int) -> str:
    if math.isnan(value):
        return "n/a"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if decimals < 0 and value != 0:
        mantissa, exponent = f"{value:.1e}".split("e")
        shown = f"{mantissa}e{int(exponent)}"
    else:
        shown = f"{value:,.{max(decimals, 0)}f}"
        if float(shown.replace(",", "")) == 0:
            shown = shown.removeprefix("-")
    return shown.replace("-", "−")


def format_number(value: float) -> str:
    """A number for people: ``0.623``, ``12.40``, ``3.2e−5``, ``n/a`` for NaN."""
    return _with_decimals(value, _decimals(abs(value) if math.isfinite(value) else 0.0))


def format_interval(interval: Interval) -> tuple[str, str]:
    """Value and ``"lo to hi"`` with equal decimals: ``"lo or more"`` where there is no upper end,
    empty without an interval."""
    ends = (interval.lo, interval.hi)
    finite = [abs(x) for x in (interval.value, *ends) if math.isfinite(x)]
    decimals = _decimals(max(finite, default=0.0))
    value = _with_decimals(interval.value, decimals)
    if not math.isfinite(interval.lo):
        return value, ""
    if not math.isfinite(interval.hi):
        return value, f"{_with_decimals(interval.lo, decimals)} or more"
    return value, " to ".join(_with_decimals(end, decimals) for end in ends)


def template_environment(package: str) -> jinja2.Environment:
    """The templates of a package, for HTML: what they show is escaped and made printable."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": format_number,
        "name": as_markup(show_name),
        "token": as_markup(show_token),
        "words": as_markup(show_words),
        "token_marks": lambda text: tuple(map(Markup, token_marks(text))),
    }
    environment.globals |= {
        "words_css": Markup(WORDS_CSS),
        "words_js": Markup(WORDS_JS),
        "no_support": NO_SUPPORT,
    }
    return environment


def _finalize(value: object) -> object:
    """What a template shows, before it is escaped: markup as it is, anything else printable."""
    return value if hasattr(value, "__html__") else printable(value)


def as_markup(function: Callable[..., str]) -> Callable[..., Markup]:
    """A filter from a function that returns markup, its text escaped."""
    return lambda *arguments: Markup(function(*arguments))
