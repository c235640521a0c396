"""A run's data: training batches from any step on, evaluation passes, and preprocessing of batches
on the device."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Float

from common_jax import hosts, inputs
from m2mkd_jax.data.augment import AugmentConfig, augment, mix, normalise
from m2mkd_jax.data.ood import OodConfig, load_ood
from m2mkd_jax.data.source import Source
from m2mkd_jax.data.sources import DataConfig, load_source, load_test_source
from m2mkd_jax.data.transforms import check_sides, eval_transform, train_transform, with_pictures

Batches = Iterator[dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Feed:
    """The batches of a run.

    Attributes:
      batches: step -> the training batches from that step on, with "image" uint8 (B, I, J, X) and
        "label" int32 (B).
      evaluation: starts a pass over the test set, whose last batch is padded, with "_mask".
      steps_per_epoch: number of whole batches in the training set.
      label_names: name of every class.
      ood: like `evaluation`, for the OOD set; None if there is none.
      ood_classes: for each label of the OOD set, its class in the training set.
    """

    batches: Callable[[int], Batches]
    evaluation: Callable[[], Batches]
    steps_per_epoch: int
    label_names: tuple[str, ...]
    ood: Callable[[], Batches] | None = None
    ood_classes: tuple[int, ...] = ()


def make_feed(
    data: DataConfig,
    augmentation: AugmentConfig,
    *,
    batch: int,
    micro_batch: int,
    seed: int,
    workdir: epath.Path,
    train: Source | None = None,
    test: Source | None = None,
    ood: OodConfig | None = None,
) -> Feed:
    """Makes the feed of `data`, or of sources given in place of its splits.

    Args:
      data, augmentation: config sections.
      batch: training examples per step, over all hosts.
      micro_batch: examples that are on the devices at once, in training and evaluation.
      seed: seed of the order and of the host's transforms.
      workdir: folder of bad_examples.jsonl, which lists images that cannot be read.
      train, test: sources to use in place of the splits.
      ood: config section of the OOD set; None for no OOD set.

    Raises:
      FileNotFoundError, ValueError: if the data is missing or does not fit, see `load_source`,
        `load_test_source` and `load_ood`.
    """
    train = load_source(data, data.train_split) if train is None else train
    test = load_test_source(data, train.label_names) if test is None else test
    # Hosts list the files on their own, and a difference would silently give them different epochs.
    for name, source in (("training", train), ("test", test)):
        _require_same(f"the {name} set of config.data", source)
        check_sides(source, data)
    shared = {
        "workers": data.workers,
        "bad_share": data.bad_share,
        "shard": hosts.shard(),
        "report_path": workdir / "bad_examples.jsonl",
    }
    transform = train_transform(data, augmentation, arrays=train.arrays)
    batches = functools.partial(
        inputs.train_batches,
        with_pictures(train, transform),
        transform=transform,
        seed=seed,
        batch=batch,
        repeats=augmentation.repeats,
        **shared,
    )
    passes = functools.partial(inputs.eval_batches, batch=micro_batch, **shared)
    _require_readable(test, data.bad_share)
    ood_pass, ood_classes = None, ()
    if ood is not None:
        ood_set = load_ood(data, ood, label_names=tuple(train.label_names))
        _require_same("the OOD set of config.ood", ood_set.source)
        check_sides(ood_set.source, ood_set.data)
        _require_readable(ood_set.source, data.bad_share)
        ood_transform = eval_transform(ood_set.data, arrays=ood_set.source.arrays)
        ood_pass = functools.partial(passes, ood_set.source, transform=ood_transform)
        ood_classes = ood_set.classes
    return Feed(
        batches=lambda start: batches(start_step=start),
        evaluation=functools.partial(
            passes, test, transform=eval_transform(data, arrays=test.arrays)
        ),
        steps_per_epoch=inputs.steps_per_epoch(len(train), batch),
        label_names=tuple(train.label_names),
        ood=ood_pass,
        ood_classes=ood_classes,
    )


def batch_shapes(data: DataConfig, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of `batch` training examples, over all hosts."""
    side = data.image_size
    return {
        "image": jax.ShapeDtypeStruct((batch, side, side, data.channels), np.uint8),
        "label": jax.ShapeDtypeStruct((batch,), np.int32),
    }


def prepare_training(
    batch: Mapping[str, jax.Array],
    rngs: Mapping[str, jax.Array],
    data: DataConfig,
    augmentation: AugmentConfig,
) -> tuple[Float[Array, "B I J X"], Float[Array, "B L"]]:
    """Augments, normalises and mixes a training batch; returns its images and soft targets.

    Draws from the streams "augment" and "mix". Without mixing, the targets are smoothed one-hot
    vectors, and cross entropy with them is cross entropy with label smoothing.
    """
    images = augment(
        batch["image"], rngs["augment"], config=augmentation, mean=data.mean, std=data.std
    )
    return mix(images, batch["label"], rngs["mix"], config=augmentation, labels_count=data.labels)


def prepare_evaluation(batch: Mapping[str, jax.Array], data: DataConfig) -> Float[Array, "B I J X"]:
    """Returns the normalised images of an evaluation batch."""
    return normalise(batch["image"], mean=data.mean, std=data.std)


def _require_readable(source: Source, bad_share: float) -> None:
    """Raises ValueError, as a pass over all of `source` would, if too many of its images are known
    to be bad; several hosts count their own."""
    bad = getattr(source, "bad", {})
    if hosts.shard()[1] == 1 and len(bad) > bad_share * len(source):
        counted = inputs.BadExamples(len(source), bad_share, None)
        for index, one in bad.items():
            counted.add(index, one)


def _require_same(what: str, source: Source) -> None:
    """Raises ValueError unless all hosts have the same labels and classes."""
    labels = np.asarray(source.labels, np.int32).tobytes()
    hosts.require_same(what, labels, "\n".join(source.label_names))
