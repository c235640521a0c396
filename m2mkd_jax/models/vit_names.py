"""Tensor names of ViTs, as timm and DeiT have them, and of V-MoEs, as m2mKD's original has them.

In a file of one stage its blocks count from 0; in that of a network they are numbered through. The
original lists the tensors of both once more by stage, as `stages.<i>.` and the stage's own names.
"""

from collections.abc import Sequence

import numpy as np

from common_jax.weights.entries import (
    Entries,
    Entry,
    below,
    copy,
    join_heads,
    linear,
    norm,
    optional,
    patches,
    stacked_heads,
    transpose,
)
from common_jax.weights.table import Table
from m2mkd_jax.stages import Place, stage_name


def network_table(
    depths: Sequence[int], *, heads: int, channels: int = 3, experts: int = 0
) -> Table:
    """Of a whole network.

    Args:
      depths: blocks in each stage.
      heads: attention heads.
      channels: of the images.
      experts: of a V-MoE; 0 for a ViT.
    """
    entries, aliases, first = {}, {}, 0
    for stage, depth in enumerate(depths):
        place = Place.of(stage, len(depths))
        own = stage_entries(depth, place, heads=heads, channels=channels, experts=experts)
        root = stage_entries(
            depth, place, heads=heads, channels=channels, experts=experts, first=first
        )
        listed = (f"stages.{stage}.{name}" for name in _names(own))
        aliases |= dict(zip(listed, _names(root), strict=True))
        entries |= below(root, source="", target=f"{stage_name(stage)}/")
        first += depth
    return Table(entries, aliases)


def stage_table(
    depth: int, place: Place, *, heads: int, channels: int = 3, experts: int = 0
) -> Table:
    """Of one stage of `depth` blocks under its own names and by our paths in it; see
    `network_table`."""
    entries = stage_entries(depth, place, heads=heads, channels=channels, experts=experts)
    return Table(entries, {f"stages.0.{name}": name for name in _names(entries)})


def stage_entries(
    depth: int, place: Place, *, heads: int, channels: int, experts: int, first: int = 0
) -> dict[str, Entry]:
    """Of one stage, whose first block has the number `first`."""
    entries = {}
    if place in (Place.FIRST, Place.ONLY):
        entries = {
            "pos_embed": copy("pos_embed"),
            "cls_token": copy("cls_token"),
            "patches/kernel": patches("patch_embed.proj.weight", channels),
            "patches/bias": copy("patch_embed.proj.bias"),
        }
    for block in range(depth):
        entries |= below(
            _block(heads, experts), source=f"blocks.{first + block}.", target=f"block_{block}/"
        )
    if place in (Place.LAST, Place.ONLY):
        entries |= norm("norm", "norm") | linear("head", "head")
    return entries


def _block(heads: int, experts: int) -> dict[str, Entry]:
    trunk = {
        **norm("norm1", "norm1"),
        "attention/qkv/kernel": stacked_heads("attn.qkv.weight", heads),
        **optional({"attention/qkv/bias": stacked_heads("attn.qkv.bias", heads)}),
        "attention/out/kernel": join_heads("attn.proj.weight", heads),
        "attention/out/bias": copy("attn.proj.bias"),
        **norm("norm2", "norm2"),
    }
    mlp = linear("mlp.fc1", "mlp/up") | linear("mlp.fc2", "mlp/down")
    if not experts:
        return trunk | mlp
    return {
        **_stitch("pre_stitch"),
        **trunk,
        **optional(mlp),
        **optional(_experts(experts)),
        **_stitch("post_stitch"),
    }


def _stitch(name: str) -> dict[str, Entry]:
    return optional(norm(f"{name}.ln", f"{name}/norm") | linear(f"{name}.fc", f"{name}/linear"))


def _experts(count: int) -> dict[str, Entry]:
    router = {
        "moe/router/kernel": transpose("moe.gate.gate.weight"),
        "moe/router/bias": copy("moe.gate.gate.bias"),
    }
    return {
        "moe/up": _expert("htoh4.weight", count),
        "moe/up_bias": _expert("htoh4.bias", count),
        "moe/down": _expert("h4toh.weight", count),
        "moe/down_bias": _expert("h4toh.bias", count),
        **router,
    }


def _expert(tensor: str, count: int) -> Entry:
    """One parameter (E, ...) of all experts: a tensor [1, ...] each, or one [E, ...] that is fused.
    Weights are [out, in]."""
    is_weight = tensor.endswith(".weight")

    def turn(x: np.ndarray) -> np.ndarray:
        return x.swapaxes(-1, -2) if is_weight else x

    fused = Entry((f"moe.experts.{tensor}",), turn, lambda x: (turn(x),))
    return Entry(
        tuple(f"moe.experts.{e}.{tensor}" for e in range(count)),
        lambda *tensors: turn(np.concatenate(tensors)),
        lambda x: tuple(turn(x[e : e + 1]) for e in range(count)),
        forms=(fused,),
    )


def _names(entries: Entries) -> list[str]:
    """All names that tensors of these entries may have."""
    forms = (form for entry in entries.values() for form in (entry, *entry.forms))
    return [name for form in forms for name in form.names]
