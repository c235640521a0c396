"""M-CLIP's vectors, in one shared space, of sentences and pictures from files."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tqdm
from jax.sharding import Mesh
from jaxtyping import Float32

from cliptrans_jax.encoders import IMAGE_BATCH, TEXT_BATCH, whole_batch
from cliptrans_jax.lines import open_picture, read_sentences
from cliptrans_jax.resident import Resident
from cliptrans_jax.runs.finished import Finished, image_tower, text_tower
from common_jax.inputs.pictures import SUFFIXES, find_images

# Characters of a text that are stored. An array of texts gives each the room of the longest, four
# bytes per character; this is about the size of a vector.
LONGEST_TEXT = 1000


@dataclasses.dataclass(frozen=True)
class Item:
    """A sentence or a picture.

    Attributes:
      name: the picture's file, or the sentence's file and line.
      text: the sentence; "" for a picture.
      picture: the file, or None for a sentence.
    """

    name: str
    text: str = ""
    picture: Path | None = None


def list_items(paths: Sequence[str]) -> list[Item]:
    """Lists the sentences and pictures in files and folders, in order.

    Args:
      paths: text files with one sentence per line, whose blank lines are skipped; pictures,
        recognised by their suffix; folders, whose pictures at any depth are sorted by name, without
        hidden ones.

    Raises:
      FileNotFoundError: if a path does not exist.
      ValueError: for a folder without pictures, a text file without sentences, or text that is not
        UTF-8.
    """
    items = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}; give a text file, a picture or a folder")
        if path.is_dir():
            found = [Item(file, picture=Path(file)) for file in find_images(path)]
        elif path.suffix.lower() in SUFFIXES:
            found = [Item(str(path), picture=path)]
        else:
            found = [Item(line.place, line.text) for line in read_sentences(path) if line.text]
        if not found:
            expected = f"pictures ({', '.join(SUFFIXES)})" if path.is_dir() else "sentences"
            raise ValueError(f"{path} has no {expected}")
        items += found
    return items


def encode_items(
    run: Finished, items: Sequence[Item], mesh: Mesh
) -> tuple[list[Item], Float32[np.ndarray, "B M"]]:
    """The items and one vector for each, computed by a run's towers; pictures that cannot be read
    are left out, with a warning.

    Raises:
      ValueError: if no picture can be read, and there are no sentences.
    """
    # By row of `items`, in which sentences and pictures may alternate.
    vectors: dict[int, np.ndarray] = {}
    texts = [row for row, item in enumerate(items) if item.picture is None]
    pictures = [row for row, item in enumerate(items) if item.picture is not None]
    if texts:
        # No larger than needed, since a smaller set is padded to a batch.
        batch = whole_batch(min(len(texts), TEXT_BATCH), mesh)
        tower = Resident(text_tower(run, mesh), mesh, batch)
        found = tower.sentences([items[row].text for row in texts])
        vectors |= dict(zip(texts, found, strict=True))
    if pictures:
        batch = whole_batch(min(len(pictures), IMAGE_BATCH), mesh)
        tower = Resident(image_tower(run, mesh), mesh, batch)
        firsts = range(0, len(pictures), batch)
        # Batch by batch, so that the pixels of only one batch are in memory.
        for first in tqdm.tqdm(firsts, desc="pictures", unit="batch", disable=None):
            pixels = {}
            for row in pictures[first : first + batch]:
                try:
                    pixels[row] = open_picture(items[row].picture, items[row].name)
                except ValueError as error:
                    logging.warning("left out %s", error)
            if pixels:
                found = tower.pictures([*pixels.values()])
                vectors |= dict(zip(pixels, found, strict=True))
    if not vectors:
        raise ValueError(f"none of the {len(items)} pictures can be read; the warnings say why")
    rows = sorted(vectors)
    return [items[row] for row in rows], np.stack([vectors[row] for row in rows])


def as_arrays(items: Sequence[Item], vectors: Float32[np.ndarray, "B M"]) -> dict[str, np.ndarray]:
    """The vectors as `features`, with `names` and `texts` (empty for pictures, and no longer than
    LONGEST_TEXT)."""
    if cut := sum(len(item.text) > LONGEST_TEXT for item in items):
        logging.warning("%d texts are stored without what follows %d characters", cut, LONGEST_TEXT)
    return {
        "features": vectors,
        "names": np.array([item.name for item in items]),
        "texts": np.array([item.text[:LONGEST_TEXT] for item in items]),
    }
