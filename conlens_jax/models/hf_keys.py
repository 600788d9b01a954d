"""Which keys of a config.json can change what a model computes.

A key that transformers itself does not read is bookkeeping, whatever it is called. Of those that
it reads for every model type, the tables below say which are harmless. A family has its own.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HARMLESS = frozenset(
    # Where the file comes from, and how transformers runs the model.
    "_name_or_path name_or_path _commit_hash architectures model_type transformers_version "
    "auto_map tokenizer_class dtype torch_dtype _attn_implementation attn_implementation "
    "_attn_implementation_autoset _attn_implementation_internal _experts_implementation "
    "experts_implementation _experts_implementation_internal torchscript use_bfloat16 "
    "tf_legacy_loss xla_device return_dict use_return_dict output_attentions output_hidden_states "
    "tie_last_hidden_states chunk_size_feed_forward unsloth_version "
    # Labels and heads of classifiers.
    "id2label label2id num_labels _num_labels problem_type finetuning_task classifier_dropout "
    # Training.
    "initializer_range initializer_factor gradient_checkpointing "
    # Tokens; those that begin and end a text are read by every family.
    "pad_token_id bos_token_id eos_token_id sep_token_id decoder_start_token_id prefix "
    # Generation, which v4 kept in the model's config.
    "task_specific_params generation_config use_cache cache_implementation max_length "
    "max_new_tokens min_length min_new_tokens do_sample early_stopping num_beams num_beam_groups "
    "diversity_penalty temperature top_k top_p typical_p epsilon_cutoff eta_cutoff "
    "repetition_penalty encoder_repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores "
    "return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values "
    "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens num_assistant_tokens "
    "num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind "
    "target_lookbehind".split()
)
"""Keys of transformers' generic config, v4 and v5, that do not change a forward pass."""

NEUTRAL: Mapping[str, Any] = {
    "is_encoder_decoder": False,
    "is_decoder": (False, True),
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": None,
    "per_layer_config": (None, {}),
    "is_causal": True,
}
"""Generic keys with the only value, or a tuple of the values, that is supported."""

# What all model types share and may take from their config.
_SHARED_MODEL = ("modeling_rope_utils.py", "masking_utils.py", "cache_utils.py")


def read_by_transformers(model_type: str, keys: Iterable[str]) -> set[str]:
    """Those of some keys that the installed transformers takes from a config.json of this type.

    The source is searched as text: for a field, argument or attribute of the configuration, and
    for a name in quotes or after ``config.`` in the model. Importing the classes costs seconds,
    most of them for torch. A mention too many only means that a key is looked at more closely.

    Raises:
      LookupError: the installed transformers does not have this model type.
    """
    configuration, model = _sources(model_type)
    found = set()
    for key in keys:
        name = re.escape(key)
        used = rf"""["']{name}["']|\bconfig\.{name}\b"""
        defined = rf"(?m){used}|\bself\.{name}\b|^\s*{name}\s*[:=]"
        # Most of the keys in question are nowhere, and this is faster than a pattern.
        if (key in configuration and re.search(defined, configuration)) or (
            key in model and re.search(used, model)
        ):
            found.add(key)
    return found


@functools.cache
def _sources(model_type: str) -> tuple[str, str]:
    """The text of the configuration and of the model, with what all model types share."""
    package = importlib.util.find_spec("transformers")
    root = Path(next(iter(package.submodule_search_locations))) if package else Path()
    # The text part of a model for several kinds of input is in the folder of the whole.
    for folder in (model_type, model_type.rpartition("_")[0] or model_type):
        own = root / "models" / folder
        configuration = own / f"configuration_{folder}.py"
        if configuration.is_file():
            model = (own / f"modeling_{folder}.py", *(root / name for name in _SHARED_MODEL))
            return _text(configuration, root / "configuration_utils.py"), _text(*model)
    raise LookupError(model_type)


def _text(*files: Path) -> str:
    return "\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())


def default_of(values: Mapping[str, Any], key: str) -> Any:
    """What transformers' class takes for a key that is absent; for a second name of a key, the
    value of the first. None if there is no such field. Imports transformers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[values["model_type"]]
    name = config_class.attribute_map.get(key, key)
    if name != key and name in values:
        return values[name]
    if dataclasses.is_dataclass(config_class):
        return getattr(config_class, name, None)
    parameter = inspect.signature(config_class.__init__).parameters.get(name)
    return None if parameter is None else parameter.default
