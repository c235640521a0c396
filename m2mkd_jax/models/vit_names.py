"""Tensor names of ViTs, as in timm and DeiT, and of V-MoEs, as in the original m2mKD code.

In the file of a single stage, block numbers start from 0; in the file of a whole network, they run
through all stages. The original stores the tensors of both a second time by stage, as
`stages.<i>.` followed by the stage's own names. The released DeiT III and DINOv2 files use other
names for layer scale and registers, which are read too. The original has no Soft MoE: the names of
its gate are our own.
"""

import dataclasses
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
    single_heads,
    stacked_heads,
    transpose,
)
from common_jax.weights.table import Table
from m2mkd_jax.stages import Place, stage_name

LEFT_OUT = {"mask_token": "it replaces masked patches, which only pretraining has"}


def network_table(
    depths: Sequence[int],
    *,
    heads: int,
    channels: int = 3,
    experts: int = 0,
    norm_after_pool: bool = False,
) -> Table:
    """The tensor names of a whole network.

    Args:
      depths: number of blocks in each stage.
      heads: number of attention heads.
      channels: number of image channels.
      experts: number of experts of a V-MoE; 0 for a ViT.
      norm_after_pool: see `vit.ViTConfig`; timm gives that norm another name.
    """
    layout = _Layout(heads, channels, experts, norm_after_pool)
    entries, aliases, first = {}, {}, 0
    for stage, depth in enumerate(depths):
        place = Place.of(stage, len(depths))
        own = _stage_entries(depth, place, layout)
        root = _stage_entries(depth, place, layout, first=first)
        listed = (f"stages.{stage}.{name}" for name in _names(own))
        # The same tensors in the same order, with blocks numbered within the stage in one and
        # through the network in the other.
        aliases |= dict(zip(listed, _names(root), strict=True))
        entries |= below(root, source="", target=f"{stage_name(stage)}/")
        first += depth
    return Table(entries, aliases, LEFT_OUT)


def stage_table(
    depth: int,
    place: Place,
    *,
    heads: int,
    channels: int = 3,
    experts: int = 0,
    norm_after_pool: bool = False,
) -> Table:
    """The tensor names of a single stage of `depth` blocks, by our parameter paths below the stage;
    see `network_table`."""
    entries = _stage_entries(depth, place, _Layout(heads, channels, experts, norm_after_pool))
    return Table(entries, {f"stages.0.{name}": name for name in _names(entries)}, LEFT_OUT)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The sizes and switches that determine the layout and names of tensors."""

    heads: int
    channels: int
    experts: int
    norm_after_pool: bool


def _stage_entries(
    depth: int, place: Place, layout: _Layout, *, first: int = 0
) -> dict[str, Entry]:
    """The entries of one stage, whose first block has number `first` in the file."""
    entries = {}
    if place in (Place.FIRST, Place.ONLY):
        entries = {
            "pos_embed": copy("pos_embed"),
            **optional({"cls_token": copy("cls_token")}),
            **optional({"register_tokens": _either(copy("reg_token"), copy("register_tokens"))}),
            "patches/kernel": patches("patch_embed.proj.weight", layout.channels),
            **optional({"patches/bias": copy("patch_embed.proj.bias")}),
            **optional(norm("norm_pre", "norm_pre")),
        }
    for block in range(depth):
        entries |= below(
            _block(layout.heads, layout.experts),
            source=f"blocks.{first + block}.",
            target=f"block_{block}/",
        )
    if place in (Place.LAST, Place.ONLY):
        entries |= {
            **norm("fc_norm" if layout.norm_after_pool else "norm", "norm"),
            **below(optional(_attention_pool(layout.heads)), source="attn_pool.", target="pool/"),
            **optional(linear("head", "head")),  # some files lack it, see `is_headless`
        }
    return entries


def _attention_pool(heads: int) -> dict[str, Entry]:
    return {
        "probe": copy("latent"),
        "attention/query/kernel": single_heads("q.weight", heads),
        "attention/query/bias": single_heads("q.bias", heads),
        "attention/key_value/kernel": stacked_heads("kv.weight", heads, parts=2),
        "attention/key_value/bias": stacked_heads("kv.bias", heads, parts=2),
        "attention/out/kernel": join_heads("proj.weight", heads),
        "attention/out/bias": copy("proj.bias"),
        **norm("norm", "norm"),
        **linear("mlp.fc1", "mlp/up"),
        **linear("mlp.fc2", "mlp/down"),
    }


def _either(entry: Entry, other: Entry) -> Entry:
    """The entry of a tensor that has a different name in some files."""
    return dataclasses.replace(entry, forms=(other,))


def _block(heads: int, experts: int) -> dict[str, Entry]:
    scales = {f"scale{i}": _either(copy(f"ls{i}.gamma"), copy(f"gamma_{i}")) for i in (1, 2)}
    trunk = {
        **norm("norm1", "norm1"),
        "attention/qkv/kernel": stacked_heads("attn.qkv.weight", heads),
        **optional({"attention/qkv/bias": stacked_heads("attn.qkv.bias", heads)}),
        "attention/out/kernel": join_heads("attn.proj.weight", heads),
        "attention/out/bias": copy("attn.proj.bias"),
        **norm("norm2", "norm2"),
        **optional(scales),
    }
    mlp = linear("mlp.fc1", "mlp/up") | linear("mlp.fc2", "mlp/down")
    if not experts:
        return trunk | mlp
    return {
        **_stitch("pre_stitch"),
        **trunk,
        # Either may be absent: `moe_blocks` decides which blocks have experts.
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
        "moe/router/phi": copy("moe.gate.phi"),
        "moe/router/scale": copy("moe.gate.scale"),
    }
    return {
        "moe/up": _expert("htoh4.weight", count),
        "moe/up_bias": _expert("htoh4.bias", count),
        "moe/down": _expert("h4toh.weight", count),
        "moe/down_bias": _expert("h4toh.bias", count),
        # The order of the original's files: experts, then gate.
        **router,
    }


def _expert(tensor: str, count: int) -> Entry:
    """One parameter (E, ...) of all experts: stored as one tensor [1, ...] per expert, or fused as
    [E, ...]. Weights are [out, in]."""
    turn = _transposed if tensor.endswith(".weight") else _unchanged
    fused = Entry((f"moe.experts.{tensor}",), turn, lambda x: (turn(x),))
    return Entry(
        tuple(f"moe.experts.{e}.{tensor}" for e in range(count)),
        # Each tensor has a first axis of size 1, which becomes the axis of experts.
        lambda *tensors: turn(np.concatenate(tensors)),
        lambda x: tuple(turn(x[e : e + 1]) for e in range(count)),
        forms=(fused,),
    )


def _transposed(x: np.ndarray) -> np.ndarray:
    return x.swapaxes(-1, -2)


def _unchanged(x: np.ndarray) -> np.ndarray:
    return x


def _names(entries: Entries) -> list[str]:
    """All names under which the tensors of these entries may be stored."""
    forms = (form for entry in entries.values() for form in (entry, *entry.forms))
    return [name for form in forms for name in form.names]
