"""Targets that a model writes: a description of the context up to P, from ``target.prompt``.

The prompt is a message where the writing model has a chat template, and else a text that the model
continues. The description is the first line of what it writes.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from conlens_jax.config import ConfigError, TargetConfig
from conlens_jax.config.rules import TARGET_CONTEXT
from conlens_jax.config.seeds import random_key
from conlens_jax.data.prompt_writer import PromptWriter, WritingSpeed, tokens_written
from conlens_jax.data.rows import Rows
from conlens_jax.data.targets.protocol import NextTokens, Targets
from conlens_jax.models.chat import chat_template, render_chat
from conlens_jax.models.model import LanguageModel
from conlens_jax.models.tokenizer import Tokenizer
from conlens_jax.models.written import before_end


class ModelTargets(Targets):
    """Has a model write the target of each row. Its draws depend on ``target.seed``, the document
    and P alone.

    Args:
      writer: M, or another model: then its text is tokenised again with M's tokenizer.
      tokenizer: M's.
      longest: the most tokens of a context up to P.
      batch_size: rows that are written at the same time, a multiple of the mesh's.
      end: the end token.
      text_len: the most tokens of a description, its end included.

    Raises:
      ValueError: the prompt has words that the writer does not know, is too long for it, or its
        chat template refuses it.
    """

    def __init__(
        self,
        config: TargetConfig,
        writer: LanguageModel,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        longest: int,
        batch_size: int,
        end: int,
        text_len: int,
    ):
        self._config, self._tokenizer, self._mesh = config, tokenizer, mesh
        self._end, self._text_len, self._size = end, text_len, batch_size
        self._model: LanguageModel | None = writer
        self._reads, self._positions = writer.tokenizer, writer.config.max_positions
        self._rewrites = writer.tokenizer.fingerprint != tokenizer.fingerprint
        self._writing: tuple[PromptWriter, WritingSpeed] | None = None
        self._piece = functools.cache(writer.tokenizer.piece)
        template = chat_template(writer.folder)[1]
        self._prompt, self._add_bos = config.prompt, "auto"
        if template is not None:
            messages = [{"role": "user", "content": config.prompt}]
            self._prompt, self._add_bos = render_chat(messages, writer.folder, answer=True), False
        self._longest = self._checked_fixed_tokens(longest) + longest
        # Of texts that begin in different ways: what is before the context.
        self._shared = len(os.path.commonprefix(self._encoded(["a", "The", "1"])))
        self.content = {
            "weights_hash": writer.weights_hash,
            "tokenizer_hash": writer.tokenizer.fingerprint,
            "chat_template": template and hashlib.sha256(template.encode()).hexdigest(),
            "dtype": writer.config.dtype,
            "quantise": writer.config.quantise,
        }

    def texts(self, rows: Rows, next_tokens: NextTokens | None = None) -> list[Sequence[int]]:
        """See :meth:`~.protocol.Targets.texts`."""
        if self._writing is None:
            assert self._model is not None
            self._writing = (
                PromptWriter(self._model, self._mesh),
                WritingSpeed(self._model, self._mesh),
            )
        writer, speed = self._writing
        prompts = self._prompts(rows)
        key, fold = random_key(self._config.seed), jax.vmap(jax.random.fold_in, (None, 0))
        texts: list[Sequence[int]] = []
        for first in range(0, len(rows), self._size):
            # The last batch repeats a row: each has the same number.
            batch = np.minimum(np.arange(first, first + self._size), len(rows) - 1)
            keys_B = fold(key, jnp.asarray(rows.documents_N[batch], jnp.uint32))
            keys_B = jax.vmap(jax.random.fold_in)(keys_B, jnp.asarray(rows.positions_N[batch]))
            with speed.measured() as add_tokens:
                written = writer.write(
                    [prompts[row] for row in batch],
                    keys_B,
                    self._text_len,
                    self._config.temperature,
                    most_shared=self._shared,
                    longest=self._longest,
                )
                add_tokens(tokens_written(written, self._text_len))
            texts += map(self._description, written[: len(rows) - first])
        return texts

    def speed(self) -> Mapping[str, float]:
        """See :meth:`WritingSpeed.summary`."""
        return self._writing[1].summary() if self._writing else {}

    def release(self) -> None:
        """See :meth:`~.protocol.Targets.release`."""
        self._model = self._writing = None

    def _prompts(self, rows: Rows) -> list[list[int]]:
        contexts = zip(rows.tokens_NS, rows.positions_N.tolist(), strict=True)
        # The last token may end within a character.
        prompts = self._encoded(
            [self._tokenizer.decode(tokens_S[: p + 1]).rstrip("\ufffd") for tokens_S, p in contexts]
        )
        longest = max(map(len, prompts))
        if longest + self._text_len > self._positions:
            raise ConfigError(self._too_long(f"with a context {longest}"))
        return prompts

    def _encoded(self, contexts: Sequence[str]) -> list[list[int]]:
        prompts = [self._prompt.replace(TARGET_CONTEXT, context) for context in contexts]
        return self._reads.encode_batch(prompts, self._add_bos)

    def _checked_fixed_tokens(self, longest: int) -> int:
        """How many tokens a prompt has without its context."""
        if TARGET_CONTEXT not in self._prompt:
            raise ConfigError(
                f"target.prompt: the chat template of the model that writes changes "
                f"{TARGET_CONTEXT} into something else; write the prompt in another way"
            )
        (fixed,) = self._encoded([""])
        if self._reads.unk_id is not None and self._reads.unk_id in fixed:
            raise ConfigError(
                f"target.prompt={self._config.prompt!r} has words that the tokenizer of the model "
                f"that writes does not know; use words of its vocabulary or {TARGET_CONTEXT} alone"
            )
        if len(fixed) + longest + self._text_len > self._positions:
            raise ConfigError(self._too_long(f"{len(fixed)} and those of a context {longest}"))
        return len(fixed)

    def _too_long(self, tokens: str) -> str:
        return (
            f"target.prompt: its tokens are {tokens}, and with lens.text_len={self._text_len} more "
            f"than the {self._positions} positions of the model that writes: shorten it, lower "
            "dump.seq_len, or give dump.max_position"
        )

    def _description(self, written: np.ndarray) -> Sequence[int]:
        """What was written, as a target in M's tokens."""
        tokens = first_line(written.tolist(), self._piece)
        if self._rewrites:
            tokens = self._tokenizer.encode(self._reads.decode(tokens).rstrip("\ufffd"))
        return before_end([t for t in tokens if t != self._tokenizer.unk_id], self._end)


def first_line(tokens: Sequence[int], piece: Callable[[int], str]) -> list[int]:
    """The first line that is not empty, without special tokens.

    Args:
      piece: see :meth:`~conlens_jax.models.tokenizer.Tokenizer.piece`.
    """
    shown = [token for token in tokens if piece(token)]
    line = list(itertools.dropwhile(lambda token: piece(token).isspace(), shown))
    return list(itertools.takewhile(lambda token: "\n" not in piece(token), line))
