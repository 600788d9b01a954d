"""A tiny loaded lens with random parts, a tokenizer of words, and its model in a folder."""

from __future__ import annotations

from pathlib import Path

import jax
from tiny_lens import TEXT_LEN, tiny_lens, tiny_original, tiny_spec

from conlens_jax.config import LensConfig
from conlens_jax.inspection.lens import Lens
from conlens_jax.lens.spec import make_spec
from conlens_jax.models.hf_io import save_model
from conlens_jax.models.model import load_model
from conlens_jax.models.tokenizer import train_word_tokenizer

# With the special tokens and the texts' own words, as many as the model has ids.
WORDS = (
    "one two three four five six seven eight nine ten cat dog fox owl bee ant red blue green "
    "hen pig cow hat cap cup box sun sky sea tree leaf root stone sand rain snow wind cloud moon"
)
TEXT = "the cat saw one red fox and two blue owl"
TEXTS = [TEXT, "three dog", "four bee and the ant saw five green fox six owl seven dog eight cat"]
LAYER = 1


def tiny_user_lens(folder: Path, family: str = "llama", **changes) -> Lens:
    """``changes`` are fields of LensConfig."""
    spec = tiny_spec(family=family, layer=LAYER)
    save_model(folder, spec.model, tiny_original(spec))
    train_word_tokenizer([WORDS, *TEXTS], spec.model.vocab_size).save(folder)
    model = load_model(folder, unroll=1)
    prompts = {"decoder_prompt": "the cat <embed> saw", "encoder_prompt": "two <text> and"}
    config = LensConfig(**{"text_len": TEXT_LEN, **prompts, **changes})
    spec = make_spec(model.config, LAYER, config, model.tokenizer)
    trainable, frozen = tiny_lens(spec)
    frozen = {**frozen, "original": model.params}
    facts = {"model": "tiny", "layer": LAYER, "stage": "joint", "step": 7}
    return Lens(model, spec, jax.tree.map(jax.numpy.asarray, trainable), frozen, facts=facts)
