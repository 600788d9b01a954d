"""Compares a real checkpoint with transformers.

Command:  python scripts/check_real_model.py EleutherAI/pythia-160m
          python scripts/check_real_model.py path/to/folder --dtype=bfloat16
Needs:    internet for a hub id (or the model in the hub's cache), torch, and memory for the model
          in fp32; the two models are not in memory at the same time.

On fixed prompts it compares the residual stream at the input of every block, the logits, and greedy
decoding. The table has for each prompt the largest error of a state (relative to that layer's
largest value) and of a logit, the KL from transformers' prediction to ours in nats (mean and
maximum over positions), how often the most probable token agrees, and how many greedy tokens agree
before the first difference. transformers always runs in fp32. Exit code 1 if a KL is above
``--max-kl``.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

import conlens_jax
from conlens_jax.models.hub import resolve_folder
from conlens_jax.models.tokenizer import Tokenizer
from conlens_jax.tracking.console import Console

PROMPTS = (
    "Once upon a time, a small fox lived at the edge of a dark forest.",
    "The capital of France is Paris, and the capital of Japan is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "In 1969, 3 people flew 384,400 km to the Moon; 2 of them walked on it.",
    "Der Hund schläft unter dem Tisch, während die Katze aus dem Fenster schaut.",
    "Q: If all bloops are razzies and all razzies are lazzies, are all bloops lazzies? A:",
)
NEW_TOKENS = 16
MAX_KL = {"float32": 1e-5, "bfloat16": 5e-2}


class Outputs(NamedTuple):
    """Results for one prompt: states [n, S, D] at the input of each block, logits [S, V], new
    tokens."""

    states: np.ndarray
    logits: np.ndarray
    written: np.ndarray


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    options = _parser().parse_args(arguments)
    folder = resolve_folder(options.model, options.revision)
    tokenizer = Tokenizer.from_folder(folder)
    prompts = [[*tokenizer.encode(text, add_bos=True)] for text in PROMPTS]
    expected = run_transformers(folder, prompts)
    gc.collect()
    found = run_ours(folder, prompts, options.dtype)
    rows = [
        compare(tokens, theirs, ours)
        for tokens, theirs, ours in zip(prompts, expected, found, strict=True)
    ]
    table = [[text[:24], *row.values()] for text, row in zip(PROMPTS, rows, strict=True)]
    Console(sys.stdout).table(options.model, ["prompt", *rows[0]], table)
    largest, limit = max(row["KL max"] for row in rows), options.max_kl or MAX_KL[options.dtype]
    verdict = "the same function" if largest <= limit else "NOT the same function"
    print(f"{verdict}: largest KL {largest:.2e}, limit {limit:.0e} ({options.dtype})")
    return int(largest > limit)


def run_transformers(folder, prompts: list[list[int]]) -> list[Outputs]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # an end token would stop the comparison
    outputs = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            result = model(tokens, output_hidden_states=True, use_cache=False)
            settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
            written = model.generate(tokens, pad_token_id=0, **settings)
        # The last of transformers' states is after the final norm.
        states = torch.cat(result.hidden_states[:-1]).float().numpy()
        new = written[0, len(prompt) :].numpy()
        outputs.append(Outputs(states, result.logits[0].float().numpy(), new))
    return outputs


def run_ours(folder, prompts: list[list[int]], dtype: str) -> list[Outputs]:
    model = conlens_jax.load_model(folder, dtype=dtype, unroll=1)
    places = [f"hidden_states[{layer}]" for layer in range(model.config.n_layers)]
    outputs = []
    for prompt in prompts:
        states = np.asarray(model.capture([prompt], places)[0], np.float32)
        written = np.asarray(model.generate([prompt], NEW_TOKENS, stop=())[0])
        outputs.append(Outputs(states, np.asarray(model.logits([prompt])[0]), written))
    return outputs


def compare(tokens: list[int], theirs: Outputs, ours: Outputs) -> dict[str, float]:
    """The table columns for one prompt."""
    log_p, log_q = (log_softmax(each.logits.astype(np.float64)) for each in (theirs, ours))
    kl_S = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    error_n = np.abs(ours.states - theirs.states).max(axis=(1, 2))
    agree = np.cumprod(ours.written == theirs.written)
    return {
        "tokens": len(tokens),
        "state, relative": float((error_n / np.abs(theirs.states).max(axis=(1, 2))).max()),
        "logit, absolute": float(np.abs(ours.logits - theirs.logits).max()),
        "KL mean": float(kl_S.mean()),
        "KL max": float(kl_S.max()),
        "top-1": float(np.mean(log_p.argmax(-1) == log_q.argmax(-1))),
        f"greedy of {NEW_TOKENS}": int(agree.sum()),
    }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in the dtype of the logits."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a hub id, or a folder")
    parser.add_argument("--revision", default="", help="branch, tag or commit of a hub id")
    parser.add_argument("--dtype", choices=sorted(MAX_KL), default="float32", help="of ours")
    parser.add_argument("--max-kl", type=float, default=0.0, help="nats; 0: 1e-5, bfloat16 5e-2")
    return parser


if __name__ == "__main__":
    sys.exit(main())
