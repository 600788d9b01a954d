"""Text to token ids and back, over the ``tokenizers`` library.

The ids are those of ``transformers``: from ``tokenizer.json``, with the tokens that the files next
to it add (:mod:`conlens_jax.models.added_tokens`). The classes of ``transformers``
are not used: importing them takes seconds, and some of them rebuild the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from conlens_jax.files.paths import local_path
from conlens_jax.models.added_tokens import (
    ADDED_FILE,
    CONFIG_FILE,
    SPECIAL_FILE,
    add_tokens,
    named_tokens,
)
from conlens_jax.models.tokenizer_file import clean_up, read_tokenizer, template_prefix

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
"""Special tokens of the tokenizers trained here; the ids are 0, 1, 2, 3."""

_TOKENIZER_FILE = "tokenizer.json"
_TOKEN_FILES = (CONFIG_FILE, SPECIAL_FILE, ADDED_FILE)
_MODEL_FILE = "config.json"


class Tokenizer:
    """A tokenizer with the ids of its special tokens.

    Attributes:
      bos_prefix: ids that the tokenizer's own template (the post-processor of ``tokenizer.json``)
        adds before a text; empty for most tokenizers like GPT-2's. ``add_bos_token`` in
        ``tokenizer_config.json`` is ignored, as in transformers. Tokenizers trained here add
        their ``<bos>``.
      bos_id: id of the bos token, or else of the eos token; None if there is neither.
      eos_id: id of the token after a text, or None.
      unk_id: id of words outside the vocabulary, or None.
      pad_id: id of padding: pad, or else eos, or else bos, or else 0.
      vocab_size: the highest id + 1, added tokens included.
      rows: number of rows of the model's embedding if known; see :meth:`limit_to`.
      fingerprint: sha256 of ``tokenizer.json`` (and of the tokens that other files add), in hex.
    """

    def __init__(self, tokenizer_json: bytes, side_files: Mapping[str, bytes]):
        """Takes the content of ``tokenizer.json`` and of the files next to it, by file name."""
        self._json = tokenizer_json
        self._side_files = dict(side_files)
        self._tokenizer = read_tokenizer(tokenizer_json)
        settings = {name: self._side_file(name) for name in _TOKEN_FILES}
        padding = self._tokenizer.padding
        if padding:  # transformers takes the pad token from there
            settings[CONFIG_FILE] = {"pad_token": padding["pad_token"], **settings[CONFIG_FILE]}
        # A saved tokenizer may carry the padding and length limit of its training script.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        added = add_tokens(self._tokenizer, settings)
        self._named = named_tokens(settings)
        config = settings[CONFIG_FILE]
        self._tokenizer.encode_special_tokens = bool(config.get("split_special_tokens", False))
        self._cleans_up = clean_up(self._tokenizer, config)
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size: int = max(ids, default=-1) + 1
        self.rows: int | None = None
        extra = json.dumps(added).encode() if added else b""
        self.fingerprint: str = hashlib.sha256(tokenizer_json + extra).hexdigest()
        self._find_special_ids()
        self.bos_prefix: tuple[int, ...] = template_prefix(self._tokenizer)
        if self._side_files.get(CONFIG_FILE) == _OWN_CONFIG and self.bos_id is not None:
            self.bos_prefix = (self.bos_id,)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Reads a Hugging Face folder: ``tokenizer.json``, and for added and special tokens
        ``tokenizer_config.json``, ``special_tokens_map.json``, ``added_tokens.json`` and
        ``config.json`` where present.

        Raises:
          ValueError: no ``tokenizer.json``, or a file with unexpected content.
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
            for name in (*_TOKEN_FILES, _MODEL_FILE)
            if (folder / name).is_file()
        }
        for name, content in side_files.items():
            try:
                values = json.loads(content)
            except ValueError as error:
                raise ValueError(f"{folder / name} is not valid JSON: {error}") from error
            if not isinstance(values, dict):
                raise ValueError(f"{folder / name} must contain a JSON object")
        try:
            return cls(path.read_bytes(), side_files)
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise ValueError(f"{path} is not a tokenizer that can be used: {error}") from error

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's files, byte for byte as they were read, into ``folder``."""
        folder = local_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _TOKENIZER_FILE).write_bytes(self._json)
        for name in _TOKEN_FILES:
            if name in self._side_files:
                (folder / name).write_bytes(self._side_files[name])

    def limit_to(self, rows: int) -> None:
        """Sets how many rows the model's embedding has: from then on a text with an id beyond them
        is an error, and no such id is used as padding.

        More rows than ids are fine: many models pad their embedding.
        """
        self.rows = rows
        self._find_special_ids()
        if self.vocab_size > rows:
            beyond = [i for i in range(rows, self.vocab_size) if self._tokenizer.id_to_token(i)]
            shown = ", ".join(repr(self.token(i)) for i in beyond[:4])
            logging.getLogger(__name__).warning(
                "the tokenizer has %d tokens (%s%s) beyond the %d rows of the model's embedding: a "
                "text that uses one is refused; if they are ordinary words, the tokenizer is "
                "another model's",
                *(len(beyond), shown, ", ..." if len(beyond) > 4 else "", rows),
            )

    def adds_bos(self, setting: bool | str) -> bool:
        """Whether texts begin with a bos token, from a setting ``"auto"``, ``"true"``, ``"false"``
        or a bool. Without a bos token the setting has no effect."""
        if setting in ("auto", "true", "false", True, False):
            own = bool(self.bos_prefix) or self.bos_id is None
            return own if setting == "auto" else setting in (True, "true")
        raise ValueError(f"add_bos must be 'auto', true or false, not {setting!r}")

    def encode(self, text: str, add_bos: bool | str = False) -> list[int]:
        """Ids of the text, special tokens that it spells out among them.

        Args:
          add_bos: what is prepended, unless the text already begins with it. True: what the
            tokenizer's own template adds (:attr:`bos_prefix`), or else ``bos_id`` if there is
            one. ``"auto"``: only what the template adds. False: nothing.

        Raises:
          ValueError: the text uses a token without a row in the embedding.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return self._finished(encoding.ids, self._beginning(add_bos))

    def encode_batch(self, texts: Sequence[str], add_bos: bool | str = False) -> list[list[int]]:
        """:meth:`encode` of several texts, in parallel."""
        beginning = self._beginning(add_bos)
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [self._finished(encoding.ids, beginning) for encoding in encodings]

    def _beginning(self, add_bos: bool | str) -> list[int]:
        if not self.adds_bos(add_bos):
            return []
        return list(self.bos_prefix) or ([] if self.bos_id is None else [self.bos_id])

    def _finished(self, ids: list[int], beginning: list[int]) -> list[int]:
        """Prepends the beginning unless it is there, and checks the ids against the embedding."""
        if ids[: len(beginning)] != beginning:
            ids = beginning + ids
        if (
            self.rows is not None
            and self.rows < self.vocab_size
            and max(ids, default=0) >= self.rows
        ):
            token_id = next(i for i in ids if i >= self.rows)
            raise ValueError(
                f"the text uses the token {self.token(token_id)!r} with id {token_id}, but the "
                f"embedding of the model has only {self.rows} rows (0 to {self.rows - 1}): leave "
                "the token out, or use the tokenizer that the model was trained with"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Readable text without special tokens. Ids unknown to the tokenizer (an embedding often
        has more rows) are left out."""
        known = [int(i) for i in ids if 0 <= int(i) < self.vocab_size]
        return self._cleans_up(self._tokenizer.decode(known, skip_special_tokens=True))

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

    def piece(self, token_id: int) -> str:
        """The text of a token in the middle of a text, with the space before it if there is one;
        empty for special tokens."""
        # Decoding may strip the beginning of a text.
        return self.decode([token_id, token_id])[len(self.decode([token_id])) :]

    def _find_special_ids(self) -> None:
        bos, eos, pad, unk = (self._special_id(name) for name in ("bos", "eos", "pad", "unk"))
        self.unk_id: int | None = unk
        self.eos_id: int | None = eos
        self.bos_id: int | None = eos if bos is None else bos
        self.pad_id: int = next(i for i in (pad, eos, bos, 0) if i is not None)

    def _special_id(self, kind: str) -> int | None:
        """The id of ``"bos"``, ``"eos"``, ``"pad"`` or ``"unk"``: by name, then by the model's
        config. One beyond the vocabulary, or the embedding, is none."""
        end = self.vocab_size if self.rows is None else min(self.rows, self.vocab_size)
        names = [self._named.get(f"{kind}_token")]
        # Some folders have a name only in this file, even where transformers does not read it.
        names.append(
            named_tokens({SPECIAL_FILE: self._side_file(SPECIAL_FILE)}).get(f"{kind}_token")
        )
        config = self._side_file(_MODEL_FILE)
        ids = [self._tokenizer.token_to_id(name) for name in names if name]
        for section in (config, config.get("text_config") or {}):
            token_id = section.get(f"{kind}_token_id")
            if isinstance(token_id, list):  # several ends of text; the first is the main one
                token_id = token_id[0] if token_id else None
            ids.append(token_id)
        return next((i for i in ids if i is not None and 0 <= i < end), None)

    def _side_file(self, name: str) -> dict[str, Any]:
        return json.loads(self._side_files.get(name, b"{}"))


def train_word_tokenizer(
    texts: Iterable[str], vocab_size: int, marks: Sequence[str] = ()
) -> Tokenizer:
    """One token per word or run of punctuation, in lower case; decoding joins them by spaces.

    The ``vocab_size`` most frequent words (special tokens included) get an id, all others are
    ``<unk>``. Those of ``marks`` that are not among them get ids after theirs.
    """
    _check_size(vocab_size, len(SPECIAL_TOKENS) + 1, "words")
    tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if marks:
        vocabulary = tokenizer.get_vocab()
        for mark in marks:
            vocabulary.setdefault(mark, len(vocabulary))
        tokenizer.model = models.WordLevel(vocabulary, unk_token="<unk>")
    return _trained(tokenizer)


def train_bpe_tokenizer(
    texts: Iterable[str], vocab_size: int, marks: Sequence[str] = ()
) -> Tokenizer:
    """Byte-level byte-pair encoding (as GPT-2): decoding restores every text exactly.

    Each of ``marks`` after a space is one token; those that would be several get ids after the
    others.
    """
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
    for mark in marks:
        if len(tokenizer.encode(f" {mark}").ids) > 1:
            tokenizer.add_tokens([tokenizers.AddedToken(f" {mark}", normalized=False)])
    return _trained(tokenizer)


def _check_size(vocab_size: int, smallest: int, units: str) -> None:
    if vocab_size < smallest:
        raise ValueError(
            f"embedded.vocab_size must be at least {smallest} for a tokenizer of {units}, "
            f"not {vocab_size}"
        )


# It also marks a tokenizer as one of ours, which adds <bos> before a text though its tokenizer.json
# has no template. A template would change the fingerprint in caches.
_OWN_CONFIG = json.dumps(
    {
        **{f"{token[1:-1]}_token": token for token in SPECIAL_TOKENS},
        "clean_up_tokenization_spaces": False,
        # A more specific class would rebuild the tokenizer from parts, with other ids.
        "tokenizer_class": "PreTrainedTokenizerFast",
    },
    indent=2,
).encode()


def _trained(tokenizer: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(tokenizer.to_str(pretty=True).encode("utf-8"), {CONFIG_FILE: _OWN_CONFIG})
