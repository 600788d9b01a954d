"""The quickstart's stories, explained by windows of text instead of words.

An explanation is 8 tokens that read like the story around the activation: "called anna . she had a
green". It is fluent to the last token, so what the activation does not contain is made up.

Command:   python -m conlens_jax.quickstart --config=configs/windows.py
Hardware:  2 CPU cores, 2 GB of memory.
Time:      about 5 minutes, of which the language model takes a quarter.
Expect:    held-out greedy fve_nrm 0.77, kl_frac_mean 0.94; sampled 0.67, 0.86 (one seed).
"""

from conlens_jax.config import ExperimentConfig, schedule, to_config_dict


def get_config():
    config = to_config_dict(ExperimentConfig())
    config.run_dir = "runs/windows"

    config.dump.cache_dir = "cache/windows"
    config.dump.n_samples = 24_576
    config.dump.n_validation_samples = 1_024
    config.dump.positions_per_sequence = 6
    config.dump.after = 6

    # The stories' tokenizer has no words for a prompt in plain English: only the slot.
    config.lens.decoder_prompt = "<embed>"
    # Measured on this model: with the dual path, the noise of the other row's error hurts the
    # encoder more than it helps, as long as the anchor below keeps the text from collapsing.
    config.lens.dual_path = False

    # The last 2 source tokens and the next 6. Of windows of 8 tokens, the activation contains those
    # that look ahead: (8, 0), (5, 3), (3, 5), (2, 6) gave greedy fve_nrm −0.25, 0.26,
    # 0.43, 0.57 after 300 steps.
    config.warm.before = 2
    config.warm.after = 6
    config.warm.steps = 840

    config.joint.steps = 100
    config.joint.optimizer.learning_rate = schedule("cosine", 2e-4, 2e-5, warmup=10)
    config.loss.text = schedule("constant", 1.0)
    config.loss.mse = schedule("constant", 5.0)
    config.loss.kl = schedule("constant", 0.5)
    # A negative weight lowers the entropy: a more confident decoder loses less when its text is
    # sampled.
    config.loss.entropy = schedule("constant", -0.3)
    config.loss.tau = schedule("constant", 2.0)

    config.control.enabled = True
    config.baseline.steps = 200
    config.train.validate_every = 200
    config.train.sample_every = 400
    config.train.log_every = 50
    return config
