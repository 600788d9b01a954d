"""The settings themselves: one frozen dataclass a section, with the meaning of every field.

Lengths are in tokens, learning rates per optimizer step, and an empty string means "not given".
"""

from __future__ import annotations

import dataclasses
from typing import Any

EMBEDDED_MODEL = "embedded"
GENERATED_CORPORA = ("stories", "sums")
"""Kinds of corpora that a seeded generator writes, so that their content is known."""


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
      remat: what is kept of a layer for its backward pass: ``"none"`` everything, ``"products"``
        the results of its matrix products, ``"full"`` its input alone.
      attention: ``"xla"``, or ``"cudnn"``: the flash kernel of a GPU for whole passes in 16 bits,
        where it can do what the model needs (one line in the log says where it cannot).
      quantise: ``"int8"`` keeps the frozen matrices as whole numbers with a scale an output, in
        half the memory of bfloat16. Clones are then frozen or have adapters.
    """

    path: str = EMBEDDED_MODEL
    revision: str = ""
    layer: int = 2
    dtype: str = "float32"
    unroll: int = 0
    remat: str = "none"
    attention: str = "xla"
    quantise: str = ""


@dataclasses.dataclass(frozen=True)
class EmbeddedConfig:
    """The small Llama-style model that is trained on the corpus where ``model.path`` is
    ``"embedded"``. It is kept as a Hugging Face folder under ``cache_dir``, so that a second run
    finds it (the default is ``$CONLENS_CACHE``, or else ``~/.cache/conlens_jax``).

    Three things make so small a model copy words from earlier in a story within a minute: initial
    attention layers that copy (``copy_init``, their strength; 0: plain random weights); a loss
    in which rare words that were mentioned before count ``copy_weight`` times, until the last
    fifth of the steps; and many small steps. Label smoothing keeps it from the overconfidence that
    a grammar teaches; the fraction ``crop_fraction`` of the training rows begins in the middle of
    a document.
    """

    cache_dir: str = ""
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 4
    d_mlp: int = 384
    vocab_size: int = 1024
    rope_theta: float = 100.0
    steps: int = 800
    batch_size: int = 16
    seq_len: int = 64
    learning_rate: float = 4e-3
    label_smoothing: float = 0.03
    crop_fraction: float = 0.1
    copy_init: float = 2.0
    copy_weight: float = 4.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """Where text comes from.

    Attributes:
      kind: ``"stories"`` or ``"sums"`` (seeded generators), ``"stdlib"`` (documentation strings of
        the installed Python), ``"text"``, ``"jsonl"``, ``"parquet"`` (local files), or
        ``"huggingface"``.
      path: file, folder or glob for local files (text and jsonl also as ``.gz`` or ``.zst``);
        dataset name or folder for ``"huggingface"``.
      name: configuration name of a Hugging Face dataset.
      split: split of a Hugging Face dataset that documents are read from.
      validation_split: a split of its own for validation. Empty: ``validation_fraction`` of the
        documents of ``split`` are held out, chosen by a hash of the document's index. A copy of
        an earlier text on the other side is left out; so is what stands in ``validation_split``
        out of training (all of it is read for that, up to ``n_documents``).
      text_field: column that holds the text.
      encoding_errors: what to do with text that is not valid Unicode (bytes that are not UTF-8,
        half a surrogate pair in JSON): ``"error"`` names the file and the line or row;
        ``"replace"`` puts U+FFFD in its place.
      streaming: read a Hugging Face dataset without downloading it first.
      n_documents: how many documents to read at most (0: all; a generator needs a number).
      seed: seed of a generator.
    """

    kind: str = "stories"
    path: str = ""
    name: str = ""
    split: str = "train"
    validation_split: str = ""
    text_field: str = "text"
    encoding_errors: str = "error"
    streaming: bool = True
    validation_fraction: float = 0.05
    n_documents: int = 40_000
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where training reads its rows.

    Attributes:
      source: ``"cache"``, the folder that ``conlens_jax.dump`` made; or ``"stream"``, the corpus
        itself: the same rows (``dump`` says which), their tokens kept in memory, and each step
        captures its activations from M. Nothing is written, and a step costs M's pass up to block
        L besides. Held-out rows are captured when a run begins.
    """

    source: str = "cache"


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
      add_bos: whether every context begins with the tokenizer's bos token: ``"auto"`` where the
        tokenizer's own template puts one (as transformers does; the embedded model's does),
        ``"true"`` where it has one, or ``"false"``. A plain true or false is read too.
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
    add_bos: str = "auto"
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
    values = dataclasses.asdict(ScheduleConfig(kind, start, end, **fields))
    # A flag keeps the type it finds: whole numbers would stay whole.
    return {name: float(v) if isinstance(v, int) else v for name, v in values.items()}


@dataclasses.dataclass(frozen=True)
class LensConfig:
    """The shape of the lens.

    Attributes:
      text_len: T, tokens of an explanation.
      decoder_prompt: text with exactly one ``<embed>``, the slot of the activation.
      encoder_prompt: text with exactly one ``<text>``, the place of the explanation; the
        reconstruction is read at the last position.
      soft_prompt_init: ``"text"`` starts trainable prompt vectors at the prompt's embeddings.
      train_decoder, train_encoder: ``"full"`` trains a clone, ``"frozen"`` shares M's weights,
        ``"lora"`` shares them too and trains low-rank adapters beside them.
      train_projections, train_soft_prompt, train_output_head: the other parts. A full decoder
        of an untied model trains its head in any case; the switch gives any other one a head of
        its own.
      lora_rank, lora_alpha: an adapter adds (alpha / rank) · x·A·B to x·W, with A [inputs, rank]
        and B [rank, outputs] (Hu et al. 2021).
      lora_targets: which matrices of a layer have adapters, separated by commas. All of them by
        default. After 300 steps of the quickstart's warm start (one seed) the loss was 1.93 with
        all, 2.46 with query and value alone, 1.61 with trained clones, 3.34 with frozen ones.
      input_patches: at the inputs of the decoder's layers 1 to this, a trained projection of the
        activation is added at its slot (layer 0's input is the slot itself); 0: none.
      dual_path: swap in â + Δ with Δ = a' − E(D(a')) instead of â alone.
      stop_gradient_delta: no gradient through Δ.
      history_gradient: the straight-through gradient through the decoder's own sampled tokens:
        ``"exact"``, ``"sweeps"`` (``history_sweeps`` of them) or ``"detached"``.
      history_sweeps: vector-Jacobian products of the whole pass; T − 1 of them are exact.
      estimator: which gradient comes back through the sampled tokens: ``"straight_through"``,
        ``"reinmax"``, ``"gumbel_rao"``, or by score function ``"rloo"`` and ``"grpo"`` (the cost is
        w_mse L_MSE + w_kl L_KL of each text). ``"detached"``: none; E learns to read what D writes,
        and D learns from the anchor (``loss.text``) alone, or does not change without one.
      estimator_samples: draws of the noise per token (``"gumbel_rao"``), or texts per row
        (``"rloo"``, ``"grpo"``: at least 2).
    """

    text_len: int = 8
    decoder_prompt: str = "Short explanation of <embed>:"
    encoder_prompt: str = "<text>"
    train_decoder: str = "full"
    train_encoder: str = "full"
    train_projections: bool = True
    train_soft_prompt: bool = True
    train_output_head: bool = False
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_targets: str = "query,key,value,attention_out,gate,up,down"
    input_patches: int = 0
    dual_path: bool = True
    stop_gradient_delta: bool = True
    history_gradient: str = "exact"
    history_sweeps: int = 1
    estimator: str = "straight_through"
    estimator_samples: int = 4

    @property
    def lora_target_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.lora_targets.split(","))


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the loss (DESIGN: w_lm L_LM + w_kl L_KL + w_mse L_MSE + w_text L_text − w_ent H).

    Attributes:
      tau: Gumbel-Softmax temperature of the backward pass, at least 0.1.
      sample_tau: temperature at which the text is sampled in training (straight-through only).
      mse_kind: ``"direction"`` (‖n(â) − n(a)‖²/d), ``"direction+norm"`` (and
        (‖â‖/‖a‖ − 1)²), or ``"raw"`` (‖â − a‖² / E‖a‖²).
      lm_reference: whose next-token distribution L_LM compares the decoder's with: ``"text"``
        (M on the explanation alone), ``"prompt"`` (M under the decoder's text prompt) or
        ``"warm"`` (the decoder as the warm start left it).
      kl_horizon: h, how many predictions from P on the KL looks at (teacher-forced).
      prefix_share: this part of L_MSE (and of the warm start's reading error) is the mean error
        over all shorter prefixes of the text, so that the first words carry the most. Needs an
        ``encoder_prompt`` that ends with ``<text>``.
      text: weight of the supervised anchor, the warm start's own loss on real text windows.
      text_read: whether the anchor has E read the real windows too; without, it is D's writing
        alone, and E learns from D's own text.
    """

    lm: ScheduleConfig = constant(0.003)
    kl: ScheduleConfig = constant(0.1)
    mse: ScheduleConfig = constant(1.0)
    entropy: ScheduleConfig = constant(0.0)
    text: ScheduleConfig = constant(0.0)
    tau: ScheduleConfig = constant(1.0)
    sample_tau: ScheduleConfig = constant(1.0)
    mse_kind: str = "direction+norm"
    lm_reference: str = "warm"
    kl_horizon: int = 1
    prefix_share: float = 0.0
    text_read: bool = True


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW for one stage.

    Attributes:
      learning_rate: of the decoder's and encoder's base weights, as a schedule.
      projection_multiplier, soft_prompt_multiplier, head_multiplier, lora_multiplier,
        patch_multiplier, encoder_multiplier: the learning rate of these parts is
        ``learning_rate`` times this (the encoder's multiplier applies to all of the encoder, on
        top of the others). Adapters learn faster than a clone: the loss of ``lora_targets`` was
        2.21, 1.93, 1.94 and 2.72 with multipliers 1, 3, 6 and 10.
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
    lora_multiplier: float = 3.0
    patch_multiplier: float = 3.0
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
    """The joint stage: the loss of the lens through D's own text.

    Attributes:
      batch_size: rows of a step.
      rows_per_document: so many rows of a batch, one behind the other, are of one document, and M
        reads its context once for all of them. ``batch_size`` must be a multiple of it, and
        ``dump.positions_per_sequence`` too, or a document's last rows are never read.
    """

    steps: int = 300
    batch_size: int = 64
    rows_per_document: int = 1
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
class BaselineConfig:
    """An encoder that is trained, from the same start, to read the true last ``lens.text_len``
    source tokens: what repeating the recent context would be worth. It lies in
    ``<run_dir>/baseline``; ``steps = 0`` leaves it out."""

    steps: int = 0
    batch_size: int = 64
    optimizer: OptimizerConfig = WarmConfig().optimizer


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop.

    Attributes:
      init_from: a run folder or checkpoint whose lens (not optimizer) is the starting point.
      resume: go on from the newest checkpoint of ``run_dir`` where there is one.
      compile_cache: folder for compiled programs, so that the same run starts faster the next
        time; empty: none.
      log_every, validate_every, sample_every: steps between console lines, validations, and
        verbose samples.
      validation_rows: rows of a validation during training; n_verbose_samples: rows shown.
    """

    seed: int = 0
    init_from: str = ""
    resume: bool = True
    compile_cache: str = ""
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
    """Devices on each mesh axis.

    Attributes:
      preset: instead of numbers: ``"single"`` (the first device alone), ``"data8"``, ``"fsdp8"``,
        ``"fsdp2_tensor4"``, or ``"multislice"``: ``data`` over the slices, ``tensor`` (a number
        still) and ``fsdp`` over the devices of each, so that only gradients cross the slow network.
      data: copies of the model that share the batch; 0 takes all devices that the others leave.
      fsdp: devices that share the batch and each parameter, split along the width.
      tensor: devices that share heads, mlp and vocabulary.
      slices: how many slices ``"multislice"`` has; 0: as many as the devices say (TPU), else one a
        process.
    """

    preset: str = ""
    data: int = 0
    fsdp: int = 1
    tensor: int = 1
    slices: int = 0


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Several processes, one dump, run or evaluation. Each gives the same config but for its
    ``process_id``, and sees the same files.

    Attributes:
      coordinator: ``"host:port"`` of process 0; ``"auto"``: Slurm, Open MPI, Kubernetes and TPU
        say it themselves, with the two numbers below (Slurm: one process a GPU); empty: one
        process alone.
      num_processes, process_id: how many there are, and which one this is, from 0.
      timeout: seconds after which a process that no longer answers counts as dead and the others
        stop.
    """

    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1
    timeout: int = 60


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """``dry_run``: compile the train steps from shapes alone, print memory, and exit."""

    dry_run: bool = False


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """``steps``: (first, last), counted over the whole run; these steps are written as a profile
    into ``<run_dir>/profile``. Both 0: none."""

    steps: tuple = (0, 0)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Measuring a lens; docs/evaluation.md says what each suite holds.

    Attributes:
      suite: ``"basic"``, ``"full"``, or ``"interventions"``.
      rows: held-out rows (0: all of the validation split).
      bootstrap: resamples of the documents.
      n_examples: rows shown at equal distances, besides the best, median and worst.
      kl_horizon: h of ``kl_cont``.
      seed: of sampled texts, resamples and changes of a text.
      audit_steps, audit_seed: training of the encoder that reads the text as a stranger, on
        windows of true text in batches of the warm start's size.
      audit_shift: these windows lie up to so many tokens before or behind those that the warm
        start teaches.
      best_of: K, the most texts that the full suite samples for a row.
    """

    suite: str = "basic"
    rows: int = 1024
    batch_size: int = 128
    bootstrap: int = 2000
    n_examples: int = 24
    kl_horizon: int = 4
    seed: int = 0
    audit_steps: int = 300
    audit_seed: int = 1
    audit_shift: int = 0
    best_of: int = 16


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Everything; see ``configs/`` for pages filled in."""

    run_dir: str = "runs/lens"
    model: ModelConfig = ModelConfig()
    embedded: EmbeddedConfig = EmbeddedConfig()
    corpus: CorpusConfig = CorpusConfig()
    data: DataConfig = DataConfig()
    dump: DumpConfig = DumpConfig()
    lens: LensConfig = LensConfig()
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
