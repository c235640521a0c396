"""The examples of a stage: which sentence goes to the encoder, which to the decoder, what features
are taken of, and which tokens are dropped (CLIPTrans, src/dataset.py and src/multi30k.py)."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float32, Int32

from cliptrans_jax.stages import Side, Stage
from common_jax.config import Section
from common_jax.ranges import Fraction

Tokens = Sequence[np.ndarray]  # int32 ids of sentences, framed


@dataclasses.dataclass(frozen=True)
class NoiseConfig(Section):
    """The tokens of the encoder's sentence that are dropped. Captioning stages drop always.

    Attributes:
      mask_prob: probability of dropping a token; the language code and `</s>` always stay, so 1
        leaves these two.
      train, test: whether translation drops tokens as well, in training and in evaluation.
    """

    mask_prob: Fraction = 1.0
    train: bool = False
    test: bool = False


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples of a stage, all of one length, before tokens are dropped.

    Attributes:
      source, target: framed ids of what the encoder reads and the decoder writes.
      side: what features are taken of.
      rows: the row of the corpus that each example is of; of its pictures, keys and texts.
      languages: source and target language of each example, which say whose text features.
      drops: whether tokens of the source are dropped.
    """

    source: Tokens
    target: Tokens
    side: Side
    rows: Int32[np.ndarray, "B"]
    languages: tuple[tuple[str, str], ...]
    drops: bool

    def __len__(self) -> int:
        return len(self.source)

    @property
    def read(self) -> list[str]:
        """The languages that the encoder reads."""
        return sorted({source for source, _ in self.languages})

    def of_source(
        self, by_language: Mapping[str, Sequence[np.ndarray] | np.ndarray]
    ) -> list[np.ndarray]:
        """For each example what its source sentence has, of arrays by language and row."""
        pairs = zip(self.languages, self.rows, strict=True)
        return [by_language[source][row] for (source, _), row in pairs]

    def features(
        self,
        images: Float32[np.ndarray, "_ M"] | None,
        texts: Mapping[str, Float32[np.ndarray, "_ M"]],
    ) -> Float32[np.ndarray, "_ M"]:
        """A feature an example, of features by row of the corpus."""
        if self.side is Side.IMAGE:
            assert images is not None
            return images[self.rows]
        return np.stack(self.of_source(texts))


def choose_examples(
    stage: Stage,
    tokens: Mapping[str, Tokens],
    *,
    pair: tuple[str, str],
    train: bool,
    noise: NoiseConfig,
    side: Side | None = None,
    caption_language: str = "",
    all_languages: bool = False,
) -> Examples:
    """The examples of a stage.

    Args:
      stage: of the table STAGES.
      tokens: framed ids of a corpus by language.
      pair: source and target language.
      train: whether they are for training.
      noise: see NoiseConfig.
      side: what features are taken of in place of the stage's choice; for evaluation.
      caption_language: what captioning stages write; "" as `default_caption_language`.
      all_languages: captioning in both languages: an example a sentence of the target language,
        then one a sentence of the source language.

    Raises:
      ValueError: `all_languages` outside captioning.
    """
    size = len(tokens[pair[0]])
    if stage.captioning:
        one = caption_language or default_caption_language(pair)
        written = (pair[1], pair[0]) if all_languages else (one,)
        languages = [(language, language) for language in written for _ in range(size)]
        drops = True
    elif all_languages:
        raise ValueError(
            "config.all_languages=True is for captioning stages: a translation has one target"
        )
    else:
        languages = [pair] * size
        drops = noise.train if train else noise.test
    rows = np.tile(np.arange(size, dtype=np.int32), len(languages) // size if size else 0)
    return Examples(
        source=[tokens[a][row] for (a, _), row in zip(languages, rows, strict=True)],
        target=[tokens[b][row] for (_, b), row in zip(languages, rows, strict=True)],
        side=side or (stage.train if train else stage.test),
        rows=rows,
        languages=tuple(languages),
        drops=drops,
    )


def default_caption_language(pair: tuple[str, str]) -> str:
    """English where it is of the pair, then Spanish, as in the original; else the source's."""
    return next((language for language in ("en", "es") if language in pair), pair[0])


def empties_source(stage: Stage, noise: NoiseConfig) -> bool:
    """True if training leaves nothing of the encoder's sentence but its frame."""
    return (stage.captioning or noise.train) and noise.mask_prob == 1


def drop_tokens(
    ids: Int32[np.ndarray, "S"], draws: Float32[np.ndarray, "S"], mask_prob: float
) -> Int32[np.ndarray, "_"]:
    """The tokens whose draw, uniform in [0, 1), is above `mask_prob`, and the first and last
    (mask_inputs_): dropped ones leave no gap."""
    return ids[keep_mask(draws, mask_prob)]


def keep_mask(draws: Float32[np.ndarray, "S"], mask_prob: float) -> Bool[np.ndarray, "S"]:
    """The tokens that stay."""
    kept = draws > np.float32(mask_prob)
    kept[0] = kept[-1] = True
    return kept


def pad(sentences: Tokens, length: int, *, pad_id: int) -> Int32[np.ndarray, "B S"]:
    """Sentences as rows of one array, with pads after them.

    Raises:
      ValueError: a sentence longer than `length`.
    """
    padded = np.full((len(sentences), length), pad_id, np.int32)
    for row, ids in zip(padded, sentences, strict=True):
        if len(ids) > length:
            raise ValueError(
                f"a sentence has {len(ids)} tokens, and there is room for {length}; "
                "lower max_length of config.tokenizer or, for what a text tower reads, of "
                "config.clip_tokenizer"
            )
        row[: len(ids)] = ids
    return padded
