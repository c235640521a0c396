"""The data that a stage reads, and the files written for a scored set."""

import dataclasses
import json
import types

import numpy as np
import pytest
from etils import epath
from meshes import one_device
from tiny_cliptrans import FEATURES, TEST, number_tokenizer, read_split, tiny_config

from cliptrans_jax.data.corpus import Corpus
from cliptrans_jax.data.examples import NoiseConfig
from cliptrans_jax.evaluators.scores import score
from cliptrans_jax.evaluators.show import Hypothesis, Row, read_translations, write_translations
from cliptrans_jax.runs import run_data, scoring
from cliptrans_jax.runs.run_data import (
    RunData,
    caption_language,
    encodes_texts,
    feature_side,
    used_languages,
)
from cliptrans_jax.stages import Side

PAIR = ("en", "de")
CODES = {"en": 1.0, "de": 2.0, "pictures": 3.0}


def config_of(stage, root=None, **changes):
    return dataclasses.replace(tiny_config(stage, root), **changes)


def features(corpus, kind):
    """Rows that encode their index and what they belong to."""
    rows = np.arange(len(corpus), dtype=np.float32)
    return np.stack([rows, np.full_like(rows, CODES[kind])], axis=1)


class Tower:
    """A tower with only a tokenizer, for which a sentence is its number of letters."""

    longest = 11
    config = types.SimpleNamespace(features=FEATURES)
    tokenizer = dataclasses.replace(
        number_tokenizer(limit=longest),
        cut=lambda texts: [[len(text)] for text in texts],
        pad=0,
        vocab=1000,
        special=frozenset(),
    )


@pytest.fixture
def data_of(monkeypatch, tmp_path):
    """data_of(config): a RunData whose towers and features are stand-ins that record requests."""
    asked = []

    def texts(tower, corpus, language, *, folder, mesh):
        asked.append((corpus.name, language, str(folder)))
        return features(corpus, language)

    def images(tower, corpus, *, folder, mesh, workers):
        asked.append((corpus.name, "pictures", str(folder)))
        corpus.require_images()
        return features(corpus, "pictures")

    monkeypatch.setattr(run_data, "text_features", texts)
    monkeypatch.setattr(run_data, "image_features", images)

    def build(config):
        made = RunData(config, epath.Path(tmp_path / "run"), one_device())
        made.__dict__["text_tower"] = made.__dict__["image_tower"] = Tower()
        return made

    build.asked = asked
    return build


# Stage, whether it is for training, and what its examples read, write and look at.
READS = [
    ("caption", True, "en", "en", "pictures"),
    ("caption", False, "en", "en", "pictures"),
    ("text_recon", True, "en", "en", "en"),
    ("text_recon", False, "en", "en", "en"),
    ("translate", True, "en", "de", "en"),
    ("translate", False, "en", "de", "en"),
    ("triplet", True, "en", "de", "pictures"),
    ("triplet", False, "en", "de", "en"),
]


@pytest.mark.parametrize(("stage", "train", "source", "target", "looks"), READS)
def test_inputs_of_each_stage(corpus, data_of, stage, train, source, target, looks):
    split = "train" if train else TEST
    made = data_of(config_of(stage, corpus))
    found = made.load(split, train=train)
    texts = dict(zip(PAIR, read_split(corpus, split)[:2], strict=True))
    count = len(texts["en"])
    inputs = found.inputs
    assert len(inputs) == count and inputs.room == 20 and inputs.pad == made.tokenizer.pad
    assert [found.source(i) for i in range(count)] == texts[source]
    assert [found.reference(i) for i in range(count)] == texts[target]
    for ids, language in ((inputs.examples.source, source), (inputs.examples.target, target)):
        assert {int(row[0]) for row in ids} == {made.tokenizer.language_id(language)}
        assert [made.tokenizer.decode(row) for row in ids] == texts[language]
    wanted = np.stack([np.arange(count), np.full(count, CODES[looks])], axis=1)
    np.testing.assert_array_equal(inputs.features, wanted)
    folder = str(made.workdir / "features")
    assert data_of.asked == [(f"multi30k {split}", looks, folder)]
    assert inputs.clip_tokens is None


def test_captions_train_in_both_languages_and_validate_in_one(corpus, data_of):
    """The target language's captions come first; features belong to the sentence's own language."""
    made = data_of(config_of("text_recon", corpus, all_languages=True))
    english, german, _ = read_split(corpus, "train")
    found = made.load("train", train=True)
    assert [found.reference(i) for i in range(48)] == [*german, *english]
    assert [found.source(i) for i in range(48)] == [*german, *english]
    wanted = [[row, CODES[code]] for code in ("de", "en") for row in range(24)]
    assert np.asarray(found.inputs.features).tolist() == wanted
    valid = made.load("val", train=False)
    assert [valid.reference(i) for i in range(6)] == read_split(corpus, "val")[1]
    assert set(np.asarray(valid.inputs.features)[:, 1]) == {CODES["de"]}


@pytest.mark.parametrize(("side", "looks"), [("image", "pictures"), ("text", "en"), ("", "en")])
def test_evaluation_may_use_the_other_modality(corpus, data_of, side, looks):
    made = data_of(config_of("triplet", corpus, test_side=side, features="/kept"))
    made.load("train", train=True)
    made.load("val", train=False)
    assert [what for _, what, _ in data_of.asked] == ["pictures", looks]
    assert {folder for _, _, folder in data_of.asked} == {"/kept"}


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        ("text_recon", {"keep_text_features": False}),
        ("translate", {"keep_text_features": False}),
        ("translate", {"unfreeze_clip": True}),
    ],
)
def test_step_that_runs_the_tower_receives_its_tokens(corpus, data_of, stage, change):
    found = data_of(config_of(stage, corpus, **change)).load("train", train=True)
    english = read_split(corpus, "train")[0]
    assert found.inputs.features is None and data_of.asked == []
    assert [ids.tolist() for ids in found.inputs.clip_tokens] == [[0, len(x), 2] for x in english]
    assert (found.inputs.pad, found.inputs.clip_pad) == (1, 0)
    assert found.inputs.clip_room == Tower.longest


def test_model_without_prefix_has_no_features(corpus, data_of):
    config = config_of("caption", corpus)
    mapper = dataclasses.replace(config.model.mapper, prefix=0)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, mapper=mapper))
    found = data_of(config).load("train", train=True)
    assert (found.inputs.features, found.inputs.clip_tokens) == (None, None)
    assert data_of.asked == [] and found.corpus.images is None


@pytest.mark.parametrize(
    ("stage", "languages", "train", "wanted"),
    [
        ("caption", False, True, ({"train": True, "val": True, TEST: True}, 24)),
        ("caption", True, True, ({"train": True, "val": True, TEST: True}, 48)),
        ("triplet", False, True, ({"train": True, "val": False, TEST: False}, 24)),
        ("translate", False, True, ({"train": False, "val": False, TEST: False}, 24)),
        ("translate", False, False, ({TEST: False}, 0)),
    ],
)
def test_check_opens_every_split_with_the_modalities_it_needs(
    corpus, data_of, monkeypatch, stage, languages, train, wanted
):
    opened, real = {}, run_data.load_corpus

    def load(config, split, codes, *, with_images=False):
        opened[split] = with_images
        return real(config, split, codes, with_images=with_images)

    monkeypatch.setattr(run_data, "load_corpus", load)
    made = data_of(config_of(stage, corpus, all_languages=languages))
    count = made.check(train=train)
    assert (opened, count) == wanted


@pytest.mark.parametrize(
    ("stage", "changes", "train", "test"),
    [
        ("caption", {}, Side.IMAGE, Side.IMAGE),
        ("text_recon", {"test_side": "image"}, Side.TEXT, Side.IMAGE),
        ("translate", {"test_side": "image"}, Side.TEXT, Side.IMAGE),
        ("triplet", {}, Side.IMAGE, Side.TEXT),
        ("caption", {"test_side": "text"}, Side.IMAGE, Side.TEXT),
    ],
)
def test_feature_side_of_training_and_evaluation(stage, changes, train, test):
    config = config_of(stage, **changes)
    assert feature_side(config, train=True) is train
    assert feature_side(config, train=False) is test
    assert not encodes_texts(config)
    kept = dataclasses.replace(config, keep_text_features=False)
    assert encodes_texts(kept) is (Side.TEXT in (train, test))


@pytest.mark.parametrize(
    ("stage", "changes", "caption", "used"),
    [
        ("caption", {}, "en", ("en",)),
        ("caption", {"caption_language": "de"}, "de", ("de",)),
        ("text_recon", {"all_languages": True}, "de", PAIR),
        ("caption", {"all_languages": True, "caption_language": "en"}, "en", PAIR),
        ("translate", {}, "en", PAIR),
        ("triplet", {"caption_language": "de"}, "de", PAIR),
    ],
)
def test_languages_of_each_stage(stage, changes, caption, used):
    config = config_of(stage, **changes)
    assert (caption_language(config), used_languages(config)) == (caption, used)


def test_missing_sentences_are_reported():
    whole = Corpus("some", {"en": ("a", ""), "de": ("", "")}, None, ("1", "2"))
    assert whole.empty == {"en": 1, "de": 2}
    whole.require_sentences(("en",), reader="it")
    with pytest.raises(ValueError, match=r"some has no sentence in 'de', which it needs, only in"):
        whole.require_sentences(("en", "de"), reader="it")
    empty = Corpus("some", {"en": (), "de": ()}, None, ())
    with pytest.raises(ValueError, match=r"some is empty: .* in 'en' or 'de', .*; use another"):
        empty.require_sentences(("en",), reader="it")


# A scored set.


def scored(tmp_path, config, made, outputs, *, step="12"):
    """What `score_split` returns for `outputs` by source, and the batches that it requests."""
    chosen = made.load(TEST, train=False)
    asked = []

    def translate(params, batches):
        asked.extend(batches)
        return {
            number: [Hypothesis(outputs[chosen.source(number)], -number), Hypothesis("x", -9.0)]
            for number in reversed(range(len(chosen.inputs)))
        }

    report = scoring.score_split(config, tmp_path, chosen, translate, {}, step=step)
    return report, asked


@pytest.mark.parametrize(("stage", "target"), [("translate", "de"), ("caption", "en")])
def test_scored_set_is_written_row_by_row(corpus, data_of, tmp_path, stage, target):
    config = config_of(stage, corpus)
    english, german, _ = read_split(corpus, TEST)
    references = {"en": english, "de": german}[target]
    outputs = dict(zip(english, references, strict=True)) | {english[1]: "ganz falsch"}
    folder = epath.Path(tmp_path / "out")
    folder.mkdir()
    report, asked = scored(folder, config, data_of(config), outputs)
    rows = read_translations(folder / "translations.tsv")
    assert [row.index for row in rows] == [*range(5)]
    assert [row.key for row in rows] == [f"{x.replace(' ', '_')}.png" for x in english]
    assert [row.source for row in rows] == english
    assert [row.reference for row in rows] == references
    assert [row.output for row in rows] == list(outputs.values())
    assert [(row.score, row.others) for row in rows] == [
        (-i, (Hypothesis("x", -9.0),)) for i in range(5)
    ]
    wanted = score(list(outputs.values()), references, language=target)
    assert report == json.loads((folder / "scores.json").read_text())
    assert (report["set"], report["step"], report["sentences"]) == (f"multi30k {TEST}", 12, 5)
    assert report["exact"] == 80.0 and report["bleu"] == pytest.approx(wanted.bleu)
    assert f"tok-{target}|" in report["signatures"]["bleu_lower"]
    (batch,) = asked  # the size in config.decode.batch
    assert len(batch["_mask"]) == 8 and batch["_mask"].sum() == 5
    lengths = (batch["source"] != 1).sum(axis=1)
    assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)


def test_further_tests_are_scored_in_their_own_folders(corpus, data_of, tmp_path):
    config = config_of("translate", corpus)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, further_tests=("val", "train"))
    )
    german, asked = read_split(corpus, "val")[1], []

    def translate(params, batches):
        count = sum(int(batch["_mask"].sum()) for batch in batches)
        asked.append((params, count))
        return {number: [Hypothesis(german[0], 0.0)] for number in range(count)}

    folder, params = epath.Path(tmp_path), {"a": 1}
    found = scoring.score_further(config, folder, data_of(config), translate, params, step="3")
    assert asked == [(params, 6), (params, 24)] and list(found) == ["val", "train"]
    for split, report in found.items():
        assert report == json.loads((tmp_path / f"test_{split}" / "scores.json").read_text())
        assert (report["set"], report["step"]) == (f"multi30k {split}", 3)
    # The test split itself has not been scored here, so it is not shown.
    shown = scoring.galleries(config, folder)
    assert [table.caption.rpartition(", ")[2] for table in shown] == [
        "multi30k val",
        "multi30k train",
    ]
    assert [row[2] for row in shown[0].rows] == german


def test_scoring_uses_the_decoding_batch_size(corpus, data_of, tmp_path):
    """Regardless of training's batches and seed; tokens are dropped with the run's seed."""
    config = config_of("translate", corpus, noise=NoiseConfig(mask_prob=0.5, test=True), seed=3)
    decode = dataclasses.replace(config.decode, batch=2, bucket=6)
    chosen = data_of(config).load("val", train=False)

    def batches(**changes):
        given = dataclasses.replace(config, decode=decode, **changes)
        return list(scoring.decode_batches(given, chosen.inputs))

    found = batches()
    assert [len(batch["_mask"]) for batch in found] == [2, 2, 2]
    assert {batch["labels"].shape[1] for batch in found} <= {6, 12, 20}
    sources = [[batch["source"].tolist() for batch in batches(seed=seed)] for seed in (3, 3, 4)]
    assert sources[0] == sources[1] != sources[2]


def test_gallery_is_spread_over_the_set(corpus, tmp_path):
    rows = [Row(i, f"{i}", f"source {i}", "r", "o", 0.0) for i in range(20)]
    write_translations(tmp_path / "translations.tsv", rows)
    shown = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "picture_table", lambda rows, limit: shown.setdefault(limit, rows))
        for limit in (8, 3, 20, 25):
            scoring.gallery(config_of("translate", corpus), epath.Path(tmp_path), limit=limit)
    assert [row.index for row in shown[8]] == [0, 2, 5, 7, 10, 12, 15, 17]
    assert [row.index for row in shown[3]] == [0, 6, 13]
    assert [row.index for row in shown[20]] == [row.index for row in shown[25]] == [*range(20)]
    assert scoring.gallery(config_of("translate", corpus), epath.Path(tmp_path / "none")) is None


def test_score_table_has_one_row_per_run_in_order(tmp_path):
    for number, name in enumerate(("b", "a", "")):
        (tmp_path / name).mkdir(exist_ok=True)
        values = {"bleu": 1.25, "bleu_lower": 2, "chrf": 3.06, "meteor": 4, "exact": 5}
        held = {name: value + 10 * number for name, value in values.items()}
        held |= {"set": "val", "sentences": 7 + number, "signatures": {"bleu": "case:mixed"}}
        (tmp_path / name / "scores.json").write_text(json.dumps(held))
    table = scoring.scores_table(epath.Path(tmp_path), ["b", "a", "missing", ""])
    assert table.rows == (
        ("b", "val", "7", "1.2", "2.0", "3.1", "4.0", "5.0"),
        ("a", "val", "8", "11.2", "12.0", "13.1", "14.0", "15.0"),
        ("run", "val", "9", "21.2", "22.0", "23.1", "24.0", "25.0"),
    )
    assert table.header[3:] == ("BLEU", "BLEU, lower case", "chrF", "METEOR", "exact, %")
    assert "bleu: case:mixed" in table.caption
    assert scoring.scores_table(epath.Path(tmp_path), ["missing"]) is None
