"""Corpus → activation cache: python -m conlens_jax.dump --config=configs/quickstart.py

The same command resumes an interrupted dump after its last complete shard. Where the model writes
its own documents (corpus.kind="model"), it does so first; --documents_only stops after that.
"""

from __future__ import annotations

from absl import flags

from conlens_jax import cli
from conlens_jax.config import ConfigError
from conlens_jax.data.extract import dump_activations
from conlens_jax.data.model_documents import ensure_documents
from conlens_jax.training.preflight import check_files
from conlens_jax.training.session import open_session

_CONFIG = cli.define_config()
_DOCUMENTS_ONLY = flags.DEFINE_bool(
    "documents_only", False, "Only write the documents of corpus.kind='model'."
)


def main() -> None:
    config = cli.load_config(_CONFIG)
    if _DOCUMENTS_ONLY.value and config.corpus.kind != "model":
        raise ConfigError(
            [f"--documents_only needs corpus.kind='model', not {config.corpus.kind!r}"]
        )
    console = cli.start(config)
    check_files(config, dumps=True)
    session = open_session(config, console)
    if _DOCUMENTS_ONLY.value:
        ensure_documents(config.corpus, session.model, session.mesh, session.console)
        return
    dump_activations(config, session.model, session.spec, session.mesh, session.console)


if __name__ == "__main__":
    cli.run(main)
