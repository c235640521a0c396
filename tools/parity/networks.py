"""Networks of golden cases, built from the json with our own functions."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from m2mkd_jax.models import encoder, vit, vmoe
from m2mkd_jax.moe.config import MoeConfig
from m2mkd_jax.stages import Network, stage_name
from parity.names import read_network, read_stage

Sizes = Mapping[str, Any]
STUDENTS = 3  # a single student is built as one of three: first, middle or last


def build_vit(sizes: Sizes, *, depths: tuple[int, ...] | None = None) -> Network:
    """The ViT with a json's sizes, optionally with other `depths`."""
    depths = tuple(sizes["divided_depths"]) if depths is None else depths
    return vit.build(vit.ViTConfig(depths=depths, **_vit_sizes(sizes)), interface(sizes))


def build_vmoe(sizes: Sizes) -> Network:
    """The whole V-MoE with a json's sizes, and with the stitches and experts it lists."""
    depths = tuple(sizes["divided_depths"])
    network = vmoe.build(
        _vmoe_config(sizes, depths), interface(sizes), stitch_width=sizes["stitch_dim"]
    )
    return _place_blocks(network, sizes)


def build_student(sizes: Sizes, *, stages: int = STUDENTS) -> tuple[Network, int]:
    """The students of a V-MoE with `stages` stages, and the stage of the json's student; the other
    students are one block deep."""
    place = student_stage(sizes, stages)
    depths = tuple(sizes["divided_depths"][0] if i == place else 1 for i in range(stages))
    students = vmoe.build_students(
        _vmoe_config(sizes, depths), interface(sizes), meta_width=sizes["stitch_dim"]
    )
    network = list(students.stages)
    network[place] = _place_blocks(Network((students.stages[place],)), sizes).stages[0]
    return Network(tuple(network)), place


def student_stage(sizes: Sizes, stages: int) -> int:
    """The stage that the json's `idx` refers to, out of `stages`; in the original, -1 is the last
    one."""
    idx = sizes["idx"]
    if idx < 0:
        return stages - 1
    return min(idx, stages - 2)


def interface(sizes: Sizes) -> encoder.Interface:
    """Image size, channels and number of labels."""
    return encoder.Interface(sizes["img_size"], 3, sizes["num_classes"])


def load_network(state: Mapping[str, np.ndarray], sizes: Sizes) -> dict[str, Any]:
    """Parameters of all stages from a state with root names."""
    params = read_network(state, depths=sizes["divided_depths"], heads=sizes["num_heads"])
    return jax.tree.map(jnp.asarray, params)


def load_stage(state: Mapping[str, np.ndarray], sizes: Sizes, *, stage: int) -> dict[str, Any]:
    """Parameters of one stage, keyed by its name, from a state with stage-local names."""
    params = read_stage(state, heads=sizes["num_heads"])
    return {stage_name(stage): jax.tree.map(jnp.asarray, params)}


def to_images(array: np.ndarray) -> jax.Array:
    """(..., channels, I, J) to (..., I, J, channels)."""
    return jnp.moveaxis(jnp.asarray(array), -3, -1)


def _vit_sizes(sizes: Sizes) -> dict[str, Any]:
    return {
        "patch": sizes["patch_size"],
        "width": sizes["embed_dim"],
        "heads": sizes["num_heads"],
        "mlp_ratio": sizes["mlp_ratio"],
        "qkv_bias": sizes["qkv_bias"],
        "norm_eps": sizes["ln_eps"],
    }


def _vmoe_config(sizes: Sizes, depths: tuple[int, ...]) -> vmoe.VMoEConfig:
    return vmoe.VMoEConfig(depths=depths, moe=_moe(sizes), **_vit_sizes(sizes))


def _moe(sizes: Sizes) -> MoeConfig:
    # The sizes in training and loss cases omit settings that the original never changes.
    return MoeConfig(
        experts=sizes["num_expert"],
        chosen=sizes.get("top_k", 2),
        router_bias=sizes.get("gate_bias", True),
    )


def _place_blocks(network: Network, sizes: Sizes) -> Network:
    """The network with experts and stitches in the blocks that the json lists."""
    experts, before, after = (
        set(sizes[key] or ()) for key in ("moe_pos", "pre_stitch_pos", "post_stitch_pos")
    )
    stages, number = [], 0
    for stage in network.stages:
        blocks = []
        for block in stage.blocks:
            block = dataclasses.replace(
                block,
                moe=_moe(sizes) if number in experts else None,
                pre_stitch=sizes["stitch_dim"] if number in before else None,
                post_stitch=sizes["stitch_dim"] if number in after else None,
            )
            blocks.append(block)
            number += 1
        stages.append(stage.clone(blocks=tuple(blocks)))
    return Network(tuple(stages))
