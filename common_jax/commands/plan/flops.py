"""Floating-point operations of a program, counted in its jaxpr.

XLA's own count takes the optimised program and the body of a loop only once. A jaxpr is the program
as written, with the length of every scan. As usual for model FLOPs, only matrix products and
convolutions count, with a multiply-add as two; softmax, norms, activations and the optimizer do
not.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

# Marks, in jax's name stack, the part of a backward pass that recomputes values.
AGAIN = "rematted_computation"


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of a program.

    Attributes:
      model: operations that the result requires.
      again: operations that `jax.checkpoint` repeats in the backward pass to save memory.
    """

    model: int = 0
    again: int = 0

    @property
    def executed(self) -> int:
        """All operations, including repeated ones."""
        return self.model + self.again

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.model + other.model, self.again + other.again)

    def __mul__(self, times: int) -> "Flops":
        return Flops(times * self.model, times * self.again)


class UnknownLength(ValueError):
    """The length of a loop with matrix products depends on data."""


def count_flops(function: Callable[..., Any], *arguments: Any) -> Flops:
    """The operations of function(*arguments) over all devices; arguments are arrays or shapes.

    A scan counts as often as it runs, a conditional as its branch with the most operations. A
    convolution over a dilated input counts the products with zeros. A Pallas kernel counts as its
    `cost_estimate`, or else as its body times the size of its grid.

    Raises:
      UnknownLength: for a `while` loop with products, unless a conditional has another branch.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    # XLA removes dead code, such as a frozen network whose output the loss ignores.
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(needed)


def _count(jaxpr: core.Jaxpr) -> Flops:
    return sum(map(_count_equation, jaxpr.eqns), Flops())


def _count_equation(equation: core.JaxprEqn) -> Flops:
    name, parameters = equation.primitive.name, equation.params
    if name in PRODUCTS:
        flops = Flops(model=PRODUCTS[name](equation))
    elif name in ATTENTION:
        flops = ATTENTION[name] * _scores(equation)
    elif name == "cond":
        flops = _largest(parameters["branches"])
    elif name == "pallas_call" and parameters["cost_estimate"] is not None:
        flops = Flops(model=parameters["cost_estimate"].flops)
    else:
        flops = sum((_count(inner) for inner in _inner(parameters)), Flops())
        if name == "while" and flops.executed:
            raise UnknownLength("the length of a loop with matrix products depends on its data")
        if name == "scan":
            flops *= parameters["length"]
        elif name == "shard_map":
            flops *= math.prod(parameters["mesh"].shape.values())
        elif name == "pallas_call":
            flops *= math.prod(parameters["grid_mapping"].grid)
    if AGAIN in str(equation.source_info.name_stack):
        flops = Flops(again=flops.executed)
    return flops


def _largest(branches: Any) -> Flops:
    counts, problem = [], None
    for branch in branches:
        try:
            counts.append(_count(branch.jaxpr))
        except UnknownLength as error:
            problem = error
    if not counts:
        raise problem
    return max(counts, key=lambda flops: flops.executed)


def _inner(parameters: dict[str, Any]) -> list[core.Jaxpr]:
    """The jaxprs that an equation runs."""
    jaxprs = []
    for value in parameters.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, core.ClosedJaxpr):
                jaxprs.append(one.jaxpr)
            elif isinstance(one, core.Jaxpr):
                jaxprs.append(one)
    return jaxprs


def _dot(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    return 2 * inner * math.prod(equation.outvars[0].aval.shape)


def _ragged_dot(equation: core.JaxprEqn) -> int:
    """Counts all rows of the ragged axis, whatever their group."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    left, right = (variable.aval.shape for variable in equation.invars[:2])
    shared = {*contracted, *batch, *numbers.rhs_group_dimensions}
    free = math.prod(size for axis, size in enumerate(right) if axis not in shared)
    return 2 * math.prod(left) * free


def _convolution(equation: core.JaxprEqn) -> int:
    kernel = equation.invars[1].aval.shape
    outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(equation.outvars[0].aval.shape) * (math.prod(kernel) // outputs)


def _scores(equation: core.JaxprEqn) -> int:
    """Operations of queries times keys in cuDNN attention."""
    heads_first = equation.params["layout"] == 1
    query, key = (variable.aval.shape for variable in equation.invars[:2])
    return 2 * math.prod(query) * key[2 if heads_first else 1]


# cuDNN attention: the number of products of size queries x keys. The backward pass recomputes the
# first product of the forward pass.
ATTENTION = {
    "dot_product_attention_fwd_wrapper": Flops(model=2),
    "dot_product_attention_bwd_wrapper": Flops(model=4, again=1),
}
PRODUCTS: dict[str, Callable[[core.JaxprEqn], int]] = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
}
