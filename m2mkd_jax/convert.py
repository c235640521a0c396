"""Weights under the original's names and in its layouts, to our parameter trees and back.

The original's linear layers hold [out, in], its patch convolution [D, channels, p, p], the rows of
its fused projection are ordered query, key, value, then head, then channel, and every expert has
tensors of its own with a leading axis of 1. Plain numpy; both directions move numbers and change
none, so that a round trip is the identity.

A stage is read under stage-local names (`blocks.0...` in each). A network is read under root names
(blocks numbered through): the aliases `stages.*` that the original's state dict lists beside them
are the same tensors, and are not looked at.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from common_jax.weights import list_problems
from m2mkd_jax.stages import stage_name

State = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What a layout cannot tell from the array; only one direction asks for each."""

    heads: int = 1
    channels: int = 3


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How an array is turned: from the original's layout, and back to it."""

    load: Callable[[np.ndarray, _Sizes], np.ndarray]
    store: Callable[[np.ndarray, _Sizes], np.ndarray]


def _load_qkv(array: np.ndarray, sizes: _Sizes) -> np.ndarray:
    """[3D, ...] to (..., 3, H, K)."""
    split = array.reshape(3, sizes.heads, -1, *array.shape[1:])
    return np.moveaxis(split, (0, 1, 2), (-3, -2, -1))


def _store_qkv(array: np.ndarray, sizes: _Sizes) -> np.ndarray:
    rows = math.prod(array.shape[-3:])
    return np.moveaxis(array, (-3, -2, -1), (0, 1, 2)).reshape(rows, *array.shape[:-3])


def _load_patches(array: np.ndarray, sizes: _Sizes) -> np.ndarray:
    """[D, channels, p, p] to (p * p * channels, D)."""
    return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])


def _store_patches(array: np.ndarray, sizes: _Sizes) -> np.ndarray:
    side = math.isqrt(array.shape[0] // sizes.channels)
    if side * side * sizes.channels != array.shape[0]:
        raise ValueError(
            f"patches/kernel has {array.shape[0]} rows, which are no square patch of "
            f"channels={sizes.channels}"
        )
    return array.reshape(side, side, sizes.channels, -1).transpose(3, 2, 0, 1)


_AS_IS = _Layout(lambda a, _: a, lambda a, _: a)
_LINEAR = _Layout(lambda a, _: a.swapaxes(-1, -2), lambda a, _: a.swapaxes(-1, -2))
_QKV = _Layout(_load_qkv, _store_qkv)
_OUT = _Layout(
    lambda a, sizes: a.T.reshape(sizes.heads, -1, a.shape[0]),
    lambda a, _: a.reshape(-1, a.shape[-1]).T,
)
_PATCHES = _Layout(_load_patches, _store_patches)

# (the original's name, our path, layout), in the order of the original's state dict. A stage has
# these before and behind its blocks ...
_EMBEDDING = (
    ("pos_embed", "pos_embed", _AS_IS),
    ("cls_token", "cls_token", _AS_IS),
    ("patch_embed.proj.weight", "patches/kernel", _PATCHES),
    ("patch_embed.proj.bias", "patches/bias", _AS_IS),
)
_CLASSIFIER = (
    ("norm.weight", "norm/scale", _AS_IS),
    ("norm.bias", "norm/bias", _AS_IS),
    ("head.weight", "head/kernel", _LINEAR),
    ("head.bias", "head/bias", _AS_IS),
)
# ... and a block has these, by part. The experts' are named as in the fused layout, one tensor for
# all of them.
_BLOCK = {
    "pre_stitch": (
        ("pre_stitch.ln.weight", "pre_stitch/norm/scale", _AS_IS),
        ("pre_stitch.ln.bias", "pre_stitch/norm/bias", _AS_IS),
        ("pre_stitch.fc.weight", "pre_stitch/linear/kernel", _LINEAR),
        ("pre_stitch.fc.bias", "pre_stitch/linear/bias", _AS_IS),
    ),
    "trunk": (
        ("norm1.weight", "norm1/scale", _AS_IS),
        ("norm1.bias", "norm1/bias", _AS_IS),
        ("attn.qkv.weight", "attention/qkv/kernel", _QKV),
        ("attn.qkv.bias", "attention/qkv/bias", _QKV),
        ("attn.proj.weight", "attention/out/kernel", _OUT),
        ("attn.proj.bias", "attention/out/bias", _AS_IS),
        ("norm2.weight", "norm2/scale", _AS_IS),
        ("norm2.bias", "norm2/bias", _AS_IS),
    ),
    "mlp": (
        ("mlp.fc1.weight", "mlp/up/kernel", _LINEAR),
        ("mlp.fc1.bias", "mlp/up/bias", _AS_IS),
        ("mlp.fc2.weight", "mlp/down/kernel", _LINEAR),
        ("mlp.fc2.bias", "mlp/down/bias", _AS_IS),
    ),
    "moe": (
        ("moe.experts.htoh4.weight", "moe/up", _LINEAR),
        ("moe.experts.htoh4.bias", "moe/up_bias", _AS_IS),
        ("moe.experts.h4toh.weight", "moe/down", _LINEAR),
        ("moe.experts.h4toh.bias", "moe/down_bias", _AS_IS),
        ("moe.gate.gate.weight", "moe/router/kernel", _LINEAR),
        ("moe.gate.gate.bias", "moe/router/bias", _AS_IS),
    ),
    "post_stitch": (
        ("post_stitch.ln.weight", "post_stitch/norm/scale", _AS_IS),
        ("post_stitch.ln.bias", "post_stitch/norm/bias", _AS_IS),
        ("post_stitch.fc.weight", "post_stitch/linear/kernel", _LINEAR),
        ("post_stitch.fc.bias", "post_stitch/linear/bias", _AS_IS),
    ),
}
_OPTIONAL = ("attn.qkv.bias", "moe.gate.gate.bias")
_EXPERT = re.compile(r"(.*moe\.experts\.)(\d+)\.(.*)")
_FUSED = re.compile(r"(.*moe\.experts\.)(htoh4|h4toh)\.(weight|bias)")
_BLOCK_NAME = re.compile(r"blocks\.(\d+)\.(.*)")


def stage_from_original(state: State, *, heads: int) -> dict[str, Any]:
    """Parameters of one stage from its state under stage-local names.

    Args:
      state: arrays by the original's names; experts one by one, or fused in
        `moe.experts.htoh4.weight` [E, hidden, D] and the like.
      heads: attention heads.

    Returns:
      Nested dict as `EncoderStage` takes it.

    Raises:
      ValueError: for unknown, missing or badly shaped tensors; all that are unknown or missing are
        named.
    """
    state = _fuse_experts(state)
    blocks = _split_blocks(state)
    expected = set(_expected(state, blocks))
    problems = [f"{name} is missing" for name in sorted(expected - state.keys())]
    problems += [f"{name} is unknown" for name in sorted(state.keys() - expected)]
    if problems:
        raise ValueError(f"the state does not fit a stage:{list_problems(problems)}")
    flat = {}
    for name, path, layout in _entries(len(blocks)):
        if name in state:
            array = np.asarray(state[name])
            if layout in (_QKV, _OUT) and array.shape[-1 if layout is _OUT else 0] % heads:
                raise ValueError(f"{name} of shape {array.shape} does not split into {heads} heads")
            flat[path] = layout.load(array, _Sizes(heads=heads))
    return traverse_util.unflatten_dict(flat, sep="/")


def network_from_original(
    root_state: State, *, depths: Sequence[int], heads: int
) -> dict[str, dict[str, Any]]:
    """Parameters of a whole network, one subtree a stage, from its state under root names.

    Args:
      root_state: arrays by the original's names; aliases under `stages.` are ignored.
      depths: blocks in each stage.
      heads: attention heads.

    Raises:
      ValueError: as `stage_from_original`, and when the blocks are not as many as `depths` says.
    """
    state = {name: a for name, a in root_state.items() if not name.startswith("stages.")}
    numbers = {int(m[1]) for m in map(_BLOCK_NAME.match, state) if m}
    if numbers != set(range(sum(depths))):
        raise ValueError(
            f"depths={tuple(depths)} are blocks 0..{sum(depths) - 1} and the state has "
            f"{sorted(numbers)}"
        )
    required = [name for name, *_ in (*_EMBEDDING, *_CLASSIFIER)]
    if missing := [name for name in required if name not in state]:
        raise ValueError(f"the state of a whole network lacks {missing}")
    before_blocks = {name for name, *_ in _EMBEDDING}
    stages = [{} for _ in depths]
    for name, array in state.items():
        if match := _BLOCK_NAME.match(name):
            stage, block = locate(int(match[1]), depths)
            stages[stage][f"blocks.{block}.{match[2]}"] = array
        else:
            stages[0 if name in before_blocks else -1][name] = array
    return {
        stage_name(i): stage_from_original(stage, heads=heads) for i, stage in enumerate(stages)
    }


def stage_to_original(params: Mapping[str, Any], *, channels: int = 3) -> dict[str, np.ndarray]:
    """The state of one stage under stage-local names, in the original's order, experts one by one.

    Args:
      params: a stage's parameters, or a part of them (or anything else of their shapes, such as
        gradients).
      channels: of the images, for the patch convolution.

    Raises:
      ValueError: for a path that is none of a stage's.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    blocks = [int(m[1]) for m in (re.match(r"block_(\d+)/", path) for path in flat) if m]
    entries = list(_entries(max(blocks, default=-1) + 1))
    if unknown := sorted(flat.keys() - {path for _, path, _ in entries}):
        raise ValueError(f"the original has no names for {unknown}")
    state = {}
    for name, path, layout in entries:
        if path in flat:
            state[name] = layout.store(np.asarray(flat[path]), _Sizes(channels=channels))
    return _part_experts(state)


def network_to_original(
    params: Mapping[str, Any], *, depths: Sequence[int], channels: int = 3
) -> dict[str, np.ndarray]:
    """The state of a network under root names, blocks numbered through.

    Args:
      params: one subtree a stage; stages may be absent.
      depths: blocks in each stage, the absent ones too.
      channels: of the images, for the patch convolution.

    Raises:
      ValueError: as `stage_to_original`, and for a subtree that is no stage of `depths`.
    """
    names = [stage_name(i) for i in range(len(depths))]
    if unknown := sorted(set(params) - set(names)):
        raise ValueError(f"{unknown} are none of the {len(depths)} stages of depths={depths}")
    state = {}
    for i, stage in enumerate(names):
        for name, array in stage_to_original(params.get(stage, {}), channels=channels).items():
            state[root_name(name, stage=i, depths=depths)] = array
    return state


def root_name(name: str, *, stage: int, depths: Sequence[int]) -> str:
    """The root name of the tensor that stage `stage` calls `name`."""
    if match := _BLOCK_NAME.match(name):
        return f"blocks.{int(match[1]) + sum(depths[:stage])}.{match[2]}"
    return name


def part_experts(state: State) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The state with fused experts `experts.X` [E, ...] cut into `experts.<e>.X` [1, ...], and for
    each of these the fused tensor that it is of."""
    parted, origins = {}, {}
    for name, array in state.items():
        if match := _FUSED.fullmatch(name):
            if np.ndim(array) == 0:
                raise ValueError(f"{name} is a single number, and should hold all experts")
            for e in range(len(array)):
                part = f"{match[1]}{e}.{match[2]}.{match[3]}"
                parted[part], origins[part] = array[e : e + 1], name
        else:
            parted[name] = array
    if both := sorted(origins.keys() & state.keys()):
        raise ValueError(f"experts are there apart and fused, in {both}; leave out either")
    return parted, origins


def _entries(blocks: int) -> Iterable[tuple[str, str, _Layout]]:
    """All that a stage of so many blocks can hold, in the original's order."""
    yield from _EMBEDDING
    for i in range(blocks):
        for part in _BLOCK.values():
            for name, path, layout in part:
                yield f"blocks.{i}.{name}", f"block_{i}/{path}", layout
    yield from _CLASSIFIER


def _expected(state: State, blocks: Mapping[int, set[str]]) -> Iterable[str]:
    """Names that a stage with some of these must have: a part is there whole, or not at all."""
    for part in (_EMBEDDING, _CLASSIFIER):
        names = [name for name, *_ in part]
        if any(name in state for name in names):
            yield from names
    for i in range(max(blocks, default=0) + 1):
        held = blocks.get(i, set())
        parts = {part: {name for name, *_ in entries} for part, entries in _BLOCK.items()}
        present = {"trunk"} | {part for part, names in parts.items() if held & names}
        if present >= {"mlp", "moe"}:
            raise ValueError(f"blocks.{i} has both an mlp and a moe")
        if not present & {"mlp", "moe"}:
            present.add("mlp")
        for part in present:
            required = parts[part].difference(_OPTIONAL) | held & parts[part]
            yield from (f"blocks.{i}.{name}" for name in required)


def _split_blocks(state: State) -> dict[int, set[str]]:
    blocks = {}
    for match in filter(None, map(_BLOCK_NAME.match, state)):
        blocks.setdefault(int(match[1]), set()).add(match[2])
    return blocks


def locate(block: int, depths: Sequence[int]) -> tuple[int, int]:
    """Stage of a block of the network, numbered through, and the block's number within it."""
    for stage, depth in enumerate(depths):
        if block < depth:
            return stage, block
        block -= depth
    raise AssertionError("block numbers were compared with the depths")


def _fuse_experts(state: State) -> dict[str, np.ndarray]:
    """The state with `experts.<e>.X` [1, ...] stacked to `experts.X` [E, ...]."""
    fused, apart = {}, {}
    for name, array in state.items():
        if match := _EXPERT.fullmatch(name):
            apart.setdefault(match[1] + match[3], {})[int(match[2])] = array
        else:
            fused[name] = array
    for name, experts in apart.items():
        layer = _expert_layer((name, experts))
        count = 1 + max(e for other in apart if other.startswith(layer) for e in apart[other])
        missing = sorted(set(range(count)) - set(experts))
        if missing or name in fused:
            problem = f"is missing for experts {missing}" if missing else "is there fused as well"
            raise ValueError(f"{name.replace(layer, layer + '<e>.')} {problem}")
        fused[name] = np.concatenate([experts[e] for e in range(count)])
    return fused


def _part_experts(state: State) -> dict[str, np.ndarray]:
    """The state with `experts.X` [E, ...] cut into `experts.<e>.X` [1, ...], expert by expert."""
    parted = {}
    for layer, tensors in itertools.groupby(state.items(), key=_expert_layer):
        if not layer:
            parted |= dict(tensors)
            continue
        tensors = list(tensors)
        for e in range(len(tensors[0][1])):
            for name, array in tensors:
                parted[name.replace(layer, f"{layer}{e}.")] = array[e : e + 1]
    return parted


def _expert_layer(item: tuple[str, np.ndarray]) -> str:
    before, found, _ = item[0].partition("moe.experts.")
    return before + found if found else ""
