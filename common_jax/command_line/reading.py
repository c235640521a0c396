"""The command line of a run: absl flags, and `--config.FIELD=VALUE` for any config field.

absl parses the arguments in all of its forms: one dash or two, the value after "=" or as the next
argument, `--flagfile`, and `--config.x` or `--noconfig.x` for booleans. Overrides are recorded in
the order of the command line and applied afterwards, so that the last value of a field wins,
whatever form it has.
"""

import logging
import re
import sys
from collections.abc import Sequence

import ml_collections
from absl import flags
from etils import epath

from common_jax.command_line.fields import (
    SHOWN,
    check_field,
    convert,
    either,
    find_paths,
    set_value,
    shorten,
    type_of,
)
from common_jax.command_line.files import describe_config_file, read_config_file
from common_jax.command_line.systems import System, check_system
from common_jax.config import did_you_mean

HOST_FLAGS = ("hosts", "coordinator", "processes", "process")
OVERRIDE = re.compile(r"--?(no)?config\.([^=]*)(=.*)?", re.DOTALL)


class _Override(flags.Flag):
    """A flag that records its field's path and the text of its value, in command-line order."""

    def __init__(self, path: str, *, boolean: bool, noted: list[tuple[str, str]]):
        self._path, self._noted = path, noted
        super().__init__(flags.ArgumentParser(), None, f"config.{path}", None, "", boolean=boolean)

    def parse(self, argument: str) -> None:
        self._noted.append((self._path, argument))


def define() -> flags.FlagValues:
    """Defines the flags of a run, without reading them."""
    values = flags.FlagValues()
    for name, text in (
        ("config", "Config file and its arguments: FILE.py:key=value,key=value"),
        ("workdir", "Folder of the run; run again with the same folder, it resumes."),
        ("coordinator", "HOST:PORT of process 0, if the environment does not provide it."),
    ):
        flags.DEFINE_string(name, None, text, flag_values=values)
    for name, text in (
        ("processes", "With --coordinator: the number of processes."),
        ("process", "With --coordinator: the index of this process, from 0."),
    ):
        flags.DEFINE_integer(name, None, text, flag_values=values)
    hosts = (
        "Whether to connect to other processes: auto, if the environment describes them (TPU VM, "
        "SLURM, Open MPI); all, always; one, never."
    )
    flags.DEFINE_enum("hosts", "auto", ("auto", "all", "one"), hosts, flag_values=values)
    flags.DEFINE_bool("debug", False, "Show the traceback of a user's error.", flag_values=values)
    flags.DEFINE_bool("help", False, "Show this.", short_name="h", flag_values=values)
    return values


def read(
    values: flags.FlagValues,
    argv: Sequence[str],
    description: str = "",
    system: System | None = None,
) -> tuple[ml_collections.ConfigDict, epath.Path, list[str]]:
    """The config with all overrides, the workdir, and the paths of the fields that were set.

    Args:
      values: the flags from `define`; set from the command line.
      argv: the command line, starting with the program's name.
      description: shown by --help, which exits.
      system: the system that the config must belong to; None accepts any config.

    Raises:
      ValueError, OSError: for a user error.
    """
    # Imported here since it imports jax, which listing a program's commands must not wait for.
    from common_jax.checkpoint import absolute, refuse_pattern

    argv = [argv[0], *_expand(argv[1:])]
    # The overrides' types come from the config file, so parse the other flags first.
    _parse(values, argv, known_only=True)
    if values["help"].value:
        lines = (
            f"  --{name}: {values[name].help}"
            for name in ("config", "workdir", *HOST_FLAGS, "debug", "help")
        )
        print(description, *lines, "  --config.FIELD=VALUE: Any field of the config.", sep="\n")
        if file := values["config"].value:
            print(f"\n{file}:", describe_config_file(file), sep="\n")
        sys.exit(0)
    if not values["config"].value:
        raise ValueError("--config is missing; see --help")
    config = read_config_file(values["config"].value)
    if system is not None:
        check_system(config, system, f"--config={values['config'].value}")
    noted = _read_overrides(config, argv)
    if not values["workdir"].value:
        raise ValueError("--workdir is missing; see --help")
    refuse_pattern(values["workdir"].value, "--workdir")
    _set_all(config, noted)
    return config, absolute(values["workdir"].value), [path for path, _ in noted]


def _read_overrides(
    config: ml_collections.ConfigDict, argv: Sequence[str]
) -> list[tuple[str, str]]:
    """The path and text of every override, in command-line order."""
    values, noted = define(), []
    for argument in argv[1:]:
        match = OVERRIDE.fullmatch(argument)
        if match is None:
            continue
        negated, path, _ = match.groups()
        check_field(config, path)  # gives a better message than absl's unknown flag
        boolean = type_of(config, path) is bool
        if negated and not boolean:
            raise ValueError(
                f"--noconfig.{path} is for booleans, and config.{path} is not one; write "
                f"--config.{path}=VALUE"
            )
        # Only fields on the command line become flags: absl can then parse all of their forms.
        if f"config.{path}" not in values:
            flags.DEFINE_flag(_Override(path, boolean=boolean, noted=noted), values)
    rest = _parse(values, argv, config=config)
    if rest:
        dashes = [f"--{one}" for one in rest if one.startswith("config")]
        hint = f" (did you mean {shorten(dashes[0])}?)" if dashes else ""
        shown = [shorten(one) for one in rest[:SHOWN]]
        raise ValueError(f"arguments {shown} are not understood{hint}; write --flag=value")
    for path, text in noted:
        _check_is_value(f"config.{path}", text, values)
    return noted


def _set_all(config: ml_collections.ConfigDict, noted: Sequence[tuple[str, str]]) -> None:
    """Sets the fields in order, each converted to the type that it has in the config file."""
    found = [(path, convert(type_of(config, path), text, path)) for path, text in noted]
    for i, (path, value) in enumerate(found):
        if isinstance(value, ml_collections.ConfigDict):
            if before := [one for one, _ in found[:i] if one.startswith(f"{path}.")]:
                raise ValueError(
                    f"--config.{path} replaces the whole section and undoes the earlier "
                    f"--config.{before[0]}; put --config.{path} first"
                )
            logging.warning(
                "--config.%s replaces the whole section: fields that it leaves out get their "
                "defaults, not the values in the config file",
                path,
            )
        set_value(config, path, value)


def _expand(arguments: Sequence[str]) -> list[str]:
    """The arguments, with --flagfile replaced by the arguments in its file."""
    try:
        return flags.FlagValues().read_flags_from_files(list(arguments), force_gnu=True)
    except flags.Error as error:
        raise ValueError(f"--flagfile: {str(error).removeprefix('ERROR:: ')}") from None
    except (UnicodeDecodeError, RecursionError) as error:
        named = [one for one in arguments if one.lstrip("-").startswith("flagfile")]
        raise ValueError(f"{' '.join(named)} is not a file of flags: {error}") from None


def _parse(
    values: flags.FlagValues,
    argv: Sequence[str],
    *,
    known_only: bool = False,
    config: ml_collections.ConfigDict | None = None,
) -> list[str]:
    """Parses the arguments into `values` and returns those that are not flags.

    Args:
      values: the defined flags.
      argv: the command line.
      known_only: whether to skip undefined flags, and arguments that may be their values.
      config: its fields are suggested in place of an undefined flag.
    """
    values.set_gnu_getopt(known_only)
    try:
        rest = values(list(argv), known_only=known_only)[1:]
    except flags.UnrecognizedFlagError as error:
        raise ValueError(_unknown_flag(error.flagname, values, config)) from None
    except (flags.Error, ValueError) as error:
        raise ValueError(shorten(str(error), 500)) from None
    for name in ("config", "workdir", "coordinator"):
        if values[name].value is not None:
            _check_is_value(name, values[name].value, values)
    return rest


def _check_is_value(name: str, text: str, values: flags.FlagValues) -> None:
    """Raises ValueError if a flag's value looks like another flag: absl takes the next flag as the
    value of a flag that lacks one."""
    flag = text.lstrip("-").partition("=")[0]
    known = flag in values or flag.removeprefix("no") in values or OVERRIDE.fullmatch(text)
    if text.startswith("--") or (text.startswith("-") and known):
        raise ValueError(
            f"--{name} lacks a value: the next argument is {shorten(text)!r}; write --{name}=VALUE"
        )


def _unknown_flag(
    name: str, values: flags.FlagValues, config: ml_collections.ConfigDict | None
) -> str:
    """The message for an undefined flag, with the field or flag that was probably meant."""
    paths = [] if config is None else find_paths(config, name.replace("-", "_"))
    if paths:
        return f"there is no flag --{shorten(name)}; did you mean {either(paths)}?"
    close = did_you_mean(name, [one for one in values if not one.startswith("config.")])
    return f"there is no flag --{shorten(name)}{close}; --help shows all flags"
