"""Corpora as jsonl: the paragraphs of text files."""

from __future__ import annotations

import json

import pytest
from test_benchmark_step import script


def test_paragraphs_of_text_files(tmp_path, monkeypatch, capsys):
    writer = script("write_corpus")
    long = "  a licence " * 30 + "\n   of two lines"
    (tmp_path / "a.txt").write_text(f"Title\n\n{long}\n \n{long}\n\nshort", encoding="utf-8")
    (tmp_path / "b.txt").write_text("b" * writer.LEAST_LETTERS, encoding="utf-8")
    (tmp_path / "c.txt").symlink_to(tmp_path / "b.txt")
    out = tmp_path / "out" / "corpus.jsonl"
    monkeypatch.setattr("sys.argv", ["", f"--paragraphs={tmp_path}/*.txt", f"--out={out}"])
    writer.main()
    found = [json.loads(line)["text"] for line in out.read_text(encoding="utf-8").splitlines()]
    assert found == ["a licence " * 30 + "\n of two lines", "b" * writer.LEAST_LETTERS]
    monkeypatch.setattr("sys.argv", ["", f"--paragraphs={tmp_path}/*.md", "--out=x"])
    with pytest.raises(SystemExit):
        writer.main()
    assert "no file there has a paragraph" in capsys.readouterr().err


def test_docstrings_of_installed_packages(tmp_path, monkeypatch):
    """Parsed, not imported: this one cannot be."""
    writer = script("write_corpus")
    long, other = "what it does " * 30, "how it ends " * 30
    package = tmp_path / "documented"
    (package / "part").mkdir(parents=True)
    (package / "__init__.py").write_text(f'"""{long}"""\nraise RuntimeError\n', encoding="utf-8")
    code = (
        f'def f():\n    """{long}"""\n\ndef g():\n    """short"""\n\ndef h():\n    """{other}"""\n'
    )
    (package / "part" / "code.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "corpus.jsonl"
    monkeypatch.setattr("sys.argv", ["", "--packages=documented", f"--out={out}"])
    writer.main()
    found = [json.loads(line)["text"] for line in out.read_text(encoding="utf-8").splitlines()]
    assert found == [long.strip(), other.strip()]
    monkeypatch.setattr("sys.argv", ["", "--packages=documented,absent", "--out=x"])
    with pytest.raises(SystemExit, match="'absent' is no installed package"):
        writer.main()
