"""A second embedded task, whose every variable is known: a lens on a small Llama that adds.

What:      three-digit additions worked out in words; the language model is trained at first use.
           The full suite then measures whether the text states digits, carries and their count.
Command:   python -m conlens_jax.dump     --config=configs/sums.py
           python -m conlens_jax.train    --config=configs/sums.py
           python -m conlens_jax.evaluate --checkpoint=runs/sums --suite=full
Hardware:  2 CPU cores, 2 GB of memory.
Time:      about 10 minutes of CPU time: language model 1.5, lens and control 4.5, evaluation 4.
Expect:    the language model has every held-out answer right; greedy fve_nrm 0.96, kl_frac_mean
           0.99; sampled 0.94, 0.98 (one seed). What the text states is often wrong
           all the same: see the table in docs/evaluation.md.
"""

from conlens_jax.config import ExperimentConfig, schedule, to_config_dict


def get_config():
    config = to_config_dict(ExperimentConfig())
    config.run_dir = "runs/sums"
    config.corpus.kind = "sums"
    config.embedded.steps = 600

    config.dump.cache_dir = "cache/sums"
    config.dump.n_samples = 24_576
    config.dump.n_validation_samples = 1_024
    config.dump.positions_per_sequence = 6
    config.dump.after = 10

    # The tokenizer has no words for a prompt in plain English: only the slot.
    config.lens.decoder_prompt = "<embed>"
    config.lens.dual_path = False
    # A column has 14 tokens; so most windows contain its digit and its carry.
    config.lens.text_len = 12
    config.warm.before = 2
    config.warm.after = 10
    config.warm.steps = 600

    config.joint.steps = 60
    config.joint.optimizer.learning_rate = schedule("cosine", 2e-4, 2e-5, warmup=10)
    config.loss.text = schedule("constant", 1.0)
    config.loss.mse = schedule("constant", 5.0)
    config.loss.kl = schedule("constant", 0.5)
    config.loss.entropy = schedule("constant", -0.3)
    config.loss.tau = schedule("constant", 2.0)

    config.control.enabled = True
    config.train.validate_every = 200
    config.train.sample_every = 300
    config.train.log_every = 50
    return config
