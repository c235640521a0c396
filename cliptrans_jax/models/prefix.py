"""The place of a prefix among a decoder's slots, and which slots attend to which (CLIPTrans,
src/models/model.py and its change to the decoder).

Training reads `</s>`, the prefix, the language code and the words. The published decoding reads
the prefix first and `</s>` after it; by default ours reads what training did.
"""

import dataclasses
from typing import Annotated

from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from common_jax.config import Section
from common_jax.ranges import one_of

IGNORED = -1

LAYOUTS = ("training", "original")
MASKS = ("prefix", "original")
ORIGINAL_KEYS = 10  # the original's mask opens slots 1 to 10, whatever the prefix


@dataclasses.dataclass(frozen=True)
class PrefixConfig(Section):
    """Layout and mask of a prefix.

    Attributes:
      layout: what decoding starts with: "training", `</s>` and then the prefix, or "original", the
        prefix and then `</s>`.
      mask: which slots attend to later ones: "prefix", those of the prefix to each other, or
        "original", slots 1 to 10, even where these hold words or pads. The two agree for a prefix
        of 10.
    """

    layout: Annotated[str, one_of(*LAYOUTS)] = "training"
    mask: Annotated[str, one_of(*MASKS)] = "prefix"


def insert(
    embeddings: Float[Array, "B T D"], prefix: Float[Array, "B P D"]
) -> Float[Array, "B T+P D"]:
    """The prefix after the first slot, as the decoder reads it in training."""
    # The first slot, `</s>`, predicts the language code whatever the features are; from the second
    # label on every prediction attends to the prefix.
    return jnp.concatenate([embeddings[:, :1], prefix, embeddings[:, 1:]], axis=1)


def insert_ignored(labels: Int[Array, "B T"], count: int) -> Int[Array, "B T+{count}"]:
    """Labels for `insert`ed embeddings: those of the prefix are ignored."""
    ignored = jnp.full((labels.shape[0], count), IGNORED, labels.dtype)
    return jnp.concatenate([labels[:, :1], ignored, labels[:, 1:]], axis=1)


def remove(hidden: Float[Array, "B T D"], count: int) -> Float[Array, "B T-{count} D"]:
    """`insert` backwards: states without those of the prefix, none of which predicts a label."""
    # Removed before the projection to the vocabulary, the widest product of a step.
    return jnp.concatenate([hidden[:, :1], hidden[:, 1 + count :]], axis=1)


def visibility(mask: Bool[Array, "B T"], *, count: int, rule: str) -> Bool[Array, "B 1 T T"]:
    """The slots (last axis) that each slot attends to: no later ones, none outside `mask`, and

    "prefix": slots 1 to `count` attend to each other;
    "original": all slots but the first attend to slots 1 to 10, whatever `mask` says.
    """
    length = mask.shape[1]
    slots = jnp.arange(length)
    query, key = slots[:, None], slots[None, :]
    earlier = (key <= query) & mask[:, None, None, :]
    if rule == "original":
        # Not cut by `mask`: with a shorter prefix, early words see later words and pads.
        return earlier | ((query >= 1) & (key >= 1) & (key <= ORIGINAL_KEYS))
    # All vectors of the prefix come from one feature and none is predicted from another, so there
    # is no later one to hide.
    within = (query >= 1) & (key >= 1) & (key <= count)
    return earlier | (within & mask[:, None, None, :])


def start_block(
    start: Float[Array, "B 1 D"],
    prefix: Float[Array, "B P D"],
    language: Float[Array, "B 1 D"],
    config: PrefixConfig,
) -> tuple[Float[Array, "B P+2 D"], Bool[Array, "1 1 P+2 P+2"]]:
    """The P + 2 slots that decoding begins with, and which of them attend to which.

    Args:
      start, language: embeddings of `</s>` and of the language code, which is always the first
        token and therefore read at once.
      prefix: may be empty.
      config: the layout, and the mask that the first P + 1 slots have.
    """
    first = (start, prefix) if config.layout == "training" else (prefix, start)
    block = jnp.concatenate([*first, language], axis=1)
    count = prefix.shape[1]
    # The original decodes without a prefix token by token, where its mask has no later slot to
    # open; this block is read at once, so that its rule must not be applied.
    rule = config.mask if count else "prefix"
    # Its mask is made before the language code is chosen, so that the code's slot is not in it.
    mask = jnp.ones((1, count + 1), bool)
    visible = jnp.pad(visibility(mask, count=count, rule=rule), ((0, 0), (0, 0), (0, 1), (0, 1)))
    return block, visible.at[:, :, -1, :].set(True)
