"""SimpleStories-5M, layer 5: a lens of 5 tokens, prompt "Short explanation of <embed>:".

Command:   python -m conlens_jax.dump --config=configs/lens_simple.py
           python -m conlens_jax.train --config=configs/lens_simple.py
           python -m conlens_jax.evaluate --config=configs/lens_simple.py
Needs:     internet, for the model and the dataset of the Hugging Face hub.
Hardware:  one GPU of 8 GB, or a patient CPU.
Time, expected numbers: not measured.
"""

from conlens_jax.config import ExperimentConfig, schedule, to_config_dict


def get_config():
    config = to_config_dict(ExperimentConfig())
    config.run_dir = "runs/lens_simple"

    config.model.path = "SimpleStories/SimpleStories-5M"
    config.model.layer = 5

    config.corpus.kind = "huggingface"
    config.corpus.path = "SimpleStories/SimpleStories"
    config.corpus.text_field = "story"
    config.corpus.n_documents = 0

    config.dump.cache_dir = "cache/lens_simple"
    config.dump.seq_len = 64
    config.dump.n_samples = 200_000
    config.dump.n_validation_samples = 2_048
    config.dump.min_position = 8
    config.dump.after = 4
    config.dump.dtype = "bfloat16"
    config.dump.batch_size = 256

    config.lens.text_len = 5
    config.lens.decoder_prompt = "Short explanation of <embed>:"
    config.warm.before = 2
    config.warm.after = 3
    config.warm.steps = 4_000
    config.warm.batch_size = 256
    config.joint.steps = 10_000
    config.joint.batch_size = 256

    # Temperature and the weight of L_LM move over the whole joint stage.
    config.loss.tau = schedule("exponential", 1.0, 0.3)
    config.loss.lm = schedule("linear", 0.003, 0.02)
    return config
