"""Measuring a lens on rows: programs, metrics, bootstrap intervals."""
