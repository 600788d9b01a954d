"""Gemma 4, its dense text models: Gemma 3 with plain norm weights, values with a norm, unscaled
scores, a factor at each layer's output, and layers that differ in more than their window.

* Layers without a window have wider heads (``global_head_dim``), perhaps fewer key-value heads, and
  perhaps no value matrix (``attention_k_eq_v``): the values are then the keys before norm and
  rotation. A parameter is one array over all layers, the rest of a smaller layer's part is zero
  (:mod:`conlens_jax.models.layer_shapes`).
* The last ``num_kv_shared_layers`` layers use the keys and values of the last earlier layer of
  their type, and may have an MLP of twice the width.
* In models with ``hidden_size_per_layer_input`` each layer also adds norm(W₂ (act(W₁ x) ⊙ p)). Its
  input p is made of the token's embedding and of the token's row in a second table
  (:mod:`conlens_jax.models.embeddings`). A mixture of tokens has the mixture of their rows in both,
  so the gradient through a sampled token goes through both. A vector in the place of a token, the
  lens's activation for example, has the pad token's row in the second one, as transformers' Gemma 4
  has for the places of an image.

Source: transformers' ``modeling_gemma4.py`` and ``configuration_gemma4.py``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families import common, gemma2
from conlens_jax.models.hf_config import (
    FULL,
    SLIDING,
    HFConfigReader,
    activation_to_hf,
    layer_types_to_hf,
)
from conlens_jax.models.hf_rope import parse_rope, ropes_to_hf
from conlens_jax.models.param_table import ParamRow
from conlens_jax.models.transformer_config import LayerShape, RopeConfig, TransformerConfig

MODEL_TYPE = "gemma4_text"
# Files of the hub have keys and values for layers that use those of others.
NOT_NEEDED = (r"model\.layers\.\d+\.self_attn\.[kv]_(proj|norm)\.(weight|bias)",)
_EXPERT_KEYS = {"num_experts", "top_k_experts", "moe_intermediate_size"}
_NEUTRAL = {
    # "vision": tokens of one image see each other, tokens of text as ever.
    "use_bidirectional_attention": (None, "vision"),
}
_ROPES = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
}


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    read = HFConfigReader(values, "Gemma4TextConfig")
    sizes = common.read_sizes(
        read,
        vocab_size=262_144,
        d_model=2304,
        d_mlp=9216,
        n_layers=30,
        n_heads=8,
        n_kv_heads=4,
        head_dim=256,
        max_positions=131_072,
        tied=True,
        bos=2,
        eos=1,
    )
    n_layers = sizes["n_layers"]
    windows = _windows(read, n_layers)
    n_sharing = _sharing_layers(read, windows, n_layers)
    shapes = _shapes(read, sizes, windows, n_sharing)
    whole = LayerShape(*map(max, zip(*shapes, strict=True)))
    _check_heads(read, sizes["n_heads"], shapes, whole)
    keys_are_values = read("attention_k_eq_v", False)
    d_input = read("hidden_size_per_layer_input", 256) or 0
    rope, local_rope = _ropes(read, sizes["max_positions"])
    if (rows := read("vocab_size_per_layer_input", 262_144)) != sizes["vocab_size"] and d_input:
        read.problems.append(
            f"vocab_size_per_layer_input={rows}: only vocab_size={sizes['vocab_size']} is supported"
        )
    if read("enable_moe_block", False):
        read.problems.append(
            "enable_moe_block=True: layers with a mixture of experts beside their MLP (Gemma 4 "
            "26B-A4B) are not supported; the dense models (E2B, E4B, 31B) are"
        )
    config = TransformerConfig(
        family=MODEL_TYPE,
        **sizes | whole._asdict(),
        layer_shapes=() if all(shape == whole for shape in shapes) else shapes,
        norm_in_fp32=True,
        post_norms=True,
        qk_norm="head",
        value_norm=True,
        values_are_keys=tuple(not window for window in windows) if keys_are_values else (),
        n_sharing_layers=n_sharing,
        d_layer_input=d_input,
        layer_input_pad=(read.token_id("pad_token_id", 0) or 0) if d_input else 0,
        output_scales=True,
        activation=read.activation("hidden_activation", "gelu_pytorch_tanh"),
        embedding_scale=math.sqrt(sizes["d_model"]),
        attention_bias=read("attention_bias", False),
        attention_scale=1.0,
        final_soft_cap=read("final_logit_softcapping", None) or 0.0,
        rope=rope,
        local_rope=local_rope,
        windows=windows if any(windows) else (),
    )
    read.finish(ignored=common.IGNORED_KEYS | _EXPERT_KEYS, neutral=_NEUTRAL)
    return config


def _windows(read: HFConfigReader, n_layers: int) -> tuple[int, ...]:
    """The last layer never has a window, whatever ``layer_types`` says."""
    window = read("sliding_window", 512)
    windows = read.windows(n_layers, window, lambda layer: (layer + 1) % 6 != 0)
    return (*windows[:-1], 0) if windows else (0,) * n_layers


def _sharing_layers(read: HFConfigReader, windows: tuple[int, ...], n_layers: int) -> int:
    n_sharing = read("num_kv_shared_layers", 0)
    own = {window > 0 for window in windows[: n_layers - n_sharing]}
    if not own >= {window > 0 for window in windows}:
        read.problems.append(
            f"num_kv_shared_layers={n_sharing}: before these there must be a layer of each type "
            f"that they have, of {n_layers} layers"
        )
        return 0
    return n_sharing


def _shapes(
    read: HFConfigReader, sizes: Mapping[str, Any], windows: tuple[int, ...], n_sharing: int
) -> tuple[LayerShape, ...]:
    """Each layer's own sizes: by ``per_layer_config``, or by the keys that it has replaced."""
    plain = LayerShape(sizes["head_dim"], sizes["n_kv_heads"], sizes["d_mlp"])
    # Without such a key they are as wide as Gemma 4's.
    wide = plain._replace(head_dim=read("global_head_dim", 512) or 512)
    kv_heads = read("num_global_key_value_heads", None)
    if read("attention_k_eq_v", False) and kv_heads:
        wide = wide._replace(n_kv_heads=kv_heads)
    shapes = [plain if window else wide for window in windows]
    if (given := read("per_layer_config", None)) is not None:
        names = {"head_dim": "head_dim", "num_key_value_heads": "n_kv_heads"}
        shapes = [plain] * len(windows)
        for layer, changes in given.items():
            if set(changes) - names.keys() or int(layer) >= len(windows):
                read.problems.append(f"per_layer_config has {layer}: {changes!r}: not supported")
                continue
            ours = {names[key]: value for key, value in changes.items()}
            shapes[int(layer)] = plain._replace(**ours)
    if read("use_double_wide_mlp", False):
        first = len(windows) - n_sharing
        double = [shape._replace(d_mlp=2 * shape.d_mlp) for shape in shapes[first:]]
        shapes[first:] = double
    return tuple(shapes)


def _check_heads(
    read: HFConfigReader, n_heads: int, shapes: tuple[LayerShape, ...], whole: LayerShape
) -> None:
    for shape in dict.fromkeys(shapes):
        if shape.head_dim % 2:
            read.problems.append(f"heads of {shape.head_dim} entries cannot be rotated")
        if n_heads % whole.n_kv_heads or whole.n_kv_heads % shape.n_kv_heads:
            read.problems.append(
                f"layers with {shape.n_kv_heads} and {whole.n_kv_heads} key-value heads for "
                f"{n_heads} query heads: each must divide the next"
            )


def _ropes(read: HFConfigReader, max_positions: int) -> tuple[RopeConfig, RopeConfig]:
    """The rotations of layers without and with a window."""
    given = read("rope_parameters", None) or _ROPES
    ropes = []
    for kind in (FULL, SLIDING):
        rope = given.get(kind) if isinstance(given.get(kind), Mapping) else {}
        if "rope_theta" not in rope:
            read.problems.append(f"rope_parameters={given!r} needs rope_theta for {kind!r}")
        rope = {"rope_theta": 10_000.0} | dict(rope)
        ropes.append(parse_rope(read, rope, max_positions, proportional=True))
    return ropes[0], ropes[1]


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    shapes = [config.shape_of(layer) for layer in range(config.n_layers)]
    windows = config.windows or (0,) * config.n_layers
    # The sizes of the layers that per_layer_config does not name; the first layer shares nothing.
    plain = shapes[windows.index(max(windows))]._replace(d_mlp=shapes[0].d_mlp)
    values = common.sizes_to_hf(
        dataclasses.replace(config, layer_shapes=(), **plain._asdict()),
        MODEL_TYPE,
        "Gemma4ForCausalLM",
    )
    for unread in ("rope_theta", "hidden_act"):
        del values[unread]
    each = {
        str(layer): {"head_dim": shape.head_dim, "num_key_value_heads": shape.n_kv_heads}
        for layer, shape in enumerate(shapes)
        if shape[:2] != plain[:2]
    }
    return values | {
        "hidden_activation": activation_to_hf(config.activation),
        "attention_bias": config.attention_bias,
        "attention_k_eq_v": any(config.values_are_keys),
        "final_logit_softcapping": config.final_soft_cap or None,
        "hidden_size_per_layer_input": config.d_layer_input,
        "vocab_size_per_layer_input": config.vocab_size,
        "pad_token_id": config.layer_input_pad,
        "num_kv_shared_layers": config.n_sharing_layers,
        "use_double_wide_mlp": len({shape.d_mlp for shape in shapes}) > 1,
        "per_layer_config": each,
        "rope_parameters": ropes_to_hf(config),
        **layer_types_to_hf(config.windows, config.n_layers),
        # transformers needs a number, used or not.
        "sliding_window": max(windows) or 512,
    }


def param_table(config: TransformerConfig) -> list[ParamRow]:
    rows = [
        *common.end_rows(config),
        *gemma2.norm_rows("ones"),
        *common.attention_rows(qkv_bias=config.attention_bias, out_bias=config.attention_bias),
        *common.qk_norm_rows("X", "X"),
        *common.gated_mlp_rows(),
        common.layer_row("output_scale", "1", common.LAYER + "layer_scalar", "same", "ones"),
    ]
    if config.d_layer_input:
        rows += _layer_input_rows()
    return [dataclasses.replace(row, layers=_layers_with(row.path[-1], config)) for row in rows]


def _layers_with(name: str, config: TransformerConfig) -> tuple[int, ...] | None:
    """The layers with a parameter; None for all."""
    layers = range(config.n_layers)
    if name.startswith(("key", "value")):
        layers = [layer for layer in layers if not config.shares(layer)]
    if name.startswith("value") and config.values_are_keys:
        layers = [layer for layer in layers if not config.values_are_keys[layer]]
    return None if len(layers) == config.n_layers else tuple(layers)


def _layer_input_rows() -> list[ParamRow]:
    table, projection, norm = (
        f"model.{name}.weight"
        for name in (
            "embed_tokens_per_layer",
            "per_layer_model_projection",
            "per_layer_projection_norm",
        )
    )
    return [
        ParamRow(("layer_embedding",), "VM", table, "same"),
        ParamRow(("layer_input_projection",), "DL", projection),
        ParamRow(("layer_input_norm",), "I", norm, "same", "ones"),
        common.layer_row("input_gate", "DI", common.LAYER + "per_layer_input_gate.weight"),
        common.layer_row("input_projection", "ID", common.LAYER + "per_layer_projection.weight"),
        common.norm_row("input_norm", "post_per_layer_input_norm"),
    ]
