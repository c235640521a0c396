"""The entry point of a command: flags, caches, and errors that a user can act on."""

import logging
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence

import jax
import ml_collections
import tqdm
from etils import epath

from common_jax import command_line, hosts, signals, start_up
from common_jax.optim import replaced_lengths
from common_jax.workdir import check_output, describe_error, require_same_start

Main = Callable[[ml_collections.ConfigDict, epath.Path], None]
USER_ERRORS = command_line.USER_ERRORS


def run(
    main: Main,
    description: str,
    argv: Sequence[str] | None = None,
    *,
    system: command_line.System | None = None,
    reads: Mapping[str, Sequence[str]] | None = None,
    lost: str = "",
) -> None:
    """Calls `main(config, workdir)` with the values of --config and --workdir.

    Any field of the config can be set with --config.FIELD=VALUE. A user error ends in a message on
    standard error and exit status 2, before anything is compiled or written; --debug also shows its
    traceback.

    Args:
      main: the command.
      description: shown by --help.
      argv: the command line; by default the process's.
      system: the system that the command belongs to; configs of other systems are refused. None
        accepts any.
      reads: sections and fields that each kind of run reads; setting another one logs a warning.
      lost: for a command that does not resume, what is said when it is stopped, such as "nothing
        was planned".

    If several processes form one run, they are connected first, see `common_jax.start_up.connect`,
    and their configs and code are compared, see `common_jax.workdir.require_same_start`. A signal
    to any of them makes all save and exit, with status 0 after SIGTERM, 130 after Ctrl-C and 129
    after SIGHUP (see `common_jax.signals`); a command that does not resume exits with 143 after
    SIGTERM, since its 0 means something else.
    """
    argv = list(sys.argv if argv is None else argv)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s  %(message)s", handlers=[_Lines()], force=True
    )
    for library in ("absl", "jax", "orbax"):  # orbax logs every save, through absl
        logging.getLogger(library).setLevel(logging.WARNING)
    with signals.listening(resumes=not lost):
        _run(main, description, argv, system, reads, lost)


class _Lines(logging.StreamHandler):
    """Writes log lines above the progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.tqdm.external_write_mode(self.stream):
            super().emit(record)


def _run(
    main: Main,
    description: str,
    argv: list[str],
    system: command_line.System | None,
    reads: Mapping[str, Sequence[str]] | None,
    lost: str,
) -> None:
    values = command_line.define()
    try:
        config, workdir, paths = command_line.read(values, argv, description, system)
        if system is not None and reads is not None:
            _warn_of_unread(paths, system.field, config[system.field], reads)
        # Only flags are warned of: config files may well set both, and `scale` then changes both.
        for path, why in replaced_lengths(config, paths).items():
            logging.warning("--config.%s changes nothing: %s", path, why)
        start_up.connect(**{name: values[name].value for name in command_line.HOST_FLAGS})
        if jax.distributed.is_initialized():
            own = () if system is None else (system.package,)
            require_same_start(config, packages=("common_jax", *own))
        main(config, workdir)
    except signals.Stopped:
        if not jax.distributed.is_initialized() or jax.process_index() == 0:
            end = f": {lost}" if lost else "; the same command resumes"
            print(f"stopped as requested{end}", file=sys.stderr)
        # Not hosts.leave: the other processes stop too, and this one waits for them.
        if status := signals.status():
            sys.exit(status)
    except hosts.Disagreement as error:
        if "debug" in values and values["debug"].value:
            raise
        print(f"error: {error}", file=sys.stderr)
        # Not hosts.leave either: one that ended at once could take the others down before they have
        # printed the error and set their status.
        sys.exit(2)
    except USER_ERRORS as error:
        if "debug" in values and values["debug"].value:
            raise
        print(f"error: {describe_error(error)}", file=sys.stderr)
        hosts.leave(2)
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        print(
            f"process {jax.process_index()} of {jax.process_count()} ends here; if another one "
            "ended first, its output says why. Checkpoints are intact: the same command in all "
            "processes resumes",
            file=sys.stderr,
        )
        hosts.leave(1)


def _warn_of_unread(
    paths: Sequence[str], field: str, kind: str, reads: Mapping[str, Sequence[str]]
) -> None:
    # An unknown kind of run is reported by the config's own check.
    for path in command_line.unread(paths, reads.get(kind, paths)):
        logging.warning("--config.%s changes nothing: %s=%r does not read it", path, field, kind)


def warn_of_idle(fields: Mapping[str, str]) -> None:
    """Warns about config fields that are set but have no effect, given the reasons by path."""
    for path, why in fields.items():
        logging.warning("config.%s changes nothing: %s", path, why)


def use_compilation_cache(folder: str | None) -> None:
    """Caches compiled programs in `folder` for later runs; None disables the cache.

    If the folder cannot be created, this only warns: the run's results do not depend on it.
    """
    if folder is None:
        return
    try:
        check_output("config.run.compilation_cache", folder)
    except OSError as error:
        logging.warning("%s; every start will recompile", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(epath.Path(folder).expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)  # no lower limit on size


def read_config(argv: Sequence[str], description: str = "") -> ml_collections.ConfigDict:
    """The config that `run` would pass to its command, from the same command line; connects to and
    starts nothing.

    Raises:
      ValueError, OSError: for a user error.
    """
    return command_line.read(command_line.define(), list(argv), description)[0]
