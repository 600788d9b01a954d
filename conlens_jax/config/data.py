"""Settings of the corpus and of the activations taken from it. Lengths are in tokens, and an empty
string means "not given"."""

from __future__ import annotations

import dataclasses

GENERATED_CORPORA = ("stories", "sums")
"""Corpora that a seeded generator writes, so that their content is known."""
MODEL_TEXT_FIELDS = ("writes", "prompts", "max_tokens", "temperature", "top_p", "batch_size")
"""Fields of the corpus that are for ``corpus.kind="model"`` only."""


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """Where text comes from."""

    # "stories" or "sums" (seeded generators), "stdlib" (documentation strings of the installed
    # Python), "text", "jsonl", "parquet" (local files), "huggingface", or "model": the model itself
    # writes the documents, once; they are kept as jsonl files.
    kind: str = "stories"
    # File, folder or glob of local files (text and jsonl also as .gz or .zst); dataset name or
    # folder for "huggingface"; for "model" the folder in which the folder with the documents is
    # made (empty: $CONLENS_CACHE, or else ~/.cache/conlens_jax).
    path: str = ""
    name: str = ""  # configuration name of a Hugging Face dataset
    split: str = "train"  # split of a Hugging Face dataset that documents are read from
    # A Hugging Face split for validation; empty: validation_fraction of the documents of split are
    # held out. No text is on both sides: a copy of an earlier text on the other side is left out;
    # a text that is in validation_split is left out of training (all of it is read for that, up to
    # n_documents).
    validation_split: str = ""
    text_field: str = "text"  # column that contains the text
    # Text that is not valid Unicode (bytes that are not UTF-8, half a surrogate pair in JSON):
    # "error" names the file and the line or row, "replace" puts U+FFFD in its place.
    encoding_errors: str = "error"
    streaming: bool = True  # read a Hugging Face dataset without downloading it first
    # Share of the documents that is held out, chosen by a hash of the document's index.
    validation_fraction: float = 0.05
    # Read at most so many (0: all; a generator needs a number). The model writes so many, and more
    # when the number is raised.
    n_documents: int = 40_000
    seed: int = 0  # of a generator, and of what the model writes
    # What the model writes. "answers": replies to prompts, through its chat template where it has
    # one, otherwise what follows the prompt; a document is the reply alone. "continuations": what
    # follows the beginning of a text; a document is the beginning and what follows.
    writes: str = "answers"
    # File of the prompts or beginnings: one per line, or the column text_field of a .jsonl file;
    # document i has line i, and starts again after the last. Empty: for answers a request on one of
    # some hundred topics, drawn for each document; for continuations the bos token alone.
    prompts: str = ""
    max_tokens: int = 128  # tokens that the model writes per document, at most
    temperature: float = 0.8  # logits are divided by it; 0 takes the most probable token
    top_p: float = 0.95  # tokens are drawn from the most probable ones that together have this
    # Documents that the model writes at the same time. Another number may change a token where two
    # are almost equally probable, so its documents are kept apart.
    batch_size: int = 64


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where training reads its rows."""

    # "cache": the folder that conlens_jax.dump wrote. "stream": the corpus itself: the same rows
    # (the section dump defines them), with their tokens in memory; each step captures its
    # activations, which costs M's pass up to block L. Nothing is written; held-out rows are
    # captured when a run begins, and targets other than windows are made then, of all rows: for
    # words a pass of M over each document, for descriptions the time to write them.
    source: str = "cache"


@dataclasses.dataclass(frozen=True)
class DumpConfig:
    """From the corpus to an activation cache."""

    cache_dir: str = "cache"  # the folder; the splits are folders in it
    seq_len: int = 64  # S: longer documents are cut, shorter ones padded on the right
    n_samples: int = 32_768  # rows of the training split
    n_validation_samples: int = 2_048  # rows of the validation split
    # Rows of a third split, test/, of the held-out documents after those of validation: for a last
    # measurement (evaluate.split) on rows that no choice was made on; 0: none.
    n_test_samples: int = 0
    positions_per_sequence: int = 4  # rows taken from one document
    min_position: int = 8  # first position P that a row may have
    max_position: int = 0  # last one, included; 0: the last that has dump.after tokens after it
    after: int = 4  # true tokens that must follow P (for the KL horizon and the warm start)
    # Whether every context begins with the tokenizer's bos token: "auto" where the tokenizer's own
    # template adds one (as in transformers; the embedded model's does), "true" where it has one, or
    # "false".
    add_bos: str = "auto"
    batch_size: int = 64  # documents per pass of M
    rows_per_shard: int = 4_096  # rows per file
    dtype: str = "float32"  # of the stored activations; or "bfloat16"
    seed: int = 0  # of the choice of positions
