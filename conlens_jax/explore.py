"""A page to explore a lens with: python -m conlens_jax.explore --checkpoint=runs/quickstart

Needs the extra ``explore`` (``pip install 'conlens_jax[explore]'``). ``--checkpoint`` given several
times, with lenses of other layers of the same model, shows a token at all of them. The page is
served only to this machine unless ``--host`` is given; it has no login. Requests must use one of
this machine's names or ``--host`` (``--allow_hosts`` adds names); pages of other sites are refused
(``--allow_origins`` allows some, with CORS).
"""

from __future__ import annotations

import contextlib

from absl import flags

from conlens_jax import cli
from conlens_jax.checkpoint_flags import CHECKPOINTS, STEP
from conlens_jax.config import ConfigError
from conlens_jax.explorer.lenses import load_lenses
from conlens_jax.explorer.listener import listener_on
from conlens_jax.parallel.host import keep_programs

LOOPBACK = "127.0.0.1"
_HOST = flags.DEFINE_string("host", LOOPBACK, "Address to serve on; 0.0.0.0: every interface.")
_PORT = flags.DEFINE_integer("port", 7860, "Port to serve on; 0: any free one.", 0, 65535)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 2048, "Longer texts are refused.")
_TEXT = flags.DEFINE_string("text", "", "The text that the page opens on; empty: an example.")
_HOSTS = flags.DEFINE_list("allow_hosts", [], "More host names that requests may use.")
_ORIGINS = flags.DEFINE_list(
    "allow_origins", [], "Other sites whose pages may send requests, such as https://name.org"
)


def main() -> None:
    try:
        import uvicorn

        from conlens_jax.explorer.examples import example_text
        from conlens_jax.explorer.opening import Loading, Opening
        from conlens_jax.explorer.server import LIMITS, make_app
        from conlens_jax.explorer.server_limits import served_hosts
        from conlens_jax.explorer.slow_clients import uvicorn_options
        from conlens_jax.explorer.warming import Warming
    except ImportError as error:
        raise ImportError(
            f"the page needs the extra 'explore': pip install 'conlens_jax[explore]' ({error})"
        ) from error
    names = CHECKPOINTS.value or []
    if not names:
        raise ConfigError("give --checkpoint=<run folder, saved lens or hub id>")
    listener = listener_on(_HOST.value, _PORT.value)
    senders = {
        "hosts": served_hosts(_HOST.value, _HOSTS.value),
        "origins": tuple(_ORIGINS.value),
    }
    opening = Opening(names[0], _TEXT.value, LIMITS, **senders)
    options = {"log_level": "warning", **uvicorn_options(LIMITS)}
    server = uvicorn.Server(uvicorn.Config(opening, **options))

    def load(stack: contextlib.ExitStack) -> None:
        keep_programs()
        lenses = load_lenses(names, STEP.value)
        example = _TEXT.value or example_text(lenses[0])
        most = {"max_tokens": _MAX_TOKENS.value}
        app = make_app(lenses[0], lenses[1:], example=example, names=names, **most, **senders)
        warming = Warming(app.state.runs, example, names)
        opening.ready(app)
        stack.enter_context(warming)

    loading = Loading(load, failed=lambda: setattr(server, "should_exit", True))
    print(f"http://{_HOST.value}:{listener.getsockname()[1]}  (Ctrl-C stops it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt), listener, loading:
        server.run(sockets=[listener])
    loading.check()


if __name__ == "__main__":
    cli.run(main, one_process=True)
