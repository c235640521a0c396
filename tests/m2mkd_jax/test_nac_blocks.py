"""NAC's blocks and read-in against plain loops in float64; what is drawn in them, and for whom."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp
from scipy.special import erf
from tiny import fill

from m2mkd_jax.nac import blocks, read_in
from m2mkd_jax.nac.blocks import BlockConfig, Propagator
from m2mkd_jax.nac.kernel import KernelConfig
from m2mkd_jax.nac.layers import NOISE, CodeLinear, LinearConfig

BATCH, WIDTH, CODE, TOKEN = 2, 6, 5, 7
FIXED = KernelConfig(stochastic=False)
BLOCK = BlockConfig(
    width=WIDTH, code_width=CODE, heads=2, head_width=4, ffn_factor=1.5, kernel=FIXED
)


def change(**changes) -> BlockConfig:
    return dataclasses.replace(BLOCK, **changes)


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


RECEIVERS, CODES = normal(BATCH, 3, WIDTH, seed=1), normal(3, CODE, seed=2)
OTHERS, OTHER_CODES = normal(BATCH, 2, WIDTH, seed=3), normal(2, CODE, seed=4)
TOKENS = normal(BATCH, 4, TOKEN, seed=5)
# Distances from receivers to the others and to themselves; 0.9 is the truncation.
DISTANCE = np.array(
    [[0.2, 1.1, 0.0, 0.5, 0.8], [0.7, 0.3, 0.5, 0.0, 1.5], [1.2, 0.6, 0.8, 1.5, 0.0]], np.float32
)
WITH_CODES = np.concatenate([OTHER_CODES, CODES])


# The plain form.


def standardised(x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def normed(x, params):
    return standardised(x) * params["scale"] + params["bias"]


def linear(x, codes, params):
    """A linear layer on `x` (positions, in), modulated or weight-modulated by one code per
    position."""
    bias = params.get("bias", 0)
    if "code_bias" not in params:
        return (
            x
            * (1 + params["gain"] * standardised(codes @ params["code_kernel"]))
            @ params["kernel"]
            + bias
        )
    rows = []
    for x_t, code in zip(x, np.broadcast_to(codes, (len(x), codes.shape[-1])), strict=True):
        factors = code @ params["code_kernel"] + params["code_bias"] + 1
        matrix = params["kernel"].T * factors
        rows.append(matrix @ x_t / np.sqrt((matrix**2).sum(-1) + 1e-6) + bias)
    return np.stack(rows)


def softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def attention(config, params, receivers, codes, senders, sender_codes, logs, factors=1.0):
    """Attention on one example; `logs` is added to the scores, `factors` scale the weights."""
    query = linear(normed(receivers, params["receiver_norm"]), codes, params["query"])
    senders = normed(senders, params.get("sender_norm", params["receiver_norm"]))
    key, value = (linear(senders, sender_codes, params[name]) for name in ("key", "value"))
    heads = []
    for head in range(config.heads):
        part = slice(head * config.head_width, (head + 1) * config.head_width)
        scores = query[:, part] @ key[:, part].T / math.sqrt(config.head_width)
        heads.append((softmax(scores + logs) * factors) @ value[:, part])
    branch = linear(np.concatenate(heads, -1), codes, params["exit"])
    return receivers * config.residual + branch * params["layer_scale"]


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


def mlp(config, params, x, codes):
    hidden = linear(normed(x, params["norm"]), codes, params["up"])
    if config.geglu:
        half = hidden.shape[-1] // 2
        hidden = hidden[:, :half] * gelu(hidden[:, half:])
    else:
        hidden = gelu(hidden)
    branch = linear(hidden, codes, params["down"]) * params["layer_scale"]
    return x * config.ffn_residual + branch


def propagate(config, params, receivers, codes, senders, sender_codes, logs, factors=1.0):
    """The block on a batch."""
    states = []
    for batch in range(BATCH):
        arguments = receivers[batch], codes, senders[batch], sender_codes
        x = attention(config, params["attention"], *arguments, np.asarray(logs), factors)
        states.append(mlp(config, params["ffn"], x, codes))
    return np.stack(states)


def on_device(arrays):
    return jax.tree.map(jnp.asarray, arrays)


def apply(module, params, *arguments, **settings):
    return module.apply(params, *on_device(arguments), **settings)


def precise(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])


def log_kernel(bandwidth: float, truncation: float = 0.9):
    return np.where(truncation >= DISTANCE, -DISTANCE.astype(float) / bandwidth, -np.inf)


def make(config, bandwidth: float = 0.6):
    """A block and its parameters, with bandwidth and gains other than 1."""
    block = Propagator(config, jnp.float32)
    params = fill(
        block.init, *on_device((RECEIVERS, CODES, (OTHERS, RECEIVERS), WITH_CODES, DISTANCE))
    )
    params = jax.tree.map(lambda leaf: leaf if leaf.shape else jnp.float32(0.4), params)
    if "bandwidth" in params["params"]["attention"]:
        params["params"]["attention"]["bandwidth"] = jnp.float32(bandwidth)
    return block, params


ALL = RECEIVERS, CODES, (OTHERS, RECEIVERS), WITH_CODES, DISTANCE
SENDERS = np.concatenate([OTHERS, RECEIVERS], axis=1)


# Blocks.


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"share_norm": True, "qkv_bias": True},
        {"geglu": False, "ffn_residual": False, "residual": False},
        {"mask": False},
        {"linear": LinearConfig("weight_modulated")},
    ],
)
def test_block_matches_plain_loop(changes):
    block, params = make(config := change(**changes))
    logs = log_kernel(0.6) if config.mask else 0.0
    want = propagate(config, precise(params), RECEIVERS, CODES, SENDERS, WITH_CODES, logs)
    np.testing.assert_allclose(apply(block, params, *ALL), want, atol=2e-5)
    # The same in two steps, with the keys and values of the others first.
    keys, values = apply(block, params, (OTHERS,), OTHER_CODES, method="project")
    arguments = RECEIVERS, CODES, keys, values, DISTANCE
    np.testing.assert_allclose(apply(block, params, *arguments, method="extend"), want, atol=2e-5)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("mask", [True, False])
def test_affinities_scale_weights_after_softmax(normalise, mask):
    config = change(scale_after_softmax=True, normalise_kernel=normalise, mask=mask)
    block, params = make(config)
    logs = log_kernel(0.6)
    factors = np.exp(logs)
    if normalise:
        factors /= factors.sum(-1, keepdims=True)
    arguments = RECEIVERS, CODES, SENDERS, WITH_CODES, logs if mask else 0.0
    want = propagate(config, precise(params), *arguments, factors)
    np.testing.assert_allclose(apply(block, params, *ALL), want, atol=2e-5)


def test_fixed_bandwidth_comes_from_config():
    config = change(kernel=dataclasses.replace(FIXED, learnable_bandwidth=False, bandwidth=0.3))
    block, params = make(config)
    arguments = RECEIVERS, CODES, SENDERS, WITH_CODES, log_kernel(0.3)
    want = propagate(config, precise(params), *arguments)
    np.testing.assert_allclose(apply(block, params, *ALL), want, atol=2e-5)


def test_single_code_is_shared_by_all_latents():
    block, params = make(BLOCK)
    one = CODES[:1]
    found = apply(block, params, RECEIVERS, one, (OTHERS, RECEIVERS), one, DISTANCE)
    arguments = RECEIVERS, one, SENDERS, one, log_kernel(0.6)
    np.testing.assert_allclose(found, propagate(BLOCK, precise(params), *arguments), atol=2e-5)


def test_split_codes_follows_group_sizes():
    groups = tuple(jnp.zeros((1, size, 2)) for size in (2, 1, 3))
    parts = blocks.split_codes(jnp.arange(6)[:, None], groups)
    assert [part[:, 0].tolist() for part in parts] == [[0, 1], [2], [3, 4, 5]]


def test_hidden_widths_are_rounded_to_even():
    widths = {(1.5, 3): 4, (0.5, 5): 2, (0.3, 12): 4, (2.0, 7): 14}
    for (factor, width), hidden in widths.items():
        assert change(ffn_factor=factor, width=width).hidden == hidden


@pytest.mark.parametrize("scale", [0.7, None])
def test_block_initialisation(scale):
    kernel = dataclasses.replace(FIXED, bandwidth=0.8)
    block = Propagator(change(layer_scale=scale, kernel=kernel), jnp.float32)
    params = jax.jit(block.init)(jax.random.key(0, impl="rbg"), *on_device(ALL))["params"]
    assert params["attention"]["bandwidth"] == np.float32(0.8)
    for part in params.values():
        if scale is None:
            assert "layer_scale" not in part
        else:
            np.testing.assert_array_equal(part["layer_scale"], np.full(WIDTH, scale, np.float32))
    np.testing.assert_array_equal(params["attention"]["receiver_norm"]["scale"], np.ones(WIDTH))


# What is drawn.

STREAMS = ("code", "kernel", "drop_path")


def keys(seed: int = 0) -> dict[str, jax.Array]:
    return {name: jax.random.key(seed, impl="rbg") for name in STREAMS}


@pytest.mark.parametrize(
    ("kernel", "train"),
    [({}, True), ({"evaluation": "sample"}, False), ({"temperature": 2.0}, True)],
)
def test_given_numbers_sample_the_edges_of_each_example(kernel, train):
    config = change(kernel=KernelConfig(**kernel))
    block, params = make(config)
    u = np.random.default_rng(7).uniform(0.05, 0.95, size=(BATCH, 3, 5)).astype(np.float32)
    found = apply(
        block, params | {NOISE: {"attention": {"kernel": jnp.asarray(u)}}}, *ALL, train=train
    )
    p = np.clip(np.exp(log_kernel(0.6)), 2.0**-23, 1 - 2.0**-23)
    logits = (np.log(u) - np.log1p(-u) + np.log(p) - np.log1p(-p)) / config.kernel.temperature
    logs = np.log(1 / (1 + np.exp(-logits)))
    alike = precise(params)
    for batch in range(BATCH):
        arguments = RECEIVERS, CODES, SENDERS, WITH_CODES, logs[batch]
        want = propagate(config, alike, *arguments)[batch]
        np.testing.assert_allclose(found[batch], want, atol=5e-5)


def test_edges_are_sampled_per_example():
    block, params = make(change(kernel=KernelConfig()))
    same = np.repeat(RECEIVERS[:1], BATCH, axis=0)
    arguments = same, CODES, (same,), CODES, DISTANCE[:, 2:]
    one = apply(block, params, *arguments, train=True, rngs=keys())
    assert not np.allclose(one[0], one[1], atol=1e-4)
    still = apply(block, params, *arguments, rngs=keys())
    np.testing.assert_array_equal(still[0], still[1])


def test_evaluation_threshold_keeps_edges_from_one_half():
    config = change(kernel=KernelConfig(evaluation="threshold"))
    block, params = make(config)
    logs = np.where(np.exp(log_kernel(0.6)) >= 0.5, 0.0, -np.inf)
    want = propagate(config, precise(params), RECEIVERS, CODES, SENDERS, WITH_CODES, logs)
    np.testing.assert_allclose(apply(block, params, *ALL), want, atol=2e-5)


def codes_by_layer(run) -> dict[str, np.ndarray]:
    """The codes that each code-conditioned layer gets while `run()` runs, by layer name; those of
    several groups of senders are stacked."""
    seen: dict[str, list] = {}

    def watch(call, arguments, settings, context):
        if isinstance(context.module, CodeLinear) and context.method_name == "__call__":
            seen.setdefault(context.module.name, []).append(arguments[1])
        return call(*arguments, **settings)

    with nn.intercept_methods(watch):
        run()
    return {name: np.concatenate(parts) for name, parts in seen.items()}


def test_code_noise_is_separate_for_senders_and_receivers():
    block, params = make(change(code_noise=0.2))
    alone = RECEIVERS, CODES, (RECEIVERS,), CODES, DISTANCE[:, 2:]
    run = lambda train: codes_by_layer(  # noqa: E731
        lambda: apply(block, params, *alone, train=train, rngs=keys())
    )
    seen = run(False)
    assert set(seen) == {"query", "key", "value", "exit", "up", "down"}
    assert all(np.array_equal(codes, CODES) for codes in seen.values())
    seen = run(True)
    for first, others in (("query", ("exit", "up", "down")), ("key", ("value",))):
        share = (seen[first] / CODES - 1) / 0.2
        assert np.all(np.abs(share) <= 1.001) and len(np.unique(share)) == CODES.size
        assert all(np.array_equal(seen[name], seen[first]) for name in others)
    assert not np.any(seen["query"] == seen["key"])


def test_drop_path_is_per_example_and_branch():
    block, params = make(change(drop_path=0.25))
    whole = precise(params)
    # floor(3/4 + u): the first example's attention is dropped, and the second's MLP.
    u = {"attention": [0.2, 0.3], "ffn": [0.9, 0.1]}
    noise = {k: {"drop_path": jnp.array(v).reshape(BATCH, 1, 1)} for k, v in u.items()}
    found = apply(block, params | {NOISE: noise}, *ALL, train=True)
    for example, kept in enumerate(("ffn", "attention")):
        parts = {
            k: p | {"layer_scale": p["layer_scale"] * 4 / 3 * (k == kept)} for k, p in whole.items()
        }
        want = propagate(BLOCK, parts, RECEIVERS, CODES, SENDERS, WITH_CODES, log_kernel(0.6))
        np.testing.assert_allclose(found[example], want[example], atol=2e-5)
    np.testing.assert_array_equal(apply(block, params, *ALL), apply(make(BLOCK)[0], params, *ALL))


def test_drop_path_needs_a_residual():
    with pytest.raises(ValueError, match=r"drop_path=0\.1"):
        change(drop_path=0.1, residual=False)


# The read-in.


def read(config, params, receivers, codes, tokens):
    """The read-in on one example, with keys and values of all tokens for each receiver."""
    query = linear(normed(receivers, params["receiver_norm"]), codes, params["query"])
    tokens = normed(tokens, params["sender_norm"])
    pooled = []
    for receiver in range(len(receivers)):
        code = codes[receiver : receiver + 1]
        key, value = (linear(tokens, code, params[name]) for name in ("key", "value"))
        heads = []
        for head in range(config.heads):
            part = slice(head * config.head_width, (head + 1) * config.head_width)
            scores = key[:, part] @ query[receiver, part] / math.sqrt(config.head_width)
            heads.append(softmax(scores) @ value[:, part])
        pooled.append(np.concatenate(heads))
    branch = linear(np.stack(pooled), codes, params["exit"]) * params["layer_scale"]
    return receivers * config.residual + branch


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qkv_bias": True, "residual": False},
        {"linear": LinearConfig("weight_modulated"), "qkv_bias": True},
    ],
)
def test_read_in_matches_plain_loop(changes):
    config = change(kernel=None, **changes)
    module = read_in.AttentiveReadIn(config, TOKEN, 0.5, jnp.float32)
    params = fill(module.init, *on_device((RECEIVERS, CODES, TOKENS)))
    params = jax.tree.map(lambda leaf: leaf if leaf.shape else jnp.float32(0.4), params)
    parts = precise(params)
    want = []
    for receivers, tokens in zip(RECEIVERS, TOKENS, strict=True):
        states = read(config, parts["attention"], receivers, CODES, tokens)
        want.append(mlp(config, parts["ffn"], states, CODES))
    np.testing.assert_allclose(apply(module, params, RECEIVERS, CODES, TOKENS), want, atol=3e-5)


def test_read_in_initialisation():
    module = read_in.AttentiveReadIn(change(layer_scale=0.3), TOKEN, 0.8, jnp.float32)
    params = jax.jit(module.init)(
        jax.random.key(0, impl="rbg"), *on_device((RECEIVERS, CODES, TOKENS))
    )["params"]
    assert {name: float(part["layer_scale"][0]) for name, part in params.items()} == {
        "attention": pytest.approx(0.8),
        "ffn": pytest.approx(0.3),
    }


def test_projection_read_in_uses_the_code_of_each_latent():
    module, tokens = read_in.ProjectionReadIn(BLOCK, TOKEN, jnp.float32), TOKENS[:, :3]
    params = fill(module.init, *on_device((RECEIVERS, CODES, tokens)))
    parts = precise(params)
    want = [mlp(BLOCK, parts["ffn"], linear(x, CODES, parts["projection"]), CODES) for x in tokens]
    np.testing.assert_allclose(apply(module, params, RECEIVERS, CODES, tokens), want, atol=3e-5)
    with pytest.raises(ValueError, match=r"there are 3 and 4: set config\.model\.inputs to 4"):
        apply(module, params, RECEIVERS, CODES, TOKENS)


@pytest.mark.parametrize("kind", [read_in.AttentiveReadIn, read_in.ProjectionReadIn])
def test_read_in_layers_share_code_noise(kind):
    scale = (1.0,) if kind is read_in.AttentiveReadIn else ()
    module = kind(change(code_noise=0.2), TOKEN, *scale, jnp.float32)
    tokens = TOKENS[:, :3]
    params = fill(module.init, *on_device((RECEIVERS, CODES, tokens)))
    seen = codes_by_layer(
        lambda: apply(module, params, RECEIVERS, CODES, tokens, train=True, rngs=keys())
    )
    first = seen["up"]
    share = (first / CODES - 1) / 0.2
    assert np.all(np.abs(share) <= 1.001) and len(np.unique(share)) == CODES.size
    assert all(np.array_equal(codes, first) for codes in seen.values())
