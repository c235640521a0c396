"""Sampling from the beta distribution with a number of iterations that is fixed at compile time.

`jax.random.beta` repeats each draw until it is accepted. On a GPU, the host reads after every
iteration whether there is another one, and launches nothing else until then.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Each turn is accepted with probability at least 0.95, and each normal in it with at least 0.993
# (Marsaglia and Tsang 2000, for shapes of at least 1, as drawn here). So about one draw in 10^14 is
# never accepted, and uses its last turn anyway.
TURNS, NORMALS = 12, 7


def beta(key: Array, alpha: float) -> Float[Array, ""]:
    """Draws from Beta(alpha, alpha): the same number as `jax.random.beta`, up to rounding."""
    # Like jax, uses logarithms of two gamma variables, so that neither is rounded to 0.
    first, second = jax.vmap(functools.partial(_log_gamma, alpha=alpha))(jax.random.split(key))
    return jax.nn.sigmoid(first - second)


def _log_gamma(key: Array, alpha: float) -> Float[Array, ""]:
    """The logarithm of a Gamma(alpha) draw, by the method of Marsaglia and Tsang (2000)."""
    boost = alpha < 1  # Gamma(alpha) is Gamma(alpha + 1) times a power of a uniform variable
    d = alpha + boost - 1 / 3
    c = 1 / (3 * d**0.5)
    # Splits keys in the same way as jax.random.gamma, so that the draws are the same.
    key, boost_key = jax.random.split(jax.random.split(key, 1)[0])
    keys = _chain(key, TURNS, 3)  # for each turn, a key for its normals and one for its uniform
    normals = jax.vmap(lambda key: jax.vmap(jax.random.normal)(_chain(key, NORMALS, 2)[:, 0]))
    x = _first(normals(keys[:, 0]), lambda x: 1 + c * x > 0)
    uniform = jax.vmap(jax.random.uniform)(keys[:, 1])
    v = (1 + c * x) ** 3
    # In scalar code the squeeze saves the logarithm. Here both are computed, and it is kept only so
    # that the same draws are accepted as in jax, whatever the rounding.
    squeezed = uniform < 1 - 0.0331 * x**4
    accepted = squeezed | (jnp.log(uniform) < 0.5 * x**2 + d * (1 - v + jnp.log(v)))
    log_sample = jnp.log(d) + jnp.log(_first(v, lambda _: accepted))
    if boost:
        log_sample -= jax.random.exponential(boost_key) / alpha
    return log_sample


def _chain(key: Array, steps: int, split: int) -> Array:
    """(steps, split - 1) keys: each step splits its key, and passes the first part to the next."""

    def step(key: Array, _: None) -> tuple[Array, Array]:
        keys = jax.random.split(key, split)
        return keys[0], keys[1:]

    return jax.lax.scan(step, key, None, length=steps)[1]


def _first(values: Float[Array, "... N"], accepts) -> Float[Array, "..."]:
    """Along the last axis, the first value that is accepted, or the last one if none is."""
    accepted = accepts(values).at[..., -1].set(True)
    return jnp.take_along_axis(values, jnp.argmax(accepted, axis=-1)[..., None], axis=-1)[..., 0]
