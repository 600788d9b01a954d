"""An encoder of its own that audits a lens: it has read true text only, never the decoder's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from conlens_jax.lens.spec import init_lens
from conlens_jax.models.param_table import Params
from conlens_jax.training.loop import Run, placed, run_stage
from conlens_jax.training.run_folder import AUDIT
from conlens_jax.training.setting import Setting
from conlens_jax.training.state import Stage
from conlens_jax.training.wandb_run import WandbRun


def train_auditor(setting: Setting, run_folder: Path) -> Params:
    """Trains an encoder on the true windows that the warm start teaches, or takes up the one that
    lies in ``<run>/audit`` already.

    It starts where E started, as a clone of M (one that started from nothing would first have to
    learn the language). From there its rows come in an order of their own, ``audit_seed``; and
    every prefix of a window counts alike, so that it reads texts of 1 to T tokens.

    Returns:
      ``{"encoder": …}``, to stand in the place of a lens's own.
    """
    config = setting.config
    steps, seed = config.evaluate.audit_steps, config.evaluate.audit_seed
    text_len = setting.spec.text_len
    # Prefixes cannot be read in one pass where the encoder's prompt goes on behind the text.
    share = 0.0 if setting.spec.encoder_right else 1 - 1 / text_len
    loss = dataclasses.replace(setting.objective.loss, prefix_share=share)
    alone = dataclasses.replace(
        setting,
        config=dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed)),
        objective=dataclasses.replace(setting.objective, loss=loss),
    )
    reference, (train, validation) = setting.reference, setting.caches
    trainable, frozen = init_lens(
        setting.model.params, setting.spec, reference.mean_D, reference.scale, seed=seed
    )
    encoder = placed({"decoder": {}, "encoder": trainable["encoder"]}, setting)
    folder = run_folder / AUDIT / f"seed{seed}-steps{steps}"
    tracker = WandbRun(config.wandb, folder, {}, enabled=False)
    run = Run(alone, folder, train, validation, reference, setting.measurer(), tracker)
    stage = Stage("audit", steps, config.warm.batch_size, config.warm.optimizer)
    folder.mkdir(parents=True, exist_ok=True)
    return {"encoder": run_stage(run, stage, encoder, frozen)["encoder"]}
