"""Programs with several commands, such as `PROGRAM predict RUN PICTURE`.

A program lists its commands without importing what they need: a command's file imports jax and
networks inside functions, so that --help responds immediately.
"""

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence

import common_jax
from common_jax.ranges import did_you_mean

# Errors that a user can cause; any other is our fault and shows its traceback.
USER_ERRORS = (ValueError, OSError, FloatingPointError)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of a program.

    Attributes:
      summary: its line in the program's --help, which also opens the command's own --help.
      add_arguments: adds its arguments to a parser.
      run: does the work and returns the exit status; None is 0.
      rest: arguments that start with one of these prefixes are not parsed but passed to `run` as
        the list `rest`: ("--config.",) for config fields, ("",) for all arguments.
    """

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    rest: tuple[str, ...] = ()


def dispatch(
    program: str, commands: Mapping[str, Command], argv: Sequence[str] | None = None
) -> int:
    """Runs the command that the command line names, and returns the exit status.

    A user error ends in a message on standard error and status 2; --debug shows its traceback
    instead.

    Args:
      program: the program's name, as a user types it.
      commands: the commands by name, in the order of --help.
      argv: arguments without the program's name; by default the process's.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _dispatch(program, commands, argv or ["--help"])
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has quit. Keep Python from flushing the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(program: str, commands: Mapping[str, Command], argv: Sequence[str]) -> int:
    name, *rest = argv
    if name in ("-h", "--help", "help"):
        print(_overview(program, commands))
        return 0
    if name == "--version":
        print(program, common_jax.__version__)
        return 0
    if name not in commands:
        hint = did_you_mean(name, commands)
        print(
            f"error: {program} has no command {name!r}{hint}; it has {', '.join(commands)}",
            file=sys.stderr,
        )
        return 2
    args = _parse(f"{program} {name}", commands[name], rest)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return commands[name].run(args) or 0
    except BrokenPipeError:
        raise
    except USER_ERRORS as error:
        if args.debug or "--debug" in args.rest:
            raise
        from common_jax.workdir import describe_error  # not at the top: it imports jax

        print(f"error: {describe_error(error)}", file=sys.stderr)
        return 2


def read_settings(arguments: Sequence[str]) -> dict[str, str]:
    """Parses arguments --config.PATH=TEXT, or --PATH=TEXT for short, to text by field path.

    Raises:
      ValueError: for an argument without a value.
    """
    settings = {}
    for argument in arguments:
        path, equals, text = argument.removeprefix("--").removeprefix("config.").partition("=")
        if not equals:
            raise ValueError(f"{argument} lacks a value; write {argument}=VALUE")
        settings[path] = text
    return settings


def _overview(program: str, commands: Mapping[str, Command]) -> str:
    width = max(len(name) for name in commands)
    return "\n".join(
        [
            f"usage: {program} COMMAND ...",
            "",
            *(f"  {name:{width}}  {command.summary}" for name, command in commands.items()),
            "",
            f"{program} COMMAND --help shows the arguments of a command; {program} --version",
        ]
    )


def _parse(program: str, command: Command, argv: Sequence[str]) -> argparse.Namespace:
    """Parses a command's arguments; those that match `command.rest` become the list `rest`."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=command.summary,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    rest = [one for one in argv if one.startswith(command.rest)]
    # Intermixed: with parse_args, an option between optional positionals would end them.
    args = parser.parse_intermixed_args([one for one in argv if not one.startswith(command.rest)])
    args.rest = rest
    return args
