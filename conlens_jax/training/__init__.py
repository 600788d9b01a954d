"""Training: session, stages, train step, loop, optimizer, validation, checkpoints."""
