"""NAC's parts: rearranged sums, kernels at their edges, layers and the positional grid."""

import dataclasses
from functools import partial

import jax
import jax.extend
import naive
import numpy as np
import pytest
from jax import numpy as jnp
from tiny import fill

from common_jax.config import FieldError
from common_jax.nn.attention import fused
from m2mkd_jax.nac import blocks, kernel
from m2mkd_jax.nac.blocks import BlockConfig, attend, head_scores
from m2mkd_jax.nac.kernel import KernelConfig
from m2mkd_jax.nac.layers import CodeLinear, LinearConfig
from m2mkd_jax.nac.read_in import ReadInAttention, pool_tokens
from m2mkd_jax.nac.tokenizer import fit_grid

BLOCK = BlockConfig(width=24, code_width=20, heads=2, head_width=8, qkv_bias=True)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


# The read-in.


def test_rearranged_read_in_matches_plain_one_in_float64():
    shapes = ((2, 5, 3, 4), (2, 11, 6), (5, 6), (5, 6), (6, 3, 4), (6, 3, 4))
    with jax.enable_x64(True):
        arrays = [jnp.asarray(normal(*s, seed=i), jnp.float64) for i, s in enumerate(shapes)]
        dy = jnp.asarray(normal(2, 5, 3, 4, seed=9), jnp.float64)
        results = []
        for function in (pool_tokens, naive.pool_tokens):
            run = jax.jit(lambda f, *arrays: _with_gradients(f, arrays, dy), static_argnums=0)
            results.append(run(function, *arrays))
        assert results[0][0].dtype == jnp.float64
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-13), *results)


def _with_gradients(function, arrays, dy):
    y, vjp = jax.vjp(function, *arrays)
    return y, vjp(dy)


def test_key_bias_has_no_effect_in_read_in():
    attention = ReadInAttention(BLOCK, token_width=6, scale=1.0, dtype=jnp.float32)
    arguments = normal(2, 5, 24), normal(5, 20), normal(2, 11, 6)
    params = fill(attention.init, *arguments)
    loss = jax.grad(lambda p: jnp.sum(attention.apply(p, *arguments) ** 2))
    gradient = jax.jit(loss)(params)["params"]
    assert np.all(np.asarray(gradient["key"]["bias"]) == 0)
    assert np.any(np.asarray(gradient["value"]["bias"]) != 0)


def test_read_in_never_materialises_keys_per_receiver():
    batch, receivers, tokens, width = 2, 24, 48, 40
    block = dataclasses.replace(BLOCK, heads=4, head_width=16)
    attention = ReadInAttention(block, token_width=width, scale=1.0, dtype=jnp.float32)
    arguments = normal(batch, receivers, 24), normal(receivers, 20), normal(batch, tokens, width)
    params = fill(attention.init, *arguments)

    def loss(params, arguments):
        return jnp.sum(attention.apply(params, *arguments) ** 2)

    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, arguments)
    largest = max(size_of(program.jaxpr))
    assert largest < batch * receivers * tokens * min(width, block.inner)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    compiled = gradient.lower(params, arguments).compile()
    plain = 4 * batch * receivers * tokens * block.inner
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * plain


def size_of(jaxpr):
    """Sizes of all arrays that a program makes, including its inner programs."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from size_of(inner)


def test_plain_read_in_layer_matches_rearranged_one():
    linear = LinearConfig(gain=0.5)
    receivers, codes, tokens = normal(2, 5, 24), normal(5, 20), normal(2, 11, 6)
    results = []
    for renormalise in (False, True):
        attention = ReadInAttention(
            dataclasses.replace(BLOCK, linear=linear), token_width=6, scale=1.0, dtype=jnp.float32
        )
        params = fill(attention.init, receivers, codes, tokens)
        if renormalise:
            params = attention.bind(params)
            query = params.query(params.receiver_norm(receivers), codes).reshape(2, 5, 2, 8)
            normed = params.sender_norm(tokens)
            pooled = params._pool_plainly(query, normed, codes, train=False)
            results.append(receivers + params.layer_scale * params.exit(pooled, codes))
        else:
            results.append(attention.apply(params, receivers, codes, tokens))
    np.testing.assert_allclose(*results, atol=1e-6)


@pytest.mark.parametrize("change", [{"renormalization": "layer"}, {"kind": "weight_modulated"}])
def test_read_in_supports_nonlinear_layers(change):
    block = dataclasses.replace(BLOCK, linear=LinearConfig(**change))
    attention = ReadInAttention(block, token_width=6, scale=1.0, dtype=jnp.float32)
    arguments = normal(2, 5, 24), normal(5, 20), normal(2, 11, 6)
    params = fill(attention.init, *arguments)
    assert np.all(np.isfinite(attention.apply(params, *arguments)))


# Kernels.


def receivers_without_edges() -> jax.Array:
    return jnp.array([[0.1, 0.5], [1.2, 1.5]])


def test_scores_are_float32_for_bfloat16_states():
    query, keys = jnp.ones((1, 2, 2, 16), jnp.bfloat16), jnp.ones((1, 3, 2, 16), jnp.bfloat16)
    scores = head_scores(query, keys + jnp.bfloat16(2**-7))
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, np.full((1, 2, 2, 3), (1 + 2**-7) * 16 / 4))


@pytest.mark.parametrize("kind", ["direct", "masked"])
def test_a_receiver_without_edges_attends_to_nothing(kind):
    config = KernelConfig(truncation=0.9, truncation_kind=kind, stochastic=False)
    block = dataclasses.replace(BLOCK, kernel=config)
    query, keys, values = normal(1, 2, 2, 8), normal(1, 2, 2, 8, seed=1), normal(1, 2, 2, 8, seed=2)

    def pool(distance, query, keys, values):
        logs = kernel.log_kernel(distance, 1.0, config)[None]
        return attend(query, keys, values, logs, config=block)

    arguments = receivers_without_edges(), query, keys, values
    pooled = pool(*arguments)
    assert np.all(np.asarray(pooled[:, 1]) == 0)
    assert np.all(np.asarray(pooled[:, 0]) != 0)
    gradients = jax.grad(lambda *a: jnp.sum(pool(*a) ** 2), argnums=(0, 1, 2, 3))(*arguments)
    assert all(np.all(np.isfinite(g)) for g in gradients)


def test_receiver_without_edges_is_nan_if_configured():
    config = KernelConfig(truncation=0.9, stochastic=False, empty_row="nan")
    logs = kernel.log_kernel(receivers_without_edges(), 1.0, config)[None]
    block = dataclasses.replace(BLOCK, kernel=config)
    pooled = attend(*(normal(1, 2, 2, 8),) * 3, logs, config=block)
    assert np.all(np.isnan(pooled[:, 1]))
    assert np.all(np.isfinite(pooled[:, 0]))


@pytest.mark.parametrize("empty_row", ["zero", "nan"])
@pytest.mark.parametrize("edges", ["all", "sampled", "truncated"])
def test_cudnn_attention_matches_plain_one_with_edge_gradients(monkeypatch, empty_row, edges):
    monkeypatch.setattr(blocks, "fused", partial(fused, implementation="xla"))
    config = KernelConfig(truncation=0.9, stochastic=False, empty_row=empty_row)
    block = dataclasses.replace(BLOCK, kernel=config)
    # An odd number of senders; the last receiver has no edge within the truncation.
    distance = jnp.array([[0.1, 0.5, 1.1], [0.8, 0.2, 0.7], [0.3, 1.4, 0.0], [1.2, 1.5, 1.3]])
    query, *pair = (normal(2, n, 2, 8, seed=n + i) for i, n in enumerate((4, 3, 3)))
    dy = normal(2, 4, 2, 8, seed=9)
    uniform = jax.random.uniform(jax.random.key(3), (2, 4, 3))

    def results(form):
        def pool(distance, query, keys, values):
            logs = kernel.log_kernel(distance, 0.7, config)[None]
            if edges == "sampled":
                logs = kernel.sample_log(logs, uniform, temperature=0.5)
            return form(query, keys, values, None if edges == "all" else logs, config=block)

        pooled, pull = jax.vjp(pool, distance, query, *pair)
        return pooled, *pull(dy)

    plain, other = results(blocks._attend_plainly), results(blocks._attend_fused)
    nan = edges == "truncated" and empty_row == "nan"
    assert np.isnan(plain[0][:, 3]).all() == nan
    # Where the original's values are NaN, so are its gradients.
    for wanted, got in zip(plain[:1] if nan else plain, other, strict=not nan):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)


def test_cudnn_attention_refuses_scaling_after_softmax():
    with pytest.raises(FieldError, match="attention='cudnn' cannot scale weights"):
        dataclasses.replace(BLOCK, scale_after_softmax=True, attention="cudnn")


def test_normalised_rows_sum_to_one_or_are_empty():
    config = KernelConfig(truncation=0.9, stochastic=False)
    logs = kernel.log_kernel(receivers_without_edges(), 0.7, config)
    rows = jnp.exp(kernel.normalise_log_rows(logs, empty_row="zero"))
    np.testing.assert_allclose(rows.sum(-1), [1, 0], rtol=1e-6)
    rows = kernel.normalise_rows(jnp.exp(logs), empty_row="zero")
    np.testing.assert_allclose(rows.sum(-1), [1, 0], rtol=1e-6)


def test_sampling_rates_match_affinities():
    affinity = jnp.array([0.05, 0.4, 0.9])
    logs = jnp.broadcast_to(jnp.log(affinity), (20000, 1, 3))
    uniform = jax.random.uniform(jax.random.key(0), logs.shape)
    sampled = jnp.exp(kernel.sample_log(logs, uniform, temperature=0.5))
    share = np.mean(np.asarray(sampled) > 0.5, axis=(0, 1))  # P(sample > 1/2) = affinity
    np.testing.assert_allclose(share, affinity, atol=0.02)


def test_samples_are_finite_for_extreme_uniform_numbers():
    logs = jnp.array([[-jnp.inf, -1e-9, -0.5]])
    for value in (0.0, 1.0 - 2**-24, 1.0):
        uniform = jnp.full(logs.shape, value)
        sampled, vjp = jax.vjp(lambda x, u=uniform: kernel.sample_log(x, u, temperature=0.5), logs)
        assert np.all(np.isfinite(sampled))
        (gradient,) = vjp(jnp.ones_like(sampled))
        assert np.all(np.isfinite(gradient))
        assert gradient[0, 0] == 0


# Layers.


@pytest.mark.parametrize("kind", ["modulated", "weight_modulated", "plain"])
def test_code_linear_acts_per_position(kind):
    config = LinearConfig(kind=kind, gain=0.5)
    layer = CodeLinear(config, 6, 4, 3, use_bias=True, dtype=jnp.float32)
    x, codes = normal(2, 5, 6), normal(5, 3)
    params = fill(layer.init, x, codes)
    whole = layer.apply(params, x, codes)
    single = layer.apply(params, x[:, 2:3], codes[2:3])
    np.testing.assert_allclose(whole[:, 2:3], single, rtol=1e-5, atol=1e-6)
    shifted = layer.apply(params, x, codes + 1)
    assert np.allclose(whole, shifted, atol=1e-4) == (kind == "plain")


def test_scale_dropout_preserves_the_mean():
    config = LinearConfig(normalization="none", dropout=0.5, add_one=False)
    layer = CodeLinear(config, 400, 4, 3, use_bias=False, dtype=jnp.float32)
    x, codes = normal(2, 5, 400), normal(5, 3)
    params = fill(layer.init, x, codes)
    scales = lambda train: layer.apply(  # noqa: E731
        params, codes, train=train, rngs={"code": jax.random.key(1)}, method="scales"
    )
    kept, full = scales(True), scales(False)
    dropped = np.asarray(kept) == 0
    assert 0.45 < dropped.mean() < 0.55
    np.testing.assert_allclose(kept, np.where(dropped, 0, 2 * np.asarray(full)), rtol=1e-6)


def test_fit_grid_refuses_or_averages_another_size():
    grid = normal(4, 4, 3)
    with pytest.raises(ValueError, match=r"config\.model\.tokenizer\.grid_resize to 'adaptive'"):
        fit_grid(grid, (2, 2), resize="none")
    small = fit_grid(grid, (2, 3), resize="adaptive")
    assert small.shape == (2, 3, 3)
    np.testing.assert_allclose(small[0, 0], grid[:2, :2].mean((0, 1)), rtol=1e-6)
