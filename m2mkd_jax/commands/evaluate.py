"""`m2mkd evaluate RUN`: accuracy of a trained run on its own test set or any other."""

import argparse
import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from common_jax.command_line import Command, read_settings
from common_jax.commands.arguments import add_run, count, natural
from common_jax.commands.output import format_table

# Settings that name other images than those of the run.
ELSEWHERE = {"data.source", "data.name", "data.path", "data.test_split"}

if TYPE_CHECKING:
    from m2mkd_jax.data.ood import MatchedSet
    from m2mkd_jax.data.source import Source
    from m2mkd_jax.data.sources import DataConfig
    from m2mkd_jax.trained import Trained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_run(parser)
    parser.add_argument("--module", type=natural, metavar="K", help="which of several modules")
    parser.add_argument("--batch", type=count, metavar="N", help="images at a time")
    parser.add_argument(
        "--worst",
        type=count,
        default=10,
        metavar="N",
        help="classes and pairs to show (default 10)",
    )
    parser.add_argument("--json", action="store_true", help="all numbers, as one JSON object")
    parser.epilog = (
        "The images are those of the run's config.data and, if it has one, config.ood. Fields\n"
        "of these (but not labels and channels), config.mesh, config.evaluation, config.sources\n"
        "and config.precision can be changed:\n"
        "  --data.source=folder --data.path=/data/mine --data.test_split=val\n"
        "  --ood.source=folder --ood.path=/data/sketches --ood.split=test"
    )


@dataclasses.dataclass(frozen=True)
class Scores:
    """The result on one set of images.

    Attributes:
      name: "test" or "ood".
      place: source, path and split.
      means: mean of each metric over all images.
      images, correct: number of images, and of correct predictions, by class.
      confused: (class, predicted class) -> number of images.
    """

    name: str
    place: str
    means: Mapping[str, float]
    images: Mapping[str, int]
    correct: Mapping[str, int]
    confused: Mapping[tuple[str, str], int]


def run(args: argparse.Namespace) -> None:
    """Prints the scores on every set."""
    found = evaluate(args)
    if args.json:
        print(json.dumps({scores.name: as_json(scores) for scores in found}, indent=2))
    else:
        print("\n\n".join(as_text(scores, args.worst) for scores in found))


def as_json(scores: Scores) -> dict[str, Any]:
    """The scores as a JSON object."""
    classes = {
        name: {"images": count, "accuracy": scores.correct.get(name, 0) / count}
        for name, count in scores.images.items()
    }
    confused = [
        {"class": own, "taken_for": other, "images": count}
        for (own, other), count in rank(scores.confused)
    ]
    place = {"set": scores.place, "images": sum(scores.images.values())}
    return place | scores.means | {"classes": classes, "confused": confused}


def as_text(scores: Scores, worst: int) -> str:
    """The scores as tables, with the `worst` classes and pairs."""
    from m2mkd_jax.evaluators import percent, show

    means = ", ".join(
        f"{name.replace('_', ' ')} {show(name, value)}" for name, value in scores.means.items()
    )
    rows = sorted(
        (scores.correct.get(name, 0) / count, name, count) for name, count in scores.images.items()
    )
    shown = [(name, count, percent(share)) for share, name, count in rows[:worst]]
    pairs = [
        (own, other, count, percent(count / scores.images[own]))
        for (own, other), count in rank(scores.confused)[:worst]
    ]
    parts = [
        f"{scores.name}: {sum(scores.images.values())} images of {len(rows)} classes, "
        f"{scores.place}\n{means}",
        format_table(("class", "images", "accuracy"), shown)
        + (f"\nand {len(rows) - worst} more" * (len(rows) > worst)),
    ]
    if pairs:
        parts.append(format_table(("class", "taken for", "images", "of its class"), pairs))
    return "\n\n".join(parts)


def rank(confused: Mapping[tuple[str, str], int]) -> list[tuple[tuple[str, str], int]]:
    """The pairs, most frequent first."""
    return sorted(confused.items(), key=lambda item: (-item[1], item[0]))


def evaluate(args: argparse.Namespace) -> list[Scores]:
    """The scores on the test set, and on the OOD set if config.ood names one."""
    from common_jax import app
    from common_jax.mesh import check_batch
    from m2mkd_jax.data.ood import load_ood
    from m2mkd_jax.trained import choose_network, open_run

    settings = read_settings(args.rest)
    if settings.keys() >= {"data.path", "data.test_split"}:
        # Score the whole named split, even if the run drew its test images with a test_share.
        settings = {"data.test_share": "0"} | settings
    trained = open_run(args.run, settings)
    config = trained.config
    app.use_compilation_cache(config.run.compilation_cache)
    name = choose_network(trained, args.module)
    # The batch size of the run's own evaluation: where tokens of a batch compete for experts, or
    # where random numbers are drawn, another batch size changes the results.
    batch = args.batch or config.optim.micro_batch
    if args.batch:
        check_batch(trained.mesh, "--batch", batch)
    elif batch % (devices := trained.mesh.size):
        raise ValueError(
            f"the run scored {batch} images at a time, which do not divide over the mesh's "
            f"{devices} devices: give --batch={-(-batch // devices) * devices}, or fewer devices "
            "with --config.mesh.data. In networks whose tokens compete for experts, another batch "
            "changes the scores slightly"
        )
    sets = {"test": load_test_images(trained, own=not settings.keys() & ELSEWHERE)}
    if config.ood.source:
        sets["ood"] = load_ood(config.data, config.ood, label_names=trained.classes)
    found = []
    for title, images in sets.items():
        pairs, means = predict(trained, name, images, batch)
        counts = tally(pairs, [trained.classes[label] for label in images.classes])
        found.append(Scores(title, config_place(images.data), means, *counts))
    return found


def load_test_images(trained: "Trained", *, own: bool) -> "MatchedSet":
    """The test images, with labels of the run's classes.

    The network of a few-shot episode knows only some classes. If `own`, its test images are those
    that the episode drew; else all of its classes in the test split.
    """
    from m2mkd_jax.data.ood import MatchedSet
    from m2mkd_jax.data.sources import load_test_source, open_source
    from m2mkd_jax.phases import PHASES

    config, data = trained.config, trained.config.data
    every = tuple(range(len(trained.classes)))
    draw = PHASES[config.phase].draw
    if draw is None:
        return MatchedSet(load_test_source(data, trained.classes), data, every)
    if not own:
        return MatchedSet(_of_classes(trained), data, every)
    train = open_source(data, data.train_split)
    _, test = draw(config, (train, load_test_source(data, train.label_names)))
    if test.label_names != trained.classes:
        raise ValueError(
            f"config.data.path={data.path!r} no longer has the classes that the episode was drawn "
            f"from: its classes are {', '.join(trained.classes)}, and the same draw now gives "
            f"{', '.join(test.label_names)}; restore the data, or name another set with --data.path"
        )
    if config.few_shot.test_on_train:
        data = dataclasses.replace(data, test_split=data.train_split)
    return MatchedSet(test, data, every)


def _of_classes(trained: "Trained") -> "Source":
    """All images of the run's classes in the test split, which may have others."""
    import numpy as np

    from m2mkd_jax.data.sources import open_source
    from m2mkd_jax.data.subsets import Subset

    data = trained.config.data
    source = open_source(data, data.test_split)
    place = {name: label for label, name in enumerate(trained.classes)}
    own = np.array([place.get(name, -1) for name in source.label_names], np.int32)
    labels = own[np.asarray(source.labels)]
    chosen = np.flatnonzero(labels >= 0)
    if not len(chosen):
        raise ValueError(
            f"config.data.path={data.path!r} has no images of the episode's classes, "
            f"{', '.join(trained.classes)}"
        )
    return Subset(source, chosen, labels[chosen], trained.classes)


def predict(
    trained: "Trained", network: str, images: "MatchedSet", batch: int
) -> tuple[collections.Counter[tuple[int, int]], dict[str, float]]:
    """The network's answers on a set: (label, predicted label) -> number of images, and the mean of
    each metric.

    Args:
      trained: the run.
      network: key of its network.
      images: the set; of the network's classes, only those that the set has can be predicted.
      batch: images at a time.
    """
    from jax import numpy as jnp

    from common_jax.inputs import eval_batches
    from m2mkd_jax.data.transforms import eval_transform
    from m2mkd_jax.evaluators import EVALUATORS
    from m2mkd_jax.evaluators.classification import restrict_logits
    from m2mkd_jax.phases import PHASES
    from m2mkd_jax.trained import run_batches

    evaluators = [EVALUATORS[one] for one in PHASES[trained.config.phase].evaluators]

    def finish(logits, batch):
        logits = restrict_logits(logits, images.classes)
        totals = {}
        for evaluator in evaluators:
            totals |= evaluator.totals(logits, batch["label"], batch["_mask"])
        return totals, jnp.argmax(logits, axis=-1)

    source, data = images.source, images.data
    batches = eval_batches(
        source,
        transform=eval_transform(data, arrays=source.arrays),
        batch=batch,
        workers=data.workers,
        bad_share=data.bad_share,
    )
    pairs, sums = collections.Counter(), collections.Counter()
    for examples, found in run_batches(trained, batches, finish):
        totals, predicted = found[network]
        sums.update({metric: float(total) for metric, total in totals.items()})
        real = examples["_mask"] > 0  # the last batch is padded
        pairs.update(zip(examples["label"][real].tolist(), predicted[real].tolist(), strict=True))
    return pairs, {metric: total / pairs.total() for metric, total in sums.items()}


def tally(
    pairs: Mapping[tuple[int, int], int], names: Sequence[str]
) -> tuple[dict[str, int], dict[str, int], dict[tuple[str, str], int]]:
    """The `images`, `correct` and `confused` of `Scores`, from the number of images by label and
    predicted label; `names` are the classes by label."""
    images, correct, confused = collections.Counter(), {}, {}
    for (label, other), number in pairs.items():
        images[names[label]] += number
        if label == other:
            correct[names[label]] = number
        else:
            confused[names[label], names[other]] = number
    return dict(sorted(images.items())), correct, confused


def config_place(data: "DataConfig") -> str:
    """Source, path and split of test images."""
    path = f" {data.path}" if data.path else ""
    return f"{data.source}{path}, split {data.test_split}"


COMMAND = Command(
    "accuracy on the run's test set or any other, by class, and confused pairs",
    add_arguments,
    run,
    ("--config.", "--data.", "--ood."),
)
