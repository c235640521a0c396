"""ViT and DeiT, whole or in stages: teachers, meta models and the trunk of V-MoE."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from common_jax.config import FieldError, Section
from common_jax.ranges import Positive, Size, Sizes
from m2mkd_jax.models import encoder
from m2mkd_jax.stages import Network


@dataclasses.dataclass(frozen=True)
class ViTConfig(Section):
    """Sizes of a ViT; the image side, the channels and the labels are the data's.

    Attributes:
      patch: side of a patch in pixels.
      width: width D of a token.
      heads: attention heads.
      mlp_ratio: hidden width of the MLP over D.
      qkv_bias: whether queries, keys and values have a bias (ViT-Small and ViT-Huge of the
        original do not).
      norm_eps: epsilon of every LayerNorm of the encoder.
      depths: blocks in each stage.
      remat: recomputes each block in the backward pass instead of keeping its activations.
      scan_layers: runs blocks of a stage that are alike as one loop, which takes less time to
        compile; random draws are others than without.
    """

    patch: Size = 16
    width: Size = 768
    heads: Size = 12
    mlp_ratio: Positive = 4.0
    qkv_bias: bool = True
    norm_eps: Positive = 1e-6
    depths: Sizes = (3, 3, 3, 3)
    remat: bool = False
    scan_layers: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.encoder.hidden < 1:
            raise FieldError(
                f"mlp_ratio={self.mlp_ratio} of width={self.width} must be at least 1 hidden unit"
            )

    @property
    def encoder(self) -> encoder.EncoderConfig:
        """The sizes that all blocks share."""
        return encoder.EncoderConfig(
            patch=self.patch,
            width=self.width,
            heads=self.heads,
            hidden=int(self.width * self.mlp_ratio),
            qkv_bias=self.qkv_bias,
            norm_eps=self.norm_eps,
            remat=self.remat,
            scan_layers=self.scan_layers,
        )


_TINY = {"width": 192, "heads": 3}
_DEIT_SMALL = {"width": 384, "heads": 6}
_SMALL = {"width": 768, "heads": 8, "mlp_ratio": 3.0, "qkv_bias": False, "norm_eps": 1e-5}
_BASE = {"width": 768, "heads": 12}
_LARGE = {"width": 1024, "heads": 16}
_HUGE = {"width": 1280, "heads": 16, "qkv_bias": False, "norm_eps": 1e-5}

# Image side, usual depth, and the sizes that differ from the defaults of the config.
Variant = tuple[int, int, Mapping[str, Any]]

VARIANTS = types.MappingProxyType(
    {
        "deit_tiny_patch16_224": (224, 12, _TINY),
        "deit_small_patch16_224": (224, 12, _DEIT_SMALL),
        "deit_base_patch16_224": (224, 12, _BASE),
        "deit_base_patch16_384": (384, 12, _BASE),
        "vit_small_patch16_224": (224, 8, _SMALL),
        "vit_base_patch16_224": (224, 12, _BASE),
        "vit_base_patch16_384": (384, 12, _BASE),
        "vit_base_patch32_384": (384, 12, _BASE | {"patch": 32}),
        "vit_large_patch16_224": (224, 24, _LARGE),
        "vit_large_patch16_384": (384, 24, _LARGE),
        "vit_large_patch32_384": (384, 24, _LARGE | {"patch": 32}),
        "vit_huge_patch14_224": (224, 32, _HUGE | {"patch": 14}),
        "vit_huge_patch14_392": (392, 32, _HUGE | {"patch": 14}),
        "vit_huge_patch32_384": (384, 32, _HUGE | {"patch": 32}),
    }
)


def variant(name: str, depths: tuple[int, ...] | None = None) -> tuple[ViTConfig, int]:
    """The sizes of a published ViT and its image side.

    Args:
      name: a key of `VARIANTS`.
      depths: blocks a stage; by default the usual depth in one stage.

    Raises:
      ValueError: for a name that is not there.
    """
    image_size, depth, sizes = choose(VARIANTS, name)
    return ViTConfig(depths=depths or (depth,), **sizes), image_size


def choose(variants: Mapping[str, Variant], name: str) -> Variant:
    """The entry of a table of variants; raises ValueError with its names for another."""
    if name not in variants:
        raise ValueError(f"variant {name!r} is not one of {sorted(variants)}")
    return variants[name]


def build(
    config: ViTConfig,
    interface: encoder.Interface,
    *,
    dtype: DTypeLike = jnp.float32,
    drop_path: float = 0.0,
) -> Network:
    """The ViT of `config`, one stage an entry of `config.depths`; stochastic depth ramps to
    `drop_path`.

    Raises:
      ValueError: for a depth below 1 or an image side that does not split into patches.
    """
    stages = ((encoder.BlockConfig(),) * depth for depth in config.depths)
    network = encoder.build(config.encoder, interface, stages, dtype)
    return encoder.ramp_drop_path(network, drop_path)


# Big matrices are split over fsdp along the width; the rest is small and held whole.
PARTITION_RULES = (
    (r"/patches/kernel$", P(None, "fsdp")),
    (r"/attention/qkv/kernel$", P("fsdp")),
    (r"/attention/out/kernel$", P(None, None, "fsdp")),
    (r"/mlp/up/kernel$", P("fsdp")),
    (r"/mlp/down/kernel$", P(None, "fsdp")),
    (r"/head/kernel$", P("fsdp")),
    (r"/(cls_token|pos_embed)$", P()),
    (r"/(bias|scale)$", P()),
)
