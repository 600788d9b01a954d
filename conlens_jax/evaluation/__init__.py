"""Evaluation: exact metrics, their uncertainty, and the page that shows them."""
