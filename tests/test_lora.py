"""Low-rank adapters against the same model with the product added to its matrices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_lens import (
    BATCH,
    TEXT_LEN,
    cosine,
    plain_text,
    relative_error,
    teacher_forced_logits,
    text_logits,
    tiny_batch,
    tiny_lens,
    tiny_noise,
    tiny_original,
    tiny_spec,
)
from tiny_models import random_tokens

from conlens_jax.config import (
    ConfigError,
    ExperimentConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    WarmConfig,
    from_config_dict,
    to_config_dict,
)
from conlens_jax.lens.decoder import generate
from conlens_jax.lens.encoder import encode_tokens
from conlens_jax.lens.objective import Objective, warm_loss
from conlens_jax.lens.sharding import lens_shardings
from conlens_jax.lens.spec import decoder_of, encoder_of, init_lens
from conlens_jax.parallel.mesh import make_mesh
from conlens_jax.training.accounting import parameter_table
from conlens_jax.training.checkpoint import Checkpoints, restore_params
from conlens_jax.training.optimizer import (
    apply_updates,
    learning_rate_multipliers,
    make_optimizer,
)

RANK, ALPHA, SCALE = 3, 4.5, 1.5
ALL = ("query", "key", "value", "attention_out", "gate", "up", "down")
# The tiny model: width 32, 4 heads and 2 key-value heads of 8, MLP width 40.
INPUTS = {name: 40 if name == "down" else 32 for name in ALL}
OUTPUTS = {"query": 32, "key": 16, "value": 16, "attention_out": 32, "gate": 40, "up": 40}
OUTPUTS["down"] = 32


def lora_spec(targets: str = ",".join(ALL), **changes):
    kinds = {"train_decoder": "lora", "train_encoder": "lora"}
    lora = {"lora_rank": RANK, "lora_alpha": ALPHA, "lora_targets": targets}
    return tiny_spec(**{**kinds, **lora, **changes})


def merged(parts, base):
    """A side of the lens as a dense clone: W + scale · A · B in place of W."""
    layers = dict(base["layers"])
    for name, adapter in parts["lora"].items():
        first, second = adapter["in"], adapter["out"]
        product = first.reshape(len(first), -1, RANK) @ second.reshape(len(second), RANK, -1)
        dense = layers[name][: len(first)]
        layers[name] = dense + SCALE * product.reshape(dense.shape)
    dense_parts = {name: part for name, part in parts.items() if name != "lora"}
    return {**dense_parts, "base": {**base, "layers": layers}}


def merged_encoder(parts, original, spec):
    dense = merged(parts, original)
    layers = {name: x[: spec.layer + 1] for name, x in dense["base"]["layers"].items()}
    return {**dense, "base": {"embedding": original["embedding"], "layers": layers}}


@functools.partial(jax.jit, static_argnames="spec")
def everything(trainable, frozen, activation_BD, noise_BTV, text_BT, *, spec):
    """Logits of given text, sampled text, and the reading of given text."""
    decoder = decoder_of(trainable, frozen)
    return {
        "logits": teacher_forced_logits(decoder, activation_BD, text_BT, spec=spec),
        "sampled": generate(decoder, activation_BD, noise_BTV, spec=spec),
        "read": encode_tokens(encoder_of(trainable, frozen, spec), text_BT, spec=spec),
    }


def inputs(spec, frozen):
    activation_BD = tiny_batch(spec, frozen["original"]).activation_BD
    return activation_BD, tiny_noise(), jnp.asarray(random_tokens(BATCH, TEXT_LEN))


# --- values -------------------------------------------------------------------------------------


def test_the_start_is_the_frozen_lens_bit_for_bit():
    frozen_spec, spec = tiny_spec(train_decoder="frozen", train_encoder="frozen"), lora_spec()
    mean_D = np.linspace(-1, 1, 32)
    lenses = [init_lens(tiny_original(spec), each, mean_D, 0.5) for each in (frozen_spec, spec)]
    found = [
        everything(*lens, *inputs(spec, lens[1]), spec=each)
        for lens, each in zip(lenses, (frozen_spec, spec), strict=True)
    ]
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize(
    ("targets", "changes"),
    [
        (",".join(ALL), {}),
        ("query, value", {"remat": "full", "layer": 2}),
        ("key,attention_out,down", {"tied": True, "layer": 0, "train_output_head": True}),
    ],
    ids=["all", "two", "three"],
)
def test_adapters_are_the_dense_model_with_their_product_added(targets, changes):
    spec = lora_spec(targets, **changes)
    trainable, frozen = tiny_lens(spec)
    names = {name.strip() for name in targets.split(",")}
    assert all(set(trainable[side]["lora"]) == names for side in ("decoder", "encoder"))
    dense = {
        "decoder": merged(trainable["decoder"], frozen["original"]),
        "encoder": merged_encoder(trainable["encoder"], frozen["original"], spec),
    }
    given = inputs(spec, frozen)
    found = everything(trainable, frozen, *given, spec=spec)
    expected = everything(dense, frozen, *given, spec=spec)
    np.testing.assert_array_equal(found["sampled"], expected["sampled"])
    for name in ("logits", "read"):
        assert relative_error(found[name], expected[name]) < 1e-5
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5)
    without = {
        side: {name: part for name, part in parts.items() if name != "lora"}
        for side, parts in trainable.items()
    }
    plain = everything(without, frozen, *given, spec=spec)
    for name in ("logits", "read"):  # the adapters do something
        assert relative_error(plain[name], expected[name]) > 0.01


# --- gradients ----------------------------------------------------------------------------------


def test_gradient_through_sampled_text_is_that_of_autodiff_on_the_dense_model():
    spec = lora_spec()
    trainable, frozen = tiny_lens(spec)
    activation_BD, noise_BTV, _ = inputs(spec, frozen)
    text_BT = everything(trainable, frozen, activation_BD, noise_BTV, _, spec=spec)["sampled"]
    cotangent = np.random.default_rng(5).standard_normal(noise_BTV.shape).astype(np.float32)
    tau = jnp.float32(1.0)

    def ours(decoder, frozen):
        parts = decoder_of({"decoder": decoder}, frozen)
        logits = text_logits(parts, activation_BD, text_BT, noise_BTV, tau, spec)
        return jnp.sum(logits * cotangent)

    def theirs(decoder, frozen):
        dense = {"decoder": merged(decoder, frozen["original"])}
        logits, _ = plain_text(dense, frozen, activation_BD, noise_BTV, tau, spec)
        return jnp.sum(logits * cotangent)

    found, expected = (jax.jit(jax.grad(f))(trainable["decoder"], frozen) for f in (ours, theirs))
    assert set(found) == {"lora", "projection", "soft_prompt"}
    assert jax.tree.structure(found["lora"]) == jax.tree.structure(trainable["decoder"]["lora"])
    assert relative_error(found, expected) < 1e-5  # and no leaf of the oracle is zero
    assert cosine(found["lora"], expected["lora"]) > 1 - 1e-9


def test_no_gradient_of_a_shared_matrix_is_computed():
    """A full clone's program has matrix products of the shape of its weights; this one's has not:
    rows × positions (64) is neither of the sizes of the gate's matrix (32, 40)."""

    def weight_gradients(spec) -> int:
        trainable, frozen = tiny_lens(spec)
        activation_BD, noise_BTV, text_BT = inputs(spec, frozen)

        def loss(trainable, frozen):
            parts, reader = decoder_of(trainable, frozen), encoder_of(trainable, frozen, spec)
            tau = jnp.float32(1.0)
            logits = text_logits(parts, activation_BD, text_BT, noise_BTV, tau, spec)
            return jnp.sum(logits**2) + jnp.sum(encode_tokens(reader, text_BT, spec=spec) ** 2)

        program = jax.jit(jax.grad(loss)).lower(trainable, frozen).compile().as_text()
        products = [
            line for line in program.splitlines() if " dot(" in line or "custom-call" in line
        ]
        assert products
        results = [line.partition("=")[2].split("{")[0].strip() for line in products]
        return sum(result in ("f32[32,40]", "f32[40,32]") for result in results)

    history = {"history_gradient": "sweeps", "history_sweeps": 1}
    assert weight_gradients(lora_spec(**history)) == 0
    assert weight_gradients(tiny_spec(**history)) > 0


# --- storage ------------------------------------------------------------------------------------


def test_the_base_is_the_originals_own_arrays():
    spec = lora_spec()
    original = tiny_original(spec)
    pointers = {path: leaf.unsafe_buffer_pointer() for path, leaf in named(original)}
    trainable, frozen = init_lens(original, spec, np.zeros(32), 1.0)
    assert frozen["original"] is original
    decoder, encoder = decoder_of(trainable, frozen), encoder_of(trainable, frozen, spec)
    for base in (frozen["original"], decoder.base):
        for path, leaf in named(original):
            here = functools.reduce(lambda tree, key: tree[key], path, base)
            assert here is leaf and here.unsafe_buffer_pointer() == pointers[path]
    assert encoder.base["embedding"] is original["embedding"]
    lora = trainable["encoder"]["lora"]
    assert {len(leaf) for leaf in jax.tree.leaves(lora)} == {spec.layer + 1}
    owned = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(trainable)}
    assert not owned & set(pointers.values())  # the optimizer may overwrite these


def named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(tuple(key.key for key in path), leaf) for path, leaf in leaves]


def test_initial_adapters_are_normal_and_zero_and_follow_the_seed():
    spec = lora_spec()
    lens = [init_lens(tiny_original(spec), spec, np.zeros(32), 1.0, seed=s)[0] for s in (0, 0, 1)]
    jax.tree.map(np.testing.assert_array_equal, lens[0], lens[1])
    for name in ALL:
        first, again = (each["decoder"]["lora"][name] for each in (lens[0], lens[2]))
        assert not np.any(first["out"])
        assert np.all(first["in"] != again["in"])
        assert float(np.std(first["in"])) == pytest.approx(INPUTS[name] ** -0.5, rel=0.2)
        other = lens[0]["encoder"]["lora"][name]["in"]
        assert np.all(first["in"][: len(other)] != other)


def test_bfloat16_keeps_its_type():
    spec = lora_spec(dtype="bfloat16")
    trainable, frozen = tiny_lens(spec)
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype(jnp.bfloat16)}
    found = everything.eval_shape(trainable, frozen, *inputs(spec, frozen), spec=spec)
    assert found["logits"].dtype == found["read"].dtype == jnp.float32


def test_table_counts_every_parameter_and_byte():
    spec = lora_spec(layer=1)
    trainable, frozen = init_lens(tiny_original(spec), spec, np.zeros(32), 1.0)
    _, rows = parameter_table(trainable, frozen, spec)
    table = {name: tuple(rest) for name, *rest in rows}
    per_layer = sum(RANK * (INPUTS[name] + OUTPUTS[name]) for name in ALL)
    count = lambda n, of=4: (f"{n:,}", *[f"{n * of:,}"] * 2)  # one device has it all
    assert table["decoder lora"] == ("trained", *count(3 * per_layer))
    assert table["encoder lora"] == ("trained", *count(2 * per_layer))
    assert table["decoder projection"] == ("trained", *count(32 * 32 + 32))
    layer = sum(INPUTS[name] * OUTPUTS[name] for name in ALL) + 2 * 32
    whole = 2 * 48 * 32 + 32 + 3 * layer
    assert table["original model"] == ("frozen", *count(whole))
    assert table["decoder base"] == ("shared with the original", *count(whole, 0))
    assert table["encoder base"] == ("shared with the original", *count(48 * 32 + 2 * layer, 0))
    prompts = (4 + 4) * 32
    trained = 5 * per_layer + 2 * (32 * 32 + 32) + prompts
    assert table["total trained"] == ("", *count(trained))
    full = parameter_table(*tiny_lens(tiny_spec()), tiny_spec())[1]
    assert not any(kind.startswith("shared") for _, kind, *_ in full)


def test_adapters_go_through_a_checkpoint(tmp_path):
    spec = lora_spec("query,up")
    trainable, _ = tiny_lens(spec)
    with Checkpoints(tmp_path, keep_latest=1, keep_best=0) as checkpoints:
        checkpoints.save(1, {"params": trainable}, {})
    template = jax.eval_shape(lambda: trainable)
    found = restore_params(tmp_path, 1, template)
    jax.tree.map(np.testing.assert_array_equal, found, trainable)


def test_on_a_mesh_adapters_are_split_and_give_the_same_logits():
    spec = lora_spec()
    trainable, frozen = tiny_lens(spec)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = tuple(
        jax.device_put(part, lens_shardings(part, spec.model, mesh)) for part in (trainable, frozen)
    )
    lora = placed[0]["decoder"]["lora"]
    specs = {
        (target, side): matrix.sharding.spec
        for target, adapter in lora.items()
        for side, matrix in adapter.items()
    }
    assert specs["query", "in"] == P(None, "fsdp", None)
    assert specs["query", "out"] == P(None, None, "tensor", None)
    assert specs["down", "in"] == P(None, "tensor", None)  # mesh.fsdp does not divide the rank
    assert specs["down", "out"] == P(None, None, "fsdp")
    assert placed[0]["decoder"]["projection"]["kernel"].sharding.spec == P("fsdp", None)
    even = {"lora": {"down": {"in": jax.ShapeDtypeStruct((2, 40, 4), jnp.float32)}}}
    found = lens_shardings(even, spec.model, mesh)
    assert found["lora"]["down"]["in"].spec == P(None, "tensor", "fsdp")
    gate = placed[1]["original"]["layers"]["gate"]
    assert not gate.sharding.is_fully_replicated
    given = inputs(spec, frozen)
    force = jax.jit(
        lambda lens, activation, text: teacher_forced_logits(
            decoder_of(*lens), activation, text, spec=spec
        )
    )
    alone = force((trainable, frozen), given[0], given[2])
    np.testing.assert_allclose(force(placed, given[0], given[2]), alone, rtol=0, atol=2e-5)


# --- training -----------------------------------------------------------------------------------


def test_a_few_steps_lower_the_loss_and_change_only_the_trained_parts():
    spec = lora_spec(train_projections=False, train_soft_prompt=False)
    trainable, frozen = init_lens(tiny_original(spec), spec, np.zeros(32), 1.0)
    assert {side: set(parts) for side, parts in trainable.items()} == {
        "decoder": {"lora"},
        "encoder": {"lora"},
    }
    batch = tiny_batch(spec, frozen["original"])
    objective = Objective(LossConfig(), WarmConfig(before=3, after=1), spec)
    config = OptimizerConfig(lora_multiplier=2.0)
    optimizer = make_optimizer(config, trainable, learning_rate=lambda step: 5e-3)
    before = jax.tree.map(np.array, frozen)

    @jax.jit
    def step(trainable, state, frozen):
        loss = functools.partial(warm_loss, objective=objective)
        (total, _), gradient = jax.value_and_grad(loss, has_aux=True)(trainable, frozen, batch)
        updates, state = optimizer.update(gradient, state, trainable)
        return apply_updates(trainable, updates), state, total

    start, state, losses = trainable, optimizer.init(trainable), []
    for _ in range(12):
        trainable, state, total = step(trainable, state, frozen)
        losses.append(float(total))
    assert losses[-1] < 0.8 * losses[0], losses
    for leaf, first in zip(jax.tree.leaves(trainable), jax.tree.leaves(start), strict=True):
        assert np.any(leaf != first)
    jax.tree.map(np.testing.assert_array_equal, frozen, before)


def test_learning_rate_multiplier():
    trainable, _ = tiny_lens(lora_spec("gate"))
    config = OptimizerConfig(lora_multiplier=7.0, encoder_multiplier=0.5)
    found = learning_rate_multipliers(config, trainable)
    assert found["decoder"]["lora"] == {"gate": {"in": 7.0, "out": 7.0}}
    assert found["encoder"]["lora"] == {"gate": {"in": 3.5, "out": 3.5}}


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lora_rank", 0, "lens.lora_rank must be at least 1, not 0"),
        ("lora_alpha", 0.0, "lens.lora_alpha must be above 0"),
        ("lora_targets", "query,wq", r"query, key, value.*down.*not 'query,wq' \('wq' among them"),
        ("lora_targets", "", "lens.lora_targets must be some of query, key"),
        ("lora_targets", "up,up", "lens.lora_targets.*twice"),
        ("train_encoder", "adapter", "lens.train_encoder must be one of full, frozen, lora"),
    ],
)
def test_impossible_values_are_named(field, value, message):
    config = to_config_dict(ExperimentConfig())
    config.lens[field] = value
    with pytest.raises(ConfigError, match=message):
        from_config_dict(config)


def test_targets_may_be_written_with_spaces():
    config = to_config_dict(ExperimentConfig())
    config.lens.lora_targets = "query, down"
    assert from_config_dict(config).lens.lora_target_names == ("query", "down")
