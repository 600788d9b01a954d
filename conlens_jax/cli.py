"""Shared by all entry points: flags, the validated config, and short error messages."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from conlens_jax.config import (
    ConfigError,
    ExperimentConfig,
    field_names,
    field_types,
    from_config_dict,
)
from conlens_jax.config import unknown_field_message as unknown_field
from conlens_jax.parallel.host import keep_freed_memory
from conlens_jax.parallel.preemption import PREEMPTED, Preempted, leaving_on_sigterm
from conlens_jax.parallel.processes import (
    ProcessError,
    is_first,
    leave,
    start_processes,
    stopping_with_others,
)
from conlens_jax.tracking.console import Console
from conlens_jax.training.stopped import TrainingStopped

_HELP = re.compile(r"--?(help|helpshort|helpfull|helpxml|\?)(=\w+)?")
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show the traceback of an error.")


def define_config(default: str | None = None) -> flags.FlagHolder:
    """The flag ``--config``, a config file whose fields ``--config.<field>`` override."""
    return config_flags.DEFINE_config_file(
        "config", default, "Configuration file with get_config().", lock_config=True
    )


def run(
    main: Callable[..., None], *, takes_arguments: bool = False, one_process: bool = False
) -> None:
    """Parses flags and runs ``main``; for errors that the user can fix only the message is printed.

    If it ``takes_arguments``, ``main`` gets the list of positional arguments; otherwise there must
    be none. With ``one_process``, flags for several processes are refused.

    Exit codes: 0 done, 2 wrong input, 75 saved after SIGTERM and can be resumed, 1 anything else.
    """

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1 and not takes_arguments:
            _fail([f"unexpected argument {argument!r}" for argument in argv[1:]])
        keep_freed_memory()
        sys.unraisablehook = _without_closed_loops
        # Orbax and JAX log much at INFO; their warnings and errors are shown.
        logging.set_verbosity(logging.WARNING)
        try:
            with leaving_on_sigterm(), stopping_with_others():
                main(*([list(argv[1:])] if takes_arguments else []))
        except Preempted as stopped:
            print(stopped, file=sys.stderr)
            leave(PREEMPTED)
        except (ValueError, OSError, ImportError, TrainingStopped, ProcessError) as error:
            if _TRACEBACK.value:
                raise
            _fail(error.problems if isinstance(error, ConfigError) else [str(error)])

    shared = ["traceback", "checkpoint"] + ["config"] * ("_CONFIG" in main.__globals__)
    for name in shared:  # --help shows the flags of the main module and these
        if name in flags.FLAGS:
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
    problems = _unknown_overrides(sys.argv[1:])
    if one_process:
        problems += _process_flags(sys.argv[1:])
    if problems:
        _fail(problems)
    app.run(guarded, flags_parser=_parse)


def _without_closed_loops(unraisable: sys.UnraisableHookArgs) -> None:
    """On a full disk the first failing write of a checkpoint closes the event loop of the others,
    which then each print a traceback; the error itself is raised elsewhere."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses flags; absl alone would print a page of usage for a value of the wrong type."""
    try:
        return flags.FLAGS(argv)
    except SystemExit:
        if any(map(_HELP.fullmatch, argv[1:])):  # absl prints the help and exits with 1
            leave(0)
        raise
    except (flags.Error, TypeError, ValueError) as error:
        _fail([_wrong_value(str(error))])


def _wrong_value(message: str) -> str:
    """absl's message, or a better one for a field of the config."""
    override = re.match(r"Unknown command line flag '(config\.[\w.]+)'", message)
    if override:
        return f"--{override[1]} changes a field of a config file: give --config=<file> too"
    match = re.match(r"flag --(?:config\.)?([\w.]+)=(.*?): ", message, re.DOTALL)
    kinds = {int: "a whole number", float: "a number", bool: "true or false"}
    if not match or (kind := kinds.get(field_types().get(match[1]))) is None:
        return message
    return f"{match[1]} must be {kind}, not {match[2]!r}"


def load_config(holder: flags.FlagHolder) -> ExperimentConfig:
    """The validated dataclasses of the flag's value.

    Raises:
      ConfigError: no config was given, or it has problems (all are listed).
    """
    if holder.value is None:
        raise ConfigError("--config is missing; for example --config=configs/quickstart.py")
    return from_config_dict(holder.value.to_dict())


def start(config: ExperimentConfig) -> Console:
    """Connects to the other processes of the run, if any; only the console of the first one prints.

    Raises:
      ProcessError: they cannot connect.
    """
    start_processes(config.distributed)
    return Console(enabled=is_first())


def _unknown_overrides(arguments: Sequence[str]) -> list[str]:
    """A problem with the nearest known name for each unknown field of the config."""
    known = set(field_names())
    problems = []
    for argument in arguments:
        match = re.match(r"--?(?:no)?config\.([\w.]+)", argument)
        if match and match.group(1) not in known:
            problems.append(unknown_field(match.group(1)))
    return problems


def _process_flags(arguments: Sequence[str]) -> list[str]:
    """A problem for each flag for several processes."""
    flags_given = [re.match(r"--?config\.distributed\.\w+", argument) for argument in arguments]
    return [f"{flag[0]}: this command runs in one process" for flag in flags_given if flag]


def _fail(problems: Sequence[str]) -> None:
    print("error:", file=sys.stderr)
    for problem in problems:
        print(f"  {problem}", file=sys.stderr)
    print("(--traceback shows where)", file=sys.stderr)
    leave(2)
