"""Dispatchers against a plain loop over experts, on every mesh, and what `capacity` drops."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from same import assert_close

from common_jax.mesh import AXES
from m2mkd_jax.moe import grouped
from m2mkd_jax.moe.dispatch import DISPATCHERS
from m2mkd_jax.moe.grouped import Experts
from m2mkd_jax.moe.ragged import ragged_product
from m2mkd_jax.moe.routers import Routes, softmax_topk

G, N, E, A, D, F = 8, 6, 8, 2, 12, 20
# These tests spend their time in the compiler.
route = jax.jit(softmax_topk, static_argnames=("chosen", "slots", "order"))
MESHES = [(8, 1, 1), (4, 1, 2), (2, 1, 4), (1, 1, 8), (2, 2, 2)]


def make_experts(count=E, dtype=np.float64):
    draw = np.random.default_rng(1)
    shapes = (count, D, F), (count, F), (count, F, D), (count, D)
    return Experts(*(jnp.asarray(0.4 * draw.standard_normal(shape), dtype) for shape in shapes))


def make_inputs(expert=None, dtype=np.float64):
    """Tokens, routes (random, or the given experts for the pairs) and experts."""
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.standard_normal((G, N, D)), dtype)
    logits = jnp.asarray(draw.standard_normal((G, N, E)), dtype)
    routes = route(logits, chosen=A, slots=0, order="token")
    if expert is not None:
        routes = routes._replace(expert=jnp.asarray(expert, jnp.int32))
    return x, routes, make_experts(dtype=dtype)


def plain(x, routes, experts):
    """One expert after another on all tokens, weighted by the token's pairs."""
    y = 0.0
    group = jnp.arange(x.shape[0])[:, None]
    for e in range(experts.up.shape[0]):
        hidden = x @ experts.up[e] + experts.up_bias[e]
        answer = jax.nn.gelu(hidden, approximate=False) @ experts.down[e] + experts.down_bias[e]
        share = jnp.where(routes.expert == e, routes.weight, 0.0)
        weight = jnp.zeros(x.shape[:2], x.dtype).at[group, routes.token].add(share)
        y = y + weight[..., None] * answer
    return y


@partial(jax.jit, static_argnums=0)
def with_gradients(function, x, routes, experts):
    """y, and the gradients of sum(sin(y)) with respect to x, weights and experts."""

    def total(x, weight, experts):
        y = function(x, routes._replace(weight=weight), experts)
        return jnp.sum(jnp.sin(y)), y

    gradients, y = jax.grad(total, (0, 1, 2), has_aux=True)(x, routes.weight, experts)
    return y, gradients


ROUTINGS = {
    "random": None,
    "all on one expert": np.full((G, N * A), 3),
    "most experts starved": np.tile([0, 5], (G, N)),
}


def by_rows(engine, x, routes, experts):
    token = (routes.token + N * jnp.arange(G, dtype=jnp.int32)[:, None]).reshape(-1)
    rows = grouped.arrange(token, routes.expert.reshape(-1), tokens=G * N, experts=E, block=8)
    y = grouped.grouped_mlp(x.reshape(-1, D), routes.weight.reshape(-1), experts, rows, engine)
    return y.reshape(x.shape)


def dispatch(name, slots, x, routes, experts):
    return DISPATCHERS[name].run(x, routes, experts, slots)[0]


# Two slots per expert and group drop many of the pairs (6 tokens, 8 experts, 2 choices).
WAYS = {
    "blockwise": partial(by_rows, grouped.BY_PLATFORM),
    "ragged": partial(by_rows, grouped.RAGGED),
    "dropless": partial(dispatch, "dropless", 0),
    "capacity with room for all": partial(dispatch, "capacity", N * A),
    "capacity": partial(dispatch, "capacity", 2),
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "capacity"])
def test_dispatch_matches_loop_over_experts(way, routing):
    with jax.enable_x64(True):
        inputs = make_inputs(ROUTINGS[routing])
        got = with_gradients(WAYS[way], *inputs)
        assert_close(got, with_gradients(plain, *inputs))
        for leaf in jax.tree.leaves(got):
            assert np.linalg.norm(leaf) > 0.1


@partial(jax.jit, static_argnums=0)
def share_dropped(name, x, routes, experts):
    return DISPATCHERS[name].run(x, routes, experts, 2)[1]


@pytest.mark.parametrize("routing", ["random", "all on one expert"])
def test_capacity_matches_loop_with_overflow_dropped(routing):
    with jax.enable_x64(True):
        x, routes, experts = make_inputs(ROUTINGS[routing])
        expert = np.asarray(routes.expert)
        earlier = [[np.sum(row[:p] == row[p]) for p in range(N * A)] for row in expert]
        served = np.asarray(earlier) < 2

        got = with_gradients(WAYS["capacity"], x, routes, experts)
        kept = routes._replace(weight=routes.weight * served)
        y, (dx, dweight, dexperts) = with_gradients(plain, x, kept, experts)
        assert_close(got, (y, (dx, dweight * served, dexperts)))
        dropped = share_dropped("capacity", x, routes, experts)
        np.testing.assert_allclose(dropped, 1 - served.mean())
        assert 0 < dropped < 1 and len(np.unique(served.mean(axis=1))) > (routing == "random")
        assert share_dropped("dropless", x, routes, experts) == 0


@pytest.mark.parametrize("way", ["dropless", "capacity"])
def test_unused_experts_get_zero_gradients(way):
    with jax.enable_x64(True):
        inputs = make_inputs(ROUTINGS["most experts starved"])
        _, (_, _, experts) = with_gradients(WAYS[way], *inputs)
        for leaf in map(np.asarray, experts):
            assert np.all(leaf[[1, 2, 3, 4, 6, 7]] == 0)
            assert np.all(leaf[[0, 5]].any(axis=-1))


def test_unused_rows_do_not_affect_results(monkeypatch):
    def poisoned(a, b, sizes, contract, groups, ragged=grouped._ragged):
        y = ragged(a, b, sizes, contract, groups)
        used = (jnp.arange(len(y)) < jnp.sum(sizes))[:, None]
        return jnp.where(used, y, jnp.nan) if groups else y

    monkeypatch.setattr(grouped, "_ragged", poisoned)
    with jax.enable_x64(True):
        inputs = make_inputs(ROUTINGS["most experts starved"])
        got = with_gradients(partial(by_rows, grouped.RAGGED), *inputs)
        assert_close(got, with_gradients(plain, *inputs))


def test_nonlocal_pairs_take_no_block_and_give_zero():
    token = jnp.arange(40, dtype=jnp.int32)
    rows = grouped.arrange(token, jnp.full(40, E), tokens=40, experts=E, block=8)
    assert int(jnp.sum(rows.sizes)) == 0
    x = jnp.ones((40, D))
    experts = make_experts(dtype=np.float32)

    @jax.jit
    def run(*inputs):
        y, vjp = jax.vjp(lambda *args: grouped.grouped_mlp(*args, rows), *inputs)
        return y, vjp(jnp.ones_like(y))

    for leaf in jax.tree.leaves(run(x, jnp.ones(40), experts)):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


def test_arrange_gives_one_expert_per_block_and_each_pair_once():
    expert = jnp.asarray(np.random.default_rng(2).integers(0, 5, 200))
    rows = grouped.arrange(
        jnp.arange(200, dtype=jnp.int32), expert, tokens=200, experts=4, block=16
    )
    used = int(jnp.sum(rows.sizes))
    mine = np.flatnonzero(expert < 4)
    pair = np.asarray(rows.pair)
    np.testing.assert_array_equal(np.sort(pair[pair < 200]), mine)
    assert np.all(pair[used:] >= 200)
    holds = np.asarray(jnp.repeat(rows.expert, 16))
    np.testing.assert_array_equal(holds[pair < 200], expert[pair[pair < 200]])
    assert used == sum(-(-int(np.sum(expert == e)) // 16) * 16 for e in range(4))


@pytest.mark.parametrize(("pairs", "experts"), [(15, 4), (4, 4), (9, 1)])
def test_arrange_has_a_row_for_every_pair(pairs, experts):
    draw = np.random.default_rng(pairs)
    share = draw.dirichlet(np.full(experts, 0.7), 100)
    expert = np.stack([draw.choice(experts, pairs, p=p) for p in share])
    expert[0] = np.arange(pairs) % experts
    token = draw.permutation(40)[:pairs].astype(np.int32)
    place = partial(grouped.arrange, tokens=40, experts=experts, block=8)
    rows = jax.jit(jax.vmap(partial(place, jnp.asarray(token))))(expert)
    for i, row_pair in enumerate(np.asarray(rows.pair)):
        held = row_pair < pairs
        assert sorted(row_pair[held]) == [*range(pairs)]
        np.testing.assert_array_equal(rows.token[i][held], token[row_pair[held]])
        np.testing.assert_array_equal(np.repeat(rows.expert[i], 8)[held], expert[i][row_pair[held]])
        # Rows without a pair are distinct, and belong to no token.
        assert len(np.unique(rows.token[i][~held])) == np.sum(~held)
        assert np.all(rows.token[i][~held] >= 40)


@pytest.mark.parametrize(
    ("pairs", "experts", "block"), [(8192, 8, 128), (0, 8, 8), (64, 8, 16), (10**6, 8, 256)]
)
def test_block_size(pairs, experts, block):
    assert grouped.block_size(pairs, experts) == block


@pytest.mark.parametrize(("pairs", "block"), [(64, 256), (8192, 1024), (10**6, 2048)])
def test_gpu_blocks_are_larger(pairs, block):
    assert grouped.block_size(pairs, 8, "gpu") == block


@pytest.mark.parametrize("way", ["dropless", "capacity"])
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_dispatch_on_any_mesh_matches_one_device(way, shape):
    with jax.enable_x64(True):
        x, routes, experts = make_inputs()
        expected = with_gradients(WAYS[way], x, routes, experts)
        mesh = jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
        with jax.set_mesh(mesh):
            by_group = NamedSharding(mesh, P(AXES))
            specs = Experts(
                P("expert", "fsdp"), P("expert"), P("expert", None, "fsdp"), P("expert")
            )
            x, routes = jax.device_put((x, routes), by_group)
            experts = jax.tree.map(
                lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), experts, specs
            )
            got = with_gradients(WAYS[way], x, routes, experts)
        assert got[0].sharding.is_equivalent_to(by_group, 3)
        assert_close(got, expected)


def test_all_pairs_on_one_device_of_the_expert_axis():
    with jax.enable_x64(True):
        inputs = make_inputs(ROUTINGS["all on one expert"])
        expected = with_gradients(plain, *inputs)
        mesh = jax.make_mesh((2, 1, 4), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
        with jax.set_mesh(mesh):
            got = with_gradients(WAYS["dropless"], *inputs)
        assert_close(got, expected)


def compiled_text(shape, name):
    mesh = jax.make_mesh(
        shape,
        AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
        devices=jax.devices()[: int(np.prod(shape))],
    )
    x, routes, experts = make_inputs(dtype=np.float32)
    with jax.set_mesh(mesh):
        groups = NamedSharding(mesh, P(AXES))
        x, routes = jax.device_put((x, routes), groups)
        experts = jax.device_put(experts, NamedSharding(mesh, P("expert")))
        run = jax.jit(lambda *args: DISPATCHERS[name].run(*args, 2)[0])
        return run.lower(x, routes, experts).compile().as_text()


def test_dispatch_uses_expected_collectives():
    text = compiled_text((2, 1, 2), "capacity")
    assert "all-to-all(" in text
    assert "all-gather(" not in text
    text = compiled_text((2, 1, 2), "dropless")
    assert "all-gather(" in text
    assert "reduce-scatter(" in text
    for name in DISPATCHERS:
        text = compiled_text((4, 1, 1), name)
        assert "all-to-all(" not in text
        assert "all-gather(" not in text


def test_a_mesh_with_other_axes_is_refused():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"needs \('data', 'fsdp', 'expert'\)"):
        DISPATCHERS["dropless"].run(*make_inputs(dtype=np.float32), 0)


def served(routes, slots, experts=2, tokens=4):
    """The weight with which each token comes back, (token, expert), and the fraction dropped."""
    # Expert e returns 1 at index e for any input.
    answers = Experts(
        jnp.zeros((experts, experts, 1)),
        jnp.zeros((experts, 1)),
        jnp.zeros((experts, 1, experts)),
        jnp.eye(experts),
    )
    y, dropped = DISPATCHERS["capacity"].run(jnp.ones((1, tokens, experts)), routes, answers, slots)
    return y[0], dropped


def test_capacity_drops_the_pairs_that_come_last():
    # First choices 0 1 0, second choices 1 0 1. Expert 0 is full after tokens 0 and 2, expert 1
    # after the first choice of token 1 and the second of token 0.
    routes = Routes(
        token=jnp.array([[0, 1, 2, 0, 1, 2]], jnp.int32),
        expert=jnp.array([[0, 1, 0, 1, 0, 1]], jnp.int32),
        weight=jnp.array([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4]]),
    )
    y, dropped = served(routes, 2, tokens=3)
    np.testing.assert_allclose(y, [[0.9, 0.6], [0.0, 0.8], [0.7, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(dropped, 2 / 6, rtol=1e-6)


@pytest.mark.parametrize(("order", "kept"), [("token", [0, 1]), ("priority", [1, 3])])
def test_batch_priority_keeps_the_tokens_with_the_highest_gates(order, kept):
    logits = jnp.array([[[1.0, 0.0], [4.0, 0.0], [2.0, 0.0], [3.0, 0.0]]])
    routes = softmax_topk(logits, chosen=1, slots=2, order=order)
    y, dropped = served(routes, 2)
    np.testing.assert_array_equal(np.flatnonzero(y[:, 0]), kept)
    assert dropped == 0.5


@pytest.mark.parametrize("way", ["blockwise", "ragged", "capacity with room for all"])
def test_bfloat16(way):
    x, routes, experts = make_inputs(dtype=np.float32)
    narrow, narrow_experts = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.bfloat16), (x, experts)
    )
    got = with_gradients(WAYS[way], narrow, routes, narrow_experts)
    expected = with_gradients(plain, x, routes, experts)
    assert got[0].dtype == got[1][0].dtype == got[1][2].up.dtype == jnp.bfloat16
    assert got[1][1].dtype == jnp.float32
    for one, true in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(np.float32(one) - true) < 0.03 * np.linalg.norm(true)


@pytest.mark.parametrize("way", ["blockwise", "ragged", "capacity with room for all"])
def test_bfloat16_accumulates_in_float32(way):
    # In bfloat16, 256 + 1 is 256. These are the experts' outputs for a token, and then the
    # gradients of an expert's tokens: one of 256, one of 2, and 1 otherwise.
    half = jnp.bfloat16
    answers = jnp.ones((E, D), half).at[0].set(256).at[-1].set(2)
    zero = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, half), make_experts(dtype=np.float32))
    experts = zero._replace(down_bias=answers)
    x = jnp.ones((G, N, D), half)
    token = jnp.tile(jnp.repeat(jnp.arange(N, dtype=jnp.int32), E), (G, 1))
    expert = jnp.tile(jnp.arange(E, dtype=jnp.int32), (G, N))
    routes = Routes(token, expert, jnp.ones(token.shape))
    dy = jnp.ones((G, N, D), half).at[0, 0].set(256).at[-1, -1].set(2)

    @jax.jit
    def run(x, routes, experts):
        y, vjp = jax.vjp(lambda experts: WAYS[way](x, routes, experts), experts)
        return y, vjp(dy)[0].down_bias

    y, gradient = run(x, routes, experts)
    np.testing.assert_array_equal(y, np.full((G, N, D), 264, half))
    if way != "capacity with room for all":
        np.testing.assert_array_equal(gradient, np.full((E, D), 304, half))


def test_tpu_uses_ragged_dot_and_cpu_loops_over_blocks():
    rows = grouped.arrange(jnp.arange(8), jnp.zeros(8, jnp.int32), tokens=8, experts=E, block=8)
    given = jnp.ones((8, D)), jnp.ones(8), make_experts(dtype=np.float32)
    slope = jax.grad(lambda *given: jnp.sum(grouped.grouped_mlp(*given, rows)), (0, 1, 2))
    traced = jax.jit(slope).trace(*given)
    tpu, cpu = (traced.lower(lowering_platforms=(name,)).as_text() for name in ("tpu", "cpu"))
    assert "ragged_dot" in tpu and "while" not in tpu
    assert "while" in cpu and "ragged_dot" not in cpu


def test_ragged_products_under_vmap_and_hessian():
    draw, sizes = np.random.default_rng(0), jnp.array([2, 3])
    a, b = draw.standard_normal((4, 5, 3)), draw.standard_normal((2, 3, 2))

    def product(a, b):
        return ragged_product(a, b, sizes, contract=(1, 1), groups=[0], dtype=a.dtype)

    def plain(a, b):
        return jnp.concatenate([a[:2] @ b[0], a[2:] @ b[1]])

    def hessian(product):
        def total(a, b):
            return jnp.sum(jnp.sin(product(a, b)))

        return jax.jit(jax.vmap(jax.jacfwd(jax.jacfwd(total, 0), 1), (0, None)))(a, b)

    with jax.enable_x64(True):
        assert_close(hessian(product), hessian(plain))
