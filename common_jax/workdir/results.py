"""The result of a run: written at its end, and read where nothing beside it contradicts it."""

from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from common_jax.workdir.claim import FILE, refuse_other_config
from common_jax.workdir.files import read_json, write_json

RESULT = "result.json"


def write_result(
    workdir: epath.PathLike, *, phase: str, steps: int, skipped: int, metrics: Mapping[str, float]
) -> dict[str, Any]:
    """Writes result.json, on process 0; the file says that the run is finished.

    Args:
      workdir: of the run.
      phase: the kind of run, and what a title adds to it.
      steps, skipped: updates in all, and those left out for a non-finite gradient.
      metrics: of the last evaluation.

    Returns:
      What the file holds: all of these in one dict, in every system.
    """
    result = {"phase": phase, "steps": steps, "skipped": skipped, **metrics}
    if jax.process_index() == 0:
        write_json(epath.Path(workdir) / RESULT, result)
    return result


def read_result(
    workdir: epath.PathLike, config: Any, *, phase: str, steps: int | None = None, apart: str = ""
) -> dict[str, Any] | None:
    """Reads result.json; None where the run has none yet.

    Args:
      workdir, config, apart: see `refuse_other_config`.
      phase: the run's name in its result.
      steps: of the run; None if unknown.

    Raises:
      ValueError: when workdir or result belong to another run, with the contradictions.
    """
    workdir = epath.Path(workdir)
    refuse_other_config(workdir, config, apart=apart)
    path = workdir / RESULT
    if not path.exists():
        return None
    result = read_json(path)
    wrong = []
    if not (workdir / FILE).exists():
        wrong.append(f"there is no {FILE} beside it")
    # A title may add to the kind of run; the config says the same.
    if str(result.get("phase")).split(" ")[0] != phase.split(" ")[0]:
        wrong.append(f"it is of {result.get('phase')!r}, and this run is {phase!r}")
    if steps is not None and result.get("steps") != steps:
        wrong.append(f"it is of {result.get('steps')} steps, and this run has {steps}")
    if wrong:
        raise ValueError(
            f"{path} is another run's: {'; '.join(wrong)}. Move it away, and start again"
        )
    return result
