"""What a run reports: the console, JSON lines, Weights & Biases."""
