"""A lens as two plain transformers checkpoints with the sidecars of an NLA pair.

    av/   the decoder's language model, whole, with its tokenizer
    ar/   the encoder's first L + 1 layers; value_head.safetensors is its projection
    */nla_meta.yaml             role, layer, width, prompts; and the section ``conlens``
    */conlens_parts.safetensors arrays that the sidecar's own keys do not cover

The transformers are ordinary ones. A lens differs from an NLA in three ways, so the section
``conlens`` of the sidecar names the file with the additional arrays:

* its prompts are trained vectors: ``prompt_left`` and ``prompt_right`` [p, D] go before and after
  the slot (AV) or the embeddings of the text (AR), as ``inputs_embeds``;
* the AR reconstructs from the tokens that the AV writes: pass the ids, since the text, tokenised
  again, may give others;
* the AV's slot is ``(a − mean) / scale @ slot_kernel + slot_bias``, not a scaled activation; and
  the AR's head has a bias: ``state @ weight.T + bias``, with the output of its last block as state.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import yaml

from conlens_jax.files.paths import local_path
from conlens_jax.files.whole import write_whole
from conlens_jax.inspection.lens import Lens
from conlens_jax.lens.spec import decoder_of, encoder_of
from conlens_jax.models.hf_io import save_model
from conlens_jax.nla.sidecar import SIDECAR, VALUE_HEAD

PARTS = "conlens_parts.safetensors"


def export_pair(lens: Lens, folder: str | Path) -> tuple[Path, Path]:
    """Writes ``<folder>/av`` and ``<folder>/ar``.

    Raises:
      ValueError: a lens with adapters or input patches, which a plain checkpoint cannot contain; a
        model whose first layers are not a model of its family.
    """
    try:
        lens.spec.model.first_layers(lens.spec.layer + 1)
    except ValueError as error:
        raise ValueError(f"{error}; use Lens.save instead") from None
    unsupported = [
        f"{side}.{name}"
        for side in ("decoder", "encoder")
        for name in ("lora", "input_patches")
        if name in lens.trainable[side]
    ]
    if unsupported or lens.spec.model.quantise:
        what = ", ".join(unsupported) or "model.quantise"
        raise ValueError(f"a plain checkpoint cannot contain {what}; use Lens.save instead")
    av, ar = local_path(folder) / "av", local_path(folder) / "ar"
    _write_av(lens, av)
    _write_ar(lens, ar)
    return av, ar


def _write_av(lens: Lens, folder: Path) -> None:
    spec, decoder = lens.spec, decoder_of(lens.trainable, lens.frozen)
    base = dict(decoder.base)
    # A separate output head unties the exported model.
    own_head = "output_head" in lens.trainable["decoder"]
    if own_head:
        base["output_head"] = decoder.head_DV
    tied = spec.model.tied_embeddings and not own_head
    save_model(folder, dataclasses.replace(spec.model, tied_embeddings=tied), base)
    lens.model.tokenizer.save(folder)
    statistics, left = decoder.statistics, len(spec.decoder_left)
    _write_parts(
        folder,
        prompt_left=decoder.prompt_pD[:left],
        prompt_right=decoder.prompt_pD[left:],
        slot_kernel=decoder.projection["kernel"],
        slot_bias=decoder.projection["bias"],
        mean=statistics["mean"],
        scale=statistics["scale"][None],
    )
    template = spec.lens.decoder_prompt.replace("<embed>", "{injection_char}")
    _write_sidecar(lens, folder, "av", template, {"injection_scale": None})


def _write_ar(lens: Lens, folder: Path) -> None:
    """The norm and head that transformers expects after the layers are the original's."""
    spec, encoder = lens.spec, encoder_of(lens.trainable, lens.frozen, lens.spec)
    config = spec.model.first_layers(spec.layer + 1)
    unchanged = {
        name: leaf for name, leaf in lens.frozen["original"].items() if name not in encoder.base
    }
    save_model(folder, config, {**unchanged, **encoder.base})
    lens.model.tokenizer.save(folder)
    kernel, bias = (encoder.projection[name].astype(jnp.float32) for name in ("kernel", "bias"))
    mean, scale = encoder.statistics["mean"], encoder.statistics["scale"]
    # ((s − mean) / scale · W + b) · scale + mean, for a head on the state s itself.
    weight = {"weight": np.ascontiguousarray(np.asarray(kernel).T)}
    safetensors.numpy.save_file(weight, folder / VALUE_HEAD)
    left = len(spec.encoder_left)
    _write_parts(
        folder,
        prompt_left=encoder.prompt_pD[:left],
        prompt_right=encoder.prompt_pD[left:],
        bias=scale * bias + mean - mean @ kernel,
    )
    template = spec.lens.encoder_prompt.replace("<text>", "{explanation}")
    _write_sidecar(lens, folder, "ar", template, {"mse_scale": float(spec.model.d_model**0.5)})


def _write_parts(folder: Path, **arrays: Any) -> None:
    tensors = {name: np.ascontiguousarray(np.asarray(array)) for name, array in arrays.items()}
    safetensors.numpy.save_file(tensors, folder / PARTS)


def _write_sidecar(
    lens: Lens, folder: Path, role: str, template: str, extraction: dict[str, Any]
) -> None:
    values = {
        "kind": "nla_model",
        "role": role,
        "d_model": lens.spec.model.d_model,
        "base_model": lens.model.model_id,
        "extraction_layer_index": lens.spec.layer,
        "extraction": extraction,
        "prompt_templates": {role: template},
        "conlens": {"parts": PARTS, "text_len": lens.spec.text_len},
    }
    write_whole(folder / SIDECAR, yaml.safe_dump(values, sort_keys=False))
