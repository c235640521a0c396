"""A user's own data: parallel files and tables, what they may omit, and their errors."""

import dataclasses
import gzip
import json

import numpy as np
import pytest
from PIL import Image

from cliptrans_jax.config import Config
from cliptrans_jax.data import own
from cliptrans_jax.data.corpora import DataConfig, load_corpus
from cliptrans_jax.data.corpus import Corpus
from cliptrans_jax.data.examples import NoiseConfig, choose_examples
from cliptrans_jax.stages import STAGES
from common_jax.config import freeze

ROWS = (
    {"en": "a dog", "sv": "en hund", "picture": "dog.png", "split": "train"},
    {"en": "a cat", "sv": "", "picture": "pets/cat.png", "split": "train"},
    {"en": "", "sv": "ett hus", "picture": "", "split": "train"},
    {"en": "", "sv": "", "picture": "dog.png", "split": "train"},
    {"en": "a car", "sv": "en bil", "picture": "dog.png", "split": "val"},
)
PAIR = ("en", "sv")


def write_table(path, rows=ROWS, columns=(*PAIR, "picture", "split")):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        text = "".join(f"{json.dumps({name: row[name] for name in columns})}\n" for row in rows)
    else:
        separator = {".tsv": "\t", ".csv": ","}[path.suffix]
        lines = [columns, *([row[name] for name in columns] for row in rows)]
        text = "".join(f"{separator.join(line)}\n" for line in lines)
    path.write_text(text)


def draw(root):
    for name, value in (("dog.png", 10), ("pets/cat.png", 20)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), (value,) * 3).save(root / name)


def config_of(path, source="table"):
    return DataConfig(source, str(path), target_language="sv")


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl"])
@pytest.mark.parametrize("images", ["", "images"])
def test_one_table_for_all_splits(tmp_path, suffix, images):
    write_table(tmp_path / f"all{suffix}")
    draw(tmp_path / images)
    config = config_of(tmp_path / f"all{suffix}")
    corpus = load_corpus(config, "train", PAIR)
    assert corpus.texts == {"en": ("a dog", "a cat", ""), "sv": ("en hund", "", "ett hus")}
    line = 3 if suffix == ".jsonl" else 4
    assert corpus.keys == ("dog.png", "pets/cat.png", f"all{suffix}:{line}")
    assert list(corpus.rows_with(PAIR)) == [0] and list(corpus.rows_with(("sv", "sv"))) == [0, 2]
    pictured = load_corpus(config, "train", PAIR, with_images=True)
    assert pictured.texts == {"en": ("a dog", "a cat"), "sv": ("en hund", "")}
    assert [int(pictured.require_images()[i][0, 0, 0]) for i in range(2)] == [10, 20]
    assert load_corpus(config, "val", ("sv",)).texts == {"sv": ("en bil",)}


def test_one_table_per_split(tmp_path):
    write_table(tmp_path / "train.tsv", ROWS[:2], PAIR)
    write_table(tmp_path / "test.csv", ROWS[4:], PAIR)
    config = config_of(tmp_path)
    assert load_corpus(config, "train", ("en",)).texts == {"en": ("a dog", "a cat")}
    assert load_corpus(config, "test", ("en",)).keys == ("test.csv:2",)
    with pytest.raises(ValueError, match=r"test\.csv has no column 'picture'"):
        load_corpus(config, "test", ("en",), with_images=True).require_images()
    with pytest.raises(FileNotFoundError, match=r"no val\.tsv, .* only the tables test, train;"):
        load_corpus(config, "val", ("en",))
    with pytest.raises(ValueError, match=r"train\.tsv has no column 'svv' \(did you mean 'sv'\?\)"):
        load_corpus(config, "train", ("svv",))


def test_split_without_rows_is_reported(tmp_path):
    write_table(tmp_path / "all.csv")
    with pytest.raises(ValueError, match=r"no row of split 'test', only of: train, val; correct"):
        load_corpus(config_of(tmp_path / "all.csv"), "test", PAIR)
    write_table(tmp_path / "all.csv", columns=PAIR)
    with pytest.raises(ValueError, match=r"no column 'split', which should hold each row's split"):
        load_corpus(config_of(tmp_path / "all.csv"), "train", PAIR)


def test_image_paths_may_be_absolute(tmp_path):
    draw(tmp_path / "elsewhere")
    rows = [row | {"picture": str(tmp_path / "elsewhere" / row["picture"])} for row in ROWS[:2]]
    write_table(tmp_path / "set/all.jsonl", rows)
    config = config_of(tmp_path / "set/all.jsonl")
    images = load_corpus(config, "train", ("en",), with_images=True).require_images()
    assert int(images[1][0, 0, 0]) == 20


@pytest.mark.parametrize("packed", [False, True])
def test_parallel_text_files(tmp_path, packed):
    for name in (*PAIR, "picture"):
        text = "".join(f"{row[name]}\n" for row in ROWS[:4]).encode()
        ending = "pictures" if name == "picture" else name
        path = tmp_path / f"train.{ending}{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(text) if packed else text)
    draw(tmp_path / "images")
    config = config_of(tmp_path, "text")
    corpus = load_corpus(config, "train", PAIR)
    assert corpus.texts == {"en": ("a dog", "a cat", ""), "sv": ("en hund", "", "ett hus")}
    assert corpus.keys == ("dog.png", "pets/cat.png", "train:3")
    pictured = load_corpus(config, "train", PAIR, with_images=True)
    assert len(pictured) == 2 and int(pictured.require_images()[1][0, 0, 0]) == 20
    with pytest.raises(FileNotFoundError, match=r"train\.de or .*has the languages en, sv;"):
        load_corpus(config, "train", ("de",))


def test_parallel_files_without_images_or_of_unequal_lengths(tmp_path):
    (tmp_path / "train.en.txt").write_text("a\nb\n")
    named = r"files must be named SPLIT\.LANGUAGE, plain or \.gz, and there are train\.en\.txt;"
    with pytest.raises(FileNotFoundError, match=named):
        load_corpus(config_of(tmp_path, "text"), "train", PAIR)
    (tmp_path / "train.en").write_text("a\nb\n")
    (tmp_path / "train.sv").write_text("c\nd\n")
    config = config_of(tmp_path, "text")
    with pytest.raises(ValueError, match=r"train\.pictures, which names them, is missing"):
        load_corpus(config, "train", PAIR, with_images=True).require_images()
    (tmp_path / "train.pictures").write_text("dog.png\n")
    with pytest.raises(ValueError, match="different numbers of lines"):
        load_corpus(config, "train", PAIR)


@pytest.mark.parametrize("relative", [False, True])
def test_each_picture_is_found_in_either_folder(tmp_path, monkeypatch, relative):
    names = ("pets/x.png", "y.png", "images/z.png", "both.png", "y.png", "none.png")
    places = ("pets/x.png", "images/y.png", "images/z.png", "both.png", "images/both.png")
    for value, place in enumerate(places):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 3), (value,) * 3).save(tmp_path / place)
    (tmp_path / "images/pets").mkdir()
    (tmp_path / "images/pets/x.png").write_bytes(b"passed over")
    write_table(tmp_path / "all.tsv", [ROWS[0] | {"picture": name} for name in names])
    monkeypatch.chdir(tmp_path)
    config = config_of("all.tsv" if relative else tmp_path / "all.tsv")
    corpus = load_corpus(config, "train", PAIR, with_images=True)
    images = corpus.require_images()
    assert [int(images[i][0, 0, 0]) for i in range(5)] == [0, 1, 2, 3, 1]
    assert corpus.keys == names  # on which cached features depend
    with pytest.raises(ValueError, match=r"lacks 1 of 5 pictures: .*none\.png; a stage"):
        corpus.require_all_images()


@pytest.mark.parametrize(
    ("source", "closed"),
    [("table", "all.tsv"), ("table", "images"), ("text", "train.en"), ("text", "")],
)
def test_what_cannot_be_read_is_named(tmp_path, source, closed, make_unreadable):
    write_table(tmp_path / "all.tsv")
    (tmp_path / "images").mkdir()
    (tmp_path / "train.pictures").write_text("dog.png\n")
    (tmp_path / "train.en").write_text("a dog\n")
    make_unreadable(tmp_path / closed)
    path = tmp_path / "all.tsv" if source == "table" else tmp_path
    with pytest.raises(OSError, match="cannot be read") as error:
        load_corpus(config_of(path, source), "train", ("en",), with_images=True)
    assert str(error.value) == (
        f"config.data.path='{path}': '{tmp_path / closed}' cannot be read (Permission denied); "
        "make it readable, remove it or correct config.data.path"
    )


def test_pictures_that_no_example_has_are_explained(tmp_path):
    """The texts stay, so that nothing else says that these are missing."""
    write_table(tmp_path / "all.tsv", [row | {"picture": ""} for row in ROWS])
    table = load_corpus(config_of(tmp_path / "all.tsv"), "train", PAIR, with_images=True)
    table.require_sentences(PAIR, reader="it")
    message = (
        rf"^table train has no images: {tmp_path}/all\.tsv: no row of split 'train' has a picture "
        r"\(column 'picture' is empty in all 4 rows\); fill it in, or use a stage without pictures$"
    )
    with pytest.raises(ValueError, match=message):
        table.require_images()
    for name, text in (("en", "a\n\n"), ("sv", "\n\n"), ("pictures", "\n\n")):
        (tmp_path / f"train.{name}").write_text(text)
    text = load_corpus(config_of(tmp_path, "text"), "train", PAIR, with_images=True)
    with pytest.raises(
        ValueError, match=r"train\.pictures: no line names .*all 2 are blank\); fill"
    ):
        text.require_images()
    (tmp_path / "train.pictures").write_text("\ndog.png\n")
    text = load_corpus(config_of(tmp_path, "text"), "train", PAIR, with_images=True)
    with pytest.raises(
        ValueError, match="no example with a picture has a sentence in 'en' or 'sv'"
    ):
        text.require_images()


def test_language_that_only_examples_without_a_picture_have_is_named_as_such(tmp_path):
    write_table(tmp_path / "all.tsv", ROWS[1:3])
    draw(tmp_path)
    config = config_of(tmp_path / "all.tsv")
    load_corpus(config, "train", PAIR).require_sentences(PAIR, reader="it")
    pictured = load_corpus(config, "train", PAIR, with_images=True)
    with pytest.raises(ValueError, match="'sv' among its examples with a picture, which it needs"):
        pictured.require_sentences(PAIR, reader="it")


@pytest.mark.parametrize(
    ("stage", "several", "expected"),
    [
        ("translate", False, [("a dog", "en hund")]),
        ("caption", False, [("a dog", "a dog"), ("a cat", "a cat")]),
        (
            "caption",
            True,
            [("en hund", "en hund"), ("ett hus",) * 2, ("a dog", "a dog"), ("a cat", "a cat")],
        ),
    ],
)
def test_examples_without_a_sentence_are_skipped(tmp_path, stage, several, expected):
    write_table(tmp_path / "all.tsv")
    corpus = load_corpus(config_of(tmp_path / "all.tsv"), "train", PAIR)
    words = {
        code: [np.array([*map(ord, text)], int) for text in texts]
        for code, texts in corpus.texts.items()
    }
    examples = choose_examples(
        STAGES[stage], words, pair=PAIR, train=True, noise=NoiseConfig(), all_languages=several
    ).of_rows_with_sentences(corpus)
    found = [
        tuple("".join(map(chr, ids)) for ids in pair)
        for pair in zip(examples.source, examples.target, strict=True)
    ]
    assert found == expected and len(examples.rows) == len(examples.languages) == len(expected)
    places = zip(examples.rows, examples.languages, strict=True)
    texts = [corpus.texts[source][row] for row, (source, _) in places]
    assert texts == [source for source, _ in expected]


def test_language_unknown_to_mbart_is_refused_by_key():
    tokenizer = {"kind": "mbart50", "path": "folder"}
    data = {"source": "text", "path": "folder", "target_language": "pt_BR"}
    message = r"^config\.data\.target_language='pt_BR' is not a language of tokenizer.*af, ar, az"
    with pytest.raises(ValueError, match=message):
        freeze(Config, {"data": data, "tokenizer": tokenizer})
    known = freeze(Config, {"data": data | {"target_language": "pt"}, "tokenizer": tokenizer})
    assert known.data.pair == ("en", "pt")


def test_data_settings_are_inferred_from_the_path(tmp_path):
    write_table(tmp_path / "table/all.csv")
    write_table(tmp_path / "tables/training.tsv", ROWS[:2], PAIR)
    write_table(tmp_path / "tables/dev.tsv", ROWS[4:], PAIR)
    (tmp_path / "texts").mkdir()
    for name in ("train.en", "train.sv.gz", "valid.en", "valid.sv", "notes.md"):
        (tmp_path / "texts" / name).write_text("a\n")
    given = dataclasses.asdict(DataConfig())
    splits = ("train_split", "valid_split", "test_split")
    for path, source, expected in (
        ("table/all.csv", "table", ("train", "val", "test")),
        ("tables", "table", ("training", "dev", "test")),
        ("texts", "text", ("train", "valid", "test")),
    ):
        found = own.settings_of(str(tmp_path / path), given)
        assert (found["source"], found["source_language"], found["target_language"]) == (
            source,
            *PAIR,
        )
        assert tuple(found[key] for key in splits) == expected
        assert found["further_tests"] == ()
    assert own.settings_of(str(tmp_path), given) == {}


def test_misaligned_corpus_is_refused_with_its_counts():
    texts = {"en": ("a", "b"), "de": ("a",)}
    with pytest.raises(ValueError, match=r"pairs train is not aligned: .*'de': 1, 'keys': 2"):
        Corpus("pairs train", texts, None, ("1", "2"))
