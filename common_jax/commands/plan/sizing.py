"""The memory that a compiled step takes on a chip, and a lower bound on its time."""

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
from common_jax.commands.plan.launches import Launches, count_launches
from common_jax.commands.plan.products import Products, find_products
from common_jax.commands.plan.traffic import hbm_bytes

SHOWN = 5  # number of largest arrays listed


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a chip's HBM, in XLA's layout.

    Attributes:
      arguments: state, helpers, batch.
      temporaries: intermediate values.
      output: new state and metrics.
      aliased: the part of `output` that reuses the memory of donated arguments.
      code: the program itself.
    """

    arguments: int
    temporaries: int
    output: int
    aliased: int
    code: int

    @property
    def total(self) -> int:
        """Peak bytes."""
        return self.arguments + self.temporaries + self.output - self.aliased + self.code


@dataclasses.dataclass(frozen=True)
class Sizing:
    """The analysis of a compiled step.

    Attributes:
      chip: the chip's specs.
      devices: number of chips.
      flops: operations per step, over all chips.
      memory: memory per chip.
      traffic: bytes between HBM and cores, per step and chip.
      collectives: the step's collectives.
      open_loops: loops whose length depends on data, by the number of iterations that they count
        as, see `Program.open_loops`.
      launches: kernel launches per step; GPUs only.
      products: products in the compiled program; GPUs only.
    """

    chip: Chip
    devices: int
    flops: Flops
    memory: Memory
    traffic: int
    collectives: tuple[Collective, ...]
    open_loops: Mapping[int | None, int]
    launches: Launches | None = None
    products: Products | None = None

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per step that each resource takes at its peak rate: "compute", "hbm", the network
        within a slice or host, and "launches" on GPUs."""
        inside = sum(one.bytes for one in self.collectives if not one.crosses)
        seconds = {
            "compute": self._compute_seconds,
            "hbm": self.traffic / self.chip.hbm_bandwidth,
            self.chip.network: inside / self.chip.links,
        }
        if self.launches is not None:
            started = self.launches.kernels * self.chip.launch
            seconds["launches"] = started + self.launches.waits * self.chip.wait
        return seconds

    @property
    def _compute_seconds(self) -> float:
        """Compute time for the operations of the program as written. Those in the compiled text
        take the peak rate of their type, all others that of bfloat16."""
        shown = {} if self.products is None else self.products.flops
        slower = sum(count for kind, count in shown.items() if kind in ("f32", "f64"))
        others = max(self.flops.executed / self.devices, sum(shown.values())) - slower
        return others / self.chip.flops + slower / (self.chip.flops32 or self.chip.flops)

    @property
    def step_seconds(self) -> float:
        """The roofline: the longest of `seconds`, with perfect overlap."""
        return max(self.seconds.values())

    @property
    def mfu(self) -> float:
        """The highest possible model FLOPs utilisation (MFU): model FLOPs per chip and second over
        the chip's peak, for a step of `step_seconds`."""
        ideal = self.flops.model / self.devices / self.chip.flops
        return ideal / self.step_seconds


def size_up(
    compiled: jax.stages.Compiled, flops: Flops, chip: Chip, *, devices: int, groups: int = 1
) -> Sizing:
    """Analyses a step compiled for `devices` chips in `groups` slices or hosts; `flops` is over all
    chips."""
    gpu = chip.launch > 0
    program = read_program(compiled.as_text(), on_chip=not gpu)
    return Sizing(
        chip=chip,
        devices=devices,
        flops=flops,
        memory=_memory(compiled),
        traffic=hbm_bytes(program),
        collectives=tuple(find_collectives(program, devices=devices, slices=groups)),
        open_loops=program.open_loops,
        launches=count_launches(program) if gpu else None,
        products=find_products(program) if gpu else None,
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
    """Large arrays on a chip: their name, the shape of a shard, and total bytes."""

    name: str
    shape: str
    bytes: int


def largest_arguments(arguments: Any) -> list[ArraySize]:
    """The largest of a program's arguments, ShapeDtypeStructs with shardings, per device. Arguments
    of the same shape whose paths differ only in numbers form one entry."""
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
      kept: ShapeDtypeStructs for the whole batch.
      params: ShapeDtypeStructs of the parameters; arrays with their shapes are not activations.
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


def collectives_text(collectives: Sequence[Collective], chip: Chip) -> str:
    """Formats collectives on one line: kind, count, bytes sent per chip."""
    return ", ".join(
        f"{one.kind} {one.count} x of {one.group} {chip.unit}s"
        f"{f' over {chip.group}s' if one.crosses else ''}, {bytes_text(one.bytes)}"
        for one in collectives
    )
