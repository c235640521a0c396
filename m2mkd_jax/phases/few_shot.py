"""Phase few_shot (FS): a new head for a handful of classes, trained on a handful of images of
each."""

import dataclasses
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh

from common_jax.weights import Allowance, Origin
from m2mkd_jax.config import Config
from m2mkd_jax.data.feed import Feed, make_feed
from m2mkd_jax.data.few_shot import Episode, choose_task
from m2mkd_jax.data.sources import Source, Subset, load_source
from m2mkd_jax.phases.families import family, whole_student
from m2mkd_jax.phases.networks import require_source, take_weights
from m2mkd_jax.phases.objective import whole_forward
from m2mkd_jax.phases.training import train_phase


def run(config: Config, workdir: epath.Path, mesh: Mesh) -> dict[str, Any]:
    """Trains the head alone on an episode; the whole network is saved under "student".

    The episode's classes are renumbered, so the head has config.few_shot.ways labels. Training
    images come from the training split and test images from the test split. There is no OOD
    evaluation, whatever config.ood says: its set has other classes than an episode.
    """
    ways = config.few_shot.ways
    episode = dataclasses.replace(config, data=dataclasses.replace(config.data, labels=ways))
    kind = family(episode)
    network = whole_student(episode, drop_path=config.drop_path)
    origin = Origin(require_source(config, "network"), "student", "student")
    fresh = (Allowance(kind.head, f"a head of config.few_shot.ways={ways} labels"),)

    return train_phase(
        episode,
        workdir,
        mesh,
        title=config.phase,
        init=lambda key: {"student": network.init(key)},
        rules=kind.rules,
        forward=whole_forward(network, "student"),
        trainable=kind.head,
        warm_start=lambda wanted: take_weights(episode, wanted, [origin], fresh=fresh),
        feed=_episode_feed(config, episode, workdir),
    )


def _episode_feed(config: Config, episode: Config, workdir: epath.Path) -> Feed:
    data, few_shot = config.data, config.few_shot
    train, test = load_source(data, data.train_split), load_source(data, data.test_split)
    chosen, held_out = choose_task(
        np.asarray(train.labels),
        np.asarray(test.labels),
        ways=few_shot.ways,
        shots=few_shot.shots,
        validation_shots=few_shot.test_shots,
        seed=few_shot.seed,
        labels_count=data.labels,
        validate_on_train=few_shot.test_on_train,
    )
    return make_feed(
        episode.data,
        config.augment,
        batch=config.optim.batch,
        micro_batch=config.optim.micro_batch,
        seed=config.seed,
        workdir=workdir,
        train=_subset(train, chosen),
        test=_subset(train if few_shot.test_on_train else test, held_out),
    )


def _subset(source: Source, episode: Episode) -> Subset:
    names = tuple(source.label_names[label] for label in sorted(episode.classes))
    return Subset(source, episode.indices, episode.labels, names)
