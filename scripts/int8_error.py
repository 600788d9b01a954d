"""Effect of int8 weights on predictions: error of the logits and KL, against fp32 and bf16.

    python scripts/int8_error.py                     a random model of Llama shape
    python scripts/int8_error.py --model=FOLDER      a model folder (or hub id) and its tokenizer
    python scripts/int8_error.py --shape=M --seed=1

The tokens are random, or those of ``--text``. KL is the mean over positions, in nats, from the fp32
model's prediction to the other; top-1 is how often the most probable token agrees. bf16 is shown
for scale.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from conlens_jax import LanguageModel, load_model
from conlens_jax.config.seeds import random_key
from conlens_jax.models.families import config_from_hf, family_of
from conlens_jax.models.hf_io import save_model
from conlens_jax.models.param_table import init_params
from conlens_jax.models.quantized import Int8Matrix

SHAPES = {
    "S": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 4096},
    "M": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "vocab_size": 16384,
    },
}


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = options.model or str(random_folder(Path(name), options.shape, options.seed))
        models = {
            "fp32": load_model(folder),
            "bf16": load_model(folder, dtype="bfloat16"),
            "int8, fp32": load_model(folder, quantise="int8"),
            "int8, bf16": load_model(folder, dtype="bfloat16", quantise="int8"),
        }
    tokens = _tokens(options, models["fp32"])
    logits = {name: np.asarray(model.logits(tokens)) for name, model in models.items()}
    halves = matrix_bytes(models["bf16"], models["int8, bf16"])
    ints = matrix_bytes(models["int8, bf16"], models["int8, bf16"])
    print(f"{folder if options.model else 'random, shape ' + options.shape}: {tokens.shape} tokens")
    print(f"matrices: int8 {ints / 1e6:.1f} MB, {ints / halves:.3f} × bf16")
    result = {}
    print(f"{'':12} {'logits, rel. error':>18} {'max. error':>10} {'KL, nats':>10} {'top-1':>6}")
    for name in list(logits)[1:]:
        found = result[name] = compare(logits["fp32"], logits[name])
        print("{:12} {error:18.4f} {largest:10.4f} {kl:10.2e} {top1:6.3f}".format(name, **found))
    result["bytes"] = {"ratio": ints / halves}
    return result


def compare(exact: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Errors of logits [B, S, V]."""
    log_p, log_q = (jax.nn.log_softmax(logits.astype(np.float32)) for logits in (exact, other))
    return {
        "error": float(np.linalg.norm(other - exact) / np.linalg.norm(exact)),
        "largest": float(np.max(np.abs(other - exact))),
        "kl": float(jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))),
        "top1": float(np.mean(np.argmax(exact, axis=-1) == np.argmax(other, axis=-1))),
    }


def matrix_bytes(model: LanguageModel, int8: LanguageModel) -> int:
    """Bytes of the matrices that are int8 in the other model."""
    is_int8 = lambda node: isinstance(node, Int8Matrix)
    sizes = jax.tree.map(
        lambda like, node: is_int8(like) * sum(leaf.nbytes for leaf in jax.tree.leaves(node)),
        int8.params,
        model.params,
        is_leaf=is_int8,
    )
    return sum(jax.tree.leaves(sizes))


def random_folder(folder: Path, shape: str, seed: int) -> Path:
    """Random weights of larger variance than usual, for less uniform predictions."""
    values = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 4}
    config = config_from_hf(values | SHAPES[shape] | {"initializer_range": 0.06})
    params = init_params(family_of(config).param_table(config), config, random_key(seed))
    save_model(folder, config, params)
    return folder


def _tokens(options: argparse.Namespace, model: LanguageModel) -> np.ndarray:
    if options.text:
        return np.asarray([model.tokenizer.encode(options.text)], np.int32)
    rng = np.random.default_rng(options.seed)
    return rng.integers(0, model.config.vocab_size, (options.batch, options.length), np.int32)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="model folder or hub id; empty: a random model")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="S", help="of the random model")
    parser.add_argument("--text", default="", help="text to read; empty: random tokens")
    parser.add_argument("--batch", type=int, default=8, help="rows of random tokens")
    parser.add_argument("--length", type=int, default=64, help="random tokens per row")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    main()
