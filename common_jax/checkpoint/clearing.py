"""Renames and deletes checkpoints that would be in the way."""

import logging
import time

from etils import epath

from common_jax.checkpoint.belonging import finished_steps, step_of, unfinished_steps
from common_jax.workdir import in_bucket


def clear_unfinished(folder: epath.Path) -> None:
    """Removes what would block the next save of its step: deletes what a killed save or a killed
    deletion left behind. A step on disk that lacks markers is only renamed if no newer checkpoint
    is intact, since it may be a partial copy."""
    if not folder.exists():
        return
    unfinished, newest = unfinished_steps(folder), max(finished_steps(folder), default=-1)
    for path in [*folder.iterdir()]:
        partial = (step := step_of(path)) in unfinished
        if ".orbax-checkpoint-tmp" in path.name or (partial and in_bucket(folder)):
            logging.warning("removing the unfinished checkpoint %s", path)
            _remove(path)
        elif partial and step < newest:
            logging.warning("removing the rest of checkpoint %s, which was being deleted", path)
            _remove(path)
        elif partial:
            logging.warning("checkpoint %s is not complete; it is renamed", path)
            move(path, folder / f"unfinished_{path.name}")


def _remove(folder: epath.Path, *, patience: float = 10.0) -> None:
    """Deletes a folder that the threads of a failed save may still write to for a while."""
    deadline = time.monotonic() + patience
    while folder.exists():
        try:
            folder.rmtree()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def move(source: epath.Path, target: epath.Path) -> None:
    """Renames a folder to `target`, or to TARGET_2 and so on if that exists."""
    free, number = target, 1
    while free.exists():
        number += 1
        free = target.parent / f"{target.name}_{number}"
    source.rename(free)
