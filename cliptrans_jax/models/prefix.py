"""Where a prefix goes in a decoder's input, and its attention mask (CLIPTrans, src/models/model.py
and its fork of the decoder).

In training, the order is `</s>`, prefix, language code, words. The published decoding code puts the
prefix before `</s>`; ours uses the order of training by default.
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
ORIGINAL_KEYS = 10  # slots 1 to 10 are visible in the original, whatever the prefix


@dataclasses.dataclass(frozen=True)
class PrefixConfig(Section):
    """Layout and mask of a prefix.

    Attributes:
      layout: order at the start of decoding: "training" is `</s>`, then the prefix; "original" is
        the prefix, then `</s>`.
      mask: exceptions to causal attention: with "prefix", slots of the prefix attend to each other;
        with "original", all but the first slot attend to slots 1 to 10, even to words and pads. The
        two agree for a prefix of length 10.
    """

    layout: Annotated[str, one_of(*LAYOUTS)] = "training"
    mask: Annotated[str, one_of(*MASKS)] = "prefix"


def insert(
    embeddings: Float[Array, "B T D"], prefix: Float[Array, "B P D"]
) -> Float[Array, "B T+P D"]:
    """Inserts the prefix after the first slot, as in training."""
    # The first slot, `</s>`, predicts the language code, which is independent of the features.
    return jnp.concatenate([embeddings[:, :1], prefix, embeddings[:, 1:]], axis=1)


def insert_ignored(labels: Int[Array, "B T"], count: int) -> Int[Array, "B T+{count}"]:
    """Labels for the embeddings from `insert`; the prefix has ignored ones."""
    ignored = jnp.full((labels.shape[0], count), IGNORED, labels.dtype)
    return jnp.concatenate([labels[:, :1], ignored, labels[:, 1:]], axis=1)


def remove(hidden: Float[Array, "B T D"], count: int) -> Float[Array, "B T-{count} D"]:
    """The inverse of `insert`: drops the states of the prefix, which predict no label."""
    # Done before the projection to the vocabulary, the largest product of a step.
    return jnp.concatenate([hidden[:, :1], hidden[:, 1 + count :]], axis=1)


def visibility(mask: Bool[Array, "B T"], *, count: int, rule: str) -> Bool[Array, "B 1 T T"]:
    """Which slots (last axis) each slot attends to: earlier ones within `mask`, and depending on
    `rule`

    "prefix": slots 1 to `count` attend to each other;
    "original": all slots but the first attend to slots 1 to 10, whatever `mask` says.
    """
    length = mask.shape[1]
    slots = jnp.arange(length)
    query, key = slots[:, None], slots[None, :]
    earlier = (key <= query) & mask[:, None, None, :]
    if rule == "original":
        # Ignores `mask`: if the prefix is shorter, early words attend to later words and pads.
        return earlier | ((query >= 1) & (key >= 1) & (key <= ORIGINAL_KEYS))
    # All prefix vectors come from one feature and none is predicted, so they may attend to each
    # other.
    within = (query >= 1) & (key >= 1) & (key <= count)
    return earlier | (within & mask[:, None, None, :])


def start_block(
    start: Float[Array, "B 1 D"],
    prefix: Float[Array, "B P D"],
    language: Float[Array, "B 1 D"],
    config: PrefixConfig,
) -> tuple[Float[Array, "B P+2 D"], Bool[Array, "1 1 P+2 P+2"]]:
    """The first P + 2 slots of decoding, and which slots each attends to.

    Args:
      start, language: embeddings of `</s>` and of the language code, the first token of every
        translation.
      prefix: may be empty.
      config: the layout, and the mask of the first P + 1 slots.
    """
    first = (start, prefix) if config.layout == "training" else (prefix, start)
    block = jnp.concatenate([*first, language], axis=1)
    count = prefix.shape[1]
    # Without a prefix the original decodes token by token, so its mask never opens a later slot.
    # Here the block is read in one pass, so the rule must not apply.
    rule = config.mask if count else "prefix"
    # The original builds its mask before adding the language code, so it does not cover that slot.
    mask = jnp.ones((1, count + 1), bool)
    visible = jnp.pad(visibility(mask, count=count, rule=rule), ((0, 0), (0, 0), (0, 1), (0, 1)))
    return block, visible.at[:, :, -1, :].set(True)
