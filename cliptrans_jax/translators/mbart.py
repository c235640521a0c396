"""mBART (Liu et al. 2020, arXiv 2001.08210): the transformer with an embedding norm and a logit
bias."""

import dataclasses
from typing import ClassVar

from flax import linen as nn
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from cliptrans_jax.translators.transformer import (
    PARTITION_RULES,
    SETTINGS,
    Transformer,
    TransformerConfig,
)
from cliptrans_jax.translators.translator import Architecture, Readout, language_first
from common_jax.ranges import Size

OFFSET = 2  # slot p uses row p + 2 of the position table, as in all published weights


@dataclasses.dataclass(frozen=True)
class MBartConfig(TransformerConfig):
    """Sizes and special ids, see `TransformerConfig`; the defaults are mBART-large-50's."""

    activation: ClassVar[str] = "gelu"
    learned_positions: ClassVar[bool] = True
    embedding_norm: ClassVar[bool] = True
    first_row: ClassVar[int] = OFFSET

    vocab: Size = 250054


class MBart(Transformer):
    """The transformer with a bias on the logits.

    Parameters: those of `Transformer`, and `logits_bias` (V), which is never trained.
    """

    def setup(self):
        super().setup()
        # All zeros, but published checkpoints contain it, so it must survive a round trip.
        self.logits_bias = self.param("logits_bias", nn.initializers.zeros, (self.config.vocab,))

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """See `Network.logits`."""
        scores = super().logits(hidden)
        return scores + jnp.asarray(self.logits_bias, scores.dtype)


def shift_right(labels: Int[Array, "B T"], *, pad: int) -> Int[Array, "B T"]:
    """The decoder's input for `labels`: shifted right by one, with the last non-pad label in the
    first slot (mBART, shift_tokens_right). Negative labels count as pads.
    """
    labels = jnp.where(labels < 0, pad, labels)
    last = jnp.sum(labels != pad, axis=1, keepdims=True) - 1
    first = jnp.take_along_axis(labels, last, axis=1)
    return jnp.concatenate([first, labels[:, :-1]], axis=1)


ARCHITECTURE = Architecture(
    name="mBART",
    subtree="mbart",
    config=MBartConfig,
    network=MBart,
    rules=PARTITION_RULES,
    encoder_input=language_first,
    decoder_input=lambda labels, config: shift_right(labels, pad=config.pad),
    embedding="embedding",
    encoder="encoder/.*",
    buffers="logits_bias",
    readout=lambda params: Readout(params["embedding"], params["logits_bias"]),
    kind="mbart",
    tokenizer="mbart50",
    settings=SETTINGS,
)
