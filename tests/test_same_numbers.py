"""The joint step gives the same losses and the same texts on every mesh."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_plan import config_of
from tiny_models import write_tiny_folder

from conlens_jax.config import MeshConfig
from conlens_jax.data.device_batches import make_batch
from conlens_jax.data.rows import Rows
from conlens_jax.lens.gumbel import Purpose, example_keys
from conlens_jax.lens.objective import prepare
from conlens_jax.lens.sharding import lens_shardings
from conlens_jax.lens.spec import init_lens
from conlens_jax.lens.vocabulary import noise_of_texts
from conlens_jax.models.model import load_model
from conlens_jax.parallel.mesh import batch_sharding, make_mesh
from conlens_jax.planning.lens import make_plan
from conlens_jax.planning.model_source import planned_model
from conlens_jax.training.state import init_state, stage_optimizer, stages_of

STEPS, ROWS, LENGTH = 20, 16, 12
MESHES = {
    "2 devices": (MeshConfig(fsdp=2), 2),
    "4 devices": (MeshConfig(data=2, tensor=2), 4),
    "data8": (MeshConfig("data8"), 8),
    "fsdp8": (MeshConfig("fsdp8"), 8),
    "fsdp2_tensor4": (MeshConfig("fsdp2_tensor4"), 8),
    "multislice": (MeshConfig("multislice", slices=2), 8),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_folder(folder, num_key_value_heads=4, num_hidden_layers=2)
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    return train(folder, MeshConfig("single"), 1)


def random_rows(vocab_size: int) -> Rows:
    rng = np.random.default_rng(5)
    return Rows(
        rng.normal(size=(ROWS, 32)).astype(np.float32),
        rng.integers(3, vocab_size, (ROWS, LENGTH)).astype(np.int32),
        rng.integers(4, LENGTH - 2, ROWS).astype(np.int32),
        np.full(ROWS, LENGTH, np.int32),
        np.arange(ROWS),
    )


def train(folder: Path, mesh_config: MeshConfig, n_devices: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses [steps] and texts [steps, B, T] of a joint stage."""
    config = config_of(
        folder,
        **{"model.layer": 0, "lens.text_len": 3, "warm.before": 2, "warm.after": 1},
        **{"joint.batch_size": ROWS, "warm.batch_size": ROWS, "joint.rows_per_document": 1},
        **{"joint.steps": STEPS, "loss.kl_horizon": 2, "dump.seq_len": LENGTH, "dump.after": 2},
        **{"dump.min_position": 4, "loss.lm_reference": "text", "mesh.data": 0},
        **{"mesh.fsdp": 1, "mesh.tensor": 1, "dump.batch_size": ROWS, "evaluate.batch_size": ROWS},
        **{"evaluate.kl_horizon": 2},
    )
    mesh = make_mesh(mesh_config, jax.devices()[:n_devices])
    plan = make_plan(config, planned_model(config), mesh)
    joint = stages_of(config)[1]
    model = load_model(folder, mesh=mesh, unroll=1)
    trainable, frozen = init_lens(model.params, plan.spec, np.ones(32, np.float32) / 8, 1.0)
    place = lambda tree: jax.device_put(tree, lens_shardings(tree, model.config, mesh))
    trainable = place(trainable)
    optimizer = stage_optimizer(joint, trainable, config.dump.n_samples)
    state, step = place(init_state(trainable, optimizer)), plan.step(joint)
    batch = make_batch(random_rows(model.config.vocab_size), batch_sharding(mesh), ROWS)

    def step_and_text(state, frozen, batch):
        keys_B = example_keys(
            config.train.seed, state.step, batch.examples_B, Purpose.TRAINING_TEXT
        )
        spec = plan.spec
        noise = noise_of_texts(keys_B, spec.text_len, spec.model.vocab_size, jnp.float32(1))
        text_BT = prepare(state.params, frozen, batch, noise, objective=plan.objective).text_BT
        new, metrics = step(state, frozen, batch)
        return new, metrics["loss"], text_BT

    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    with jax.set_mesh(mesh):
        run = jax.jit(step_and_text, out_shardings=(where, None, None))
        run = run.lower(state, frozen, batch).compile()
    losses, texts = [], []
    for _ in range(STEPS):
        state, loss, text_BT = run(state, frozen, batch)
        losses.append(float(loss))
        texts.append(np.asarray(text_BT))
    return np.array(losses), np.stack(texts)


@pytest.mark.parametrize("name", MESHES)
def test_twenty_steps_are_the_same_on_every_mesh(name, folder, alone, capfd):
    losses, texts = train(folder, *MESHES[name])
    expected_losses, expected_texts = alone
    np.testing.assert_array_equal(texts, expected_texts)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    # It does train, and what it samples changes with it.
    assert losses[-1] < losses[0] and (texts[0] != texts[-1]).any()
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
