"""What a training step costs: against its plainest form, and against the machine's limit."""
