"""Chat messages rendered with the model's own template, as in its training.

The template runs in transformers' own environment: Jinja's sandbox with its additions (``tojson``
without escapes, ``strftime_now``, ``break``, ``{% generation %}``...), so that the text has the
same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conlens_jax.models.added_tokens import CONFIG_FILE, SPECIAL_FILE, named_tokens

_TEMPLATE_FILES = ("chat_template.jinja", CONFIG_FILE, "chat_template.json")
"""Files that may contain a template; the first one that does decides."""


def render_chat(messages: Sequence[Mapping], folder: Path, *, answer: bool = False) -> str:
    """The text that ``apply_chat_template`` of transformers returns for the folder.

    Args:
      answer: begin the model's answer after the messages.

    Raises:
      ValueError: the model has no template, or the template is wrong or refuses the messages; the
        message names its file, the line and the reason.
    """
    settings = {name: _json(folder / name) for name in (CONFIG_FILE, SPECIAL_FILE)}
    name, template = chat_template(folder)
    if template is None:
        raise ValueError(
            f"the model in {folder} has no chat template; give plain text instead of messages"
        )
    # Imported here: transformers takes half a second to import. It needs no torch for this.
    from transformers.utils.chat_template_utils import render_jinja_template

    # Templates expect an absent key, not one that is null.
    given = [{k: v for k, v in message.items() if v is not None} for message in messages]
    try:
        (text,), _ = render_jinja_template(
            conversations=[given],
            chat_template=template,
            add_generation_prompt=answer,
            **named_tokens(settings),
        )
    except Exception as error:  # a template is a program: it can fail in any way
        line, reason = _line(error), str(error) or type(error).__name__
        if isinstance(error, SyntaxError):  # in the Python code that Jinja makes of the template
            line, reason = None, error.msg
        raise ValueError(
            f"the model's chat template ({folder / name}{f', line {line}' if line else ''}) "
            f"refuses the messages: {reason}"
        ) from error
    return text


def chat_template(folder: Path) -> tuple[str, str | None]:
    """The name of the template's file, and the template; None if the model has none.

    Raises:
      ValueError: a file is not JSON, or has several templates and none named default.
    """
    for name in _TEMPLATE_FILES:
        file = folder / name
        if name.endswith(".jinja"):
            template = file.read_text(encoding="utf-8") if file.is_file() else None
        else:
            template = _default(_json(file).get("chat_template"), file)
        if template is not None:
            return name, template
    return "", None


def _default(template: Any, file: Path) -> str | None:
    """The template itself, or of several the one named default."""
    if template is None or isinstance(template, str):
        return template
    if isinstance(template, Sequence):
        template = {entry["name"]: entry["template"] for entry in template}
    if "default" not in template:
        raise ValueError(
            f"{file} has several chat templates and none named 'default': "
            f"{', '.join(sorted(template))}"
        )
    return template["default"]


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error


def _line(error: BaseException) -> int | None:
    """The line of the template at which it failed."""
    if isinstance(getattr(error, "lineno", None), int):  # it could not be parsed
        return error.lineno
    line, frame = None, error.__traceback__
    while frame:
        if frame.tb_frame.f_code.co_filename in ("<template>", "<unknown>"):
            line = frame.tb_lineno
        frame = frame.tb_next
    return line
