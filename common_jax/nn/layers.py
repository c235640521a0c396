"""Layers that follow each other, as one loop whose body is compiled once."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn
from jax import numpy as jnp


def scan(
    layers: Sequence[nn.Module],
    x: jax.Array,
    *arguments: Any,
    each: Sequence[jax.Array] = (),
    streams: Sequence[str] = (),
) -> tuple[jax.Array, jax.Array]:
    """What the last of `layers` makes of x, and what each makes, in a `jax.lax.scan`.

    The parameters stay those of the single layers, and are stacked in the program: a copy of them,
    laid out like them. What layers sow is there as if they had run by themselves; their random
    draws are others than then.

    Args:
      layers: modules bound to their parent, with parameters, that differ by these and their names
        alone; called as layer(x, *arguments, *of_each).
      x: of the shape and the type that a layer gives.
      arguments: the same for all; those that are no arrays are constants of the program.
      each: arrays with an entry a layer.
      streams: of random numbers that the layers draw from, where they are given.
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

    x, (outputs, sown) = jax.lax.scan(run, x, (stacked, keys, tuple(each)))
    for i, layer in enumerate(layers):
        for collection, values in jax.tree.map(lambda leaf, i=i: leaf[i], sown).items():
            for name, value in values.items():
                layer.put_variable(collection, name, value)
    return x, outputs
