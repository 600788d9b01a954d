"""A model that somebody trained: SmolLM2-135M-Instruct, from the file of an installed package.

``scripts/test.sh`` installs the package; without it these tests are skipped.
"""

from __future__ import annotations

import json
import types
import unicodedata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from awkward_strings import awkward_texts
from test_benchmark_step import script

from conlens_jax import Lens, load_model
from conlens_jax.config import LensConfig, TargetConfig
from conlens_jax.data.rows import Rows
from conlens_jax.data.targets.protocol import NextTokens
from conlens_jax.data.targets.words import WordTargets
from conlens_jax.explorer.examples import example_text, kept_example
from conlens_jax.lens.original import capture_and_predict
from conlens_jax.lens.saved import SHIPPED
from conlens_jax.lens.spec import make_spec
from conlens_jax.models.chat import render_chat
from conlens_jax.models.from_gguf.source import PACKAGED, gguf_source

NAME, LAYER = "smollm2-135m", 20

try:
    FILE = gguf_source(NAME)
except ValueError:
    FILE = None
pytestmark = pytest.mark.skipif(FILE is None, reason=PACKAGED[NAME].install)
PROMPTS = script("check_real_model").PROMPTS
STORED = json.loads(
    (Path(__file__).parent / "smollm2_explanations.json").read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def lens(tmp_path_factory) -> Lens:
    """The one of the package. The model is converted and loaded once for this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONLENS_CACHE", str(tmp_path_factory.mktemp("cache")))
        return Lens.load(NAME)


@pytest.fixture(scope="module")
def model(lens):
    return lens.model


@pytest.fixture(scope="module")
def batch(model) -> tuple[np.ndarray, np.ndarray]:
    """The six prompts, padded on the right: tokens and mask."""
    rows = [model.tokenizer.encode(text, add_bos=True) for text in PROMPTS]
    mask = np.arange(max(map(len, rows))) < np.array([[len(row)] for row in rows])
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate(rows)
    return tokens, mask


@pytest.fixture(scope="module")
def logits(model, batch) -> np.ndarray:
    return np.asarray(model.logits(*batch))


@pytest.fixture(scope="module")
def expected(batch) -> list[np.ndarray]:
    """transformers' logits of each prompt in float64, from its own reading of the file."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        rope_theta=100_000.0,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    theirs = LlamaForCausalLM(config).eval()
    # Without its parts, each of which would take transformers as long as the whole.
    whole = types.SimpleNamespace(
        config=config, state_dict=theirs.state_dict, named_children=lambda: ()
    )
    read = load_gguf_checkpoint(FILE, return_tensors=True, model_to_load=whole)["tensors"]
    theirs.load_state_dict(read | {"lm_head.weight": read["model.embed_tokens.weight"]})
    theirs.double()
    with torch.no_grad():
        return [
            theirs(torch.tensor(row[real][None], dtype=torch.long)).logits[0].numpy()
            for row, real in zip(*batch, strict=True)
        ]


def test_the_logits_are_those_of_transformers(batch, logits, expected):
    """They are up to 41. Those of one second token are moved by 1.3e-4: the residual stream is some
    thousands large there. Transformers' own in float32 are moved by up to 1.1e-4."""
    for row, real, theirs in zip(logits, batch[1], expected, strict=True):
        np.testing.assert_allclose(row[real], theirs, rtol=0, atol=1.5e-4)
        assert np.abs(row[real][2:] - theirs[2:]).max() < 1e-4
        assert np.abs(row[real] - theirs).mean() < 2e-5
        np.testing.assert_array_equal(row[real].argmax(-1), theirs.argmax(-1))


def test_it_knows_the_capital_of_france(model):
    (written,) = model.decode(model.generate("The capital of France is", 4))
    assert written.startswith(" Paris")


def test_a_cache_writes_what_whole_passes_write(model, batch):
    """Greedy decoding with a cache, and by one whole pass for each token."""
    tokens, mask = batch[0][:2], batch[1][:2]
    written = np.asarray(model.generate(tokens, 6, mask=mask, stop=()))
    rows, lengths = np.arange(2), mask.sum(axis=1)
    tokens = np.pad(tokens * mask, ((0, 0), (0, 6)))
    for step in range(6):
        real = np.arange(tokens.shape[1]) < (lengths + step)[:, None]
        found = np.asarray(model.logits(tokens, real))[rows, lengths + step - 1].argmax(-1)
        np.testing.assert_array_equal(found, written[:, step])
        tokens[rows, lengths + step] = found


def test_the_captured_value_swapped_in_changes_nothing(model, batch, logits):
    tokens, mask = batch
    activations = model.capture(tokens, LAYER, -1, mask)
    same = np.asarray(model.swap(tokens, LAYER, -1, activations, mask))
    np.testing.assert_allclose(same[mask], logits[mask], rtol=0, atol=1e-4)
    other = np.asarray(model.swap(tokens, LAYER, -1, activations[::-1], mask))
    last = np.arange(len(tokens)), mask.sum(axis=1) - 1
    assert np.abs(other - logits)[last].max() > 1


def test_targets_of_words_are_read_without_a_legend(model, batch, logits):
    """Activations and next tokens of the prompts from one pass, and the target of one."""
    (tokens, mask), tokenizer = batch, model.tokenizer
    last = (mask.sum(axis=1) - 1).astype(np.int32)
    spec = make_spec(model.config, LAYER, LensConfig(), tokenizer)
    read, ids, probabilities = (
        np.asarray(array)[:, 0]
        for array in capture_and_predict(
            model.params, tokens, mask, last[:, None], count=5, spec=spec
        )
    )
    np.testing.assert_allclose(read, model.capture(tokens, LAYER, -1, mask), rtol=1e-4, atol=1e-3)
    expected = np.asarray(jax.nn.softmax(jnp.asarray(logits)))[np.arange(len(last)), last]
    np.testing.assert_array_equal(ids, np.argsort(-expected, axis=-1, kind="stable")[:, :5])
    np.testing.assert_allclose(probabilities, -np.sort(-expected, axis=-1)[:, :5], rtol=1e-3)

    contexts = [
        tokenizer.encode(text)
        for text in ("The house is of wood and stone", "The end of the cat is")
    ]
    comma, separator = tokenizer.encode(",")[0], tokenizer.encode(" |")[0]
    config = TargetConfig(
        kind="words", next_words=3, context_words=2, nearness=0.05, most_common=1.0
    )
    targets = WordTargets(
        config, tokenizer, comma, separator, tokenizer.eos_id, 16, lambda: contexts
    )
    rows = Rows(read, tokens, last, last + 1, np.arange(len(last), dtype=np.int64))
    number = next(i for i, prompt in enumerate(PROMPTS) if prompt.endswith("capital of Japan is"))
    text = tokenizer.decode(targets.texts(rows, NextTokens(ids, probabilities))[number])
    assert text.startswith(" Tokyo") and text.endswith(" | capital Japan")


@pytest.mark.parametrize(
    ("settings", "limit"), [({"dtype": "bfloat16"}, 5e-3), ({"quantise": "int8"}, 2e-2)]
)
def test_fewer_bits_predict_nearly_the_same(model, batch, logits, settings, limit):
    """KL in nats, the mean over all tokens of the prompts."""
    smaller = load_model(model.folder, unroll=1, **settings)
    other = jnp.asarray(smaller.logits(*batch), jnp.float32)
    log_p, log_q = (jax.nn.log_softmax(each, axis=-1) for each in (jnp.asarray(logits), other))
    kl = np.asarray(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))[batch[1]]
    assert 0 < kl.mean() < limit


def test_its_tokens(model):
    """As transformers reads the file, once the text is cut at each numeral: SmolLM2's tokenizer
    takes them one by one, which transformers leaves out."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name)
    spelled = ["<|im_start|>user\nHi<|im_end|>\n", "a<|endoftext|> b", "<|im_end|><|im_end|>"]
    texts = [*awkward_texts(), *PROMPTS, *spelled]
    for text, ids in zip(texts, model.tokenizer.encode_batch(texts), strict=True):
        pieces = [theirs(part, add_special_tokens=False)["input_ids"] for part in cut(text)]
        assert ids == sum(pieces, []), text
        assert model.tokenizer.encode(text, "auto") == ids
        if not any(special in text for special in spelled + ["<|"]):
            assert model.tokenizer.decode(ids) == text
    assert (model.tokenizer.bos_id, model.tokenizer.eos_id, model.tokenizer.pad_id) == (1, 2, 2)


def cut(text: str) -> list[str]:
    parts = [""]
    for letter in text:
        if unicodedata.category(letter).startswith("N"):
            parts += [letter, ""]
        else:
            parts[-1] += letter
    return parts


def test_a_message_is_rendered_by_the_files_own_template(model):
    text = render_chat([{"role": "user", "content": "Hi"}], model.folder, answer=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert model.tokenizer.encode(text)[0] == 1


@pytest.fixture(scope="module")
def explained(lens):
    """Five texts of ``scripts/store_explanations.py``, every position that is stored."""
    positions = sorted({row["position"] for row in STORED["rows"]})
    return lens.explain(STORED["texts"], positions)


def test_the_example_of_the_package_is_of_its_lens(lens):
    """The explorer opens on it. A new lens needs a new one: start the explorer without the file,
    and take the one that it then keeps in ``~/.cache/conlens_jax/examples``."""
    text, place = example_text(lens), SHIPPED / NAME
    found = kept_example(lens, text, [place, place])
    assert found is not None and list(found.documents[0]) == lens.tokens(text)


def test_the_lens_of_the_package_writes_what_it_wrote(model, lens, explained):
    """Where two tokens are nearly as probable, another version of XLA may choose the other."""
    assert lens.spec.end == model.tokenizer.eos_id and lens.spec.text_len == 16
    wanted = {(row["document"], row["position"]): row for row in STORED["rows"]}
    rows = [row for row in explained if _place(row) in wanted]
    same = [row for row in rows if str(row.best.text) == wanted[_place(row)]["text"]]
    assert len(rows) == 64 and len(same) >= 62
    assert {row.document for row in same if row.position == 2} == set(range(5))
    for row in same:
        assert row.best.cos == pytest.approx(wanted[_place(row)]["cos"], abs=1e-3)
        assert row.best.kl == pytest.approx(wanted[_place(row)]["kl"], abs=1e-3)
    # Read again, the text ends as it was written, and gives the same reconstruction.
    again = lens.as_read(str(same[0].best.text))
    assert again.tokens == same[0].best.text.tokens and again.tokens[-1] == lens.spec.end


def _place(row) -> tuple[int, int]:
    return row.document, row.position


def test_the_lens_of_the_package_has_support(lens, explained):
    """Its calibration knows both kinds of claims, and the marks of its own tokenizer."""
    assert set(lens.calibration.knots) == {"context", "next"}
    assert lens.metrics["support_ece"] <= 0.05
    assert lens.metrics["support_right_at_90_lo"] >= 0.85
    (row,) = (row for row in explained if _place(row) == (0, 4))  # The capital of France is
    supports = {word.text: word.support for word in row.best.words}
    assert supports["|"] is None and supports["·"] is None
    assert 0 < supports["the"] < 1
