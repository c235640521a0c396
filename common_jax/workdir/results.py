"""The result of a run: written at its end, and read unless the files beside it contradict it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from etils import epath

from common_jax import hosts
from common_jax.workdir.claim import FILE, refuse_other_config
from common_jax.workdir.files import read_json, write_json

RESULT = "result.json"
Run = TypeVar("Run")  # a run's config


def write_result(
    workdir: epath.PathLike, *, phase: str, steps: int, skipped: int, metrics: Mapping[str, float]
) -> dict[str, Any]:
    """Writes result.json, on process 0, which marks the run as finished.

    Args:
      workdir: the run's folder.
      phase: the run's phase or stage.
      steps, skipped: total number of updates, and of those skipped for a non-finite loss or
        gradient.
      metrics: metrics of the last evaluation.

    Returns:
      The content of the file: all of these in one dict, the same in every system.
    """
    result = {"phase": phase, "steps": steps, "skipped": skipped, **metrics}
    if jax.process_index() == 0:
        write_json(epath.Path(workdir) / RESULT, result)
    return result


def read_result(
    workdir: epath.PathLike, config: Any, *, phase: str, steps: int | None = None, apart: str = ""
) -> dict[str, Any] | None:
    """Reads result.json; None if the run has none yet. Process 0 reads it for all processes, which
    must call this together.

    Args:
      workdir, config, apart: see `refuse_other_config`.
      phase: the run's phase or stage.
      steps: the run's total number of updates; None if unknown.

    Raises:
      ValueError: if the workdir or the result belongs to another run, with the contradictions.
    """
    workdir = epath.Path(workdir)
    return hosts.decide(lambda: _read(workdir, config, phase, steps, apart))


def unfinished(
    workdir: epath.Path,
    runs: Sequence[tuple[str, Run]],
    outcomes: Callable[[Run], Sequence[str]] = lambda run: (RESULT,),
) -> list[tuple[str, Run]]:
    """The runs of a command, as pairs of a folder below `workdir` and a config, that lack one of
    their `outcomes`, the files that mark a run as finished.

    Decided by existence alone: configs are compared when a run starts. Process 0 looks for all
    processes, which must call this together.
    """

    def look() -> list[bool]:
        return [
            all((workdir / folder / name).exists() for name in outcomes(run))
            for folder, run in runs
        ]

    return [run for run, done in zip(runs, hosts.decide(look), strict=True) if not done]


def _read(
    workdir: epath.Path, config: Any, phase: str, steps: int | None, apart: str
) -> dict[str, Any] | None:
    refuse_other_config(workdir, config, apart=apart)
    path = workdir / RESULT
    if not path.exists():
        return None
    result = read_json(path)
    wrong = []
    if not (workdir / FILE).exists():
        wrong.append(f"there is no {FILE} beside it")
    # Earlier versions wrote the modules of a run behind its phase.
    if str(result.get("phase")).split(" ")[0] != phase:
        wrong.append(f"its phase is {result.get('phase')!r}, and this run is {phase!r}")
    if steps is not None and result.get("steps") != steps:
        wrong.append(f"it has {result.get('steps')} steps, and this run has {steps}")
    if wrong:
        raise ValueError(
            f"{path} belongs to another run: {'; '.join(wrong)}. Move it away, and start again"
        )
    return result
