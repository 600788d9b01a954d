"""The loss of each stage.

Warm start: the encoder reconstructs a from a given text, its target (a window of the source around
P, or what ``target.kind`` makes of it), and the decoder writes that text from a.
Joint: total = w_lm L_LM + w_kl L_KL + w_mse L_MSE + w_text L_text + w_len L_length − w_ent H,
through the decoder's own text.

What needs no gradient (the sampled text, the context of the original model, the reference of L_LM)
is computed first, by :func:`prepare`, outside the differentiated function.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from conlens_jax.config import LossConfig, ScheduleConfig, WarmConfig
from conlens_jax.config.estimator import (
    SCORE_FUNCTION,
    TOKENS_ARE_CONSTANT,
    Estimator,
    estimator_of,
)
from conlens_jax.lens import original as original_model
from conlens_jax.lens.batch import Batch
from conlens_jax.lens.decoder import decoder_head, generate, teacher_forced_states
from conlens_jax.lens.encoder import encode_embeddings, encode_prefixes
from conlens_jax.lens.estimators import token_keys
from conlens_jax.lens.gumbel import Noise, as_noise
from conlens_jax.lens.history import text_states
from conlens_jax.lens.losses import kl_divergence, reconstruction_error
from conlens_jax.lens.original import Context
from conlens_jax.lens.policy import policy_loss
from conlens_jax.lens.schedules import make_schedule
from conlens_jax.lens.spec import Decoder, Encoder, LensSpec, decoder_of, encoder_of
from conlens_jax.lens.text import (
    last_real,
    mean_of_texts,
    real_tokens,
    sum_of_text,
    take_places,
    text_lengths,
)
from conlens_jax.lens.vocabulary import ReferenceLogits, sampled_embeddings, text_terms
from conlens_jax.models.embeddings import embed_tokens, scale_embeddings, token_table
from conlens_jax.models.param_table import Params

TERMS = {"lm": 1.0, "kl": 1.0, "mse": 1.0, "entropy": -1.0, "text": 1.0, "length": 1.0}
"""The terms of the joint loss and their signs."""
Metrics = dict[str, Array]


class Scheduled(NamedTuple):
    """The values of the schedules at one step: the weight of each term, the temperature ``tau`` of
    the gradient, and that of sampling."""

    weights: dict[str, Float[Array, ""]]
    tau: Float[Array, ""]
    sample_tau: Float[Array, ""]


class Prepared(NamedTuple):
    """The inputs of the joint loss that are not differentiated."""

    text_BT: Int[Array, "B T"]
    noise: Noise
    context: Context | None
    reference: ReferenceLogits | None
    keys_BT: Key[Array, "B T"] | None
    gap_keys_B: Key[Array, "B"] | None = None


@dataclasses.dataclass(frozen=True)
class Objective:
    """The static part of the loss: its terms, how each is computed, and the schedules of their
    weights."""

    loss: LossConfig
    warm: WarmConfig
    spec: LensSpec
    target: str = "window"  # target.kind
    marks: tuple[int, ...] = ()  # tokens between the words of a target, which are never gaps
    gaps_after: int | None = None  # only after this token of a target are there gaps

    def uses(self, term: str) -> bool:
        """False if the weight is 0 for the whole stage; then the term is not computed."""
        return not _always_zero(getattr(self.loss, term))

    def schedules(
        self, *, stage_steps: int, steps_per_epoch: float
    ) -> Callable[[Int[Array, ""]], Scheduled]:
        """The function from the step within a stage to the weights and temperatures."""
        value_of = {
            name: make_schedule(
                getattr(self.loss, name), stage_steps=stage_steps, steps_per_epoch=steps_per_epoch
            )
            for name in (*TERMS, "tau", "sample_tau")
        }

        def at(step: Int[Array, ""]) -> Scheduled:
            values = {name: value(step) for name, value in value_of.items()}
            tau, sample_tau = values.pop("tau"), values.pop("sample_tau")
            return Scheduled(values, tau, sample_tau)

        return at

    @property
    def estimator(self) -> Estimator:
        return estimator_of(self.spec.lens)

    @property
    def texts_per_row(self) -> int:
        """k: the number of texts sampled for each activation."""
        return self.estimator.samples if self.estimator.kind in SCORE_FUNCTION else 1


def repeat_rows(rows_B: Array, count: int) -> Array:
    """Each row ``count`` times in succession."""
    return rows_B if count == 1 else jnp.repeat(rows_B, count, axis=0)


def _always_zero(schedule: ScheduleConfig) -> bool:
    return schedule.start == 0 and (schedule.kind == "constant" or schedule.end == 0)


def source_window(
    tokens_GS: Int[Array, "G S"], positions_B: Int[Array, "B"], before: int, after: int
) -> Int[Array, "B T"]:
    """The last ``before`` tokens up to and including P, and the ``after`` tokens after it."""
    offsets = jnp.arange(1 - before, after + 1, dtype=jnp.int32)
    documents_B = original_model.documents_of(positions_B, tokens_GS)
    return tokens_GS[documents_B[:, None], positions_B[:, None] + offsets[None]]


def target_text(
    batch: Batch, keys_B: Key[Array, "B"] | None, objective: Objective
) -> Int[Array, "B T"]:
    """The target of each row: what the cache has, or a window of the context; with gaps
    (``warm.gap_rate``), if there are keys to draw them."""
    warm, spec, target_BT = objective.warm, objective.spec, batch.target_BT
    if objective.target == "window":
        target_BT = source_window(batch.tokens_GS, batch.positions_B, warm.before, warm.after)
    if keys_B is None or not warm.gap_rate:
        return target_BT
    draw = lambda key: jax.random.uniform(key, (spec.text_len,))
    marks = jnp.asarray([m for m in (spec.end, *objective.marks) if m is not None], jnp.int32)
    is_gap_BT = (jax.vmap(draw)(keys_B) < warm.gap_rate) & ~jnp.isin(target_BT, marks)
    if objective.gaps_after is not None:
        is_gap_BT &= jnp.cumsum(target_BT == objective.gaps_after, axis=1) > 0
    return jnp.where(is_gap_BT, spec.gap, target_BT)


def warm_loss(
    trainable: Params,
    frozen: Params,
    batch: Batch,
    gap_keys_B: Key[Array, "B"] | None = None,
    *,
    objective: Objective,
    reads: bool = True,
) -> tuple[Float[Array, ""], Metrics]:
    """The encoder's error on the targets (if ``reads``) plus, if any part of the decoder is
    trained, the decoder's cross-entropy on them; each the mean over rows of the mean over a row's
    tokens."""
    spec = objective.spec
    target_BT = target_text(batch, gap_keys_B, objective)
    real_BT = real_tokens(target_BT, spec.end)
    parts: Metrics = {}
    if reads:
        encoder = encoder_of(trainable, frozen, spec)
        with jax.named_scope("read"):
            target_BTD = embed_tokens(encoder.base, target_BT, spec.model)
            _, error_B = read_text(encoder, target_BTD, real_BT, batch.activation_BD, objective)
        parts["encoder_error"] = jnp.mean(error_B)
    if trainable["decoder"]:
        decoder = decoder_of(trainable, frozen)
        with jax.named_scope("write"):
            states = teacher_forced_states(decoder, batch.activation_BD, target_BT, spec=spec)
            terms = text_terms(decoder_head(decoder, spec), states, target_BT)
        parts["decoder_nll"] = mean_of_texts(terms["nll"], real_BT)
    return sum(parts.values(), jnp.float32(0)), parts


def prepare(
    trainable: Params,
    frozen: Params,
    batch: Batch,
    noise: Noise | Float[Array, "B T V"],
    keys_B: Key[Array, "B"] | None = None,
    gap_keys_B: Key[Array, "B"] | None = None,
    *,
    objective: Objective,
) -> Prepared:
    """Samples the text and reads the context, without gradient.

    A score-function estimator samples k texts per row: then B = R k in everything but ``batch``,
    with the texts of one row in succession. ``keys_B`` are for an estimator that draws its own
    noise in the backward pass, ``gap_keys_B`` for the anchor's targets.
    """
    spec, original, noise = objective.spec, frozen["original"], as_noise(noise)
    decoder, copies = decoder_of(trainable, frozen), objective.texts_per_row
    activation_BD = repeat_rows(batch.activation_BD, copies)
    with jax.named_scope("decode"):
        text_BT = generate(decoder, activation_BD, noise, spec=spec)
    context = None
    if objective.uses("kl"):
        with jax.named_scope("prefix_pass"):
            context = original_model.read_context(
                original,
                batch.tokens_GS,
                batch.mask_GS,
                batch.positions_B,
                horizon=objective.loss.kl_horizon,
                spec=spec,
            )
            context = original_model.repeat_context(context, copies)
    reference = None
    if objective.uses("lm"):
        with jax.named_scope("reference"):
            reference = reference_text(frozen, activation_BD, text_BT, objective)
    keys_BT = None
    if objective.estimator.kind == "gumbel_rao" and keys_B is not None:
        keys_BT = token_keys(keys_B, spec.text_len)
    return Prepared(text_BT, noise, context, reference, keys_BT, gap_keys_B)


def reference_text(
    frozen: Params, activation_BD: Array, text_BT: Int[Array, "B T"], objective: Objective
) -> ReferenceLogits:
    """The next-token predictions that L_LM compares the decoder's with (``loss.lm_reference``)."""
    spec, original = objective.spec, frozen["original"]
    if objective.loss.lm_reference == "warm":
        warm: Decoder = decoder_of({"decoder": frozen["warm_decoder"]}, frozen)
        states = teacher_forced_states(warm, activation_BD, text_BT, spec=spec)
        return ReferenceLogits(decoder_head(warm, spec), states)
    start = () if spec.bos is None else (spec.bos,)
    if objective.loss.lm_reference == "prompt":
        start = spec.decoder_left + spec.decoder_right or start
    return original_model.text_alone(original, text_BT, start, spec)


def joint_loss(
    trainable: Params,
    frozen: Params,
    batch: Batch,
    prepared: Prepared,
    weights: dict[str, Float[Array, ""]],
    tau: Float[Array, ""],
    *,
    objective: Objective,
) -> tuple[Float[Array, ""], Metrics]:
    """The loss of a batch, differentiable in every trainable part.

        total = w_lm L_LM + w_kl L_KL + w_mse L_MSE + w_text L_text + w_len L_length − w_ent H
                (+ policy gradient)

    The decoder writes the text again with a gradient, the encoder reads it, and M predicts with the
    reconstruction in the activation's place.

    Args:
      prepared: text, context and reference of this batch, from :func:`prepare`.
      weights: current weight of each of :data:`TERMS`.
      tau: current temperature of the straight-through gradient.

    Returns:
      (total, each term unweighted).
    """
    spec = objective.spec
    decoder, encoder = decoder_of(trainable, frozen), encoder_of(trainable, frozen, spec)
    activation_BD = repeat_rows(batch.activation_BD, objective.texts_per_row)
    state_BTD, text_BTD = write_text(decoder, encoder, activation_BD, prepared, tau, objective)
    with jax.named_scope("text_terms"):
        head = decoder_head(decoder, spec)
        of_tokens = text_terms(head, state_BTD, prepared.text_BT, prepared.reference, spec.end)
    real_BT = real_tokens(prepared.text_BT, spec.end)
    with jax.named_scope("encode"):
        reconstruction_BD, error_B = read_text(encoder, text_BTD, real_BT, activation_BD, objective)

    costs = {"mse": error_B}
    if prepared.context is not None:
        costs["kl"] = swap_kl(
            frozen, batch, prepared.context, reconstruction_BD, activation_BD, objective
        )
    terms, anchor = {name: jnp.mean(cost_B) for name, cost_B in costs.items()}, {}
    # Nothing else needs the states of a detached text.
    if objective.estimator.kind != "detached" or objective.uses("entropy"):
        terms["entropy"] = mean_of_texts(of_tokens["entropy"], real_BT)
    if objective.uses("length"):
        terms["length"] = jnp.mean(text_lengths(of_tokens["goes_on"], real_BT))
    if prepared.reference is not None:
        terms["lm"] = mean_of_texts(of_tokens["lm"], real_BT)
    if objective.uses("text"):
        terms["text"], anchor = text_anchor(
            trainable, frozen, batch, prepared.gap_keys_B, objective
        )

    used = [name for name in TERMS if name in terms and objective.uses(name)]
    total = sum(TERMS[name] * weights[name] * terms[name] for name in used)
    if objective.estimator.kind in SCORE_FUNCTION:
        log_p_B = -sum_of_text(of_tokens["nll"], real_BT)
        total += policy_term(costs, log_p_B, weights, objective)
    return jnp.asarray(total, jnp.float32), {**terms, **anchor}


def text_anchor(
    trainable: Params,
    frozen: Params,
    batch: Batch,
    gap_keys_B: Key[Array, "B"] | None,
    objective: Objective,
) -> tuple[Float[Array, ""], Metrics]:
    """L_text, the warm start's loss on the same rows; ``loss.text_read``: for the encoder too."""
    reads = objective.loss.text_read
    with jax.named_scope("text_anchor"):
        return warm_loss(trainable, frozen, batch, gap_keys_B, objective=objective, reads=reads)


def policy_term(
    costs: Mapping[str, Float[Array, "B"]],
    log_p_B: Float[Array, "B"],
    weights: Mapping[str, Float[Array, ""]],
    objective: Objective,
) -> Float[Array, ""]:
    """The score-function gradient of the cost w_mse L_MSE + w_kl L_KL of each text.

    Args:
      costs: L_MSE and L_KL of each text.
      log_p_B: log probability of each text, up to its end.
    """
    cost_B = sum(weights[name] * cost_B for name, cost_B in costs.items())
    return policy_loss(cost_B, log_p_B, objective.texts_per_row, objective.estimator.kind)


def write_text(
    decoder: Decoder,
    encoder: Encoder,
    activation_BD: Float[Array, "B D"],
    prepared: Prepared,
    tau: Float[Array, ""],
    objective: Objective,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """The sampled text again, in one pass with a gradient.

    Returns:
      The decoder's state for each token (the input of its logits), and the tokens' embeddings for
      the encoder, with the estimator's gradient to the decoder; none if the estimator takes the
      tokens as constants.
    """
    spec, text_BT = objective.spec, prepared.text_BT
    if objective.estimator.kind in TOKENS_ARE_CONSTANT:
        state_BTD = teacher_forced_states(decoder, activation_BD, text_BT, spec=spec)
        return state_BTD, embed_tokens(encoder.base, text_BT, spec.model)
    noise, keys_BT = prepared.noise, prepared.keys_BT
    with jax.named_scope("re_forward"):
        state_BTD = text_states(decoder, activation_BD, text_BT, noise, tau, spec, keys_BT)
    with jax.named_scope("sampled_tokens"):
        rows_BTD = sampled_embeddings(
            decoder_head(decoder, spec),
            state_BTD,
            noise,
            text_BT,
            token_table(encoder.base),
            tau,
            estimator=objective.estimator,
            keys_BT=keys_BT,
        )
        return state_BTD, scale_embeddings(rows_BTD, spec.model)


def read_text(
    encoder: Encoder,
    text_BTD: Float[Array, "B T D"],
    real_BT: Bool[Array, "B T"] | None,
    activation_BD: Float[Array, "B D"],
    objective: Objective,
) -> tuple[Float[Array, "B D"], Float[Array, "B"]]:
    """The encoder's reconstruction from the text, and its error (L_MSE of each row).

    ``loss.prefix_share`` is the share of the error that is the mean over all shorter prefixes of
    the text, from the same pass. ``real_BT`` are the tokens up to the end, None: all.
    """
    spec, share = objective.spec, objective.loss.prefix_share
    error = functools.partial(
        reconstruction_error, statistics=encoder.statistics, kind=objective.loss.mse_kind
    )
    last_B = None if real_BT is None else last_real(real_BT)
    if not share:
        reconstruction_BD = encode_embeddings(encoder, text_BTD, spec=spec, last_B=last_B)
        return reconstruction_BD, error(reconstruction_BD, activation_BD)
    prefixes_BTD = encode_prefixes(encoder, text_BTD, spec=spec)
    error_BT = error(prefixes_BTD, activation_BD[:, None])
    if last_B is None:
        error_B = (1 - share) * error_BT[:, -1] + share * jnp.mean(error_BT[:, :-1], axis=1)
        return prefixes_BTD[:, -1], error_B
    whole_B = take_places(error_BT, last_B)
    shorter_B = jnp.sum(jnp.where(real_BT, error_BT, 0.0), axis=1) - whole_B
    # A text of one token has no shorter prefix.
    shorter_B = jnp.where(
        last_B > 0, shorter_B / jnp.maximum(last_B, 1).astype(jnp.float32), whole_B
    )
    return take_places(prefixes_BTD, last_B), (1 - share) * whole_B + share * shorter_B


def swap_kl(
    frozen: Params,
    batch: Batch,
    context: Context,
    reconstruction_BD: Float[Array, "B D"],
    activation_BD: Float[Array, "B D"],
    objective: Objective,
) -> Float[Array, "B"]:
    """L_KL of each row: between M's predictions from P on with the activation and with ã in its
    place (a swap, or activation patching)."""
    texts_per_document = objective.texts_per_row * batch.rows_per_document
    vector_BD = swap_vector(reconstruction_BD, activation_BD, objective.spec, texts_per_document)
    with jax.named_scope("swap"):
        swapped_BhV = original_model.swapped_logits(
            frozen["original"], context, vector_BD, spec=objective.spec
        )
        return jnp.mean(kl_divergence(context.logits_BhV, swapped_BhV), axis=-1)


def swap_vector(
    reconstruction_BD: Float[Array, "B D"],
    activation_BD: Float[Array, "B D"],
    spec: LensSpec,
    texts_per_document: int = 1,
) -> Float[Array, "B D"]:
    """ã, the vector that is swapped in: â, or with the dual path â + Δ, Δ = a' − â' of another row.

    The other row is of the previous document in the batch: documents are shuffled, so it is a
    random activation, and its reconstruction is already computed.
    """
    if not spec.lens.dual_path:
        return reconstruction_BD
    error_BD = activation_BD.astype(jnp.float32) - reconstruction_BD
    delta_BD = jnp.roll(error_BD, texts_per_document, axis=0)
    if spec.lens.stop_gradient_delta:
        delta_BD = jax.lax.stop_gradient(delta_BD)
    return reconstruction_BD + delta_BD
