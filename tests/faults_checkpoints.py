"""Faults around checkpoints: another run's, copied or renamed ones; a folder name that means other
folders; a workdir that is deleted.

`tests/faults.py` injects them along with the others.
"""

import pathlib
import shutil
from collections.abc import Iterator

from fault_bench import OFTEN, Bench, Row
from processes import says, start

from common_jax.checkpoint import finished_steps

LAST = 44  # the last step of DIGITS

# What is copied into a stopped run's checkpoints -> (whether it is from a finished run of another
# seed, not from the run itself; its name there; what the log must say about it).
STRANGE: dict[str, tuple[bool, str, str]] = {
    "a checkpoint of another run": (True, "33", "it belongs to a run with another config"),
    "a copied checkpoint": (False, "33", "it holds "),
    "a step beyond the end": (False, "2400", f"the run ends at step {LAST}"),
}


def strange_checkpoints(bench: Bench) -> Iterator[Row]:
    """The newest checkpoints in a run's workdir are not the run's own."""
    undisturbed, other = bench.undisturbed(), bench.new()
    start(other, OFTEN, "--config.seed=1").finish()
    stopped = bench.new()
    process = start(stopped, OFTEN)
    process.kill(lambda: 22 in finished_steps(stopped / "checkpoints"))
    for fault, (foreign, name, reason) in STRANGE.items():
        for ids in (True, False):
            workdir, line = bench.new(), Row(f"{fault}{'' if ids else ', ids unknown'}")
            shutil.copytree(stopped, workdir)
            folder = workdir / "checkpoints"
            source = other / "checkpoints" / "33" if foreign else folder / "22"
            shutil.copytree(source, folder / name)
            if not ids:
                _forget(workdir)
            output = start(workdir, OFTEN).finish()
            if f"{name} aside: {reason}" not in output:
                line.fail("the run does not say so")
            if not (folder / f"foreign_{name}").exists():
                line.fail("the checkpoint is gone")
            line.count(workdir, undisturbed)
            yield line


def strange_folders(bench: Bench) -> Iterator[Row]:
    """A workdir whose name means other folders, and one that is deleted while the run is going."""
    undisturbed = bench.undisturbed()
    line, workdir = Row("a workdir with brackets in its name"), bench.new()
    bracketed = workdir.parent / "lr=[1e-3]"
    process = start(bracketed, OFTEN, log=workdir.with_suffix(".refused.log"))
    status = process.end()
    start(workdir, OFTEN).finish()
    if status != 2 or "checkpoints cannot be written below" not in process.output():
        line.fail("the workdir is not refused")
    if bracketed.exists():
        line.fail("something is written anyway")
    line.count(workdir, undisturbed)
    yield line
    moments = {
        "between saves": lambda at: says(at / "metrics.jsonl", '"step": 15'),
        "in a save": lambda at: any((at / "checkpoints").glob("22*")),
    }
    for moment, due in moments.items():
        line, workdir = Row(f"the workdir deleted {moment}"), bench.new()
        process = start(workdir, OFTEN)
        process.send(0, lambda at=workdir, due=due: due(at))
        _delete(workdir)
        status = process.end()
        start(workdir, OFTEN, log=workdir.with_suffix(".again.log")).finish()
        if status != 2 or "error: " not in process.output():
            line.fail(f"the run ends with status {status}")
        line.count(workdir, undisturbed)
        yield line


def _forget(workdir: pathlib.Path) -> None:
    """Removes ids, as in a run of an earlier version."""
    (workdir / "run.json").unlink()
    for step in (workdir / "checkpoints").iterdir():
        shutil.rmtree(step / "run", ignore_errors=True)


def _delete(folder: pathlib.Path) -> None:
    """Deletes a folder that a process is writing to."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return


FAULTS = {"strange_checkpoints": strange_checkpoints, "strange_folders": strange_folders}
