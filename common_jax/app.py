"""The entry of a command: flags, caches, and errors that a user can act on."""

import logging
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence

import jax
import ml_collections
import tqdm
from etils import epath

from common_jax import command_line, hosts, signals
from common_jax.workdir import check_output

Main = Callable[[ml_collections.ConfigDict, epath.Path], None]
USER_ERRORS = command_line.USER_ERRORS


def run(
    main: Main,
    description: str,
    argv: Sequence[str] | None = None,
    *,
    system: command_line.System | None = None,
    reads: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Calls `main(config, workdir)` with the config and the folder of --config and --workdir.

    Any field of the config can be set by --config.FIELD=VALUE. An error that a user can cause ends
    in a message on standard error and exit status 2, before anything is compiled or written;
    --debug shows its traceback as well.

    Args:
      main: the command.
      description: shown by --help.
      argv: command line; that of the process by default.
      system: whose command it is; configs of other systems are refused. None takes any.
      reads: sections and fields that each kind of run reads; a flag that sets another is warned of.

    Several processes that are one run are connected first, see `common_jax.hosts.start`. After a
    signal to any of them all save and end: with exit status 0 after SIGTERM, 130 after Ctrl-C, 129
    after SIGHUP (see `common_jax.signals`).
    """
    argv = list(sys.argv if argv is None else argv)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s  %(message)s", handlers=[_Lines()], force=True
    )
    for library in ("absl", "jax", "orbax"):  # orbax, through absl, reports its every save
        logging.getLogger(library).setLevel(logging.WARNING)
    with signals.listening():
        _run(main, description, argv, system, reads)


class _Lines(logging.StreamHandler):
    """Writes lines above a progress bar, where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.tqdm.external_write_mode(self.stream):
            super().emit(record)


def _run(
    main: Main,
    description: str,
    argv: list[str],
    system: command_line.System | None,
    reads: Mapping[str, Sequence[str]] | None,
) -> None:
    values = command_line.define()
    try:
        config, workdir, paths = command_line.read(values, argv, description, system)
        if system is not None and reads is not None:
            _warn_of_unread(paths, system.field, config[system.field], reads)
        hosts.start(**{name: values[name].value for name in command_line.HOST_FLAGS})
        main(config, workdir)
    except signals.Stopped:
        if not jax.distributed.is_initialized() or jax.process_index() == 0:
            print("stopped as asked; the same command resumes", file=sys.stderr)
        # Not by hosts.leave: the other processes stop as well, and are waited for.
        if status := signals.status():
            sys.exit(status)
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
            "processes resumes",
            file=sys.stderr,
        )
        hosts.leave(1)


def _warn_of_unread(
    paths: Sequence[str], field: str, kind: str, reads: Mapping[str, Sequence[str]]
) -> None:
    # A name that is no kind of run is left to the config's own check.
    for path in command_line.unread(paths, reads.get(kind, paths)):
        logging.warning("--config.%s changes nothing: %s=%r does not read it", path, field, kind)


def warn_of_idle(fields: Mapping[str, str]) -> None:
    """Warns of fields of the config, by path, that are set and change nothing; with the reasons."""
    for path, why in fields.items():
        logging.warning("config.%s changes nothing: %s", path, why)


def use_compilation_cache(folder: str | None) -> None:
    """Keeps compiled programs in `folder` for later runs; None keeps none.

    For a folder that cannot be made there is a warning: the run computes the same without it.
    """
    if folder is None:
        return
    try:
        check_output("config.run.compilation_cache", folder)
    except OSError as error:
        logging.warning("%s; every start compiles again", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(epath.Path(folder).expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def read_config(argv: Sequence[str], description: str = "") -> ml_collections.ConfigDict:
    """The config that `run` would call its command with, from the same command line; connects and
    starts nothing.

    Raises:
      ValueError, OSError: for a mistake of the user.
    """
    return command_line.read(command_line.define(), list(argv), description)[0]
