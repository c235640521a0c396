"""The collectives of a compiled program, and the bytes that its chips send."""

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from common_jax.commands.plan.hlo import Array, Instruction, Program, starts_collective

# Bytes that each chip sends (and receives) in a ring of n chips, given the size of the result.
SENT: dict[str, Callable[[float, int], float]] = {
    "all-gather": lambda size, n: size * (n - 1) / n,
    "all-reduce": lambda size, n: 2 * size * (n - 1) / n,
    "all-to-all": lambda size, n: size * (n - 1) / n,
    "collective-permute": lambda size, n: size,
    "ragged-all-to-all": lambda size, n: size * (n - 1) / n,
    "reduce-scatter": lambda size, n: size * (n - 1),
}
# XLA's name for a TPU fusion that sums over a group and leaves one part on each chip.
SCATTER = "all-reduce-scatter"
# Transfers between slices, which XLA delegates to the hosts, with the name of the collective.
_OVER_SLICES = re.compile(r'"xla_megascale_runtime".*_xla_megascale_transfer_type="(\w+)"')
_TRANSFERS = {"ONE_TO_ONE": "collective-permute"}  # transfers named differently in SENT


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind over groups of one size.

    Attributes:
      kind: a key of SENT.
      group: number of chips in a group, or of slices for transfers between slices.
      crosses: whether groups span several slices, or several hosts of GPUs.
      count: total number of runs per step.
      bytes: total bytes that a chip sends per step.
    """

    kind: str
    group: int
    crosses: bool
    count: int
    bytes: float


def find_collectives(program: Program, *, devices: int, slices: int = 1) -> list[Collective]:
    """The collectives of a program, counted as often as they run, see `Program.runs`.

    An all-to-all moves its whole result except a chip's own part; a ragged one moves at most that.
    Groups of a single chip are skipped, since nothing moves. A collective that overlaps other work
    counts where it starts. For transfers between slices, the bytes are those that a chip passes to
    its host.

    Args:
      program: the compiled program.
      devices: number of devices, which are ordered by slice.
      slices: number of slices.
    """
    totals: dict[tuple[str, int, bool], tuple[int, float]] = {}
    for name, times in program.runs.items():
        computation = program.computations[name]
        for instruction in computation.values():
            kind = instruction.kind.removesuffix("-start")
            if kind == "send" and (match := _OVER_SLICES.search(instruction.rest)):
                kind = _TRANSFERS.get(match[1], match[1].lower().replace("_", "-"))
                count, sent = totals.get((kind, slices, True), (0, 0.0))
                sent += times * instruction.result[0].bytes
                totals[kind, slices, True] = count + times, sent
                continue
            later = instruction.overlaps and not starts_collective(computation)
            if kind not in SENT or later:
                continue
            groups = _groups(instruction.rest, devices)
            size = groups.shape[1]
            if size == 1:
                continue
            slice_of = groups // (devices // slices)
            crosses = bool(np.any(slice_of != slice_of[:, :1]))
            result = sum(array.bytes for array in received(instruction))
            if name.startswith(SCATTER):
                kind, result = "reduce-scatter", result / size
            count, sent = totals.get((kind, size, crosses), (0, 0.0))
            sent += times * SENT[kind](result, size)
            totals[kind, size, crosses] = count + times, sent
    return [Collective(*key, *value) for key, value in sorted(totals.items())]


def received(instruction: Instruction) -> tuple[Array, ...]:
    """The arrays that a collective produces; the result of a "-start" begins with its operands."""
    if not instruction.kind.endswith("-start") or instruction.kind == "all-reduce-start":
        return instruction.result
    operands = len(instruction.operands)
    return instruction.result[operands : 2 * operands]


def _groups(attributes: str, devices: int) -> np.ndarray:
    """The chips of each group, (groups, chips); for a permutation, the pairs."""
    lists = r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)+)\}"
    if match := re.search(lists, attributes):
        groups = re.findall(r"\{([\d,]+)\}", match[1])
        return np.array([[int(number) for number in group.split(",")] for group in groups])
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=(\[\S+\](?:T\(\S+?\))?)", attributes):
        return _permuted(match[2]).reshape([int(size) for size in match[1].split(",")])
    pattern = r"replica_groups=mesh\[([^\]]+)\](?:, device_ids=\((\[[^()]*\S+)\))? \{([^}:]*)\}"
    if match := re.search(pattern, attributes):
        return _over_axes(match[1], match[2] or f"[{devices}]", match[3])
    if match := re.search(r"replica_groups=(?!\{\})[^,]*", attributes):
        raise ValueError(f"a collective lists its groups in an unknown format: {match[0]}")
    return np.arange(devices)[None]


def _permuted(text: str) -> np.ndarray:
    """Chips in the order of `[2,4]T(1,0)`: numbered in that shape, then with axes transposed."""
    sizes, _, order = text.removesuffix(")").partition("]")
    sizes = [int(size) for size in sizes.removeprefix("[").split(",")]
    ids = np.arange(np.prod(sizes)).reshape(sizes)
    return ids.transpose([int(axis) for axis in order[2:].split(",")]) if order else ids


def _over_axes(mesh: str, ids: str, axes: str) -> np.ndarray:
    """Groups of chips that differ only along some `axes` of a mesh, such as `'b'` of
    `'a'=32,'b'=8`."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    inner = [list(sizes).index(name) for name in re.findall(r"'([^']+)'", axes)]
    outer = [axis for axis in range(len(sizes)) if axis not in inner]
    chips = _permuted(ids).reshape(list(sizes.values())).transpose(*outer, *inner)
    return chips.reshape(-1, int(np.prod([list(sizes.values())[axis] for axis in inner])))
