"""Texts and folders as they are found: read right, or refused by file, line or row, and reason."""

from __future__ import annotations

import glob
import gzip
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from conlens_jax import explain
from conlens_jax.config import ConfigError, CorpusConfig, ExperimentConfig, with_changes
from conlens_jax.corpora.corpus import CorpusError
from conlens_jax.corpora.file_search import find_files
from conlens_jax.corpora.opening import open_corpus
from conlens_jax.inspection.texts import token_lists
from conlens_jax.models.tokenizer import train_bpe_tokenizer


def opened(kind, path, **changes):
    return open_corpus(CorpusConfig(kind=kind, path=str(path), validation_fraction=1e-9, **changes))


def read(kind, path, **changes):
    return [document.text for document in opened(kind, path, **changes).documents("train")]


def refused(kind, path, *parts, **changes):
    """What reading says; it must hold all the parts."""
    with pytest.raises(CorpusError) as caught:
        read(kind, path, **changes)
    for part in parts:
        assert part in str(caught.value)
    return str(caught.value)


def rows(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


# --- text that is not valid Unicode -------------------------------------------------------------


def test_half_a_surrogate_pair(tmp_path):
    # A whole pair is a character; half of one is what an emoji becomes when it is cut.
    (tmp_path / "a.jsonl").write_text(rows("one", "a \U0001f600 b") + '{"text": "cut \\ud83d"}\n')
    refused("jsonl", tmp_path, "a.jsonl, line 3", "\\ud83d", "character 5", "encoding_errors")
    texts = read("jsonl", tmp_path, encoding_errors="replace")
    assert texts == ["one", "a \U0001f600 b", "cut \ufffd"]
    tokenizer = train_bpe_tokenizer(texts, 300)
    assert tokenizer.decode(tokenizer.encode(texts[2])) == texts[2]


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.zst"])
def test_a_byte_that_is_not_utf8(suffix, tmp_path):
    text = "".join(f"paragraph {i}\n\n" for i in range(3000)).encode()
    text += b"caf\xe9\n\n" + b"and more\n\n" * 3000
    write(tmp_path / f"a{suffix}", text)
    refused("text", tmp_path, f"a{suffix}, line 6001", "byte 4, 0xe9", "encoding_errors")
    texts = read("text", tmp_path, encoding_errors="replace")
    assert texts[2999:3002] == ["paragraph 2999", "caf\ufffd", "and more"]


def write(file, content):
    if file.suffix == ".gz":
        content = gzip.compress(content)
    elif file.suffix == ".zst":
        with pyarrow.output_stream(file, compression="zstd") as stream:
            stream.write(content)
        return
    file.write_bytes(content)


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_a_parquet_row_that_is_not_utf8(kind, tmp_path):
    values = [b"one", None, b"caf\xc3\xa9", b"bad \xff", b"five"]
    offsets = [0, 3, 3, 8, 13, 17]
    wide = kind == "large_string"
    buffers = [
        pyarrow.py_buffer(bytes([0b11101])),
        pyarrow.py_buffer(b"".join(i.to_bytes(8 if wide else 4, "little") for i in offsets)),
        pyarrow.py_buffer(b"".join(value or b"" for value in values)),
    ]
    column = pyarrow.Array.from_buffers(
        pyarrow.large_string() if wide else pyarrow.string(), len(values), buffers
    )
    column = pyarrow.chunked_array([["before"] * 1500, column], type=column.type)
    if kind == "dictionary":
        column = column.dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    refused("parquet", tmp_path, "a.parquet, row 1504", "byte 5, 0xff", "encoding_errors")
    texts = read("parquet", tmp_path, encoding_errors="replace")
    assert texts[1500:] == ["one", "caf\u00e9", "bad \ufffd", "five"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_another_encoding_is_named(kind, encoding, tmp_path):
    (tmp_path / "a").write_bytes(rows("one text").encode(encoding))
    message = refused(kind, tmp_path / "a", "UTF-16" if "16" in encoding else "UTF-", "iconv")
    # No replacement could make a text of it.
    assert refused(kind, tmp_path / "a", encoding_errors="replace") == message


def test_marks_nul_line_ends_and_files_without_a_last_one(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst\r\nline\r\n\r\nsecond \x00 nul\r\n \r\n")
    (tmp_path / "b.txt").write_bytes(b"\n\nthird")
    (tmp_path / "c.txt").write_bytes(b"")
    assert read("text", tmp_path) == ["first\nline", "second \x00 nul", "third"]
    two = "\ufeff" + rows("one").replace("\n", "\r\n") + "\ufeff" + rows("two")[:-1]
    (tmp_path / "a.jsonl").write_bytes(two.encode())
    assert read("jsonl", tmp_path) == ["one", "two"]


def test_the_choice_is_checked_and_old_names_stay():
    with pytest.raises(ConfigError, match="corpus.encoding_errors must be one of error, replace"):
        with_changes(ExperimentConfig(), {"corpus.encoding_errors": "ignore"})
    # Caches and embedded models from before the field are still those of the same settings.
    assert "encoding_errors" not in open_corpus(CorpusConfig()).description()
    replacing = open_corpus(CorpusConfig(encoding_errors="replace"))
    assert replacing.description()["encoding_errors"] == "replace"


# --- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", ["nested too deeply"]),
        ('{"n": ' + "7" * 5_000 + ', "text": "x"}', ["not valid JSON", "4300 digits"]),
        ('{"text": ["a", "list"]}', ["corpus.text_field='text' is list", "another column"]),
        ('{"text": true}', ["is bool"]),
        ('{"body": "x"}', ["no column corpus.text_field='text'", "the columns are body"]),
        ("text,label", ["not valid JSON", "CSV", "corpus.kind=huggingface"]),
        ('"only a text"', ["must be a JSON object, not str"]),
    ],
)
def test_rows_that_cannot_be_read(line, parts, tmp_path):
    (tmp_path / "a.jsonl").write_text(rows("first", None) + line + "\n")
    refused("jsonl", tmp_path, "a.jsonl, line 3", *parts)


def test_a_line_of_many_megabytes(tmp_path):
    text = "word " * 2_000_000
    (tmp_path / "a.jsonl").write_text(rows("first", text, "last"))
    assert list(map(len, read("jsonl", tmp_path))) == [5, 10_000_000, 4]


def test_parquet_columns_of_every_kind(tmp_path):
    texts = ["one", None, "two", "one"]
    columns = {
        "plain": pyarrow.array(texts),
        "large": pyarrow.array(texts, pyarrow.large_string()),
        "dictionary": pyarrow.array(texts).dictionary_encode(),
        "with.dot": pyarrow.array(texts),
        "nested": pyarrow.array([{"text": text} for text in texts]),
        "list": pyarrow.array([[text] for text in texts]),
        "bytes": pyarrow.array([b"one"] * 4),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    for field in ("plain", "large", "dictionary", "with.dot"):
        assert read("parquet", tmp_path, text_field=field) == ["one", "two", "one"]
    for field, held in (("nested", "struct<"), ("list", "list<"), ("bytes", "binary")):
        refused("parquet", tmp_path, f"text_field={field!r} is {held}", text_field=field)


def test_a_damaged_parquet_file(tmp_path):
    file = tmp_path / "a.parquet"
    texts = [f"{i:09d}" for i in range(50_000)]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), file, use_dictionary=False, data_page_size=10_000
    )
    content = bytearray(file.read_bytes())
    content[len(content) // 2 :][:4000] = b"\xff" * 4000
    middle = len(content) // 2
    file.write_bytes(content[:middle] + b"\xff" * 4000 + content[middle + 4000 :])
    refused("parquet", file, "a.parquet", "damaged")


# --- compressed files ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_compressed_files_beside_plain_ones(kind, tmp_path):
    suffix = ".txt" if kind == "text" else ".jsonl"
    content = lambda *texts: "\n\n".join(texts) if kind == "text" else rows(*texts)
    write(tmp_path / f"a{suffix}", content("one", "two").encode())
    write(tmp_path / f"b{suffix}.gz", content("three").encode())
    with (tmp_path / f"b{suffix}.gz").open("ab") as file:  # as cat makes one of two
        file.write(gzip.compress(("\n\n" + content("four")).encode()))
    write(tmp_path / f"c{suffix}.zst", b"\xef\xbb\xbf" + content("f\u00fcnf").encode())
    assert read(kind, tmp_path) == ["one", "two", "three", "four", "f\u00fcnf"]
    assert read(kind, tmp_path / f"c{suffix}.zst") == ["f\u00fcnf"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_broken_archive(suffix, tmp_path):
    file = tmp_path / f"a.txt{suffix}"
    write(file, os.urandom(50_000).hex().encode())
    file.write_bytes(file.read_bytes()[:-100])
    refused("text", tmp_path, f"a.txt{suffix} is damaged", "download it again")
    file.write_bytes(b"this was never packed")
    refused("text", tmp_path, f"a.txt{suffix} is damaged, or is not")


# --- folders ------------------------------------------------------------------------------------


def test_a_folder_of_mixed_kinds_names_what_is_not_read(tmp_path):
    (tmp_path / "a.jsonl").write_text(rows("one"))
    for name in ("b.csv", "c.jsonl.bz2", "d.JSONL", "e.md", ".hidden"):
        (tmp_path / name).write_text("x")
    (note,) = opened("jsonl", tmp_path).notes
    assert "4 other files (b.csv, c.jsonl.bz2, d.JSONL, …)" in note
    assert read("jsonl", tmp_path) == ["one"]
    assert opened("jsonl", tmp_path / "a.jsonl").notes == ()


@pytest.mark.parametrize("name", ["a[1].txt", "what?.txt", "all*.txt", "a[1]"])
def test_a_path_that_exists_is_no_glob(name, tmp_path):
    (tmp_path / "a1.txt").write_text("another")
    (tmp_path / "all1.txt").write_text("another")
    if name.endswith(".txt"):
        (tmp_path / name).write_text("this")
    else:
        (tmp_path / name).mkdir()
        (tmp_path / name / "in.txt").write_text("this")
    assert read("text", tmp_path / name) == ["this"]


def test_links_are_followed_and_not_in_circles(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    (data / "sub").mkdir(parents=True)
    other.mkdir()
    (data / "sub" / "a.txt").write_text("inside")
    (other / "b.txt").write_text("elsewhere")
    (data / "more").symlink_to(other)
    (data / "again").symlink_to(other)
    (data / "sub" / "up").symlink_to(tmp_path)
    (data / "round").symlink_to(data / "round")
    (other / "back").symlink_to(data)
    assert read("text", data) == ["elsewhere", "inside"]
    assert sorted(read("text", data / "**" / "*.txt")) == ["elsewhere", "inside"]
    refused("text", data / "round", "not a file or folder")


@pytest.mark.parametrize(
    "pattern",
    [
        "**/*.txt",
        "**",
        "d*/**/a.txt",
        "**/sub/**/*.txt",
        "**/[ab].t?t",
        ".h/**",
        "*/*.txt",
        "**/.*",
    ],
)
def test_a_glob_finds_what_glob_finds(pattern, tmp_path, monkeypatch):
    names = [
        "a.txt",
        "d1/a.txt",
        "d1/sub/b.txt",
        "d2/sub/x/a.txt",
        ".h/a.txt",
        "d2/.b.txt",
        "d.txt",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    expected = {Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file()}
    assert find_files(pattern, ".txt") == sorted(expected)


def test_pipes_are_left_alone(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    refused("text", tmp_path, "no *.txt")
    refused("text", tmp_path / "pipe.txt", "not a file or folder (a pipe", "write the texts")
    (tmp_path / "a.txt").write_text("a text")
    assert find_files(str(tmp_path), ".txt") == [tmp_path / "a.txt"]
    assert "pipe.txt" in opened("text", tmp_path).notes[0]


# --- Hugging Face datasets ----------------------------------------------------------------------


@pytest.fixture
def own_datasets_cache(tmp_path_factory, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(
        datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets"))
    )
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('{"text": "cut', ["a.jsonl, line 3", "not valid JSON", "fix"]),
        ('{"text": "cut \\ud83d"}', ["a.jsonl, line 3", "surrogate", "encoding_errors"]),
        ('{"text": ' + "[" * 100_000, ["a.jsonl, line 3", "nested too deeply"]),
    ],
)
def test_malformed_rows_of_a_dataset(line, parts, streaming, tmp_path, own_datasets_cache):
    (tmp_path / "a.jsonl").write_text(rows("first", "second") + line + "\n")
    refused("huggingface", tmp_path, *parts, streaming=streaming)


@pytest.mark.parametrize("streaming", [True, False])
def test_datasets_that_cannot_be_opened(streaming, tmp_path, own_datasets_cache, monkeypatch):
    folder = tmp_path / "script"
    folder.mkdir()
    (folder / "script.py").write_text("raise SystemExit")
    refused("huggingface", folder, "script.py", "never run", "parquet", streaming=streaming)
    (tmp_path / "a.jsonl").write_text(rows("one", "two"))
    refused("huggingface", tmp_path, "corpus.split='dev'", "splits", split="dev")
    refused("huggingface", tmp_path, "corpus.name='c'", "configurations", name="c")
    refused("huggingface", "no-body/nothing", "corpus.path='no-body/nothing'")


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (ConnectionError("Couldn't reach the Hub"), "hub cannot be reached"),
        (RuntimeError("Dataset 'x' is a gated dataset on the Hub"), "log in"),
        (ValueError("Config name is missing. Pick one of: en, de"), "corpus.name"),
        (KeyError("x"), "choose another dataset"),
    ],
)
def test_what_datasets_raises_comes_with_advice(error, advice, own_datasets_cache, monkeypatch):
    import datasets

    def load(*arguments, **named):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    refused("huggingface", "some/thing", "corpus.path='some/thing'", str(error), advice)


# --- explain --file -----------------------------------------------------------------------------


def test_the_text_of_a_file(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfonce upon\r\na time")
    assert explain.text_of(str(file)) == "once upon\na time"
    write(tmp_path / "a.txt.gz", "once \u00e9".encode())
    assert explain.text_of(str(tmp_path / "a.txt.gz")) == "once \u00e9"
    problems = {
        b"one\ncaf\xe9": "a.txt, line 2: not UTF-8 .byte 4, 0xe9",
        "once upon".encode("utf-16"): "is UTF-16",
        b" \n": "contains no text",
    }
    for content, message in problems.items():
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=f"--file.*{message}") as caught:
            explain.text_of(str(file))
        assert "corpus." not in str(caught.value)
    for path in (tmp_path, tmp_path / "nowhere.txt"):
        with pytest.raises(ConfigError, match="is not a file"):
            explain.text_of(str(path))


def test_the_text_of_a_pipe():
    ours, theirs = os.pipe()
    with os.fdopen(theirs, "wb") as stream:
        stream.write(b"\xef\xbb\xbfonce upon")
    try:
        assert explain.text_of(f"/dev/fd/{ours}") == "once upon"
    finally:
        os.close(ours)


@pytest.mark.parametrize(
    "text", ["cut \ud83d", [{"role": "user", "content": "cut \ud83d"}]], ids=["text", "chat"]
)
def test_half_a_character_is_no_text_for_a_lens(text):
    with pytest.raises(ValueError, match=r"character 5 of the text is '.ud83d'"):
        token_lists(text, None, add_bos=True)


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_a_relative_path_outlives_a_change_of_folder(tmp_path, monkeypatch, kind):
    (tmp_path / "texts").mkdir()
    content = "one\n\ntwo\n" if kind == "text" else '{"text": "one"}\n{"text": "two"}\n'
    (tmp_path / "texts" / ("a.txt" if kind == "text" else "a.jsonl")).write_text(content)
    monkeypatch.chdir(tmp_path)
    config = CorpusConfig(kind=kind, path="texts", validation_fraction=0.0)
    corpus = open_corpus(config)
    monkeypatch.chdir("/")
    assert [document.text for document in corpus.documents("train")] == ["one", "two"]
