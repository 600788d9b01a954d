"""Training: state, step, loop, optimizer, checkpoints, console and tracking."""
