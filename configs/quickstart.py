"""The whole way on a laptop: stories, a small Llama trained on them, a lens of 8 tokens.

Command:   python -m conlens_jax.quickstart
Hardware:  2 CPU cores, 2 GB of memory.
"""

from conlens_jax.config import ExperimentConfig, ScheduleConfig, to_config_dict


def get_config():
    config = to_config_dict(ExperimentConfig())
    config.run_dir = "runs/quickstart"
    config.dump.cache_dir = "cache/quickstart"
    # The stories' tokenizer knows no word of a prompt in plain English; the slot stands alone.
    config.lens.decoder_prompt = "<embed>"
    config.control.enabled = True
    return config
