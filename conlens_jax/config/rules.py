"""The rules that a configuration must follow."""

from __future__ import annotations

import re
from collections.abc import Iterator

from conlens_jax.config.data import GENERATED_CORPORA
from conlens_jax.config.devices import DistributedConfig, MeshConfig, ProfileConfig
from conlens_jax.config.dtypes import dtype_problem
from conlens_jax.config.estimator import ANY_SAMPLE_TAU, ESTIMATORS, FEWEST_SAMPLES
from conlens_jax.config.fields import field_names, lookup
from conlens_jax.config.lens import LensConfig, ScheduleConfig
from conlens_jax.config.model import EMBEDDED_MODEL
from conlens_jax.config.older import NUMBER_FIELDS
from conlens_jax.config.settings import ExperimentConfig
from conlens_jax.files.paths import PATH_FIELDS, PATTERN, path_problems

_OTHER_CORPORA = ("stdlib", "text", "jsonl", "parquet", "huggingface", "model")
_CHOICES = {
    "model.remat": ("none", "products", "full"),
    "model.attention": ("xla", "cudnn"),
    "corpus.kind": (*GENERATED_CORPORA, *_OTHER_CORPORA),
    "corpus.writes": ("answers", "continuations"),
    "corpus.encoding_errors": ("error", "replace"),
    "data.source": ("cache", "stream"),
    "dump.add_bos": ("auto", "true", "false"),
    "target.kind": ("window", "words", "facts", "file", "model"),
    "lens.train_decoder": ("full", "frozen", "lora"),
    "lens.train_encoder": ("full", "frozen", "lora"),
    "lens.history_gradient": ("exact", "sweeps", "detached"),
    "lens.estimator": ESTIMATORS,
    "loss.mse_kind": ("direction", "direction+norm", "raw"),
    "loss.lm_reference": ("text", "prompt", "warm"),
    "wandb.mode": ("disabled", "offline", "online"),
    "evaluate.suite": ("basic", "full", "interventions"),
    "evaluate.split": ("validation", "test"),
    "mesh.preset": ("", "single", "data8", "fsdp8", "fsdp2_tensor4", "multislice"),
}
LORA_TARGETS = ("query", "key", "value", "attention_out", "gate", "up", "down")
TARGET_CONTEXT = "<context>"
"""In ``target.prompt``: the place of the context."""
_AT_LEAST_ONE = (
    *(f"embedded.{name}" for name in ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_mlp")),
    *(f"embedded.{name}" for name in ("vocab_size", "steps", "batch_size", "seq_len")),
    *(f"dump.{name}" for name in ("n_samples", "n_validation_samples", "positions_per_sequence")),
    *("dump.batch_size", "dump.rows_per_shard", "lens.text_len", "loss.kl_horizon"),
    *("lens.lora_rank", "lens.estimator_samples", "corpus.max_tokens", "corpus.batch_size"),
    *("warm.batch_size", "warm.optimizer.accumulate", "warm.optimizer.max_bad_steps"),
    *(
        "joint.batch_size",
        "joint.rows_per_document",
        "joint.optimizer.accumulate",
        "joint.optimizer.max_bad_steps",
    ),
    *("control.optimizer.accumulate", "control.optimizer.max_bad_steps"),
    *("baseline.batch_size", "baseline.optimizer.accumulate", "baseline.optimizer.max_bad_steps"),
    *(f"train.{name}" for name in ("log_every", "validate_every", "sample_every")),
    *("train.validation_rows", "checkpoint.every", "checkpoint.keep_latest"),
    *("mesh.fsdp", "mesh.tensor", "distributed.timeout"),
    *(f"evaluate.{name}" for name in ("batch_size", "bootstrap", "kl_horizon")),
    *("evaluate.audit_steps", "evaluate.best_of", "target.next_words"),
)
_AT_LEAST_ZERO = (
    *("model.layer", "model.unroll", "corpus.n_documents", "corpus.seed", "embedded.seed"),
    *(f"dump.{name}" for name in ("min_position", "max_position", "after", "seed")),
    "dump.n_test_samples",
    *("warm.steps", "warm.before", "warm.after", "joint.steps", "control.steps", "baseline.steps"),
    *("train.seed", "train.n_verbose_samples", "checkpoint.keep_best", "mesh.data"),
    *("mesh.slices", "distributed.num_processes"),
    *(
        f"evaluate.{name}"
        for name in ("rows", "n_examples", "seed", "audit_seed", "audit_shift", "claim_samples")
    ),
    "embedded.copy_init",
    *("lens.input_patches", "lens.history_sweeps", "corpus.temperature", "target.context_words"),
    *("target.recent_tokens", "target.temperature", "target.seed"),
)


def config_problems(config: ExperimentConfig) -> Iterator[str]:
    """Every value that cannot be used, with its field and the fix."""
    for name in ("model.dtype", "dump.dtype"):
        if problem := dtype_problem(lookup(config, name), name):
            yield problem
    for name, choices in _CHOICES.items():
        if lookup(config, name) not in choices:
            yield _choice_problem(name, choices, lookup(config, name))
    for name in _AT_LEAST_ONE:
        if lookup(config, name) < 1:
            yield f"{name} must be at least 1, not {lookup(config, name)}"
    for name in _AT_LEAST_ZERO:
        if lookup(config, name) < 0:
            yield f"{name} must not be negative, not {lookup(config, name)}"
    for name in PATH_FIELDS:
        yield from path_problems(name, lookup(config, name))
    for name in field_names():
        value = lookup(config, name)
        if isinstance(value, ScheduleConfig):
            yield from _schedule_problems(name, value)
    if config.evaluate.split == "test" and config.data.source == "stream":
        yield (
            "evaluate.split='test' needs the cache of that split: dump.n_test_samples and "
            "data.source='cache'"
        )
    yield from _shape_problems(config)
    yield from _target_problems(config)
    yield from _prompt_problems(config.lens)
    yield from _int8_problems(config)
    yield from _lora_problems(config.lens)
    yield from _prefix_problems(config)
    yield from _estimator_problems(config)
    yield from _length_problems(config)
    yield from _mesh_problems(config.mesh)
    yield from _process_problems(config.distributed)
    yield from _profile_problems(config.profile)


def _choice_problem(name: str, choices: tuple[str, ...], value: str) -> str:
    kind, _, number = value.partition("=")
    section, _, field = name.rpartition(".")
    if field in NUMBER_FIELDS and kind in choices and number:  # as older versions spelled it
        return (
            f"{name}={value!r}: the number has a field of its own; give {name}={kind!r} and "
            f"{section}.{NUMBER_FIELDS[field]}={number}"
        )
    return f"{name} must be one of {', '.join(choices)}, not {value!r}"


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
    if name in ("loss.tau", "loss.sample_tau"):
        ends = [schedule.start] if schedule.kind == "constant" else [schedule.start, schedule.end]
        if min(ends) < 0.1:
            yield f"{name} must be at least 0.1, not {min(ends)}: the gradient explodes below that"
        if schedule.warmup:
            yield f"{name}.warmup must be 0: a temperature cannot rise from 0"


def _shape_problems(config: ExperimentConfig) -> Iterator[str]:
    dump, warm, lens = config.dump, config.warm, config.lens
    last = dump.seq_len - 1 - dump.after
    if max(dump.min_position, dump.max_position) > last:
        yield (
            f"dump.min_position={dump.min_position} and dump.max_position={dump.max_position} must "
            f"be at most {last}: dump.seq_len={dump.seq_len} with dump.after={dump.after} tokens "
            "after the position; raise dump.seq_len or lower the positions"
        )
    if 0 < dump.max_position < dump.min_position:
        yield (
            f"dump.max_position={dump.max_position} is below dump.min_position={dump.min_position}"
        )
    windows = config.target.kind == "window"
    if windows and warm.before + warm.after != lens.text_len:
        yield (
            f"warm.before={warm.before} + warm.after={warm.after} must be "
            f"lens.text_len={lens.text_len}: the window is what the decoder learns to write"
        )
    if windows and warm.before > dump.min_position + 1:
        yield (
            f"warm.before={warm.before} needs dump.min_position ≥ {warm.before - 1}, "
            f"not {dump.min_position}"
        )
    if config.baseline.steps and lens.text_len > dump.min_position + 1:
        yield (
            f"baseline.steps={config.baseline.steps}: its window of lens.text_len={lens.text_len} "
            f"tokens needs dump.min_position ≥ {lens.text_len - 1}, not {dump.min_position}"
        )
    after = warm.after if windows else 0
    needed = max(after, config.loss.kl_horizon - 1, config.evaluate.kl_horizon - 1)
    if needed > dump.after:
        yield (
            f"dump.after={dump.after} must be at least {needed}: warm.after, loss.kl_horizon − 1 "
            "and evaluate.kl_horizon − 1 read that many true tokens after the position"
        )
    if config.corpus.kind in ("text", "jsonl", "parquet", "huggingface") and not config.corpus.path:
        yield f"corpus.path must be given for corpus.kind={config.corpus.kind!r}"
    if config.corpus.kind == "huggingface" and (found := PATTERN.search(config.corpus.path)):
        yield (
            f"corpus.path={config.corpus.path!r}: the library datasets treats {found[0]!r} in "
            "a folder's name as a pattern; give corpus.kind='jsonl', 'parquet' or 'text', or a "
            "symbolic link with another name"
        )
    if config.corpus.kind in (*GENERATED_CORPORA, "model") and config.corpus.n_documents < 1:
        yield f"corpus.n_documents must be given for corpus.kind={config.corpus.kind!r}"
    if not 0 < config.corpus.top_p <= 1:
        yield f"corpus.top_p must be above 0 and at most 1, not {config.corpus.top_p}"
    if config.corpus.kind == "model" and config.model.path == EMBEDDED_MODEL:
        yield (
            f"corpus.kind='model' needs a model.path: the {EMBEDDED_MODEL} model is itself trained "
            "on the corpus"
        )
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
    if config.embedded.copy_weight <= 0:
        yield f"embedded.copy_weight must be above 0, not {config.embedded.copy_weight}"
    control = config.control
    if control.enabled and config.joint.steps and not (control.steps or config.warm.steps):
        yield (
            "control.steps must be given where warm.steps is 0: a matched number of steps follows "
            "from the time that a step of the warm start takes"
        )
    for stage in ("warm", "joint", "baseline"):
        batch = lookup(config, f"{stage}.batch_size")
        accumulate = lookup(config, f"{stage}.optimizer.accumulate")
        if accumulate > 0 and batch % accumulate:
            yield (
                f"{stage}.batch_size={batch} must be a multiple of "
                f"{stage}.optimizer.accumulate={accumulate}"
            )
    yield from _shared_document_problems(config)


def _shared_document_problems(config: ExperimentConfig) -> Iterator[str]:
    joint = config.joint
    shared, parts = joint.rows_per_document, joint.optimizer.accumulate
    if shared < 1 or parts < 1:
        return
    if joint.batch_size % (shared * parts) and not joint.batch_size % parts:
        yield (
            f"joint.batch_size={joint.batch_size} must be a multiple of joint.rows_per_document="
            f"{shared} times joint.optimizer.accumulate={parts}"
        )
    elif config.lens.dual_path and joint.batch_size // (shared * parts) < 2:
        yield (
            "joint.batch_size / (rows_per_document · accumulate) must be at least 2 where "
            "lens.dual_path is on: the other activation is of another document"
        )
    if shared > config.dump.positions_per_sequence:
        yield (
            f"joint.rows_per_document={shared} must be at most dump.positions_per_sequence="
            f"{config.dump.positions_per_sequence}, the number of rows per document"
        )


def _estimator_problems(config: ExperimentConfig) -> Iterator[str]:
    kind, samples = config.lens.estimator, config.lens.estimator_samples
    if kind not in ESTIMATORS:
        return
    if 1 <= samples < FEWEST_SAMPLES.get(kind, 1):
        yield (
            f"lens.estimator_samples must be at least {FEWEST_SAMPLES[kind]} for "
            f"lens.estimator={kind!r}, not {samples}"
        )
    sample_tau = config.loss.sample_tau
    is_one = (sample_tau.kind, sample_tau.start) == ("constant", 1.0)
    if kind not in ANY_SAMPLE_TAU and not is_one:
        yield (
            f"loss.sample_tau must be constant 1 for lens.estimator={kind!r}: "
            f"only {' and '.join(ANY_SAMPLE_TAU)} sample at another temperature"
        )


def _mesh_problems(mesh: MeshConfig) -> Iterator[str]:
    if mesh.preset == "multislice" and (mesh.data, mesh.fsdp) != (0, 1):
        yield (
            "mesh.preset='multislice' sets mesh.data and mesh.fsdp (not mesh.tensor); leave them "
            "at 0 and 1, or leave the preset empty"
        )
    elif mesh.preset not in ("", "multislice") and (mesh.data, mesh.fsdp, mesh.tensor) != (0, 1, 1):
        yield (
            f"mesh.preset={mesh.preset!r} sets mesh.data, mesh.fsdp and mesh.tensor; leave them at "
            "0, 1 and 1, or leave the preset empty"
        )
    if mesh.slices and mesh.preset != "multislice":
        yield "mesh.slices is for mesh.preset='multislice'; leave it 0"


def _process_problems(distributed: DistributedConfig) -> Iterator[str]:
    by_hand = (distributed.num_processes, distributed.process_id) != (0, -1)
    coordinator = distributed.coordinator
    if coordinator in ("", "auto"):
        if by_hand:
            yield (
                "distributed.num_processes and distributed.process_id go with "
                "distributed.coordinator='host:port'; leave them 0 and -1"
            )
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 1 << 16:
        yield (
            "distributed.coordinator must be 'host:port' (port 1 to 65535), 'auto' or empty, not "
            f"{distributed.coordinator!r}"
        )
    if not 0 <= distributed.process_id < distributed.num_processes:
        yield (
            f"distributed.process_id={distributed.process_id} must be 0 … num_processes − 1, with "
            f"distributed.num_processes={distributed.num_processes}"
        )


def _profile_problems(profile: ProfileConfig) -> Iterator[str]:
    steps = profile.steps
    whole = all(isinstance(step, int) and step >= 0 for step in steps)
    if len(steps) != 2 or not whole or steps[0] > steps[1]:
        yield f"profile.steps must be (first, last) with first ≤ last, not {steps!r}"


def _int8_problems(config: ExperimentConfig) -> Iterator[str]:
    quantise = config.model.quantise
    if quantise not in ("", "int8"):
        yield f"model.quantise must be 'int8' or empty, not {quantise!r}"
    for side in ("decoder", "encoder"):
        if quantise and getattr(config.lens, f"train_{side}") == "full":
            yield (
                f"lens.train_{side}='full' trains the model's own matrices, which are "
                f"integers with model.quantise={quantise!r}: set lens.train_{side}='lora', or "
                "leave model.quantise empty"
            )


def _lora_problems(lens: LensConfig) -> Iterator[str]:
    names = lens.lora_target_names
    unknown = [name for name in names if name not in LORA_TARGETS]
    if unknown or len(set(names)) < len(names):
        wrong = ", ".join(map(repr, unknown)) + " among them" if unknown else "one of them twice"
        yield (
            f"lens.lora_targets must be some of {', '.join(LORA_TARGETS)}, separated by commas, "
            f"not {lens.lora_targets!r} ({wrong})"
        )
    if lens.lora_alpha <= 0:
        yield f"lens.lora_alpha must be above 0, not {lens.lora_alpha}: it scales the adapters"


def _prefix_problems(config: ExperimentConfig) -> Iterator[str]:
    share = config.loss.prefix_share
    if not 0 <= share < 1:
        yield f"loss.prefix_share must be at least 0 and below 1, not {share}"
    if share and not config.lens.encoder_prompt.strip().endswith("<text>"):
        yield (
            f"loss.prefix_share={share} needs a lens.encoder_prompt that ends with <text>: E "
            "reads the activation at the end of every prefix"
        )
    if share and config.lens.text_len < 2:
        yield f"loss.prefix_share={share} needs lens.text_len of at least 2"


def _length_problems(config: ExperimentConfig) -> Iterator[str]:
    price = config.loss.length
    most = price.start if price.kind == "constant" else max(price.start, price.end)
    if most and not config.lens.end_token:
        yield (
            f"loss.length={most} needs lens.end_token: a text without end "
            "has always lens.text_len tokens"
        )


def _target_problems(config: ExperimentConfig) -> Iterator[str]:
    target, lens, gap_rate = config.target, config.lens, config.warm.gap_rate
    if target.kind != "window":
        yield from _dumped_target_problems(config)
    if target.kind == "file" and not target.path:
        yield "target.path must be given for target.kind='file'"
    if target.kind == "file" and (split := config.corpus.validation_split):
        yield (
            f"target.kind='file' needs corpus.validation_split='', not {split!r}: both splits "
            "would have documents with the same number"
        )
    if target.kind == "facts" and config.corpus.kind not in GENERATED_CORPORA:
        yield (
            f"target.kind='facts' needs a corpus.kind whose facts are known "
            f"({', '.join(GENERATED_CORPORA)}), not {config.corpus.kind!r}"
        )
    if target.kind == "model" and TARGET_CONTEXT not in target.prompt:
        yield (
            f"target.prompt must contain {TARGET_CONTEXT}, which stands for the text up to P, not "
            f"{target.prompt!r}"
        )
    if not 0 <= target.next_probability < 1:
        yield f"target.next_probability must be in [0, 1), not {target.next_probability}"
    if target.kind == "words" and target.recent_tokens:
        yield from _recent_tokens_problems(config)
    if target.nearness < 0:
        yield f"target.nearness must not be negative, not {target.nearness}"
    if not 0 < target.most_common <= 1:
        yield f"target.most_common must be in (0, 1], not {target.most_common}"
    if not 0 <= gap_rate < 1:
        yield f"warm.gap_rate must be in [0, 1), not {gap_rate}"
    if gap_rate and not lens.gap_token:
        yield f"warm.gap_rate={gap_rate} needs lens.gap_token"
    if lens.gap_token and lens.gap_token == lens.end_token:
        yield f"lens.gap_token and lens.end_token must differ, both are {lens.gap_token!r}"


def _recent_tokens_problems(config: ExperimentConfig) -> Iterator[str]:
    target = config.target
    if not target.separator:
        yield (
            f"target.recent_tokens={target.recent_tokens} needs target.separator, which they come "
            "after"
        )
    # The likeliest next token, two separators, the end.
    least = target.recent_tokens + 4
    if config.lens.text_len < least:
        yield (
            f"target.recent_tokens={target.recent_tokens} needs lens.text_len ≥ {least}, not "
            f"{config.lens.text_len}"
        )


def _dumped_target_problems(config: ExperimentConfig) -> Iterator[str]:
    kind = config.target.kind
    if not config.lens.end_token:
        yield (
            f"target.kind={kind!r} has texts of different lengths: give lens.end_token ('<eos>' is "
            "the tokenizer's own)"
        )
    if shift := config.evaluate.audit_shift:
        yield (
            f"evaluate.audit_shift={shift} must be 0 for target.kind={kind!r}: a target belongs to "
            "its position"
        )


def _prompt_problems(lens: LensConfig) -> Iterator[str]:
    if lens.decoder_prompt.count("<embed>") != 1:
        yield f"lens.decoder_prompt must contain <embed> exactly once, not {lens.decoder_prompt!r}"
    if lens.encoder_prompt.count("<text>") != 1:
        yield f"lens.encoder_prompt must contain <text> exactly once, not {lens.encoder_prompt!r}"
