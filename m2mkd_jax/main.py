"""The command of m2mKD: python -m m2mkd_jax.main --config=FILE.py:phase=PHASE --workdir=DIR."""

import json

import jax
import ml_collections
from etils import epath
from jax.sharding import Mesh

from common_jax import app
from common_jax.config import freeze
from common_jax.mesh import check_batch, make_mesh
from common_jax.report import Table, write_report
from m2mkd_jax.config import Config
from m2mkd_jax.models.moe import check_moe
from m2mkd_jax.phases.pipeline import plan, run_phase

DESCRIPTION = """Module-to-module knowledge distillation (m2mKD) of vision transformers into V-MoE.

All phases in order:
  python -m m2mkd_jax.main --config=configs/m2mkd/digits.py:phase=pipeline --workdir=runs/digits
One phase, and one module of it, with weights of other runs and another alpha:
  python -m m2mkd_jax.main --config=configs/m2mkd/digits.py:phase=distill,module=2 \\
      --workdir=runs/student_2 --config.sources.meta=runs/digits/meta \\
      --config.sources.teacher=runs/digits/teacher --config.distill.alpha=0.3

Flags:"""

STUDENT_PHASES = ("distill", "end_to_end", "few_shot")


def main(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Freezes the config, makes the mesh, and runs the phase."""
    frozen = freeze(Config, config)
    mesh = make_mesh(frozen.mesh)
    runs = plan(frozen, workdir) if frozen.phase == "pipeline" else [("", frozen)]
    for _, run in runs:
        check_run(run, mesh)
    app.use_compilation_cache(frozen.run.compilation_cache)
    run_phase(frozen, workdir, mesh)
    if jax.process_index() == 0:
        folders = [folder for folder, _ in runs] if frozen.phase == "pipeline" else []
        write_report(workdir, title=f"m2mKD, {frozen.phase}", table=results_table(workdir, folders))


def results_table(workdir: epath.Path, folders: list[str]) -> Table | None:
    """One row a run of the pipeline; None where there are no `folders`."""
    rows = []
    for folder in folders:
        result = json.loads((workdir / folder / "result.json").read_text())
        accuracy = f"{100 * result['test/accuracy']:.1f} %"
        rows.append((folder, str(result["steps"]), accuracy, f"{result['test/loss']:.3f}"))
    header = ("run", "steps", "test accuracy", "test loss")
    return Table("Runs of the pipeline", header, tuple(rows)) if rows else None


def check_run(config: Config, mesh: Mesh) -> None:
    """Raises ValueError for a batch or a mixture of experts that does not fit the mesh."""
    micro_batch = config.optim.micro_batch
    check_batch(mesh, "config.optim.batch / config.optim.accumulate", micro_batch)
    if config.phase in STUDENT_PHASES and config.model.moe_positions():
        check_moe(config.model.moe, dict(mesh.shape), micro_batch)


if __name__ == "__main__":
    app.run(main, DESCRIPTION)
