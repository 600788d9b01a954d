"""Text to token ids and back, over the ``tokenizers`` library.

``tokenizer.json`` alone decides the ids. The classes of ``transformers`` are avoided on purpose:
importing them costs seconds, and some of them rebuild the tokenizer or add tokens to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from conlens_jax.config.paths import local_path

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
"""Special tokens of the tokenizers trained here; the ids are 0, 1, 2, 3."""

_TOKENIZER_FILE = "tokenizer.json"
_SPECIAL_TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_MODEL_FILE = "config.json"


class Tokenizer:
    """A tokenizer with the ids of its special tokens.

    Attributes:
      bos_id: id of the token before a text; the eos token where there is none of its own; None
        where there is neither.
      eos_id: id of the token after a text, or None.
      unk_id: id of words outside the vocabulary, or None.
      pad_id: id that fills rows up: pad, or else eos, or else bos, or else 0.
      vocab_size: the highest id + 1, added tokens included.
      fingerprint: sha256 of ``tokenizer.json``, in hex.
    """

    def __init__(self, tokenizer_json: bytes, side_files: Mapping[str, bytes]):
        """Takes the content of ``tokenizer.json`` and of the files beside it, by file name."""
        self._json = tokenizer_json
        self._side_files = dict(side_files)
        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json.decode("utf-8"))
        # A saved tokenizer may carry the padding and length limit of its training script.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size: int = max(ids, default=-1) + 1
        self.fingerprint: str = hashlib.sha256(tokenizer_json).hexdigest()
        bos, eos, pad, unk = (self._special_id(name) for name in ("bos", "eos", "pad", "unk"))
        self.unk_id: int | None = unk
        self.eos_id: int | None = eos
        self.bos_id: int | None = eos if bos is None else bos
        self.pad_id: int = next(i for i in (pad, eos, bos, 0) if i is not None)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Reads a Hugging Face folder: ``tokenizer.json``, and for the special tokens
        ``tokenizer_config.json``, ``special_tokens_map.json`` and ``config.json`` where present.

        Raises:
          ValueError: no ``tokenizer.json``, or a file that is not what its name says.
        """
        folder = local_path(folder)
        path = folder / _TOKENIZER_FILE
        if not path.is_file():
            raise ValueError(
                f"model.path: there is no {_TOKENIZER_FILE} in {folder}; save it there with "
                "AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
            )
        side_files = {
            name: (folder / name).read_bytes()
            for name in (*_SPECIAL_TOKEN_FILES, _MODEL_FILE)
            if (folder / name).is_file()
        }
        for name, content in side_files.items():
            try:
                json.loads(content)
            except ValueError as error:
                raise ValueError(f"{folder / name} is not valid JSON: {error}") from error
        try:
            return cls(path.read_bytes(), side_files)
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise ValueError(f"{path} is not a tokenizer: {error}") from error

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's files, byte for byte as they were read, into ``folder``."""
        folder = local_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _TOKENIZER_FILE).write_bytes(self._json)
        for name in _SPECIAL_TOKEN_FILES:
            if name in self._side_files:
                (folder / name).write_bytes(self._side_files[name])

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Ids of the text alone: no template of the tokenizer is applied.

        ``add_bos`` puts ``bos_id`` in front, where the tokenizer has one.
        """
        return self._prefix(add_bos) + self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], add_bos: bool = False) -> list[list[int]]:
        """:meth:`encode` of several texts, in parallel."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [self._prefix(add_bos) + encoding.ids for encoding in encodings]

    def _prefix(self, add_bos: bool) -> list[int]:
        return [self.bos_id] if add_bos and self.bos_id is not None else []

    def decode(self, ids: Iterable[int]) -> str:
        """Readable text without special tokens. Ids that the tokenizer does not know (an embedding
        often has rows to spare) are left out."""
        known = [int(i) for i in ids if 0 <= int(i) < self.vocab_size]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def token(self, token_id: int) -> str:
        """One token in printable form: line breaks as ``\\n``, half a character as the vocabulary
        writes it, an id that the tokenizer does not know as ``[id]``."""
        token_id = int(token_id)
        written = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
        if written is None:
            return f"[{token_id}]"
        text = self._tokenizer.decode([token_id], skip_special_tokens=False)
        if not text or "\ufffd" in text:
            text = written
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

    def _special_id(self, kind: str) -> int | None:
        """The id of ``"bos"``, ``"eos"`` or ``"pad"``: by name, then by the model's config."""
        for name in _SPECIAL_TOKEN_FILES:
            token = self._side_file(name).get(f"{kind}_token")
            if isinstance(token, dict):
                token = token.get("content")
            token_id = self._tokenizer.token_to_id(token) if isinstance(token, str) else None
            if token_id is not None:
                return token_id
        config = self._side_file(_MODEL_FILE)
        for section in (config, config.get("text_config") or {}):
            token_id = section.get(f"{kind}_token_id")
            if isinstance(token_id, list):  # several ends of text; the first is the main one
                token_id = token_id[0] if token_id else None
            if token_id is not None and 0 <= token_id < self.vocab_size:
                return token_id
        return None

    def _side_file(self, name: str) -> dict[str, Any]:
        return json.loads(self._side_files.get(name, b"{}"))


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Checks that an embedding with ``vocab_size`` rows has one for every id of the tokenizer.

    More rows than ids are fine: many models pad their embedding.

    Raises:
      ValueError: there are ids without a row.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1} (vocabulary size "
            f"{tokenizer.vocab_size}), but the embedding of the model has only {vocab_size} rows: "
            "model.path must hold the tokenizer that the model was trained with"
        )


def train_word_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """One token a word or run of punctuation, in lower case; decoding joins them by spaces.

    The ``vocab_size`` most frequent words (special tokens included) get an id, all others are
    ``<unk>``.
    """
    _check_size(vocab_size, len(SPECIAL_TOKENS) + 1, "words")
    tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _trained(tokenizer)


def train_bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level byte-pair encoding (as GPT-2): every text comes back exactly."""
    _check_size(vocab_size, len(SPECIAL_TOKENS) + 256, "bytes")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _trained(tokenizer)


def _check_size(vocab_size: int, smallest: int, units: str) -> None:
    if vocab_size < smallest:
        raise ValueError(
            f"embedded.vocab_size must be at least {smallest} for a tokenizer of {units}, "
            f"not {vocab_size}"
        )


def _trained(tokenizer: tokenizers.Tokenizer) -> Tokenizer:
    config = {
        **{f"{token[1:-1]}_token": token for token in SPECIAL_TOKENS},
        "clean_up_tokenization_spaces": False,
        # Any more special class rebuilds the tokenizer from parts, with other ids.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    side_files = {"tokenizer_config.json": json.dumps(config, indent=2).encode()}
    return Tokenizer(tokenizer.to_str(pretty=True).encode("utf-8"), side_files)
