"""Reports on the sentences and pictures that a config reads, split by split."""

import collections
import dataclasses
import os
from collections.abc import Iterable

from cliptrans_jax.config import SIDES, Config
from cliptrans_jax.data.corpora import load_corpus
from cliptrans_jax.data.corpus import Corpus, FolderImages
from cliptrans_jax.runs.idle import seen_in_training
from cliptrans_jax.runs.pipeline import plan
from cliptrans_jax.runs.run_data import pairs_of, used_languages
from cliptrans_jax.stages import SCORED_AS, TRANSLATION_STAGES, Side, Trains, trains
from common_jax.commands.check import NOWHERE, Findings, read_sizes, say_bad, say_unread_rows
from common_jax.inputs.names import listed


@dataclasses.dataclass
class Need:
    """What the stages of a run read from a split: those that read pictures, or those that do not.

    Attributes:
      languages: the languages of the sentences.
      filled: the languages that must not be empty.
      strict: whether any of these stages fails if a picture is missing.
      pairs: the pairs of languages, source and target, of translations.
      batches: by the pairs that a run trains on, () for all lines, the largest number of
        examples per step.
    """

    languages: set[str] = dataclasses.field(default_factory=set)
    filled: set[str] = dataclasses.field(default_factory=set)
    strict: bool = False
    pairs: set[tuple[str, str]] = dataclasses.field(default_factory=set)
    batches: dict[tuple[tuple[str, str], ...], int] = dataclasses.field(default_factory=dict)

    def train(self, pairs: tuple[tuple[str, str], ...], batch: int) -> None:
        """Adds a run that trains on `batch` examples per step."""
        self.batches[pairs] = max(self.batches.get(pairs, 0), batch)


Needs = dict[bool, Need]  # by whether pictures are read, which leaves out examples without one


def needs_of(runs: Iterable[Config]) -> dict[str, Needs]:
    """Maps each key of config.data that names splits to what the runs read from them."""
    needs: dict[str, Needs] = collections.defaultdict(lambda: collections.defaultdict(Need))
    tests = ("test_split", "further_tests")
    for run in runs:
        pair = set(run.data.pair)
        if run.tokenizer.is_trained:
            needs["train_split"][False].languages |= set(run.known_languages)
        if trains(run.stage) is Trains.TOWERS:
            for key in ("train_split", "valid_split", "further_tests"):
                needs[key][True].languages |= set(run.known_languages)
                needs[key][True].filled |= set(run.known_languages)
            needs["train_split"][True].train((), run.optim.batch)
            continue
        trained = run.stage in TRANSLATION_STAGES
        stage = TRANSLATION_STAGES[run.stage if trained else SCORED_AS]
        test_side = SIDES[run.test_side] or stage.test
        for key in ("train_split", "valid_split", *tests) if trained else tests:
            side = stage.train if key == "train_split" else test_side
            pictures = run.has_prefix and side is Side.IMAGE
            need = needs[key][pictures]
            need.languages |= pair
            need.filled |= set(used_languages(run) if trained else pair)
            need.pairs |= set(pairs_of(run) if trained else [run.data.pair])
            need.strict |= pictures
            if trained and key == "train_split":
                need.train(tuple(pairs_of(run)), run.optim.batch)
    return needs


def check_cliptrans(config: Config, findings: Findings) -> None:
    """Checks the sentences and pictures of every split that the run reads."""
    data = config.data
    findings.say(f"cliptrans, stage {config.stage}: config.data.source={data.source!r} {data.path}")
    for warning in seen_in_training(config):
        findings.say(f"note: {warning}")
    planned = findings.attempt(plan, config, NOWHERE) or []
    runs = [run.apply_parity() for _, run in planned]
    for key, needs in needs_of(runs).items():
        named = getattr(data, key)
        for split in (named,) if isinstance(named, str) else named:
            _check_split(config, key, split, needs, findings)
    if data.source == "table":
        named = (data.train_split, data.valid_split, data.test_split, *data.further_tests)
        say_unread_rows(data.path, named, findings)


def _check_split(config: Config, key: str, split: str, needs: Needs, findings: Findings) -> None:
    data = config.data
    findings.say(f"{split} (config.data.{key})")
    languages = set().union(*(need.languages for need in needs.values()))
    found = {
        language: corpus
        for language in sorted(languages)
        if (corpus := findings.attempt(load_corpus, data, split, (language,))) is not None
    }
    size, said = None, set()
    for pictures, need in sorted(needs.items()):
        read = {
            language: corpus for language, corpus in found.items() if language in need.languages
        }
        if not read:
            continue
        # Problems with single files are already reported, but files may still differ in length.
        whole = findings.attempt(load_corpus, data, split, [*read], with_images=pictures)
        among = ""  # which lines are counted, if not those that are read without pictures
        if whole is not None and pictures and whole.images is not None and len(whole) != size:
            among = " with a picture"
        size = size if whole is None else len(whole)
        for language, alone in read.items():
            # Alone, a language may have fewer lines: rows without any of the sentences are left
            # out.
            corpus = alone if whole is None else whole
            empty = corpus.empty[language]
            line = f"  {language}: {len(corpus)} lines{among}, {empty} of them empty"
            if line not in said:
                findings.say(line)
            said.add(line)
            if empty == len(corpus) and (len(corpus) == 0 or language in need.filled):
                findings.problem(f"{corpus.name} has no sentence in {language!r}{among}")
        if whole is None:
            continue
        _check_counts(whole, need, set(read), among, findings)
        if pictures:
            _check_pictures(whole, need, data.bad_share, findings)


def _check_counts(
    corpus: Corpus, need: Need, read: set[str], among: str, findings: Findings
) -> None:
    """Checks that there are examples enough for each pair and batch."""
    usable = {pair: len(corpus.rows_with(pair)) for pair in need.pairs if set(pair) <= read}
    for pair, count in sorted(usable.items()):
        if len(set(pair)) > 1:
            findings.say(f"  {' and '.join(pair)}: {count} lines{among} with both")
            if count == 0 and not any(corpus.empty[x] == len(corpus) for x in pair):
                findings.problem(f"{corpus.name} has no line{among} with both {' and '.join(pair)}")
    for pairs, batch in need.batches.items():
        count = sum(usable.get(pair, 0) for pair in pairs) if pairs else len(corpus)
        if 0 < count < batch:
            findings.problem(
                f"a batch of {batch} is more than the {count} examples{among} of {corpus.name}; "
                "lower config.optim.batch, or optim.batch in the stage's recipe"
            )


def _check_pictures(corpus: Corpus, need: Need, bad_share: float, findings: Findings) -> None:
    if findings.attempt(corpus.require_images) is None:
        return
    images, missing = corpus.images, set()
    if isinstance(images, FolderImages):
        missing = {i for i in range(len(images)) if not os.path.exists(images.name(i))}
    places = [i for i in findings.places(len(images)) if i not in missing]
    sizes, bad = read_sizes(lambda i: images[i].shape[:2], places)
    shown = ", ".join(f"{rows} x {columns} ({n})" for (rows, columns), n in sizes.most_common(3))
    findings.say(
        f"  {len(images)} pictures, {len(missing)} of them missing"
        + (f": {listed(images.name(i) for i in missing)}" if missing else "")
        + f"\n  sizes of {len(places)} pictures, rows x columns: {shown or 'none'}"
    )
    say_bad(bad, places, findings)
    lost = len(missing) + len(bad)
    if lost > (0 if need.strict else bad_share * len(images)):
        first = listed([images.name(i) for i in missing] + list(bad))
        advice = (
            "every example needs its picture: add or repair them"
            if need.strict
            else f"more than config.data.bad_share={bad_share:g}: add or repair them, or raise it"
        )
        findings.problem(f"{corpus.name} lacks {lost} of {len(images)} pictures: {first}; {advice}")
