"""A page to explore a lens with: python -m conlens_jax.explore --checkpoint=runs/quickstart

Needs the extra ``explore`` (``pip install 'conlens_jax[explore]'``). The page is served to this
machine alone unless ``--host`` says otherwise; it has no login.
"""

from __future__ import annotations

from absl import flags

from conlens_jax import cli
from conlens_jax.config import ConfigError
from conlens_jax.evaluate import CHECKPOINT, STEP
from conlens_jax.inspection.lens import Lens

LOOPBACK = "127.0.0.1"
_HOST = flags.DEFINE_string("host", LOOPBACK, "Address to serve; 0.0.0.0 is every interface.")
_PORT = flags.DEFINE_integer("port", 7860, "Port to serve.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 2048, "Longer texts are refused.")


def main() -> None:
    try:
        import uvicorn

        from conlens_jax.inspection.server import make_app
    except ImportError as error:
        raise ImportError(
            f"the page needs the extra 'explore': pip install 'conlens_jax[explore]' ({error})"
        ) from error
    if not CHECKPOINT.value:
        raise ConfigError(["give --checkpoint=<run folder, saved lens or hub id>"])
    lens = Lens.load(CHECKPOINT.value, step=STEP.value)
    hosts = (LOOPBACK, "localhost") if _HOST.value == LOOPBACK else ("*",)
    app = make_app(lens, max_tokens=_MAX_TOKENS.value, hosts=hosts)
    print(f"http://{_HOST.value}:{_PORT.value}  (Ctrl-C ends it)", flush=True)
    uvicorn.run(app, host=_HOST.value, port=_PORT.value, log_level="warning")


if __name__ == "__main__":
    cli.run(main, one_process=True)
