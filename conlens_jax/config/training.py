"""Settings of training: the stages, their optimizers, checkpoints and logs."""

from __future__ import annotations

import dataclasses

from conlens_jax.config.lens import ScheduleConfig


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW for one stage. The learning rate of a part is ``learning_rate`` times its multiplier;
    the encoder's applies to all of the encoder, on top of the others."""

    # Of the decoder's and encoder's base weights, per optimizer step.
    learning_rate: ScheduleConfig = ScheduleConfig("cosine", 1e-3, 1e-4, warmup=10)
    b1: float = 0.9  # decay rate of the gradient's running mean
    b2: float = 0.98  # decay rate of the squared gradient's running mean
    weight_decay: float = 0.0  # decoupled, on matrices only, times the learning rate
    clip_norm: float = 1.0  # the gradient of all parameters is scaled down to at most this norm
    projection_multiplier: float = 3.0  # of the projections
    soft_prompt_multiplier: float = 3.0  # of the soft prompts
    head_multiplier: float = 1.0  # of the output head
    # Of the adapters, which learn faster than a clone: with multipliers 1, 3, 6 and 10 the loss
    # that lens.lora_targets is compared by was 2.21, 1.93, 1.94 and 2.72.
    lora_multiplier: float = 3.0
    patch_multiplier: float = 3.0  # of lens.input_patches
    encoder_multiplier: float = 1.0  # of the whole encoder
    accumulate: int = 1  # micro-batches per optimizer step
    max_bad_steps: int = 10  # so many non-finite steps in a row stop the run


@dataclasses.dataclass(frozen=True)
class WarmConfig:
    """The self-supervised warm start: E learns to read a real window of text around P back into a,
    D learns to write that window from a."""

    steps: int = 400  # optimizer steps; 0: no warm start
    batch_size: int = 64  # rows per optimizer step
    before: int = 5  # source tokens of the window up to P, P included
    after: int = 3  # tokens of the window after P; before + after is lens.text_len
    # Each token of a target is replaced by lens.gap_token with this probability, for E to read and
    # for D to write: D then learns to leave out what it would get wrong more often than that.
    # Of "words" only those of the context are, after target.separator.
    gap_rate: float = 0.0
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=ScheduleConfig("cosine", 2e-3, 2e-4, warmup=10)
    )


@dataclasses.dataclass(frozen=True)
class JointConfig:
    """The joint stage: the loss of the lens through D's own text."""

    steps: int = 300  # optimizer steps; 0: no joint stage
    batch_size: int = 64  # rows per optimizer step
    # So many consecutive rows of a batch are of one document, and M reads its context once for all
    # of them. joint.batch_size must be a multiple of it; dump.positions_per_sequence should be one
    # too, or a document's last rows are never read.
    rows_per_document: int = 1
    optimizer: OptimizerConfig = OptimizerConfig()


@dataclasses.dataclass(frozen=True)
class ControlConfig:
    """The matched-compute control: from the end of the warm start, the warm start's own objective
    for as long as the joint stage took. Its folder is ``<run_dir>/control``."""

    enabled: bool = False  # whether the stage runs, after the joint stage
    steps: int = 0  # optimizer steps; 0: as many as the joint stage's compute time pays for
    optimizer: OptimizerConfig = OptimizerConfig()


@dataclasses.dataclass(frozen=True)
class BaselineConfig:
    """An encoder that is trained, from the same start, to read the true last ``lens.text_len``
    source tokens: what repeating the recent context would be worth. Its folder is
    ``<run_dir>/baseline``."""

    steps: int = 0  # optimizer steps; 0: no baseline
    batch_size: int = 64  # rows per optimizer step
    optimizer: OptimizerConfig = WarmConfig().optimizer


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    seed: int = 0  # of the initial lens, the order of the rows and the sampled texts
    # Whose lens (not optimizer) is the start: a run folder, a checkpoint, a saved lens, or the name
    # of one that comes with this package.
    init_from: str = ""
    resume: bool = True  # continue from the newest checkpoint of run_dir, if there is one
    # Folder of compiled programs, so that the same run starts faster the next time; empty: none.
    compile_cache: str = ""
    log_every: int = 20  # steps between lines on the console
    validate_every: int = 100  # steps between validations
    sample_every: int = 100  # steps between explanations that are printed to read
    validation_rows: int = 256  # held-out rows per validation
    n_verbose_samples: int = 3  # rows whose explanations are printed


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints stay. The last ones of the warm start and of the run always do."""

    every: int = 100  # steps between checkpoints
    keep_latest: int = 2  # the newest that stay
    keep_best: int = 1  # the best by validation that stay besides


@dataclasses.dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases, beside the files of the run folder."""

    mode: str = "offline"  # or "online", "disabled"
    project: str = "conlens_jax"  # where the run is listed
    name: str = ""  # of the run; empty: the name of the run folder
