"""Settings of the lens and of its loss. Lengths are in tokens."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """A number that depends on the step."""

    kind: str = "constant"  # or, from start to end, "linear", "cosine" or "exponential"
    start: float = 0.0  # first value, or the only one of "constant"
    end: float = 0.0  # last value
    length: float = 0.0  # from start to end; 0: to the end of the stage
    warmup: float = 0.0  # for this long the value first rises linearly from 0 to start
    unit: str = "steps"  # of length and warmup; or "epochs" (passes over the training rows)


def constant(value: float) -> ScheduleConfig:
    """A schedule that does not change."""
    return ScheduleConfig(start=value)


def schedule(kind: str, start: float, end: float = 0.0, **fields: Any) -> dict[str, Any]:
    """A schedule as a config file sets it: ``config.loss.kl = schedule("linear", 0.1, 0.3)``."""
    values = dataclasses.asdict(ScheduleConfig(kind, start, end, **fields))
    # A flag keeps the type it finds: an integer here would refuse fractions later.
    return {name: float(v) if isinstance(v, int) else v for name, v in values.items()}


@dataclasses.dataclass(frozen=True)
class LensConfig:
    """The shape of the lens: decoder D and encoder E, which parts are trained, and which gradient
    comes back through D's text."""

    text_len: int = 8  # T: tokens per explanation, at most
    # An explanation is over after this token of the vocabulary, "<eos>" for the tokenizer's own;
    # empty: it has T tokens.
    end_token: str = ""
    # This token of the vocabulary stands for something that cannot be named (warm.gap_rate); empty:
    # none does.
    gap_token: str = ""
    decoder_prompt: str = "Short explanation of <embed>:"  # <embed>: the slot of the activation
    # <text>: the place of the explanation; the reconstruction is read at the last position.
    encoder_prompt: str = "<text>"
    # "full" trains a clone of M, "frozen" shares M's weights, "lora" shares them too and trains
    # low-rank adapters beside them.
    train_decoder: str = "full"
    train_encoder: str = "full"  # the same for the encoder
    train_projections: bool = True  # the maps from and to the activation
    train_soft_prompt: bool = True  # the prompts' embeddings
    # A head of D's own; a full decoder of an untied model trains its head in any case.
    train_output_head: bool = False
    # An adapter adds (alpha / rank) · x·A·B to x·W, with A [inputs, rank] and B [rank, outputs]
    # (Hu et al. 2021).
    lora_rank: int = 8
    lora_alpha: float = 16.0  # alpha of the formula above
    # Matrices of a layer that have adapters, separated by commas. After 300 steps of the
    # quickstart's warm start (one seed) the loss was 1.93 with all, 2.46 with query and value
    # alone, 1.61 with trained clones, 3.34 with frozen ones.
    lora_targets: str = "query,key,value,attention_out,gate,up,down"
    # A trained projection of the activation is added at its slot at the inputs of the decoder's
    # layers 1 to this (layer 0's input is the slot itself); 0: none.
    input_patches: int = 0
    dual_path: bool = True  # swap in â + Δ with Δ = a' − E(D(a')), not â alone
    stop_gradient_delta: bool = True  # no gradient through Δ
    # Gradient through the decoder's own sampled tokens, as inputs of the tokens after them:
    # "exact", "sweeps" (an approximation), or "detached" (none).
    history_gradient: str = "exact"
    # Vector-Jacobian products of the whole pass for "sweeps"; T − 1 of them are exact.
    history_sweeps: int = 1
    # Which gradient comes back through the sampled tokens: "straight_through", "reinmax",
    # "gumbel_rao", or by score function "rloo" or "grpo" (the cost is w_mse L_MSE + w_kl L_KL of
    # each text). "detached": none; E learns to read what D writes, and D learns from the anchor
    # (loss.text) alone, or does not change without one.
    estimator: str = "straight_through"
    # Draws of the noise per token ("gumbel_rao"), or texts per row ("rloo", "grpo": at least 2).
    estimator_samples: int = 4

    @property
    def lora_target_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.lora_targets.split(","))


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The joint loss, w_lm L_LM + w_kl L_KL + w_mse L_MSE + w_text L_text + w_len L_length
    − w_ent H."""

    lm: ScheduleConfig = constant(0.003)  # w_lm: KL of a fluent reference to D's predictions
    kl: ScheduleConfig = constant(0.1)  # w_kl: KL between M's predictions with a and with â
    mse: ScheduleConfig = constant(1.0)  # w_mse: error of the reconstruction
    entropy: ScheduleConfig = constant(0.0)  # w_ent: entropy of D's predictions
    text: ScheduleConfig = constant(0.0)  # w_text: the warm start's loss on real text, as an anchor
    # w_len: the number of tokens of the text, so this is the price of one; needs lens.end_token.
    length: ScheduleConfig = constant(0.0)
    tau: ScheduleConfig = constant(1.0)  # temperature of the backward pass, at least 0.1
    # Temperature at which the text is sampled in training; other than 1 only where lens.estimator
    # is "straight_through" or "detached".
    sample_tau: ScheduleConfig = constant(1.0)
    # "direction" (‖n(â) − n(a)‖²/d), "direction+norm" (and (‖â‖/‖a‖ − 1)²), or "raw"
    # (‖â − a‖² / E‖a‖²).
    mse_kind: str = "direction+norm"
    # Whose next-token predictions L_LM compares the decoder's with: "text" (M on the explanation
    # alone), "prompt" (M with the decoder's text prompt) or "warm" (the decoder after the warm
    # start).
    lm_reference: str = "warm"
    kl_horizon: int = 1  # h: predictions from P on that the KL compares (teacher-forced)
    # This share of L_MSE (and of the warm start's encoder error) is the mean error over all shorter
    # prefixes of the text, so that the first words carry the most. Needs a lens.encoder_prompt that
    # ends with <text>.
    prefix_share: float = 0.0
    # Whether the anchor trains E on real windows too; False: it trains D alone, and E learns from
    # D's own text.
    text_read: bool = True
