"""NAC's read-in as in the paper's code: keys and values of every token for every receiver.

The reference for `m2mkd_jax.nac.read_in.pool_tokens`, which computes neither.
"""

import math

import jax
from jax import numpy as jnp


def pool_tokens(query, tokens, key_scales, value_scales, key_kernel, value_kernel):
    """Like the function of the same name, with two arrays of shape (B, T, S, H, K)."""
    scaled = tokens[:, None, :, :] * key_scales[:, None, :]
    keys = jnp.einsum("BTSU,UHK->BTSHK", scaled, key_kernel)
    scaled = tokens[:, None, :, :] * value_scales[:, None, :]
    values = jnp.einsum("BTSU,UHK->BTSHK", scaled, value_kernel)
    scores = jnp.einsum("BTHK,BTSHK->BHTS", query, keys) / math.sqrt(query.shape[-1])
    return jnp.einsum("BHTS,BTSHK->BTHK", jax.nn.softmax(scores), values)
