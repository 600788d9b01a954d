"""Entry points and scripts run in this process, as ``python -m`` and ``python file`` run them.

A process of its own for each would spend most of its time importing JAX.
"""

from __future__ import annotations

import argparse
import contextlib
import runpy
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from absl import app, flags

import conlens_jax
from conlens_jax import cli, launch
from conlens_jax.config import ExperimentConfig

PACKAGE = Path(conlens_jax.__file__).parent
# Modules that define flags when they are imported; several define one of the same name.
ENTRY_POINTS = {f"conlens_jax.{file.stem}" for file in PACKAGE.glob("*.py")}
ENTRY_POINTS -= {"conlens_jax.__init__", "conlens_jax.cli", "conlens_jax.launch"}
ENTRY_POINTS |= {"gradient_report"}


class _Parsed(BaseException):
    """Ends a script behind its command line."""


def check(target: str, arguments: Sequence[str]) -> ExperimentConfig | None:
    """Parses a command line with the target's own parser and validates the config that it makes.

    Args:
      target: a module, such as ``"conlens_jax.train"``, or the path of a script.

    Returns:
      The config, where the command line gives one.

    Raises:
      ValueError, absl.flags.Error, SystemExit: a flag or value that is not known; a config that
        cannot be run.
    """
    if target == launch.__name__:
        _, (module, *flags_of_module) = launch.parse(arguments)
        return check(module, flags_of_module)
    with _opened(target, arguments, parse_only=True) as call:
        if call is None:
            return None
        holder = call.main.__globals__.get("_CONFIG")
        if holder is None or holder.value is None:
            return None
        return cli.load_config(holder)


def run(target: str, arguments: Sequence[str]) -> None:
    """Runs a command line to its end. What it prints goes where this process prints."""
    with _opened(target, arguments, parse_only=False) as call:
        if call is not None:
            call()


def refuse(target: str, arguments: Sequence[str]) -> object:
    """The exit code of a command line that is refused before its ``main`` begins, by the whole of
    :func:`conlens_jax.cli.run`."""

    def accepted(main, flags_parser):
        flags_parser(sys.argv)
        raise AssertionError("the command line was accepted")

    with _as_process(target, arguments), mock.patch.object(app, "run", accepted):
        try:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        except SystemExit as left:
            return left.code


class _Call:
    """The ``main`` that a module hands to :func:`conlens_jax.cli.run`, with its arguments."""

    def __init__(self, main, takes_arguments: bool, rest: list[str]):
        if rest and not takes_arguments:
            raise ValueError(f"unexpected arguments {rest}")
        self.main, self._arguments = main, [rest] if takes_arguments else []

    def __call__(self) -> None:
        self.main(*self._arguments)


@contextlib.contextmanager
def _opened(target: str, arguments: Sequence[str], *, parse_only: bool) -> Iterator[_Call | None]:
    """The target loaded and its flags parsed; None for a script with a parser of its own, which
    has run by then."""
    given: list[tuple[Any, bool]] = []
    problems = cli._unknown_overrides(arguments)

    def take(main, *, takes_arguments=False, one_process=False):
        given.append((main, takes_arguments))
        problems.extend(cli._process_flags(arguments) if one_process else [])

    with _as_process(target, arguments), mock.patch.object(cli, "run", take):
        if target.endswith(".py"):
            _run_script(target, parse_only)
        else:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        if not given:
            yield None
            return
        if problems:
            raise ValueError("; ".join(problems))
        # runpy has put the module's file into its place.
        sys.argv = [target, *arguments]
        _, *rest = flags.FLAGS(sys.argv)
        yield _Call(*given[0], rest)


@contextlib.contextmanager
def _as_process(target: str, arguments: Sequence[str]) -> Iterator[None]:
    with (
        _own_flags(),
        mock.patch.object(sys, "argv", [target, *arguments]),
        warnings.catch_warnings(),
    ):
        # ml_collections loads a config file in the old way.
        warnings.filterwarnings("ignore", r"the load_module\(\) method", DeprecationWarning)
        yield


def _run_script(path: str, parse_only: bool) -> None:
    parse_args = argparse.ArgumentParser.parse_args

    def parse(parser, arguments=None, namespace=None):
        found = parse_args(parser, arguments, namespace)
        if parse_only:
            raise _Parsed
        return found

    with (
        # Modules beside a script are found when it is run as a file.
        mock.patch.object(sys, "path", [str(Path(path).parent.absolute()), *sys.path]),
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse),
        contextlib.suppress(_Parsed),
    ):
        runpy.run_path(path, run_name="__main__")


@contextlib.contextmanager
def _own_flags() -> Iterator[None]:
    """absl's flags as a new process finds them; those that were there come back afterwards."""
    parsed = flags.FLAGS.is_parsed()
    modules = {name: sys.modules.pop(name) for name in ENTRY_POINTS if name in sys.modules}
    known = {
        flag.name: (module, flag)
        for module, own in flags.FLAGS.flags_by_module_dict().items()
        for flag in own
        # --config and its fields are defined for the entry points, in cli.
        if module in ENTRY_POINTS or flag.name.split(".")[0] == "config"
    }
    for name in known:
        delattr(flags.FLAGS, name)
    before = set(flags.FLAGS)
    try:
        yield
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        for name in ENTRY_POINTS:
            sys.modules.pop(name, None)
        for name, module in modules.items():
            sys.modules[name] = module
            package, _, stem = name.rpartition(".")
            if package:
                setattr(conlens_jax, stem, module)
        for name, (module, flag) in known.items():
            flags.FLAGS[name] = flag
            flags.FLAGS.register_flag_by_module(module, flag)
        if not parsed:
            flags.FLAGS.unparse_flags()
