"""The config.json of a folder that timm can load, for networks that timm has."""

from collections.abc import Mapping, Sequence
from typing import Any

from m2mkd_jax.config import Config
from m2mkd_jax.data.augment import SMALL_SIDE
from m2mkd_jax.models.vit import ViTConfig
from m2mkd_jax.pretrained.hub import CROP, POOLS, TIMM
from m2mkd_jax.pretrained.parts import LAYER_SCALE

# Any timm name will do, since model_args override its sizes.
ARCHITECTURE = "vit_base_patch16_224"
NORM_EPS = 1e-6  # of timm's ViTs; no argument in config.json can change it


def timm_config(config: Config, sizes: ViTConfig, classes: Sequence[str]) -> dict[str, Any]:
    """The content of timm's config.json: name and arguments of the network, and settings of its
    images.

    Args:
      config: the run's config.
      sizes: the network's section of it.
      classes: class names by label.

    Raises:
      ValueError: for a network that timm does not have; the message names the fields that differ.
    """
    if odd := _unlike_timm(sizes):
        raise ValueError(f"timm has no ViT with {', '.join(odd)}")
    data = config.data
    pool = {ours: theirs for theirs, ours in POOLS.items()}[sizes.pool]
    arguments = {
        "img_size": data.image_size,
        "patch_size": sizes.patch,
        "in_chans": data.channels,
        "embed_dim": sizes.width,
        "depth": sum(sizes.depths),
        "num_heads": sizes.heads,
        "mlp_ratio": sizes.mlp_ratio,
        "qkv_bias": sizes.qkv_bias,
        # timm leaves layer scale out for 0, too. Any other number will do, since the tensors have
        # the learned values.
        "init_values": LAYER_SCALE if sizes.layer_scale == 0 else sizes.layer_scale,
        "class_token": sizes.class_token,
        "reg_tokens": sizes.registers,
        "no_embed_class": sizes.positions == "patches",
        "pre_norm": sizes.norm_pre,
        "fc_norm": sizes.norm_after_pool,
        "act_layer": sizes.activation,
    }
    return {
        "architecture": ARCHITECTURE,
        "num_classes": data.labels,
        "num_features": sizes.width,
        "global_pool": pool,
        "pretrained_cfg": {
            "input_size": [data.channels, data.image_size, data.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": CROP if data.image_size > SMALL_SIDE else 1.0,
            "crop_mode": "center",
            **{theirs: list(getattr(data, ours)) for ours, theirs in TIMM.items()},
            "num_classes": data.labels,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "label_names": list(classes),
        },
        "model_args": arguments | {"global_pool": pool},
    }


def _unlike_timm(sizes: ViTConfig) -> list[str]:
    """The fields in which a network differs from every network of timm's."""
    alike: Mapping[str, bool] = {
        "norm_eps": sizes.norm_eps == NORM_EPS,
        "pool": sizes.pool in POOLS.values(),
        # Without registers, "class" is the same as "all".
        "positions": sizes.positions != "class" or not sizes.registers,
        # timm's patches have a bias exactly if there is no norm before the blocks.
        "patch_bias": sizes.patch_bias != sizes.norm_pre,
    }
    return [f"{name}={getattr(sizes, name)}" for name, same in alike.items() if not same]
