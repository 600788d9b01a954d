"""Tiny random Llama folders for tests, with and without transformers.

Every parameter is random, norms and biases too: a norm weight of 1 or a bias of 0 would hide a
port that forgets it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from conlens_jax.models.families import config_from_hf, family_of
from conlens_jax.models.hf_io import save_model
from conlens_jax.models.param_table import Params, build_tree
from conlens_jax.models.transformer_config import TransformerConfig

# config.json of the tiny model: 4 query heads share 2 key-value heads.
TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
_SPREAD = 0.1


def tiny_config(**changes: Any) -> TransformerConfig:
    """The shape of the tiny model; ``changes`` are keys of config.json."""
    return config_from_hf(TINY | changes)


def random_params(config: TransformerConfig, seed: int = 0) -> Params:
    """Every parameter normal, around 1 where it scales and around 0 elsewhere."""
    rng = np.random.default_rng(seed)

    def value(row) -> np.ndarray:
        noise = _SPREAD * rng.standard_normal(row.shape(config))
        return (noise + float(row.init == "ones")).astype(config.dtype)

    table = family_of(config).param_table(config)
    return jax.tree.map(jax.numpy.asarray, build_tree((row.path, value(row)) for row in table))


def random_tokens(batch: int, length: int, *, vocab_size: int = 48, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, vocab_size, (batch, length), dtype=np.int32)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A word-level tokenizer with exactly ``vocab_size`` ids, as Hugging Face files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = [*_SPECIAL_TOKENS, *(f"word{i}" for i in range(len(_SPECIAL_TOKENS), vocab_size))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(_SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {f"{token.strip('<>')}_token": token for token in _SPECIAL_TOKENS}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_tiny_folder(folder: Path, *, seed: int = 0, **changes: Any) -> TransformerConfig:
    """A whole model folder (weights, config.json, tokenizer) without torch."""
    config = tiny_config(**changes)
    save_model(folder, config, random_params(config, seed))
    write_tokenizer(folder, config.vocab_size)
    return config


def hf_model(*, seed: int = 0, **changes: Any):
    """A tiny ``LlamaForCausalLM`` in fp32 with every parameter perturbed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    values = {key: value for key, value in TINY.items() if key != "model_type"} | changes
    model = LlamaForCausalLM(LlamaConfig(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(_SPREAD * torch.randn_like(parameter))
    return model


def hf_forward(model, tokens: np.ndarray, mask: np.ndarray | None = None):
    """Logits [B, S, V] and the output of every block [B, n, S, D] of a transformers model.

    Block outputs come from hooks: transformers' last ``hidden_states`` is after the final norm.
    """
    import torch

    outputs = []

    def keep(_module, _inputs, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(keep) for layer in model.model.layers]
    arguments = {}
    if mask is not None:
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        arguments["attention_mask"] = torch.tensor(mask, dtype=torch.long)
        arguments["position_ids"] = torch.tensor(positions, dtype=torch.long)
    with torch.no_grad():
        logits = model(torch.tensor(tokens, dtype=torch.long), use_cache=False, **arguments).logits
    for hook in hooks:
        hook.remove()
    return logits.float().numpy(), torch.stack(outputs, dim=1).float().numpy()
