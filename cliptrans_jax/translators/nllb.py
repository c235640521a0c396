"""The dense NLLB-200 (arXiv 2207.04672) and M2M-100 (arXiv 2010.11125), which differ only in size
and vocabulary."""

import dataclasses
import types
from collections.abc import Mapping
from typing import ClassVar

from jax import numpy as jnp
from jaxtyping import Array, Int

from cliptrans_jax.translators.transformer import (
    PARTITION_RULES,
    SETTINGS,
    Transformer,
    TransformerConfig,
)
from cliptrans_jax.translators.translator import Architecture, Readout, language_first
from common_jax.config import FieldError
from common_jax.ranges import Size


@dataclasses.dataclass(frozen=True)
class NllbConfig(TransformerConfig):
    """Sizes and special ids, see `TransformerConfig`; the defaults are
    NLLB-200-distilled-600M's."""

    activation: ClassVar[str] = "relu"
    learned_positions: ClassVar[bool] = False
    embedding_norm: ClassVar[bool] = False

    vocab: Size = 256206

    def __post_init__(self):
        super().__post_init__()
        if self.width % 2 or self.width < 4:
            raise FieldError(
                f"width={self.width} must be even and at least 4, for sinusoidal positions"
            )

    @property
    def first_row(self) -> int:
        """The row after the pads' row, whose index is the pad id."""
        return self.pad + 1


_DEEP = {"encoder_layers": 24, "decoder_layers": 24, "encoder_hidden": 8192, "decoder_hidden": 8192}
# Sizes of published models by their names on the hub, without "facebook/".
PUBLISHED: Mapping[str, NllbConfig] = types.MappingProxyType(
    {
        "nllb-200-distilled-600M": NllbConfig(),
        "nllb-200-1.3B": NllbConfig(**_DEEP),
        "nllb-200-3.3B": NllbConfig(width=2048, **_DEEP),
        "m2m100_418M": NllbConfig(vocab=128112),
        "m2m100_1.2B": NllbConfig(vocab=128112, **_DEEP),
    }
)


def shift_right(labels: Int[Array, "B T"], config: NllbConfig) -> Int[Array, "B T"]:
    """The decoder's input for `labels`: the start token, then all labels but the last. Negative
    labels count as pads."""
    labels = jnp.where(labels < 0, config.pad, labels)
    return jnp.concatenate([jnp.full_like(labels[:, :1], config.start), labels[:, :-1]], axis=1)


ARCHITECTURE = Architecture(
    name="NLLB",
    subtree="nllb",
    config=NllbConfig,
    network=Transformer,
    rules=PARTITION_RULES,
    encoder_input=language_first,
    decoder_input=shift_right,
    embedding="embedding",
    encoder="encoder/.*",
    readout=lambda params: Readout(params["embedding"]),
    kind="nllb",
    tokenizer="nllb",
    settings=SETTINGS,
)
