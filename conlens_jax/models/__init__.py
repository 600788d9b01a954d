"""Flax ports of Hugging Face decoder-only language models."""
