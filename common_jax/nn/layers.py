"""A stack of layers as one loop, so that the layer is compiled once."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn
from jax import numpy as jnp

# Elementwise operations, which are cheaper to recompute than to read. Their results, some of them
# in float32, would be most of what a loop keeps of a layer for its backward pass.
_CHEAP = {
    "abs", "add", "broadcast_in_dim", "convert_element_type", "div", "erf", "exp", "integer_pow",
    "log", "logistic", "max", "min", "mul", "neg", "pow", "reshape", "rsqrt", "select_n", "sign",
    "sqrt", "square", "squeeze", "sub", "tanh",
}  # fmt: skip


def _keep(operation: Any, *_: Any, **parameters: Any) -> bool:
    """True if a loop saves the results of an operation for its backward pass."""
    if operation.name == "custom_jvp_call":
        # In jax 0.12 a part of erf's derivative is one. Others are products.
        return "dot" in str(parameters["call_jaxpr"])
    return operation.name not in _CHEAP


def scan(
    layers: Sequence[nn.Module],
    x: jax.Array,
    *arguments: Any,
    remat: bool,
    each: Sequence[jax.Array] = (),
    streams: Sequence[str] = (),
) -> tuple[jax.Array, jax.Array]:
    """Applies `layers` one after the other to x, in a `jax.lax.scan`.

    Each layer keeps its own parameters. The program stacks them, which copies them, sharded as they
    are. Layers sow as if they ran one by one, but their random draws differ. The backward pass
    recomputes elementwise operations.

    Args:
      layers: modules bound to their parent, with parameters, that differ only in their parameters
        and names; called as layer(x, *arguments, *own_entries_of_each).
      x: input, with the shape and dtype that a layer returns.
      arguments: the same for all layers; those that are not arrays are constants of the program.
      remat: whether the layers are wrapped in `nn.remat`, which saves only their inputs.
      each: arrays with one entry per layer.
      streams: names of the random streams that the layers draw from, if present.

    Returns:
      The output of the last layer, and the stacked outputs of all layers.
    """
    first = layers[0]
    # Detached: as a child of its parent it would look up its own parameters there, not those of the
    # layer that the scan has reached.
    single = first.clone(parent=None, name=None)
    keys = {
        name: jnp.stack([layer.make_rng(name) for layer in layers])
        for name in streams
        if first.has_rng(name)
    }
    parameters = [layer.variables["params"] for layer in layers]
    mutable = first.scope.mutable or []  # with False, `apply` would return only x
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parameters)

    def run(x: jax.Array, of_one: Any) -> tuple[jax.Array, Any]:
        params, keys, own = of_one
        variables = {"params": params}
        x, sown = single.apply(variables, x, *arguments, *own, rngs=keys, mutable=mutable)
        return x, (x, sown)

    if not remat:
        # Inside a scan, CSE cannot undo the recomputation, so it need not be prevented.
        run = jax.checkpoint(run, prevent_cse=False, policy=_keep)
    x, (outputs, sown) = jax.lax.scan(run, x, (stacked, keys, tuple(each)))
    # What the layers sowed goes under their own names, so that callers see no difference to a loop.
    for i, layer in enumerate(layers):
        for collection, values in jax.tree.map(lambda leaf, i=i: leaf[i], sown).items():
            for name, value in values.items():
                layer.put_variable(collection, name, value)
    return x, outputs
