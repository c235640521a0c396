"""Bytes that a compiled program reads from and writes to a chip's memory."""

from common_jax.commands.plan.collectives import SENT, received
from common_jax.commands.plan.hlo import Array, Computation, Instruction, Program, starts_collective
from common_jax.commands.plan.products import target_of

# Operations that move no data themselves, such as those that only name parts of other results.
FREE = {
    "after-all", "bitcast", "call", "conditional", "constant", "get-tuple-element", "iota",
    "opt-barrier", "parameter", "partition-id", "replica-id", "tuple", "while",
}  # fmt: skip
# Operations that read only the part of their first operand that they return.
PARTS = {"dynamic-slice", "gather", "slice"}
# The end of a collective that overlapped other work, which was counted at its start.
ENDED = "AsyncCollectiveDone"
# A TPU fusion that "concatenates" operands that are already adjacent, and so moves nothing.
NAMES_ALONE = 'custom_call_target="ConcatBitcast"'


def hbm_bytes(program: Program) -> int:
    """Bytes moved between memory and cores in one run of the program.

    Sums the bytes that each instruction outside fusions reads and writes in HBM, as often as it
    runs. Arrays in on-chip memory and layout padding do not count. A slice counts only its own
    size, and an in-place slice update or scatter only what it writes.
    """
    runs, total = program.runs, 0
    for name in stages(program):
        computation = program.computations[name]
        total += runs[name] * sum(
            _instruction_bytes(program, computation, one) for one in computation.values()
        )
    return total


def stages(program: Program) -> list[str]:
    """The entry computation, and those that loops, conditionals and calls run."""
    names = [program.entry]
    for name in names:
        for instruction in program.computations[name].values():
            if instruction.kind in ("while", "conditional", "call"):
                called = (one for group in instruction.called.values() for one in group)
                names += [one for one in called if one not in names]
    return names


def _instruction_bytes(program: Program, computation: Computation, one: Instruction) -> int:
    if one.kind in FREE or one.kind.endswith("-done") or NAMES_ALONE in one.rest:
        return 0
    if one.kind in ("copy-start", "slice-start"):  # (source, target, context) in either order
        target = _copied(one)
        return target.bytes * ((target.space == 0) + _in_hbm(computation, one.operands[0]))
    inner = one.called.get("calls", ()) if one.kind == "fusion" else ()
    fused = program.computations[inner[0]] if inner else None
    if fused is not None and starts_collective(fused):
        gathered = next(collective for collective in fused.values() if collective.overlaps)
        return _written(gathered) + sum(_size(computation, operand) for operand in one.operands)
    read = 0
    for place, operand in enumerate(one.operands):
        if _in_hbm(computation, operand):
            part = _size(computation, operand)
            if fused is not None:
                part = min(part, _read(program, fused, place))
            elif one.kind in PARTS and place == 0:
                part = min(part, sum(array.bytes for array in one.result))
            read += part
    if one.kind == "dynamic-update-slice":  # reads the update and writes it in place
        return 2 * _size(computation, one.operands[1])
    if one.kind == "scatter":  # operands: n arrays, the indices, and n updates
        index = len(one.operands) // 2
        moved = [_size(computation, operand) for operand in one.operands[index:]]
        return sum(moved) + (1 + _combines(program, one)) * sum(moved[1:])
    return read + (_written(one) if fused is None else _written_by(fused, one))


def _copied(one: Instruction) -> Array:
    """The target array of an asynchronous copy."""
    # A few bytes are the copy's context, not data.
    arrays = [array for array in one.result if array.bytes > 4] or list(one.result)
    sizes = sorted(arrays, key=lambda array: array.bytes)
    return sizes[0] if one.kind == "slice-start" else one.result[0]


def _in_hbm(computation: Computation, name: str) -> bool:
    return name in computation and any(array.space == 0 for array in computation[name].result)


def _size(computation: Computation, name: str) -> int:
    return sum(array.bytes for array in computation[name].result if array.space == 0)


def _written(one: Instruction) -> int:
    results = one.result
    if one.kind.removesuffix("-start") in SENT:
        results = received(one)
    elif target_of(one).startswith(("__cublas", "__cudnn")) and len(results) > 1:
        results = results[:-1]  # without the library's workspace
    return sum(array.bytes for array in results if array.space == 0)


def _combines(program: Program, scatter: Instruction) -> bool:
    """True if a scatter combines updates with the old values, False if it only replaces them."""
    combiner = program.computations[scatter.called["to_apply"][0]]
    return any(one.root and one.kind != "parameter" for one in combiner.values())


def _written_by(fused: Computation, fusion: Instruction) -> int:
    """Bytes that a fusion writes; only the update for a result that is updated in place."""
    root = next(one for one in fused.values() if one.root)
    parts = root.operands if root.kind == "tuple" else (root.name,)
    total = 0
    for array, name in zip(fusion.result, parts, strict=False):
        passed_on = (
            fused[name].kind == "parameter" or fused[name].overlaps or ENDED in fused[name].rest
        )
        if array.space == 0 and not passed_on:
            update = _update(fused, name)
            total += array.bytes if update is None else min(array.bytes, update)
    return total


def _update(fused: Computation, name: str) -> int | None:
    """Bytes of the update if `name` is an array with one slice updated, or a parameter that updates
    are scattered into; else None."""
    one = _without_bitcasts(fused, name)
    if one.kind == "scatter" and _without_bitcasts(fused, one.operands[0]).kind == "parameter":
        return _scattered(fused, one)
    if one.kind != "dynamic-update-slice":
        return None
    return sum(array.bytes for array in fused[one.operands[1]].result)


def _without_bitcasts(fused: Computation, name: str) -> Instruction:
    """The instruction that computes `name`, up to a change of shape."""
    while fused[name].kind == "bitcast":
        name = fused[name].operands[0]
    return fused[name]


def _scattered(fused: Computation, scatter: Instruction) -> int:
    """Bytes of a scatter's updates."""
    updates = scatter.operands[len(scatter.operands) // 2 + 1 :]
    return sum(array.bytes for name in updates for array in fused[name].result)


def _read(program: Program, fused: Computation, place: int) -> int:
    """Bytes that a fusion reads from its parameter number `place`."""
    name = next(
        one.name
        for one in fused.values()
        if one.kind == "parameter" and one.rest.startswith(f"parameter({place})")
    )
    return _used(program, fused, name)


def _used(program: Program, fused: Computation, name: str) -> int:
    whole, total = sum(array.bytes for array in fused[name].result), 0
    for one in fused.values():
        if name not in one.operands:
            continue
        if one.kind in ("bitcast", "convert"):  # fused into its users, so count what these read
            share = whole / sum(array.bytes for array in one.result)
            total += round(share * _used(program, fused, one.name))
        elif one.kind in PARTS and one.operands[0] == name:
            total += sum(array.bytes for array in one.result)
        elif one.kind == "dynamic-update-slice" and one.operands[0] == name:
            continue
        elif one.kind == "scatter" and one.operands[0] == name:
            total += _scattered(fused, one) if _combines(program, one) else 0
        elif one.overlaps or ENDED in one.rest or (one.root and one.kind == "tuple"):
            continue  # a collective that overlaps the fusion, or a result passed through
        elif one.kind == "fusion" and one.called.get("calls"):
            inner = program.computations[one.called["calls"][0]]
            total += sum(
                _read(program, inner, place)
                for place, operand in enumerate(one.operands)
                if operand == name
            )
        else:
            return whole
    return min(whole, total)
