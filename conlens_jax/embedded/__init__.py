"""The small language model that is trained on the spot, and how well it knows its task."""
