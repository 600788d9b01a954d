"""The whole configuration of a run, as frozen dataclasses.

A config file under ``configs/`` has a ``get_config()`` that returns an
``ml_collections.ConfigDict`` made by :func:`to_config_dict`. The entry point applies the command
line to it and calls :func:`from_config_dict` once. Behind that call there is no ``ConfigDict``:
the library sees only the dataclasses of this file, already validated.

Lengths are in tokens, learning rates per optimizer step, and an empty string means "not given".
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

EMBEDDED_MODEL = "embedded"


class ConfigError(ValueError):
    """A configuration that cannot be run; the message lists every problem with its field."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(f"  - {problem}" for problem in problems))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which language model is read, and where.

    Attributes:
      path: Hugging Face folder, hub id, or ``"embedded"``: the small model of
        :class:`EmbeddedConfig`, trained at first use.
      revision: branch, tag or commit of a hub id.
      layer: 0-based block whose output is the activation.
      dtype: ``"float32"`` or ``"bfloat16"``.
      unroll: how many layers a step of the layer scan holds; 0 unrolls all of them, which is
        faster for small models on a CPU.
      remat: ``"none"`` keeps a layer's activations for the backward pass, ``"full"`` recomputes.
    """

    path: str = EMBEDDED_MODEL
    revision: str = ""
    layer: int = 2
    dtype: str = "float32"
    unroll: int = 0
    remat: str = "none"


@dataclasses.dataclass(frozen=True)
class EmbeddedConfig:
    """The small Llama-style model that is trained on the corpus where ``model.path`` is
    ``"embedded"``. It is kept as a Hugging Face folder under ``cache_dir``, so that a second run
    finds it (the default is ``$CONLENS_CACHE``, or else ``~/.cache/conlens_jax``).

    Label smoothing keeps the model from the overconfidence that a grammar teaches; the fraction
    ``crop_fraction`` of the training rows begins in the middle of a document.
    """

    cache_dir: str = ""
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 4
    d_mlp: int = 384
    vocab_size: int = 1024
    steps: int = 400
    batch_size: int = 64
    seq_len: int = 64
    learning_rate: float = 3e-3
    label_smoothing: float = 0.03
    crop_fraction: float = 0.3
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """Where text comes from.

    Attributes:
      kind: ``"stories"`` (seeded generator), ``"stdlib"`` (documentation strings of the installed
        Python), ``"text"``, ``"jsonl"``, ``"parquet"`` (local files), or ``"huggingface"``.
      path: file, folder or glob for local files; dataset name or folder for ``"huggingface"``.
      name: configuration name of a Hugging Face dataset.
      split: split of a Hugging Face dataset that documents are read from.
      validation_split: a split of its own for validation. Empty: ``validation_fraction`` of the
        documents of ``split`` are held out, chosen by a hash of the document's index.
      text_field: column that holds the text.
      streaming: read a Hugging Face dataset without downloading it first.
      n_documents: how many documents to read at most (0: all; the story generator needs a number).
      seed: seed of the story generator.
    """

    kind: str = "stories"
    path: str = ""
    name: str = ""
    split: str = "train"
    validation_split: str = ""
    text_field: str = "text"
    streaming: bool = True
    validation_fraction: float = 0.05
    n_documents: int = 40_000
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class DumpConfig:
    """Corpus to activation cache.

    Attributes:
      cache_dir: the folder; it gets ``train/`` and ``validation/``.
      seq_len: context length S; longer documents are cut, shorter ones padded on the right.
      n_samples: rows of the training split; n_validation_samples: of the validation split.
      positions_per_sequence: rows taken from one document.
      min_position, max_position: the range of positions P, both ends included. A row also needs
        ``after`` tokens behind P. ``max_position = 0`` means the last one that is possible.
      add_bos: begin every context with the tokenizer's bos token, where it has one.
      after: how many true tokens must follow P (the KL horizon and the warm start read them).
      dtype: ``"float32"`` or ``"bfloat16"`` on disk.
    """

    cache_dir: str = "cache"
    seq_len: int = 64
    n_samples: int = 32_768
    n_validation_samples: int = 2_048
    positions_per_sequence: int = 4
    min_position: int = 8
    max_position: int = 0
    after: int = 4
    add_bos: bool = True
    batch_size: int = 64
    rows_per_shard: int = 4_096
    dtype: str = "float32"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """A number that depends on the step.

    Attributes:
      kind: ``"constant"``, ``"linear"``, ``"cosine"`` or ``"exponential"`` from start to end.
      start, end: first and last value (``constant`` uses ``start`` alone).
      length: how long the way from start to end is; 0 means to the end of the stage.
      warmup: at first the value rises linearly from 0 to ``start`` over this long.
      unit: ``"steps"`` or ``"epochs"`` (passes over the training rows), of length and warmup.
    """

    kind: str = "constant"
    start: float = 0.0
    end: float = 0.0
    length: float = 0.0
    warmup: float = 0.0
    unit: str = "steps"


def constant(value: float) -> ScheduleConfig:
    return ScheduleConfig(start=value)


def schedule(kind: str, start: float, end: float = 0.0, **fields: Any) -> dict[str, Any]:
    """A schedule as a config file sets it: ``config.loss.kl = schedule("linear", 0.1, 0.3)``."""
    return dataclasses.asdict(ScheduleConfig(kind, start, end, **fields))


@dataclasses.dataclass(frozen=True)
class LensConfig:
    """The shape of the lens.

    Attributes:
      text_len: T, tokens of an explanation.
      decoder_prompt: text with exactly one ``<embed>``, the slot of the activation.
      encoder_prompt: text with exactly one ``<text>``, the place of the explanation; the
        reconstruction is read at the last position.
      soft_prompt_init: ``"text"`` starts trainable prompt vectors at the prompt's embeddings.
      train_decoder, train_encoder: ``"full"`` trains a clone, ``"frozen"`` shares M's weights.
      train_projections, train_soft_prompt, train_output_head: the other parts.
      dual_path: swap in â + Δ with Δ = a' − E(D(a')) instead of â alone.
      stop_gradient_delta: no gradient through Δ.
      history_gradient: the straight-through gradient through the decoder's own sampled tokens:
        ``"exact"``, ``"sweeps=k"`` or ``"detached"``.
    """

    text_len: int = 8
    decoder_prompt: str = "Short explanation of <embed>:"
    encoder_prompt: str = "<text>"
    train_decoder: str = "full"
    train_encoder: str = "full"
    train_projections: bool = True
    train_soft_prompt: bool = True
    train_output_head: bool = False
    dual_path: bool = True
    stop_gradient_delta: bool = True
    history_gradient: str = "sweeps=1"


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the loss (DESIGN: w_lm L_LM + w_kl L_KL + w_mse L_MSE + w_text L_text − w_ent H).

    Attributes:
      tau: Gumbel-Softmax temperature of the backward pass, at least 0.1.
      mse_kind: ``"direction"`` (‖n(â) − n(a)‖²/d) or ``"raw"`` (‖â − a‖² / E‖a‖²).
      lm_reference: whose next-token distribution L_LM compares the decoder's with: ``"text"``
        (M on the explanation alone), ``"prompt"`` (M under the decoder's text prompt) or
        ``"warm"`` (the decoder as the warm start left it).
      kl_horizon: h, how many predictions from P on the KL looks at (teacher-forced).
      text: weight of the supervised anchor, the warm start's own loss on real text windows.
    """

    lm: ScheduleConfig = constant(0.003)
    kl: ScheduleConfig = constant(0.1)
    mse: ScheduleConfig = constant(1.0)
    entropy: ScheduleConfig = constant(0.0)
    text: ScheduleConfig = constant(0.0)
    tau: ScheduleConfig = constant(1.0)
    mse_kind: str = "direction"
    lm_reference: str = "warm"
    kl_horizon: int = 1


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW for one stage.

    Attributes:
      learning_rate: of the decoder's and encoder's base weights, as a schedule.
      projection_multiplier, soft_prompt_multiplier, head_multiplier, encoder_multiplier: the
        learning rate of these parts is ``learning_rate`` times this (the encoder's multiplier
        applies to all of the encoder, on top of the others).
      accumulate: micro-batches per optimizer step.
      max_bad_steps: so many non-finite steps in a row stop the run.
    """

    learning_rate: ScheduleConfig = ScheduleConfig("cosine", 1e-3, 1e-4, warmup=10)
    b1: float = 0.9
    b2: float = 0.98
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    projection_multiplier: float = 3.0
    soft_prompt_multiplier: float = 3.0
    head_multiplier: float = 1.0
    encoder_multiplier: float = 1.0
    accumulate: int = 1
    max_bad_steps: int = 10


@dataclasses.dataclass(frozen=True)
class WarmConfig:
    """The self-supervised warm start: E learns to read a real window of text around P back into
    a, D learns to write that window from a. ``before`` source tokens up to and including P, and
    ``after`` tokens behind it; together they are ``lens.text_len``."""

    steps: int = 400
    batch_size: int = 64
    before: int = 5
    after: int = 3
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=ScheduleConfig("cosine", 2e-3, 2e-4, warmup=10)
    )


@dataclasses.dataclass(frozen=True)
class JointConfig:
    """The joint stage: the loss of the lens through D's own text."""

    steps: int = 300
    batch_size: int = 64
    optimizer: OptimizerConfig = OptimizerConfig()


@dataclasses.dataclass(frozen=True)
class ControlConfig:
    """The matched-compute control: from the end of the warm start, the warm start's own objective
    for as long as the joint stage took. It lies in ``<run_dir>/control``.

    ``steps = 0`` takes as many steps as the joint stage's compute time pays for.
    """

    enabled: bool = False
    steps: int = 0
    optimizer: OptimizerConfig = OptimizerConfig()


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop.

    Attributes:
      init_from: a run folder or checkpoint whose lens (not optimizer) is the starting point.
      resume: go on from the newest checkpoint of ``run_dir`` where there is one.
      log_every, validate_every, sample_every: steps between console lines, validations, and
        verbose samples.
      validation_rows: rows of a validation during training; n_verbose_samples: rows shown.
    """

    seed: int = 0
    init_from: str = ""
    resume: bool = True
    log_every: int = 20
    validate_every: int = 100
    sample_every: int = 100
    validation_rows: int = 256
    n_verbose_samples: int = 3


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """A checkpoint every ``every`` steps; the newest ``keep_latest`` and the ``keep_best`` by
    validation stay, with the last one of the warm start and of the run."""

    every: int = 100
    keep_latest: int = 2
    keep_best: int = 1


@dataclasses.dataclass(frozen=True)
class WandbConfig:
    """``mode``: ``"disabled"``, ``"offline"`` or ``"online"``."""

    mode: str = "offline"
    project: str = "conlens_jax"
    name: str = ""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices on each mesh axis; ``data = 0`` takes all devices that the others leave."""

    data: int = 0
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """``rows``: held-out rows (0: all of the validation split)."""

    rows: int = 1024
    batch_size: int = 128
    bootstrap: int = 2000
    n_examples: int = 24
    kl_horizon: int = 4
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Everything; see ``configs/`` for pages filled in."""

    run_dir: str = "runs/lens"
    model: ModelConfig = ModelConfig()
    embedded: EmbeddedConfig = EmbeddedConfig()
    corpus: CorpusConfig = CorpusConfig()
    dump: DumpConfig = DumpConfig()
    lens: LensConfig = LensConfig()
    loss: LossConfig = LossConfig()
    warm: WarmConfig = WarmConfig()
    joint: JointConfig = JointConfig()
    control: ControlConfig = ControlConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    wandb: WandbConfig = WandbConfig()
    mesh: MeshConfig = MeshConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


# --- conversion ---------------------------------------------------------------------------------


def to_config_dict(config: ExperimentConfig) -> ml_collections.ConfigDict:
    """The locked ``ConfigDict`` that a config file hands to the command line."""
    return ml_collections.ConfigDict(dataclasses.asdict(config)).lock()


def to_json_dict(config: ExperimentConfig) -> dict[str, Any]:
    """Nested plain values, for ``config.json``."""
    return dataclasses.asdict(config)


def field_names(kind: type = ExperimentConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted field name, for example ``"model.layer"``, and every section's."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = prefix + field.name
        yield name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from field_names(hints[field.name], name + ".")


def unknown_field_message(name: str) -> str:
    """One line that names an unknown field and the valid one nearest to it."""
    close = difflib.get_close_matches(name, list(field_names()), n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown config field {name!r}{hint}"


def from_config_dict(values: Mapping[str, Any]) -> ExperimentConfig:
    """Builds and validates the dataclasses.

    Raises:
      ConfigError: unknown fields, wrong types and impossible values, all in one message.
    """
    problems: list[str] = []
    config = _build(ExperimentConfig, values, "", problems)
    if not problems:
        problems = list(_problems(config))
    if problems:
        raise ConfigError(problems)
    return config


def _build(kind: type, values: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    hints = typing.get_type_hints(kind)
    arguments = {}
    for name, value in values.items():
        dotted = prefix + name
        if name not in hints:
            problems.append(unknown_field_message(dotted))
        elif dataclasses.is_dataclass(hints[name]):
            if isinstance(value, Mapping | ml_collections.ConfigDict):
                arguments[name] = _build(hints[name], value, dotted + ".", problems)
            else:
                problems.append(f"{dotted} is a section, not the value {value!r}")
        else:
            arguments[name] = _coerce(hints[name], value, dotted, problems)
    return kind(**arguments)


def _coerce(kind: type, value: Any, dotted: str, problems: list[str]) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        problems.append(f"{dotted} must be of type {kind.__name__}, not {value!r}")
    return value


# --- validation ---------------------------------------------------------------------------------

_CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "full"),
    "corpus.kind": ("stories", "stdlib", "text", "jsonl", "parquet", "huggingface"),
    "dump.dtype": ("float32", "bfloat16"),
    "lens.train_decoder": ("full", "frozen"),
    "lens.train_encoder": ("full", "frozen"),
    "loss.mse_kind": ("direction", "raw"),
    "loss.lm_reference": ("text", "prompt", "warm"),
    "wandb.mode": ("disabled", "offline", "online"),
}
_AT_LEAST_ONE = (
    *(f"embedded.{name}" for name in ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_mlp")),
    *(f"embedded.{name}" for name in ("vocab_size", "steps", "batch_size", "seq_len")),
    *(f"dump.{name}" for name in ("n_samples", "n_validation_samples", "positions_per_sequence")),
    *("dump.batch_size", "dump.rows_per_shard", "lens.text_len", "loss.kl_horizon"),
    *("warm.batch_size", "warm.optimizer.accumulate", "warm.optimizer.max_bad_steps"),
    *("joint.batch_size", "joint.optimizer.accumulate", "joint.optimizer.max_bad_steps"),
    *("control.optimizer.accumulate", "control.optimizer.max_bad_steps"),
    *(f"train.{name}" for name in ("log_every", "validate_every", "sample_every")),
    *("train.validation_rows", "checkpoint.every", "checkpoint.keep_latest"),
    *("mesh.fsdp", "mesh.tensor"),
    *("evaluate.batch_size", "evaluate.bootstrap", "evaluate.kl_horizon"),
)
_AT_LEAST_ZERO = (
    *("model.layer", "model.unroll", "corpus.n_documents", "corpus.seed", "embedded.seed"),
    *(f"dump.{name}" for name in ("min_position", "max_position", "after", "seed")),
    *("warm.steps", "warm.before", "warm.after", "joint.steps", "control.steps", "train.seed"),
    *("train.n_verbose_samples", "checkpoint.keep_best", "mesh.data"),
    *("evaluate.rows", "evaluate.n_examples", "evaluate.seed"),
)


def lookup(config: ExperimentConfig, dotted: str) -> Any:
    """The value of a dotted field name."""
    value: Any = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def _problems(config: ExperimentConfig) -> Iterator[str]:
    for name, choices in _CHOICES.items():
        if lookup(config, name) not in choices:
            yield f"{name} must be one of {', '.join(choices)}, not {lookup(config, name)!r}"
    for name in _AT_LEAST_ONE:
        if lookup(config, name) < 1:
            yield f"{name} must be at least 1, not {lookup(config, name)}"
    for name in _AT_LEAST_ZERO:
        if lookup(config, name) < 0:
            yield f"{name} must not be negative, not {lookup(config, name)}"
    for name in field_names():
        value = lookup(config, name)
        if isinstance(value, ScheduleConfig):
            yield from _schedule_problems(name, value)
    yield from _shape_problems(config)
    yield from _prompt_problems(config.lens)


def _schedule_problems(name: str, schedule: ScheduleConfig) -> Iterator[str]:
    kinds = ("constant", "linear", "cosine", "exponential")
    if schedule.kind not in kinds:
        yield f"{name}.kind must be one of {', '.join(kinds)}, not {schedule.kind!r}"
    if schedule.unit not in ("steps", "epochs"):
        yield f"{name}.unit must be 'steps' or 'epochs', not {schedule.unit!r}"
    if schedule.length < 0 or schedule.warmup < 0:
        yield f"{name}.length and {name}.warmup must not be negative"
    if schedule.kind == "exponential" and not (schedule.start > 0 and schedule.end > 0):
        yield f"{name}: an exponential schedule needs start and end above 0"
    if name == "loss.tau":
        ends = [schedule.start] if schedule.kind == "constant" else [schedule.start, schedule.end]
        if min(ends) < 0.1:
            yield f"loss.tau must be at least 0.1, not {min(ends)}: the gradient explodes below"
        if schedule.warmup:
            yield "loss.tau.warmup must be 0: a temperature cannot rise from 0"


def _shape_problems(config: ExperimentConfig) -> Iterator[str]:
    dump, warm, lens = config.dump, config.warm, config.lens
    last = dump.seq_len - 1 - dump.after
    if max(dump.min_position, dump.max_position) > last:
        yield (
            f"dump.min_position={dump.min_position} and dump.max_position={dump.max_position} must "
            f"be at most {last}: dump.seq_len={dump.seq_len} with dump.after={dump.after} tokens "
            "behind the position; raise dump.seq_len or lower the positions"
        )
    if 0 < dump.max_position < dump.min_position:
        yield (
            f"dump.max_position={dump.max_position} is below dump.min_position={dump.min_position}"
        )
    if warm.before + warm.after != lens.text_len:
        yield (
            f"warm.before={warm.before} + warm.after={warm.after} must be "
            f"lens.text_len={lens.text_len}: the window is what the decoder learns to write"
        )
    if warm.before > dump.min_position + 1:
        yield (
            f"warm.before={warm.before} needs dump.min_position ≥ {warm.before - 1}, "
            f"not {dump.min_position}"
        )
    needed = max(warm.after, config.loss.kl_horizon - 1, config.evaluate.kl_horizon - 1)
    if needed > dump.after:
        yield (
            f"dump.after={dump.after} must be at least {needed}: warm.after, loss.kl_horizon − 1 "
            "and evaluate.kl_horizon − 1 read that many true tokens behind the position"
        )
    if config.corpus.kind in ("text", "jsonl", "parquet", "huggingface") and not config.corpus.path:
        yield f"corpus.path must be given for corpus.kind={config.corpus.kind!r}"
    if config.corpus.kind == "stories" and config.corpus.n_documents < 1:
        yield "corpus.n_documents must be given for corpus.kind='stories'"
    if not 0 < config.corpus.validation_fraction < 1 and not config.corpus.validation_split:
        yield "corpus.validation_fraction must be between 0 and 1"
    if config.model.path == EMBEDDED_MODEL and config.model.layer >= config.embedded.n_layers:
        yield (
            f"model.layer={config.model.layer} is out of range: the embedded model has layers 0 to "
            f"{config.embedded.n_layers - 1} (embedded.n_layers)"
        )
    if config.embedded.n_heads % max(config.embedded.n_kv_heads, 1):
        yield "embedded.n_heads must be a multiple of embedded.n_kv_heads"
    if config.embedded.d_model % max(config.embedded.n_heads, 1):
        yield "embedded.d_model must be a multiple of embedded.n_heads"
    for stage in ("warm", "joint"):
        batch = lookup(config, f"{stage}.batch_size")
        accumulate = lookup(config, f"{stage}.optimizer.accumulate")
        if accumulate > 0 and batch % accumulate:
            yield (
                f"{stage}.batch_size={batch} must be a multiple of "
                f"{stage}.optimizer.accumulate={accumulate}"
            )
        if stage == "joint" and lens.dual_path and accumulate > 0 and batch // accumulate < 2:
            yield "joint.batch_size / accumulate must be at least 2 where lens.dual_path is on"


def _prompt_problems(lens: LensConfig) -> Iterator[str]:
    if lens.decoder_prompt.count("<embed>") != 1:
        yield f"lens.decoder_prompt must hold <embed> exactly once, not {lens.decoder_prompt!r}"
    if lens.encoder_prompt.count("<text>") != 1:
        yield f"lens.encoder_prompt must hold <text> exactly once, not {lens.encoder_prompt!r}"
    history = lens.history_gradient
    if history not in ("exact", "detached") and not (
        history.startswith("sweeps=") and history[7:].isdigit()
    ):
        yield (
            "lens.history_gradient must be 'exact', 'detached' or 'sweeps=k' with a whole number, "
            f"not {history!r}"
        )
