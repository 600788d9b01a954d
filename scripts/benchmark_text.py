"""Tokens/s of text that a model writes in large batches, beside the machine's matrix products.

Command:  python scripts/benchmark_text.py --model=<folder> --batch=64 --tokens=64
Time:     about two minutes for 135M parameters on 2 CPU cores, most of it compiling.

Times ``TextWriter`` (what ``corpus.kind="model"`` uses) from the bos token alone, with
``--answers`` answers to requests through the chat template, and for comparison with ``--generate``
``LanguageModel.generate`` from the bos token, all with the same settings. Also in CPU seconds of
this process, which other processes change less than seconds. *Share*: 2 FLOPs for each weight that
a written token uses, as a share of the rate of ``matrix_product``, as ``corpus.kind="model"``
reports it; reading the prompts takes time, but does not count as work. Measured: see "What writing
text costs" in ``scripts/README.md``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conlens_jax.config import CorpusConfig
from conlens_jax.corpora.prompts import read_prompts
from conlens_jax.data.prompt_writer import PromptWriter, matrix_product, tokens_written
from conlens_jax.models.chat import render_chat
from conlens_jax.models.decoding import Drawing, TextWriter
from conlens_jax.models.matrix_sizes import weights_per_token
from conlens_jax.models.model import LanguageModel, load_model
from conlens_jax.parallel.mesh import single_device_mesh


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = _parser().parse_args(arguments)
    model = load_model(options.model, dtype=options.dtype)
    batch, length = options.batch, options.tokens
    tokens_BS = np.full((batch, 1), model.tokenizer.bos_id, np.int32)
    keys_B = jax.random.split(jax.random.key(0), batch)
    drawing = Drawing(keys_B, jnp.float32(options.temperature), jnp.float32(options.top_p))
    writer, none = TextWriter(model.params, model.config), jnp.zeros(0, jnp.int32)
    sampling = dict(temperature=options.temperature, top_p=options.top_p)
    ways = {
        "TextWriter": lambda: writer.write(
            none, [(tokens_BS, tokens_BS >= 0)], drawing, none, length=length, slots=length + 1
        )
    }
    tokens = {}
    if options.generate:
        ways["generate"] = lambda: model.generate(tokens_BS, length, stop=(), **sampling)
    if options.answers:
        prompts = _requests(model, batch)
        answerer = PromptWriter(model, single_device_mesh())
        ways["answers"] = lambda: answerer.write(prompts, keys_B, length, **sampling)
        tokens["answers"] = tokens_written(ways["answers"](), length)
    product = matrix_product(single_device_mesh(), model)
    results = {}
    for name, way in ways.items():
        n_tokens = tokens.get(name, batch * length)
        flops = 2 * n_tokens * weights_per_token(model.config)
        jax.block_until_ready(way())
        rates = [_speed(*product, 4)]
        speed = _speed(way, flops, options.repeat)
        rates.append(_speed(*product, 4))
        results[name] = {}
        for clock, found, *limits in zip(("second", "CPU second"), speed, *rates, strict=True):
            share = found / np.mean(limits)
            per = found / flops * n_tokens
            results[name][clock] = {"tokens": per, "share": float(share)}
            print(
                f"{name}: {per:.1f} tokens per {clock}, {share:.0%} of "
                f"{np.mean(limits) / 1e9:.1f} GFLOPs"
            )
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def _requests(model: LanguageModel, number: int) -> list[list[int]]:
    """The embedded requests as chats, as tokens."""
    requests = read_prompts(CorpusConfig(kind="model", writes="answers"))
    chats = ([{"role": "user", "content": requests[document]}] for document in range(number))
    encode = model.tokenizer.encode
    return [encode(render_chat(chat, model.folder, answer=True)) for chat in chats]


def _speed(way: Callable[[], Any], flops: float, repeat: int) -> tuple[float, float]:
    """FLOPs per second and per CPU second of this process."""
    jax.block_until_ready(way())
    started = time.perf_counter(), time.process_time()
    for _ in range(repeat):
        jax.block_until_ready(way())
    seconds = time.perf_counter() - started[0], time.process_time() - started[1]
    return flops * repeat / seconds[0], flops * repeat / seconds[1]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=64, help="texts at the same time")
    parser.add_argument("--tokens", type=int, default=64, help="of each text")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--answers", action="store_true", help="time answers to requests too")
    parser.add_argument("--generate", action="store_true", help="time generate too")
    parser.add_argument("--json", help="also write the results here")
    return parser


if __name__ == "__main__":
    main()
