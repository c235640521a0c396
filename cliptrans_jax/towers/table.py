"""The table of towers, by the class of their config."""

import functools
import operator
import types
from collections.abc import Mapping, Sequence
from typing import Any

from cliptrans_jax.towers import clip, labse, mclip, resnet, siglip
from cliptrans_jax.towers.clip import ClipTextConfig, ClipVisionConfig
from cliptrans_jax.towers.labse import LabseConfig
from cliptrans_jax.towers.mclip import MClipConfig
from cliptrans_jax.towers.resnet import ResNetConfig
from cliptrans_jax.towers.siglip import SiglipTextConfig, SiglipVisionConfig
from cliptrans_jax.towers.tower import Tower

# If a file has several text towers or several image towers, the first in this order is read.
TOWERS: Mapping[type, Tower] = types.MappingProxyType(
    {
        MClipConfig: mclip.TOWER,
        LabseConfig: labse.TOWER,
        SiglipTextConfig: siglip.TEXT,
        ClipTextConfig: clip.TEXT,
        ResNetConfig: resnet.TOWER,
        ClipVisionConfig: clip.VISION,
        SiglipVisionConfig: siglip.VISION,
    }
)
TEXT_TOWERS = tuple(tower for tower in TOWERS.values() if tower.sentences is not None)
IMAGE_TOWERS = tuple(tower for tower in TOWERS.values() if tower.pictures is not None)


def tower_of(config: Any) -> Tower:
    """The tower that a config belongs to."""
    return TOWERS[type(config)]


def section_type(towers: Sequence[Tower]) -> Any:
    """The type of the config.clip section with the sizes of one of these towers: any that can be
    trained from scratch."""
    return functools.reduce(operator.or_, (tower.config for tower in towers if tower.from_scratch))


def text_tower_of(tokenizer: str) -> Tower:
    """The text tower that was published with this kind of tokenizer.

    Raises:
      ValueError: if there is none.
    """
    published = [tower for tower in TEXT_TOWERS if tower.kind]
    for tower in published:
        if tower.sentences.tokenizer == tokenizer:
            return tower
    kinds = " or ".join(f"{x.sentences.tokenizer!r} for {x.kind!r}" for x in published)
    raise ValueError(
        f"config.clip_tokenizer.kind={tokenizer!r} belongs to no published text tower; set it to "
        f"{kinds}, and config.clip_tokenizer.path to the folder of the tower's tokenizer"
    )
