"""Rows of activations with their contexts: extraction, the activation cache, batches."""
