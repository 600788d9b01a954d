"""Consistency lens: read an activation of a language model as text, and check the text."""

from typing import TYPE_CHECKING, Any

from conlens_jax.models.model import LanguageModel, load_model

if TYPE_CHECKING:
    from conlens_jax.inspection.lens import Lens

__all__ = ["LanguageModel", "Lens", "load_model"]


def __getattr__(name: str) -> Any:
    """Imports ``Lens`` at its first use: a model alone needs neither Orbax nor optax."""
    if name == "Lens":
        from conlens_jax.inspection.lens import Lens

        return Lens
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
