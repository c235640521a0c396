"""The result of a finished run, taken where nothing beside it contradicts it."""

from typing import Any

from etils import epath

from common_jax.workdir.claim import FILE, refuse_other_config
from common_jax.workdir.files import read_json

RESULT = "result.json"


def read_result(
    workdir: epath.PathLike, config: Any, *, phase: str, steps: int | None = None, apart: str = ""
) -> dict[str, Any] | None:
    """Reads result.json; None where the run has none yet.

    Args:
      workdir: of the run.
      config: of the run, see `refuse_other_config`.
      phase: the run's name in its result.
      steps: of the run; None if unknown.
      apart: regex of fields that may differ.

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
    # The modules that a title names after its phase are in the config.
    if str(result.get("phase")).split(" ")[0] != phase.split(" ")[0]:
        wrong.append(f"it is of {result.get('phase')!r}, and this run is {phase!r}")
    if steps is not None and result.get("steps") != steps:
        wrong.append(f"it is of {result.get('steps')} steps, and this run has {steps}")
    if wrong:
        raise ValueError(
            f"{path} is another run's: {'; '.join(wrong)}. Move it away, and start again"
        )
    return result
