"""Natural-language autoencoders (NLA): released pairs, loaded and scored like a lens.

A pair is two fine-tuned copies of the original model (Fraser-Taliente et al. 2026,
transformer-circuits.pub/2026/nla). The conventions are those of its public repository
(kitft/natural_language_autoencoders):

* AV, vector → text (``role: av`` or ``actor``): a whole model. The activation, scaled to the norm
  ``extraction.injection_scale``, replaces the embedding of ``tokens.injection_token_id`` in the
  chat prompt ``prompt_templates.av`` (or ``actor``); the text is between ``<explanation>`` tags.
* AR, text → vector (``role: ar`` or ``critic``): the model's first K + 1 layers. The text in
  ``prompt_templates.ar`` (or ``critic``) is tokenised with the tokenizer's own special tokens; the
  output of block K at its last token, without the final norm, is multiplied by
  ``value_head.safetensors`` (``weight`` [out, in]).
* Training ignores the norm of a reconstruction. A reconstruction that is swapped into the model is
  first scaled to the norm of the activation that it replaces.

The models of a Gemma 3 pair may be multimodal folders; only their text part is loaded.

An activation is the output of block ``extraction_layer_index``, 0-based.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.flax
import tokenizers
from jaxtyping import Array, Float

from conlens_jax.config import LensConfig
from conlens_jax.files.paths import local_path
from conlens_jax.inspection import batching
from conlens_jax.inspection.explanations import Explanations
from conlens_jax.inspection.programs import Programs
from conlens_jax.inspection.readings import ExplainedToken, Prediction, Reading
from conlens_jax.inspection.texts import Positions, token_indices, token_lists
from conlens_jax.lens.decoder import generate
from conlens_jax.lens.spec import Decoder, LensSpec
from conlens_jax.models import hf_io
from conlens_jax.models.arguments import finite_array
from conlens_jax.models.chat import render_chat
from conlens_jax.models.model import LanguageModel, load_model
from conlens_jax.models.param_table import Params
from conlens_jax.models.transformer import capture, embed_tokens, output_head
from conlens_jax.models.transformer_config import TransformerConfig
from conlens_jax.nla.sidecar import VALUE_HEAD, Sidecar, read_sidecar
from conlens_jax.parallel.mesh import single_device_mesh

_EXPLANATION = re.compile(r"<explanation>(.*?)(</explanation>|$)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class NlaPair:
    """A loaded pair.

    Attributes:
      av, av_sidecar: the verbaliser.
      ar_config, ar_params, ar_sidecar: the reconstructor, without final norm and head.
      ar_tokenizer: its tokenizer, which adds its own special tokens.
      value_head: [D, D], from the state (rows) to the reconstruction (columns).
      max_new_tokens: longest text, in tokens.
    """

    av: LanguageModel
    av_sidecar: Sidecar
    ar_config: TransformerConfig
    ar_params: Params
    ar_sidecar: Sidecar
    ar_tokenizer: tokenizers.Tokenizer
    value_head: Float[Array, "D D"]
    max_new_tokens: int = 200

    @classmethod
    def load(
        cls,
        av: str | Path,
        ar: str | Path,
        *,
        dtype: str = "float32",
        max_new_tokens: int = 200,
        unroll: int = 0,
    ) -> NlaPair:
        """Loads two folders (``hf download`` fetches released ones).

        Raises:
          ValueError: sidecars that are missing, wrong, or of different layers; an injection token
            that does not fit the tokenizer.
        """
        av, ar = local_path(av), local_path(ar)
        av_sidecar, ar_sidecar = read_sidecar(av, "av"), read_sidecar(ar, "ar")
        if av_sidecar.layer != ar_sidecar.layer:
            raise ValueError(
                f"the AV is for layer {av_sidecar.layer} and the AR for layer {ar_sidecar.layer}: "
                "these are not a pair"
            )
        model = load_model(av, dtype=dtype, unroll=unroll)
        config = dataclasses.replace(hf_io.read_config(ar), dtype=model.config.dtype, unroll=unroll)
        if config.n_layers != ar_sidecar.layer + 1:
            raise ValueError(
                f"{ar} has {config.n_layers} layers, and an AR for layer {ar_sidecar.layer} has "
                f"{ar_sidecar.layer + 1}"
            )
        weight = safetensors.flax.load_file(ar / VALUE_HEAD)["weight"]
        tokenizer = tokenizers.Tokenizer.from_file(str(ar / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        pair = cls(
            model,
            av_sidecar,
            config,
            hf_io.load_params(ar, config, head=False),
            ar_sidecar,
            tokenizer,
            weight.astype(config.dtype).T,
            max_new_tokens,
        )
        _ = pair._prompt  # raises if the template does not fit the tokenizer
        return pair

    @functools.cached_property
    def _prompt(self) -> tuple[list[int], list[int]]:
        """The AV's prompt before and after the activation."""
        sidecar = self.av_sidecar
        content = sidecar.template.format(injection_char=sidecar.injection_char)
        chat = [{"role": "user", "content": content}]
        ids = self.av.tokenizer.encode(render_chat(chat, self.av.folder, answer=True))
        if ids.count(sidecar.injection_token_id) != 1:
            raise ValueError(
                f"tokens.injection_token_id={sidecar.injection_token_id} is "
                f"{ids.count(sidecar.injection_token_id)} times in the AV's prompt, not once: the "
                "sidecar does not belong to this tokenizer"
            )
        slot = ids.index(sidecar.injection_token_id)
        return ids[:slot], ids[slot + 1 :]

    @functools.cached_property
    def _spec(self) -> LensSpec:
        """The AV as a decoder whose prompt is its template."""
        left, right = map(tuple, self._prompt)
        lens = LensConfig(text_len=self.max_new_tokens)
        return LensSpec(self.av.config, self.av_sidecar.layer, lens, left, right, (), (), None)

    @functools.cached_property
    def _verbalise(self):
        def run(params: Params, vector_BD: Array) -> Array:
            spec, dtype = self._spec, params["embedding"].dtype
            prompt = jnp.asarray(spec.decoder_left + spec.decoder_right, jnp.int32)
            width = spec.model.d_model
            unchanged = {"kernel": jnp.eye(width, dtype=dtype), "bias": jnp.zeros(width, dtype)}
            decoder = Decoder(
                base=params,
                projection=unchanged,
                prompt_pD=embed_tokens(params, prompt, spec.model),
                head_DV=output_head(params),
                statistics={"mean": jnp.zeros(width), "scale": jnp.float32(1.0)},
                input_patches=None,
            )
            return generate(decoder, vector_BD, None, spec=spec)

        return jax.jit(run)

    @functools.cached_property
    def _reconstruct(self):
        def run(params: Params, head_DD: Array, tokens_BS: Array, mask_BS: Array) -> Array:
            config = self.ar_config
            layer = config.n_layers - 1
            x_BSD = capture(params, tokens_BS, mask_BS, config=config, layer=layer)
            return (x_BSD[:, -1] @ head_DD).astype(jnp.float32)

        return jax.jit(run)

    def verbalise(self, activations: Float[np.ndarray, "N D"]) -> list[str]:
        """The AV's greedy texts of activations, without the tags around them."""
        vectors = finite_array(activations, "activations")
        if vectors.ndim != 2 or vectors.shape[1] != self.av.config.d_model or not len(vectors):
            raise ValueError(
                f"activations must be [N, {self.av.config.d_model}], not {vectors.shape}"
            )
        size = np.linalg.norm(vectors, axis=-1, keepdims=True)
        vectors = vectors * (self.av_sidecar.injection_scale / np.maximum(size, 1e-12))
        rows = batching.filled(vectors, batching.power_of_two(len(vectors)))
        written = np.asarray(self._verbalise(self.av.params, jnp.asarray(rows)))[: len(vectors)]
        return [_explanation(self.av.tokenizer.decode(self._ended(ids))) for ids in written]

    @property
    def _end_ids(self) -> list[int]:
        """The tokens that end a text: the model's and the tokenizer's."""
        own = self.av.tokenizer.eos_id
        return [*self.av.config.eos_token_ids, *([] if own is None else [own])]

    def _ended(self, ids: np.ndarray) -> np.ndarray:
        """The tokens before the end of the text."""
        ends = np.flatnonzero(np.isin(ids, self._end_ids))
        return ids[: ends[0]] if len(ends) else ids

    def reconstruct(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """The AR's reconstructions from texts; only their directions are meaningful."""
        filled = [self.ar_sidecar.template.format(explanation=text) for text in texts]
        lists = [encoding.ids for encoding in self.ar_tokenizer.encode_batch(filled)]
        arrays = map(jnp.asarray, batching.aligned_right(lists))
        return np.asarray(self._reconstruct(self.ar_params, self.value_head, *arrays))[: len(lists)]

    def explain(
        self,
        model: LanguageModel,
        text: Any,
        positions: Positions = "all",
        *,
        batch_size: int = 8,
    ) -> Explanations:
        """Explains activations of the original model and scores each explanation by swapping its
        reconstruction into the model.

        Args:
          model: the model that the pair explains.
          text, positions: as for :meth:`conlens_jax.inspection.lens.Lens.explain`.
        """
        layer, token = self.av_sidecar.layer, model.tokenizer.token
        documents = token_lists(text, model, add_bos="auto")
        bos = model.tokenizer.bos_id
        indices = [token_indices(positions, tokens, bos) for tokens in documents]
        once = [list(dict.fromkeys(chosen)) for chosen in indices]
        programs = Programs(LensSpec(model.config, layer, LensConfig(), (), (), (), (), bos))
        frozen, mesh, explained = {"original": model.params}, single_device_mesh(), {}
        for group in batching.groups_of(documents, once, 1):
            states = programs.read(model.params, group.tokens_GS, group.mask_GS)
            for rows, arrays in batching.batches_of(group, batch_size, mesh):
                documents_B, positions_B, _ = arrays
                activations = np.asarray(states.residual_GSD[documents_B, positions_B], np.float32)
                texts = self.verbalise(activations)
                vectors = self.reconstruct(texts)
                vectors = vectors * (_norms(activations) / np.maximum(_norms(vectors), 1e-12))
                effect = programs.swap(
                    frozen, states, documents_B, positions_B, jnp.asarray(vectors)
                )
                effect = jax.tree.map(np.asarray, effect)
                predictions = lambda top, n: tuple(
                    Prediction(token(t), float(p))
                    for t, p in zip(top[0][n], top[1][n], strict=True)
                )
                for n, row in enumerate(rows):
                    reading = Reading(
                        texts[n],
                        float(effect.cos[n]),
                        float(effect.kl[n]),
                        predictions(effect.after, n),
                    )
                    explained[row.document, row.position] = ExplainedToken(
                        row.document,
                        row.position,
                        token(documents[row.document][row.position]),
                        predictions(effect.before, n),
                        (reading,),
                    )
        order = [(d, p) for d, chosen in enumerate(indices) for p in chosen]
        return Explanations(
            tuple(explained[key] for key in order),
            tuple(tuple(map(token, tokens)) for tokens in documents),
            {"model": model.model_id, "layer": layer, "explained by": self.av.model_id},
        )


def _explanation(text: str) -> str:
    """The text between the tags; the whole text if there are none."""
    match = _EXPLANATION.search(text)
    return (match[1] if match else text).strip()


def _norms(vectors: np.ndarray) -> np.ndarray:
    return np.linalg.norm(vectors, axis=-1, keepdims=True)
