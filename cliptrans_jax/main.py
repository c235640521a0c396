"""The command of CLIPTrans: python -m cliptrans_jax.main --config=FILE.py:stage=STAGE
--workdir=DIR."""

import functools
import logging
import shlex
from collections.abc import Mapping
from typing import Any

import ml_collections
from etils import epath
from jax.sharding import Mesh

from cliptrans_jax.config import READS, SYSTEM, Config
from cliptrans_jax.curves import CURVES
from cliptrans_jax.runs.idle import idle, seen_in_training, warn_of_random_parts
from cliptrans_jax.runs.initial_weights import check_weights
from cliptrans_jax.runs.pipeline import plan, run_stage
from cliptrans_jax.runs.scoring import galleries, scores_table
from cliptrans_jax.stages import EVALUATE, STAGES, Side, Trains, outcomes, trains
from common_jax import app, checkpoint
from common_jax.config import freeze
from common_jax.log import conclude
from common_jax.mesh import check_batch, make_mesh
from common_jax.report import reporting, write_report
from common_jax.workdir import check_output, hold, holds_results, require_everywhere, unfinished

DESCRIPTION = """CLIPTrans: features of M-CLIP become a prefix in a translator's decoder; captioning
first, then translation.

All stages in order:
  python -m cliptrans_jax.main --config=configs/cliptrans/emoji.py:stage=pipeline \\
      --workdir=runs/emoji
One stage, from the weights of other runs, with another number of beams:
  python -m cliptrans_jax.main --config=configs/cliptrans/emoji.py:stage=translate \\
      --workdir=runs/translate --config.sources.clip=runs/emoji/clip \\
      --config.sources.model=runs/emoji/caption --config.decode.beams=1

Flags:"""

# The command that uses a stage's run, by the network that the stage trains.
USES = {
    Trains.TOWERS: "cliptrans features {} FILE",
    Trains.TRANSLATOR: 'cliptrans translate {} "SENTENCE"',
}
CAPTIONS = " --pictures PICTURE"  # added for a stage that looks at pictures


def main(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Checks the config and runs the stage."""
    frozen = freeze(Config, config)
    check_places(frozen, workdir)
    app.warn_of_idle(idle(frozen))
    for warning in seen_in_training(frozen):
        logging.warning(warning)
    mesh = make_mesh(frozen.mesh)
    with hold(workdir):
        runs = plan(frozen, workdir)
        # An evaluation is never finished: the same command scores again.
        again = frozen.stage == EVALUATE
        to_do = runs if again else unfinished(workdir, runs, lambda one: outcomes(one.stage))
        if to_do:
            require_everywhere(workdir)  # without a lock, nothing may be written
        for folder, one in to_do:
            warn_of_random_parts(one)
            check_run(one, mesh, key=f"config.recipes.{one.stage}" if folder else "config")
        app.use_compilation_cache(frozen.run.compilation_cache)
        write = functools.partial(_report, frozen, workdir, [folder for folder, _ in runs])
        with reporting(workdir / "report.html", write):
            result = run_stage(frozen, workdir, mesh)
        folder, last = runs[-1]
        _conclude(result, last, workdir / folder)


def _conclude(result: Mapping[str, Any], config: Config, run: epath.Path) -> None:
    """Logs the final lines: the scores, and the command that uses the run."""
    scores = result.get("test", result)  # scores of the test split, if it was translated
    shown = (config.bleu, "chrf", "val/loss", "val/accuracy")
    use = USES.get(trains(config.stage), "")
    stage = STAGES.get(config.stage)
    if stage is not None and stage.captioning and stage.test is Side.IMAGE:
        use += CAPTIONS
    conclude(
        {name: scores[name] for name in shown if name in scores}, use.format(shlex.quote(str(run)))
    )


def check_places(config: Config, workdir: epath.Path) -> None:
    """Raises OSError, naming the field, if a source is missing or an output folder cannot be
    created.

    A run that already has results no longer needs its sources.
    """
    check_output("--workdir", workdir)
    if config.features:
        check_output("config.features", config.features)
    if trains(config.stage) is Trains.TOWERS or holds_results(workdir):
        return
    if config.has_prefix:
        checkpoint.check_source("config.sources.clip", config.sources.clip)
    check_weights(config)


def _report(config: Config, workdir: epath.Path, folders: list[str]) -> None:
    names = [f"{run}/{test}".strip("/") for run in folders for test in ("", *config.data.further)]
    write_report(
        workdir,
        title=f"CLIPTrans, {config.stage}",
        table=scores_table(workdir, names),
        tables=galleries(config, workdir / folders[-1]),
        families=CURVES,
    )


def check_run(config: Config, mesh: Mesh, *, key: str = "config") -> None:
    """Raises ValueError if the batch size of training or decoding is not a multiple of the mesh, or
    if a captioning stage would see neither pictures nor words.

    Args:
      key: path of the section with `optim`, for messages.
    """
    if config.stage != EVALUATE:
        batch = f"{key}.optim.batch / {key}.optim.accumulate"
        check_batch(mesh, batch, config.optim.micro_batch)
    if trains(config.stage) is not Trains.TOWERS:
        check_batch(mesh, "config.decode.batch", config.decode.batch)
    # Not in the config's own check: a config file may set one field, and a flag then the other.
    captioning = config.stage in STAGES and STAGES[config.stage].captioning
    if captioning and not config.has_prefix and config.noise.mask_prob == 1:
        raise ValueError(
            f"config.model.mapper.prefix=0 and config.noise.mask_prob=1.0: stage {config.stage!r} "
            "would write captions from neither features nor words; set a prefix, or "
            "--config.noise.mask_prob=0.3 to restore sentences that lack some words"
        )


if __name__ == "__main__":
    app.run(main, DESCRIPTION, system=SYSTEM, reads=READS)
