"""What a training step costs, compared with a naive step and with the machine's limit."""
