"""The frozen towers, from sentences and pictures to features, which are computed once and
cached."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Int32, Int64

from cliptrans_jax.data.corpus import EVERY_PICTURE, Corpus, Images
from cliptrans_jax.data.examples import pad
from cliptrans_jax.data.pictures import prepare_picture
from cliptrans_jax.data.tokenizers.framing import Tokenizer
from cliptrans_jax.data.tokenizers.tokens import TokenizerConfig, encode_corpus, load_tokenizer
from cliptrans_jax.features import cached, encode_all, fingerprint
from cliptrans_jax.towers.table import tower_of
from common_jax import hosts
from common_jax.inputs import BadExample, eval_batches
from common_jax.inputs.ragged import Ragged, lengths_of, take
from common_jax.mesh import move_to_devices, replicated
from common_jax.weights.table import Pretrained

# Sentences are padded to multiples of this many tokens, so that few lengths are compiled.
BUCKET = 8
TEXT_BATCH, IMAGE_BATCH = 256, 128


@dataclasses.dataclass(frozen=True)
class TextTower:
    """Maps sentences to features.

    Attributes:
      config: sizes of a text tower in `TOWERS`.
      params: numpy arrays until features are computed, which moves them to the devices.
      tokenizer: tokenizes sentences for the tower; None if the tower only has shapes.
    """

    config: Any
    params: Mapping[str, Any]
    tokenizer: Tokenizer | None
    dtype: DTypeLike

    @classmethod
    def described(cls, config: Any, dtype: DTypeLike) -> "TextTower":
        """The tower with shapes instead of parameters."""
        return cls(config, tower_of(config).shapes(config), None, dtype)

    @property
    def longest(self) -> int:
        """Length in tokens of the longest sentence that the tower can read."""
        return self.config.longest

    def apply(
        self, params: Any, ids: Int[Array, "B S"], *, dropout: jax.Array | None = None
    ) -> Float[Array, "B M"]:
        """Features of padded framed ids."""
        tower = tower_of(self.config)
        return tower.apply(self.config, self.dtype, params, ids, dropout=dropout)

    def encode(
        self, ids: Sequence[np.ndarray], *, mesh: Mesh, title: str = "features"
    ) -> Float32[np.ndarray, "B M"]:
        """Computes one feature per framed sentence on all devices of the mesh.

        Sentences are sorted by length, so that batches contain little padding.

        Raises:
          ValueError: if there are no sentences, or one that the tower cannot read.
        """
        self._check(ids)
        order = by_length(ids)
        sorted_ids = take(ids, order)
        batches = _text_batches(sorted_ids, self.tokenizer.pad, self.longest, mesh)
        features = encode_all(
            self.apply_batch, self.params, batches, mesh=mesh, size=len(ids), title=title
        )
        # The argsort of a permutation is its inverse: back to the order of `ids`.
        return features[np.argsort(order)]

    def _check(self, ids: Sequence[np.ndarray]) -> None:
        """Raises ValueError for ids or lengths outside the embedding tables."""
        # On the devices, an id outside a table would give NaN, and nothing would name the sentence.
        vocab = self.config.vocab
        if len(ids) == 0:
            raise ValueError("no sentences to encode; give the ids of at least one")
        for place, sentence in enumerate(ids):
            sentence = np.asarray(sentence)
            if sentence.ndim != 1 or sentence.dtype.kind not in "iu":
                raise ValueError(
                    f"ids[{place}] must be the ids of a sentence, whole numbers (S,), and is "
                    f"{sentence.dtype} {sentence.shape}"
                )
            if not 1 <= len(sentence) <= self.longest:
                raise ValueError(
                    f"ids[{place}] has {len(sentence)} tokens, but the tower takes 1 to "
                    f"{self.longest}; lower max_length of config.clip_tokenizer or, for a tower of "
                    "a run, of config.tokenizer"
                )
            if sentence.min() < 0 or sentence.max() >= vocab:
                raise ValueError(
                    f"ids[{place}] has ids from {sentence.min()} to {sentence.max()}, but the "
                    f"tower has 0 to {vocab - 1}; use the tokenizer that it was trained with"
                )

    def apply_batch(self, params: Any, batch: Mapping[str, jax.Array]) -> Float[Array, "B M"]:
        """Features of one batch in `encode`."""
        return self.apply(params, batch["ids"])

    def batch_shapes(self, mesh: Mesh, *, tokens: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a global batch in `encode`, with sentences padded to `tokens`."""
        batch = whole_batch(TEXT_BATCH, mesh)
        return {
            "ids": jax.ShapeDtypeStruct((batch, min(tokens, self.longest)), np.int32),
            "_mask": jax.ShapeDtypeStruct((batch,), np.float32),
        }


@dataclasses.dataclass(frozen=True)
class ImageTower:
    """Maps pictures to features; fields as in `TextTower`."""

    config: Any
    params: Mapping[str, Any]
    dtype: DTypeLike

    @classmethod
    def described(cls, config: Any, dtype: DTypeLike) -> "ImageTower":
        """The tower with shapes instead of parameters."""
        return cls(config, tower_of(config).shapes(config), dtype)

    def apply(self, params: Any, images: Float[Array, "B I J 3"]) -> Float[Array, "B M"]:
        """Features of prepared pictures."""
        return tower_of(self.config).apply(self.config, self.dtype, params, images)

    def prepare(self, image: np.ndarray) -> Float32[np.ndarray, "I J 3"]:
        """A picture resized and normalised for the tower; see `prepare_picture`."""
        return prepare_picture(image, self.config.image, tower_of(self.config).pictures)

    def apply_batch(self, params: Any, batch: Mapping[str, jax.Array]) -> Float[Array, "B M"]:
        """Features of a batch of prepared examples."""
        return self.apply(params, batch["image"])

    def batch_shapes(self, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a global batch of prepared pictures."""
        batch, side = whole_batch(IMAGE_BATCH, mesh), self.config.image
        return {
            "image": jax.ShapeDtypeStruct((batch, side, side, 3), np.float32),
            "_mask": jax.ShapeDtypeStruct((batch,), np.float32),
        }

    def prepare_example(self, example: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """An example with its picture prepared."""
        return {"image": self.prepare(example["image"])}


def published_text(
    published: Pretrained, tokenizer: TokenizerConfig, *, dtype: DTypeLike
) -> TextTower:
    """A published text tower with its tokenizer, which truncates sentences to the tower's
    positions.

    Raises:
      ValueError: if the tokenizer is not the tower's.
    """
    config, tower = published.config, f"config.sources.clip_text={published.source!r}"
    if tokenizer.kind != (expected := tower_of(config).sentences.tokenizer):
        raise ValueError(
            f"config.clip_tokenizer.kind={tokenizer.kind!r} is not for {tower}, a tower of kind "
            f"{published.kind!r}; set it to {expected!r}, and config.clip_tokenizer.path to the "
            "folder of its tokenizer"
        )
    cut = dataclasses.replace(tokenizer, max_length=min(tokenizer.limit, config.longest))
    read = load_tokenizer(cut, key="config.clip_tokenizer")
    if read.vocab != config.vocab:
        raise ValueError(
            f"config.clip_tokenizer.path={tokenizer.path!r} has {read.vocab} tokens, but the table "
            f"of the text tower in {tower} has {config.vocab} rows; give the folder of the "
            "tokenizer that the tower was trained with"
        )
    return TextTower(config, published.params, read, dtype)


def text_features(
    tower: TextTower, corpus: Corpus, language: str, *, folder: epath.PathLike, mesh: Mesh
) -> Float32[np.ndarray, "B M"]:
    """One feature per sentence of a language; read from `folder` if it has them, of the same tower
    and sentences."""
    # Not only for encoding: the devices also compute the checksums of the weights.
    move_to_devices(tower.params, replicated(mesh))
    ids = encode_corpus(tower.tokenizer, corpus, language, frame=None, folder=folder)
    content = fingerprint(tower.params, *_settings(tower), *_bytes(ids))
    title = f"features of {corpus.name}, {language}"
    return cached(
        folder,
        f"{corpus.slug}.{language}",
        content,
        lambda: tower.encode(ids, mesh=mesh, title=title),
    )


def image_features(
    tower: ImageTower, corpus: Corpus, *, folder: epath.PathLike, mesh: Mesh, workers: int = 0
) -> Float32[np.ndarray, "B M"]:
    """One feature per example; read from `folder` if it has them, of the same tower and pictures.

    A picture that several examples share, such as one of COCO with five captions, is encoded once.

    Args:
      workers: processes that load and preprocess pictures; 0 for this process.

    Raises:
      ValueError: if the corpus has no pictures, or one is missing or cannot be read.
    """
    images = corpus.require_all_images()
    place: dict[str, int] = {}  # name of a picture -> its row among the encoded ones
    rows = np.array([place.setdefault(images.name(row), len(place)) for row in range(len(images))])
    firsts = np.unique(rows, return_index=True)[1]  # the first example with each picture

    def compute() -> Float32[np.ndarray, "B M"]:
        batches = eval_batches(
            _Pictures(images, firsts),
            transform=tower.prepare_example,
            batch=whole_batch(min(len(firsts), IMAGE_BATCH), mesh),
            shard=hosts.shard(),
            workers=workers,
            way_out=EVERY_PICTURE,
        )
        title = f"features of {corpus.name}, pictures"
        return encode_all(
            tower.apply_batch, tower.params, batches, mesh=mesh, size=len(firsts), title=title
        )

    move_to_devices(tower.params, replicated(mesh))
    keys = (corpus.keys[row] for row in firsts)
    content = fingerprint(tower.params, *_settings(tower), *_samples(images), *keys)
    features = cached(folder, f"{corpus.slug}.pictures", content, compute)
    return features if len(firsts) == len(rows) else features[rows]


@dataclasses.dataclass(frozen=True)
class _Pictures:
    """The pictures of a corpus at `rows`. `arrays` is None, so that they are read one by one."""

    images: Images
    rows: Int[np.ndarray, " B"]

    arrays = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"image": self.images[int(self.rows[index])]}


def by_length(ids: Sequence[np.ndarray]) -> Int[np.ndarray, " B"]:
    """Indices of sentences from the shortest to the longest; the order is stable."""
    return np.argsort(lengths_of(ids), kind="stable")


def _text_batches(
    ids: Sequence[np.ndarray], pad_id: int, room: int, mesh: Mesh
) -> Iterator[dict[str, np.ndarray]]:
    """This host's rows of each batch, padded to the batch's longest sentence, at most to `room`."""
    batch = whole_batch(min(len(ids), TEXT_BATCH), mesh)
    count = batch // jax.process_count()
    first_row = jax.process_index() * count
    for first in range(0, len(ids), batch):
        part = list(ids[first : first + batch])
        # Of the whole batch, so that all hosts pad to the same length.
        length = min(-(-max(map(len, part)) // BUCKET) * BUCKET, room)
        real = np.arange(batch) < len(part)
        part += [part[-1]] * (batch - len(part))
        rows = slice(first_row, first_row + count)
        yield {
            "ids": pad(part[rows], length, pad_id=pad_id),
            "_mask": real[rows].astype(np.float32),
        }


def whole_batch(count: int, mesh: Mesh) -> int:
    """The smallest batch size of at least `count` that is a multiple of the number of devices."""
    return -(-count // mesh.size) * mesh.size


def _settings(tower: TextTower | ImageTower) -> list[str]:
    """What features depend on besides weights and inputs, for the fingerprint."""
    precision = jax.config.jax_default_matmul_precision  # config.matmul_precision sets it
    return [repr(tower.config), str(tower.dtype), *([precision] if precision else [])]


def _bytes(ids: Ragged) -> tuple[Int32[np.ndarray, " _"], Int64[np.ndarray, " B"]]:
    """Arrays that identify the sentences: their ids and lengths."""
    return ids.flat, ids.lengths.astype(np.int64)


def _samples(images: Images) -> list[np.ndarray]:
    """The pixels of three pictures, to detect other files under the same names. Reading all of them
    would take as long as computing their features."""
    places = sorted({0, len(images) // 2, len(images) - 1})
    try:
        return [images[index] for index in places]
    except BadExample as bad:
        raise ValueError(f"a picture cannot be read: {bad}; {EVERY_PICTURE}") from bad
