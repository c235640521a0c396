"""The stages of CLIPTrans as values of one table (paper, section 3; src/main.py).

A stage is a kind of run that trains. The table's order is that of a pipeline.
"""

import dataclasses
import enum
import types
from collections.abc import Mapping
from typing import Any

from cliptrans_jax.translators.table import TRANSLATORS
from cliptrans_jax.translators.translator import Architecture


class Side(enum.Enum):
    """The side of a pair that a CLIP feature is taken of."""

    IMAGE = "image"
    TEXT = "text"  # of the sentence that the encoder reads


class Trains(enum.Enum):
    """The network that a stage trains."""

    TOWERS = "towers"  # both, from pairs of a text and a picture
    TRANSLATOR = "translator"


# Sections and fields of the config that stages read.
TOWERS = ("clip", "augment")
MODEL = (
    "parity", "model", "noise", "test_side", "decode", "sources", "clip_tokenizer", "features",
    "keep_text_features",
)  # fmt: skip
CHOOSE = ("batching", "label_chunk", "valid_decode", "valid_beams")
TRAIN = ("optim", "label_smoothing", *CHOOSE)
CAPTION = ("freeze", "caption_language", "all_languages")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A kind of run that trains.

    Attributes:
      trains: the network that it trains.
      reads: sections and fields of the config that it reads, beside those of every run; a flag of
        any other changes nothing.
      evaluators: keys of `evaluators.table.EVALUATORS`, which its validation set is evaluated by.
      train, test: of the translator's stages: what features are taken of in training and in
        evaluation.
      captioning: the encoder reads the target itself, with its tokens dropped, and not its source
        language's sentence; such a stage comes first.
      unfreezes_tower: whether config.unfreeze_clip may train the text tower too. It cannot learn
        from pictures.
      parity_looks: whether the original's evaluation takes features of pictures whenever tokens of
        the test sentences are dropped.
    """

    trains: Trains
    reads: tuple[str, ...]
    evaluators: tuple[str, ...]
    train: Side = Side.TEXT
    test: Side = Side.TEXT
    captioning: bool = False
    unfreezes_tower: bool = False
    parity_looks: bool = False


STAGES: Mapping[str, Stage] = types.MappingProxyType(
    {
        "clip": Stage(
            Trains.TOWERS,
            # Its tokenizer is the translation model's, and as long as its positions allow.
            (
                *TOWERS, "optim", "model.mapper.prefix", "model.translator",
                *(f"model.{name}.{key}" for name in TRANSLATORS for key in ("vocab", "positions")),
            ),
            ("retrieval",),
        ),
        "caption": Stage(
            Trains.TRANSLATOR,
            (*MODEL, *TRAIN, *CAPTION),
            ("labels", "translations"),
            train=Side.IMAGE,
            test=Side.IMAGE,
            captioning=True,
        ),
        "text_recon": Stage(
            Trains.TRANSLATOR,
            (*MODEL, *TRAIN, *CAPTION),
            ("labels", "translations"),
            captioning=True,
        ),
        "translate": Stage(
            Trains.TRANSLATOR,
            (*MODEL, *TRAIN, "unfreeze_clip"),
            ("labels", "translations"),
            unfreezes_tower=True,
            parity_looks=True,
        ),
        "triplet": Stage(
            Trains.TRANSLATOR,
            (*MODEL, *TRAIN),
            ("labels", "translations"),
            train=Side.IMAGE,
        ),
    }
)  # fmt: skip
TRANSLATION_STAGES: Mapping[str, Stage] = types.MappingProxyType(
    {name: stage for name, stage in STAGES.items() if stage.trains is Trains.TRANSLATOR}
)
SCORED_AS = "translate"  # the stage whose sentences and features a run of "evaluate" reads


def trains(stage: Any) -> Trains | None:
    """The network that a kind of run trains; None for one that is no stage."""
    known = STAGES.get(stage) if isinstance(stage, str) else None
    return None if known is None else known.trains


# The parts of the translator that captioning stages leave as they are, as fields of its
# `Architecture`. The original freezes the encoder, and with it the embedding that encoder, decoder
# and output share.
FREEZES = {
    "encoder": ("embedding", "encoder"),
    "encoder_layers": ("encoder",),
    "nothing": (),
}


def trainable(stage: Stage, freeze: str, architecture: Architecture) -> str:
    """Regex of the paths of the parameters that a stage updates.

    Args:
      stage: of the table.
      freeze: a key of FREEZES; of captioning stages alone.
      architecture: of the translator.
    """
    frozen = ["buffers"]
    if stage.captioning:
        frozen.extend(FREEZES[freeze])
    paths = "|".join(getattr(architecture, part) for part in frozen)
    return rf"(?!{architecture.subtree}/({paths})$).+"
