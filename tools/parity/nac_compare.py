"""Compares outputs and gradients in NAC's golden cases."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import numpy as jnp

from m2mkd_jax.nac.layers import NOISE
from parity.cases import Case, Comparison
from parity.nac_configs import split_ffn
from parity.nac_networks import to_device
from parity.names import write_part

# Tolerance of gradients, if the json has none.
GRADIENTS = {"atol": 1e-4, "rtol": 1e-4}

# run(params, inputs) -> outputs by name
Run = Callable[[Any, dict[str, jax.Array]], Mapping[str, jax.Array]]


def bind(case: Case, module, noise: Mapping[str, Any], method) -> Run:
    """A module's run(params, inputs), in the case's mode and with its recorded noise."""
    train = case.config["mode"] == "train"

    def apply(params, inputs):
        variables = {"params": params, NOISE: to_device(_drop_none(noise))}
        return {"out": module.apply(variables, inputs, train, method=method)}

    return apply


def compare(
    case: Case, run: Run, params, part: str, inputs: tuple[str, ...]
) -> Iterator[Comparison]:
    """Compares the outputs and, if the case has any, the gradients of <outputs, cotangents> with
    respect to parameters and inputs."""
    arrays = case.arrays
    operands = {name: jnp.asarray(arrays[f"inputs/{name}"]) for name in inputs}
    with nn.intercept_methods(split_ffn):
        outputs, vjp = jax.jit(lambda *arguments: jax.vjp(run, *arguments))(
            to_device(params), operands
        )
    for name, want in arrays.below("outputs/").items():
        yield from compare_extended(
            f"outputs/{name}", outputs[name], want, case.tolerance("float32")
        )
    if not case.config["has_grads"]:
        return
    cotangents = {name: arrays.get(f"inputs/cot_{name}") for name in outputs}
    weights = {n: jnp.zeros_like(outputs[n]) if a is None else a for n, a in cotangents.items()}
    by_params, by_inputs = jax.jit(lambda weights: vjp(weights))(to_device(weights))
    got = write_part(by_params, part)
    got |= {f"inputs/{name}": gradient for name, gradient in by_inputs.items()}
    for name, want in arrays.below("grads/").items():
        yield f"grads/{name}", got[name], want, *grad_tolerance(case)


def compare_extended(name: str, got, want, tolerance) -> Iterator[Comparison]:
    """Compares the positions of NaN and infinities exactly, and finite values to tolerance."""
    got, want = np.asarray(got), np.asarray(want)
    for kind, test in (("NaN", np.isnan), ("-inf", np.isneginf), ("inf", np.isposinf)):
        if test(want).any() or test(got).any():
            yield f"{name} {kind}", test(got), test(want), 0, 0
    finite = np.isfinite(want)
    yield name, np.where(finite, got, 0.0), np.where(finite, want, 0.0), *tolerance


def grad_tolerance(case: Case) -> tuple[float, float]:
    """(atol, rtol) for gradients."""
    stated = case.config.get("grad_tolerance", GRADIENTS)
    return stated["atol"], stated["rtol"]


def _drop_none(tree: Mapping[str, Any]) -> dict[str, Any]:
    present = {k: _drop_none(v) if isinstance(v, Mapping) else v for k, v in tree.items()}
    return {k: v for k, v in present.items() if v is not None}
