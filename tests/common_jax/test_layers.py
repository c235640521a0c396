"""A stack of layers run as one loop: what it keeps for the backward pass."""

import jax
from flax import linen as nn
from jax import numpy as jnp

from common_jax.nn import layers
from common_jax.nn.mlp import Mlp
from common_jax.nn.norm import LayerNorm

LAYERS, BATCH, WIDTH, HIDDEN = 3, 4, 16, 64


class _Layer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + Mlp(HIDDEN, jnp.bfloat16, name="mlp")(
            LayerNorm(1e-6, jnp.bfloat16, name="norm")(x)
        )


class _Stack(nn.Module):
    def setup(self):
        self.layer = [_Layer() for _ in range(LAYERS)]

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.is_initializing():
            for layer in self.layer:
                x = layer(x)
            return x
        return layers.scan(self.layer, x, remat=False)[0]


def test_scanned_layers_keep_inputs_and_products_for_the_backward_pass():
    x = jnp.ones((BATCH, WIDTH), jnp.bfloat16)
    stack = _Stack()
    params = jax.jit(stack.init)(jax.random.key(0), x)
    backward = jax.eval_shape(lambda params, x: jax.vjp(stack.apply, params, x)[1], params, x)
    kept = jax.tree.leaves(backward)
    hidden = [leaf for leaf in kept if leaf.shape == (LAYERS, BATCH, HIDDEN)]
    assert [leaf.dtype for leaf in hidden] == [jnp.bfloat16], hidden
    inputs = [leaf for leaf in kept if leaf.shape == (LAYERS, BATCH, WIDTH)]
    assert [leaf.dtype for leaf in inputs] == [jnp.bfloat16], inputs
