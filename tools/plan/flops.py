"""Floating-point operations of a program, counted in its jaxpr.

XLA's own count takes the body of a loop once, however often it runs, and is of the optimised
program; a jaxpr is the program as written, with the length of every scan. Counted are matrix
products and convolutions, a multiplication with its addition as two; all else (softmax, norms,
activations, the optimizer) is left out, as is usual for model FLOPs.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

# jax's name, in the stack of names, of the part of a backward pass that recomputes values.
AGAIN = "rematted_computation"


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of a program.

    Attributes:
      model: those that its result needs, once each.
      again: those that `jax.checkpoint` repeats in the backward pass, to save memory.
    """

    model: int = 0
    again: int = 0

    @property
    def executed(self) -> int:
        """All that are computed."""
        return self.model + self.again

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.model + other.model, self.again + other.again)

    def __mul__(self, times: int) -> "Flops":
        return Flops(times * self.model, times * self.again)


class UnknownLength(ValueError):
    """The length of a loop with products depends on its data."""


def count_flops(function: Callable[..., Any], *arguments: Any) -> Flops:
    """The operations of function(*arguments), over all devices.

    A scan counts as often as it runs; of the branches of a conditional the one with the most
    operations. A convolution over a dilated input counts the products with its zeros.

    Args:
      function: what `jax.make_jaxpr` takes.
      arguments: arrays or their shapes.

    Raises:
      UnknownLength: for a `while` loop with products in it, unless a conditional has another
        branch.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: core.Jaxpr) -> Flops:
    total = Flops()
    for equation in jaxpr.eqns:
        total += _count_equation(equation)
    return total


def _count_equation(equation: core.JaxprEqn) -> Flops:
    name, parameters = equation.primitive.name, equation.params
    if name in PRODUCTS:
        found = Flops(model=PRODUCTS[name](equation))
    elif name == "cond":
        found = _largest(parameters["branches"])
    else:
        found = sum((_count(inner) for inner in _inner(parameters)), Flops())
        if name == "while" and found.executed:
            raise UnknownLength("the length of a loop with matrix products depends on its data")
        if name == "scan":
            found *= parameters["length"]
        elif name == "shard_map":
            found *= math.prod(parameters["mesh"].shape.values())
    if AGAIN in str(equation.source_info.name_stack):
        found = Flops(again=found.executed)
    return found


def _largest(branches: Any) -> Flops:
    counts, problem = [], None
    for branch in branches:
        try:
            counts.append(_count(branch.jaxpr))
        except UnknownLength as error:
            problem = error
    if not counts:
        raise problem
    return max(counts, key=lambda found: found.executed)


def _inner(parameters: dict[str, Any]) -> list[core.Jaxpr]:
    """The jaxprs that an equation runs."""
    found = []
    for value in parameters.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, core.ClosedJaxpr):
                found.append(one.jaxpr)
            elif isinstance(one, core.Jaxpr):
                found.append(one)
    return found


def _dot(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    return 2 * inner * math.prod(equation.outvars[0].aval.shape)


def _ragged_dot(equation: core.JaxprEqn) -> int:
    """All rows of the ragged axis, whichever group they are of."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    left, right = (variable.aval.shape for variable in equation.invars[:2])
    taken = {*contracted, *batch, *numbers.rhs_group_dimensions}
    free = math.prod(size for axis, size in enumerate(right) if axis not in taken)
    return 2 * math.prod(left) * free


def _convolution(equation: core.JaxprEqn) -> int:
    kernel = equation.invars[1].aval.shape
    outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(equation.outvars[0].aval.shape) * (math.prod(kernel) // outputs)


PRODUCTS: dict[str, Callable[[core.JaxprEqn], int]] = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
}
