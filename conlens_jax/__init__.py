"""Consistency lens: read an activation of a language model as text, and prove the text."""

from conlens_jax.models.model import LanguageModel, load_model

__all__ = ["LanguageModel", "load_model"]
