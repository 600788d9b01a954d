"""Reading and writing config.json of every family: no key is overlooked, defaults are theirs."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re

import pytest
from family_cases import CASES, each_case, each_family
from tiny_models import tiny_config, tiny_values

from conlens_jax.models import hf_config
from conlens_jax.models.families import FAMILIES, config_from_hf, family_of
from conlens_jax.models.hf_keys import HARMLESS, NEUTRAL, read_by_transformers

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def through_json(values):
    return json.loads(json.dumps(values))


@each_family
def test_absent_keys_take_the_defaults_of_transformers(family):
    pytest.importorskip("torch")
    from transformers import AutoConfig

    everything = json.loads(AutoConfig.for_model(family).to_json_string(use_diff=False))
    assert config_from_hf({"model_type": family}) == config_from_hf(everything)


@each_case
def test_what_transformers_writes_is_what_was_asked_for(case):
    """Its own spelling of the tiny model's config.json, with every key written out."""
    pytest.importorskip("torch")
    from transformers import AutoConfig

    config = AutoConfig.for_model(**tiny_values(case.family, **case.changes))
    everything = json.loads(config.to_json_string(use_diff=False))
    assert config_from_hf(everything) == tiny_config(case.family, **case.changes)


@each_case
def test_config_survives_writing_and_reading(case):
    config = tiny_config(case.family, **case.changes)
    assert config_from_hf(through_json(family_of(config).config_to_hf(config))) == config


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma4_text"])
def test_the_first_layers_are_a_model(family):
    config = tiny_config(family).first_layers(2)
    assert config.n_layers == len(config.layer_kinds) == 2
    assert config_from_hf(through_json(family_of(config).config_to_hf(config))) == config


@each_family
def test_unsupported_keys_are_listed_together(family):
    changes = {"pruned_heads": {"0": [1]}, "quantization_config": {"quant_method": "awq"}}
    with pytest.raises(ValueError) as error:
        tiny_config(family, **changes, is_encoder_decoder=True, some_scale=2.0, some_default=None)
    for part in ("pruned_heads=", "quantization_config=", "is_encoder_decoder=True"):
        assert part in str(error.value)
    assert "some_" not in str(error.value)


@each_family
def test_keys_that_transformers_does_not_read_are_named_once(family, caplog):
    hf_config._warn_once.cache_clear()
    odd = {"is_a_config": True, "unk_token_id": 0, "x.js_config": {"dtype": "q4"}, "nothing": None}
    for _ in range(2):
        assert tiny_config(family, **odd) == tiny_config(family)
    (line,) = caplog.messages
    assert line.endswith(": is_a_config, unk_token_id, x.js_config")


@each_family
def test_generation_defaults_are_accepted_silently(family, caplog):
    odd = {"temperature": 0.7, "max_length": 50, "_num_labels": 1, "torchscript": True}
    assert tiny_config(family, **odd) == tiny_config(family)
    assert not caplog.messages


def classified(case, monkeypatch) -> set[str]:
    """The keys that some part of our code knows for this family, by name."""
    known = set()

    def finish(read, ignored, neutral=None):
        known.update(read.read_keys, ignored, neutral or (), HARMLESS, NEUTRAL)

    monkeypatch.setattr(hf_config.HFConfigReader, "finish", finish)
    tiny_config(case.family, **case.changes)
    return known


@each_case
def test_every_field_of_transformers_is_known_here(case, monkeypatch):
    """A field of a new version, or an argument of old files, is classified on purpose: read by the
    family, or listed as harmless or as having one supported value."""
    pytest.importorskip("torch")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[case.family]
    fields = {field.name for field in dataclasses.fields(config_class)}
    old = set(re.findall(r"""kwargs\.(?:pop|get)\(["'](\w+)""", inspect.getsource(config_class)))
    known = classified(case, monkeypatch)
    assert fields and not (fields | old) - known
    # A second name is judged by the first.
    assert set(config_class.attribute_map.values()) <= known
    # The search of the source finds what the class has.
    every = fields | old | config_class.attribute_map.keys()
    assert read_by_transformers(case.family, every) == every


def test_every_generic_key_of_transformers_is_known_here():
    pytest.importorskip("torch")
    from transformers import GenerationConfig, PreTrainedConfig

    generic = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    source = inspect.getsource(PreTrainedConfig.__post_init__)
    generic |= set(re.findall(r"""kwargs\.(?:pop|get)\(["'](\w+)""", source))
    generic |= GenerationConfig._get_default_generation_params().keys()
    # Every family with a rotation reads these.
    assert generic - {"rope_scaling", "rope_theta"} <= HARMLESS | NEUTRAL.keys()


@pytest.mark.parametrize(
    ("model_type", "same", "other"),
    [
        # As if no family read it: the default of the class is what its port computes.
        ("gemma2", {"final_logit_softcapping": 30.0}, {"final_logit_softcapping": 20.0}),
        ("gpt2", {"n_embd": 32, "hidden_size": 32}, {"n_embd": 32, "hidden_size": 48}),
        ("gpt2", {"hidden_size": 768}, {"hidden_size": 32}),
        # No field, but the model looks for it.
        ("gpt_neox", {"head_dim": None}, {"head_dim": 16}),
    ],
)
def test_keys_that_no_family_reads_have_the_default_of_transformers(model_type, same, other):
    pytest.importorskip("torch")

    def finish(values):
        read = hf_config.HFConfigReader({"model_type": model_type} | values, "Config")
        read("n_embd", None)
        read.finish(ignored=set())

    finish(same)
    with pytest.raises(ValueError, match=f"{list(other)[-1]}=.* is not supported"):
        finish(other)


def test_a_model_type_that_transformers_does_not_have():
    read = hf_config.HFConfigReader({"model_type": "from_the_future", "depth": 2}, "Config")
    with pytest.raises(ValueError, match="depth=2 is not known, .* transformers: update it"):
        read.finish(ignored=set())


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3_text", {"attn_logit_softcapping": 9.0}, "attn_logit_softcapping=9.0"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("gpt_oss", {"sliding_window": None}, "sliding_window=None"),
        ("gpt_neo", {"attention_types": [[["global"], 2]]}, "attention_types"),
        ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers=\[1, 0\] must have a number"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("gpt2", {"activation_function": "mish"}, "activation_function='mish'"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=False"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim=16"),
        ("gptj", {"rotary_dim": 16}, "rotary_dim=16"),
        ("falcon", {"alibi": True}, "alibi=True"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2"),
        ("phi3", {"lm_head_bias": True}, "lm_head_bias=True"),
        ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "needs long_factor"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters"),
        ("llama", {"rope_scaling": {"type": "proportional"}}, "'proportional'"),
    ],
)
def test_what_is_not_supported_is_named(family, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(family, **changes)


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        (
            "gpt_neox",
            {"rotary_pct": 0.5, "rotary_emb_base": 500},
            {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}},
        ),
        (
            "gemma3_text",
            {
                "rope_theta": 300.0,
                "rope_local_base_freq": 20.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            CASES["gemma3: linear"].changes | {"final_logit_softcapping": None},
        ),
        (
            "phi3",
            {
                "rope_scaling": {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
                "rope_theta": 500.0,
            },
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 500.0,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                }
            },
        ),
        (
            "olmo3",
            {"rope_parameters": None, "rope_scaling": _YARN, "rope_theta": 500.0},
            {
                "rope_parameters": {
                    "full_attention": _YARN | {"rope_theta": 500.0},
                    "sliding_attention": {"rope_theta": 500.0},
                }
            },
        ),
        ("gpt_oss", {"num_local_experts": 4}, {"num_experts": 4}),
        ("gemma2", {"hidden_act": "gelu"}, {"hidden_activation": "gelu_pytorch_tanh"}),
        ("gemma", {"hidden_act": "gelu"}, {"hidden_act": "gelu_pytorch_tanh"}),
    ],
)
def test_old_and_new_spellings_are_one(family, old, new):
    assert tiny_config(family, **old) == tiny_config(family, **new)


def test_text_part_of_a_multimodal_config():
    text = tiny_values("gemma3_text")
    whole = {
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {"hidden_size": 8},
        "mm_tokens_per_image": 4,
        "image_token_index": 40,
        "architectures": ["Gemma3ForConditionalGeneration"],
    }
    assert config_from_hf(whole) == config_from_hf(text)
    # Ends of text stand on either level.
    ends = lambda beside: config_from_hf(whole | {"eos_token_id": beside}).eos_token_ids
    assert ends([6, 2]) == (6, 2) and ends([]) == ends(None) == (2,) and ends(9) == (9, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"enable_moe_block": True, "num_experts": 4}, "a mixture of experts beside their MLP"),
        ({"num_kv_shared_layers": 4}, "=4: before these there must be a layer of each type"),
        ({"num_kv_shared_layers": 3}, "=3: before these there must be a layer of each type"),
        ({"num_global_key_value_heads": 3}, "with 3 and 3 key-value heads for 4 query heads"),
        ({"global_head_dim": 7}, "heads of 7 entries cannot be rotated"),
        ({"vocab_size_per_layer_input": 50}, "=50: only vocab_size=48 is supported"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all' is not"),
        ({"per_layer_config": {"1": {"hidden_size": 8}}}, "1: {'hidden_size': 8}: not supported"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_theta for 'sliding_attention'"),
    ],
)
def test_what_gemma4_cannot_have(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config("gemma4_text", **changes)


def test_gemma4_never_has_a_window_in_the_last_layer():
    types = ["sliding_attention"] * 2 + ["full_attention"]
    given = {"num_hidden_layers": 4, "num_kv_shared_layers": 0}
    ours, theirs = (
        tiny_config("gemma4_text", **given, layer_types=[*types, last])
        for last in ("sliding_attention", "full_attention")
    )
    assert ours == theirs and ours.windows[-1] == 0


def test_remote_code_is_named_where_the_type_is_unknown():
    with pytest.raises(ValueError, match=r"'mamba'.*never run.*gpt2"):
        config_from_hf({"model_type": "mamba", "auto_map": {"AutoConfig": "x.Config"}})
    assert tiny_config("phi3", auto_map={"AutoConfig": "x.Config"}) == tiny_config("phi3")
