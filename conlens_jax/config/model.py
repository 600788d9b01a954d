"""Settings of the language model that is read. An empty string means "not given"."""

from __future__ import annotations

import dataclasses

EMBEDDED_MODEL = "embedded"
"""The ``model.path`` of the small model that :class:`EmbeddedConfig` describes."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which language model M is read, and in which layer."""

    # Hugging Face folder, GGUF file, hub id, "smollm2-135m" or "gemma3-270m" (installed packages),
    # or "embedded": the small model of EmbeddedConfig, trained at first use.
    path: str = EMBEDDED_MODEL
    revision: str = ""  # branch, tag or commit of a hub id
    layer: int = 2  # L: the 0-based block whose output is the activation
    dtype: str = "float32"  # or "bfloat16"
    # Layers per step of the scan over layers; 0 unrolls all of them, which is faster for small
    # models on a CPU.
    unroll: int = 0
    # What is kept of a layer for its backward pass: "none" (no rematerialisation) everything,
    # "products" the results of its matrix products, "full" its input alone.
    remat: str = "none"
    # "xla", or "cudnn": a GPU's flash kernel for whole passes in 16 bits, where it supports what
    # the model needs (one line in the log says where it does not).
    attention: str = "xla"
    # "int8" stores the frozen matrices as integers with a scale per output, in half the memory of
    # bfloat16. Clones must then be frozen or have adapters.
    quantise: str = ""


@dataclasses.dataclass(frozen=True)
class EmbeddedConfig:
    """The small Llama-style model that is trained on the corpus where ``model.path`` is
    ``"embedded"``, and stored as a Hugging Face folder, so that a second run finds it.

    Three things make so small a model copy words from earlier in a story within a minute of
    training: attention that copies from the start (``copy_init``), a higher weight of rare words
    that were mentioned before (``copy_weight``), and many small steps. ``label_smoothing`` keeps it
    from the overconfidence that a grammar teaches.
    """

    # Folder of the trained models; empty: $CONLENS_CACHE, or else ~/.cache/conlens_jax.
    cache_dir: str = ""
    d_model: int = 128  # width
    n_layers: int = 4  # Transformer blocks
    n_heads: int = 4  # query heads; they divide the width
    n_kv_heads: int = 4  # key-value heads; they divide the query heads
    d_mlp: int = 384  # width of the MLP's hidden layer
    vocab_size: int = 1024  # the tokenizer, trained on the corpus too, has at most so many tokens
    rope_theta: float = 100.0  # base of the rotary position embedding
    steps: int = 800  # optimizer steps
    batch_size: int = 16  # documents per step
    seq_len: int = 64  # tokens per document
    learning_rate: float = 4e-3  # the peak
    label_smoothing: float = 0.03  # share of the target that is spread over the vocabulary
    crop_fraction: float = 0.1  # share of the training rows that begin in the middle of a document
    copy_init: float = 2.0  # strength of the initial attention that copies; 0: random weights only
    # Weight of rare words that were mentioned before, until the last fifth of the steps.
    copy_weight: float = 4.0
    seed: int = 0  # of the weights and of the order of the documents
