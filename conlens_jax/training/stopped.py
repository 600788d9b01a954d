"""The error that ends a run, apart from the run itself: entry points that do not train catch it."""


class TrainingStopped(RuntimeError):
    """The run cannot continue; the message names the last good checkpoint."""
