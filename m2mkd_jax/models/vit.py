"""ViT, DeiT and published ViT variants, in stages: teachers, meta models and the trunk of V-MoE."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Annotated, Any

from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from common_jax.config import FieldError, Section
from common_jax.nn.attention import Implementation
from common_jax.nn.mlp import ACTIVATIONS
from common_jax.ranges import Count, NonNegative, Positive, Size, Sizes, one_of
from m2mkd_jax.models import encoder
from m2mkd_jax.models.pooling import ATTENTION, POOLS
from m2mkd_jax.stages import Network


@dataclasses.dataclass(frozen=True)
class ViTConfig(Section):
    """Architecture of a ViT. Its tokens are the class token, registers and patches, in this order.

    Attributes:
      patch: side of a patch in pixels.
      width: token width D.
      heads: number of attention heads.
      mlp_ratio: hidden width of the MLP, relative to D.
      qkv_bias: whether queries, keys and values have a bias (not in the original's ViT-Small and
        ViT-Huge).
      norm_eps: epsilon of every LayerNorm of the encoder.
      activation: activation of the MLPs, a key of `ACTIVATIONS`.
      layer_scale: initial value of the vectors that scale each block's residual branches; None for
        no layer scale.
      patch_bias: whether the patch embedding has a bias (not in CLIP).
      class_token: whether there is a class token (not in SigLIP).
      registers: number of learned tokens that no head reads (4 in DINOv2 with registers). They get
        weight decay unless config.optim.no_decay matches them, as in
        `.*/(pos_embed|cls_token|register_tokens)`.
      positions: which tokens have a position embedding: "all", "class" (the class token and the
        patches) or "patches" (DeiT III; timm's DINOv2 with registers).
      norm_pre: whether there is a LayerNorm before the first block (CLIP).
      pool: what the head reads: the "class" token, the "mean" of the patches, "class_and_mean", the
        two concatenated (DINOv2's linear classifier), or "attention" (SigLIP, see `AttentionPool`).
      norm_after_pool: applies the last LayerNorm to the pooled vector instead of the tokens (timm's
        fc_norm).
      depths: number of blocks in each stage.
      attention: implementation of the blocks' attention: "auto", a fused kernel on GPUs and TPUs
        where it is faster, XLA elsewhere; "xla"; or "cudnn", only in bfloat16 on GPUs.
      remat: recomputes each block in the backward pass instead of keeping its activations.
      scan_layers: runs identical consecutive blocks of a stage as one loop, which compiles faster;
        random draws differ from the unrolled blocks.
    """

    patch: Size = 16
    width: Size = 768
    heads: Size = 12
    mlp_ratio: Positive = 4.0
    qkv_bias: bool = True
    norm_eps: Positive = 1e-6
    activation: Annotated[str, one_of(*ACTIVATIONS)] = "gelu"
    layer_scale: NonNegative | None = None
    patch_bias: bool = True
    class_token: bool = True
    registers: Count = 0
    positions: Annotated[str, one_of("all", "class", "patches")] = "all"
    norm_pre: bool = False
    pool: Annotated[str, one_of(*POOLS, ATTENTION)] = "class"
    norm_after_pool: bool = False
    depths: Sizes = (3, 3, 3, 3)
    attention: Implementation = "auto"
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
        """Settings shared by all stages."""
        return encoder.EncoderConfig(
            patch=self.patch,
            width=self.width,
            heads=self.heads,
            # Rounded down, as in the original and in timm.
            hidden=int(self.width * self.mlp_ratio),
            qkv_bias=self.qkv_bias,
            norm_eps=self.norm_eps,
            activation=self.activation,
            layer_scale=self.layer_scale,
            patch_bias=self.patch_bias,
            class_token=self.class_token,
            registers=self.registers,
            positions=self.positions,
            norm_pre=self.norm_pre,
            pool=self.pool,
            norm_after_pool=self.norm_after_pool,
            attention=self.attention,
            remat=self.remat,
            scan_layers=self.scan_layers,
        )


_TINY = {"width": 192, "heads": 3}
_DEIT_SMALL = {"width": 384, "heads": 6}
# The original's small and huge ViTs lack the qkv bias and have another epsilon only because their
# functions leave both to the defaults of its class. Kept, since published weights depend on it.
_SMALL = {"width": 768, "heads": 8, "mlp_ratio": 3.0, "qkv_bias": False, "norm_eps": 1e-5}
_BASE = {"width": 768, "heads": 12}
_LARGE = {"width": 1024, "heads": 16}
_HUGE = {"width": 1280, "heads": 16, "qkv_bias": False, "norm_eps": 1e-5}
_DEIT_III = {"layer_scale": 1e-6, "positions": "patches"}
_DINO = {"patch": 14, "layer_scale": 1e-5}
_DINO_REGISTERS = _DINO | {"registers": 4, "positions": "patches"}
# Activations as in timm. All were trained with "gelu_tanh"; exact GELU differs by about 1e-3.
_SIGLIP = {"class_token": False, "pool": "attention"}
_SIGLIP_TANH = _SIGLIP | {"activation": "gelu_tanh"}
_SO400M = {"width": 1152, "heads": 16, "mlp_ratio": 3.7362}

# Image side, published depth, and the settings that differ from the config's defaults.
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


# DeiT III, DINOv2 and SigLIP's image towers, under timm's names.
PRETRAINED = types.MappingProxyType(
    {
        "deit3_small_patch16_224": (224, 12, _DEIT_SMALL | _DEIT_III),
        "deit3_small_patch16_384": (384, 12, _DEIT_SMALL | _DEIT_III),
        "deit3_base_patch16_224": (224, 12, _BASE | _DEIT_III),
        "deit3_base_patch16_384": (384, 12, _BASE | _DEIT_III),
        "deit3_large_patch16_224": (224, 24, _LARGE | _DEIT_III),
        "deit3_large_patch16_384": (384, 24, _LARGE | _DEIT_III),
        "vit_small_patch14_dinov2": (518, 12, _DEIT_SMALL | _DINO),
        "vit_base_patch14_dinov2": (518, 12, _BASE | _DINO),
        "vit_large_patch14_dinov2": (518, 24, _LARGE | _DINO),
        "vit_small_patch14_reg4_dinov2": (518, 12, _DEIT_SMALL | _DINO_REGISTERS),
        "vit_base_patch14_reg4_dinov2": (518, 12, _BASE | _DINO_REGISTERS),
        "vit_large_patch14_reg4_dinov2": (518, 24, _LARGE | _DINO_REGISTERS),
        "vit_base_patch32_siglip_256": (256, 12, _BASE | _SIGLIP_TANH | {"patch": 32}),
        "vit_base_patch16_siglip_224": (224, 12, _BASE | _SIGLIP),
        "vit_base_patch16_siglip_256": (256, 12, _BASE | _SIGLIP),
        "vit_base_patch16_siglip_384": (384, 12, _BASE | _SIGLIP),
        "vit_base_patch16_siglip_512": (512, 12, _BASE | _SIGLIP),
        "vit_large_patch16_siglip_256": (256, 24, _LARGE | _SIGLIP),
        "vit_large_patch16_siglip_384": (384, 24, _LARGE | _SIGLIP),
        "vit_large_patch16_siglip_512": (512, 24, _LARGE | _SIGLIP_TANH),
        "vit_so400m_patch14_siglip_224": (224, 27, _SO400M | _SIGLIP | {"patch": 14}),
        "vit_so400m_patch14_siglip_378": (378, 27, _SO400M | _SIGLIP | {"patch": 14}),
        "vit_so400m_patch16_siglip_256": (256, 27, _SO400M | _SIGLIP_TANH),
        "vit_so400m_patch16_siglip_384": (384, 27, _SO400M | _SIGLIP_TANH),
        "vit_so400m_patch16_siglip_512": (512, 27, _SO400M | _SIGLIP_TANH),
    }
)


def variant(name: str, depths: tuple[int, ...] | None = None) -> tuple[ViTConfig, int]:
    """The config of a published ViT and its image side; `name` is in `VARIANTS` or `PRETRAINED`.

    By default `depths` is a single stage of the published depth. Raises ValueError for an unknown
    name.
    """
    image_size, depth, sizes = choose(VARIANTS | PRETRAINED, name)
    return ViTConfig(depths=depths or (depth,), **sizes), image_size


def choose(variants: Mapping[str, Variant], name: str) -> Variant:
    """The variant `name`; raises ValueError, listing all names, for an unknown one."""
    if name not in variants:
        raise ValueError(f"variant {name!r} is not one of {sorted(variants)}")
    return variants[name]


def build(
    config: ViTConfig,
    interface: encoder.Interface,
    *,
    dtype: DTypeLike = jnp.float32,
    stitch_width: int | None = None,
    drop_path: float = 0.0,
) -> Network:
    """The ViT of `config`, one stage per entry of `config.depths`. If `stitch_width` is given,
    stitches to that width join the stages. Stochastic depth ramps up to `drop_path`. Raises like
    `encoder.build`."""
    stages = [(encoder.BlockConfig(),) * depth for depth in config.depths]
    stages = encoder.with_stitches(stages, stitch_width)
    network = encoder.build(config.encoder, interface, stages, dtype)
    # Rates need the number of blocks in the whole network, so they are set last.
    return encoder.ramp_drop_path(network, drop_path)


# Large matrices are sharded over fsdp along the width; the rest is small and replicated.
PARTITION_RULES = (
    (r"/patches/kernel$", P(None, "fsdp")),
    (r"/attention/(qkv|query|key_value)/kernel$", P("fsdp")),
    (r"/attention/out/kernel$", P(None, None, "fsdp")),
    (r"/mlp/up/kernel$", P("fsdp")),
    (r"/mlp/down/kernel$", P(None, "fsdp")),
    (r"/(pre|post)_stitch/linear/kernel$", P("fsdp")),
    (r"/head/kernel$", P("fsdp")),
    (r"/(cls_token|register_tokens|pos_embed|probe)$", P()),
    (r"/(bias|scale[12]?)$", P()),
)
