"""The command of m2mKD: python -m m2mkd_jax.main --config=FILE.py:phase=PHASE --workdir=DIR."""

import re

import jax
import ml_collections
from etils import epath
from jax.sharding import Mesh

from common_jax import app, checkpoint
from common_jax.command_line import unread
from common_jax.config import freeze
from common_jax.mesh import check_batch, make_mesh
from common_jax.report import Table, dispensable, is_picture, write_report
from common_jax.workdir import check_output, hold, holds_results, read_json
from m2mkd_jax.config import READS, SYSTEM, Config
from m2mkd_jax.curves import FAMILIES
from m2mkd_jax.models.vmoe import VMoEConfig
from m2mkd_jax.moe.layer import check_moe
from m2mkd_jax.phases.circuit import PICTURE
from m2mkd_jax.phases.few_shot import episodes_table
from m2mkd_jax.phases.pipeline import plan, run_phase

DESCRIPTION = """Module-to-module knowledge distillation (m2mKD) of vision transformers into V-MoE
and NAC.

All phases in order:
  python -m m2mkd_jax.main --config=configs/m2mkd/digits.py:phase=pipeline --workdir=runs/digits
One phase, and one module of it, with weights of other runs and another alpha:
  python -m m2mkd_jax.main --config=configs/m2mkd/digits.py:phase=distill,module=2 \\
      --workdir=runs/student_2 --config.sources.meta=runs/digits/meta \\
      --config.sources.teacher=runs/digits/teacher --config.distill.alpha=0.3

Flags:"""

MODULE_ACCURACY = r"test/module_\d+/accuracy"
WORKDIRS = ("meta", "modules", "teacher", "students", "network")  # of config.sources
STUDENT_PHASES = ("distill", "end_to_end", "few_shot")


def main(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Freezes the config, makes the mesh, and runs the phase."""
    frozen = freeze(Config, config)
    check_places(frozen, workdir)
    mesh = make_mesh(frozen.mesh)
    with hold(workdir):
        pipeline = frozen.phase == "pipeline"
        runs = plan(frozen, workdir) if pipeline else [("", frozen)]
        for _, run in runs:
            key = f"config.recipes.{run.phase}" if pipeline else "config"
            check_run(run, mesh, key=key)
        app.use_compilation_cache(frozen.run.compilation_cache)
        run_phase(frozen, workdir, mesh)
        if jax.process_index() == 0:
            folders = [folder for folder, _ in runs]
            with dispensable(workdir / "report.html"):
                _report(frozen, workdir, folders)


def _report(config: Config, workdir: epath.Path, folders: list[str]) -> None:
    episodes = (episodes_table(workdir / folder) for folder in folders)
    write_report(
        workdir,
        title=f"m2mKD, {config.phase}",
        table=results_table(workdir, folders if config.phase == "pipeline" else []),
        tables=[table for table in episodes if table is not None],
        figures=connectivity_figures(workdir, folders),
        families=FAMILIES,
    )


def results_table(workdir: epath.Path, folders: list[str]) -> Table | None:
    """One row a run of the pipeline, with a column of OOD accuracy where any run has it, and below
    a run of several modules, whose own row is their mean, one for each; None where there are no
    `folders`."""
    header, rows = ["run", "steps", "test accuracy", "test loss"], []
    fields = {"steps": int, "test/accuracy": int | float | None, "test/loss": int | float}
    results = [read_json(workdir / name / "result.json", fields) for name in folders]
    has_ood = any("ood/accuracy" in result for result in results)
    for folder, result in zip(folders, results, strict=True):
        ood = [_percent(result.get("ood/accuracy"))] if has_ood else []
        modules = [key.split("/")[1] for key in result if re.fullmatch(MODULE_ACCURACY, key)]
        for name in ("", *sorted(modules, key=lambda name: int(name.removeprefix("module_")))):
            split = f"test/{name}" if name else "test"
            accuracy, loss = _percent(result[f"{split}/accuracy"]), f"{result[f'{split}/loss']:.3f}"
            label = f"{folder}, {name.replace('_', ' ')}" if name else folder
            rows.append((label, str(result["steps"]), accuracy, loss, *ood))
    header += ["OOD accuracy"] if has_ood else []
    return Table("Runs of the pipeline", tuple(header), tuple(rows)) if rows else None


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.1f} %"


def connectivity_figures(workdir: epath.Path, folders: list[str]) -> list[tuple[str, epath.Path]]:
    """Caption and picture of the learned graph, of every run of a NAC that has one."""
    pictures = [(folder, workdir / folder / PICTURE) for folder in folders]
    return [
        (f"{folder} mediators before and after training: distances, and the graph".strip(), path)
        for folder, path in pictures
        if is_picture(path)
    ]


def check_places(config: Config, workdir: epath.Path) -> None:
    """Raises OSError, naming the field, for a source of the config that is not there, and for a
    workdir that cannot be made.

    A run with results may have lost what it started from.
    """
    check_output("--workdir", workdir)
    if holds_results(workdir):
        return
    sources = {f"sources.{name}": getattr(config.sources, name) for name in WORKDIRS}
    sources["init.upcycle"] = config.init.upcycle
    idle = unread(sources, READS[config.phase])
    if config.phase == "end_to_end" and config.baseline.kind == "none":
        idle.append("sources.teacher")
    for key, found in sources.items():
        if key in idle:
            continue
        if isinstance(found, str):
            checkpoint.check_source(f"config.{key}", found)
        elif len(found) in (1, len(config.meta.depths)):  # the phase refuses other numbers
            for i, source in enumerate(found):
                checkpoint.check_source(f"config.{key}[{i}]", source)


def check_run(config: Config, mesh: Mesh, *, key: str = "config") -> None:
    """Raises ValueError for a batch or a mixture of experts that does not fit the mesh; `key` is
    the path of the section that `optim` is from."""
    micro_batch = config.optim.micro_batch
    check_batch(mesh, f"{key}.optim.batch / {key}.optim.accumulate", micro_batch)
    student = config.phase in STUDENT_PHASES and isinstance(config.model, VMoEConfig)
    if student and config.model.moe_positions():
        check_moe(config.model.moe, dict(mesh.shape), micro_batch)


if __name__ == "__main__":
    app.run(main, DESCRIPTION, system=SYSTEM, reads=READS)
