"""Self-attention: its equation and initialisation, and the choice of its implementation."""

import importlib.util
import re
from functools import partial

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp
from scipy.special import softmax
from tiny import fill

from common_jax.nn import attention
from common_jax.nn.attention import SelfAttention

B, T, HEADS, WIDTH = 3, 4, 2, 6


def attend(params, x, visible):
    """Attention, head by head and token by token."""
    qkv, out = params["qkv"], params["out"]
    y = np.zeros(x.shape)
    for b, h, t in np.ndindex(B, HEADS, T):
        query, keys, values = (
            x[b] @ qkv["kernel"][:, i, h] + qkv.get("bias", np.zeros((3, HEADS, 1)))[i, h]
            for i in range(3)
        )
        scores = keys @ query[t] / np.sqrt(WIDTH // HEADS)
        weight = softmax(np.where(visible[b, 0, t], scores, -np.inf))
        y[b, t] += weight @ values @ out["kernel"][h]
    return y + out["bias"]


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_tokens_attend_to_visible_tokens_only(qkv_bias):
    layer, draw = SelfAttention(HEADS, qkv_bias, jnp.float32), np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(B, T, WIDTH)), jnp.float32)
    params = fill(partial(nn.Module.init, layer), x)  # `init` is one of its fields
    assert ("bias" in params["params"]["qkv"]) == qkv_bias
    params["params"]["qkv"] = jax.tree.map(lambda leaf: 5 * leaf, params["params"]["qkv"])
    everyone = np.ones((B, 1, T, T), bool)
    before = np.tril(everyone)
    holes = before & (np.arange(T) != np.array([1, 2, 3])[:, None])[:, None, None]
    holes |= np.eye(T, dtype=bool)
    for visible in (None, before, before[:1], holes):
        plain = jax.tree.map(np.float64, params["params"])
        heard = np.broadcast_to(everyone if visible is None else visible, everyone.shape)
        found = layer.apply(params, x, None if visible is None else jnp.asarray(visible))
        np.testing.assert_allclose(found, attend(plain, np.float64(x), heard), 1e-4, 1e-4)


def test_kernels_use_the_given_initializers_and_biases_start_at_zero():
    ones, twos = nn.initializers.constant(1.0), nn.initializers.constant(2.0)
    layer = SelfAttention(HEADS, True, jnp.float32, init=ones, out_init=twos)
    params = nn.Module.init(layer, jax.random.key(0), jnp.ones((1, T, WIDTH)))["params"]
    wanted = {"qkv": {"kernel": 1, "bias": 0}, "out": {"kernel": 2, "bias": 0}}
    for part, leaves in wanted.items():
        for name, value in leaves.items():
            np.testing.assert_array_equal(params[part][name], value)


# The choice of an implementation.

PLAIN = {"default": "xla"}
ON_CPU = PLAIN | {"cpu": "cpu"}
CUDNN, SPLASH = PLAIN | {"cuda": "cudnn"}, PLAIN | {"tpu": "splash"}


@pytest.fixture
def with_cuda(monkeypatch):
    """As if JAX were installed for NVIDIA GPUs; `json` stands in for its plugin."""
    monkeypatch.setattr(attention, "CUDA_PLUGINS", ("json",))


@pytest.mark.parametrize(
    ("name", "dtype", "keys", "width", "chosen"),
    [
        ("auto", "bfloat16", 197, 64, CUDNN),
        ("auto", "float16", 128, 128, CUDNN),
        ("auto", "bfloat16", 512, 128, CUDNN | SPLASH),
        ("auto", "float16", 512, 64, CUDNN),
        ("auto", "bfloat16", 127, 64, PLAIN),
        ("auto", "bfloat16", 577, 60, PLAIN),
        ("auto", "bfloat16", 577, 136, PLAIN),
        ("auto", "float32", 577, 64, ON_CPU),
        ("auto", "float64", 577, 64, ON_CPU),
        ("xla", "bfloat16", 577, 64, PLAIN),
        ("cudnn", "bfloat16", 8, 64, {"cuda": "cudnn"}),
    ],
)
def test_implementation_choice_depends_on_dtype_length_and_width(
    with_cuda, name, dtype, keys, width, chosen
):
    assert attention.choose(name, jnp.dtype(dtype), keys, width) == chosen


@pytest.mark.parametrize(
    ("plugin", "dtype", "width", "message"),
    [
        ("json", "float32", 64, "'cudnn' does not compute in float32: set config.precision to"),
        ("json", "bfloat16", 60, "a multiple of 8 and at most 128, and it is 60: change the"),
        ("json", "bfloat16", 136, "a multiple of 8 and at most 128, and it is 136: change the"),
        ("absent", "bfloat16", 64, r"install jax\[cuda12\] or jax\[cuda13\], or set attention to"),
    ],
)
def test_cudnn_error_says_how_to_fix_it(monkeypatch, plugin, dtype, width, message):
    monkeypatch.setattr(attention, "CUDA_PLUGINS", (plugin,))
    with pytest.raises(ValueError, match=message):
        attention.choose("cudnn", jnp.dtype(dtype), 256, width)
    chosen = ON_CPU if dtype == "float32" else PLAIN
    assert attention.choose("auto", jnp.dtype(dtype), 256, width) == chosen


@pytest.mark.parametrize(
    ("length", "found"),
    [
        (128, {"cuda": "tanh", "cpu": "abs", "tpu": "abs"}),
        (512, {"cuda": "tanh", "cpu": "abs", "tpu": "floor"}),
    ],
)
def test_platform_is_the_one_a_program_is_lowered_for(with_cuda, length, found):
    forms = {
        "xla": lambda query, keys: jnp.abs(query),
        "cudnn": lambda query, keys: jnp.tanh(keys),
        "splash": lambda query, keys: jnp.floor(keys),
    }
    x = jnp.ones((1, length, 1, 8), jnp.bfloat16)
    program = jax.jit(lambda x: attention.by_platform("auto", forms, x, x)).trace(x)
    for platform, wanted in found.items():
        text = program.lower(lowering_platforms=(platform,)).as_text()
        assert re.findall(r"stablehlo\.(abs|tanh|floor)\b", text) == [wanted]


def test_missing_implementation_falls_back_to_xla(with_cuda):
    x = jnp.ones((1, 512, 1, 8), jnp.bfloat16)
    choose = jax.jit(lambda x: attention.by_platform("auto", {"xla": lambda q, k: q}, x, x))
    assert "case" not in choose.lower(x).as_text()


@pytest.mark.parametrize(("queries", "senders"), [(4, 7), (5, 6)])
@pytest.mark.parametrize("others", ["nothing", "a bias", "a mask", "a mask of keys"])
def test_padding_to_even_length_changes_nothing(queries, senders, others):
    draw = np.random.default_rng(0)
    query, keys, values, dy = (
        jnp.asarray(draw.normal(size=(2, length, 3, 8)), jnp.float32)
        for length in (queries, senders, senders, queries)
    )
    rows = 1 if others == "a mask of keys" else queries
    visible = jnp.asarray(draw.random((2, 1, rows, senders)) < 0.6).at[..., 0].set(True)
    bias = jnp.asarray(draw.normal(size=(2, 1, queries, senders)), jnp.float32)
    given = {"a bias": {"bias": bias}, "nothing": {}}.get(others, {"visible": visible})

    def plain(query, keys, values, given):
        mask = given.get("visible")
        return jax.nn.dot_product_attention(query, keys, values, given.get("bias"), mask)

    def padded(query, keys, values, given):
        return attention.fused(query, keys, values, **given, implementation="xla")

    @jax.jit
    def both(query, keys, values, dy, given):
        pairs = (jax.vjp(partial(f, given=given), query, keys, values) for f in (plain, padded))
        return [(y, *pull(dy)) for y, pull in pairs]

    for one, other in zip(*both(query, keys, values, dy, given), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(
    not any(map(importlib.util.find_spec, attention.CUDA_PLUGINS)),
    reason="needs JAX for NVIDIA GPUs",
)
@pytest.mark.parametrize("visible", [None, jnp.tril(jnp.ones((1, 1, 197, 197), bool))])
def test_gpu_program_calls_cudnn_forward_and_backward(visible):
    layer = SelfAttention(HEADS, True, jnp.bfloat16)
    x = jax.ShapeDtypeStruct((2, 197, 128), jnp.bfloat16)
    params = jax.eval_shape(partial(nn.Module.init, layer), jax.random.key(0), x)

    def loss(params, x):
        return jnp.sum(layer.apply(params, x, visible))

    program = jax.jit(jax.grad(loss, (0, 1))).trace(params, x)
    text = program.lower(lowering_platforms=("cuda",)).as_text()
    bias = "" if visible is None else "ScaleBias"
    calls = [f"__cudnn$fmha{bias}Softmax", f"__cudnn$fmha{bias}SoftmaxBackward"]
    assert sorted(set(re.findall(r"__cudnn\$\w+", text))) == calls
    assert "__cudnn" not in program.lower(lowering_platforms=("cpu",)).as_text()
