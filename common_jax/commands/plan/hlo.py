"""Parses the text of a compiled program: its instructions, and how often each of them runs.

XLA's text is not a stable interface: this was written for version LIBTPU of libtpu and version CUDA
of JAX's CUDA plugin.
"""

import dataclasses
import functools
import math
import re

LIBTPU = "0.0.52"
CUDA = "0.10.2"
# Bits per element of each type; other types, such as tokens, have none.
BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
    "s32": 32, "u32": 32, "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64,
    "c64": 64, "c128": 128, "f8e4m3fn": 8, "f8e5m2": 8, "f8e4m3b11fnuz": 8,
}  # fmt: skip
# A TPU collective that overlaps other work appears in the fusion that starts it and then in every
# fusion that it overlaps, each time with its chain id.
_CHAIN, _STARTED = "chain_id=", "AsyncCollectiveStart"
_LEAF = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
_NAME = re.compile(r"%([\w.-]+)")
_CALLED = re.compile(
    r"(calls|to_apply|body|condition|branch_computations|true_computation|false_computation)"
    r"=(%[\w.-]+|\{[^}]*\})"
)


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a program: its type, its shape, and its memory space (0 is HBM)."""

    kind: str
    shape: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        """Its size, without padding."""
        return -(-math.prod(self.shape) * BITS.get(self.kind, 0) // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: name of its result.
      kind: the operation, such as "fusion".
      result: the arrays of its result, tuples flattened.
      operands: names of its arguments.
      rest: the text after the operands: attributes and metadata.
      root: whether its result is the computation's result.
    """

    name: str
    kind: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    root: bool

    @functools.cached_property
    def called(self) -> dict[str, list[str]]:
        """The computations that it calls, by attribute."""
        return {match[1]: _NAME.findall(match[2]) for match in _CALLED.finditer(self.rest)}

    @property
    def overlaps(self) -> bool:
        """True for a collective that overlaps other work, or a later mention of one."""
        return _CHAIN in self.rest


Computation = dict[str, Instruction]


def starts_collective(computation: Computation) -> bool:
    """True if a computation starts a collective that then overlaps other computations."""
    return any(_STARTED in one.rest for one in computation.values())


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      computations: computations by name.
      entry: name of the entry computation.
    """

    computations: dict[str, Computation]
    entry: str

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation runs that the entry calls, directly or indirectly. All
        branches of a conditional count; for the length of loops see `turns`."""
        times: dict[str, int] = {}
        pending = [(self.entry, 1)]
        while pending:
            name, count = pending.pop()
            times[name] = times.get(name, 0) + count
            for instruction in self.computations[name].values():
                runs = count * self.turns(instruction)
                for names in instruction.called.values():
                    pending.extend((one, runs) for one in names if one in self.computations)
        return times

    @functools.cached_property
    def open_loops(self) -> dict[int | None, int]:
        """Counts the loops whose length depends on data, as often as they run, by the number of
        iterations that `most` gives them."""
        loops: dict[int | None, int] = {}
        for name, times in self.runs.items():
            for instruction in self.computations[name].values():
                if self.trips(instruction) is None:
                    turns = self.most(instruction)
                    loops[turns] = loops.get(turns, 0) + times
        return loops

    def turns(self, instruction: Instruction) -> int:
        """How often an instruction runs each computation that it calls: `trips` if known, else
        `most`, else 1."""
        return self.trips(instruction) or self.most(instruction) or 1

    def most(self, loop: Instruction) -> int | None:
        """The most iterations of a loop that reads or writes one slice of an array per iteration:
        the number of such slices in the array. None for a loop that does neither."""
        names, most = list(loop.called["body"]), None
        for name in names:
            computation = self.computations[name]
            for one in computation.values():
                if one.kind in ("dynamic-slice", "dynamic-update-slice"):
                    part = one if one.kind == "dynamic-slice" else computation[one.operands[1]]
                    whole = computation[one.operands[0]].result[0].shape
                    sizes = zip(whole, part.result[0].shape, strict=True)
                    most = max(most or 1, *(size // of for size, of in sizes))
                inner = () if one.kind == "while" else one.called.values()
                names += [x for group in inner for x in group if x not in names]
        return most

    def trips(self, instruction: Instruction) -> int | None:
        """How often an instruction runs each computation that it calls: a loop's length, None if
        unknown; 1 for other kinds."""
        if instruction.kind != "while":
            return 1
        if match := re.search(r"known_trip_count\W+n\W+(\d+)", instruction.rest):
            return int(match[1])
        return self._compared(instruction.called["condition"][0])

    def _compared(self, condition: str) -> int | None:
        """The bound of a loop that counts up from 0: the only constant in its condition or in the
        computations that the condition calls."""
        bounds, kinds = [], []
        names = [condition]
        for name in names:
            for instruction in self.computations[name].values():
                if match := re.match(r"constant\((\d+)\)", instruction.rest):
                    bounds.append(int(match[1]))
                if instruction.kind == "compare":
                    kinds += re.findall(r"direction=(\w+)", instruction.rest)
                names += [one for called in instruction.called.values() for one in called]
        return bounds[0] if len(bounds) == 1 and kinds == ["LT"] else None


def read_program(text: str, *, on_chip: bool = True) -> Program:
    """Parses the text of `jax.stages.Compiled.as_text()`.

    Args:
      text: the compiled program.
      on_chip: whether memory spaces other than 0 are on-chip; False for GPUs, where they are just
        other parts of HBM.

    Raises:
      ValueError: for any other text.
    """
    if not on_chip:
        text = _SPACE.sub("", text)
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current[match[2]] = _instruction(match[2], match[3], root=match[1] is not None)
    if entry is None:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY")
    return Program(computations, entry)


def _instruction(name: str, text: str, *, root: bool) -> Instruction:
    result, text = _split(text) if text.startswith("(") else text.split(" ", 1)
    kind, _, text = text.strip().partition("(")
    operands, rest = _split("(" + text)
    if kind in ("constant", "parameter"):
        rest = f"{kind}{operands}{rest}"
    return Instruction(name, kind, arrays(result), tuple(_NAME.findall(operands)), rest, root)


def _split(text: str) -> tuple[str, str]:
    """Splits text into the bracketed part that it begins with, and the rest."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: place + 1], text[place + 1 :]
    return text, ""


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays in a type, such as `(f32[8,128]{1,0:T(8,128)S(1)}, s32[])`."""
    result = []
    for kind, sizes, layout in _LEAF.findall(text):
        space = _SPACE.search(layout)
        shape = tuple(int(size) for size in sizes.split(",") if size)
        result.append(Array(kind, shape, int(space[1]) if space else 0))
    return tuple(result)
