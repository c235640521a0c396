"""The stages of CLIPTrans, as one table (paper, section 3; src/main.py).

A stage is a kind of training run. The pipeline runs them in the table's order.
"""

import dataclasses
import enum
import types
from collections.abc import Mapping
from typing import Any

from cliptrans_jax.translators.table import TRANSLATORS
from cliptrans_jax.translators.translator import Architecture
from common_jax.run_config import PIPELINE as PIPELINE


class Side(enum.Enum):
    """The side of a pair that CLIP features are computed from."""

    IMAGE = "image"
    TEXT = "text"  # the sentence that the encoder reads


class Trains(enum.Enum):
    """The network that a stage trains."""

    TOWERS = "towers"  # both towers, on text-picture pairs
    TRANSLATOR = "translator"


# Config sections and fields that several stages read.
TOWERS = ("clip", "augment")
LOCKED = (
    *(f"sources.{name}" for name in ("clip_text", "clip_text_base", "clip_activation", "weights")),
    *("sources.fetch", "clip_tokenizer", "features"),
)
MODEL = (
    "parity", "model", "noise", "test_side", "decode", "sources", "clip_tokenizer", "features",
    "keep_text_features",
)  # fmt: skip
VALIDATION = ("batching", "label_chunk", "valid_decode", "valid_beams")
TRAIN = ("optim", "label_smoothing", *VALIDATION)
CAPTION = ("freeze", "caption_language", "all_languages")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A kind of training run.

    Attributes:
      trains: the network that it trains.
      reads: config sections and fields that it reads, in addition to those that every run reads;
        other flags have no effect.
      evaluators: keys of `evaluators.table.EVALUATORS`, run on its validation set.
      train, test: for stages that train a translator: the side that features are computed from, in
        training and in evaluation.
      captioning: whether the encoder reads the target itself with dropped tokens, instead of a
        sentence in the source language; such a stage comes first.
      unfreezes_tower: whether config.unfreeze_clip may also train the text tower, which cannot
        learn from pictures.
      parity_pictures: whether the original evaluates with pictures when test tokens are dropped.
    """

    trains: Trains
    reads: tuple[str, ...]
    evaluators: tuple[str, ...]
    train: Side = Side.TEXT
    test: Side = Side.TEXT
    captioning: bool = False
    unfreezes_tower: bool = False
    parity_pictures: bool = False


STAGES: Mapping[str, Stage] = types.MappingProxyType(
    {
        "clip": Stage(
            Trains.TOWERS,
            # Unless a published text tower stays frozen, the tokenizer is the translation model's,
            # and limited by that model's positions.
            (
                *TOWERS, *LOCKED, "optim", "model.mapper.prefix", "model.translator",
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
            parity_pictures=True,
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
# The other two kinds of run: PIPELINE, all stages in order, and scoring a trained model.
EVALUATE = "evaluate"
SCORED_AS = "translate"  # the stage whose sentences and features an evaluation reads


def trains(stage: Any) -> Trains | None:
    """The network that a run of one stage trains; None for the other kinds of run."""
    known = STAGES.get(stage) if isinstance(stage, str) else None
    return None if known is None else known.trains


# The files that mark a run as finished, by the network that it trains; None is an evaluation.
_OUTCOMES = {
    Trains.TOWERS: ("result.json",),
    Trains.TRANSLATOR: ("result.json", "scores.json"),
    None: ("scores.json",),
}


def outcomes(stage: Any) -> tuple[str, ...]:
    """The files that mark a run of one stage as finished."""
    return _OUTCOMES[trains(stage)]


# What captioning stages freeze, as fields of the translator's `Architecture`. The original freezes
# the encoder and the embedding, which encoder, decoder and output layer share.
FREEZES = {"encoder": ("embedding", "encoder"), "encoder_layers": ("encoder",), "nothing": ()}


def trainable(stage: Stage, freeze: str, architecture: Architecture) -> str:
    """Regex of the paths of the parameters that a stage updates.

    Args:
      stage: a value of STAGES.
      freeze: a key of FREEZES; used by captioning stages only.
      architecture: the translator's record.
    """
    frozen = [architecture.buffers]
    if stage.captioning:
        frozen.extend(getattr(architecture, part) for part in FREEZES[freeze])
    paths = "|".join(filter(None, frozen))
    return rf"(?!{architecture.subtree}/({paths})$).+"
