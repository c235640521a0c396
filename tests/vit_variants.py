"""Small ViTs with the extras of pretrained ones: registers, layer scale, no class token, other
pooling."""

import functools

import jax
import numpy as np
from jax import numpy as jnp
from tiny import SIZES

from m2mkd_jax.models import encoder, vit

IMAGES = encoder.Interface(image_size=8, channels=3, labels=5)
EPS = 1e-3  # large, so that a missing epsilon shows

# Our fields -> timm's arguments.
VARIANTS = {
    "plain": ({}, {}),
    "deit_iii": (
        {"layer_scale": 1e-6, "positions": "patches"},
        {"init_values": 1e-6, "no_embed_class": True},
    ),
    "dinov2": ({"layer_scale": 1e-5}, {"init_values": 1e-5}),
    "dinov2_registers": (
        {"layer_scale": 1e-5, "registers": 4, "positions": "patches"},
        {"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True},
    ),
    "siglip": (
        {"class_token": False, "pool": "attention", "activation": "gelu_tanh", "qkv_bias": False},
        {
            "class_token": False,
            "global_pool": "map",
            "act_layer": "gelu_tanh",
            "qkv_bias": False,
        },
    ),
    "siglip_gap": (
        {"class_token": False, "pool": "mean", "activation": "gelu_tanh"},
        {
            "class_token": False,
            "global_pool": "avg",
            "fc_norm": False,
            "act_layer": "gelu_tanh",
        },
    ),
    "registers_gap": (
        {"registers": 2, "pool": "mean", "norm_after_pool": True},
        {"reg_tokens": 2, "global_pool": "avg"},
    ),
    "registers_map": (
        {"registers": 2, "pool": "attention", "norm_after_pool": True},
        {"reg_tokens": 2, "global_pool": "map", "fc_norm": True},
    ),
    "clip": (
        {"patch_bias": False, "norm_pre": True, "activation": "quick_gelu"},
        {"pre_norm": True, "act_layer": "quick_gelu"},
    ),
    # From Hugging Face; timm has no counterpart.
    "linear_classifier": (
        {"registers": 3, "positions": "class", "pool": "class_and_mean", "layer_scale": 0.1},
        None,
    ),
}


def sizes_of(name, **changes):
    fields = SIZES | {"norm_eps": EPS, "depths": (1,)} | VARIANTS[name][0] | changes
    return vit.ViTConfig(**fields)


def build(name, *, dtype=jnp.float32, drop_path=0.0, **changes):
    return vit.build(sizes_of(name, **changes), IMAGES, dtype=dtype, drop_path=drop_path)


def shapes_of(network):
    return jax.eval_shape(network.init, jax.random.key(0))


def images(count=2):
    return np.random.default_rng(1).normal(size=(count, 8, 8, 3)).astype(np.float32)


def apply(network, params, x, record=("intermediates",)):
    """Logits, and what the last stage records."""
    run = jax.jit(functools.partial(network.apply, record=record))
    logits, records = run(params, x)
    return np.asarray(logits), records[f"stage_{len(network) - 1}"].get("intermediates")
