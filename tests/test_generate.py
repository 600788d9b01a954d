"""``LanguageModel.generate`` against transformers, and its draws against the distribution."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import hf_model, random_tokens, write_tokenizer

import conlens_jax
from conlens_jax.config import MeshConfig
from conlens_jax.models import generate as generation
from conlens_jax.models.hf_io import load_params, read_config, save_model
from conlens_jax.models.sampling import choose_token, nucleus
from conlens_jax.parallel.mesh import make_mesh

BATCH, LENGTH, NEW = 4, 9, 12
# Rows of unequal length, padded on the left; the last one is a single token.
LEFT = np.arange(LENGTH) >= np.array([[0], [3], [5], [LENGTH - 1]])


@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("torch")
    return hf_model(bos_token_id=None, eos_token_id=None, pad_token_id=0)


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    reference.save_pretrained(folder)
    write_tokenizer(folder, reference.config.vocab_size)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return conlens_jax.load_model(folder, unroll=1)


@pytest.fixture(scope="module")
def greedy(reference):
    """transformers' own greedy tokens."""
    import torch

    tokens = random_tokens(BATCH, LENGTH)
    with torch.no_grad():
        written = reference.generate(
            torch.tensor(np.where(LEFT, tokens, 0), dtype=torch.long),
            attention_mask=torch.tensor(LEFT, dtype=torch.long),
            max_new_tokens=NEW,
            do_sample=False,
        )
    return written[:, LENGTH:].numpy()


def test_greedy_is_transformers_own(model, greedy):
    assert len(np.unique(greedy)) > 5, "the oracle says the same word for ever"
    written = model.generate(random_tokens(BATCH, LENGTH), NEW, mask=LEFT)
    np.testing.assert_array_equal(written, greedy)


def test_padding_on_the_right_gives_the_same(model, greedy):
    tokens = random_tokens(BATCH, LENGTH)
    right, mask = np.zeros_like(tokens), LEFT[:, ::-1]
    for row in range(BATCH):
        right[row, mask[row]] = tokens[row, LEFT[row]]
    np.testing.assert_array_equal(model.generate(right, NEW, mask=mask), greedy)


def test_each_token_is_the_best_of_the_full_pass(model):
    tokens = random_tokens(2, LENGTH, seed=1)
    written = np.asarray(model.generate(tokens, NEW))
    logits = np.asarray(model.logits(np.concatenate([tokens, written], axis=1)))
    np.testing.assert_array_equal(logits[:, LENGTH - 1 : -1].argmax(-1), written)


@pytest.mark.parametrize("layer", ["hidden_states[0]", 0, 2])
def test_what_follows_a_swap_is_the_best_of_the_full_pass(model, layer):
    """Also at the input of the first block, and at the output of the last one."""
    assert model.config.n_layers == 3
    tokens, mask = random_tokens(BATCH, LENGTH), LEFT
    vectors = 3 * np.random.default_rng(0).standard_normal((BATCH, model.config.d_model))
    swap = (layer, -1, vectors.astype(np.float32))
    written = np.asarray(model.generate(tokens, NEW, mask=mask, swap=swap))
    assert (written != np.asarray(model.generate(tokens, NEW, mask=mask))).any(axis=1).all()
    whole = np.concatenate([tokens, written], axis=1)
    real = np.concatenate([mask, np.ones_like(written, bool)], axis=1)
    logits = np.asarray(model.swap(whole, layer, -1 - NEW, swap[2], real))
    np.testing.assert_array_equal(logits[:, LENGTH - 1 : -1].argmax(-1), written)
    with pytest.raises(ValueError, match="activations contains NaN or infinity"):
        model.generate(tokens, 2, mask=mask, swap=(layer, -1, np.full_like(vectors, np.nan)))


def test_sharded_model_writes_the_same(folder, greedy):
    for shape in (MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=8)):
        sharded = conlens_jax.load_model(folder, mesh=make_mesh(shape), unroll=1)
        assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(sharded.params))
        written = sharded.generate(random_tokens(BATCH, LENGTH), NEW, mask=LEFT)
        np.testing.assert_array_equal(written, greedy)


def test_calls_of_one_bucket_share_a_program(model):
    model.generate(random_tokens(BATCH, 3), 2)
    programs = generation.generate._cache_size()
    for length, new in ((3, 1), (LENGTH, NEW), (16, 16)):
        assert model.generate(random_tokens(BATCH, length), new).shape == (BATCH, new)
    assert generation.generate._cache_size() == programs
    model.generate(random_tokens(BATCH, 17), 2)
    assert generation.generate._cache_size() == programs + 1


def test_a_row_ends_at_its_stop_token(model, greedy):
    tokens, free = random_tokens(BATCH, LENGTH), greedy
    stop = int(free[0, 4])
    written = np.asarray(model.generate(tokens, NEW, mask=LEFT, stop=[stop, 47]))
    for row in range(BATCH):
        ends = np.isin(free[row], [stop, 47])
        length = int(ends.argmax()) + 1 if ends.any() else NEW
        np.testing.assert_array_equal(written[row, :length], free[row, :length])
        assert (written[row, length:] == free[row, length - 1]).all()
    with_end = dataclasses.replace(
        model, config=dataclasses.replace(model.config, eos_token_ids=(stop,))
    )
    by_itself = with_end.generate(tokens[:1], NEW, mask=LEFT[:1])
    np.testing.assert_array_equal(by_itself, written[:1, :NEW])
    np.testing.assert_array_equal(with_end.generate(tokens[:1], NEW, stop=()), free[:1])


def test_texts_are_tokenised_and_padded(model):
    texts = ["word7 word9 word11", "word30"]
    written = model.generate(texts, 5, add_bos=True)
    tokens = np.array([[1, 7, 9, 11], [0, 0, 1, 30]])
    mask = np.array([[True] * 4, [False, False, True, True]])
    np.testing.assert_array_equal(written, model.generate(tokens, 5, mask=mask))
    np.testing.assert_array_equal(model.generate(texts[1], 5, add_bos=True), written[1:])
    said = [f"word{token}" for token in np.asarray(written)[0] if token > 3]
    assert model.decode(written)[0].split() == said


def chi_square(tokens: np.ndarray, logits: np.ndarray, temperature: float) -> tuple[float, int]:
    """χ² of drawn tokens against softmax(logits / temperature), and its degrees of freedom; tokens
    that are expected fewer than 5 times are counted together."""
    expected = np.exp((logits - logits.max()) / temperature)
    expected *= len(tokens) / expected.sum()
    observed = np.bincount(tokens, minlength=len(expected))
    rare = expected < 5
    expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    observed = np.append(observed[~rare], observed[rare].sum())
    return float(np.sum((observed - expected) ** 2 / expected)), len(expected) - 1


def test_draws_follow_the_softmax_at_the_temperature(model):
    tokens = np.repeat(random_tokens(1, 4), 4096, axis=0)
    logits = np.asarray(model.logits(tokens[:1]))[0, -1].astype(np.float64)
    for temperature, other in ((1.0, 0.7), (0.5, 0.7)):
        first = np.asarray(model.generate(tokens, 1, temperature=temperature, seed=1))[:, 0]
        distance, freedom = chi_square(first, logits, temperature)
        assert distance < freedom + 4 * np.sqrt(2 * freedom)
        assert chi_square(first, logits, other)[0] > 2 * (freedom + 4 * np.sqrt(2 * freedom))


def test_draws_are_of_the_seed_the_row_and_the_step(model):
    tokens = np.repeat(random_tokens(1, 4), 64, axis=0)
    draw = lambda seed, rows=64: np.asarray(
        model.generate(tokens[:rows], 6, temperature=1.5, seed=seed)
    )
    first = draw(0)
    np.testing.assert_array_equal(first, draw(0))
    np.testing.assert_array_equal(first[:8], draw(0, rows=8))
    assert len(np.unique(first[:, 0])) > 10
    assert (first != draw(1)).mean() > 0.5


def test_nucleus_of_a_distribution_made_by_hand():
    probability = np.array([0.125, 0.5, 0.0625, 0.25, 0.0625])
    for top_p, members in (
        (0.4, [1]),
        (0.5, [1]),
        (0.51, [1, 3]),
        (0.75, [1, 3]),
        (0.8, [0, 1, 3]),
        (0.9, [0, 1, 2, 3, 4]),  # the two least probable ones are equally so
        (1e-9, [1]),
    ):
        kept = nucleus(jnp.log(jnp.asarray(probability, jnp.float32)), jnp.float32(top_p))
        assert np.flatnonzero(np.isfinite(kept)).tolist() == members


def test_draws_from_the_nucleus_keep_its_ratios():
    probability = np.array([0.1, 0.6, 0.05, 0.25], np.float32)
    keys = jax.random.split(jax.random.key(3), 8192)
    logits = jnp.broadcast_to(jnp.log(probability), (8192, 4))
    drawn = choose_token(logits, keys, jnp.float32(1.0), jnp.float32(0.8))
    share = np.bincount(drawn, minlength=4) / 8192
    np.testing.assert_allclose(share, [0, 0.6 / 0.85, 0, 0.25 / 0.85], atol=0.02)


def test_top_p_reaches_the_model(model):
    tokens = np.repeat(random_tokens(1, 4), 64, axis=0)
    wide = np.unique(model.generate(tokens, 1, temperature=1.0))
    narrow = np.unique(model.generate(tokens, 1, temperature=1.0, top_p=0.3))
    assert len(narrow) < len(wide) / 2
    greedy = model.generate(tokens, NEW)
    tight = model.generate(tokens, NEW, temperature=1.0, top_p=1e-6)
    np.testing.assert_array_equal(tight, greedy)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0, "top_p": 0.0}, "max_new_tokens must be.*; top_p must be above 0"),
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"max_new_tokens": 60}, "a prompt of 9 tokens and max_new_tokens=60 .* 64 positions"),
        ({"mask": np.zeros((1, LENGTH), bool)}, "every row must have at least one token"),
    ],
)
def test_settings_out_of_range(model, settings, message):
    with pytest.raises(ValueError, match=message):
        model.generate(random_tokens(1, LENGTH), **{"max_new_tokens": 4, **settings})


def test_a_mask_goes_with_token_ids(model):
    with pytest.raises(ValueError, match="mask is for token ids only"):
        model.generate("word7", 2, mask=np.ones((1, 2), bool))


@pytest.fixture(scope="module")
def prompt():
    """One whose greedy tokens are seldom the same twice."""
    return random_tokens(8, LENGTH, seed=3)[3:4]


@pytest.fixture(scope="module")
def free(reference, prompt):
    """What transformers writes behind it, where nothing ends it."""
    import torch

    written = reference.generate(
        torch.tensor(prompt, dtype=torch.long), max_new_tokens=NEW, do_sample=False
    )
    return written[0, LENGTH:].tolist()


def write_json(file, **values):
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | values))


@pytest.fixture
def with_ends(folder, tmp_path):
    """The model in a folder whose files have these ``eos_token_id``; ``None`` writes null, and
    without ``generation`` there is no generation_config.json."""

    def load(config, **generation):
        copy = shutil.copytree(folder, tmp_path / str(len(list(tmp_path.iterdir()))))
        write_json(copy / "config.json", eos_token_id=config)
        (copy / "generation_config.json").unlink(missing_ok=True)
        if generation:
            write_json(copy / "generation_config.json", do_sample=False, **generation)
        return copy

    return load


NOT_SAID = object()


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        (5, NOT_SAID, [5]),
        ([5, 2], NOT_SAID, [2, 5]),
        ([2, 5], NOT_SAID, [2, 5]),
        ([], NOT_SAID, []),
        (None, NOT_SAID, []),
        (None, [5], [5]),
        ([], 5, [5]),
        (5, [5, 2], [2, 5]),
        (2, [], []),
        (2, None, [2]),
        (5, [2], [2, 5]),
    ],
)
def test_every_end_that_the_files_name_ends_a_text(
    with_ends, prompt, free, config, generation, ends
):
    """The numbers are places among the greedy tokens.

    Where generation_config.json leaves out tokens of config.json, transformers forgets these; here
    they count. In all other cases the tokens are those of transformers.
    """
    import torch
    from transformers import AutoModelForCausalLM

    assert free.index(free[5]) == 5 and free.index(free[2]) == 2
    ids = lambda at: at if at is None else [free[i] for i in at] if type(at) is list else free[at]
    said = {} if generation is NOT_SAID else {"eos_token_id": ids(generation)}
    copy = with_ends(ids(config), **said, **({"pad_token_id": 0} if said else {}))
    ours = conlens_jax.load_model(copy, unroll=1)
    assert sorted(ours.config.eos_token_ids) == sorted(ids(ends))
    written = np.asarray(ours.generate(prompt, NEW))[0].tolist()
    stop = min(ends, default=NEW - 1)
    assert written == free[: stop + 1] + [free[stop]] * (NEW - 1 - stop)
    if (config, generation) not in ((5, [2]), (2, None)):
        theirs = AutoModelForCausalLM.from_pretrained(copy)
        with torch.no_grad():
            theirs = theirs.generate(torch.tensor(prompt, dtype=torch.long), max_new_tokens=NEW)
        assert theirs[0, LENGTH:].tolist() == free[: stop + 1]


def test_ends_survive_writing_and_reading(with_ends, tmp_path):
    for place, (config, other) in enumerate([([7, 9], 11), (None, [7]), ([], [])]):
        folder = with_ends(config, eos_token_id=other)
        shape = read_config(folder)
        again = tmp_path / f"again {place}"
        save_model(again, shape, load_params(folder, shape))
        assert read_config(again) == shape


@pytest.mark.parametrize("value", ["</s>", 2.0, True, [2, "</s>"], [[2]], {}])
def test_ends_that_are_no_tokens(with_ends, value):
    with pytest.raises(ValueError, match=r"config\.json.*\n?.*eos_token_id=.*must be a token id"):
        read_config(with_ends(value))
    message = r"generation_config\.json: eos_token_id=.*must be a token id"
    with pytest.raises(ValueError, match=message):
        read_config(with_ends(2, eos_token_id=value))
