"""The whole configuration: a page of sections. Each field is documented beside it, in the file of
its section."""

from __future__ import annotations

import dataclasses

from conlens_jax.config.data import CorpusConfig, DataConfig, DumpConfig
from conlens_jax.config.devices import DistributedConfig, LaunchConfig, MeshConfig, ProfileConfig
from conlens_jax.config.evaluation import EvaluateConfig
from conlens_jax.config.lens import LensConfig, LossConfig
from conlens_jax.config.model import EmbeddedConfig, ModelConfig
from conlens_jax.config.target import TargetConfig
from conlens_jax.config.training import (
    BaselineConfig,
    CheckpointConfig,
    ControlConfig,
    JointConfig,
    TrainConfig,
    WandbConfig,
    WarmConfig,
)


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Everything; the pages in ``configs/`` fill it in."""

    run_dir: str = "runs/lens"  # folder of the run: checkpoints, metrics, report
    model: ModelConfig = ModelConfig()
    embedded: EmbeddedConfig = EmbeddedConfig()
    corpus: CorpusConfig = CorpusConfig()
    data: DataConfig = DataConfig()
    dump: DumpConfig = DumpConfig()
    lens: LensConfig = LensConfig()
    target: TargetConfig = TargetConfig()
    loss: LossConfig = LossConfig()
    warm: WarmConfig = WarmConfig()
    joint: JointConfig = JointConfig()
    control: ControlConfig = ControlConfig()
    baseline: BaselineConfig = BaselineConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    wandb: WandbConfig = WandbConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    launch: LaunchConfig = LaunchConfig()
    profile: ProfileConfig = ProfileConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
