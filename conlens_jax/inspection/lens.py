"""A trained lens: explains activations of its model and scores every explanation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from conlens_jax.evaluation.support import LEAST_SHARE
from conlens_jax.files.paths import local_path
from conlens_jax.inspection import agreement, changes, loading, plots
from conlens_jax.inspection import folder as saved
from conlens_jax.inspection.agreement import AgreedClaims
from conlens_jax.inspection.changes import TextPosition
from conlens_jax.inspection.explainer import LensExplainer
from conlens_jax.inspection.reader import Vector
from conlens_jax.inspection.texts import Explanation, Positions
from conlens_jax.models.written import Written
from conlens_jax.parallel.mesh import single_device_mesh

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Lens(LensExplainer):
    """Decoder and encoder of a consistency lens, with the model that they read.

    Made by :meth:`load`. Indices are into the tokens of a text, where a bos token counts
    (:meth:`tokens` shows them). Its attributes are those of
    :class:`~conlens_jax.inspection.parts.LensParts`.
    """

    @classmethod
    def load(
        cls,
        path_or_hub_id: str | Path,
        mesh: Mesh | None = None,
        dtype: str | None = None,
        *,
        step: int | str = "latest",
    ) -> Lens:
        """A lens from a run folder, one of its checkpoints, a saved lens, or a hub id of one.

        Args:
          mesh: devices to load onto; None: the first one.
          dtype: ``"float32"`` or ``"bfloat16"``; None: as it was trained.
          step: of a run folder: ``"latest"`` (or ``"last"``), ``"best"`` (lowest validation KL of
            those kept), or a step.

        Raises:
          ValueError: no lens there, its model has changed, or several processes run.
        """
        if jax.process_count() > 1:
            raise ValueError(
                "Lens.load works in one process: leave jax.distributed.initialize out, or measure "
                "with conlens_jax.evaluate"
            )

        parts = loading.load(path_or_hub_id, mesh or single_device_mesh(), dtype, step)
        return cls(
            **{field.name: getattr(parts, field.name) for field in dataclasses.fields(parts)}
        )

    def claims(
        self,
        text: Any,
        position: Positions,
        samples: int = 16,
        *,
        least_share: float = LEAST_SHARE,
        seed: int = 0,
        batch_size: int = 32,
        whole: bool = False,
        progress: bool = True,
    ) -> AgreedClaims | list[AgreedClaims]:
        """What sampled explanations of an activation agree on: each claim with the share of the
        samples that state it, its support, and how many times as often it is stated here as of
        other rows.

        Args:
          text: one text, as in :meth:`explain`.
          position: an index; of several (a list, a slice, ``"all"``) the result is a list.
          samples: how many explanations are sampled. Their agreement counts in the support if the
            evaluation calibrated that number: 4, 8 and 16, unless it was told otherwise. With
            another number only claims of the greedy text have a support.
          least_share: leaves out claims that fewer of the samples state, unless the greedy text
            states them.
          seed, batch_size, whole, progress: see :meth:`explain`.

        Raises:
          ValueError: the lens has no calibration of claims; an invalid text, position or setting.
        """
        options = {"seed": seed, "batch_size": batch_size, "whole": whole, "progress": progress}
        return agreement.claims(self, text, position, samples, least_share, **options)

    def compare(self, a: TextPosition | Vector, b: TextPosition | Vector) -> changes.Comparison:
        """Explains the difference of two activations.

        The decoder was trained on activations, not on differences. So it reads both of them, and
        the mean training activation moved by their difference in either direction; the cosines
        show how much of the difference the texts carry.

        Args:
          a, b: (text, position), or an activation [D].
        """
        return changes.compare(self, a, b)

    def steer(
        self,
        text: Any,
        position: int,
        edit: Explanation | tuple[str, str] | Callable[[Written], Explanation],
        *,
        strength: float = 1.0,
        new_tokens: int = 12,
        written: Explanation | None = None,
        seed: int = 0,
    ) -> changes.Steered:
        """Edits the explanation of an activation, moves the activation by the edit, and shows the
        effect on M.

        The activation is moved by ``strength`` times the difference of the encoder's
        reconstructions of the edited and of the written explanation; what the explanation does not
        mention stays. If the edit is a text, the written explanation is tokenised from its text
        too, so that the edit alone makes the difference, even if that text does not give the tokens
        that were written (``written.reads_back`` of the result). Edited token ids are compared with
        the ids that were written.

        Args:
          edit: the new explanation, as a text or as token ids; (old words, new words); or a
            function of the explanation, which has its ``tokens``.
          new_tokens: length of M's continuation; 0: none.
          written: the explanation that is edited; None: the greedy one.
          seed: of the control, a random direction in which the activation is moved as far.

        Raises:
          ValueError: the edit changes nothing.
        """
        return changes.steer(self, text, position, edit, strength, new_tokens, written, seed)

    def plot(self, text: Any, positions: Positions = "all", **settings: Any) -> Figure:
        """Explains a text and draws KL and support by token, and the reliability of the support.

        Args:
          text, positions, settings: as of :meth:`explain`.

        Raises:
          ImportError: matplotlib is not installed.
          ValueError: as of :meth:`explain`.
        """
        return plots.plot(self.explain(text, positions, **settings), self.calibration)

    # --- sharing --------------------------------------------------------------------------------

    def save(
        self, folder: str | Path, *, include_model: bool | None = None, dtype: str | None = None
    ) -> Path:
        """Writes the lens as a folder for :meth:`load` and the hub; see
        :mod:`conlens_jax.inspection.folder`.

        Args:
          include_model: copy the language model too. None: if others cannot get it by its name.
          dtype: of the trained parts in the files, which are loaded in the model's; None: as they
            are.
        """
        return saved.save(self, local_path(folder), include_model, dtype)

    def push_to_hub(self, repo_id: str, *, private: bool = False, **save_options: Any) -> str:
        """Saves the lens and uploads it to the Hugging Face hub with your login.

        Returns:
          The address of the commit.
        """
        return saved.push(self, repo_id, private, **save_options)
