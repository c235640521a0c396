"""A corpus: sentences in several languages, aligned, with a picture each where there are any."""

import dataclasses
import functools
import gzip
import io
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from common_jax.config import did_you_mean
from common_jax.inputs import BadExample
from common_jax.inputs.pictures import decode_picture, read_file

TEXTS_ALONE = "it was loaded for its texts alone; load it with with_images=True"
MOST_INFLATED = 200  # times that a gzipped text is larger than its file


@runtime_checkable
class Images(Protocol):
    """Random access to the pictures of a corpus, example by example."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray:
        """Uint8 (I, J, 3) RGB of any size; raises BadExample where it cannot be read."""
        ...

    def name(self, index: int) -> str:
        """The file to look for when picture `index` is bad."""
        ...


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Examples of one split; entry i of everything below is of example i.

    Attributes:
      name: what messages call it, such as "multi30k test_2016_flickr".
      texts: language -> sentences. A missing sentence is an empty one.
      images: the pictures, or None.
      keys: a name an example: an image file, an emoji, or a file's line.
      no_images: why `images` is None.
    """

    name: str
    texts: Mapping[str, tuple[str, ...]]
    images: Images | None
    keys: tuple[str, ...]
    no_images: str = TEXTS_ALONE

    def __post_init__(self):
        lengths = {len(sentences) for sentences in self.texts.values()} | {len(self.keys)}
        lengths |= {len(self.images)} if self.images is not None else set()
        assert len(lengths) == 1, f"{self.name}: {lengths}"

    def __len__(self) -> int:
        return len(self.keys)

    @functools.cached_property
    def empty(self) -> dict[str, int]:
        """Language -> number of its empty sentences."""
        return {language: texts.count("") for language, texts in self.texts.items()}

    def require_sentences(self, languages: Sequence[str], *, reader: str) -> None:
        """Raises ValueError where there is none at all in one of the languages that `reader`, such
        as "stage 'translate'", reads or writes."""
        for language in languages:
            if len(self) and self.empty[language] == len(self):
                have = [code for code, count in self.empty.items() if count < len(self)]
                raise ValueError(
                    f"{self.name} has no sentence in {language!r}, which {reader} needs, only in "
                    f"{', '.join(have) or 'none'}; take another config.data or, for captions "
                    "in one language, set config.caption_language"
                )

    def require_images(self) -> Images:
        """The pictures.

        Raises:
          ValueError: there are none; the message says why.
        """
        if self.images is None:
            raise ValueError(f"{self.name} has no images: {self.no_images}")
        return self.images


@dataclasses.dataclass(frozen=True)
class FolderImages:
    """Image files of a folder, decoded when asked for."""

    root: Path
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return f"{self.root}/{self.names[index]}"

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            return np.asarray(decode_picture(read_file(self.name(index)), channels=3))
        except (OSError, ValueError) as error:
            raise BadExample(self.name(index), f"{type(error).__name__}: {error}") from error


def open_folder(roots: Sequence[Path], names: Sequence[str]) -> tuple[FolderImages | None, str]:
    """The images `names` in the first of the folders `roots` that holds any of them. Names may have
    folders of their own.

    A file that is missing there is counted in a log line, and a BadExample when asked for.

    Returns:
      (images, "") or (None, why there are none).
    """
    inside = {name.rpartition("/")[0] for name in names}
    for root in roots:
        present = set()
        for folder in filter(lambda folder: (root / folder).is_dir(), inside):
            before = f"{folder}/" if folder else ""
            present |= {f"{before}{entry.name}" for entry in os.scandir(root / folder)}
        missing = [name for name in names if name not in present]
        if len(missing) < len(names):
            if missing:
                logging.warning("%s lacks %d images: %s", root, len(missing), listed(missing))
            return FolderImages(root, tuple(names)), ""
    where = " or ".join(map(str, roots))
    such = f", such as {names[0]}," if names else ""
    return None, f"none of the {len(names)} images{such} is in {where}"


def read_lines(path: Path) -> tuple[str, ...]:
    """The lines of a UTF-8 text file, plain or gzipped (by its name), without white space around.

    Lines end at a line feed and nowhere else, since a sentence may hold any other separator that
    Unicode knows.

    Raises:
      ValueError: a line that is not UTF-8 or has a zero byte, named by its number; lines that end
        with carriage returns alone; a broken gzip.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        limit = MOST_INFLATED * len(content) + 1024
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
                content = file.read(limit + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is no whole gzip file ({error}); fetch it again") from error
        if len(content) > limit:
            raise ValueError(
                f"{path} unpacks to more than {MOST_INFLATED} times its size, which no text does; "
                "fetch it again"
            )
    if b"\r" in content and b"\n" not in content:
        raise ValueError(
            f"{path} ends its lines with carriage returns alone, so all of it would be one line; "
            "convert it, for example with tr '\\r' '\\n'"
        )
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    decoded = []
    for number, line in enumerate(lines, start=1):
        if b"\0" in line:
            raise ValueError(
                f"{path}, line {number} has a zero byte: it is no text, or text in UTF-16; convert "
                "the file to UTF-8, for example with iconv"
            )
        try:
            decoded.append(line.decode("utf-8").strip())
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, line {number} is not UTF-8 ({error.reason} at byte {error.start}); "
                "convert the file, for example with iconv"
            ) from error
    return tuple(decoded)


def find_text(path: Path) -> Path | None:
    """`path` or, where it is not there, `path`.gz; None if neither is."""
    packed = path.with_name(f"{path.name}.gz")
    return path if path.is_file() else packed if packed.is_file() else None


def read_texts(
    folder: Path, split: str, languages: Sequence[str]
) -> tuple[dict[str, tuple[str, ...]], dict[str, int]]:
    """The sentences of `folder/split.LANGUAGE`, plain or gzipped.

    Returns:
      (language -> sentences, file -> number of its lines), for `require_aligned`.

    Raises:
      FileNotFoundError: a missing file, with the splits or languages that are there.
    """
    texts, counts = {}, {}
    for language in languages:
        path = find_text(folder / f"{split}.{language}")
        if path is None:
            raise _missing_text(folder, split, language)
        texts[language] = read_lines(path)
        counts[str(path)] = len(texts[language])
    return texts, counts


def _missing_text(folder: Path, split: str, language: str) -> FileNotFoundError:
    stems = [p.name.removesuffix(".gz").rpartition(".") for p in folder.iterdir() if p.is_file()]
    there = {code for stem, _, code in stems if stem == split}
    if there:
        rest = f"; of {split!r} there are the languages {listed(there)}"
    else:
        splits = {stem for stem, _, code in stems if stem and code != "txt"}
        rest = f"; there are the splits {listed(splits)}{did_you_mean(split, sorted(splits))}"
    return FileNotFoundError(
        f"no {folder / split}.{language} nor .{language}.gz{rest}; correct config.data.path, "
        "the split or the language, or add the file"
    )


def require_aligned(counts: Mapping[str, int]) -> None:
    """Raises ValueError, naming all files, unless all have the same number of lines."""
    if len(set(counts.values())) > 1:
        shown = "\n  ".join(f"{path}: {count}" for path, count in counts.items())
        raise ValueError(
            f"files that belong together have different numbers of lines:\n  {shown}\n"
            "fetch the odd one again; line i of each must be of the same example"
        )


def log_empty(corpus: Corpus) -> Corpus:
    """Says how many sentences are empty, if any is; returns the corpus."""
    for language, count in corpus.empty.items():
        if count:
            logging.warning(
                "%s: %d of %d sentences in %r are empty", corpus.name, count, len(corpus), language
            )
    return corpus


def listed(names: Sequence[str] | set[str]) -> str:
    """The first ten names in order, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return (", ".join(names[:10]) or "nothing") + more
