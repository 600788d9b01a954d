"""The texts that the warm start teaches, made when activations are dumped (``target.kind``)."""
