"""Running the training that a phase describes."""

import dataclasses
import functools
import itertools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath
from flax import traverse_util
from jax.sharding import Mesh

from common_jax import checkpoint, loop
from common_jax.inputs.names import printable
from common_jax.step import Programs, make_evaluator
from common_jax.task import Task
from common_jax.weights import WarmStart
from common_jax.workdir import read_json
from m2mkd_jax.config import Config
from m2mkd_jax.data.feed import Feed
from m2mkd_jax.evaluators import EVALUATORS
from m2mkd_jax.phases.networks import SECTIONS, family_of_role, whole_network
from m2mkd_jax.phases.objective import make_sums, whole_forward
from m2mkd_jax.phases.phase import Phase, Training
from m2mkd_jax.stages import module_name

CLASSES = "classes.json"  # a run's class names by label


def find_classes(step: epath.Path) -> epath.Path | None:
    """The file with the classes of the run that this step belongs to; None for converted
    weights."""
    # The file is in the run's workdir, and the step in WORKDIR/checkpoints/STEP.
    paths = (folder / CLASSES for folder in (step, *step.parents[:2]))
    return next((path for path in paths if path.exists()), None)


def whole_training(phase: Phase, config: Config) -> Training:
    """The training of a phase's whole network on labels only, without a teacher."""
    role = phase.role
    network = whole_network(config, role, drop_path=config.drop_path)
    return Training(
        phase,
        config,
        init=lambda key: {role: network.init(key)},
        rules=family_of_role(config, role).rules,
        forward=whole_forward(network, role),
    )


def train_phase(
    training: Training,
    workdir: epath.Path,
    mesh: Mesh,
    *,
    feed: Feed,
    helpers: Mapping[str, Any] | None = None,
    warm_start: Callable[[Any], WarmStart] | None = None,
    files: Mapping[str, Any] | None = None,
    programs: Programs | None = None,
) -> dict[str, Any]:
    """Trains, or resumes; returns the result of `common_jax.loop.train`.

    Args:
      training: the training, from its phase's `describe`.
      workdir: folder of this run; not shared with other runs.
      mesh: device mesh.
      feed: data, such as `config_feed` makes.
      helpers: the frozen parameters that `training.helpers` describes.
      warm_start: see `common_jax.task.Task`.
      files: more JSON files for the workdir, see `common_jax.task.Task`.
      programs: see `common_jax.loop.train`.
    """
    config = training.config
    refuse_other_classes(workdir, feed.label_names)
    if warm_start is not None:
        warm_start = functools.partial(_take, warm_start, training, feed.label_names)
    task = with_feed(training, feed, mesh, programs=programs)
    # Added after `with_feed`, which also serves checks that have no weights.
    task = dataclasses.replace(
        task, helpers=helpers or {}, warm_start=warm_start, files=task.files | (files or {})
    )
    return loop.train(
        task,
        config.run,
        config.optim,
        seed=config.seed,
        workdir=workdir,
        mesh=mesh,
        config=config,
        programs=programs,
    )


def _take(
    warm_start: Callable[[Any], WarmStart], training: Training, names: Sequence[str], shapes: Any
) -> WarmStart:
    """`warm_start(shapes)`; warns of a loaded head whose run was trained on other classes."""
    start, config, role = warm_start(shapes), training.config, training.phase.role
    head = family_of_role(config, role).head(getattr(config, SECTIONS[role]))
    head = head.replace(r"\w+", role, 1)
    paths = [
        path
        for path in traverse_util.flatten_dict(start.params, sep="/")
        if re.fullmatch(head, path)
    ]
    for entry in start.account["taken"]:
        if any(path.startswith(f"{entry['as']}/") for path in paths):
            _warn_of_other_classes(epath.Path(entry["source"]), names, head)
    return start


def _warn_of_other_classes(step: epath.Path, names: Sequence[str], head: str) -> None:
    """Warns if a step's run has other classes than `names`; `head` matches its head's paths."""
    path = find_classes(step)
    before = names if path is None else read_json(path, {"names": list})["names"]
    if other := _first_other(before, names):
        label, old, new = other
        logging.warning(
            "%s was trained with class %d named %r (of %s), and config.data names it %r (of %s): "
            "the head is loaded, and starts with the outputs of the other classes; for a head from "
            "scratch give --config.sources.fresh='%s'",
            *(step, label, old, _listed(before), new, _listed(names), head),
        )


def _first_other(before: Sequence[str], names: Sequence[str]) -> tuple[int, str, str] | None:
    """The first label whose class names differ, with both; None if all are the same."""
    pairs = enumerate(itertools.zip_longest(before, names))
    return next(((label, old, new) for label, (old, new) in pairs if old != new), None)


def _listed(names: Sequence[str]) -> str:
    """The first names by label, and the number of the others."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(printable(str(name))[:40] for name in names[:5]) + more


def refuse_other_classes(workdir: epath.Path, names: Sequence[str]) -> None:
    """Raises ValueError if the run in `workdir` has trained on classes with other names, or in
    another order, than `names`: its labels would mean other classes."""
    path = workdir / CLASSES
    # A run that was stopped before its first checkpoint has learned nothing, and may start anew.
    if not path.exists() or not checkpoint.finished_steps(workdir / checkpoint.FOLDER):
        return
    if other := _first_other(read_json(path, {"names": list})["names"], names):
        label, old, new = other
        raise ValueError(
            f"{path}: this run was trained with class {label} named {old!r}, but config.data now "
            f"names it {new!r}: restore the classes of the data, or start in another workdir"
        )


def with_feed(
    training: Training, feed: Feed, mesh: Mesh, *, programs: Programs | None = None
) -> Task:
    """The task with its data and evaluators, but without initial weights.

    Raises ValueError for a config.run.best that is never measured.
    """
    config, forward, names = training.config, training.forward, training.phase.evaluators
    _check_best(training)
    # With "sampled" noise the step enters the key, so that no two evaluations draw the same.
    evaluate = functools.partial(
        make_evaluator, mesh=mesh, seed=config.seed, fold_step=config.evaluation.noise == "sampled"
    )
    sums = make_sums(forward, config, names)
    evaluators = {"test": evaluate(sums, feed.evaluation, programs=programs)}
    if feed.ood is not None:
        # Without `programs`, since only few-shot episodes share those, and they have no OOD set.
        sums = make_sums(forward, config, names, classes=feed.ood_classes)
        evaluators["ood"] = evaluate(sums, feed.ood)
    return dataclasses.replace(
        training.task(steps_per_epoch=feed.steps_per_epoch),
        batches=feed.batches,
        evaluators=evaluators,
        lower=tuple(metric for name in names for metric in EVALUATORS[name].lower),
        files={CLASSES: {"names": list(feed.label_names)}},
    )


def check_training(
    training: Training, feed: Feed, mesh: Mesh, *, key: str = "config", trace: bool = True
) -> None:
    """Checks a run before anything is written. Raises like `common_jax.loop.check`.

    Args:
      training: the training to check.
      feed: its data.
      mesh: device mesh.
      key: config path of its recipe, for messages.
      trace: whether to trace the networks too, which takes a few seconds.
    """
    config, task = training.config, with_feed(training, feed, mesh)
    check = loop.check if trace else loop.check_settings
    check(task, config.run, config.optim, seed=config.seed, mesh=mesh, key=key)


def _check_best(training: Training) -> None:
    """Raises ValueError if config.run.best names a metric of an evaluator that the phase does not
    run, or a module that the run does not train."""
    config, names = training.config, training.phase.evaluators
    if config.run.best is None:
        return
    _, *module, metric = config.run.best.split("/")  # "test", ["module_1"], "accuracy"
    measured = [one for name in names for one in EVALUATORS[name].shown]
    if metric not in measured:
        raise ValueError(
            f"config.run.best={config.run.best!r} is never measured in phase {config.phase!r}, "
            f"which runs the evaluators {', '.join(names)}: give a metric of theirs, "
            f"{' or '.join(measured)}, or None"
        )
    trained = [module_name(i) for i in config.modules()] if training.phase.modular else []
    if module and (len(trained) < 2 or module[0] not in trained):
        there = f", or of one module ({', '.join(trained)})" if len(trained) > 1 else ""
        raise ValueError(
            f"config.run.best={config.run.best!r} is never measured: give a metric of the whole "
            f"set, such as 'test/accuracy'{there}"
        )
