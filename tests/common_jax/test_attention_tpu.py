"""Attention on TPUs: the kernel in interpret mode, and the programs that call it."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp
from meshes import split_mesh

from common_jax.nn import attention_tpu
from common_jax.nn.attention import SelfAttention, attend

INTERPRETED = partial(attention_tpu.splash, interpret=True)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Sets a block size at which this file's lengths take two blocks, the last one padded."""
    monkeypatch.setattr(attention_tpu, "BLOCKS", (128,))


def case(batch: int, queries: int, senders: int, dtype: str):
    draw = np.random.default_rng(0)
    arrays = (
        jnp.asarray(draw.normal(size=(batch, length, 2, 8)), dtype)
        for length in (queries, senders, senders, queries)
    )
    visible = jnp.asarray(draw.random((batch, 1, 1, senders)) < 0.6).at[..., 0].set(True)
    return *arrays, visible


def with_gradients(form, query, keys, values, dy, visible):
    y, pull = jax.vjp(partial(form, visible=visible), query, keys, values)
    return y, *pull(dy)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 0.02)])
@pytest.mark.parametrize("masked", [False, True])
def test_kernel_matches_plain_attention_and_its_gradients(dtype, tolerance, masked):
    *arrays, visible = case(2, 140, 150, dtype)
    visible = visible if masked else None
    found = jax.jit(partial(with_gradients, INTERPRETED))(*arrays, visible)
    wide = (x.astype("float32") for x in arrays)
    wanted = with_gradients(partial(attend, attention="xla"), *wide, visible)
    for one, other in zip(found, wanted, strict=True):
        assert (one.shape, one.dtype) == (other.shape, dtype)
        np.testing.assert_allclose(one.astype("float32"), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("batch", [8, 3])
def test_each_device_attends_to_its_own_examples(batch):
    *arrays, visible = case(batch, 130, 130, "float32")
    wanted = jax.jit(partial(with_gradients, INTERPRETED))(*arrays, visible[:1])
    with jax.set_mesh(split_mesh()):
        found = jax.jit(partial(with_gradients, INTERPRETED))(*arrays, visible[:1])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, wanted)


@pytest.mark.parametrize(("length", "block"), [(1, 384), (577, 640), (729, 768), (1025, 384)])
def test_block_size_minimises_padding(monkeypatch, length, block):
    monkeypatch.undo()
    assert attention_tpu._block(length) == block


@pytest.mark.parametrize(
    ("length", "rows", "calls"), [(512, None, 2), (512, 1, 2), (512, 512, 0), (511, None, 0)]
)
def test_tpu_program_uses_the_kernel_for_long_sequences(length, rows, calls):
    layer = SelfAttention(2, True, jnp.bfloat16)
    x = jax.ShapeDtypeStruct((2, length, 16), jnp.bfloat16)
    visible = None if rows is None else jnp.ones((1, 1, rows, length), bool)
    params = jax.eval_shape(partial(nn.Module.init, layer), jax.random.key(0), x)

    def loss(params, x):
        return jnp.sum(layer.apply(params, x, visible))

    program = jax.jit(jax.grad(loss, (0, 1))).trace(params, x)
    text = {name: program.lower(lowering_platforms=(name,)).as_text() for name in ("tpu", "cpu")}
    assert text["tpu"].count("tpu_custom_call") == calls  # forward and backward
    assert "tpu_custom_call" not in text["cpu"]
