"""Corpora on disk: their layouts, how files are aligned, and errors for invalid files."""

import dataclasses
import gzip
import json
import logging

import numpy as np
import pytest
from PIL import Image

from cliptrans_jax.data.corpora import SOURCES, DataConfig, load_corpus
from cliptrans_jax.data.corpus import Images
from common_jax.inputs import BadExample
from common_jax.inputs.texts import HARMLESS, read_lines

ENGLISH = ("a dog runs", "two men sit", "the red car")
GERMAN = ("ein Hund rennt", "zwei Männer sitzen", "das rote Auto")
FILES = ("1.jpg", "22.jpg", "3.jpg")
COCO_FOLDERS = ("val2014", "train2014", "val2014")
COLOURS = ((250, 0, 0), (0, 250, 0), (0, 0, 250))


def write(path, lines, *, packed=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(f"{line}\n" for line in lines).encode()
    if packed:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def draw(folder, names=FILES, colours=COLOURS):
    folder.mkdir(parents=True, exist_ok=True)
    for i, (name, colour) in enumerate(zip(names, colours, strict=True)):
        Image.new("RGB", (5 + i, 4), colour).save(folder / name, quality=95)


def colours_of(images):
    """The index in COLOURS of each picture."""
    return [
        int(np.argmax(np.asarray(images[i], int).mean(axis=(0, 1)))) for i in range(len(images))
    ]


def multi30k(root, *, split="val", texts="raw", lists="image_splits", packed=False, names=FILES):
    write(root / texts / f"{split}.en", ENGLISH, packed=packed)
    write(root / texts / f"{split}.de", GERMAN, packed=packed)
    write(root / lists / f"{split}.txt", names)
    return DataConfig("multi30k", str(root))


def wit(root, *, unfetched="", folder="en_de", split="train"):
    write(root / folder / f"{split}.en", ENGLISH)
    write(root / folder / f"{split}.de", GERMAN)
    write(root / folder / f"{split}_url.txt", [f"http://x/{name}" for name in FILES])
    write(root / folder / f"{split}_image.txt", [unfetched, *FILES])
    return DataConfig("wit", str(root))


@pytest.mark.parametrize("packed", [False, True])
def test_multi30k_in_its_published_layout(tmp_path, packed):
    config = multi30k(tmp_path, packed=packed)
    draw(tmp_path / "images")
    corpus = load_corpus(config, "val", ("en", "de"), with_images=True)
    assert corpus.name == "multi30k val" and len(corpus) == 3
    assert corpus.texts == {"en": ENGLISH, "de": GERMAN}
    assert corpus.keys == FILES
    assert isinstance(corpus.images, Images)
    assert [corpus.images[i].shape for i in range(3)] == [(4, 5, 3), (4, 6, 3), (4, 7, 3)]
    assert corpus.images[0].dtype == np.uint8
    assert colours_of(corpus.require_images()) == [0, 1, 2]
    assert corpus.images.name(1) == f"{tmp_path}/images/22.jpg"


@pytest.mark.parametrize("asked", ["val", "test_2016_val"])
def test_multi30k_in_the_layout_of_the_original(tmp_path, asked):
    below = "text/data/task1/"
    config = multi30k(
        tmp_path, split="test_2016_val", texts=f"{below}raw", lists=f"{below}image_splits"
    )
    draw(tmp_path / "images/test_2016_val")
    draw(tmp_path / "images/train", colours=COLOURS[::-1])
    corpus = load_corpus(config, asked, ("de",), with_images=True)
    assert corpus.texts == {"de": GERMAN}
    assert colours_of(corpus.images) == [0, 1, 2]


def test_published_validation_with_images_in_the_original_layout(tmp_path):
    config = multi30k(tmp_path, split="val")
    draw(tmp_path / "images/test_2016_val")
    assert colours_of(load_corpus(config, "test_2016_val", ("en",), with_images=True).images) == [
        0,
        1,
        2,
    ]


def test_image_folder_of_the_split_comes_first(tmp_path):
    config = multi30k(tmp_path)
    draw(tmp_path / "images", colours=COLOURS[::-1])
    draw(tmp_path / "images/val")
    images = load_corpus(config, "val", ("en",), with_images=True).require_images()
    assert colours_of(images) == [0, 1, 2]


def test_caption_numbers_are_stripped_from_image_names(tmp_path):
    names = [f"{name}#{i}" for i, name in enumerate(FILES)]
    config = multi30k(tmp_path, split="test_2017_mscoco", names=names)
    draw(tmp_path / "images/test_2017_mscoco")
    corpus = load_corpus(config, "test_2017_mscoco", ("en",), with_images=True)
    assert corpus.keys == FILES
    assert colours_of(corpus.images) == [0, 1, 2]


@pytest.mark.parametrize("below", ["", "images"])
def test_coco_images_may_keep_their_own_folders(tmp_path, below):
    names = [f"COCO_{folder}_00000000000{i}.jpg" for i, folder in enumerate(COCO_FOLDERS)]
    listed = [f"{name}#{i}" for i, name in enumerate(names)]
    config = multi30k(tmp_path, split="test_2017_mscoco", names=listed)
    for name, folder, colour in zip(names, COCO_FOLDERS, COLOURS, strict=True):
        draw(tmp_path / below / folder, (name,), (colour,))
    corpus = load_corpus(config, "test_2017_mscoco", ("en",), with_images=True)
    assert corpus.keys == tuple(names)
    assert colours_of(corpus.require_images()) == [0, 1, 2]
    (tmp_path / below / "val2014" / names[0]).unlink()
    images = load_corpus(config, "test_2017_mscoco", ("en",), with_images=True).images
    with pytest.raises(BadExample, match=f"val2014/{names[0]}: FileNotFoundError"):
        images[0]


def test_searched_folders_of_missing_coco_images_are_named(tmp_path):
    config = multi30k(tmp_path, split="test_2017_mscoco", names=["COCO_val2014_07.jpg"] * 3)
    corpus = load_corpus(config, "test_2017_mscoco", ("en",), with_images=True)
    with pytest.raises(ValueError, match=r"images/test_2017_mscoco .*; .*val2014/COCO_val2014_07"):
        corpus.require_images()


def coco(root, *, below="annotations", **changes):
    """Two images, one with two captions and one with a single caption."""
    record = {
        "images": [{"id": 7, "file_name": "1.jpg"}, {"id": 3, "file_name": "22.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 3, "caption": "A dog\n runs. "},
            {"id": 2, "image_id": 7, "caption": "Two men"},
            {"id": 3, "image_id": 3, "caption": "One dog"},
        ],
    } | changes
    (root / below).mkdir(parents=True, exist_ok=True)
    (root / below / "captions_val2017.json").write_text(json.dumps(record))
    return DataConfig("coco", str(root))


@pytest.mark.parametrize(
    ("below", "images"), [("annotations", "val2017"), ("", "images"), ("", "images/val2017")]
)
def test_coco_has_one_example_per_caption(tmp_path, below, images):
    config = coco(tmp_path, below=below)
    draw(tmp_path / images, FILES[:2], COLOURS[:2])
    corpus = load_corpus(config, "val2017", ("en", "de"), with_images=True)
    assert corpus.texts == {"en": ("A dog runs.", "Two men", "One dog"), "de": ("", "", "")}
    assert corpus.keys == ("22.jpg", "1.jpg", "22.jpg")
    assert colours_of(corpus.require_images()) == [1, 0, 1]
    corpus.require_sentences(("en",), reader="stage 'caption'")
    with pytest.raises(ValueError, match=r"coco val2017 has no sentence in 'de', which stage 'tr"):
        corpus.require_sentences(("en", "de"), reader="stage 'translate'")


def test_incomplete_coco_is_refused(tmp_path):
    config = coco(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no captions_train2017\.json .*splits val2017;"):
        load_corpus(config, "train2017", ("en",))
    with pytest.raises(ValueError, match=r"has no images: none of the 3 images, such as 22\.jpg"):
        load_corpus(config, "val2017", ("en",), with_images=True).require_images()
    broken = r"captions_val2017\.json is not a complete file"
    for changes, message in (
        ({"images": []}, r"captions_val2017\.json has captions of 2 images it does not list: 3, 7"),
        ({"annotations": [{"image_id": 3}]}, rf"{broken} .*caption"),
        ({"images": None}, broken),
        ({"annotations": [{"image_id": 3, "caption": "a \ud83d"}]}, rf"{broken} .*surrogates"),
        ({"images": [{"id": 7, "file_name": 1}, {"id": 3, "file_name": "a"}]}, broken),
        ({"images": [{"id": 3, "file_name": 5}]}, rf"{broken} .* 5 is not text"),
        ({"images": [{"id": [3], "file_name": "x"}]}, broken),
        ({"annotations": [{"image_id": [3], "caption": "x"}]}, rf"{broken} .* is not an id"),
        ({"images": [{"id": 3, "file_name": x} for x in "ab"]}, "image ids: .* than once: 3; make"),
        ({"annotations": [{"image_id": 3, "caption": None}]}, "None is not text; fetch it again"),
    ):
        coco(tmp_path, **changes)
        with pytest.raises(ValueError, match=message):
            load_corpus(config, "val2017", ("en",))
    path = tmp_path / "annotations/captions_val2017.json"
    path.write_bytes(b"[" * 100_000)
    with pytest.raises(ValueError, match=r"captions_val2017\.json .* nested too deep; fetch it"):
        load_corpus(config, "val2017", ("en",))
    path.write_bytes(b'{"images": "\xe4"}')
    with pytest.raises(ValueError, match=r"captions_val2017\.json is not UTF-8 .*byte 12\)"):
        load_corpus(config, "val2017", ("en",))


def test_texts_need_no_images(tmp_path):
    config = multi30k(tmp_path)
    corpus = load_corpus(config, "val", ("en",))
    assert corpus.images is None
    with pytest.raises(ValueError, match=r"multi30k val has no images: .*with_images=True"):
        corpus.require_images()
    corpus = load_corpus(config, "val", ("en",), with_images=True)
    with pytest.raises(ValueError, match=r"none of the 3 images, such as 1\.jpg, is in .*images"):
        corpus.require_images()
    (tmp_path / "image_splits/val.txt").unlink()
    corpus = load_corpus(config, "val", ("en",), with_images=True)
    assert corpus.texts == {"en": ENGLISH} and [*corpus.keys] == ["val:1", "val:2", "val:3"]
    with pytest.raises(ValueError, match=r"image_splits/val\.txt, which names them, is missing"):
        corpus.require_images()


def test_bad_image_is_reported(tmp_path, caplog):
    config = multi30k(tmp_path)
    draw(tmp_path / "images")
    (tmp_path / "images/1.jpg").write_bytes(b"no jpeg")
    (tmp_path / "images/3.jpg").unlink()
    images = load_corpus(config, "val", ("en",), with_images=True).require_images()
    assert "lacks 1 images: 3.jpg" in caplog.text
    for index, reason in ((0, "UnidentifiedImageError"), (2, "FileNotFoundError")):
        with pytest.raises(BadExample, match=reason) as error:
            images[index]
        assert error.value.name == str(tmp_path / "images" / FILES[index])
    assert images[1].shape == (4, 6, 3)


def test_grey_and_transparent_images_become_rgb(tmp_path):
    config = multi30k(tmp_path)
    (tmp_path / "images").mkdir()
    for name, mode in zip(FILES, ("L", "P", "RGBA"), strict=True):
        Image.new(mode, (3, 2)).save(tmp_path / "images" / name, format="PNG")
    images = load_corpus(config, "val", ("en",), with_images=True).images
    assert [images[i].shape for i in range(3)] == [(2, 3, 3)] * 3


def test_files_of_different_lengths_are_all_reported(tmp_path):
    config = multi30k(tmp_path)
    write(tmp_path / "raw/val.de", GERMAN[:2])
    with pytest.raises(ValueError, match="different numbers of lines") as error:
        load_corpus(config, "val", ("en", "de"))
    for file, count in (("raw/val.en", 3), ("raw/val.de", 2), ("image_splits/val.txt", 3)):
        assert f"{tmp_path / file}: {count}" in str(error.value)


def test_missing_language_file_is_reported_with_those_found(tmp_path):
    config = multi30k(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"raw/val\.fr .*the languages de, en;"):
        load_corpus(config, "val", ("en", "fr"))
    with pytest.raises(FileNotFoundError, match=r"there are the splits val.*did you mean 'val'"):
        load_corpus(config, "vall", ("en",))


def test_content_of_an_invalid_multi30k_folder_is_listed(tmp_path):
    (tmp_path / "raws").mkdir()
    with pytest.raises(FileNotFoundError, match=r"neither raw/ nor .*\(there: raws\)"):
        load_corpus(DataConfig("multi30k", str(tmp_path)), "val", ("en",))
    with pytest.raises(FileNotFoundError, match=r"config\.data\.path='/nowhere' is not a folder"):
        load_corpus(DataConfig("multi30k", "/nowhere"), "val", ("en",))


def test_invalid_utf8_is_reported_by_line(tmp_path):
    config = multi30k(tmp_path)
    (tmp_path / "raw/val.de").write_bytes(b"eins\nzwei M\xe4nner\ndrei\n")
    with pytest.raises(ValueError, match=r"raw/val\.de, line 2 is not UTF-8 .*byte 6"):
        load_corpus(config, "val", ("de",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("eins\nzwei\ndrei\n".encode("utf-16-le"), r"raw/val\.de, line 1 has a zero byte.*UTF-16"),
        ("eins\nzwei\ndrei\n".encode("utf-16"), r"raw/val\.de, line 1 (is not UTF-8|has a zero)"),
        (b"eins\nz\x00wei\ndrei\n", r"raw/val\.de, line 2 has a zero byte"),
        (b"eins\rzwei\rdrei\r", r"raw/val\.de ends its lines with carriage returns alone"),
        (b"eins\nzwei\n\ndrei\n", r"(?s)raw/val\.en: 3.*raw/val\.de: 4"),
    ],
)
def test_invalid_text_file_is_reported(tmp_path, content, message):
    config = multi30k(tmp_path)
    (tmp_path / "raw/val.de").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_corpus(config, "val", ("en", "de"))


def test_bom_and_surrounding_whitespace_are_stripped(tmp_path):
    config = multi30k(tmp_path)
    (tmp_path / "raw/val.de").write_bytes(b"\xef\xbb\xbfeins\r\n zwei \t\r\n\xc2\xa0drei")
    assert load_corpus(config, "val", ("de",)).texts["de"] == ("eins", "zwei", "drei")


def test_broken_gzip_is_reported(tmp_path):
    config = multi30k(tmp_path, packed=True)
    path = tmp_path / "raw/val.de.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"val\.de\.gz is not a complete gzip file"):
        load_corpus(config, "val", ("de",))
    path.write_bytes(gzip.compress(b"\n" * (1 << 22)))  # 4 kB
    assert len(read_lines(path)) == 1 << 22
    path.write_bytes(gzip.compress(bytes(HARMLESS + 1)))
    with pytest.raises(ValueError, match=r"val\.de\.gz unpacks to more than 200 times its size"):
        read_lines(path)


def test_empty_lines_are_kept_and_counted(tmp_path, caplog):
    config = multi30k(tmp_path)
    write(tmp_path / "raw/val.de", ["", "zwei", ""])
    corpus = load_corpus(config, "val", ("en", "de"))
    assert corpus.texts["de"] == ("", "zwei", "")
    assert corpus.empty == {"en": 0, "de": 2}
    assert "multi30k val: 2 of 3 sentences in 'de' are empty" in caplog.text


def test_lines_end_only_at_line_feeds(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("\ufeffone\u2028still one\r\n two\x85still two \nthree".encode())
    assert read_lines(path) == ("one\u2028still one", "two\x85still two", "three")


def test_wit_skips_rows_without_an_image_in_texts_and_images(tmp_path, caplog):
    config = wit(tmp_path, unfetched="0")
    draw(tmp_path / "en_de/images", FILES[1:], COLOURS[1:])
    caplog.set_level(logging.INFO)
    corpus = load_corpus(config, "train", ("en", "de"), with_images=True)
    assert corpus.texts == {"en": ENGLISH[1:], "de": GERMAN[1:]}
    assert corpus.keys == FILES[1:] and colours_of(corpus.images) == [1, 2]
    assert "wit en_de train: 1 of 3 rows are left out, 1 that could not be fetched" in caplog.text

    (tmp_path / "en_de/images/22.jpg").unlink()
    corpus = load_corpus(config, "train", ("de",), with_images=True)
    assert corpus.texts == {"de": GERMAN[2:]} and colours_of(corpus.images) == [2]

    whole = load_corpus(config, "train", ("en", "de"))
    assert whole.texts == {"en": ENGLISH, "de": GERMAN} and whole.images is None


def test_wit_skips_listed_images_even_if_the_file_exists(tmp_path):
    config = wit(tmp_path, unfetched="2, 0")
    draw(tmp_path / "en_de/images")  # arbitrary bytes, as from a failed download
    corpus = load_corpus(config, "train", ("en",), with_images=True)
    assert corpus.texts == {"en": ENGLISH[1:2]} and colours_of(corpus.images) == [1]


def test_wit_with_nothing_unfetched_has_an_empty_first_line(tmp_path):
    config = wit(tmp_path)
    draw(tmp_path / "en_de/images")
    corpus = load_corpus(config, "train", ("en",), with_images=True)
    assert corpus.texts == {"en": ENGLISH} and colours_of(corpus.images) == [0, 1, 2]


@pytest.mark.parametrize(
    ("pair", "folder"), [(("de", "en"), "en_de"), (("de", "es"), "de_es"), (("es", "de"), "de_es")]
)
def test_wit_is_found_in_either_order_of_the_pair(tmp_path, pair, folder):
    wit(tmp_path, folder=folder)
    write(tmp_path / folder / "train.es", ENGLISH)
    config = DataConfig("wit", str(tmp_path), *pair)
    corpus = load_corpus(config, "train", pair)
    assert corpus.name == f"wit {folder} train"
    assert set(corpus.texts) == set(pair)


def test_wit_lists_available_pairs_and_splits(tmp_path):
    config = wit(tmp_path)
    with pytest.raises(ValueError, match=r"wit has no pair ro and es, only es_fr, en_ro"):
        pair = dataclasses.replace(config, source_language="ro", target_language="es")
        load_corpus(pair, "train", ("ro",))
    with pytest.raises(FileNotFoundError, match=r"no folder en_fr or fr_en, only: en_de"):
        load_corpus(dataclasses.replace(config, target_language="fr"), "train", ("en",))
    with pytest.raises(ValueError, match=r"wit has no split 'val', only train, valid, test"):
        load_corpus(config, "val", ("en",))
    with pytest.raises(ValueError, match=r"language 'fr' is not of the pair \('en', 'de'\)"):
        load_corpus(config, "train", ("fr",))


@pytest.mark.parametrize(
    ("line", "message"), [("1,x", "line 1 must be indices"), ("1,3", r"\[3\].* from 0 to 2")]
)
def test_wit_refuses_a_broken_list_of_missing_images(tmp_path, line, message):
    config = wit(tmp_path, unfetched=line)
    with pytest.raises(ValueError, match=message):
        load_corpus(config, "train", ("en",), with_images=True)


def test_wit_without_images_gives_the_reason(tmp_path):
    config = wit(tmp_path, unfetched="1")
    corpus = load_corpus(config, "train", ("en",), with_images=True)
    assert corpus.texts == {"en": ENGLISH}
    with pytest.raises(ValueError, match=r"no image that .*train_image\.txt names is in"):
        corpus.require_images()
    (tmp_path / "en_de/train_image.txt").unlink()
    corpus = load_corpus(config, "train", ("en",), with_images=True)
    with pytest.raises(ValueError, match=r"train_image\.txt, which names them, is missing"):
        corpus.require_images()


def test_wit_files_must_have_equal_lengths(tmp_path):
    config = wit(tmp_path)
    write(tmp_path / "en_de/train_image.txt", ["", *FILES[:2]])
    with pytest.raises(ValueError, match=r"(?s)train\.en: 3.*train_url\.txt: 3.*first line: 2"):
        load_corpus(config, "train", ("en",))


def test_wmt_is_read_in_either_order_of_the_pair(tmp_path):
    for split in ("train", "newstest2014"):
        write(tmp_path / "wmt_en_de" / f"{split}.en", ENGLISH)
        write(tmp_path / "wmt_en_de" / f"{split}.de", GERMAN)
    config = DataConfig("wmt", str(tmp_path), "de", "en", test_split="newstest2014")
    corpus = load_corpus(config, "newstest2014", config.pair, with_images=True)
    assert corpus.texts == {"de": GERMAN, "en": ENGLISH} and len(corpus) == 3
    with pytest.raises(ValueError, match="WMT is text"):
        corpus.require_images()
    with pytest.raises(FileNotFoundError, match="no folder wmt_fr_en or wmt_en_fr, only: wmt_en"):
        load_corpus(dataclasses.replace(config, source_language="fr"), "train", ("fr",))
    write(tmp_path / "wmt_en_de/train.de", GERMAN[:1])
    with pytest.raises(ValueError, match="different numbers of lines"):
        load_corpus(config, "train", config.pair)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "emojis"}, r"^source='emojis'.*did you mean 'emoji'"),
        ({"path": "/x"}, r"^path='/x' must be empty"),
        ({"source": "wit"}, r"^path='' must be its folder"),
        ({"source_language": "eng"}, r"^source_language='eng' .*did you mean 'en'"),
        ({"target_language": "cs"}, r"^target_language='cs' is not a language"),
        ({"target_language": "en"}, r"^target_language='en' must be another"),
        ({"valid_split": ""}, r"^valid_split='' must be a non-empty string"),
        ({"bad_share": 1.0}, r"^bad_share=1\.0 must be in \[0, 1\)"),
        ({"workers": -1}, r"^workers=-1 must be at least 0"),
        ({"emoji_size": 0}, r"^emoji_size=0 must be at least 1"),
        ({"further_tests": ("compositions",)}, r"^train_split='train' .*set train_split='rest'"),
        ({"valid_split": "compositions"}, r"^train_split='train' .*set train_split='rest'"),
    ],
)
def test_invalid_config_is_refused_by_key(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)


@pytest.mark.parametrize(("source", "known"), [("emoji", "en, es, ja"), ("multi30k", "en, de, fr")])
def test_unknown_language_is_refused_listing_the_known(tmp_path, source, known):
    config = DataConfig(source, "" if source == "emoji" else str(tmp_path))
    with pytest.raises(ValueError, match=f"language='xx' is not a language of .*which has {known}"):
        load_corpus(config, "train", ("en", "xx"))
    assert set(SOURCES) == {"emoji", "multi30k", "wit", "wmt", "coco", "text", "table"}
