"""Sparse upcycling: initialising a V-MoE from a dense ViT."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from flax import traverse_util

from common_jax import checkpoint
from common_jax.weights import Allowance, Origin
from m2mkd_jax.families.family import Upcycling
from m2mkd_jax.models.vmoe import VMoEConfig
from m2mkd_jax.stages import locate, stage_name, stage_number

# Parameters of a block's MLP -> the same parameters of all its experts.
EXPERT_NAMES = {
    "mlp/up/kernel": "moe/up",
    "mlp/up/bias": "moe/up_bias",
    "mlp/down/kernel": "moe/down",
    "mlp/down/bias": "moe/down_bias",
}
FRESH = (
    Allowance(r"student/.*/moe/router/.*", "config.init.upcycle: a ViT has no router"),
    Allowance(r"student/.*/(pre|post)_stitch/.*", "config.init.upcycle: a ViT has no stitches"),
)


def upcycle(section: VMoEConfig, source: epath.PathLike, student: Mapping[str, Any]) -> Upcycling:
    """Initialises a V-MoE from a dense ViT: every expert is a copy of its block's MLP, router and
    stitches start from scratch, and all other parameters are taken from the ViT.

    If a token's gates sum to 1 (router "topk_softmax") and no pair is dropped, the V-MoE initially
    computes the same function as the ViT; otherwise the output of its experts is the MLP's times
    that sum (sparse upcycling, Komatsuzaki et al. 2022). Blocks are matched by their number in the
    whole network, so the two networks may be cut into different stages.

    Args:
      section: config.model.
      source: config.init.upcycle, a workdir or a step in it.
      student: shapes of the V-MoE's parameters.

    Raises:
      ValueError: if the source has no whole ViT, or one of another depth.
    """
    shapes, flat = checkpoint.load_shapes(source), traverse_util.flatten_dict(student, sep="/")
    roles = [role for role in ("teacher", "meta") if role in shapes]
    if not roles:
        raise ValueError(
            f"config.init.upcycle={source!r} holds {sorted(shapes)}, but must hold a dense ViT: "
            "give a run that trained a teacher or a meta model, or a converted ViT"
        )
    dense = traverse_util.flatten_dict(shapes[roles[0]], sep="/")
    renamed = _rename(dense, section, source)
    # The first axis of an expert's parameter counts experts, so broadcasting copies the MLP's to
    # all of them. Without those whose shapes do not fit: `take` reports them.
    copies = {
        re.escape(f"student/{path}"): np.broadcast_to
        for name, path in renamed.items()
        if "/moe/" in path and path in flat and flat[path].shape[1:] == dense[name].shape
    }
    return Upcycling(Origin(source, roles[0], "student", renamed), FRESH, copies)


def _rename(
    dense: Mapping[str, Any], section: VMoEConfig, source: epath.PathLike
) -> dict[str, str]:
    """For each parameter of a dense ViT, its path in the V-MoE."""
    blocks = {}
    for name in dense:
        if match := re.match(r"(stage_\d+)/block_(\d+)/", name):
            stage, block = stage_number(match[1]), int(match[2])
            blocks[stage] = max(blocks.get(stage, 0), block + 1)
    dense_depths, depths = tuple(blocks[stage] for stage in sorted(blocks)), section.depths
    if sum(dense_depths) != sum(depths) or sorted(blocks) != list(range(len(blocks))):
        raise ValueError(
            f"config.init.upcycle={source!r} has stages {sorted(blocks)} of {dense_depths} blocks, "
            f"{sum(dense_depths)} in all, but config.model.depths={depths} have {sum(depths)}: "
            "give a whole ViT of the same depth"
        )
    experts, renamed = section.moe_positions(), {}
    for name in dense:
        stage, rest = name.split("/", 1)
        # The number, in the whole network, of the stage's first block.
        first = sum(dense_depths[: stage_number(stage)])
        if match := re.match(r"block_(\d+)/(.*)", rest):
            number, rest = first + int(match[1]), match[2]
            stage, block = locate(number, depths)
            rest = EXPERT_NAMES.get(rest, rest) if number in experts else rest
            renamed[name] = f"{stage_name(stage)}/block_{block}/{rest}"
        # The last stage may have another number. The embedding is in stage 0 of both, and keeps its
        # name.
        elif rest.startswith(("norm/", "head/", "pool/")):
            renamed[name] = f"{stage_name(len(depths) - 1)}/{rest}"
    return renamed
