"""Helpers for tests of random draws."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from m2mkd_jax.data import augment


def correlation(*draws: Any) -> float:
    """The largest absolute correlation between any two of the draws [n]."""
    table = np.corrcoef([np.asarray(draw, float) for draw in draws])
    return np.abs(table - np.eye(len(draws))).max()


def keys_drawn_from(
    monkeypatch: pytest.MonkeyPatch, function: Callable[[Any], Any]
) -> list[tuple[int, ...]]:
    """The keys that random numbers are drawn from while `function(key)` runs."""
    drawn = []

    def watch(name):
        plain = getattr(jax.random, name)

        def draw(key, *arguments, **settings):
            drawn.append(key)
            return plain(key, *arguments, **settings)

        monkeypatch.setattr(jax.random, name, draw)

    for name in ("bernoulli", "normal", "randint", "uniform"):
        watch(name)

    def draw_beta(key, alpha):  # counts as one draw, whatever it draws internally
        drawn.append(key)
        return 0.5

    monkeypatch.setattr(augment, "beta", draw_beta)

    def run(key):
        function(key)
        return jnp.stack([jax.random.key_data(one) for one in drawn])

    return [tuple(key) for key in jax.jit(run)(jax.random.key(0)).tolist()]


class Scripted:
    """A generator that returns the given values, and records what it was asked for."""

    def __init__(self, *values: Any):
        self.values = list(values)
        self.asked: list[tuple] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def draw(*arguments):
            self.asked.append((name, *arguments))
            return self.values.pop(0)

        return draw
