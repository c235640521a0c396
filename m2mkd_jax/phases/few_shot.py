"""Phase few_shot (FS): trains a new head for a few classes on a few images of each, in one or more
episodes."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from scipy import special

from common_jax.report import Table
from common_jax.step import Programs
from common_jax.weights import Allowance, Origin, Planned, WarmStart
from common_jax.workdir import claim, read_json, refuse_other_config, write_json
from m2mkd_jax.config import Config
from m2mkd_jax.data.feed import Feed, make_feed
from m2mkd_jax.data.few_shot import Episode, choose_task
from m2mkd_jax.data.source import Source
from m2mkd_jax.data.sources import load_source, load_test_source
from m2mkd_jax.data.subsets import Subset
from m2mkd_jax.evaluators import show
from m2mkd_jax.families import family_of
from m2mkd_jax.phases.phase import Phase, Splits, Training, WeightSource
from m2mkd_jax.phases.sources.weights import refuse_fresh, require_source, take_weights
from m2mkd_jax.phases.training import check_training, train_phase, whole_training

CONFIDENCE = 0.95
INTERVAL = "_ci95"  # suffix of a metric's half-width of the confidence interval


def run(
    config: Config, workdir: epath.Path, mesh: Mesh, splits: Splits | None = None
) -> dict[str, Any]:
    """Trains only the head on an episode and saves the whole network under "student".

    The episode's classes are renumbered, so the head has config.few_shot.ways labels. Training
    images come from the training split and test images from the test split. config.ood is ignored,
    since its classes are not those of an episode.

    If config.few_shot.episodes is above 1, each episode is a run in `workdir`/episode_K, which can
    be resumed and is skipped once finished; only the first one compiles. The result is then that of
    `summary`.
    """
    few_shot, splits = config.few_shot, splits or load_splits(config)
    train = _trainer(config, mesh, splits)
    if few_shot.episodes == 1:
        return train(few_shot.seed, workdir)
    workdir = epath.Path(workdir)
    training = describe(config, mesh)
    # Images of all episodes and the weights are checked before the first one trains, or anything is
    # written.
    check_training(training, first_feed(training, workdir, splits), mesh)
    _fit(training, planned={})
    refuse_other_config(workdir, config)
    claim(workdir, config)
    results = [
        train(few_shot.seed + number, workdir / f"episode_{number}")
        for number in range(few_shot.episodes)
    ]
    result = summary(results)
    if jax.process_index() == 0:
        write_json(workdir / "result.json", result)
    return result


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Combines the results of two or more episodes: the mean of every metric and, as METRIC_ci95,
    the half-width of its 95 % confidence interval, t s / sqrt(n).

    s is the sample standard deviation over n episodes (divisor n - 1), t the quantile of Student's
    t distribution with n - 1 degrees of freedom. `steps` is the number of one episode, `skipped`
    the sum over all of them.
    """
    count = len(results)
    quantile = special.stdtrit(count - 1, 0.5 + CONFIDENCE / 2)
    merged = {
        "phase": results[0]["phase"],
        "steps": results[0]["steps"],
        "skipped": sum(result["skipped"] for result in results),
        "episodes": count,
    }
    for name in results[0]:
        if name.startswith("test/"):
            values = [result[name] for result in results]
            merged[name] = float(np.mean(values))
            merged[name + INTERVAL] = float(quantile * np.std(values, ddof=1) / math.sqrt(count))
    return merged


def episodes_table(workdir: epath.Path) -> Table | None:
    """The episodes of a finished run and their mean; None for a single episode."""
    path = epath.Path(workdir) / "result.json"
    result = read_json(path) if path.exists() else {}
    if "episodes" not in result:
        return None
    means = [f"test/{name}{end}" for name in ("accuracy", "loss") for end in ("", INTERVAL)]
    result = read_json(path, {"episodes": int} | dict.fromkeys(means, int | float))
    rows = []
    for number in range(result["episodes"]):
        folder = path.parent / f"episode_{number}"
        one = read_json(
            folder / "result.json", {"test/accuracy": int | float, "test/loss": int | float}
        )
        section = read_json(folder / "config.json", {"few_shot": dict})["few_shot"]
        seed = section.get("seed", "")
        accuracy, loss = (show(name, one[f"test/{name}"]) for name in ("accuracy", "loss"))
        rows.append((str(number), str(seed), accuracy, loss))
    accuracy, loss = (
        (result[f"test/{name}"], result[f"test/{name}{INTERVAL}"]) for name in ("accuracy", "loss")
    )
    rows.append(
        (
            "mean, 95 % interval",
            "",
            f"{100 * accuracy[0]:.1f} ± {100 * accuracy[1]:.1f} %",
            f"{loss[0]:.3f} ± {loss[1]:.3f}",
        )
    )
    header = ("episode", "seed", "test accuracy", "test loss")
    return Table("Few-shot episodes", header, tuple(rows))


def describe(config: Config, mesh: Mesh) -> Training:
    """The whole student, training only its head of config.few_shot.ways labels; the same for every
    mesh and episode."""
    data = dataclasses.replace(config.data, labels=config.few_shot.ways)
    episode = dataclasses.replace(config, data=data)
    return dataclasses.replace(
        whole_training(PHASE, episode), trainable=family_of(episode.model).head(episode.model)
    )


def first_feed(training: Training, workdir: epath.Path, splits: Splits) -> Feed:
    """The feed of the first episode; raises ValueError if any episode would lack images."""
    few_shot = training.config.few_shot
    # In reverse, so that the last feed made is that of the first episode.
    for number in reversed(range(few_shot.episodes)):
        episode = _episode(training.config, few_shot.seed + number)
        feed = episode_feed(episode, splits, workdir=epath.Path())  # writes nothing
    return feed


def _episode(config: Config, seed: int) -> Config:
    # As if this episode were run alone, so that the config in its folder repeats it.
    few_shot = dataclasses.replace(config.few_shot, seed=seed, episodes=1)
    return dataclasses.replace(config, few_shot=few_shot)


def _trainer(
    config: Config, mesh: Mesh, splits: Splits
) -> Callable[[int, epath.Path], dict[str, Any]]:
    """train(seed, workdir) -> result of an episode; all episodes share data, network and compiled
    programs."""
    require_source(config, "network")
    training, programs = describe(config, mesh), Programs()

    def train(seed: int, workdir: epath.Path) -> dict[str, Any]:
        episode = _episode(training.config, seed)
        return train_phase(
            # Episodes differ in data and seed only, so the compiled programs fit all of them.
            dataclasses.replace(training, config=episode),
            workdir,
            mesh,
            warm_start=functools.partial(_take_network, episode, training),
            feed=episode_feed(episode, splits, workdir=workdir),
            programs=programs,
        )

    return train


def _take_network(
    config: Config,
    training: Training,
    shapes: Mapping[str, Any],
    *,
    planned: Planned | None = None,
) -> WarmStart:
    """Initial parameters of an episode: config.sources.network with a new head; with `planned`,
    only checks that they fit."""
    refuse_fresh(config, shapes, trained=training.trainable)
    origin = Origin(require_source(config, "network"), "student", "student")
    reason = f"a head of config.few_shot.ways={config.few_shot.ways} labels"
    # What is trained is also what starts from scratch.
    fresh = (Allowance(training.trainable, reason),)
    # All that is loaded stays as it is.
    return take_weights(config, shapes, [origin], fresh=fresh, average=True, planned=planned)


def _fit(training: Training, planned: Planned) -> None:
    _take_network(training.config, training, training.shapes, planned=planned)


def load_splits(config: Config) -> Splits:
    """The training and test splits with all classes, labelled alike."""
    train = load_source(config.data, config.data.train_split)
    return train, load_test_source(config.data, train.label_names)


def draw_images(config: Config, splits: Splits) -> tuple[Source, Source]:
    """The training and test images of the episode with config.few_shot.seed; raises ValueError if
    there are too few."""
    few_shot, (train, test) = config.few_shot, splits
    chosen, held_out = choose_task(
        np.asarray(train.labels),
        np.asarray(test.labels),
        ways=few_shot.ways,
        shots=few_shot.shots,
        validation_shots=few_shot.test_shots,
        seed=few_shot.seed,
        labels_count=len(train.label_names),
        validate_on_train=few_shot.test_on_train,
        names=train.label_names,
    )
    return _subset(train, chosen), _subset(train if few_shot.test_on_train else test, held_out)


def episode_feed(episode: Config, splits: Splits, *, workdir: epath.Path) -> Feed:
    """The feed of one episode drawn from `splits`; its data has config.few_shot.ways labels."""
    train, test = draw_images(episode, splits)
    return make_feed(
        episode.data,
        episode.augment,
        batch=episode.optim.batch,
        micro_batch=episode.optim.micro_batch,
        seed=episode.seed,
        workdir=workdir,
        train=train,
        test=test,
    )


def _subset(source: Source, episode: Episode) -> Subset:
    names = tuple(source.label_names[label] for label in sorted(episode.classes))
    return Subset(source, episode.indices, episode.labels, names)


PHASE = Phase(
    describe=describe,
    run=run,
    role="student",
    # A student's stitches are as wide as the meta model.
    reads=("meta.width", "model", "few_shot"),
    differentiates=("model",),
    sources=(WeightSource("network"),),
    feed=first_feed,
    fit=_fit,
    draw=draw_images,
    table=episodes_table,
    folder="few_shot",
    optional=True,
)
