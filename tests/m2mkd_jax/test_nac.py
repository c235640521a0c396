"""NAC's parts and the whole: rearranged sums, kernels at their edges, sharing, what is drawn
when."""

import dataclasses

import jax
import jax.extend
import naive
import numpy as np
import pytest
from jax import numpy as jnp

from m2mkd_jax.models.encoder import Interface
from m2mkd_jax.models.nac import kernel, model
from m2mkd_jax.models.nac.blocks import BlockConfig, attend
from m2mkd_jax.models.nac.kernel import KernelConfig
from m2mkd_jax.models.nac.layers import CodeLinear, LinearConfig
from m2mkd_jax.models.nac.read_in import ReadInAttention, pool_tokens
from m2mkd_jax.models.nac.tokenizer import TokenizerConfig, fit_grid

SIZES = model.NacConfig(
    tokenizer=TokenizerConfig(preset="nano", width=16, grid_width=8),
    inputs=5,
    mediators=10,
    outputs=4,
    iterations=3,
    width=24,
    code_width=20,
    signature_width=12,
    heads=2,
    head_width=8,
)
INTERFACE = Interface(16, 3, 7)
BLOCK = BlockConfig(width=24, code_width=20, heads=2, head_width=8, qkv_bias=True)
STREAMS = ("code", "kernel", "drop_path", "state", "pooling")


def rngs(seed: int = 0) -> dict[str, jax.Array]:
    return {name: jax.random.key(seed + i) for i, name in enumerate(STREAMS)}


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return normal(3, 16, 16, 3)


def build(**changes):
    config = dataclasses.replace(SIZES, **changes)
    network = model.build(config, INTERFACE, drop_path=0.1)
    return network, jax.jit(network.init)(jax.random.key(0))


def run(network, params, images, **settings):
    return jax.jit(lambda params, images: network.apply(params, images, **settings)[0])(
        params, images
    )


# The read-in.


def test_rearranged_read_in_is_the_plain_one_to_float64_rounding():
    shapes = ((2, 5, 3, 4), (2, 11, 6), (5, 6), (5, 6), (6, 3, 4), (6, 3, 4))
    with jax.enable_x64(True):
        arrays = [jnp.asarray(normal(*s, seed=i), jnp.float64) for i, s in enumerate(shapes)]
        dy = jnp.asarray(normal(2, 5, 3, 4, seed=9), jnp.float64)
        results = []
        for function in (pool_tokens, naive.pool_tokens):
            y, vjp = jax.vjp(function, *arrays)
            results.append((y, vjp(dy)))
        assert results[0][0].dtype == jnp.float64
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-13), *results)


def test_the_keys_bias_has_no_part_in_the_read_in():
    attention = ReadInAttention(BLOCK, token_width=6, scale=1.0, dtype=jnp.float32)
    arguments = normal(2, 5, 24), normal(5, 20), normal(2, 11, 6)
    params = attention.init(jax.random.key(0), *arguments)
    gradient = jax.grad(lambda p: jnp.sum(attention.apply(p, *arguments) ** 2))(params)["params"]
    assert np.all(np.asarray(gradient["key"]["bias"]) == 0)
    assert np.any(np.asarray(gradient["value"]["bias"]) != 0)


def test_no_array_is_as_large_as_keys_of_every_receiver():
    batch, receivers, tokens, width = 2, 24, 48, 40
    block = dataclasses.replace(BLOCK, heads=4, head_width=16)
    attention = ReadInAttention(block, token_width=width, scale=1.0, dtype=jnp.float32)
    arguments = normal(batch, receivers, 24), normal(receivers, 20), normal(batch, tokens, width)
    params = attention.init(jax.random.key(0), *arguments)

    def loss(params, arguments):
        return jnp.sum(attention.apply(params, *arguments) ** 2)

    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, arguments)
    largest = max(size_of(program.jaxpr))
    assert largest < batch * receivers * tokens * min(width, block.inner)
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, arguments).compile()
    plain = 4 * batch * receivers * tokens * block.inner
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * plain


def size_of(jaxpr):
    """Sizes of all arrays that a program makes, those of its inner programs too."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from size_of(inner)


def test_the_read_in_refuses_layers_that_are_not_linear():
    block = dataclasses.replace(BLOCK, linear=LinearConfig(renormalization="layer"))
    attention = ReadInAttention(block, token_width=6, scale=1.0, dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"config\.model\.linear\.renormalization"):
        attention.init(jax.random.key(0), normal(2, 5, 24), normal(5, 20), normal(2, 11, 6))


# Kernels.


def receivers_without_edges() -> jax.Array:
    return jnp.array([[0.1, 0.5], [1.2, 1.5]])


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


def test_a_receiver_without_edges_is_nan_where_the_config_says_so():
    config = KernelConfig(truncation=0.9, stochastic=False, empty_row="nan")
    logs = kernel.log_kernel(receivers_without_edges(), 1.0, config)[None]
    block = dataclasses.replace(BLOCK, kernel=config)
    pooled = attend(*(normal(1, 2, 2, 8),) * 3, logs, config=block)
    assert np.all(np.isnan(pooled[:, 1]))
    assert np.all(np.isfinite(pooled[:, 0]))


def test_normalised_rows_sum_to_one_or_are_empty():
    config = KernelConfig(truncation=0.9, stochastic=False)
    logs = kernel.log_kernel(receivers_without_edges(), 0.7, config)
    rows = jnp.exp(kernel.normalise_log_rows(logs, empty_row="zero"))
    np.testing.assert_allclose(rows.sum(-1), [1, 0], rtol=1e-6)
    rows = kernel.normalise_rows(jnp.exp(logs), empty_row="zero")
    np.testing.assert_allclose(rows.sum(-1), [1, 0], rtol=1e-6)


def test_samples_follow_the_affinities():
    affinity = jnp.array([0.05, 0.4, 0.9])
    logs = jnp.broadcast_to(jnp.log(affinity), (20000, 1, 3))
    uniform = jax.random.uniform(jax.random.key(0), logs.shape)
    sampled = jnp.exp(kernel.sample_log(logs, uniform, temperature=0.5))
    share = np.mean(np.asarray(sampled) > 0.5, axis=(0, 1))  # P(sample > 1/2) = affinity
    np.testing.assert_allclose(share, affinity, atol=0.02)


def test_samples_are_finite_at_the_edges_of_the_uniform_numbers():
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
def test_a_code_linear_layer_is_the_same_map_per_position(kind):
    config = LinearConfig(kind=kind, gain=0.5)
    layer = CodeLinear(config, 6, 4, 3, use_bias=True, dtype=jnp.float32)
    x, codes = normal(2, 5, 6), normal(5, 3)
    params = layer.init(jax.random.key(0), x, codes)
    whole = layer.apply(params, x, codes)
    single = layer.apply(params, x[:, 2:3], codes[2:3])
    np.testing.assert_allclose(whole[:, 2:3], single, rtol=1e-5, atol=1e-6)
    shifted = layer.apply(params, x, codes + 1)
    assert np.allclose(whole, shifted, atol=1e-4) == (kind == "plain")


def test_dropout_of_scales_keeps_their_mean():
    config = LinearConfig(normalization="none", dropout=0.5, add_one=False)
    layer = CodeLinear(config, 400, 4, 3, use_bias=False, dtype=jnp.float32)
    x, codes = normal(2, 5, 400), normal(5, 3)
    params = layer.init(jax.random.key(0), x, codes)
    scales = lambda train: layer.apply(  # noqa: E731
        params, codes, train=train, rngs={"code": jax.random.key(1)}, method="scales"
    )
    kept, full = scales(True), scales(False)
    dropped = np.asarray(kept) == 0
    assert 0.45 < dropped.mean() < 0.55
    np.testing.assert_allclose(kept, np.where(dropped, 0, 2 * np.asarray(full)), rtol=1e-6)


def test_a_grid_of_another_size_is_refused_or_averaged():
    grid = normal(4, 4, 3)
    with pytest.raises(ValueError, match=r"config\.model\.tokenizer\.grid_resize"):
        fit_grid(grid, (2, 2), resize="none")
    small = fit_grid(grid, (2, 3), resize="adaptive")
    assert small.shape == (2, 3, 3)
    np.testing.assert_allclose(small[0, 0], grid[:2, :2].mean((0, 1)), rtol=1e-6)


# The whole.


@pytest.mark.parametrize(
    ("name", "parameters"), [("tinyimagenet", 26_703_342), ("imagenet", 37_589_294)]
)
def test_published_sizes(name, parameters):
    config, image_size, labels = model.preset(name)
    network = model.build(config, Interface(image_size, 3, labels))
    leaves = jax.tree.leaves(jax.eval_shape(network.init, jax.random.key(0)))
    assert sum(leaf.size for leaf in leaves) == parameters
    assert len(leaves) == 362


@pytest.mark.parametrize(
    "changes",
    [
        {"share_ffns": True},
        {"share_codes": False, "seeding": "mean"},
        {"seeding": "learned", "inputs_to_mediators": "first"},
        {"read_in": "projection", "inputs": 4},
        {"mask": False, "pooling": "gumbel_hard", "inputs_to_outputs": False},
        {"pooling": "first_slot", "read_out_head": True, "inputs_to_mediators": "never"},
        {"inputs": 10, "inputs_as_mediators": True, "layer_scale": None, "geglu": False},
        {"linear": LinearConfig(kind="plain"), "qkv_bias": True, "share_norm": False},
        {"layerwise": {"ffn_factor": (1.0, 2.0, 0.5), "kernel/truncation": (None, 0.9, 0.5)}},
        {"width": 20, "seeding": "code", "tokenizer": TokenizerConfig("atto", width=20)},
    ],
    ids=str,
)
def test_variants_train(changes, images):
    network, params = build(**changes)

    def loss(params):
        logits, _ = network.apply(params, images, train=True, rngs=rngs())
        return jnp.sum(jax.nn.log_softmax(logits)[:, 0])

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    touched = sum(bool(np.any(np.asarray(leaf))) for leaf in jax.tree.leaves(gradient))
    assert touched > 0.7 * len(jax.tree.leaves(gradient))


def test_keys_of_the_inputs_made_once_change_nothing(images):
    shared, params = build(share_propagators=True, code_noise=0.0)
    assert sorted(params) == ["graph", "stage_0", "stage_1", "stage_4"]
    apart, _ = build(code_noise=0.0)
    spread = {**params, "stage_2": params["stage_1"], "stage_3": params["stage_1"]}
    once = run(shared, params, images)
    np.testing.assert_allclose(once, run(apart, spread, images), atol=2e-6)


def test_shared_ffns_are_those_of_the_first_iteration(images):
    network, params = build(share_ffns=True)
    assert [name for name in params if "ffn" in params[name]] == ["stage_1", "stage_4"]
    apart, _ = build()
    ffn = {"ffn": params["stage_1"]["ffn"]}
    spread = params | {name: params[name] | ffn for name in ("stage_2", "stage_3")}
    np.testing.assert_allclose(run(network, params, images), run(apart, spread, images), atol=2e-6)


def test_recomputing_changes_nothing(images):
    network, params = build()
    again, _ = build(remat=True)
    draws = {"train": True, "rngs": rngs()}
    for one in (jax.grad, lambda f: f):
        losses = [
            one(lambda p, n=n: jnp.sum(n.apply(p, images, **draws)[0] ** 2))(params)
            for n in (network, again)
        ]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *losses)


def test_evaluation_draws_only_with_keys(images):
    network, params = build()
    mean = run(network, params, images)
    np.testing.assert_array_equal(mean, run(network, params, images))
    one, two = (run(network, params, images, rngs=rngs(seed)) for seed in (0, 9))
    assert not np.allclose(one, two)
    assert not np.allclose(one, mean)
    few = {name: rngs()[name] for name in ("state", "pooling")}
    np.testing.assert_array_equal(one, run(network, params, images, rngs=few))


def test_training_without_keys_is_refused(images):
    network, params = build()
    with pytest.raises(Exception, match="code"):
        network.apply(params, images, train=True)


def test_noise_that_is_given_is_used(images):
    network, params = build()
    noise = {"graph": {"input_states": jnp.zeros((3, 5, 24))}}
    given = run(network, params, images, noise=noise)
    np.testing.assert_array_equal(given, run(network, params, images))
    with pytest.raises(ValueError, match=r"noise input_states is of shape \(3, 4, 24\)"):
        network.apply(params, images, noise={"graph": {"input_states": jnp.zeros((3, 4, 24))}})


def test_images_of_another_size_are_refused(images):
    network, params = build()
    with pytest.raises(ValueError, match=r"config\.data\.image_size"):
        network.apply(params, images[:, :8])


def test_signatures_that_are_given_are_the_first_ones():
    network = model.build(SIZES, INTERFACE)
    given = normal(10, 12, seed=5)
    params = network.init(jax.random.key(0), signatures={"mediator": given})
    np.testing.assert_array_equal(params["graph"]["mediator"]["signatures"], given)
    assert params["graph"]["input"]["signatures"].shape == (5, 12)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pooling": "gumble"}, r"config\.model\.pooling='gumble' must be one of"),
        ({"pooling": "first_slot"}, r"config\.model\.read_out_head=True"),
        ({"inputs_as_mediators": True}, r"inputs=5 as mediators=10"),
        ({"layerwise": {"ffn_factor": (1.0,)}}, r"layerwise\.ffn_factor=\(1\.0,\) must have"),
        ({"seeding": "codes"}, r"config\.model\.seeding='codes'"),
        ({"students": "cifar"}, r"config\.model\.students='cifar'"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(SIZES, **changes)


def test_a_layerwise_field_that_is_not_there_is_named():
    config = dataclasses.replace(SIZES, layerwise={"kernel/truncate": (1.0, 1.0, 1.0)})
    with pytest.raises(ValueError, match=r"kernel/truncate: KernelConfig has no field 'truncate'"):
        model.build(config, INTERFACE)


# Students.


def test_students_have_the_same_codes_and_states_in_every_call():
    students = model.build_students(SIZES, INTERFACE, meta_width=16, meta_tokens=5, seed=3)
    params = students.init(jax.random.key(0))
    tokens = normal(4, 5, 16)
    last = {"start": 4, "stop": 5}
    one = students.apply(params, tokens, **last)[0]
    np.testing.assert_array_equal(one, students.apply(params, tokens, **last)[0])
    half = students.apply(params, tokens[:2], **last)[0]
    np.testing.assert_allclose(half, one[:2], atol=1e-6)  # a place's state is its own
    other = model.build_students(SIZES, INTERFACE, meta_width=16, meta_tokens=5, seed=4)
    assert not np.allclose(one, other.apply(params, tokens, **last)[0])


def test_the_read_in_student_gives_one_token():
    students = model.build_students(SIZES, INTERFACE, meta_width=16, meta_tokens=5, seed=3)
    params = students.init(jax.random.key(0), only=(0,))
    assert students.apply(params, normal(4, 16, 16, 3), stop=1)[0].shape == (4, 1, 16)
    scale = params["stage_0"]["read_in"]["ffn"]["layer_scale"]
    assert np.all(np.asarray(scale) == np.float32(0.1))
    legacy = dataclasses.replace(SIZES, legacy_read_in_scale=True)
    students = model.build_students(legacy, INTERFACE, meta_width=16, meta_tokens=5, seed=3)
    scale = students.init(jax.random.key(0), only=(0,))["stage_0"]["read_in"]["ffn"]["layer_scale"]
    assert np.all(np.asarray(scale) == np.float32(1e-6))
