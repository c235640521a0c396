"""Reports the contents of a config's data and every problem that would prevent a run from starting.

    python tools/check_data.py --config=configs/m2mkd/vmoe_base.py --config.data.path=/data/imagenet
    python tools/check_data.py --config=configs/cliptrans/multi30k.py:target=fr \\
        --config.data.path=/data/multi30k --all

Accepts the config and flags of a run of either package, and uses no device. For image sets it
counts classes and their images, reads a sample and reports its sizes and unreadable files, and does
the same for the OOD set. For sentences it counts lines and empty lines by language and split, and
pictures, missing and unreadable ones. All problems are listed, not only the first. For a user's
own folder or table it ends with the flags that train on it, whatever the flags given were:

    python tools/check_data.py --config=configs/m2mkd/cifar10_vmoe.py --config.data.path=/data/birds

  --sample=N  read N pictures per split, evenly spaced (default 500)
  --all       read every picture

Exits with 0 if the data lets a run start, otherwise with 1. Does not check weights or tokenizers.
"""

import collections
import contextlib
import dataclasses
import logging
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_collections
import numpy as np
from etils import epath

from cliptrans_jax import config as cliptrans
from cliptrans_jax.config import SIDES
from cliptrans_jax.data import own
from cliptrans_jax.data.corpora import load_corpus
from cliptrans_jax.data.corpus import Corpus, FolderImages
from cliptrans_jax.runs import pipeline as cliptrans_pipeline
from cliptrans_jax.runs.run_data import used_languages
from cliptrans_jax.stages import SCORED_AS, TRANSLATION_STAGES, Side, Trains, trains
from common_jax import app
from common_jax.config import freeze
from common_jax.inputs import BadExample
from m2mkd_jax import config as m2mkd
from m2mkd_jax.data import discover
from m2mkd_jax.data.augment import SMALL_SIDE
from m2mkd_jax.data.listing import listed
from m2mkd_jax.data.ood import load_ood
from m2mkd_jax.data.sources import DataConfig, Source, load_source, open_source
from m2mkd_jax.data.subsets import with_labels_of
from m2mkd_jax.phases import PHASES
from m2mkd_jax.phases import pipeline as m2mkd_pipeline

USER_ERRORS = (*app.USER_ERRORS, ImportError)
SAMPLE = 500
NOWHERE = epath.Path("check_data")  # a workdir that is never written


@dataclasses.dataclass
class Findings:
    """The results so far, printed as they arrive.

    Attributes:
      sample: number of pictures to read per split; None for all.
      problems: those that prevent a run from starting.
    """

    sample: int | None
    problems: list[str] = dataclasses.field(default_factory=list)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def problem(self, text: str) -> None:
        """Records a problem that prevents a run from starting, once."""
        if text not in self.problems:
            self.problems.append(text)
            self.say(f"  PROBLEM: {text}")

    def attempt(self, load: Callable[..., Any], *args: Any, **settings: Any) -> Any | None:
        """The result of `load`; on an error that the user must fix, records it and returns None."""
        try:
            return load(*args, **settings)
        except USER_ERRORS as error:
            self.problem(str(error))
            return None

    def places(self, size: int) -> Sequence[int]:
        """The indices to read, out of `size` examples."""
        if self.sample is None or self.sample >= size:
            return range(size)
        return np.linspace(0, size - 1, self.sample).round().astype(int).tolist()


def check_m2mkd(config: m2mkd.Config, findings: Findings) -> None:
    """Checks the image sets: training, test and OOD."""
    data = _undecoded(config.data)
    findings.say(f"m2mkd, phase {config.phase}: config.data.source={data.source!r} {data.path}")
    train = _check_images(data, "train_split", load_source, findings)
    test = _check_images(data, "test_split", open_source, findings)
    if train is not None and test is not None:
        findings.attempt(
            with_labels_of, test, train.label_names, at=f"split {data.test_split!r} (test_split)"
        )
    if train is not None and not _draws_images(config):
        runs = [("", config)]
        if config.phase == "pipeline":
            runs = findings.attempt(m2mkd_pipeline.plan, config, NOWHERE) or []
        for name, run in runs:
            if run.optim.batch > len(train) and not _draws_images(run):
                section = f"config.recipes.{run.phase}" if name else "config"
                findings.problem(
                    f"{section}.optim.batch={run.optim.batch} is more than the {len(train)} "
                    f"images of {data.train_split!r}; lower it or take more data"
                )
    if config.ood.source and train is not None:
        _check_ood(config, train, findings)


def _draws_images(config: m2mkd.Config) -> bool:
    return config.phase in PHASES and PHASES[config.phase].draws_images


def _undecoded(data: DataConfig) -> DataConfig:
    """The config without decoding a set that a run would keep in memory, unless it must fit."""
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
        f"  {len(source)} images of {len(names)} classes; a class has {counts.min()} to "
        f"{counts.max()}, median {statistics.median(counts.tolist()):g}\n"
        f"  fewest: {', '.join(f'{name} {count}' for count, name in emptiest)}"
    )


def _check_pixels(source: Source, data: DataConfig, split: str, findings: Findings) -> None:
    """Checks the sizes of a sample and that it can be read."""
    places = findings.places(len(source))
    sizes, bad = _read(lambda i: source[i]["image"].shape[:2], places)
    common = ", ".join(
        f"{rows} x {columns} ({count})" for (rows, columns), count in sizes.most_common(3)
    )
    rest = f" and {len(sizes) - 3} other sizes" if len(sizes) > 3 else ""
    findings.say(f"  sizes of {len(places)} images, rows x columns: {common or 'none'}{rest}")
    _say_bad(bad, places, findings)
    if len(bad) > data.bad_share * len(source):
        findings.problem(
            f"{split}: {len(bad)} of {len(source)} images cannot be read, more than "
            f"config.data.bad_share={data.bad_share:g} allows: {listed(bad)}; repair or remove "
            "them, or raise config.data.bad_share"
        )
    wrong = {size for size in sizes if size != (data.image_size,) * 2}
    if data.image_size <= SMALL_SIDE and wrong:
        rows, columns = min(wrong)
        findings.problem(
            f"{split}: config.data.image_size={data.image_size}, but there are images of {rows} x "
            f"{columns} pixels; up to {SMALL_SIDE} pixels they are not resized: set it to their "
            "size or resize the files"
        )


def _check_ood(config: m2mkd.Config, train: Source, findings: Findings) -> None:
    ood, names = config.ood, tuple(train.label_names)
    findings.say(f"{ood.split} (config.ood.source={ood.source!r} {ood.path})")
    data = _undecoded(config.data)
    found = findings.attempt(load_ood, data, ood, label_names=names)
    if found is None:
        return
    _describe_classes(found.source, findings)
    findings.say(f"  tested among {len(found.classes)} of the {len(names)} classes of training")
    _check_pixels(found.source, found.data, f"config.ood.split={ood.split!r}", findings)


@dataclasses.dataclass
class Need:
    """The parts of a split that the stages of a run read.

    Attributes:
      languages: of sentences.
      filled: the languages in which there must be sentences.
      pictures: whether any stage reads pictures.
      strict: whether any of these stages needs every picture.
      batch: the largest number of training examples per step.
    """

    languages: set[str] = dataclasses.field(default_factory=set)
    filled: set[str] = dataclasses.field(default_factory=set)
    pictures: bool = False
    strict: bool = False
    batch: int = 0


def needs_of(runs: Iterable[cliptrans.Config]) -> dict[str, Need]:
    """Maps the key of config.data that names a split to the parts that the runs read."""
    needs: dict[str, Need] = collections.defaultdict(Need)
    for run in runs:
        pair, data_keys = set(run.data.pair), ("train_split", "valid_split", "test_split")
        if run.tokenizer.kind == "trained":
            needs["train_split"].languages |= set(run.known_languages)
        if trains(run.stage) is Trains.TOWERS:
            for key in data_keys[:2]:
                needs[key].languages |= set(run.known_languages)
                needs[key].filled |= set(run.known_languages)
                needs[key].pictures = True
            needs["train_split"].batch = max(needs["train_split"].batch, run.optim.batch)
            continue
        trained = run.stage in TRANSLATION_STAGES
        stage = TRANSLATION_STAGES[run.stage if trained else SCORED_AS]
        test_side = SIDES[run.test_side] or stage.test
        for key in data_keys if trained else data_keys[2:]:
            side = stage.train if key == "train_split" else test_side
            needs[key].languages |= pair
            needs[key].filled |= set(used_languages(run) if trained else pair)
            if run.has_prefix and side is Side.IMAGE:
                needs[key].pictures = needs[key].strict = True
        if trained:
            batch = run.optim.batch // (2 if run.all_languages else 1)
            needs["train_split"].batch = max(needs["train_split"].batch, batch)
    return needs


def check_cliptrans(config: cliptrans.Config, findings: Findings) -> None:
    """Checks the sentences and pictures of every split that the run reads."""
    data = config.data
    findings.say(f"cliptrans, stage {config.stage}: config.data.source={data.source!r} {data.path}")
    runs = [config.apply_parity()]
    if config.stage == "pipeline":
        planned = findings.attempt(cliptrans_pipeline.plan, config, NOWHERE) or []
        runs = [run.apply_parity() for _, run in planned]
    for key, need in needs_of(runs).items():
        _check_split(config, key, need, findings)


def _check_split(config: cliptrans.Config, key: str, need: Need, findings: Findings) -> None:
    data, split = config.data, getattr(config.data, key)
    findings.say(f"{split} (config.data.{key})")
    readable = []
    for language in sorted(need.languages):
        corpus = findings.attempt(load_corpus, data, split, (language,))
        if corpus is not None:
            readable.append(language)
            empty = corpus.empty[language]
            findings.say(f"  {language}: {len(corpus)} lines, {empty} of them empty")
            if empty == len(corpus) and (len(corpus) == 0 or language in need.filled):
                findings.problem(f"{corpus.name} has no sentence in {language!r}")
    if not readable:
        return
    # Problems of single files are recorded by now, but the files may still differ in length.
    corpus = findings.attempt(load_corpus, data, split, readable, with_images=need.pictures)
    if corpus is None:
        return
    if 0 < len(corpus) < need.batch:
        findings.problem(
            f"a batch of {need.batch} is more than the {len(corpus)} examples of {corpus.name}; "
            "lower config.optim.batch, or that of the stage's recipe"
        )
    if need.pictures:
        _check_pictures(corpus, need, data.bad_share, findings)


def _check_pictures(corpus: Corpus, need: Need, bad_share: float, findings: Findings) -> None:
    if findings.attempt(corpus.require_images) is None:
        return
    images, missing = corpus.images, []
    if isinstance(images, FolderImages):
        missing = [i for i in range(len(images)) if not os.path.exists(images.name(i))]
    places = [i for i in findings.places(len(images)) if i not in set(missing)]
    sizes, bad = _read(lambda i: images[i].shape[:2], places)
    shown = ", ".join(f"{rows} x {columns} ({n})" for (rows, columns), n in sizes.most_common(3))
    findings.say(
        f"  {len(images)} pictures, {len(missing)} of them missing"
        + (f": {listed(images.name(i) for i in missing)}" if missing else "")
        + f"\n  sizes of {len(places)} pictures, rows x columns: {shown or 'none'}"
    )
    _say_bad(bad, places, findings)
    lost = len(missing) + len(bad)
    if lost > (0 if need.strict else bad_share * len(images)):
        first = listed([images.name(i) for i in missing] + list(bad))
        advice = (
            "every example needs its picture: add or repair them"
            if need.strict
            else f"more than config.data.bad_share={bad_share:g}: add or repair them, or raise it"
        )
        findings.problem(f"{corpus.name} lacks {lost} of {len(images)} pictures: {first}; {advice}")


def _read(
    measure: Callable[[int], tuple[int, int]], places: Sequence[int]
) -> tuple[collections.Counter, dict[str, str]]:
    """Counts of the sizes of the readable examples, and the reason for each unreadable one."""

    def read(index: int) -> tuple[int, int] | BadExample:
        try:
            return measure(index)
        except BadExample as bad:
            return bad

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(read, places))
    bad = {one.name: one.reason for one in found if isinstance(one, BadExample)}
    return collections.Counter(one for one in found if not isinstance(one, BadExample)), bad


def _say_bad(bad: Mapping[str, str], places: Sequence[int], findings: Findings) -> None:
    findings.say(f"  unreadable: {len(bad)} of {len(places)}")
    for name, reason in list(bad.items())[:10]:
        findings.say(f"    {name}: {reason}")


def flags_for(config: ml_collections.ConfigDict, settings: Mapping[str, Any]) -> str:
    """Returns fields of config.data as flags of a command line."""
    values = {f"data.{key}": value for key, value in settings.items()}
    if config.get("languages"):  # of other data
        values["languages"] = settings["source_language"], settings["target_language"]
    # Tuples in double quotes, since a shell's quotes around them are single ones.
    texts = {key: str(value).replace("'", '"') for key, value in values.items()}
    texts |= {key: value for key, value in values.items() if isinstance(value, str)}
    return " \\\n  ".join(f"--config.{key}={shlex.quote(text)}" for key, text in texts.items())


def check(config: ml_collections.ConfigDict, sample: int | None) -> int:
    """Prints the findings; returns 0 if a run could start, otherwise 1."""
    logging.getLogger().setLevel(logging.WARNING)
    findings = Findings(sample)
    if "stage" in config:
        package, look, settings_of = cliptrans, check_cliptrans, own.settings_of
    else:
        package, look, settings_of = m2mkd, check_m2mkd, discover.settings_of
    frozen = findings.attempt(freeze, package.Config, config)
    if frozen is not None:
        look(frozen, findings)
    path = config.data.path
    with contextlib.suppress(*USER_ERRORS):  # which are among the problems
        if path and (settings := settings_of(path, config.data)):
            findings.say(f"flags that train on {path}:\n  {flags_for(config, settings)}")
    count = len(findings.problems)
    if not count:
        findings.say("a run could start: no problem found")
        return 0
    findings.say(
        f"{count} problem{'s' if count > 1 else ''} that keep{'s' * (count == 1)} a run "
        "from starting:"
    )
    for number, text in enumerate(findings.problems, start=1):
        findings.say(f"  {number}. {text}")
    return 1


def main(argv: Sequence[str]) -> None:
    """The command; exits with 0, 1, or 2 for a bad command line."""
    sample: int | None = SAMPLE
    rest = [argv[0], f"--workdir={NOWHERE}"]
    for arg in argv[1:]:
        if arg == "--all":
            sample = None
        elif arg.startswith("--sample="):
            text = arg.removeprefix("--sample=")
            if not text.isdigit() or int(text) < 1:
                print(
                    f"error: --sample={text} must be a number from 1; or give --all",
                    file=sys.stderr,
                )
                sys.exit(2)
            sample = int(text)
        else:
            rest.append(arg)
    app.run(lambda config, _: sys.exit(check(config, sample)), __doc__, rest)


if __name__ == "__main__":
    main(sys.argv)
