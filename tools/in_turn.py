"""Runs several command lines of one system in a single process, one after the other.

    python tools/in_turn.py m2mkd_jax.main --workdir=DIR \\
        'a --config=FILE.py --config.seed=0' 'b --config=FILE.py --config.seed=1'

The workdirs are `a` and `b`, next to DIR. Small runs start sooner in a process that has already
imported everything. A run that fails or is stopped ends the process, after SIGTERM with status 143:
only 0 means that all are finished.
"""

import importlib
import pathlib
import shlex
import signal
import sys

from common_jax import app, signals


def main(argv: list[str]) -> None:
    """Runs the command lines; see the file's docstring."""
    name, *lines = argv
    (place,) = (line for line in lines if line.startswith("--workdir="))
    module = importlib.import_module(name)
    folder = pathlib.Path(place.removeprefix("--workdir=")).parent
    for line in lines:
        if line != place:
            run, *flags = shlex.split(line)
            flags = [name, *flags, f"--workdir={folder / run}"]
            app.run(module.main, module.DESCRIPTION, flags, system=module.SYSTEM)
            if signals.requested():  # SIGTERM, after which a run returns as if it had finished
                sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main(sys.argv[1:])
