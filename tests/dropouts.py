"""Intercepts dropout layers."""

import contextlib
from collections.abc import Callable, Iterator

import jax
from flax import linen as nn
from jax import numpy as jnp


@contextlib.contextmanager
def dropouts(
    zero: Callable[[tuple[str, ...]], bool] = lambda path: True,
) -> Iterator[list[tuple[tuple[str, ...], float, tuple[int, ...]]]]:
    """In this context, a dropout layer in training returns zeros if `zero` holds for its path.

    Yields:
      A list to which every call of a dropout layer in training adds its path, its rate and the
      shape of its input.
    """
    calls = []

    def drop(call: Callable, arguments: tuple, options: dict, context) -> jax.Array:
        module = context.module
        if not isinstance(module, nn.Dropout) or context.method_name != "__call__":
            return call(*arguments, **options)
        (x,) = arguments
        if nn.merge_param("deterministic", module.deterministic, options.get("deterministic")):
            return call(*arguments, **options)
        calls.append((module.path, module.rate, x.shape))
        return jnp.zeros_like(x) if zero(module.path) else x

    with nn.intercept_methods(drop):
        yield calls
