"""The configuration: what is refused, with which message, and the round trip to a ConfigDict."""

from __future__ import annotations

import dataclasses
import json

import ml_collections
import pytest

from conlens_jax.config import (
    ConfigError,
    ExperimentConfig,
    LensConfig,
    ScheduleConfig,
    constant,
    field_names,
    from_config_dict,
    lookup,
    schedule,
    to_config_dict,
    to_json_dict,
    unknown_field_message,
    with_changes,
)
from conlens_jax.config.older import updated_lens
from conlens_jax.training.run_folder import claim_folder


def problems_of(**changes) -> list[str]:
    """What the default config with these changes is refused for (``__`` stands for a dot)."""
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    with pytest.raises(ConfigError) as caught:
        with_changes(ExperimentConfig(), dotted)
    assert str(caught.value) == "\n".join(f"  - {line}" for line in caught.value.problems)
    return caught.value.problems


# --- round trips --------------------------------------------------------------------------------


def test_round_trip_through_config_dict_and_json():
    config = with_changes(
        ExperimentConfig(),
        {"model.layer": 3, "loss.kl.kind": "linear", "loss.kl.end": 0.5, "mesh.fsdp": 2},
    )
    assert from_config_dict(to_config_dict(config).to_dict()) == config
    assert from_config_dict(to_config_dict(config)) == config  # a ConfigDict itself works too
    assert from_config_dict(json.loads(json.dumps(to_json_dict(config)))) == config


def test_missing_fields_take_their_defaults():
    assert from_config_dict({}) == ExperimentConfig()
    partly = from_config_dict({"model": {"layer": 1}})
    assert partly == dataclasses.replace(
        ExperimentConfig(), model=dataclasses.replace(ExperimentConfig().model, layer=1)
    )


def test_config_dict_is_locked_against_new_fields_and_takes_overrides():
    config_dict = to_config_dict(ExperimentConfig())
    with pytest.raises(AttributeError):
        config_dict.joint.step = 3
    config_dict.joint.steps = 3
    assert from_config_dict(config_dict.to_dict()).joint.steps == 3


def test_a_whole_number_is_a_float_but_nothing_else_changes_its_type():
    config = with_changes(ExperimentConfig(), {"loss.kl.start": 1})
    assert isinstance(config.loss.kl.start, float)
    for name, value, kind in (
        ("joint.steps", 1.5, "int"),
        ("joint.steps", True, "int"),
        ("loss.kl.start", True, "float"),
        ("lens.dual_path", 1, "bool"),
        ("model.path", None, "str"),
    ):
        (problem,) = problems_of(**{name: value})
        assert name in problem and kind in problem and repr(value) in problem


@pytest.mark.parametrize("value", [True, False, "true", "False", "auto"])
def test_add_bos_was_once_a_plain_bool(value):
    config = with_changes(ExperimentConfig(), {"dump.add_bos": value})
    assert config.dump.add_bos == str(value).lower()
    values = to_config_dict(config)
    values.dump.add_bos = "False"  # as the command line writes it
    assert from_config_dict(values.to_dict()).dump.add_bos == "false"
    assert ExperimentConfig().dump.add_bos == "auto"
    assert "dump.add_bos must be one of auto, true, false" in problems_of(dump__add_bos="maybe")[0]


@pytest.mark.parametrize(
    ("recorded", "asked", "path", "same"),
    [
        (True, "auto", "embedded", True),
        (True, "true", "some/model", True),
        (False, "false", "some/model", True),
        (True, "auto", "some/model", False),
        (False, "auto", "embedded", False),
        ("true", "auto", "embedded", False),
    ],
)
def test_an_older_run_goes_on_where_add_bos_means_the_same(recorded, asked, path, same, tmp_path):
    changes = {"dump.add_bos": asked, "model.path": path, "train.resume": True}
    config = with_changes(ExperimentConfig(), changes)
    before = to_json_dict(config)
    before["dump"]["add_bos"] = recorded
    (tmp_path / "checkpoints" / "3" / "state").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(before))
    if same:
        claim_folder(tmp_path, config)
        assert json.loads((tmp_path / "config.json").read_text()) == to_json_dict(config)
    else:
        with pytest.raises(ConfigError, match=rf"dump\.add_bos is '{asked}', and was {recorded!r}"):
            claim_folder(tmp_path, config)


@pytest.mark.parametrize(
    ("recorded", "today"),
    [
        (
            {"estimator": "rloo=2", "history_gradient": "sweeps=3"},
            LensConfig(
                estimator="rloo",
                estimator_samples=2,
                history_gradient="sweeps",
                history_sweeps=3,
            ),
        ),
        ({"estimator": "reinmax", "history_gradient": "exact"}, LensConfig(estimator="reinmax")),
    ],
    ids=["numbers in the names", "no numbers"],
)
def test_numbers_were_once_part_of_the_estimators_name(recorded, today, tmp_path):
    older = to_json_dict(ExperimentConfig())
    older["lens"] |= recorded
    for name in ("estimator_samples", "history_sweeps"):
        del older["lens"][name]
    config = from_config_dict(older)
    assert config == dataclasses.replace(ExperimentConfig(), lens=today)
    assert LensConfig(**updated_lens(older["lens"])) == today  # as a saved lens records it
    # The command line sets every field, so there the old spelling is refused.
    values = to_config_dict(ExperimentConfig())
    values.lens.estimator = "rloo=2"
    with pytest.raises(ConfigError, match="give lens.estimator='rloo' and lens.estimator_samples"):
        from_config_dict(values.to_dict())
    # A run of an older version is continued.
    (tmp_path / "checkpoints" / "3" / "state").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(older))
    claim_folder(tmp_path, config)
    assert json.loads((tmp_path / "config.json").read_text()) == to_json_dict(config)


def test_floats_written_as_whole_numbers_take_fractions_from_the_command_line():
    """A ``ConfigDict`` keeps the type that it finds."""
    config_dict = to_config_dict(ExperimentConfig())
    config_dict.loss.mse = schedule("linear", 1, 2, warmup=3)
    for part in (config_dict.warm.optimizer.learning_rate, config_dict.loss.mse):
        for name in ("start", "end", "length", "warmup"):
            assert isinstance(part[name], float)
        part.warmup = 2.5


def test_a_section_is_not_a_value():
    with pytest.raises(ConfigError, match="joint.optimizer is a section, not the value 3"):
        from_config_dict({"joint": {"optimizer": 3}})


def test_a_config_is_hashable_and_frozen():
    hash(ExperimentConfig())
    with pytest.raises(dataclasses.FrozenInstanceError):
        ExperimentConfig().joint.steps = 1


# --- unknown fields -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("joint.step", "joint.steps"),
        ("model.layr", "model.layer"),
        ("joint.optimizer.learning_rate.strat", "joint.optimizer.learning_rate.start"),
        ("rundir", "run_dir"),
    ],
)
def test_unknown_field_names_the_nearest(name, nearest):
    values = ml_collections.ConfigDict()
    *sections, last = name.split(".")
    part = values
    for section in sections:
        part[section] = ml_collections.ConfigDict()
        part = part[section]
    part[last] = 1
    with pytest.raises(ConfigError) as caught:
        from_config_dict(values)
    (problem,) = caught.value.problems
    assert repr(name) in problem and f"did you mean {nearest!r}?" in problem


def test_unknown_field_far_from_all_gives_no_hint():
    assert "did you mean" not in unknown_field_message("qqqqqqqqqqqqqqqqqq")


def test_field_names_are_all_fields_and_sections():
    names = list(field_names())
    assert len(names) == len(set(names))
    for name in ("model", "model.layer", "warm.optimizer.learning_rate.kind", "run_dir"):
        assert name in names
    for name in names:
        lookup(ExperimentConfig(), name)  # raises where there is none


# --- rules --------------------------------------------------------------------------------------

CHOICES = (
    *("model.dtype", "model.remat", "corpus.kind", "dump.dtype", "lens.train_decoder"),
    *("lens.train_encoder", "loss.mse_kind", "loss.lm_reference", "wandb.mode"),
)
AT_LEAST_ONE = (
    *("embedded.d_model", "embedded.n_layers", "embedded.n_heads", "embedded.n_kv_heads"),
    *("embedded.d_mlp", "checkpoint.every"),
    *("embedded.vocab_size", "embedded.steps", "embedded.batch_size", "embedded.seq_len"),
    *("dump.n_samples", "dump.n_validation_samples", "dump.positions_per_sequence"),
    *("dump.batch_size", "dump.rows_per_shard", "warm.batch_size", "joint.batch_size"),
    *("warm.optimizer.accumulate", "joint.optimizer.accumulate", "control.optimizer.accumulate"),
    *("warm.optimizer.max_bad_steps", "joint.optimizer.max_bad_steps"),
    *("control.optimizer.max_bad_steps", "train.log_every", "train.validate_every"),
    *("train.sample_every", "train.validation_rows"),
    *("checkpoint.keep_latest", "mesh.fsdp", "mesh.tensor", "evaluate.batch_size"),
    *("evaluate.bootstrap", "evaluate.kl_horizon", "loss.kl_horizon", "baseline.batch_size"),
    *("baseline.optimizer.accumulate", "baseline.optimizer.max_bad_steps", "lens.lora_rank"),
    "lens.estimator_samples",
)
AT_LEAST_ZERO = (
    *("model.layer", "model.unroll", "corpus.n_documents", "corpus.seed", "embedded.seed"),
    *("dump.min_position", "dump.max_position", "dump.after", "dump.seed", "warm.steps"),
    *("warm.before", "warm.after", "joint.steps", "control.steps", "train.seed"),
    *("train.n_verbose_samples", "checkpoint.keep_best", "mesh.data", "evaluate.rows"),
    *("evaluate.n_examples", "evaluate.seed", "baseline.steps", "lens.input_patches"),
    "lens.history_sweeps",
)


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_listed(name):
    problem = next(line for line in problems_of(**{name: "sideways"}) if line.startswith(name))
    assert "must be one of" in problem and "'sideways'" in problem
    assert str(lookup(ExperimentConfig(), name)) in problem


@pytest.mark.parametrize("name", AT_LEAST_ONE)
def test_at_least_one(name):
    assert f"{name} must be at least 1, not 0" in problems_of(**{name: 0})


@pytest.mark.parametrize("name", AT_LEAST_ZERO)
def test_not_negative(name):
    assert f"{name} must not be negative, not -1" in problems_of(**{name: -1})


def test_text_length_is_at_least_one():
    assert "lens.text_len must be at least 1, not 0" in problems_of(
        lens__text_len=0, warm__before=0, warm__after=0
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dump.min_position": 60}, "dump.min_position=60"),
        ({"dump.max_position": 60}, "dump.max_position=60"),
        ({"dump.max_position": 7}, "dump.max_position=7 is below dump.min_position=8"),
        ({"dump.seq_len": 12}, "dump.seq_len=12"),
        ({"warm.before": 4}, "warm.before=4 + warm.after=3 must be lens.text_len=8"),
        ({"warm.before": 10, "lens.text_len": 13}, "warm.before=10 needs dump.min_position ≥ 9"),
        ({"dump.after": 2}, "dump.after=2 must be at least 3"),
        ({"loss.kl_horizon": 6}, "dump.after=4 must be at least 5"),
        ({"evaluate.kl_horizon": 6}, "dump.after=4 must be at least 5"),
        ({"corpus.kind": "jsonl"}, "corpus.path must be given for corpus.kind='jsonl'"),
        ({"corpus.kind": "huggingface"}, "corpus.path must be given"),
        ({"corpus.n_documents": 0}, "corpus.n_documents must be given"),
        ({"corpus.validation_fraction": 0.0}, "corpus.validation_fraction"),
        ({"corpus.validation_fraction": 1.0}, "corpus.validation_fraction"),
        ({"embedded.n_kv_heads": 3}, "embedded.n_heads must be a multiple of embedded.n_kv_heads"),
        ({"embedded.d_model": 130}, "embedded.d_model must be a multiple of embedded.n_heads"),
        ({"model.layer": 4}, "model.layer=4 is out of range"),
        ({"lens.estimator": "other"}, "lens.estimator must be one of straight_through, reinmax"),
        ({"lens.estimator": "rloo=x"}, "give lens.estimator='rloo' and lens.estimator_samples=x"),
        (
            {"lens.estimator": "grpo=2"},
            "lens.estimator='grpo=2': the number has a field of its own; give "
            "lens.estimator='grpo' and lens.estimator_samples=2",
        ),
        (
            {"lens.estimator": "rloo", "lens.estimator_samples": 1},
            "lens.estimator_samples must be at least 2 for lens.estimator='rloo', not 1",
        ),
        ({"loss.length.start": 0.02}, "loss.length=0.02 needs lens.end_token"),
        ({"loss.prefix_share": 1.0}, "loss.prefix_share must be at least 0 and below 1"),
        (
            {"loss.prefix_share": 0.5, "lens.encoder_prompt": "<text> so"},
            "needs a lens.encoder_prompt that ends with <text>",
        ),
        (
            {"loss.sample_tau.start": 0.5, "lens.estimator": "rloo"},
            "loss.sample_tau must be constant 1",
        ),
        ({"embedded.copy_weight": 0.0}, "embedded.copy_weight must be above 0"),
        ({"warm.steps": 0, "control.enabled": True}, "control.steps must be given"),
        ({"warm.optimizer.accumulate": 3}, "warm.batch_size=64 must be a multiple of"),
        ({"baseline.optimizer.accumulate": 3}, "baseline.batch_size=64 must be a multiple of"),
        ({"baseline.steps": 3, "dump.min_position": 6}, "needs dump.min_position ≥ 7"),
        ({"joint.optimizer.accumulate": 3}, "joint.batch_size=64 must be a multiple of"),
        ({"joint.optimizer.accumulate": 64}, "at least 2 where lens.dual_path is on"),
        (
            {"lens.decoder_prompt": "no slot"},
            "lens.decoder_prompt must contain <embed> exactly once",
        ),
        ({"lens.decoder_prompt": "<embed> <embed>"}, "lens.decoder_prompt"),
        ({"lens.encoder_prompt": ""}, "lens.encoder_prompt must contain <text> exactly once"),
        (
            {"lens.history_gradient": "sweeps=2"},
            "give lens.history_gradient='sweeps' and lens.history_sweeps=2",
        ),
        ({"lens.history_gradient": "full"}, "lens.history_gradient must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_shapes_that_do_not_fit_are_named(changes, named):
    found = problems_of(**changes)
    assert any(named in problem for problem in found), found


@pytest.mark.parametrize(
    "changes",
    [
        {"dump.min_position": 59},  # the last position with 4 tokens after it in 64
        {"dump.max_position": 59},
        {"dump.max_position": 8},
        {"warm.before": 8, "warm.after": 0},
        {"loss.kl_horizon": 5},
        {"lens.history_gradient": "exact"},
        {"lens.history_gradient": "detached"},
        {"lens.history_gradient": "sweeps", "lens.history_sweeps": 0},
        {"lens.estimator": "gumbel_rao", "lens.estimator_samples": 1},
        {"joint.optimizer.accumulate": 32},
        {"joint.optimizer.accumulate": 64, "lens.dual_path": False},
        {"corpus.kind": "stdlib", "corpus.n_documents": 0},
        {"corpus.validation_fraction": 0.0, "corpus.validation_split": "dev"},
        {"warm.steps": 0, "joint.steps": 0},
        {"model.layer": 3},
        {"baseline.steps": 3, "dump.min_position": 7},
        {"model.path": "some/model", "model.layer": 30},
    ],
    ids=str,
)
def test_the_edge_of_a_rule_is_allowed(changes):
    with_changes(ExperimentConfig(), changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"loss.kl.kind": "step"}, "loss.kl.kind must be one of constant, linear"),
        ({"loss.kl.unit": "hours"}, "loss.kl.unit must be 'steps' or 'epochs'"),
        ({"loss.kl.length": -1.0}, "loss.kl.length and loss.kl.warmup must not be negative"),
        ({"loss.kl.warmup": -1.0}, "loss.kl.length and loss.kl.warmup must not be negative"),
        ({"loss.kl.kind": "exponential"}, "loss.kl: an exponential schedule needs start and end"),
        ({"loss.tau.start": 0.05}, "loss.tau must be at least 0.1, not 0.05"),
        ({"loss.tau.kind": "linear"}, "loss.tau must be at least 0.1, not 0.0"),
        ({"loss.tau.warmup": 1.0}, "loss.tau.warmup must be 0"),
        ({"warm.optimizer.learning_rate.kind": "x"}, "warm.optimizer.learning_rate.kind"),
        ({"joint.optimizer.learning_rate.unit": "x"}, "joint.optimizer.learning_rate.unit"),
        ({"control.optimizer.learning_rate.kind": "x"}, "control.optimizer.learning_rate.kind"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_schedules(changes, named):
    found = problems_of(**changes)
    assert len(found) == 1 and named in found[0], found


def test_schedules_that_are_allowed():
    changes = {"loss.tau.kind": "exponential", "loss.tau.start": 2.0, "loss.tau.end": 0.1}
    assert with_changes(ExperimentConfig(), changes).loss.tau == ScheduleConfig(
        "exponential", 2.0, 0.1
    )
    assert constant(0.5) == ScheduleConfig("constant", start=0.5)
    config_dict = to_config_dict(ExperimentConfig())
    config_dict.loss.kl = schedule("linear", 0.1, 0.3, unit="epochs")
    expected = ScheduleConfig("linear", 0.1, 0.3, unit="epochs")
    assert from_config_dict(config_dict).loss.kl == expected


def test_all_problems_come_at_once():
    found = problems_of(
        model__dtype="float16", joint__steps=-1, checkpoint__every=0, loss__tau__start=0.01
    )
    assert len(found) == 4
    for name in ("model.dtype", "joint.steps", "checkpoint.every", "loss.tau"):
        assert any(name in problem for problem in found)
    found = from_config_dict_problems({"model": {"layr": 1, "dtype": 3}, "jiont": {}})
    assert len(found) == 3


def from_config_dict_problems(values) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        from_config_dict(values)
    return caught.value.problems
