"""Cost of a training step: measured, profiled, and predicted from compiled programs."""
