"""The method: the original model, decoder, encoder, losses and schedules as pure functions."""
