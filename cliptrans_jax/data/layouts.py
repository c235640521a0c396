"""Readers of the folder layouts of Multi30k, WIT, WMT and COCO."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cliptrans_jax.data.corpus import (
    TEXTS_ALONE,
    Corpus,
    FolderImages,
    Numbered,
    log_empty,
    open_folder,
    read_texts,
    require_aligned,
)
from common_jax.inputs.names import listed, require_distinct
from common_jax.inputs.ragged import Lines, take
from common_jax.inputs.texts import find_text, read_lines
from common_jax.untrusted import RefusedError, as_id, as_text, parse_json, plain, refuse_pointer

MULTI30K_LANGUAGES = ("en", "de", "fr", "cs")
WIT_FOLDERS = ("es_fr", "en_ro", "en_fr", "en_es", "en_de", "en_af", "de_es")
WIT_LANGUAGES = tuple(sorted({code for pair in WIT_FOLDERS for code in pair.split("_")}))
WIT_SPLITS = ("train", "valid", "test")
# The original calls Multi30k's validation set a test set of 2016.
VALIDATION = ("val", "test_2016_val")
# In COCO, a picture's name includes its folder.
COCO_NAME = re.compile(r"COCO_(?P<folder>(train|val|test)\d{4})_\d+\.jpg")


def load_multi30k(root: Path, split: str, languages: Sequence[str], *, with_images: bool) -> Corpus:
    """Loads Multi30k in its published layout or in CLIPTrans' (data/multi30k).

    Texts are `ROOT/raw/SPLIT.LANGUAGE`, plain or gzipped, or the same below `ROOT/text/data/task1`;
    image names are in `image_splits/SPLIT.txt` beside `raw`, cut at "#"; images are in
    `ROOT/images/SPLIT` or all together in `ROOT/images`. Those of COCO, in "test_2017_mscoco", may
    also be in COCO's layout, in `train2014` and `val2014` below ROOT or `ROOT/images`. "val" and
    "test_2016_val" are the same split. Without image names or images, the corpus has only texts,
    and `no_images` says why.

    Raises:
      FileNotFoundError: no such folder, split or language.
      ValueError: files of different lengths or not in UTF-8.
    """
    tops = (root, root / "text/data/task1")
    top = next((folder for folder in tops if (folder / "raw").is_dir()), None)
    if top is None:
        raise FileNotFoundError(
            f"config.data.path={str(root)!r} has neither raw/ nor text/data/task1/raw/; give the "
            f"folder of Multi30k with one of them (there: {_entries(root)})"
        )
    aliases = VALIDATION if split in VALIDATION else (split,)
    # If no file has either name, the error is about the one that was asked for.
    stem = next((s for s in aliases if _has_texts(top / "raw", s)), split)
    texts, counts = read_texts(top / "raw", stem, languages)
    lists = (find_text(top / "image_splits" / f"{name}.txt") for name in aliases)
    names_file = next(filter(None, lists), None)
    if names_file is None:
        keys = Numbered(stem, next(iter(counts.values())))
        reason = f"{top}/image_splits/{split}.txt, which names them, is missing"
    else:
        # In test_2017_mscoco, "#" and a number may follow the name of the file.
        keys = tuple(name.split("#")[0] for name in read_lines(names_file))
        counts[str(names_file)] = len(keys)
        reason = ""
    require_aligned(counts)
    images = None
    if not with_images:
        reason = TEXTS_ALONE
    elif not reason:
        folders = [root / "images" / name for name in aliases] + [root / "images"]
        images, reason = open_folder(folders, keys)
        if images is None and (places := _coco_places(keys)):
            images, coco_reason = open_folder([root / "images", root], places)
            reason = "" if images is not None else f"{reason}; {coco_reason}"
    return log_empty(Corpus(f"multi30k {split}", texts, images, keys, reason))


def _coco_places(names: Sequence[str]) -> tuple[str, ...]:
    """Returns FOLDER/NAME of COCO's pictures; () if any name is not COCO's."""
    matches = [COCO_NAME.fullmatch(name) for name in names]
    if not all(matches):
        return ()
    return tuple(f"{match['folder']}/{match[0]}" for match in matches if match)


def load_coco(
    root: Path, split: str, languages: Sequence[str], *, language: str, with_images: bool
) -> Corpus:
    """Loads COCO's captions in the published layout, for captioning in one language.

    `ROOT/annotations/captions_SPLIT.json` (or in ROOT itself) has `images` (id, file_name) and
    `annotations` (image_id, caption); images are in `ROOT/SPLIT`, `ROOT/images/SPLIT` or
    `ROOT/images`. Each caption is an example, so an image occurs once per caption.

    Args:
      root: the folder.
      split: COCO's name of it, such as "train2017" or "val2014".
      languages: languages to read; sentences in any but `language` are empty.
      language: language of the captions.
      with_images: also opens the images.

    Raises:
      FileNotFoundError: no such file; the message lists the splits present.
      ValueError: a malformed file, captions of images that it does not list, or two images with
        the same id.
    """
    path = _coco_file(root, split)
    content = path.read_bytes()
    refuse_pointer(path, content)
    try:
        record = parse_json(content)
        # An image may be listed with each of its captions.
        listing = {(as_id(image["id"]), as_text(image["file_name"])) for image in record["images"]}
        pairs = [
            (as_id(note["image_id"]), as_text(note["caption"])) for note in record["annotations"]
        ]
        # A sentence is one line, as in text files.
        captions = tuple(" ".join(caption.split()) for _, caption in pairs)
        # Raises for an unpaired surrogate, which is not a character.
        "".join((*captions, *(file for _, file in listing))).encode()
    except RefusedError as refused:
        raise ValueError(f"{path} {refused}; fetch it again") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a complete file of images (id, file_name) and annotations (image_id, "
            f"caption): {type(error).__name__} {plain(str(error))}; fetch it again"
        ) from error
    require_distinct((str(image) for image, _ in listing), at=f"{path}, image ids")
    files = dict(listing)
    if unknown := sorted({str(image) for image, _ in pairs if image not in files}):
        raise ValueError(
            f"{path} has captions of {len(unknown)} images it does not list: {listed(unknown)}"
        )
    keys, images, reason = tuple(files[image] for image, _ in pairs), None, TEXTS_ALONE
    if with_images:
        folders = [root / split, root / "images" / split, root / "images"]
        images, reason = open_folder(folders, keys)
    sentences = Lines.of(captions)
    texts = {code: sentences if code == language else ("",) * len(keys) for code in languages}
    return Corpus(f"coco {split}", texts, images, keys, reason)


def _coco_file(root: Path, split: str) -> Path:
    folders = (root / "annotations", root)
    for folder in folders:
        if (folder / f"captions_{split}.json").is_file():
            return folder / f"captions_{split}.json"
    present = {
        path.stem.removeprefix("captions_")
        for folder in folders
        for path in folder.glob("captions_*.json")
    }
    raise FileNotFoundError(
        f"no captions_{split}.json in {folders[0]} or {root}; there are the splits "
        f"{listed(present) or 'nothing'}; correct config.data.path or the split"
    )


def load_wit(
    root: Path, split: str, languages: Sequence[str], *, pair: tuple[str, str], with_images: bool
) -> Corpus:
    """Loads WIT's captions in two languages (CLIPTrans, data/wit).

    `ROOT/A_B`, of the two languages in either order, has `SPLIT.LANGUAGE`, `SPLIT_url.txt`,
    `SPLIT_image.txt` and `images/`. In `SPLIT_image.txt`, line 0 has the indices, separated by
    commas, of images that could not be fetched (or is empty), and line i + 1 the file of image i.
    With images, rows whose image is listed in line 0 or missing from `images/` are left out
    altogether; without images, all texts are kept.

    Args:
      root: the folder.
      split: one of WIT_SPLITS.
      languages: one or both of `pair`.
      pair: the two languages of the folder.
      with_images: also opens the images.

    Raises:
      FileNotFoundError: no such pair, folder, split or language.
      ValueError: files of different lengths, not in UTF-8, or a malformed line 0.
    """
    folder = _pair_folder(root, pair, template="{}_{}", known=WIT_FOLDERS)
    if split not in WIT_SPLITS:
        raise ValueError(f"wit has no split {split!r}, only {', '.join(WIT_SPLITS)}")
    texts, counts = read_texts(folder, split, languages)
    size = next(iter(counts.values()))
    keys: Sequence[str] = Numbered(split, size)
    if (urls := find_text(folder / f"{split}_url.txt")) is not None:
        counts[str(urls)] = len(read_lines(urls))
    lists = find_text(folder / f"{split}_image.txt")
    unfetched: frozenset[int] = frozenset()
    if lists is not None:
        lines = read_lines(lists)
        counts[f"{lists}, without its first line"] = len(lines) - 1
        keys = lines[1:]
    require_aligned(counts)
    name = f"wit {folder.name} {split}"
    if not with_images:
        return log_empty(Corpus(name, texts, None, keys))
    if lists is None:
        reason = f"{folder}/{split}_image.txt, which names them, is missing"
        return log_empty(Corpus(name, texts, None, keys, reason))
    unfetched = _parse_unfetched(lists, lines[0], size)
    present = {path.name for path in (folder / "images").glob("*")}
    # Left out of texts and pictures alike. Outside captioning, the original leaves them out of the
    # features alone, which shifts all pairs that follow.
    rows = [i for i in range(size) if i not in unfetched and keys[i] in present]
    logging.info(
        "%s: %d of %d rows are left out, %d that could not be fetched and %d without their file",
        *(name, size - len(rows), size, len(unfetched), size - len(rows) - len(unfetched)),
    )
    if not rows:
        reason = f"no image that {lists} names is in {folder}/images"
        return log_empty(Corpus(name, texts, None, keys, reason))
    texts = {language: take(lines, np.array(rows)) for language, lines in texts.items()}
    keys = tuple(keys[i] for i in rows)
    return log_empty(Corpus(name, texts, FolderImages(folder / "images", keys), keys))


def load_wmt(root: Path, split: str, languages: Sequence[str], *, pair: tuple[str, str]) -> Corpus:
    """Loads WMT's sentences, `ROOT/wmt_A_B/SPLIT.LANGUAGE`, which have no images (CLIPTrans,
    data/wmt).

    Args:
      root: the folder.
      split: the name of the files.
      languages: one or both of `pair`.
      pair: A and B in either order.

    Raises:
      FileNotFoundError: no such folder, split or language.
      ValueError: files of different lengths or not in UTF-8.
    """
    folder = _pair_folder(root, pair, template="wmt_{}_{}")
    texts, counts = read_texts(folder, split, languages)
    require_aligned(counts)
    keys = Numbered(split, next(iter(counts.values())))
    reason = "WMT is text; use another config.data.source for a stage that needs images"
    return log_empty(Corpus(f"wmt {folder.name} {split}", texts, None, keys, reason))


def _entries(folder: Path) -> str:
    """Lists the entries of a folder, for a message."""
    if not folder.is_dir():
        return "no such folder"
    return listed(path.name for path in folder.iterdir()) or "nothing"


def _has_texts(folder: Path, split: str) -> bool:
    return any(find_text(folder / f"{split}.{language}") for language in MULTI30K_LANGUAGES)


def _pair_folder(
    root: Path, pair: tuple[str, str], *, template: str, known: Sequence[str] = ()
) -> Path:
    """Returns the folder of two languages, which exists in one order of them."""
    names = [template.format(*pair), template.format(*reversed(pair))]
    if known and not set(names) & set(known):
        raise ValueError(
            f"wit has no pair {' and '.join(pair)}, only {', '.join(known)} in either direction; "
            "correct config.data.source_language or config.data.target_language"
        )
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise FileNotFoundError(
        f"config.data.path={str(root)!r} has no folder {' or '.join(names)}, only: {_entries(root)}"
    )


def _parse_unfetched(path: Path, line: str, size: int) -> frozenset[int]:
    try:
        indices = frozenset(int(index) for index in line.split(",") if index.strip())
    except ValueError as error:
        raise ValueError(
            f"{path}, line 1 must be indices of images that could not be fetched, separated by "
            f"commas, or empty; {error}"
        ) from error
    if outside := sorted(index for index in indices if not 0 <= index < size):
        raise ValueError(f"{path}, line 1 has {outside[:10]}, which are not from 0 to {size - 1}")
    return indices
