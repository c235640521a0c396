"""Choosing the classes and examples of a few-shot task, exactly as the originals' seeds choose
them."""

import dataclasses
import random

import numpy as np


@dataclasses.dataclass(frozen=True)
class Episode:
    """One side (training or validation) of a few-shot task.

    Attributes:
      classes: the chosen classes, in the order they were drawn.
      indices: [ways * shots] places in the labels that were given, shuffled.
      labels: [ways * shots] int32: the rank of each example's class among the chosen, in [0, ways).
    """

    classes: tuple[int, ...]
    indices: np.ndarray
    labels: np.ndarray


def choose_episode(
    labels: np.ndarray,
    *,
    ways: int,
    shots: int,
    seed: int,
    labels_count: int,
    eligible: np.ndarray | None = None,
) -> Episode:
    """`shots` examples of each of `ways` classes out of `labels_count`.

    The classes come from the standard library's generator, the examples from numpy's legacy one,
    both seeded with `seed`: for each class in drawn order a permutation of its places, of which the
    first `shots` are kept; then a permutation of all. So two calls with one seed choose the same
    classes, whatever the shots. (CifarFS and Cub2011 of the original's timm/data; there seed 0 is
    no seed at all, here it is one like any other.)

    Args:
      labels: [n] class of each example, from 0.
      eligible: [n] bool, the rows that may be chosen (an official split); None: all.

    Raises:
      ValueError: more ways than classes, or a chosen class with fewer than `shots` examples.
    """
    if not 0 < ways <= labels_count:
        raise ValueError(
            f"config.few_shot.ways={ways} must be from 1 to the number of classes, {labels_count}"
        )
    classes = random.Random(seed).sample(range(labels_count), ways)
    allowed = np.ones(len(labels), bool) if eligible is None else np.asarray(eligible, bool)
    draw = np.random.RandomState(seed)
    chosen = []
    for name in classes:
        places = np.flatnonzero((labels == name) & allowed)
        if len(places) < shots:
            raise ValueError(
                f"class {name} has {len(places)} examples, but {shots} are asked for; lower "
                "config.few_shot.shots or config.few_shot.test_shots"
            )
        chosen.append(draw.permutation(places)[:shots])
    indices = draw.permutation(np.concatenate(chosen))
    ranks = np.searchsorted(np.sort(classes), labels[indices])
    return Episode(tuple(classes), indices, ranks.astype(np.int32))


def choose_task(
    train_labels: np.ndarray,
    test_labels: np.ndarray,
    *,
    ways: int,
    shots: int,
    validation_shots: int,
    seed: int,
    labels_count: int,
    validate_on_train: bool = False,
) -> tuple[Episode, Episode]:
    """Training and validation episodes of the same classes.

    The validation examples come from the test split. `validate_on_train` takes them from the
    training split, as the original does for CIFAR-100: being seeded alike, they then contain every
    training example. Only for comparing with its published numbers.
    """
    train = choose_episode(
        train_labels, ways=ways, shots=shots, seed=seed, labels_count=labels_count
    )
    validation = choose_episode(
        train_labels if validate_on_train else test_labels,
        ways=ways,
        shots=validation_shots,
        seed=seed,
        labels_count=labels_count,
    )
    return train, validation
