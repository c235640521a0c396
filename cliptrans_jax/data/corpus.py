"""A corpus: aligned sentences in several languages, with a picture each where there are any."""

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
MOST_INFLATED = 200  # largest ratio of a text to its gzip file


@runtime_checkable
class Images(Protocol):
    """Random access to the pictures of a corpus, example by example."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns uint8 (I, J, 3) RGB of any size; raises BadExample where it cannot be read."""
        ...

    def name(self, index: int) -> str:
        """Returns file or emoji of picture `index`, for messages."""
        ...


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Examples of one split; entry i of all sequences belongs to example i.

    Attributes:
      name: name in messages, such as "multi30k test_2016_flickr".
      texts: sentences by language. A missing sentence is an empty one.
      images: the pictures, or None.
      keys: a name per example: an image file, an emoji, or a file's line.
      no_images: the reason why `images` is None.
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
        """Number of empty sentences by language."""
        return {language: texts.count("") for language, texts in self.texts.items()}

    def require_sentences(self, languages: Sequence[str], *, reader: str) -> None:
        """Raises ValueError where one of the languages has no sentence.

        `reader` reads or writes them, such as "stage 'translate'".
        """
        for language in languages:
            if len(self) and self.empty[language] == len(self):
                present = [code for code, count in self.empty.items() if count < len(self)]
                raise ValueError(
                    f"{self.name} has no sentence in {language!r}, which {reader} needs, only in "
                    f"{', '.join(present) or 'none'}; use another config.data or, for captions "
                    "in one language, set config.caption_language"
                )

    def require_images(self) -> Images:
        """Returns the pictures.

        Raises:
          ValueError: there are none; the message gives the reason.
        """
        if self.images is None:
            raise ValueError(f"{self.name} has no images: {self.no_images}")
        return self.images


@dataclasses.dataclass(frozen=True)
class FolderImages:
    """Image files of a folder, decoded on access."""

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
    """Opens the images `names` in the first of the folders `roots` that has any of them.

    Names may have folders of their own. A file that is missing there is counted in a log line, and
    raises BadExample on access.

    Returns:
      (images, "") or (None, the reason why there are none).
    """
    folders = {name.rpartition("/")[0] for name in names}
    for root in roots:
        present = set()
        for folder in filter(lambda folder: (root / folder).is_dir(), folders):
            prefix = f"{folder}/" if folder else ""
            present |= {f"{prefix}{entry.name}" for entry in os.scandir(root / folder)}
        missing = [name for name in names if name not in present]
        if len(missing) < len(names):
            if missing:
                logging.warning("%s lacks %d images: %s", root, len(missing), listed(missing))
            return FolderImages(root, tuple(names)), ""
    where = " or ".join(map(str, roots))
    example = f", such as {names[0]}," if names else ""
    return None, f"none of the {len(names)} images{example} is in {where}"


def read_lines(path: Path) -> tuple[str, ...]:
    """Reads the lines of a UTF-8 text file, plain or gzipped (by its name), and strips them.

    Only a line feed ends a line, since a sentence may contain any other separator of Unicode.

    Raises:
      ValueError: a line that is not UTF-8 or has a zero byte, with its number; lines that end with
        carriage returns alone; a damaged gzip file.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        limit = MOST_INFLATED * len(content) + 1024
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
                content = file.read(limit + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{path} is not a complete gzip file ({error}); fetch it again"
            ) from error
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
                f"{path}, line {number} has a zero byte: it is not text, or text in UTF-16; "
                "convert the file to UTF-8, for example with iconv"
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
    """Returns `path` or, if that does not exist, `path`.gz; None if neither does."""
    packed = path.with_name(f"{path.name}.gz")
    return path if path.is_file() else packed if packed.is_file() else None


def read_texts(
    folder: Path, split: str, languages: Sequence[str]
) -> tuple[dict[str, tuple[str, ...]], dict[str, int]]:
    """Reads the sentences of `folder/split.LANGUAGE`, plain or gzipped.

    Returns:
      Sentences by language, and numbers of lines by file, for `require_aligned`.

    Raises:
      FileNotFoundError: a missing file; the message lists the splits or languages present.
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
    present = {code for stem, _, code in stems if stem == split}
    if present:
        hint = f"{split!r} has the languages {listed(present)}"
    else:
        splits = {stem for stem, _, code in stems if stem and code != "txt"}
        hint = f"there are the splits {listed(splits)}{did_you_mean(split, sorted(splits))}"
    return FileNotFoundError(
        f"no {folder / split}.{language} or .{language}.gz; {hint}; correct config.data.path, "
        "the split or the language, or add the file"
    )


def require_aligned(counts: Mapping[str, int]) -> None:
    """Raises ValueError, with all files, unless all have the same number of lines."""
    if len(set(counts.values())) > 1:
        lines = "\n  ".join(f"{path}: {count}" for path, count in counts.items())
        raise ValueError(
            f"files that belong together have different numbers of lines:\n  {lines}\n"
            "fetch the odd one again; line i of each must be of the same example"
        )


def log_empty(corpus: Corpus) -> Corpus:
    """Logs the number of empty sentences, if there are any; returns the corpus."""
    for language, count in corpus.empty.items():
        if count:
            logging.warning(
                "%s: %d of %d sentences in %r are empty", corpus.name, count, len(corpus), language
            )
    return corpus


def listed(names: Sequence[str] | set[str]) -> str:
    """Returns the first ten names in order and the number of the others."""
    names = sorted(names)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return (", ".join(names[:10]) or "nothing") + more
