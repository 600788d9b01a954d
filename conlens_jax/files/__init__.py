"""Paths that users give, and atomic writes of files."""
