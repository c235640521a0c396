"""Choosing the classes and examples of a few-shot task, as the original does for the same seed."""

import dataclasses
import random
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Episode:
    """One side (training or validation) of a few-shot task.

    Attributes:
      classes: the chosen classes, in the order of the draw.
      indices: [ways * shots] indices into the labels of the split, shuffled.
      labels: [ways * shots] int32: rank of each example's class among the sorted `classes`, in
        [0, ways).
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
    key: str = "shots",
    split: str = "training",
    names: Sequence[str] = (),
) -> Episode:
    """Chooses `shots` examples of each of `ways` classes out of `labels_count`.

    The classes come from the standard library's generator, the examples from numpy's legacy one,
    both seeded with `seed`: for each class, in the order of the draw, the first `shots` of a
    permutation of its examples; then a permutation of all. So two calls with the same seed choose
    the same classes for any number of shots. (CifarFS and Cub2011 of the original's timm/data,
    where seed 0 means no seed; here it is an ordinary seed.)

    Args:
      labels: [n] class of each example, from 0.
      ways: number of classes to choose.
      shots: number of examples per class.
      seed: seed of the draw.
      labels_count: number of classes to choose from.
      eligible: [n] bool, the examples that may be chosen (an official split); None for all.
      key, split: field of config.few_shot that `shots` is, and what is drawn from, for messages.
      names: names of the classes, for messages; () for their numbers.

    Raises:
      ValueError: more ways than classes, or a chosen class with fewer than `shots` examples.
    """
    if not 0 < ways <= labels_count:
        raise ValueError(
            f"config.few_shot.ways={ways} must be from 1 to the number of classes, {labels_count}"
        )
    classes = random.Random(seed).sample(range(labels_count), ways)
    allowed = np.ones(len(labels), bool) if eligible is None else np.asarray(eligible, bool)
    # numpy's legacy generator, whose numbers never change between versions; with it and the draw
    # above, a seed gives the original's choices.
    draw = np.random.RandomState(seed)
    picks = []
    for label in classes:
        places = np.flatnonzero((labels == label) & allowed)
        if len(places) < shots:
            name = names[label] if names else label
            raise ValueError(
                f"config.few_shot.{key}={shots}, but class {name}, which the episode with "
                f"config.few_shot.seed={seed} draws, has {len(places)} images in the {split} "
                f"split; lower config.few_shot.{key}, add images or choose another seed"
            )
        picks.append(draw.permutation(places)[:shots])
    indices = draw.permutation(np.concatenate(picks))
    # Ranks among the sorted classes, as in the original, though they are visited in the order of
    # the draw.
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
    names: Sequence[str] = (),
) -> tuple[Episode, Episode]:
    """Chooses training and validation episodes with the same classes.

    The validation examples come from the test split. `validate_on_train` takes them from the
    training split, as the original does for CIFAR-100: with the same seed they then include every
    training example. This is only for comparison with published numbers. `names` are those of the
    classes, for messages.
    """
    same = {"ways": ways, "seed": seed, "labels_count": labels_count, "names": names}
    train = choose_episode(train_labels, shots=shots, **same)
    validation = choose_episode(
        train_labels if validate_on_train else test_labels,
        shots=validation_shots,
        key="test_shots",
        split="training" if validate_on_train else "test",
        **same,
    )
    return train, validation
