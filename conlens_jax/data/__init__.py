"""Text, tokenizers, and the activation cache."""
