"""A stage's examples: encoder and decoder sentences, which side the features come from, and dropped
tokens (CLIPTrans, src/dataset.py and src/multi30k.py)."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float32, Int32

from cliptrans_jax.data.corpus import Corpus
from cliptrans_jax.stages import Side, Stage
from common_jax.config import Section
from common_jax.inputs.ragged import Picked, take
from common_jax.ranges import Fraction

Tokens = Sequence[np.ndarray]  # framed sentences, int32 ids; `Ragged` or `Picked` for large corpora


@dataclasses.dataclass(frozen=True)
class NoiseConfig(Section):
    """Dropping of tokens from the encoder's sentence. Captioning stages always drop.

    Attributes:
      mask_prob: probability of dropping a token; the language code and `</s>` are always kept, so 1
        leaves only these two.
      train, test: also drops tokens in translation stages, in training and in evaluation.
    """

    mask_prob: Fraction = 1.0
    train: bool = False
    test: bool = False


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples of a stage before tokens are dropped; all fields have one entry per example.

    Attributes:
      source, target: framed ids of the encoder and decoder sentences.
      side: whether features are of images or of texts.
      rows: each example's row of the corpus, for its picture, key and texts.
      languages: source and target language of each example; text features use the source.
      drops: whether source tokens are dropped.
    """

    source: Tokens
    target: Tokens
    side: Side
    rows: Int32[np.ndarray, " B"]
    languages: tuple[tuple[str, str], ...]
    drops: bool

    def __len__(self) -> int:
        return len(self.source)

    @property
    def read(self) -> list[str]:
        """The languages that the encoder reads."""
        return sorted({source for source, _ in self.languages})

    def of_rows_with_sentences(self, corpus: Corpus) -> "Examples":
        """Leaves out examples whose source or target sentence is missing from the corpus."""
        present = {pair: np.zeros(len(corpus), bool) for pair in set(self.languages)}
        for pair, marks in present.items():
            marks[corpus.rows_with(pair)] = True
        pairs = zip(self.languages, self.rows, strict=True)
        keep = np.flatnonzero(
            np.fromiter((present[pair][row] for pair, row in pairs), bool, len(self))
        )
        return dataclasses.replace(
            self,
            source=take(self.source, keep),
            target=take(self.target, keep),
            rows=self.rows[keep],
            languages=take(self.languages, keep),
        )

    def of_source(self, by_language: Mapping[str, Sequence[np.ndarray] | np.ndarray]) -> Picked:
        """Picks each example's entry, by its source language and row."""
        return Picked.of(by_language, [source for source, _ in self.languages], self.rows)

    def features(
        self,
        images: Float32[np.ndarray, "_ M"] | None,
        texts: Mapping[str, Float32[np.ndarray, "_ M"]],
    ) -> Picked:
        """Picks each example's feature from those of the whole corpus."""
        if self.side is Side.IMAGE:
            assert images is not None
            return Picked((images,), np.zeros(len(self), np.uint8), self.rows)
        return self.of_source(texts)


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
    """Makes the examples of a stage.

    Args:
      stage: an entry of STAGES.
      tokens: framed ids of a corpus by language.
      pair: source and target language.
      train: whether the examples are for training.
      noise: see NoiseConfig.
      side: overrides the side that features come from, in evaluation.
      caption_language: language of captions; "" for `default_caption_language`.
      all_languages: captions in both languages: an example per sentence of the target language,
        then one per sentence of the source language.

    Raises:
      ValueError: `all_languages` outside captioning.
    """
    size = len(tokens[pair[0]])
    if stage.captioning:
        single = caption_language or default_caption_language(pair)
        captions = (pair[1], pair[0]) if all_languages else (single,)
        languages = [pair for language in captions for pair in [(language, language)] * size]
        # In evaluation too: the encoder reads the target itself, whose words would give it away.
        drops = True
    elif all_languages:
        raise ValueError(
            "config.all_languages=True is for captioning stages: a translation has one target"
        )
    else:
        languages = [pair] * size
        drops = noise.train if train else noise.test
    # With captions in two languages, every row of the corpus makes two examples.
    rows = np.tile(np.arange(size, dtype=np.int32), len(languages) // size if size else 0)
    return Examples(
        source=Picked.of(tokens, [source for source, _ in languages], rows),
        target=Picked.of(tokens, [target for _, target in languages], rows),
        side=side or (stage.train if train else stage.test),
        rows=rows,
        languages=tuple(languages),
        drops=drops,
    )


def default_caption_language(pair: tuple[str, str]) -> str:
    """Returns English if the pair has it, else Spanish, else the source (as the original does)."""
    return next((language for language in ("en", "es") if language in pair), pair[0])


def empties_source(stage: Stage, noise: NoiseConfig) -> bool:
    """Returns True if training drops all of the encoder's sentence but its frame."""
    return (stage.captioning or noise.train) and noise.mask_prob == 1


def drop_tokens(
    ids: Int32[np.ndarray, " S"], draws: Float32[np.ndarray, " S"], mask_prob: float
) -> Int32[np.ndarray, " _"]:
    """Keeps the first and last token, and those whose uniform draw in [0, 1) is above `mask_prob`
    (mask_inputs_). Dropped tokens leave no gap."""
    return ids[keep_mask(draws, mask_prob)]


def keep_mask(draws: Float32[np.ndarray, " S"], mask_prob: float) -> Bool[np.ndarray, " S"]:
    """Returns True for tokens to keep."""
    # Strictly, as in the original: with mask_prob=0, a draw of exactly 0 still drops its token.
    keep = draws > np.float32(mask_prob)
    keep[0] = keep[-1] = True
    return keep


def pad(sentences: Tokens, length: int, *, pad_id: int) -> Int32[np.ndarray, "B S"]:
    """Returns sentences as the rows of one array, padded at the end.

    Raises:
      ValueError: a sentence longer than `length`.
    """
    padded = np.full((len(sentences), length), pad_id, np.int32)
    for row, ids in zip(padded, sentences, strict=True):
        if len(ids) > length:
            raise ValueError(
                f"a sentence has {len(ids)} tokens, and there is room for {length}; "
                "lower max_length of config.tokenizer or, for a text tower, of "
                "config.clip_tokenizer"
            )
        row[: len(ids)] = ids
    return padded
