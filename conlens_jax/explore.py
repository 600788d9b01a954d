"""A page to explore a lens with: python -m conlens_jax.explore --checkpoint=runs/quickstart

Needs the extra ``explore`` (``pip install 'conlens_jax[explore]'``). The page is served only to
this machine unless ``--host`` is given; it has no login. Requests must use one of this machine's
names or ``--host`` (``--allow_hosts`` adds names); pages of other sites are refused
(``--allow_origins`` allows some, with CORS).
"""

from __future__ import annotations

import contextlib

from absl import flags

from conlens_jax import cli
from conlens_jax.checkpoint_flags import CHECKPOINT, STEP
from conlens_jax.config import ConfigError
from conlens_jax.explorer.listener import listener_on
from conlens_jax.inspection.lens import Lens

LOOPBACK = "127.0.0.1"
_HOST = flags.DEFINE_string("host", LOOPBACK, "Address to serve on; 0.0.0.0: every interface.")
_PORT = flags.DEFINE_integer("port", 7860, "Port to serve on; 0: any free one.", 0, 65535)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 2048, "Longer texts are refused.")
_HOSTS = flags.DEFINE_list("allow_hosts", [], "More host names that requests may use.")
_ORIGINS = flags.DEFINE_list(
    "allow_origins", [], "Other sites whose pages may send requests, such as https://name.org"
)


def main() -> None:
    try:
        import uvicorn

        from conlens_jax.explorer.server import LIMITS, make_app
        from conlens_jax.explorer.server_limits import served_hosts
        from conlens_jax.explorer.slow_clients import uvicorn_options
    except ImportError as error:
        raise ImportError(
            f"the page needs the extra 'explore': pip install 'conlens_jax[explore]' ({error})"
        ) from error
    if not CHECKPOINT.value:
        raise ConfigError("give --checkpoint=<run folder, saved lens or hub id>")
    listener = listener_on(_HOST.value, _PORT.value)
    lens = Lens.load(CHECKPOINT.value, step=STEP.value)
    app = make_app(
        lens,
        max_tokens=_MAX_TOKENS.value,
        hosts=served_hosts(_HOST.value, _HOSTS.value),
        origins=tuple(_ORIGINS.value),
    )
    print(f"http://{_HOST.value}:{listener.getsockname()[1]}  (Ctrl-C stops it)", flush=True)
    options = {"log_level": "warning", **uvicorn_options(LIMITS)}
    server = uvicorn.Server(uvicorn.Config(app, **options))
    with contextlib.suppress(KeyboardInterrupt), listener:
        server.run(sockets=[listener])


if __name__ == "__main__":
    cli.run(main, one_process=True)
