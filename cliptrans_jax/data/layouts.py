"""The folders that Multi30k, WIT, WMT and COCO are laid out in."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from cliptrans_jax.data.corpus import (
    TEXTS_ALONE,
    Corpus,
    FolderImages,
    find_text,
    listed,
    log_empty,
    open_folder,
    read_lines,
    read_texts,
    require_aligned,
)
from common_jax.untrusted import RefusedError, as_text, parse_json, plain

MULTI30K_LANGUAGES = ("en", "de", "fr", "cs")
WIT_FOLDERS = ("es_fr", "en_ro", "en_fr", "en_es", "en_de", "en_af", "de_es")
WIT_LANGUAGES = tuple(sorted({code for pair in WIT_FOLDERS for code in pair.split("_")}))
WIT_SPLITS = ("train", "valid", "test")
# The original calls Multi30k's validation set a test set of 2016.
VALIDATION = ("val", "test_2016_val")
# A picture's name says which of COCO's folders it is published in.
COCO_NAME = re.compile(r"COCO_(?P<folder>(train|val|test)\d{4})_\d+\.jpg")


def load_multi30k(root: Path, split: str, languages: Sequence[str], *, with_images: bool) -> Corpus:
    """Multi30k, as published or as the original keeps it (CLIPTrans, data/multi30k).

    Texts are `ROOT/raw/SPLIT.LANGUAGE`, plain or gzipped, or those below `ROOT/text/data/task1`;
    image names are in `image_splits/SPLIT.txt` beside `raw`, cut at "#"; images lie in
    `ROOT/images/SPLIT` or all together in `ROOT/images`. Those of COCO, in "test_2017_mscoco", may
    also lie as COCO has them, in `train2014` and `val2014` below ROOT or `ROOT/images`. "val" and
    "test_2016_val" are the same split. A corpus without image names or images has its texts and
    says why (`no_images`).

    Raises:
      FileNotFoundError: no such folder, split or language.
      ValueError: files of different lengths or not in UTF-8.
    """
    tops = (root, root / "text/data/task1")
    top = next((folder for folder in tops if (folder / "raw").is_dir()), None)
    if top is None:
        raise FileNotFoundError(
            f"config.data.path={str(root)!r} holds neither raw/ nor text/data/task1/raw/; give the "
            f"folder of Multi30k that does (there: {_entries(root)})"
        )
    aliases = VALIDATION if split in VALIDATION else (split,)
    stem = next((s for s in aliases if _has_texts(top / "raw", s)), split)
    texts, counts = read_texts(top / "raw", stem, languages)
    lists = (find_text(top / "image_splits" / f"{name}.txt") for name in aliases)
    names_file = next(filter(None, lists), None)
    if names_file is None:
        size = next(iter(counts.values()))
        keys = tuple(f"{stem}:{number}" for number in range(1, size + 1))
        reason = f"{top}/image_splits/{split}.txt, which names them, is missing"
    else:
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
            images, also = open_folder([root / "images", root], places)
            reason = "" if images is not None else f"{reason}; {also}"
    return log_empty(Corpus(f"multi30k {split}", texts, images, keys, reason))


def _coco_places(names: Sequence[str]) -> tuple[str, ...]:
    """FOLDER/NAME of COCO's pictures; () where any is none of COCO's."""
    found = [COCO_NAME.fullmatch(name) for name in names]
    return tuple(f"{one['folder']}/{one[0]}" for one in found if one) if all(found) else ()


def load_coco(
    root: Path, split: str, languages: Sequence[str], *, language: str, with_images: bool
) -> Corpus:
    """COCO's captions as they are published, for captioning in one language.

    `ROOT/annotations/captions_SPLIT.json` (or in ROOT itself) has `images` (id, file_name) and
    `annotations` (image_id, caption); images lie in `ROOT/SPLIT`, `ROOT/images/SPLIT` or
    `ROOT/images`. Each caption is an example, so an image comes as often as it has captions.

    Args:
      split: as COCO calls it, such as "train2017" or "val2014".
      languages: what to read; sentences in others than `language` are empty.
      language: of the captions.

    Raises:
      FileNotFoundError: no such file, with the splits that are there.
      ValueError: a broken file, or captions of images that it lacks.
    """
    path = _coco_file(root, split)
    try:
        record = parse_json(path.read_bytes())
        files = {image["id"]: as_text(image["file_name"]) for image in record["images"]}
        pairs = [(note["image_id"], as_text(note["caption"])) for note in record["annotations"]]
        captions = tuple(" ".join(caption.split()) for _, caption in pairs)
        # All must be text, in which half of a surrogate pair is no character.
        "".join((*captions, *files.values())).encode()
    except RefusedError as refused:
        raise ValueError(f"{path} {refused}; fetch it again") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no whole file of images (id, file_name) and annotations (image_id, "
            f"caption): {type(error).__name__} {plain(str(error))}; fetch it again"
        ) from error
    if lost := sorted({str(image) for image, _ in pairs if image not in files}):
        raise ValueError(f"{path} has captions of {len(lost)} images it lacks: {listed(lost)}")
    keys, images, reason = tuple(files[image] for image, _ in pairs), None, TEXTS_ALONE
    if with_images:
        folders = [root / split, root / "images" / split, root / "images"]
        images, reason = open_folder(folders, keys)
    texts = {code: captions if code == language else ("",) * len(keys) for code in languages}
    return Corpus(f"coco {split}", texts, images, keys, reason)


def _coco_file(root: Path, split: str) -> Path:
    folders = (root / "annotations", root)
    for folder in folders:
        if (folder / f"captions_{split}.json").is_file():
            return folder / f"captions_{split}.json"
    there = {
        path.stem.removeprefix("captions_")
        for folder in folders
        for path in folder.glob("captions_*.json")
    }
    raise FileNotFoundError(
        f"no captions_{split}.json in {folders[0]} or {root}; there are the splits "
        f"{listed(there)}; correct config.data.path or the split"
    )


def load_wit(
    root: Path, split: str, languages: Sequence[str], *, pair: tuple[str, str], with_images: bool
) -> Corpus:
    """WIT's captions in two languages (CLIPTrans, data/wit).

    `ROOT/A_B`, of the two languages in either order, holds `SPLIT.LANGUAGE`, `SPLIT_url.txt`,
    `SPLIT_image.txt` and `images/`. In `SPLIT_image.txt`, line 0 has the indices, separated by
    commas, of images that could not be fetched (none: an empty line), and line i + 1 the file of
    image i. With images, rows whose image is in line 0 or not in `images/` are left out of texts
    and images alike; the texts alone are kept whole.

    Args:
      pair: the two languages of the folder; `languages` are one or both of them.

    Raises:
      FileNotFoundError: no such pair, folder, split or language.
      ValueError: files of different lengths, not in UTF-8, or a broken line 0.
    """
    folder = _pair_folder(root, pair, template="{}_{}", known=WIT_FOLDERS)
    if split not in WIT_SPLITS:
        raise ValueError(f"wit has no split {split!r}, only {', '.join(WIT_SPLITS)}")
    texts, counts = read_texts(folder, split, languages)
    size = next(iter(counts.values()))
    keys = tuple(f"{split}:{number}" for number in range(1, size + 1))
    if (urls := find_text(folder / f"{split}_url.txt")) is not None:
        counts[str(urls)] = len(read_lines(urls))
    lists = find_text(folder / f"{split}_image.txt")
    unfetched: frozenset[int] = frozenset()
    if lists is not None:
        lines = read_lines(lists)
        counts[f"{lists}, without its first line"] = len(lines) - 1
        keys = tuple(lines[1:])
    require_aligned(counts)
    name = f"wit {folder.name} {split}"
    if not with_images:
        return log_empty(Corpus(name, texts, None, keys))
    if lists is None:
        reason = f"{folder}/{split}_image.txt, which names them, is missing"
        return log_empty(Corpus(name, texts, None, keys, reason))
    unfetched = _parse_unfetched(lists, lines[0], size)
    present = {path.name for path in (folder / "images").glob("*")}
    kept = [i for i in range(size) if i not in unfetched and keys[i] in present]
    logging.info(
        "%s: %d of %d rows are left out, %d that could not be fetched and %d without their file",
        *(name, size - len(kept), size, len(unfetched), size - len(kept) - len(unfetched)),
    )
    if not kept:
        reason = f"no image that {lists} names is in {folder}/images"
        return log_empty(Corpus(name, texts, None, keys, reason))
    texts = {language: tuple(lines[i] for i in kept) for language, lines in texts.items()}
    keys = tuple(keys[i] for i in kept)
    return log_empty(Corpus(name, texts, FolderImages(folder / "images", keys), keys))


def load_wmt(root: Path, split: str, languages: Sequence[str], *, pair: tuple[str, str]) -> Corpus:
    """WMT's sentences, which have no images (CLIPTrans, data/wmt): `ROOT/wmt_A_B/SPLIT.LANGUAGE`.

    Args:
      pair: A and B in either order; `languages` are one or both of them.

    Raises:
      FileNotFoundError: no such folder, split or language.
      ValueError: files of different lengths or not in UTF-8.
    """
    folder = _pair_folder(root, pair, template="wmt_{}_{}")
    texts, counts = read_texts(folder, split, languages)
    require_aligned(counts)
    size = next(iter(counts.values()))
    keys = tuple(f"{split}:{number}" for number in range(1, size + 1))
    reason = "WMT is text; take another config.data.source for a stage that looks at images"
    return log_empty(Corpus(f"wmt {folder.name} {split}", texts, None, keys, reason))


def _entries(folder: Path) -> str:
    """The content of a folder, for a message."""
    return listed({p.name for p in folder.iterdir()}) if folder.is_dir() else "no such folder"


def _has_texts(folder: Path, split: str) -> bool:
    return any(find_text(folder / f"{split}.{language}") for language in MULTI30K_LANGUAGES)


def _pair_folder(
    root: Path, pair: tuple[str, str], *, template: str, known: Sequence[str] = ()
) -> Path:
    """The folder of two languages, which exists in one order of them."""
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
    if bad := sorted(index for index in indices if not 0 <= index < size):
        raise ValueError(f"{path}, line 1 has {bad[:10]}, which are not from 0 to {size - 1}")
    return indices
