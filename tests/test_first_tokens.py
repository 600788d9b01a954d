"""The first tokens of a long text are those of the whole, of every kind of tokenizer."""

from __future__ import annotations

import random

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from conlens_jax.corpora import first_tokens as module
from conlens_jax.corpora.first_tokens import first_tokens
from conlens_jax.models.tokenizer import train_bpe_tokenizer, train_word_tokenizer

SAMPLE = [
    "The quick brown fox, 12345 times, jumped over 67 lazy dogs; it wasn't hard.",
    "a small cat sat on the mat and the dog ran after it over hill and dale",
    "aaaa aaaaaaa abababab 1000000 zzz \u00e9\u00e9 \u4f60\u597d\u4e16\u754c",
]


def sentencepiece_bpe():
    """As Llama 2: no word boundaries, the whole text is one piece."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>"], show_progress=False, max_token_length=8
    )
    tokenizer.train_from_iterator(SAMPLE * 20, trainer)
    return tokenizer


def unigram():
    """With NFKC, white space at the end stripped, and a space in front."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(SAMPLE * 20, trainer)
    return tokenizer


def digits_from_the_end():
    """Digits in threes, counted from the end of the number."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                tokenizers.Regex(r"\d{1,3}(?=(?:\d{3})*(?!\d))|\D+"), behavior="isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SAMPLE, "123 456 789"] * 20, trainer)
    return tokenizer


def encoder(tokenizer):
    return lambda texts: [
        encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)
    ]


ENCODERS = {
    "words": lambda: train_word_tokenizer(SAMPLE, 100).encode_batch,
    "bytes": lambda: train_bpe_tokenizer(SAMPLE * 20, 400).encode_batch,
    "sentencepiece": lambda: encoder(sentencepiece_bpe()),
    "unigram": lambda: encoder(unigram()),
    "digits": lambda: encoder(digits_from_the_end()),
}


def long_texts():
    rng = random.Random(0)
    letters = lambda alphabet, n: "".join(rng.choice(alphabet) for _ in range(n))
    words = " ".join(SAMPLE)
    return [
        "",
        "short",
        (words + "\n\n") * 200,
        "a" * 30_000,
        letters("ab", 30_000),
        letters("\u4f60\u597d\u4e16\u754c\u3002", 30_000),
        "7" * 4_096 * 5 + "1",
        "1" * 4_097,
        " " * 20_000 + "then words " * 20,
        letters("ab \n\t1\u00e9e\u0301", 30_000),
        "x" * 4_090 + " <bos> <eos> " * 900,
        "word " * 12 + " " * 30_000,
    ]


@pytest.mark.parametrize("kind", list(ENCODERS))
def test_they_are_those_of_the_whole(kind):
    encode, texts = ENCODERS[kind](), long_texts()
    whole = encode(texts)
    for count in (1, 64, 300):
        found = first_tokens(encode, texts, count)
        for text, tokens, expected in zip(texts, found, whole, strict=True):
            assert tokens[:count] == expected[:count], text[:40]
            # Fewer only where there are no more.
            assert len(tokens) >= min(count, len(expected))


def test_only_as_much_is_tokenised_as_is_needed():
    encode, read = train_bpe_tokenizer(SAMPLE * 20, 400).encode_batch, []

    def counting(texts):
        read.append(sum(map(len, texts)))
        return encode(texts)

    text = SAMPLE[1] * 50_000
    first_tokens(counting, [text], 64)
    assert sum(read) < 4 * module._LEAST_CHARACTERS
    read.clear()
    short = SAMPLE[0] * 50
    assert first_tokens(counting, [short], 64) == encode([short])
    assert read == [len(short)]
