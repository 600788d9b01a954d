"""Text from Hugging Face datasets: from the hub, or a local folder of data files."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conlens_jax.config import CorpusConfig
from conlens_jax.corpora.corpus import CorpusError, IndexedCorpus
from conlens_jax.corpora.file_search import files_below
from conlens_jax.corpora.text_files import JSONL_SUFFIXES, json_rows, parsed
from conlens_jax.corpora.text_lines import missing_column, open_bytes, valid_text

# Far fewer than pyarrow can read; rows with more are checked with Python's json.
_MANY_BRACKETS = 500


def open_huggingface(config: CorpusConfig) -> IndexedCorpus:
    """A dataset of the Hugging Face hub, or a local folder of data files that
    ``datasets.load_dataset`` accepts.

    Raises:
      CorpusError: the dataset, its split or the text column does not exist.
    """
    _refuse_deep_rows(config)
    datasets = {"train": _load(config, config.split, "corpus.split")}
    if config.validation_split:
        datasets["validation"] = _load(config, config.validation_split, "corpus.validation_split")
    else:
        datasets["validation"] = datasets["train"]
    for dataset in datasets.values():
        # A stream may not know its columns before the first row; rows are checked when read.
        columns = dataset.column_names
        if columns is not None and config.text_field not in columns:
            raise CorpusError(missing_column(config.text_field, columns, config.path))

    def read(split: str, start: int) -> Iterator[tuple[int, str]]:
        field = config.text_field
        for index, row in enumerate(_rows(datasets[split], start, config, split), start):
            where = f"{config.path} ({split}), row {index + 1}"
            if field not in row:
                raise CorpusError(missing_column(field, row, where))
            yield index, valid_text(row[field], field, where, config.encoding_errors)

    return IndexedCorpus(
        name=":".join(filter(None, (config.path, config.name, config.split))),
        config=config,
        read=read,
        has_own_validation=bool(config.validation_split),
    )


def _load(config: CorpusConfig, split: str, field: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(
            config.path, config.name or None, split=split, streaming=config.streaming
        )
    except Exception as error:  # from pyarrow, the network, the hub or datasets itself
        raise CorpusError(
            f"cannot open the dataset corpus.path={config.path!r}, corpus.name={config.name!r}, "
            f"{field}={split!r}: {_reason(error, config)}"
        ) from error


def _rows(dataset: Any, start: int, config: CorpusConfig, split: str) -> Iterator[dict[str, Any]]:
    done = start
    try:
        for row in dataset.skip(start) if start else dataset:
            yield row
            done += 1
    except CorpusError:
        raise
    except Exception as error:  # as above
        raise CorpusError(
            f"corpus.path={config.path!r} ({split}), after row {done}: {_reason(error, config)}"
        ) from error


def _reason(error: Exception, config: CorpusConfig) -> str:
    """What went wrong, from the error and its causes, and what to do about it."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    texts = [str(part).strip() or type(part).__name__ for part in chain]
    # The last one is the root cause; the message of datasets is often only that it failed.
    reason = "; ".join(dict.fromkeys(itertools.chain(texts[:1], texts[-1:])))
    return f"{reason}. {_advice(error, reason, config)}"


def _advice(error: Exception, reason: str, config: CorpusConfig) -> str:
    kinds, text = {kind.__name__ for kind in type(error).__mro__}, reason.lower()
    if "scripts are no longer supported" in text or "trust_remote_code" in text:
        return (
            "A dataset's own code is never run: use its parquet files (most datasets of the hub "
            "have them in the revision refs/convert/parquet), or convert it, and read that folder"
        )
    if "gated" in text or "401" in text or "403" in text:
        return "Accept its terms on the hub and log in (hf auth login, or HF_TOKEN)"
    if "config name is missing" in text or "builderconfig" in text:
        return "corpus.name must be one of its configurations"
    if "split" in text and "ValueError" in kinds:
        return "corpus.split and corpus.validation_split must be among its splits"
    if "offline" in text or kinds & {"ConnectionError", "OfflineModeIsEnabled", "Timeout"}:
        return (
            "The hub cannot be reached: unset HF_HUB_OFFLINE, or download the dataset on a machine "
            "with a network and set corpus.path to its folder"
        )
    if "UnicodeDecodeError" in kinds:
        return "Read local files with their own corpus.kind: it names the row, and can replace it"
    if "DatasetNotFoundError" in kinds or "FileNotFoundError" in kinds:
        return "Check corpus.path: the id of a dataset (owner/name), or a folder of data files"
    return _bad_line(config) or "Fix or remove that row, or choose another dataset"


def _bad_line(config: CorpusConfig) -> str:
    """The error of the first unreadable line in the jsonl files of a local folder."""
    for file in _json_files(config):
        try:
            for _ in json_rows(file, config):
                pass
        except CorpusError as error:
            return f"With corpus.kind='jsonl' the error is: {error}"
    return ""


def _refuse_deep_rows(config: CorpusConfig) -> None:
    """Refuses rows that are nested so deeply that pyarrow would crash."""
    for file in _json_files(config):
        try:
            with open_bytes(file) as stream:
                for number, line in enumerate(stream, start=1):
                    if line.count(b"[") + line.count(b"{") > _MANY_BRACKETS:
                        parsed(line.decode("utf-8", "replace"), f"{file}, line {number}")
        except OSError as error:
            raise CorpusError(f"{file} cannot be read ({error})") from error


def _json_files(config: CorpusConfig) -> list[Path]:
    path = Path(config.path)
    files = files_below(config.path) if path.is_dir() else [path] if path.is_file() else []
    return sorted(f for f in files if f.is_file() and f.name.endswith(JSONL_SUFFIXES))
