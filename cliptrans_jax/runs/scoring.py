"""Translates a whole split with a trained model, and writes scores.json and translations.tsv."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from cliptrans_jax.config import Config
from cliptrans_jax.data.corpora import load_corpus
from cliptrans_jax.data.corpus import Corpus
from cliptrans_jax.data.feed import Batch, BatchingConfig, Inputs, evaluation_batches
from cliptrans_jax.evaluators.scores import METRICS, as_metrics, score
from cliptrans_jax.evaluators.show import Row, picture_table, read_translations, write_translations
from cliptrans_jax.evaluators.translation import Translate
from cliptrans_jax.runs.run_data import RunData, Split
from common_jax import hosts
from common_jax.inputs import BadExample
from common_jax.report import Table
from common_jax.workdir import read_json, write_json

SCORES, TRANSLATIONS = "scores.json", "translations.tsv"


def decode_batches(
    config: Config, inputs: Inputs, *, shard: tuple[int, int] | None = None
) -> Iterator[Batch]:
    """Batches of a set for the search, sorted by length. `shard` is (this host, number of hosts),
    by default over all hosts."""
    return evaluation_batches(
        inputs,
        batch=config.decode.batch,
        batching=BatchingConfig(config.decode.bucket),
        noise=config.noise,
        seed=config.seed,
        shard=hosts.shard() if shard is None else shard,
        by_length=True,
    )


def score_split(
    config: Config,
    workdir: epath.Path,
    split: Split,
    translate: Translate,
    params: Any,
    *,
    step: str,
) -> dict[str, Any]:
    """Translates a set, and writes all hypotheses and the scores of the best ones to `workdir`.

    Args:
      translate: the search.
      step: step of the checkpoint, for scores.json.

    Returns:
      The content of scores.json: set, step, sentences, scores, and each score's signature.
    """
    hypotheses = translate(params, decode_batches(config, split.inputs))
    rows = [
        Row(
            index=index,
            key=split.corpus.keys[split.inputs.examples.rows[index]],
            source=split.source(index),
            reference=split.reference(index),
            output=hypotheses[index][0].text,
            score=hypotheses[index][0].score,
            others=tuple(hypotheses[index][1:]),
        )
        for index in range(len(split.inputs))
    ]
    outputs, references = [row.output for row in rows], [row.reference for row in rows]
    # Examples to evaluate all have the same target language, even with config.all_languages.
    scores = score(outputs, references, language=split.inputs.examples.languages[0][1])
    report = {
        "set": split.corpus.name,
        "step": int(step),
        "sentences": scores.count,
        **as_metrics(scores),
        "signatures": dict(scores.signatures),
    }
    if jax.process_index() == 0:  # every host has all outputs
        write_translations(workdir / TRANSLATIONS, rows)
        write_json(workdir / SCORES, report)
    return report


def score_further(
    config: Config,
    workdir: epath.Path,
    data: RunData,
    translate: Translate,
    params: Any,
    *,
    step: str,
) -> dict[str, dict[str, Any]]:
    """Scores config.data.further_tests as `score_split` does, each in its own folder.

    Call it before scoring the test split, whose scores.json marks the run as finished.

    Returns:
      The content of scores.json by split.
    """
    return {
        split: score_split(
            config,
            workdir / folder,
            data.load(split, train=False),
            translate,
            params,
            step=step,
        )
        for folder, split in config.data.further.items()
    }


def galleries(config: Config, folder: epath.Path) -> list[Table]:
    """The `gallery` of each test split of a finished run, with the set's name in its caption."""
    tables = []
    for test, split in {"": config.data.test_split, **config.data.further}.items():
        # As if it were the run's test split, whose pictures `gallery` loads.
        data = dataclasses.replace(config.data, test_split=split, further_tests=())
        shown = gallery(dataclasses.replace(config, data=data), folder / test)
        if shown is not None:
            name = read_json(folder / test / SCORES)["set"]
            tables.append(dataclasses.replace(shown, caption=f"{shown.caption}, {name}"))
    return tables


def gallery(config: Config, folder: epath.Path, *, limit: int = 8) -> Table | None:
    """Sample translations of a finished run with their pictures, evenly spread over the set."""
    path = folder / TRANSLATIONS
    if not path.exists():
        return None
    rows = read_translations(path)
    count = min(limit, len(rows))
    sample = [rows[i * len(rows) // count] for i in range(count)]
    return picture_table(with_pictures(config, sample), limit=limit)


def with_pictures(config: Config, rows: Sequence[Row]) -> list[Row]:
    """The rows of a test split, with their pictures where those can be read."""
    corpus = load_corpus(config.data, config.data.test_split, config.data.pair, with_images=True)
    # By key, not by number: a scored set may lack rows of its corpus.
    places = {key: place for place, key in enumerate(corpus.keys)}
    return [dataclasses.replace(row, picture=_picture(corpus, places.get(row.key))) for row in rows]


def scores_table(folder: epath.Path, names: list[str]) -> Table | None:
    """One row per scored run below `folder`; the caption has the scores' signatures."""
    header = ("run", "set", "sentences", "BLEU", "BLEU, lower case", "chrF", "METEOR", "exact, %")
    numeric = dict.fromkeys(METRICS, int | float)
    fields = {"set": str, "sentences": int, "signatures": dict} | numeric
    rows, signatures = [], {}
    for name in names:
        path = folder / name / SCORES
        if path.exists():
            scores = read_json(path, fields)
            signatures = scores["signatures"]
            numbers = (f"{scores[key]:.1f}" for key in METRICS)
            rows.append((name or "run", scores["set"], str(scores["sentences"]), *numbers))
    caption = "; ".join(f"{name}: {text}" for name, text in signatures.items())
    return Table(f"Scores of the test split. {caption}", header, tuple(rows)) if rows else None


def _picture(corpus: Corpus, place: int | None) -> np.ndarray | None:
    """The picture at `place`; None if the corpus has no picture for a scored example."""
    if corpus.images is None or place is None:
        return None
    try:
        return corpus.images[place]
    except BadExample:
        return None
