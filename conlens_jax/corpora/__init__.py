"""Corpora: generated text with known content, local files, and datasets."""
