"""A stack of layers as one loop, whose body is compiled once."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn
from jax import numpy as jnp

# Operations on single elements, cheaper to compute again than to read: what a loop's backward pass
# would otherwise keep of a layer is for the most part their results, some of them in float32. In
# jax 0.12 a part of erf's derivative is a "custom_jvp_call".
_CHEAP = {
    "abs", "add", "broadcast_in_dim", "convert_element_type", "custom_jvp_call", "div", "erf",
    "exp", "integer_pow", "log", "logistic", "max", "min", "mul", "neg", "pow", "reshape", "rsqrt",
    "select_n", "sign", "sqrt", "square", "squeeze", "sub", "tanh",
}  # fmt: skip


def _keep(operation: Any, *_: Any, **__: Any) -> bool:
    """True if a loop keeps the results of an operation for its backward pass."""
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

    Parameters remain those of the single layers and are stacked in the program: a copy of them,
    sharded like them. Layers sow as if they ran one by one; their random draws differ from that.
    The backward pass computes operations on single elements again.

    Args:
      layers: modules bound to their parent, with parameters, that differ only in these and in
        their names; called as layer(x, *arguments, *own_entries_of_each).
      x: of the shape and the type that a layer returns.
      arguments: the same for all layers; those that are not arrays are constants of the program.
      remat: whether the layers are under `nn.remat`, which keeps their inputs alone.
      each: arrays with one entry per layer.
      streams: of random numbers that the layers draw from, where they are given.

    Returns:
      The output of the last layer, and the outputs of all, stacked.
    """
    first = layers[0]
    single = first.clone(parent=None, name=None)
    keys = {
        name: jnp.stack([layer.make_rng(name) for layer in layers])
        for name in streams
        if first.has_rng(name)
    }
    parameters = [layer.variables["params"] for layer in layers]
    mutable = first.scope.mutable or []  # with False, `apply` hands back x alone
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parameters)

    def run(x: jax.Array, of_one: Any) -> tuple[jax.Array, Any]:
        params, keys, own = of_one
        variables = {"params": params}
        x, sown = single.apply(variables, x, *arguments, *own, rngs=keys, mutable=mutable)
        return x, (x, sown)

    if not remat:
        run = jax.checkpoint(run, prevent_cse=False, policy=_keep)
    x, (outputs, sown) = jax.lax.scan(run, x, (stacked, keys, tuple(each)))
    for i, layer in enumerate(layers):
        for collection, values in jax.tree.map(lambda leaf, i=i: leaf[i], sown).items():
            for name, value in values.items():
                layer.put_variable(collection, name, value)
    return x, outputs
