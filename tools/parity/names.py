"""Maps tensors in m2mKD's and NAC's golden cases from and to the original's names: whole networks,
parts and gradients."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from common_jax.weights.entries import Entries, Entry
from common_jax.weights.table import Table, write
from m2mkd_jax.models import vit_names
from m2mkd_jax.nac import names as nac_names
from m2mkd_jax.nac.model import NacConfig
from m2mkd_jax.stages import Place

State = Mapping[str, np.ndarray]
PARTS: Mapping[str, Callable[[str], Entries]] = {
    "code_linear": nac_names.code_linear,
    "attention": nac_names.attention,
    "ffn": nac_names.ffn,
    "propagator": nac_names.propagator,
    "read_in": nac_names.read_in,
    "read_out": nac_names.read_out,
    "tokenizer": lambda kind: nac_names.tokenizer(),
    "latents": lambda kind: nac_names.latents(),
    "seeder": lambda kind: nac_names.seeder(),
    "read_in_student": nac_names.read_in_student,
    "mediator_student": nac_names.mediator_student,
    "read_out_student": nac_names.read_out_student,
}


def read_stage(state: State, *, heads: int) -> dict[str, Any]:
    """A stage of a ViT or V-MoE from a state with stage-local names."""
    depth = len({m[1] for m in (re.match(r"blocks\.(\d+)\.", name) for name in state) if m})
    return _read([_stage(depth, heads=heads, experts=_experts(state)).entries.items()], state)


def read_network(state: State, *, depths: Sequence[int], heads: int) -> dict[str, Any]:
    """A whole ViT or V-MoE from a state with root names; per-stage aliases are ignored."""
    table = vit_names.network_table(depths, heads=heads, experts=_experts(state))
    root = {name: array for name, array in state.items() if not name.startswith("stages.")}
    return _read([table.entries.items()], root)


def write_stage(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A stage, or a part or gradients of one, under stage-local names in the original's order."""
    flat = traverse_util.flatten_dict(params, sep="/")
    blocks = [int(m[1]) for m in (re.match(r"block_(\d+)/", path) for path in flat) if m]
    experts = (len(x) for path, x in flat.items() if "/moe/up" in path or "/moe/down" in path)
    table = _stage(max(blocks, default=-1) + 1, heads=1, experts=next(experts, 1))
    return _in_order(write(table, params))


def write_network(params: Mapping[str, Any], *, depths: Sequence[int]) -> dict[str, np.ndarray]:
    """A network, or some of its stages, under root names in the original's order."""
    state = {}
    for stage, own in params.items():
        number = int(stage.removeprefix("stage_"))
        for name, array in write_stage(own).items():
            state[root_name(name, stage=number, depths=depths)] = array
    return state


def root_name(name: str, *, stage: int, depths: Sequence[int]) -> str:
    """The root name of tensor `name` of stage `stage`."""
    return _aliases(tuple(depths))[f"stages.{stage}.{name}"]


@functools.cache  # the table is large, and this is asked for every tensor
def _aliases(depths: tuple[int, ...]) -> Mapping[str, str]:
    return vit_names.network_table(depths, heads=1, experts=99).aliases


def read_part(state: State, part: str) -> dict[str, Any]:
    """The parameters of a NAC's part (a key of PARTS), from a state with that part's names."""
    kinds = (PARTS[part](kind).items() for kind in nac_names.CODE_LINEAR)
    return _read(kinds, state)


def write_part(params: Mapping[str, Any], part: str) -> dict[str, np.ndarray]:
    """The inverse of `read_part`, also for gradients."""
    return _write_kinds(params, {kind: PARTS[part](kind) for kind in nac_names.CODE_LINEAR})


def read_nac(state: State, config: NacConfig) -> dict[str, Any]:
    """A whole NAC with the iterations and parameter sharing of `config`."""
    return _read((table.entries.items() for table in _nac_tables(config).values()), state)


def write_nac(params: Mapping[str, Any], config: NacConfig) -> dict[str, np.ndarray]:
    """The inverse of `read_nac`, also for gradients."""
    return _write_kinds(params, {k: table.entries for k, table in _nac_tables(config).items()})


def _nac_tables(config: NacConfig) -> dict[str, Table]:
    return {
        kind: nac_names.network_table(
            dataclasses.replace(config, linear=dataclasses.replace(config.linear, kind=kind))
        )
        for kind in nac_names.CODE_LINEAR
    }


def _stage(depth: int, *, heads: int, experts: int) -> Table:
    return vit_names.stage_table(depth, Place.ONLY, heads=heads, experts=experts)


def _experts(state: State) -> int:
    numbers = [int(m[1]) for m in (re.search(r"experts\.(\d+)\.", name) for name in state) if m]
    return max(numbers, default=0) + 1


def _read(tables: Iterable[Iterable[tuple[str, Entry]]], state: State) -> dict[str, Any]:
    """The parameters whose tensors are all in `state`; raises ValueError for unused tensors."""
    flat, known = {}, set()
    for path, entry in itertools.chain.from_iterable(tables):
        if all(name in state for name in entry.names):
            flat[path] = entry.read(*(np.asarray(state[name]) for name in entry.names))
            known |= set(entry.names)
    if left := sorted(state.keys() - known):
        raise ValueError(f"these tensors have no place: {left}")
    return traverse_util.unflatten_dict(flat, sep="/")


def _write_kinds(params: Mapping[str, Any], kinds: Mapping[str, Entries]) -> dict[str, np.ndarray]:
    """Tensors of layers of several kinds; the kind of each follows from its parameters."""
    flat = traverse_util.flatten_dict(params, sep="/")
    entries = {path: kinds[_kind(path, flat)][path] for path in flat}
    return write(Table(entries), params)


def _kind(path: str, flat: Mapping[str, Any]) -> str:
    layer = "/".join([*path.split("/")[:-1], ""])
    if f"{layer}code_bias" in flat:
        return "weight_modulated"
    return "modulated" if f"{layer}code_kernel" in flat else "plain"


def _in_order(state: State) -> dict[str, np.ndarray]:
    """The state reordered so that the tensors of each expert are together."""

    def layer(name: str) -> str:
        return name.partition(".experts.")[0] if ".experts." in name else name

    def expert(name: str) -> int:
        return int(name.partition(".experts.")[2].split(".")[0])

    names = []
    for _, group in itertools.groupby(state, key=layer):
        group = list(group)
        names += sorted(group, key=expert) if ".experts." in group[0] else group
    return {name: state[name] for name in names}
