"""A run as shapes: the lens, its train state and its batches, with shardings.

They are created by the same functions as in training (:func:`~conlens_jax.lens.spec.init_lens`,
:func:`~conlens_jax.training.state.init_state`), evaluated on shapes alone.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import PyTree

from conlens_jax.config import ExperimentConfig
from conlens_jax.lens.batch import Batch
from conlens_jax.lens.objective import Objective
from conlens_jax.lens.sharding import lens_shardings
from conlens_jax.lens.spec import LensSpec, init_lens, make_spec
from conlens_jax.models.families import family_of
from conlens_jax.models.param_table import Params, abstract_params
from conlens_jax.models.sharding import param_shardings
from conlens_jax.models.transformer_config import TransformerConfig
from conlens_jax.parallel.mesh import batch_sharding
from conlens_jax.planning.flops import Workload
from conlens_jax.planning.model_source import PlannedModel
from conlens_jax.training.session import check_batches, check_context, make_objective
from conlens_jax.training.state import (
    Stage,
    Step,
    TrainState,
    init_state,
    make_step,
    stage_optimizer,
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The shapes of a lens on a mesh.

    Attributes:
      model: the model, without weights.
      mesh: with devices (which allows compiling) or abstract.
      trainable, frozen: the lens, as ``jax.ShapeDtypeStruct`` with shardings.
    """

    config: ExperimentConfig
    model: PlannedModel
    objective: Objective
    mesh: Mesh | AbstractMesh
    trainable: Params
    frozen: Params

    @property
    def spec(self) -> LensSpec:
        return self.objective.spec

    def frozen_in(self, stage: Stage) -> Params:
        """The frozen parts in a stage: the joint stage keeps the warm decoder as a reference."""
        if stage.supervised:
            return self.frozen
        return {**self.frozen, "warm_decoder": self.trainable["decoder"]}

    def state(self, stage: Stage) -> TrainState:
        optimizer = stage_optimizer(stage, self.trainable, self.config.dump.n_samples)
        state = jax.eval_shape(lambda lens: init_state(lens, optimizer), self.trainable)
        return on_mesh(state, self.spec.model, self.mesh)

    def batch(self, stage: Stage) -> Batch:
        """The rows of a step; without activations if the step captures them itself."""
        rows, contexts = stage.batch_size, stage.batch_size // stage.rows_per_document
        width = 0 if self.config.data.source == "stream" else self.spec.model.d_model
        sharding = batch_sharding(self.mesh)
        rows_of = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        has_targets = self.objective.target != "window"
        target = rows_of((rows, self.spec.text_len), jnp.int32) if has_targets else None
        return Batch(
            rows_of((rows, width), jnp.float32),
            rows_of((contexts, self.config.dump.seq_len), jnp.int32),
            rows_of((contexts,), jnp.int32),
            rows_of((rows,), jnp.int32),
            rows_of((rows,), jnp.int32),
            target,
        )

    def step(self, stage: Stage) -> Step:
        """The jitted train step of the run."""
        n_rows = self.config.dump.n_samples
        return make_step(
            stage,
            self.objective,
            stage_optimizer(stage, self.trainable, n_rows),
            seed=self.config.train.seed,
            n_rows=n_rows,
            state_shardings=jax.tree.map(lambda leaf: leaf.sharding, self.state(stage)),
        )

    def workload(self, stage: Stage) -> Workload:
        """For the FLOP counts, with positions spread evenly over the range of the dump."""
        dump = self.config.dump
        last = dump.max_position or dump.seq_len - 1 - dump.after
        positions = np.linspace(dump.min_position, last, stage.batch_size).round().astype(np.int32)
        batch = self.batch(stage).replace(positions_B=positions)
        frozen = self.frozen_in(stage)
        return Workload(self.model.name, self.config, self.objective, self.trainable, frozen, batch)


def make_plan(config: ExperimentConfig, model: PlannedModel, mesh: Mesh | AbstractMesh) -> Plan:
    """Checks what training checks before it starts, and builds the shapes.

    Raises:
      ValueError: a batch, context, layer, prompt or dimension does not fit the model or the mesh.
    """
    check_batches(config, mesh)
    check_context(config, model.shape, model.name)
    spec = make_spec(model.shape, config.model.layer, config.lens, model.tokenizer)
    table = family_of(model.shape).param_table(model.shape)
    original = jax.tree.map(
        _with_sharding,
        abstract_params(table, model.shape),
        param_shardings(table, model.shape, mesh),
    )
    trainable, frozen = jax.eval_shape(
        lambda original: init_lens(original, spec, np.zeros(model.shape.d_model), 1.0), original
    )
    others = {name: part for name, part in frozen.items() if name != "original"}
    trainable, others = on_mesh((trainable, others), model.shape, mesh)
    frozen = {"original": original, **others}
    objective = make_objective(config, spec, model.tokenizer)
    return Plan(config, model, objective, mesh, trainable, frozen)


def on_mesh(tree: PyTree, model: TransformerConfig, mesh: Mesh | AbstractMesh) -> PyTree:
    """Shapes of a lens or its train state, with the shardings of training."""
    return jax.tree.map(_with_sharding, tree, lens_shardings(tree, model, mesh))


def _with_sharding(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
