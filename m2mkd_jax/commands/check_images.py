"""A report on the image sets of a config: training, test and OOD."""

import dataclasses
import statistics
from collections.abc import Callable

import numpy as np

from common_jax.commands.check import NOWHERE, Findings, read_sizes, say_bad, say_unread_rows
from common_jax.inputs import name_of
from m2mkd_jax.config import Config
from m2mkd_jax.data.augment import SMALL_SIDE
from m2mkd_jax.data.files.listing import listed
from m2mkd_jax.data.ood import load_ood
from m2mkd_jax.data.source import Source
from m2mkd_jax.data.sources import DataConfig, load_source, open_source, warn_of_one_split
from m2mkd_jax.data.subsets import with_labels_of
from m2mkd_jax.phases import PHASES
from m2mkd_jax.phases.phase import Splits
from m2mkd_jax.phases.pipeline import plan


def check_m2mkd(config: Config, findings: Findings) -> None:
    """Checks the image sets: training, test and OOD."""
    data = _undecoded(config.data)
    findings.say(f"m2mkd, phase {config.phase}: config.data.source={data.source!r} {data.path}")
    warn_of_one_split(data)
    train = _check_images(data, "train_split", load_source, findings)
    test = _check_images(data, "test_split", open_source, findings)
    if data.source == "table" and not data.test_share:
        named = (data.train_split, data.test_split, config.ood.source and config.ood.split)
        say_unread_rows(data.path, named, findings)
    if train is not None and test is not None:
        test = findings.attempt(
            with_labels_of, test, train.label_names, at=f"split {data.test_split!r} (test_split)"
        )
    if train is not None:
        runs = [("", config)]
        if config.phase == "pipeline":
            runs = findings.attempt(plan, config, NOWHERE) or []
        for name, run in runs:
            count, draw = len(train), PHASES[run.phase].draw
            if draw is not None:
                count = run.few_shot.ways * run.few_shot.shots
                if test is not None:
                    _check_episodes(run, draw, (train, test), findings)
            if run.optim.batch > count:
                section = f"config.recipes.{run.phase}" if name else "config"
                findings.problem(
                    f"{section}.optim.batch={run.optim.batch} is more than the {count} images of "
                    f"{data.train_split!r} that it trains on; lower it or use more data"
                )
    if config.ood.source and train is not None:
        _check_ood(config, train, findings)


def _check_episodes(config: Config, draw: Callable, splits: Splits, findings: Findings) -> None:
    """Draws all episodes up to the first that lacks images; others would repeat its problem."""
    first, count = config.few_shot.seed, config.few_shot.episodes
    for seed in range(first, first + count):
        few_shot = dataclasses.replace(config.few_shot, seed=seed, episodes=1)
        episode = dataclasses.replace(config, few_shot=few_shot)
        if findings.attempt(draw, episode, splits) is None:
            return


def _undecoded(data: DataConfig) -> DataConfig:
    """The config, set not to decode images into memory, unless the run requires that they fit."""
    return data if data.in_memory == "always" else dataclasses.replace(data, in_memory="never")


def _check_images(
    data: DataConfig, key: str, load: Callable[[DataConfig, str], Source], findings: Findings
) -> Source | None:
    split = getattr(data, key)
    findings.say(f"{split} (config.data.{key})")
    source = findings.attempt(load, data, split)
    if source is not None:
        _describe_classes(source, findings)
        _check_pixels(source, data, split, findings)
    return source


def _describe_classes(source: Source, findings: Findings) -> None:
    names = source.label_names
    counts = np.bincount(source.labels, minlength=len(names))
    emptiest = sorted(zip(counts.tolist(), names, strict=True))[:3]
    findings.say(
        f"  {len(source)} images of {len(names)} classes, {counts.min()} to {counts.max()} per "
        f"class, median {statistics.median(counts.tolist()):g}\n"
        f"  fewest: {', '.join(f'{name} {count}' for count, name in emptiest)}"
    )


def _check_pixels(source: Source, data: DataConfig, split: str, findings: Findings) -> None:
    """Checks that a sample of the images can be read, and their sizes."""
    places = findings.places(len(source))
    first: dict[tuple[int, int], int] = {}  # size -> an image that has it

    def measure(index: int) -> tuple[int, int]:
        size = source[index]["image"].shape[:2]
        first.setdefault(size, index)
        return size

    sizes, bad = read_sizes(measure, places)
    common = ", ".join(
        f"{rows} x {columns} ({count})" for (rows, columns), count in sizes.most_common(3)
    )
    rest = f" and {len(sizes) - 3} other sizes" if len(sizes) > 3 else ""
    findings.say(f"  sizes of {len(places)} images, rows x columns: {common or 'none'}{rest}")
    say_bad(bad, places, findings)
    if len(bad) > data.bad_share * len(source):
        findings.problem(
            f"{split}: {len(bad)} of {len(source)} images cannot be read, more than "
            f"config.data.bad_share={data.bad_share:g} allows: {listed(bad)}; repair or remove "
            "them, or raise config.data.bad_share"
        )
    elif len(bad) > data.bad_share * len(places):
        findings.say(
            f"  {len(bad)} of the {len(places)} images read are bad, and a run stops at "
            f"config.data.bad_share={data.bad_share:g} of all {len(source)}: count them with --all"
        )
    wrong = {size for size in sizes if size != (data.image_size,) * 2}
    if data.image_size <= SMALL_SIDE and wrong:
        examples = (f"{size[0]} x {size[1]} ({name_of(source, first[size])})" for size in wrong)
        findings.problem(
            f"{split}: config.data.image_size={data.image_size}, but there are images of other "
            f"sizes: {listed(examples)}; up to {SMALL_SIDE} pixels they are not resized: set "
            f"it to their size or to more than {SMALL_SIDE}, or resize the files"
        )


def _check_ood(config: Config, train: Source, findings: Findings) -> None:
    ood, names = config.ood, tuple(train.label_names)
    findings.say(f"{ood.split} (config.ood.source={ood.source!r} {ood.path})")
    data = _undecoded(config.data)
    found = findings.attempt(load_ood, data, ood, label_names=names)
    if found is None:
        return
    _describe_classes(found.source, findings)
    findings.say(f"  tested among {len(found.classes)} of the {len(names)} classes of training")
    _check_pixels(found.source, found.data, f"config.ood.split={ood.split!r}", findings)
