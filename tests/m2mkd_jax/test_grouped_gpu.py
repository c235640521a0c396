"""The GPU kernels, interpreted on a CPU, against one dense expert after another."""

import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.experimental import pallas as pl
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from common_jax.mesh import AXES
from m2mkd_jax.moe import dispatch, grouped, grouped_gpu
from m2mkd_jax.moe.grouped import Experts
from m2mkd_jax.moe.routers import Routes

N, E, D, F = 300, 4, 64, 192  # F is three tiles of 64 columns
H100 = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")


@pytest.fixture
def interpreted(monkeypatch):
    """Runs kernels in the interpreter, which fills undefined values with NaN."""
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))


def make_inputs(dtype=np.float32, tokens=N):
    draw = np.random.default_rng(0)

    def normal(scale, *shape):
        return jnp.asarray(scale * draw.standard_normal(shape), dtype)

    experts = Experts(
        normal(D**-0.5, E, D, F), normal(0.3, E, F), normal(F**-0.5, E, F, D), normal(0.3, E, D)
    )
    return normal(1, tokens, D), normal(1, tokens, D), experts


def route(shares, second=1.0):
    """Tokens, experts and weights of two pairs per token; expert E means no expert.

    shares: how often each expert is chosen.
    second: fraction of the second choices that are served.
    """
    draw = np.random.default_rng(1)
    expert = np.stack([draw.choice(E, 2, replace=False, p=shares) for _ in range(N)], axis=1)
    expert[1] = np.where(draw.random(N) < second, expert[1], E)
    weight = draw.uniform(0.2, 1, 2 * N)
    token = np.tile(np.arange(N), 2)
    return jnp.int32(token), jnp.int32(expert.reshape(-1)), jnp.float32(weight)


# All have one shape, since programs are slow to compile.
ROUTINGS = {
    "even": route([0.25, 0.25, 0.25, 0.25]),
    "skewed, one expert empty": route([0.9, 0.08, 0, 0.02]),
    "dropped pairs": route([0.4, 0.3, 0.2, 0.1], second=0.4),
    "one choice": route([0.1, 0.5, 0.4, 0], second=0),
}


@jax.jit
def by_kernels(x, dy, experts, token, expert, weight):
    rows = grouped.arrange(token, expert, tokens=N, experts=E, block=grouped_gpu.TILE)

    def run(x, weight, experts):
        return grouped.grouped_mlp(x, weight, experts, rows, grouped.KERNELS)

    y, vjp = jax.vjp(run, x, weight, experts)
    return y, *vjp(dy)


@jax.jit
def by_plain_experts(x, dy, experts, token, expert, weight):
    """In float32, except for the activations, which are rounded like in the kernels."""
    dtype = x.dtype
    x, dy, experts = jax.tree.map(jnp.float32, (x, dy, experts))

    def run(x, weight, experts):
        y = jnp.zeros((N, D))
        for e in range(E):
            hidden = x @ experts.up[e] + experts.up_bias[e]
            active = 0.5 * hidden * (1 + jax.lax.erf(hidden * 0.5**0.5))
            active += jax.lax.stop_gradient(active.astype(dtype) - active)
            gate = jnp.zeros(N).at[token].add(jnp.where(expert == e, weight, 0))
            y += gate[:, None] * (active @ experts.down[e] + experts.down_bias[e])
        return y

    y, vjp = jax.vjp(run, x, weight, experts)
    return y.astype(dtype), *vjp(dy)


def distances(found, want):
    """Relative distance of each leaf to the reference; NaN where a value is NaN."""
    found, want = (map(np.float64, jax.tree.leaves(tree)) for tree in (found, want))
    pairs = zip(found, want, strict=True)
    return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_float32_values_and_gradients(routing, interpreted):
    x, dy, experts = make_inputs()
    found = by_kernels(x, dy, experts, *ROUTINGS[routing])
    want = by_plain_experts(x, dy, experts, *ROUTINGS[routing])
    assert len(distances(found, want)) == 7
    assert np.max(distances(found, want)) < 2e-6
    # Pairs without a row get zero gradient, and experts without a row exactly zero.
    idle = np.setdiff1d(np.arange(E), ROUTINGS[routing][1])
    assert np.all(found[2][ROUTINGS[routing][1] == E] == 0)
    assert all(np.all(leaf[idle] == 0) for leaf in found[3])


@pytest.mark.parametrize("routing", ROUTINGS)
def test_bfloat16_values_and_gradients(routing, interpreted):
    x, dy, experts = make_inputs(jnp.bfloat16)
    found = by_kernels(x, dy, experts, *ROUTINGS[routing])
    y, dx, dweight, gradient = by_plain_experts(x, dy, experts, *ROUTINGS[routing])
    assert found[0].dtype == found[1].dtype == found[3].up.dtype == jnp.bfloat16
    assert found[2].dtype == jnp.float32
    assert np.max(distances(found, (y, dx, dweight, gradient))) < 4e-3
    # If hidden values were rounded before the GELU, y would be off by 3.7e-3.
    assert distances(found[0], y)[0] < 1e-3


def test_sums_are_not_rounded_to_bfloat16(interpreted):
    # In bfloat16, 256 + 1 is 256: as outputs of a token's experts, and as an expert's gradients.
    half = jnp.bfloat16
    x, dy, experts = jax.tree.map(jnp.zeros_like, make_inputs(half))
    experts = experts._replace(down_bias=jnp.ones((E, D), half).at[0].set(256))
    dy = (dy + 1).at[0].set(256)
    token, expert = jnp.tile(jnp.arange(N), 2), jnp.repeat(jnp.arange(2), N)
    found = by_kernels(x, dy, experts, token, expert, jnp.ones(2 * N))
    np.testing.assert_array_equal(found[0], np.full((N, D), jnp.asarray(257, half)))
    sums = np.float32(found[3].down_bias[:2])
    np.testing.assert_array_equal(sums, np.full((2, D), jnp.asarray(N + 255, half)))


def test_kernels_on_the_expert_axis_of_a_mesh(interpreted, monkeypatch):
    monkeypatch.setattr(
        dispatch, "grouped_mlp", partial(grouped.grouped_mlp, engine=grouped.KERNELS)
    )
    monkeypatch.setattr(dispatch, "block_for_target", lambda *_, **__: grouped_gpu.TILE)
    x, dy, experts = make_inputs()
    token, expert, weight = ROUTINGS["skewed, one expert empty"]
    # Two groups of half the tokens; a pair's token is numbered within its group.
    half = N // 2
    order = np.argsort(np.asarray(token) >= half, kind="stable")
    given = [leaf[order].reshape(2, -1) for leaf in (token % half, expert, weight)]
    mesh = jax.make_mesh((1, 1, 2), AXES, axis_types=(AxisType.Auto,) * 3)

    @jax.jit
    def run(x, dy, experts, token, expert, weight):
        def serve(x, weight, experts):
            return dispatch.dropless(x, Routes(token, expert, weight), experts, 0)[0]

        y, vjp = jax.vjp(serve, x, weight, experts)
        return y, *vjp(dy)

    with jax.set_mesh(mesh):
        y, dx, dweight, gradient = run(
            x.reshape(2, half, D), dy.reshape(2, half, D), experts, *given
        )
    want = by_plain_experts(x, dy, experts, token, expert, weight)
    dweight = jnp.zeros_like(weight).at[order].set(dweight.reshape(-1))
    found = (y.reshape(N, D), dx.reshape(N, D), dweight, gradient)
    assert np.max(distances(found, want)) < 2e-6


def test_normal_cdf_is_exact_to_rounding():
    x = np.concatenate([np.linspace(-12, 12, 2**20, dtype=np.float32), np.float32([0, -1e-30])])
    cdf, decay = map(np.float64, jax.jit(grouped_gpu.normal_cdf)(x))
    wide = np.float64(x)
    assert np.max(np.abs(cdf - scipy.special.ndtr(wide))) < 2**-22
    assert np.max(np.abs(decay - np.exp(-0.5 * wide**2))) < 2**-22
    assert cdf.min() >= 0 and cdf.max() == 1


@pytest.mark.parametrize("size", [(21, 3), (1, 7)])
def test_every_tile_has_one_program(size):
    place = jax.jit(jax.vmap(lambda i: grouped_gpu._place(i, *size)))
    row, column = place(np.arange(np.prod(size)))
    assert len({*zip(row.tolist(), column.tolist(), strict=True)}) == np.prod(size)
    assert (int(row.max()) + 1, int(column.max()) + 1) == size


def lowered(width, hidden, dtype=np.float32):
    """The dropless layer and its gradients, lowered for an H100."""
    shape = partial(jax.ShapeDtypeStruct, dtype=dtype)
    pairs = [jax.ShapeDtypeStruct((2, 64), kind) for kind in (np.int32, np.int32, np.float32)]
    experts = Experts(
        *map(shape, ((E, width, hidden), (E, hidden), (E, hidden, width), (E, width)))
    )

    def run(x, routes, experts):
        def total(x, weight, experts):
            y, _ = dispatch.dropless(x, routes._replace(weight=weight), experts, 0)
            return jnp.sum(y)

        return jax.grad(total, (0, 1, 2))(x, routes.weight, experts)

    mesh = AbstractMesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=H100)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(run).trace(shape((2, 32, width)), Routes(*pairs), experts)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_gpu_lowering_has_kernels_and_no_loop():
    text = lowered(64, 128)
    # Two products forward, four backward; jax lowers equal ones once.
    assert 5 <= text.count("xla.gpu.triton") <= 6
    assert "stablehlo.while" not in text
    assert "flops" in text


@pytest.mark.parametrize(("width", "hidden"), [(64, 100), (20, 128)])
def test_odd_widths_fall_back_to_the_loop(width, hidden):
    text = lowered(width, hidden)
    assert "xla.gpu.triton" not in text and "stablehlo.while" in text


def test_float64_falls_back_to_the_loop():
    with jax.enable_x64(True):
        text = lowered(64, 128, np.float64)
    assert "xla.gpu.triton" not in text and "stablehlo.while" in text


@pytest.mark.parametrize(
    ("device", "width", "block"),
    [
        (H100, 768, 128),
        (H100, 700, 2048),
        (AbstractDevice("AMD Instinct MI300X", None, "gpu"), 768, 2048),
        (AbstractDevice("Tesla T4", 40, "gpu"), 768, 2048),
        (AbstractDevice("TPU v5 lite", 1, "tpu"), 768, 256),
        (AbstractDevice("cpu", None, "cpu"), 768, 256),
    ],
)
def test_block_size_depends_on_device(device, width, block):
    mesh = AbstractMesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device)
    size = partial(grouped.block_for_target, 50_432, 8, dtype=np.dtype(np.float32), hidden=3072)
    with jax.sharding.use_abstract_mesh(mesh):
        assert size(width=width) == block
    assert size(width=width) == 256  # without a mesh: for this process's CPU


@pytest.mark.parametrize(("capability", "block"), [("7.5", 2048), ("8.6", 128)])
def test_cards_unsupported_by_triton_fall_back_to_the_loop(capability, block, monkeypatch):
    card = types.SimpleNamespace(
        device_kind="NVIDIA GeForce RTX", platform="gpu", compute_capability=capability
    )
    monkeypatch.setattr(jax, "devices", lambda: [card])
    shapes = {"dtype": np.dtype(np.float32), "width": 768, "hidden": 3072}
    assert grouped.block_for_target(50_432, 8, **shapes) == block
