"""Pairs of natural-language autoencoders: loading, scoring, export."""
