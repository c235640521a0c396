"""The entry of a command: flags, caches, and errors that a user can act on."""

import ctypes
import functools
import logging
import sys
import traceback
from collections.abc import Callable, Sequence

import jax
import ml_collections
from absl import flags
from etils import epath
from ml_collections import config_flags

from common_jax.checkpoint import absolute, refuse_pattern
from common_jax.config import did_you_mean
from common_jax.pods import hosts

Main = Callable[[ml_collections.ConfigDict, epath.Path], None]

# Parameters of glibc's mallopt by their numbers in malloc.h, each with a value that keeps memory
# and the usual one: M_MMAP_MAX (large buffers come from the heap), M_TRIM_THRESHOLD (nothing is
# given back), M_ARENA_MAX (all threads share one heap).
MEMORY = {-4: (0, 65536), -1: (-1, 128 * 1024), -8: (1, 0)}

HOST_FLAGS = ("hosts", "coordinator", "processes", "process")
# What a user can cause; anything else is our fault and shows its traceback.
USER_ERRORS = (ValueError, OSError)


def run(main: Main, description: str, argv: Sequence[str] | None = None) -> None:
    """Calls `main(config, workdir)` with what --config and --workdir say.

    Any field of the config can be set by --config.FIELD=VALUE. What a user can cause ends in a
    message on standard error and exit status 2, before anything is compiled or written; --debug
    shows its traceback as well.

    Args:
      main: the command.
      description: shown by --help.
      argv: command line; that of the process by default.

    Several processes that are one run are connected first, see `common_jax.pods.hosts.start`.
    Asked to stop, by SIGTERM to any of them, all save and end with exit status 0.
    """
    argv = list(sys.argv if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(message)s", force=True)
    for library in ("absl", "jax", "orbax"):  # orbax, through absl, reports its every save
        logging.getLogger(library).setLevel(logging.WARNING)
    values = _flags()
    try:
        config, workdir = _read_flags(values, argv, description)
        hosts.start(**{name: values[name].value for name in HOST_FLAGS})
        keep_memory()
        main(config, workdir)
    except hosts.Stopped:
        if jax.process_index() == 0:
            print("stopped as asked; the same command goes on", file=sys.stderr)
    except USER_ERRORS as error:
        if "debug" in values and values["debug"].value:
            raise
        print(f"error: {error}", file=sys.stderr)
        hosts.leave(2)
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        print(
            f"process {jax.process_index()} of {jax.process_count()} ends here; if another one "
            "ended before, its output says why. Checkpoints are whole: the same command in all "
            "processes goes on",
            file=sys.stderr,
        )
        hosts.leave(1)


def use_compilation_cache(folder: str | None) -> None:
    """Keeps compiled programs in `folder` for later runs; None keeps none."""
    if folder is None:
        return
    jax.config.update("jax_compilation_cache_dir", str(epath.Path(folder).expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def keep_memory() -> None:
    """On a CPU, has glibc keep what it has from the system. A step allocates and frees its buffers
    as a whole, and taking a gigabyte from the system anew for every step costs a fifth of it.

    To be called before any device is looked at: a thread stays with the heap that it starts with,
    and the first look starts all of XLA's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for parameter, (kept, _) in MEMORY.items():
        mallopt(parameter, kept)
    if jax.default_backend() != "cpu":
        for parameter, (_, usual) in MEMORY.items():
            mallopt(parameter, usual)


def read_config(argv: Sequence[str], description: str = "") -> ml_collections.ConfigDict:
    """The config that `run` would call its command with, from the same command line; nothing is
    connected or started.

    Raises:
      ValueError, FileNotFoundError: for what a user can have got wrong.
    """
    return _read_flags(_flags(), list(argv), description)[0]


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Config file and its arguments: FILE.py:key=value,key=value",
        flag_values=values,
        lock_config=True,
    )
    flags.DEFINE_string(
        "workdir", None, "Folder of the run; started there again, it goes on.", flag_values=values
    )
    flags.DEFINE_enum(
        "hosts",
        "auto",
        ("auto", "all", "one"),
        "Whether to connect with other processes: where the environment describes them (TPU VM, "
        "SLURM, Open MPI), always, or never.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of process 0, where the environment does not say it.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "processes", None, "With --coordinator: how many there are.", flag_values=values
    )
    flags.DEFINE_integer(
        "process", None, "With --coordinator: the number of this one, from 0.", flag_values=values
    )
    flags.DEFINE_bool("debug", False, "Show the traceback of a user's error.", flag_values=values)
    flags.DEFINE_bool("help", False, "Show this.", short_name="h", flag_values=values)
    return values


def _read_flags(
    values: flags.FlagValues, argv: list[str], description: str
) -> tuple[ml_collections.ConfigDict, epath.Path]:
    overrides = [arg for arg in argv[1:] if arg.startswith("--config.")]
    plain = [arg for arg in argv if arg not in overrides]
    rest = _read(values, plain)  # first without overrides, so that a misspelt one can be explained
    if values["help"].value:
        lines = (
            f"  --{name}: {values[name].help}"
            for name in ("config", "workdir", *HOST_FLAGS, "debug", "help")
        )
        print(description, *lines, "  --config.FIELD=VALUE: Any field of the config.", sep="\n")
        sys.exit(0)
    if len(rest) > 1:
        raise ValueError(f"arguments {rest[1:]} are not understood; write --flag=value")
    for name in ("config", "workdir"):
        if values[name].value is None:
            raise ValueError(f"--{name} is missing; --help shows what it is")
    config = values["config"].value
    if not isinstance(config, ml_collections.ConfigDict):
        filename = config_flags.get_config_filename(values["config"])
        raise FileNotFoundError(f"--config={filename} is no config file that can be read")
    for override in overrides:
        check_field(config, override.removeprefix("--config.").partition("=")[0])
    cleared = [override for override in overrides if override.endswith("=None")]
    fresh = _flags()
    _read(fresh, [arg for arg in argv if arg not in cleared])
    for name in (*HOST_FLAGS, "debug"):
        values[name].value = fresh[name].value
    config = fresh["config"].value
    for override in cleared:  # the flags would read a word, where the absence of a value is meant
        *sections, key = override.removeprefix("--config.").partition("=")[0].split(".")
        functools.reduce(lambda section, name: section[name], sections, config)[key] = None
    refuse_pattern(fresh["workdir"].value, "--workdir")
    return config, absolute(fresh["workdir"].value)


def _read(values: flags.FlagValues, argv: list[str]) -> list[str]:
    """Parses `argv` into `values` and returns what is left of it.

    ml_collections looks for overrides in sys.argv whatever it is given, so that is set meanwhile.
    """
    process, sys.argv = sys.argv, argv
    try:
        return values(argv)
    except flags.Error as error:
        # An error inside a config file arrives as text, its traceback first.
        last = str(error).strip().splitlines()[-1]
        raise ValueError(last.removeprefix("ValueError: ")) from None
    finally:
        sys.argv = process


def check_field(config: ml_collections.ConfigDict, path: str) -> None:
    """Raises ValueError unless the path of a flag, `a.b` of `--config.a.b=value`, is of a field."""
    section, name = config, "config"
    for key in path.split("."):
        if not isinstance(section, ml_collections.ConfigDict) or key not in section:
            known = list(section) if isinstance(section, ml_collections.ConfigDict) else []
            raise ValueError(
                f"--config.{path}: {name} has no field {key!r}{did_you_mean(key, known)}; "
                f"it takes {sorted(known)}"
            )
        section, name = section[key], f"{name}.{key}"
