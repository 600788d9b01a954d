"""Two tokenizers and tokens of theirs whose text, read again, gives others; and lenses on them."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from tiny_models import random_params, tiny_config
from tokenizers import decoders, models, normalizers

from conlens_jax.config import LensConfig
from conlens_jax.inspection.lens import Lens
from conlens_jax.lens.spec import init_lens, make_spec
from conlens_jax.models.hf_io import save_model
from conlens_jax.models.model import load_model
from conlens_jax.models.tokenizer import SPECIAL_TOKENS, Tokenizer, train_bpe_tokenizer

KINDS = ("byte_level", "byte_fallback")
TEXT = "the cat sat"
TEXT_LEN, LAYER, VOCABULARY = 4, 1, 320
SPARE = VOCABULARY - 1
"""A row of the embedding that no token has."""


def byte_level() -> Tokenizer:
    """As GPT-2; ``cat`` is one token."""
    return train_bpe_tokenizer(["the cat sat on the cat"] * 9, 280)


def byte_fallback() -> Tokenizer:
    """As Llama 2: SentencePiece with a token for each byte, and a space in front of every text."""
    letters = ["▁", *"abcdehnost"]
    merges = [("c", "a"), ("ca", "t"), ("▁", "cat"), ("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    words = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    words += ["".join(pair) for pair in merges]
    vocabulary = {word: index for index, word in enumerate(words)}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    names = {f"{token[1:-1]}_token": token for token in SPECIAL_TOKENS}
    return Tokenizer(
        tokenizer.to_str().encode(), {"tokenizer_config.json": json.dumps(names).encode()}
    )


def tokenizer_of(kind: str) -> Tokenizer:
    return {"byte_level": byte_level, "byte_fallback": byte_fallback}[kind]()


def awkward(kind: str) -> dict[str, tuple[list[str | int], str, bool]]:
    """By name: tokens (as the vocabulary writes them, or ids), their text, and whether it gives
    the tokens again."""
    shared = {
        "special tokens are dropped": (["<bos>", "cat", "<eos>"], "cat", False),
        "special tokens alone": (["<eos>", "<pad>"], "", False),
        "one that no token has": (["cat", SPARE], "cat", False),
        "other merges": (["c", "a", "t"], "cat", False),
    }
    own = {
        "byte_level": {
            "a whole character": (["Ã", "©"], "é", True),  # the bytes C3 A9
            "half a character": (["cat", "Ã"], "cat\ufffd", False),
            "halves in the wrong order": (["©", "Ã"], "\ufffd\ufffd", False),
            "a special token in letters": (["<", "e", "o", "s", ">"], "<eos>", False),
            "a line end": (["cat", "č", "Ċ"], "cat\r\n", True),
            "nothing wrong": (["the", "Ġcat"], "the cat", True),
        },
        "byte_fallback": {
            "a whole character": (["▁", "<0xC3>", "<0xA9>"], "é", True),
            "half a character": (["▁cat", "<0xC3>"], "cat\ufffd", False),
            "a letter as its byte": (["▁", "<0x73>", "a", "t"], "sat", False),
            "no space in front": (["cat", "▁", "s"], "cat s", False),
            "two spaces in front": (["▁", "▁cat"], " cat", True),
            "an unknown one": (["▁cat", "<unk>"], "cat", False),
            "nothing wrong": (["▁the", "▁cat"], "the cat", True),
        },
    }
    return shared | own[kind]


def ids_of(tokens: list[str | int], tokenizer: Tokenizer) -> list[int]:
    vocabulary = tokenizer._tokenizer.get_vocab(with_added_tokens=True)
    return [token if isinstance(token, int) else vocabulary[token] for token in tokens]


def awkward_lens(folder: Path, kind: str) -> Lens:
    """A lens with random parts, whose samples are made of such tokens."""
    config = tiny_config(vocab_size=VOCABULARY)
    params = random_params(config)
    save_model(folder, config, {**params, "embedding": 4 * params["embedding"]})
    tokenizer_of(kind).save(folder)
    model = load_model(folder, unroll=1)
    lens = LensConfig(text_len=TEXT_LEN, decoder_prompt="<embed>", encoder_prompt="<text>")
    spec = make_spec(model.config, LAYER, lens, model.tokenizer)
    trainable, frozen = init_lens(model.params, spec, np.zeros(config.d_model, np.float32), 1.0)
    rng = np.random.default_rng(0)

    def moved(leaf):
        return jnp.asarray(leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32))

    return Lens(model, spec, jax.tree.map(moved, trainable), frozen, facts={"layer": LAYER})
