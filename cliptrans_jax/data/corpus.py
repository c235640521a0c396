"""A corpus: sentences aligned across languages, with one picture per example if it has pictures."""

import dataclasses
import functools
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from common_jax.config import did_you_mean
from common_jax.inputs import BadExample
from common_jax.inputs.names import listed
from common_jax.inputs.pictures import decode_picture, read_file
from common_jax.inputs.ragged import Lines, lengths_of
from common_jax.inputs.texts import find_text, read_lines

PICTURES = "pictures"  # suffix of a file with the names of pictures
# What an error about pictures that features lack advises, with the reason.
EVERY_PICTURE = "a stage with features needs every picture: repair it, or drop its row"
TEXTS_ALONE = "only its texts were loaded; load it with with_images=True"


@runtime_checkable
class Images(Protocol):
    """Random access to the pictures of a corpus, example by example."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns uint8 (I, J, 3) RGB of any size; raises BadExample if it cannot be read."""
        ...

    def name(self, index: int) -> str:
        """Returns the file or emoji of picture `index`, for messages."""
        ...


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The examples of one split; entry i of every sequence belongs to example i.

    Attributes:
      name: name in messages, such as "multi30k test_2016_flickr".
      texts: sentences by language, as `Lines` if read from files. A missing sentence is empty.
      images: the pictures, or None.
      keys: a name per example: an image file, an emoji, or a file's line.
      no_images: the reason why `images` is None.
      sparse: whether examples may lack sentences; a pair that lacks one is then neither trained on
        nor scored. Otherwise an empty sentence counts as a sentence.
    """

    name: str
    texts: Mapping[str, Sequence[str]]
    images: Images | None
    keys: Sequence[str]
    no_images: str = TEXTS_ALONE
    sparse: bool = False

    def __post_init__(self):
        counts = {language: len(sentences) for language, sentences in self.texts.items()}
        counts |= {"keys": len(self.keys)}
        counts |= {"images": len(self.images)} if self.images is not None else {}
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"{self.name} is not aligned: entry i of all of {counts} must belong to example i, "
                "so their loader must return equally many"
            )

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def slug(self) -> str:
        """`name` in a form that can start a file name."""
        return "_".join(self.name.split())

    @functools.cached_property
    def empty(self) -> dict[str, int]:
        """Number of empty sentences by language."""
        return {
            language: int(np.sum(lengths_of(texts) == 0)) for language, texts in self.texts.items()
        }

    def rows_with(self, languages: Collection[str]) -> Int[np.ndarray, " _"]:
        """Returns the examples to train on and score: those with a sentence in every language, or
        all if the corpus is not sparse."""
        if not self.sparse:
            return np.arange(len(self))
        present = [lengths_of(self.texts[code]) > 0 for code in languages]
        return np.flatnonzero(np.all(present, axis=0))

    def require_sentences(self, languages: Sequence[str], *, reader: str) -> None:
        """Raises ValueError if any of the languages has no sentence at all.

        `reader` names what needs them, such as "stage 'translate'".
        """
        if not len(self):
            raise ValueError(
                f"{self.name} is empty: it has no sentence in "
                f"{' or '.join(map(repr, self.texts))}, which {reader} needs; use another split or "
                "another config.data"
            )
        for language in languages:
            if self.empty[language] == len(self):
                present = [code for code, count in self.empty.items() if count < len(self)]
                pictured = self.sparse and self.images is not None
                among = " among its examples with a picture" if pictured else ""
                raise ValueError(
                    f"{self.name} has no sentence in {language!r}{among}, which {reader} needs, "
                    f"only in {', '.join(present) or 'none'}; use another config.data or, for "
                    "captions in one language, set config.caption_language"
                )

    def require_images(self) -> Images:
        """Returns the pictures.

        Raises:
          ValueError: there are none; the message says why.
        """
        if self.images is None:
            raise ValueError(f"{self.name} has no images: {self.no_images}")
        return self.images

    def require_all_images(self) -> Images:
        """Returns the pictures; raises ValueError if there are none, or if a file is missing."""
        images = self.require_images()
        if isinstance(images, FolderImages) and images.missing:
            raise ValueError(
                f"{self.name} lacks {len(images.missing)} of {len(set(images.names))} pictures: "
                f"{listed(map(images.path, images.missing))}; {EVERY_PICTURE}"
            )
        return images


@dataclasses.dataclass(frozen=True)
class Numbered(Sequence):
    """Keys of unnamed examples: the split and the line number."""

    split: str
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[row] for row in range(self.size)[index])
        # Made on access, since a corpus may have millions of lines.
        return f"{self.split}:{range(1, self.size + 1)[index]}"


@dataclasses.dataclass(frozen=True)
class FolderImages:
    """Image files of a folder, decoded on access; `missing` has the names of those that were not
    there when it was listed."""

    root: Path
    names: Sequence[str]
    missing: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.path(self.names[index])

    def path(self, name: str) -> str:
        """Returns the file with a name of `names`."""
        return os.path.join(self.root, name)  # a name may be an absolute path

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            return np.asarray(decode_picture(read_file(self.name(index)), channels=3))
        # Not fatal as such: whoever reads a set counts bad examples, and decides how many to allow.
        except (OSError, ValueError) as error:
            raise BadExample(self.name(index), f"{type(error).__name__}: {error}") from error


def open_folder(roots: Sequence[Path], names: Sequence[str]) -> tuple[FolderImages | None, str]:
    """Opens the images `names`, each in the first of the folders `roots` that has it.

    Names may include subfolders. Missing files are counted in one log line, and raise BadExample on
    access.

    Returns:
      (images, "") or (None, the reason why there are none).
    """
    # Each folder is listed once, instead of testing perhaps a hundred thousand files one by one.
    main, missing, elsewhere = None, set(names), {}
    for root in roots:
        if not missing:
            break
        present = set()
        folders = {name.rpartition("/")[0] for name in missing}
        for folder in filter(lambda folder: (root / folder).is_dir(), folders):
            prefix = f"{folder}/" if folder else ""
            present |= {f"{prefix}{entry.name}" for entry in os.scandir(root / folder)}
        if found := missing & present:
            missing -= found
            if main is None:
                main = root
            else:  # absolute paths need no folder
                elsewhere |= {name: os.path.abspath(root / name) for name in found}
    if main is not None:
        if missing:
            where = " or ".join(map(str, roots))
            logging.warning("%s lacks %d images: %s", where, len(missing), listed(missing))
        if elsewhere:
            names = tuple(elsewhere.get(name, name) for name in names)
        return FolderImages(main, names, sorted(missing)), ""
    where = " or ".join(map(str, roots))
    example = f", such as {names[0]}," if names else ""
    return None, f"none of the {len(names)} images{example} is in {where}"


def read_texts(
    folder: Path, split: str, languages: Sequence[str]
) -> tuple[dict[str, Lines], dict[str, int]]:
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
    present = {code for stem, _, code in stems if stem == split and code != PICTURES}
    if present:
        hint = f"{split!r} has the languages {listed(present)}"
    else:
        splits = {stem for stem, _, code in stems if stem and code != "txt"}
        hint = f"there are the splits {listed(splits)}{did_you_mean(split, sorted(splits))}"
        if not splits:
            files = listed(p.name for p in folder.iterdir() if p.is_file()) or "no files"
            hint = f"files must be named SPLIT.LANGUAGE, plain or .gz, and there are {files}"
    return FileNotFoundError(
        f"no {folder / split}.{language} or .{language}.gz; {hint}; correct config.data.path, "
        "the split or the language, or add the file"
    )


def require_aligned(counts: Mapping[str, int]) -> None:
    """Raises ValueError, listing all files, unless they have the same number of lines."""
    if len(set(counts.values())) > 1:
        lines = "\n  ".join(f"{path}: {count}" for path, count in counts.items())
        raise ValueError(
            f"files that belong together have different numbers of lines:\n  {lines}\n"
            "fetch the odd one again; line i of each must belong to the same example"
        )


def log_empty(corpus: Corpus) -> Corpus:
    """Logs the number of empty sentences, if there are any; returns the corpus."""
    for language, count in corpus.empty.items():
        if count:
            logging.warning(
                "%s: %d of %d sentences in %r are empty", corpus.name, count, len(corpus), language
            )
    return corpus
