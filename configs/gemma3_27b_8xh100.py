"""Gemma 3 27B, layer 31 of 62, on 8 H100: adapters.

What:      M's weights are split over tensor and shared; both clones train adapters beside them.
Command:   python -m conlens_jax.dump --config=configs/gemma3_27b_8xh100.py
           python -m conlens_jax.train --config=configs/gemma3_27b_8xh100.py
           python -m conlens_jax.evaluate --config=configs/gemma3_27b_8xh100.py
Needs:     internet (or copies) for the model, which asks for its licence, and for the corpus.
Hardware:  one node of 8 H100 with 80 GB.
Memory:    13.1 GiB (warm start), 17.1 GiB (joint) per device, by XLA's
           compiler for H100s: python -m conlens_jax.plan --target=h100 with this config.
Time, expected numbers: not measured; it has not been run.
"""

from conlens_jax.config import ExperimentConfig, schedule, to_config_dict


def get_config():
    config = to_config_dict(ExperimentConfig())
    config.run_dir = "runs/gemma3_27b_8xh100"
    config.mesh.tensor = 8

    config.model.path = "google/gemma-3-27b-it"
    config.model.layer = 31
    config.model.dtype = "bfloat16"
    config.model.unroll = 1
    config.model.remat = "full"
    config.model.attention = "cudnn"

    config.corpus.kind = "huggingface"
    config.corpus.path = "HuggingFaceFW/fineweb"
    config.corpus.name = "sample-10BT"
    config.corpus.n_documents = 0
    config.corpus.validation_fraction = 0.001

    config.dump.cache_dir = "cache/gemma3_27b_8xh100"
    config.dump.seq_len = 256
    config.dump.n_samples = 1_000_000
    config.dump.n_validation_samples = 4_096
    config.dump.positions_per_sequence = 4
    config.dump.min_position = 32
    config.dump.after = 16
    config.dump.dtype = "bfloat16"
    config.dump.batch_size = 64

    config.lens.text_len = 32
    config.lens.train_decoder = "lora"
    config.lens.train_encoder = "lora"
    config.lens.lora_rank = 64
    config.lens.lora_alpha = 64.0

    config.warm.before = 16
    config.warm.after = 16
    config.warm.steps = 10_000
    config.warm.batch_size = 64
    config.warm.optimizer.learning_rate = schedule("cosine", 1e-4, 1e-5, warmup=200)
    config.joint.steps = 10_000
    config.joint.batch_size = 64
    config.joint.rows_per_document = 2
    config.joint.optimizer.learning_rate = schedule("cosine", 1e-4, 1e-5, warmup=200)
    config.loss.text = schedule("constant", 1.0)

    config.evaluate.batch_size = 64
    config.train.validate_every = 500
    config.checkpoint.every = 500
    return config
