"""The lens as data: its parts, and which of them are trained.

``trainable`` contains what the optimizer changes. ``frozen`` contains the original model, the parts
that are not trained, and the activation statistics. A part is looked up in ``trainable`` first; a
base that is in neither is the original's own arrays, so frozen weights exist once. Low-rank
adapters (``lora``) are applied inside the layers of such a base.

    trainable = {"decoder": {"base" or "lora", "projection", "soft_prompt", "output_head",
                             "input_patches"},
                 "encoder": {"base" or "lora", "projection", "soft_prompt"}}
    frozen    = {"original", "decoder": {...}, "encoder": {...}, "statistics": {"mean", "scale"},
                 "lora_scale"}
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from conlens_jax.config import LensConfig
from conlens_jax.config.rules import LORA_TARGETS
from conlens_jax.config.seeds import random_key
from conlens_jax.models.adapters import init_adapters, with_adapters
from conlens_jax.models.embeddings import embed_tokens, scale_embeddings, token_table
from conlens_jax.models.families import family_of
from conlens_jax.models.hf_io import BELOW_THE_LAYERS
from conlens_jax.models.layer_kinds import params_of, slice_layers
from conlens_jax.models.param_table import Params
from conlens_jax.models.tokenizer import Tokenizer
from conlens_jax.models.transformer import output_head
from conlens_jax.models.transformer_config import TransformerConfig
from conlens_jax.parallel.constrain import constrain


@dataclasses.dataclass(frozen=True)
class LensSpec:
    """Everything about a lens that is not an array; hashable, for a static argument of ``jit``.

    Attributes:
      model: shape of the language model.
      layer: the block whose output is read.
      lens: which parts train, text length, gradient switches.
      decoder_left, decoder_right: prompt tokens before and after the activation's slot.
      encoder_left, encoder_right: prompt tokens before and after the text.
      bos: first token where M reads a text alone, or None.
      end: the token that a text ends with, or None if all texts have T tokens.
      gap: the token that stands for what cannot be named, or None.
    """

    model: TransformerConfig
    layer: int
    lens: LensConfig
    decoder_left: tuple[int, ...]
    decoder_right: tuple[int, ...]
    encoder_left: tuple[int, ...]
    encoder_right: tuple[int, ...]
    bos: int | None
    end: int | None = None
    gap: int | None = None

    @property
    def text_len(self) -> int:
        return self.lens.text_len


def make_spec(
    model: TransformerConfig, layer: int, lens: LensConfig, tokenizer: Tokenizer
) -> LensSpec:
    """Tokenises the prompts.

    Raises:
      ValueError: the layer is out of range, or a prompt has unknown words.
    """
    if not 0 <= layer < model.n_layers:
        raise ValueError(
            f"model.layer={layer} is out of range: the model has layers 0 to {model.n_layers - 1}"
        )
    if lens.input_patches >= model.n_layers:
        raise ValueError(
            f"lens.input_patches={lens.input_patches} must be at most {model.n_layers - 1}: the "
            f"model has {model.n_layers} layers, and the first one's input is the slot itself"
        )
    _check_adapters(model, lens)
    start = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
    pieces = []
    for field, slot in (("decoder_prompt", "<embed>"), ("encoder_prompt", "<text>")):
        for text in getattr(lens, field).split(slot):
            ids = tuple(tokenizer.encode(text.strip()))
            if tokenizer.unk_id is not None and tokenizer.unk_id in ids:
                raise ValueError(
                    f"lens.{field}={getattr(lens, field)!r} has words that the tokenizer does not "
                    f"know ({text.strip()!r}); use words of the model's vocabulary or {slot} alone"
                )
            pieces.append(ids)
    written = len(start) + len(pieces[0]) + 1 + len(pieces[1]) + lens.text_len - 1
    read = len(start) + len(pieces[2]) + lens.text_len + len(pieces[3])
    if model.learned_positions and max(written, read) > model.max_positions:
        raise ValueError(
            f"lens.text_len={lens.text_len} and the prompts take {max(written, read)} positions; "
            f"the model has learned {model.max_positions}"
        )
    return LensSpec(
        model=model,
        layer=layer,
        lens=lens,
        decoder_left=start + pieces[0],
        decoder_right=pieces[1],
        encoder_left=start + pieces[2],
        encoder_right=pieces[3],
        bos=tokenizer.bos_id,
        end=token_of_field("lens.end_token", lens.end_token, tokenizer),
        gap=token_of_field("lens.gap_token", lens.gap_token, tokenizer),
    )


def token_of_field(field: str, text: str, tokenizer: Tokenizer) -> int | None:
    """The id of the one token that a setting names, ``"<eos>"`` for the tokenizer's own end of
    text; None if it is empty.

    Raises:
      ValueError: it is not one token of the vocabulary.
    """
    if not text:
        return None
    ids = tokenizer.encode(text)
    if text == "<eos>" and tokenizer.eos_id is not None:
        ids = [tokenizer.eos_id]
    if len(ids) != 1 or ids[0] == tokenizer.unk_id:
        found = ", ".join(repr(tokenizer.token(i)) for i in ids) or "nothing"
        raise ValueError(
            f"{field}={text!r} must be one token of the model's vocabulary, where it is {found}; "
            "choose another, or leave it empty"
        )
    return ids[0]


def _check_adapters(model: TransformerConfig, lens: LensConfig) -> None:
    """Raises ValueError if adapters are requested for matrices that the model does not have."""
    if "lora" not in (lens.train_decoder, lens.train_encoder):
        return
    table = family_of(model).param_table(model)
    existing = [name for name in LORA_TARGETS if ("layers", name) in {row.path for row in table}]
    missing = [name for name in lens.lora_target_names if name not in existing]
    if missing:
        raise ValueError(
            f"lens.lora_targets has {', '.join(missing)}, which a {model.family} model does not "
            f"have; its layers have {', '.join(existing)}"
        )


class Decoder(NamedTuple):
    """The decoder's weights, trained and frozen ones together."""

    base: Params
    projection: Params
    prompt_pD: Float[Array, "p D"]
    head_DV: Float[Array, "D V"]
    statistics: Params
    input_patches: Params | None


class Encoder(NamedTuple):
    """The encoder's weights; ``base`` contains the embeddings and the layers up to the lens's."""

    base: Params
    projection: Params
    prompt_pD: Float[Array, "p D"]
    statistics: Params


def decoder_of(trainable: Params, frozen: Params) -> Decoder:
    parts = {**frozen["decoder"], **trainable["decoder"]}
    base = _adapted(parts.get("base", frozen["original"]), parts, frozen)
    head = parts.get("output_head", output_head(base))
    prompt_pD, patches = _prompt(parts, base), parts.get("input_patches")
    return Decoder(base, parts["projection"], prompt_pD, head, frozen["statistics"], patches)


def encoder_of(trainable: Params, frozen: Params, spec: LensSpec) -> Encoder:
    parts = {**frozen["encoder"], **trainable["encoder"]}
    base = parts.get("base") or _encoder_base(frozen["original"], spec)
    base = _adapted(base, parts, frozen)
    return Encoder(base, parts["projection"], _prompt(parts, base), frozen["statistics"])


def _adapted(base: Params, parts: Params, frozen: Params) -> Params:
    """The base with the adapters in its layers, if there are any."""
    if "lora" not in parts:
        return base
    return {**base, "layers": with_adapters(base["layers"], parts["lora"], frozen["lora_scale"])}


def _prompt(parts: Params, base: Params) -> Float[Array, "p D"]:
    """The prompt's vectors, those before the slot first."""
    table_VD = token_table(base)
    return parts.get("soft_prompt", jnp.zeros((0, table_VD.shape[1]), table_VD.dtype))


def _encoder_base(original: Params, spec: LensSpec) -> Params:
    below = {name: original[name] for name in BELOW_THE_LAYERS if name in original}
    return {**below, "layers": slice_layers(original["layers"], 0, spec.layer + 1)}


def init_lens(
    original: Params, spec: LensSpec, mean_D: np.ndarray, scale: float, *, seed: int = 0
) -> tuple[Params, Params]:
    """The lens before any training: identity projections, prompts at their text's embeddings,
    adapters and patches that change nothing yet.

    Args:
      original: parameters of M; a frozen clone shares them without a copy.
      mean_D, scale: statistics of the training activations; see :func:`normalise`.
      seed: for the adapters' random matrices.

    Returns:
      (trainable, frozen).
    """
    lens, width = spec.lens, spec.model.d_model
    dtype = original["embedding"].dtype
    rows_rms = jnp.sqrt(jnp.mean(jnp.square(original["embedding"].astype(jnp.float32))))
    embedding_rms = scale_embeddings(rows_rms, spec.model)

    def soft_prompt(tokens: tuple[int, ...]) -> Params:
        # Orbax cannot store an empty array: without a prompt there is no such part.
        ids = jnp.asarray(tokens, jnp.int32)
        return {"soft_prompt": embed_tokens(original, ids, spec.model)} if tokens else {}

    def projection(gain: Array) -> Params:
        identity = jnp.eye(width, dtype=dtype) * gain.astype(dtype)
        return {"kernel": identity, "bias": jnp.zeros(width, dtype)}

    copy = lambda tree: jax.tree.map(jnp.copy, tree)
    # The decoder can read a slot of the same size as the embeddings around it from the start.
    decoder = {
        "projection": projection(embedding_rms),
        **soft_prompt(spec.decoder_left + spec.decoder_right),
    }
    encoder = {
        "projection": projection(jnp.float32(1.0)),
        **soft_prompt(spec.encoder_left + spec.encoder_right),
    }
    trained = set()
    if lens.train_projections:
        trained.add("projection")
    if lens.train_soft_prompt:
        trained.add("soft_prompt")
    trainable = {
        side: {name: part for name, part in parts.items() if name in trained}
        for side, parts in (("decoder", decoder), ("encoder", encoder))
    }
    frozen = {
        "original": original,
        "decoder": {name: part for name, part in decoder.items() if name not in trained},
        "encoder": {name: part for name, part in encoder.items() if name not in trained},
        "statistics": {
            "mean": jnp.asarray(mean_D, jnp.float32),
            "scale": jnp.asarray(scale, jnp.float32),
        },
    }
    if lens.train_decoder == "full":
        trainable["decoder"]["base"] = copy(original)
    if lens.train_encoder == "full":
        base = _encoder_base(original, spec)
        trainable["encoder"]["base"] = copy({**base, "layers": params_of(base["layers"])})
    if lens.train_output_head and not (lens.train_decoder == "full" and "output_head" in original):
        # A separate trained head: of a frozen decoder, or untied from a trained embedding. It is
        # in floats even if the original's is int8.
        trainable["decoder"]["output_head"] = jnp.copy(output_head(original).astype(dtype))
    if lens.input_patches:
        n = lens.input_patches
        trainable["decoder"]["input_patches"] = {
            "kernel": jnp.zeros((n, width, width), dtype),
            "bias": jnp.zeros((n, width), dtype),
        }
    depths = {"decoder": spec.model.n_layers, "encoder": spec.layer + 1}
    sides = [side for side in depths if getattr(lens, f"train_{side}") == "lora"]
    keys = dict(zip(depths, jax.random.split(random_key(seed)), strict=True))
    for side in sides:
        trainable[side]["lora"] = init_adapters(
            spec.model, depths[side], lens.lora_target_names, lens.lora_rank, keys[side]
        )
        frozen["lora_scale"] = jnp.float32(lens.lora_alpha / lens.lora_rank)
    return trainable, frozen


def normalise(activation: Float[Array, "*B D"], statistics: Params) -> Float[Array, "*B D"]:
    """(a − mean) / scale, fp32: in these coordinates the projections start as identities."""
    wide = activation.astype(jnp.float32)
    return (wide - jax.lax.broadcast_to_rank(statistics["mean"], wide.ndim)) / statistics["scale"]


def denormalise(normal: Float[Array, "*B D"], statistics: Params) -> Float[Array, "*B D"]:
    """The inverse of :func:`normalise`."""
    scaled = normal.astype(jnp.float32) * statistics["scale"]
    return scaled + jax.lax.broadcast_to_rank(statistics["mean"], scaled.ndim)


def renormalised(
    trainable: Params,
    before: tuple[np.ndarray, float],
    after: tuple[np.ndarray, float],
) -> Params:
    """The trained parts of a lens for activations that are normalised in another way, so that it
    stays the same function of the raw activations.

    Args:
      trainable: with the projections of both sides.
      before, after: (mean [D], scale) of :func:`normalise`.
    """
    (mean_before, scale_before), (mean_after, scale_after) = before, after
    # NumPy values: the same in every process, whatever mesh the parts are on.
    ratio = np.float32(scale_after / scale_before)
    shift_D = np.asarray((mean_after - np.asarray(mean_before)) / scale_before, np.float32)

    def reads(parts: Params) -> Params:
        # x_before = ratio · x_after + shift
        kernel = parts["kernel"].astype(jnp.float32)
        bias = parts["bias"].astype(jnp.float32) + jnp.einsum("d,...de->...e", shift_D, kernel)
        return {"kernel": kernel * ratio, "bias": bias}

    def writes(parts: Params) -> Params:
        # x_after = (x_before − shift) / ratio
        return {"kernel": parts["kernel"] / ratio, "bias": (parts["bias"] - shift_D) / ratio}

    decoder, encoder = trainable["decoder"], trainable["encoder"]
    patches = {name: reads(decoder[name]) for name in ("input_patches",) if name in decoder}
    changed = {
        "decoder": {**decoder, "projection": reads(decoder["projection"]), **patches},
        # It reads a state of the same layer, which is normalised like the activation.
        "encoder": {**encoder, "projection": writes(reads(encoder["projection"]))},
    }
    as_before = lambda new, old: jax.device_put(new.astype(old.dtype), old.sharding)
    return jax.tree.map(as_before, changed, trainable)


def project(x: Float[Array, "*B D"], projection: Params) -> Float[Array, "*B D"]:
    # Stored split over fsdp, gathered for the product: else the compiler would reshard the batch.
    kernel = constrain(projection["kernel"], "DD")
    product = jnp.matmul(x.astype(kernel.dtype), kernel)
    return product + jax.lax.broadcast_to_rank(projection["bias"], product.ndim)


def around(
    prompt_pD: Float[Array, "p D"], middle_BmD: Float[Array, "B m D"], n_left: int
) -> Float[Array, "B S D"]:
    """The prompt's vectors around those of each row: ``n_left`` before them, the rest after."""
    batch, _, width = middle_BmD.shape
    repeat = lambda part: jnp.broadcast_to(part, (batch, len(part), width)).astype(middle_BmD.dtype)
    return jnp.concatenate(
        [repeat(prompt_pD[:n_left]), middle_BmD, repeat(prompt_pD[n_left:])], axis=1
    )
