"""Counts matrix products and convolutions in a compiled program, from their operands' shapes."""

import dataclasses
import json
import math
import re
from collections.abc import Callable

from common_jax.commands.plan.hlo import Array, Computation, Instruction, Program

# Number of products in fused attention, each queries x keys x width; the backward pass repeats the
# first.
FORWARD, BACKWARD = 2, 5
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_LISTS = r"{}=\{{([\d,]*)\}}"


@dataclasses.dataclass(frozen=True)
class Products:
    """The products in one run of a program.

    Attributes:
      calls: number of calls, by what computes them: a library, "kernel" for a Pallas kernel, whose
        products the text does not show, or "fusion" for products that XLA compiles itself.
      flops: operations, by the type of the operands.
    """

    calls: dict[str, int]
    flops: dict[str, int]


def find_products(program: Program) -> Products:
    """The products of a GPU program, counted as often as they run, see `Program.runs`."""
    calls: dict[str, int] = {}
    flops: dict[str, int] = {}
    for name, times in program.runs.items():
        computation = program.computations[name]
        for one in computation.values():
            maker = made_by(one)
            if maker is None:
                continue
            calls[maker] = calls.get(maker, 0) + times
            if count := COUNTS.get(maker):
                kind = computation[one.operands[0]].result[0].kind
                flops[kind] = flops.get(kind, 0) + times * count(computation, one)
    return Products(calls, flops)


def made_by(one: Instruction) -> str | None:
    """What computes an instruction, if it is a product: a key of COUNTS or "kernel"."""
    if one.kind in ("dot", "convolution"):
        return "fusion"
    target = target_of(one)
    if target.startswith("__cublas"):
        return "cuBLAS"
    if target.startswith("__cudnn$fmha"):
        return "cuDNN attention"
    if target.startswith("__cudnn$conv"):
        return "cuDNN convolution"
    return "kernel" if "triton" in target or "mosaic" in target else None


def target_of(one: Instruction) -> str:
    """The function that a custom call calls; "" for other instructions."""
    match = _TARGET.search(one.rest) if one.kind == "custom-call" else None
    return match[1] if match else ""


def _arrays(computation: Computation, one: Instruction) -> list[Array]:
    return [computation[name].result[0] for name in one.operands]


def _config(one: Instruction) -> dict:
    """The JSON config that an instruction carries for the library that it calls."""
    start = one.rest.index("backend_config=") + len("backend_config=")
    return json.JSONDecoder().raw_decode(one.rest[start:])[0]


def _gemm(computation: Computation, one: Instruction) -> int:
    numbers = _config(one)["gemm_backend_config"]["dot_dimension_numbers"]
    shared = [*numbers["rhs_contracting_dimensions"], *numbers["rhs_batch_dimensions"]]
    return _product(computation, one, {int(axis) for axis in shared})


def _dot(computation: Computation, one: Instruction) -> int:
    if one.kind == "convolution":
        return _convolution(computation, one)
    lists = [
        re.search(_LISTS.format(name), one.rest)
        for name in ("rhs_contracting_dims", "rhs_batch_dims")
    ]
    axes = [axis for match in lists if match for axis in match[1].split(",") if axis]
    return _product(computation, one, set(map(int, axes)))


def _product(computation: Computation, one: Instruction, shared: set[int]) -> int:
    """Operations of all rows of the first operand by the axes of the second that are not shared."""
    left, right = _arrays(computation, one)[:2]
    free = math.prod(size for axis, size in enumerate(right.shape) if axis not in shared)
    return 2 * math.prod(left.shape) * free


def _convolution(computation: Computation, one: Instruction) -> int:
    """2 x outputs x kernel entries per output. A backward convolution counts the same, with the
    roles of result and operands exchanged."""
    operands, result = _arrays(computation, one), one.result[0]
    target = target_of(one)
    output, kernel = result, operands[1]
    if target.endswith("BackwardInput"):
        output = operands[0]
    elif target.endswith("BackwardFilter"):
        output, kernel = operands[1], result
    features = re.search(r"dim_labels=\w+_(\w+)->", one.rest)[1].index("o")
    return 2 * math.prod(output.shape) * (math.prod(kernel.shape) // kernel.shape[features])


def _attention(computation: Computation, one: Instruction) -> int:
    config = _config(one)["cudnn_fmha_backend_config"]
    scores = config["intermediate_tensor_shape"]["dimensions"]  # batch, heads, queries, keys
    width = _arrays(computation, one)[0].shape[-1]
    times = BACKWARD if "Backward" in target_of(one) else FORWARD
    return times * 2 * math.prod(map(int, scores)) * width


COUNTS: dict[str, Callable[[Computation, Instruction], int]] = {
    "cuBLAS": _gemm,
    "cuDNN attention": _attention,
    "cuDNN convolution": _convolution,
    "fusion": _dot,
}
