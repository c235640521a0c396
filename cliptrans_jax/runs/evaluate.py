"""Stage "evaluate": scores a trained or released model on any split."""

import dataclasses
import logging
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from cliptrans_jax.config import Config
from cliptrans_jax.runs.finished import Finished, find
from cliptrans_jax.runs.initial_weights import compare_models, is_run, make_warm_start
from cliptrans_jax.runs.run_data import RunData
from cliptrans_jax.runs.scoring import score_further, score_split
from cliptrans_jax.runs.translation import Model
from cliptrans_jax.stages import EVALUATE, SCORED_AS, TRANSLATION_STAGES
from common_jax import checkpoint
from common_jax.mesh import match_rules, with_shardings
from common_jax.weights import list_problems
from common_jax.weights.table import list_differences
from common_jax.workdir import claim, refuse_other_config


def evaluate(user_config: Config, workdir: epath.Path, mesh: Mesh) -> dict[str, Any]:
    """Translates config.data.test_split with config.sources.model and scores it.

    If that is a workdir, the run's best checkpoint on its own validation set is used.
    """
    if not user_config.sources.model:
        raise ValueError("stage 'evaluate' needs config.sources.model, the model to score")
    refuse_other_config(workdir, user_config)
    # Whatever stage trained it, the model is scored as a translator. Only a run's own
    # config.run.best chooses its checkpoint.
    run = dataclasses.replace(user_config.run, best=None)
    config = dataclasses.replace(user_config, stage=SCORED_AS, all_languages=False, run=run)
    config = config.apply_parity()
    data = RunData(config, workdir, mesh)
    data.check(train=False)
    model = Model.of(config, data)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    source = config.sources.model
    if is_run(source):
        step = find(source, TRANSLATION_STAGES).step
        _require_same(shapes, step)
        compare_models(config, step, fixed=lambda name: True)
        params = checkpoint.load(step, mesh=mesh, rules=model.rules, average=True)
        name = step.name
    else:  # a released file has no step
        targets = with_shardings(shapes, match_rules(model.rules, shapes, mesh))
        params, name = make_warm_start(config, model.trained_tower)(targets).params, "0"
    test = data.load(config.data.test_split, train=False)
    claim(workdir, user_config)
    params = {**model.frozen(mesh), **params}
    if not config.data.further_tests:  # their features need the towers again
        data.release_towers()
    translate = model.translate(data)
    further = score_further(config, workdir, data, translate, params, step=name)
    scores = score_split(config, workdir, test, translate, params, step=name)
    for found in (scores, *further.values()):
        logging.info("%s: BLEU %.2f", found["set"], found["bleu"])
    return {"stage": EVALUATE} | further | scores


def rescore(run: Finished, folder: epath.Path, mesh: Mesh) -> dict[str, Any]:
    """Scores a finished run, with its own tokenizer, on config.data.test_split of whichever corpus
    its config now names.

    Args:
      run: a run of a stage in `TRANSLATION_STAGES`; the stage determines sentences and features.
      folder: output folder for scores.json, translations.tsv and features.
      mesh: devices.

    Returns:
      The content of scores.json.
    """
    # This corpus may lack the run's further test splits.
    corpus = dataclasses.replace(run.config.data, further_tests=())
    config = dataclasses.replace(run.config.apply_parity(), data=corpus, features="")
    data = RunData(config, folder, mesh, known=run.load_tokenizer())
    data.check(train=False)
    model = Model.of(config, data)
    test = data.load(config.data.test_split, train=False)
    frozen = model.frozen(mesh)
    data.release_towers()
    params = checkpoint.load(run.step, mesh=mesh, rules=model.rules, average=True)
    params = {**frozen, **params}
    return score_split(config, folder, test, model.translate(data), params, step=run.step.name)


def _require_same(shapes: Any, step: epath.Path) -> None:
    """Raises ValueError, naming the differences, if a checkpoint does not fit the model."""
    if problems := list_differences(checkpoint.load_shapes(step), shapes):
        raise ValueError(
            f"config.model is not the model of config.sources.model, {step}:"
            f"{list_problems(problems)}\ngive the config.model, config.tokenizer and "
            "config.unfreeze_clip of that run"
        )
