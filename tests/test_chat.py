"""Chat templates: the same bytes as transformers writes, and errors that say where."""

from __future__ import annotations

import json

import pytest
from chat_templates import CHATS, TEMPLATES
from tiny_models import write_tokenizer

from conlens_jax.models.chat import render_chat

transformers = pytest.importorskip("transformers")

NAMES = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(tmp_path, 16)
    return tmp_path


def configure(folder, **settings):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_same_bytes(name, folder):
    configure(folder, chat_template=TEMPLATES[name], image_token="<image>")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    written = 0
    for title, chat in CHATS.items():
        for answer in (False, True):
            try:
                wanted = theirs.apply_chat_template(
                    chat, tokenize=False, add_generation_prompt=answer
                )
            except Exception as error:
                with pytest.raises(ValueError, match=r"tokenizer_config\.json, line \d+\)") as ours:
                    render_chat(chat, folder, answer=answer)
                assert str(error) in str(ours.value)
            else:
                assert render_chat(chat, folder, answer=answer).encode() == wanted.encode(), title
                written += 1
    assert written >= 4


def test_a_template_may_stand_in_several_files(folder):
    chat = CHATS["a question"]
    with pytest.raises(ValueError, match="has no chat template"):
        render_chat(chat, folder)
    read = lambda: render_chat(chat, folder)
    theirs = lambda: transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        chat, tokenize=False
    )
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "of a processor"}))
    assert read() == "of a processor"
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "one"}]
    configure(folder, chat_template=several)
    assert read() == theirs() == "one"
    configure(folder, chat_template=several[:1])
    with pytest.raises(ValueError, match="none named 'default': tool_use"):
        read()
    configure(folder, chat_template="a text")
    assert read() == theirs() == "a text"
    (folder / "chat_template.jinja").write_text("its own {{ bos_token }} é", encoding="utf-8")
    assert read() == theirs() == "its own <bos> é"


def test_special_tokens_of_an_older_folder(folder):
    config = {"chat_template": "{{ bos_token }}{{ eos_token }}{{ sep_token is defined }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    names = {"bos_token": {"content": "<bos>", "lstrip": False}, "eos_token": "<eos>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    chat = CHATS["a question"]
    found = render_chat(chat, folder)
    assert found == theirs.apply_chat_template(chat, tokenize=False) == "<bos><eos>False"


@pytest.mark.parametrize(
    ("template", "line", "reason"),
    [
        ("one\n{% if %}", 2, "Expected an expression"),
        ("one\ntwo\n{{ raise_exception('roles must alternate') }}", 3, "roles must alternate"),
        ("{% for m in messages %}\n{{ m.content + 1 }}{% endfor %}", 2, "can only concatenate"),
        ("\n\n\n{{ messages[0].content.name.first }}", 4, "has no attribute"),
        ("\n{{ messages | nothing }}", 2, "No filter named 'nothing'"),
        ("{{ 1 // 0 }}", 1, "by zero"),
        ("\n{{ range(10 ** 9) | list }}", 2, "Range too big"),
        ("\n{{ messages.append(1) }}", 2, "unsafe"),
        ("{% macro again() %}\n{{ again() }}{% endmacro %}{{ again() }}", 2, "recursion"),
    ],
)
def test_an_error_names_the_line_and_the_reason(template, line, reason, folder):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match="refuses the messages") as error:
        render_chat(CHATS["a question"], folder)
    assert f"chat_template.jinja, line {line})" in str(error.value)
    assert reason in str(error.value)


def test_a_break_outside_a_loop(folder):
    (folder / "chat_template.jinja").write_text("\n{% break %}")
    with pytest.raises(ValueError, match=r"jinja\) refuses the messages: 'break' outside loop$"):
        render_chat(CHATS["a question"], folder)


def test_a_damaged_file_is_named(folder):
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        render_chat(CHATS["a question"], folder)
