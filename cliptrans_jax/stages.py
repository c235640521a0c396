"""The four stages of CLIPTrans as values of one table (paper, section 3; src/main.py).

A stage is a kind of run: what the CLIP feature is taken of, what the encoder reads, what the
decoder writes, and what stays as it is.
"""

import dataclasses
import enum

from cliptrans_jax.translators.translator import Architecture


class Side(enum.Enum):
    """What a CLIP feature is taken of."""

    IMAGE = "image"
    TEXT = "text"  # of the sentence that the encoder reads


@dataclasses.dataclass(frozen=True)
class Stage:
    """A kind of run.

    Attributes:
      train, test: what features are taken of in training and in evaluation.
      captioning: the encoder reads the target itself, with its tokens dropped, and not its source
        language's sentence; such a stage comes first.
    """

    train: Side
    test: Side
    captioning: bool


STAGES = {
    "caption": Stage(train=Side.IMAGE, test=Side.IMAGE, captioning=True),
    "text_recon": Stage(train=Side.TEXT, test=Side.TEXT, captioning=True),
    "translate": Stage(train=Side.TEXT, test=Side.TEXT, captioning=False),
    "triplet": Stage(train=Side.IMAGE, test=Side.TEXT, captioning=False),
}

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
