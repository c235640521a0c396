"""Trains m2mKD: python -m m2mkd_jax.main --config=FILE.py:phase=PHASE --workdir=DIR."""

import functools
import shlex
from collections.abc import Mapping
from typing import Any

import ml_collections
from etils import epath
from jax.sharding import Mesh

from common_jax import app, checkpoint
from common_jax.config import freeze
from common_jax.log import conclude
from common_jax.mesh import check_batch, make_mesh
from common_jax.report import Table, is_picture, reporting, write_report
from common_jax.workdir import (
    check_output,
    hold,
    holds_results,
    read_json,
    require_everywhere,
    unfinished,
)
from m2mkd_jax.config import SYSTEM, Config
from m2mkd_jax.curves import CURVES
from m2mkd_jax.evaluators import show
from m2mkd_jax.phases import PHASES
from m2mkd_jax.phases.fields import check_sources, idle, reads, used_sources, warn_of_networks
from m2mkd_jax.phases.networks import SECTIONS, family_of_role
from m2mkd_jax.phases.phase import Phase
from m2mkd_jax.phases.pipeline import plan, result_folder, run_phase

DESCRIPTION = """Module-to-module knowledge distillation (m2mKD) of vision transformers into V-MoE
and NAC.

All phases in order:
  python -m m2mkd_jax.main --config=configs/m2mkd/digits.py:phase=pipeline --workdir=runs/digits
A single module in one phase, with weights from other runs and a different alpha:
  python -m m2mkd_jax.main --config=configs/m2mkd/digits.py:phase=distill,module=2 \\
      --workdir=runs/student_2 --config.sources.meta=runs/digits/meta \\
      --config.sources.teacher=runs/digits/teacher --config.distill.alpha=0.3

Flags:"""


def main(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Freezes the config, checks it, makes the mesh, and runs the phase."""
    frozen = freeze(Config, config)
    check_sources(frozen)
    check_places(frozen, workdir)
    app.warn_of_idle(idle(frozen))
    warn_of_networks(frozen)
    mesh = make_mesh(frozen.mesh)
    with hold(workdir):
        pipeline = frozen.phase == "pipeline"
        runs = plan(frozen, workdir) if pipeline else [("", frozen)]
        # All runs before the first starts: a pipeline would otherwise fail after hours.
        if to_do := unfinished(workdir, runs):
            require_everywhere(workdir)  # without a lock, nothing may be written
        for _, run in to_do:
            key = f"config.recipes.{run.phase}" if pipeline else "config"
            check_run(run, mesh, key=key)
        app.use_compilation_cache(frozen.run.compilation_cache)
        write = functools.partial(_report, frozen, workdir, runs)
        with reporting(workdir / "report.html", write):
            result = run_phase(frozen, workdir, mesh)
        folder = result_folder() if pipeline else ""
        _conclude(result, PHASES[dict(runs)[folder].phase], workdir / folder)


def _conclude(result: Mapping[str, Any], phase: Phase, run: epath.Path) -> None:
    """Prints the final lines: the scores, and a command that uses the trained run."""
    command = "show {}" if phase.modular else "predict {} PICTURE"
    if "episodes" in result:
        run = run / "episode_0"
    shown = ("test/loss", "test/accuracy", "ood/accuracy")
    scores = {name: result[name] for name in shown if result.get(name) is not None}
    conclude(scores, f"m2mkd {command.format(shlex.quote(str(run)))}")


def _report(config: Config, workdir: epath.Path, runs: list[tuple[str, Config]]) -> None:
    finished = [folder for folder, _ in runs if (workdir / folder / "result.json").exists()]
    folders = finished if config.phase == "pipeline" else []
    tables = (PHASES[run.phase].table(workdir / folder) for folder, run in runs)
    write_report(
        workdir,
        title=f"m2mKD, {config.phase}",
        table=results_table(workdir, folders),
        tables=[table for table in tables if table is not None],
        figures=learned_figures(workdir, runs),
        families=CURVES,
    )


def results_table(workdir: epath.Path, folders: list[str]) -> Table | None:
    """One row per run of the pipeline, with an OOD accuracy column if any run has it. A run of
    several modules has one row for their mean and one per module. None if `folders` is empty."""
    header, rows = ["run", "steps", "test accuracy", "test loss"], []
    fields = {"steps": int, "test/accuracy": int | float | None, "test/loss": int | float}
    results = [read_json(workdir / name / "result.json", fields) for name in folders]
    has_ood = any("ood/accuracy" in result for result in results)
    for folder, result in zip(folders, results, strict=True):
        ood = [show("accuracy", result.get("ood/accuracy"))] if has_ood else []
        keys = (key.split("/") for key in result)
        modules = [key[1] for key in keys if len(key) == 3 and key[::2] == ["test", "accuracy"]]
        for name in ("", *sorted(modules, key=lambda name: (len(name), name))):
            split = f"test/{name}" if name else "test"
            values = (show(metric, result[f"{split}/{metric}"]) for metric in ("accuracy", "loss"))
            label = f"{folder}, {name.replace('_', ' ')}" if name else folder
            rows.append((label, str(result["steps"]), *values, *ood))
    header += ["OOD accuracy"] if has_ood else []
    return Table("Runs of the pipeline", tuple(header), tuple(rows)) if rows else None


def learned_figures(
    workdir: epath.Path, runs: list[tuple[str, Config]]
) -> list[tuple[str, epath.Path]]:
    """Captions and paths of the pictures that the network families have drawn."""
    figures = []
    for folder, run in runs:
        preparation = family_of_role(run, PHASES[run.phase].role).preparation
        if preparation is not None and is_picture(path := workdir / folder / preparation.picture):
            figures.append((f"{folder} {preparation.caption}".strip(), path))
    return figures


def check_places(config: Config, workdir: epath.Path) -> None:
    """Raises OSError, naming the field, if the workdir cannot be created or, unless the run already
    has results, if a source does not exist."""
    check_output("--workdir", workdir)
    if holds_results(workdir):
        return
    for source in used_sources(config):
        key, value = f"config.{source.path}", source.value(config)
        if isinstance(value, str):
            checkpoint.check_source(key, value)
        # Any other number of workdirs is rejected by the phase itself.
        elif not source.made or len(value) in (1, len(config.meta.depths)):
            for i, folder in enumerate(value):
                checkpoint.check_source(f"{key}[{i}]", folder)


def check_run(config: Config, mesh: Mesh, *, key: str = "config") -> None:
    """Raises ValueError if the batch or the network does not fit the mesh; `key` is the path of the
    section that holds `optim`."""
    micro_batch = config.optim.micro_batch
    check_batch(mesh, f"{key}.optim.batch / {key}.optim.accumulate", micro_batch)
    role = PHASES[config.phase].role
    section = getattr(config, SECTIONS[role])
    family_of_role(config, role).check_mesh(section, dict(mesh.shape), micro_batch)


if __name__ == "__main__":
    app.run(main, DESCRIPTION, system=SYSTEM, reads=reads())
