"""Trained lenses by name, as data."""
