"""Corpora: generated text with known content, files, datasets, and what a model has written."""
