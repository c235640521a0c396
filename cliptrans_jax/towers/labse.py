"""M-CLIP's LaBSE text tower: a BERT in place of XLM-RoBERTa."""

import dataclasses

from jax import numpy as jnp
from jaxtyping import Array, Int

from cliptrans_jax.towers import mclip
from cliptrans_jax.towers.mclip import MClipConfig
from common_jax.ranges import Count, Positive, Size


@dataclasses.dataclass(frozen=True)
class LabseConfig(MClipConfig):
    """Sizes of the tower, as in `MClipConfig`; the defaults are those of M-CLIP/LABSE-Vit-L-14."""

    vocab: Size = 501153
    width: Size = 768
    layers: Size = 12
    heads: Size = 12
    hidden: Size = 3072
    positions: Size = 512
    types: Size = 2
    eps: Positive = 1e-12
    pad: Count = 0
    features: Size = 768

    @property
    def longest(self) -> int:
        """Tokens of the longest sentence."""
        return self.positions

    def places(self, ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
        """The row of the position table for each token: its index, pads included."""
        # Pads come last and are masked, so their rows have no effect.
        return jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)


# Both have the same tensor names; config.json says which it is.
TOWER = dataclasses.replace(
    mclip.TOWER,
    config=LabseConfig,
    sentences=dataclasses.replace(mclip.TOWER.sentences, tokenizer="labse"),
    from_scratch=False,
)
