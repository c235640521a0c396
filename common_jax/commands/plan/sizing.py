"""The memory of a compiled step on a chip, and a lower bound of its time."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from common_jax.commands.plan.chips import Chip
from common_jax.commands.plan.collectives import Collective, find_collectives
from common_jax.commands.plan.flops import Flops
from common_jax.commands.plan.hlo import read_program
from common_jax.commands.plan.traffic import hbm_bytes

SHOWN = 5  # largest arrays that are listed


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a chip's HBM in XLA's layout.

    Attributes:
      arguments: state, helpers, batch.
      temporaries: intermediate values.
      output: new state and metrics.
      aliased: the part of `output` in the memory of donated arguments.
      code: the program itself.
    """

    arguments: int
    temporaries: int
    output: int
    aliased: int
    code: int

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.arguments + self.temporaries + self.output - self.aliased + self.code


@dataclasses.dataclass(frozen=True)
class Sizing:
    """The analysis of a compiled step.

    Attributes:
      chip: its figures.
      devices: number of chips.
      flops: per step, over all chips.
      memory: per chip.
      traffic: bytes between HBM and cores per step and chip.
      collectives: of the step.
      unknown_loops: number of loops of unknown length, which count as run once.
    """

    chip: Chip
    devices: int
    flops: Flops
    memory: Memory
    traffic: int
    collectives: tuple[Collective, ...]
    unknown_loops: int

    @property
    def seconds(self) -> dict[str, float]:
        """Time per step of each resource at its peak rate: "compute", "hbm" and "ici", without
        traffic between slices."""
        inside = sum(one.bytes for one in self.collectives if not one.crosses)
        return {
            "compute": self.flops.executed / self.devices / self.chip.flops,
            "hbm": self.traffic / self.chip.hbm_bandwidth,
            "ici": inside / self.chip.ici,
        }

    @property
    def step_seconds(self) -> float:
        """The roofline: the longest of `seconds`, with perfect overlap."""
        return max(self.seconds.values())

    @property
    def mfu(self) -> float:
        """The highest possible model FLOPs utilisation: model FLOPs per chip and second over the
        chip's peak, for a step of `step_seconds`."""
        ideal = self.flops.model / self.devices / self.chip.flops
        return ideal / self.step_seconds


def size_up(
    compiled: jax.stages.Compiled, flops: Flops, chip: Chip, *, devices: int, slices: int = 1
) -> Sizing:
    """Analyses a step that is compiled for `devices` chips in `slices`, with `flops` over all."""
    program = read_program(compiled.as_text())
    return Sizing(
        chip=chip,
        devices=devices,
        flops=flops,
        memory=_memory(compiled),
        traffic=hbm_bytes(program),
        collectives=tuple(find_collectives(program, devices=devices, slices=slices)),
        unknown_loops=program.unknown_loops,
    )


def _memory(compiled: jax.stages.Compiled) -> Memory:
    stats = compiled.memory_analysis()
    return Memory(
        arguments=stats.argument_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        output=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )


@dataclasses.dataclass(frozen=True)
class ArraySize:
    """Large arrays on a chip: name, shape of a shard, and total bytes."""

    name: str
    shape: str
    bytes: int


def largest_arguments(arguments: Any) -> list[ArraySize]:
    """The largest of a program's arguments, ShapeDtypeStructs with shardings, on a device; those of
    one shape whose paths differ only in numbers are one entry."""
    sizes: dict[tuple[str, str], int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(arguments):
        name = re.sub(r"\d+", "*", jax.tree_util.keystr(path, simple=True, separator="/"))
        shard = leaf.sharding.shard_shape(leaf.shape)
        key = name, f"{leaf.dtype.name}[{','.join(map(str, shard))}]"
        sizes[key] = sizes.get(key, 0) + math.prod(shard) * leaf.dtype.itemsize
    return _largest(sizes)


def largest_kept(kept: Any, params: Any, *, devices: int) -> list[ArraySize]:
    """The largest arrays per device that a forward pass keeps for the backward pass.

    Args:
      kept: ShapeDtypeStructs of the whole batch.
      params: those of the parameters; arrays of their shapes are not activations.
      devices: number of devices that activations are split over.
    """
    known = {leaf.shape for leaf in jax.tree.leaves(params)}
    sizes: dict[tuple[str, str], int] = {}
    for leaf in jax.tree.leaves(kept):
        if leaf.shape not in known and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            shape = f"{leaf.dtype.name}[{','.join(map(str, leaf.shape))}]"
            key = "kept for the backward pass", f"a share of {shape}"
            size = math.prod(leaf.shape) * leaf.dtype.itemsize // devices
            sizes[key] = sizes.get(key, 0) + size
    return _largest(sizes)


def _largest(sizes: Mapping[tuple[str, str], int]) -> list[ArraySize]:
    ranked = sorted(((size, *key) for key, size in sizes.items()), reverse=True)
    return [ArraySize(name, shape, size) for size, name, shape in ranked[:SHOWN]]


def bytes_text(size: float) -> str:
    """A size in GB (1e9 bytes) or MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def collectives_text(collectives: Sequence[Collective]) -> str:
    """Collectives on one line: kind, count, bytes sent per chip."""
    return ", ".join(
        f"{one.kind} {one.count} x of {one.group} chips"
        f"{' over slices' if one.crosses else ''}, {bytes_text(one.bytes)}"
        for one in collectives
    )
