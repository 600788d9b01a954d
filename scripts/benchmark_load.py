"""Time and host memory of loading a model folder of a few GB onto a mesh of virtual devices.

    python scripts/benchmark_load.py --gigabytes=2.2 --devices=8 --fsdp=4 --tensor=2

The folder (Llama shape, random bf16 weights, several safetensors with an index) is temporary.
Loading runs in a child process, to measure its peak memory. On a CPU the arrays themselves are in
host memory; they are subtracted, which leaves the additional memory of loading. Plain reading of
the same files, in the same run, is the limit for the rate.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from conlens_jax.models.families import config_from_hf, family_of

SHAPE = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
FILE_BYTES = 500_000_000
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--fsdp", type=int, default=4)
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--quantise", choices=("", "int8"), default="")
    parser.add_argument("--chunk-mib", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="load this folder instead of creating one")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        load(flags)
    elif flags.folder:
        run_child(flags.folder)
    else:
        with tempfile.TemporaryDirectory() as name:
            write_folder(Path(name), flags.gigabytes)
            run_child(Path(name))


def run_child(folder: Path) -> None:
    arguments = [sys.argv[0], *sys.argv[1:], "--child", f"--folder={folder}"]
    subprocess.run([sys.executable, *arguments], check=True)


def write_folder(folder: Path, gigabytes: float) -> None:
    """A shape with as many layers as fit the size."""
    sizes = {n: folder_bytes(n) for n in (1, 2)}
    n_layers = 1 + math.ceil((gigabytes * 1e9 - sizes[1]) / (sizes[2] - sizes[1]))
    values = SHAPE | {"num_hidden_layers": n_layers}
    (folder / "config.json").write_text(json.dumps(values))
    config = config_from_hf(values)
    rng = np.random.default_rng(0)
    parts: list[dict[str, np.ndarray]] = [{}]
    weight_map = {}

    def finish() -> None:
        file = f"model-{len(parts):05d}.safetensors"
        save_file(parts[-1], folder / file)
        weight_map.update(dict.fromkeys(parts[-1], file))
        parts[-1] = {}

    for row in family_of(config).param_table(config):
        for _, name in row.tensor_names(config):
            bits = rng.integers(0, 1 << 16, row.hf_shape(config), dtype=np.uint16)
            # Random sign and mantissa, one exponent: numbers between ½ and 1.
            parts[-1][name] = ((bits & 0x807F) | 0x3F00).view(ml_dtypes.bfloat16)
            if sum(tensor.nbytes for tensor in parts[-1].values()) > FILE_BYTES:
                finish()
                parts.append({})
    finish()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def folder_bytes(n_layers: int) -> int:
    from conlens_jax.models.param_table import count_params

    config = config_from_hf(SHAPE | {"num_hidden_layers": n_layers})
    return 2 * count_params(family_of(config).param_table(config), config)


def load(flags: argparse.Namespace) -> None:
    import jax

    jax.config.update("jax_num_cpu_devices", flags.devices)
    from conlens_jax.config import MeshConfig
    from conlens_jax.models.hf_io import load_params, read_config
    from conlens_jax.models.tensor_files import TensorFiles
    from conlens_jax.models.weight_files import weight_files
    from conlens_jax.parallel.mesh import make_mesh

    files = weight_files(flags.folder)
    n_bytes = sum(file.stat().st_size for file in files)
    read_plainly(files)  # now all files are in the page cache, for both measurements
    plain_seconds = min(read_plainly(files) for _ in range(2))
    largest = max(tensor.stop - tensor.start for tensor in TensorFiles(flags.folder).values())
    mesh = make_mesh(MeshConfig(fsdp=flags.fsdp, tensor=flags.tensor))
    jax.block_until_ready(jax.numpy.zeros(8))
    before = resident_bytes()
    config = dataclasses.replace(
        read_config(flags.folder), dtype=flags.dtype, quantise=flags.quantise
    )
    started, cpu = time.perf_counter(), time.process_time()
    params = load_params(flags.folder, config, mesh, chunk_bytes=flags.chunk_mib * MIB)
    jax.block_until_ready(params)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    arrays = sum(
        shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards
    )
    beside = peak - before - arrays
    print(f"folder            {n_bytes / 1e9:8.2f} GB in {len(files)} files")
    print(f"largest tensor    {largest / MIB:8.0f} MiB, chunks of {flags.chunk_mib} MiB")
    print(f"arrays            {arrays / 1e9:8.2f} GB on {mesh.size} devices {dict(mesh.shape)}")
    print(f"peak above them   {beside / MIB:8.0f} MiB = {beside / largest:.2f} × largest tensor")
    print(f"loading           {seconds:8.2f} s = {n_bytes / seconds / 1e9:.2f} GB/s")
    print(f"CPU time of it    {cpu:8.2f} s")
    print(f"plain reading     {plain_seconds:8.2f} s = {n_bytes / plain_seconds / 1e9:.2f} GB/s")
    print(f"loading / plain   {seconds / plain_seconds:8.2f}")


def read_plainly(files: list[Path]) -> float:
    """Seconds to read all files once into memory."""
    started = time.perf_counter()
    for file in files:
        np.fromfile(file, np.uint8)
    return time.perf_counter() - started


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
