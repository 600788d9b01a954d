"""Pairs of natural-language autoencoders: read, scored, exported."""
