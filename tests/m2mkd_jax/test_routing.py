"""Routers, their order of priority, and the balance losses, against numbers worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.moe import routers

# One group of three tokens, four experts; best choices 2, 0, 2 and second choices 0, 3, 1.
LOGITS = jnp.log(
    jnp.array([[[0.3, 0.1, 0.5, 0.1], [0.6, 0.05, 0.1, 0.25], [0.02, 0.18, 0.7, 0.1]]])
)


TOKEN_CHOICE = ("topk_softmax", "softmax_topk")


def route(name, logits, *, chosen=2, slots=1, order="token"):
    choose = jax.jit(getattr(routers, name), static_argnames=("chosen", "slots", "order"))
    return choose(logits, chosen=chosen, slots=slots, order=order)


def test_all_first_choices_come_before_all_second_choices():
    routes = route("topk_softmax", LOGITS)
    np.testing.assert_array_equal(routes.token, [[0, 1, 2, 0, 1, 2]])
    np.testing.assert_array_equal(routes.expert, [[2, 0, 2, 0, 3, 1]])
    assert routes.token.dtype == routes.expert.dtype == jnp.int32


def test_topk_softmax_normalises_over_the_chosen_only():
    weight = route("topk_softmax", LOGITS).weight
    expected = [[5 / 8, 60 / 85, 70 / 88, 3 / 8, 25 / 85, 18 / 88]]
    np.testing.assert_allclose(weight, expected, rtol=1e-6)


def test_softmax_topk_keeps_the_weights_of_the_full_softmax():
    weight = route("softmax_topk", LOGITS).weight
    np.testing.assert_allclose(weight, [[0.5, 0.6, 0.7, 0.3, 0.25, 0.18]], rtol=1e-6)


@pytest.mark.parametrize("name", TOKEN_CHOICE)
def test_priority_puts_most_confident_tokens_first_within_each_choice(name):
    routes = route(name, LOGITS, order="priority")
    np.testing.assert_array_equal(routes.token, [[2, 1, 0, 2, 1, 0]])
    np.testing.assert_array_equal(routes.expert, [[2, 0, 2, 1, 3, 0]])
    plain = route(name, LOGITS)
    np.testing.assert_array_equal(routes.weight, plain.weight[:, [2, 1, 0, 5, 4, 3]])


@pytest.mark.parametrize("name", TOKEN_CHOICE)
def test_priority_goes_by_probability_not_logits(name):
    shifted = LOGITS + jnp.array([5.0, 0.0, -5.0])[:, None]
    np.testing.assert_array_equal(route(name, shifted, order="priority").token[0, :3], [2, 1, 0])


def test_tokens_of_the_same_priority_keep_their_order():
    logits = jnp.tile(jnp.array([1.0, 0.0, 0.0]), (2, 9, 1)).at[1, 4, 0].set(3.0)
    token = route("softmax_topk", logits, order="priority", chosen=1).token
    np.testing.assert_array_equal(token, [[*range(9)], [4, 0, 1, 2, 3, 5, 6, 7, 8]])


@pytest.mark.parametrize("name", [*TOKEN_CHOICE, "expert_choice"])
def test_groups_are_routed_independently(name):
    logits = np.random.default_rng(1).normal(0, 2, (3, 7, 5)).astype(np.float32)
    others = logits.copy()
    others[[0, 2]] = logits[[2, 0], ::-1]
    routes, beside = (route(name, x, slots=3, order="priority") for x in (logits, others))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[1], y[1]), routes, beside)


@pytest.mark.parametrize("order", sorted(routers.ORDERS))
def test_by_token_undoes_the_order(order):
    logits = jax.random.normal(jax.random.key(0), (3, 7, 5))
    expert, weight = routers.by_token(route("softmax_topk", logits, order=order), 2)
    top, best = jax.lax.top_k(jax.nn.softmax(logits), 2)
    np.testing.assert_array_equal(expert, best)
    np.testing.assert_allclose(weight, top, rtol=1e-6)


def test_expert_choice_takes_each_experts_best_tokens():
    routes = route("expert_choice", LOGITS, slots=2)
    np.testing.assert_array_equal(routes.expert, [[0, 0, 1, 1, 2, 2, 3, 3]])
    np.testing.assert_array_equal(routes.token[0, :6], [1, 0, 2, 0, 2, 0])
    np.testing.assert_allclose(routes.weight[0, :6], [0.6, 0.3, 0.18, 0.1, 0.7, 0.5], rtol=1e-5)


def test_weights_stay_in_the_precision_of_the_logits():
    assert route("topk_softmax", LOGITS).weight.dtype == jnp.float32
    with jax.enable_x64(True):
        assert route("softmax_topk", jnp.ones((1, 2, 4), jnp.float64)).weight.dtype == jnp.float64


def test_rank_in_expert_counts_earlier_pairs_of_local_experts():
    rank, sizes = routers.rank_in_expert(jnp.array([1, 7, 1, 0, -1, 1]), 3)
    np.testing.assert_array_equal(sizes, [1, 3, 0])
    np.testing.assert_array_equal(rank[jnp.array([0, 2, 3, 5])], [0, 1, 0, 2])


@pytest.mark.parametrize(("experts", "std"), [(8, 2.0), (2, 0.5)])
def test_noise_std_is_divided_by_number_of_experts(experts, std):
    logits = jnp.full((4, 1000, experts), 3.0)
    drawn = routers.noisy(logits, jax.random.key(0), std)
    np.testing.assert_allclose(jnp.std(drawn), std / experts, rtol=0.03)
    np.testing.assert_allclose(jnp.mean(drawn), 3.0, atol=0.01)


def test_noise_is_drawn_for_each_group_token_expert_and_key():
    keys = jax.random.split(jax.random.key(0), 2)
    drawn = jnp.stack([routers.noisy(jnp.zeros((3, 5, 4)), key, 1.0) for key in keys])
    assert len(np.unique(drawn)) == drawn.size


def test_importance_loss_by_hand():
    # Summed gates 0.92, 0.33, 1.3, 0.45: mean 0.75.
    spread = np.mean((np.array([0.92, 0.33, 1.3, 0.45]) - 0.75) ** 2)
    np.testing.assert_allclose(routers.importance_loss(LOGITS), spread / 0.75**2, rtol=1e-5)


def test_importance_loss_is_flat_at_balance():
    value, slope = jax.value_and_grad(routers.importance_loss)(jnp.zeros((2, 3, 4)))
    assert value == 0
    np.testing.assert_array_equal(slope, jnp.zeros((2, 3, 4)))


def test_load_loss_by_hand():
    # Two experts, one chosen, std 0.5, so that a logit's noise is N(0, 0.25^2).
    clean = jnp.array([[[1.0, 0.8], [0.2, 0.9]]])
    drawn = jnp.array([[[1.1, 0.7], [0.3, 0.85]]])

    def won(threshold, logit):
        return 0.5 * math.erfc((threshold - logit) / 0.25 / math.sqrt(2))

    load = np.array([(won(1.1, 1.0) + won(0.85, 0.2)) / 2, (won(1.1, 0.8) + won(0.85, 0.9)) / 2])
    loss = routers.load_loss(clean, drawn, chosen=1, std=0.5)
    np.testing.assert_allclose(loss, np.var(load) / np.mean(load) ** 2, rtol=1e-5)


def test_load_loss_of_two_choices_by_hand():
    # The second largest noisy logit is the threshold: 0.7 and 0.6. A logit's noise is N(0, 0.2^2).
    clean = np.array([[1.0, 0.8, 0.1], [0.2, 0.9, 0.5]])
    drawn = np.array([[1.1, 0.7, 0.2], [0.3, 0.85, 0.6]])
    bar = np.array([[0.7], [0.6]])
    won = [[0.5 * math.erfc(z / math.sqrt(2)) for z in row] for row in (bar - clean) / 0.2]
    load = np.mean(won, axis=0)
    loss = routers.load_loss(jnp.asarray(clean[None]), jnp.asarray(drawn[None]), chosen=2, std=0.6)
    np.testing.assert_allclose(loss, np.var(load) / np.mean(load) ** 2, rtol=1e-5)


def test_losses_do_not_depend_on_grouping():
    @jax.jit
    def losses(clean, drawn):
        return {
            "importance": routers.importance_loss(clean),
            "load": routers.load_loss(clean, drawn, chosen=2, std=2.0),
            "gshard": routers.gshard_loss(clean),
            "z": routers.z_loss(clean),
            "entropy": routers.entropy(clean),
        }

    drawn = jax.random.normal(jax.random.key(3), (2, 3, 6, 4))
    # How tokens are grouped makes no difference.
    mixed = np.take(np.asarray(drawn).reshape(2, 18, 4), 7 * np.arange(18) % 18, axis=1)
    together, shuffled = losses(*drawn), losses(*mixed.reshape(2, 3, 6, 4))
    for name, expected in together.items():
        np.testing.assert_allclose(shuffled[name], expected, rtol=1e-5, err_msg=name)


def test_load_loss_pushes_towards_the_idle_expert():
    clean = jnp.tile(jnp.array([0.3, 0.0]), (1, 6, 1))
    drawn = routers.noisy(clean, jax.random.key(1), 1.0)
    slope = jax.grad(lambda c: routers.load_loss(c, drawn, chosen=1, std=1.0))(clean)
    assert jnp.all(slope[..., 0] > 0)
    assert jnp.all(slope[..., 1] < 0)


def test_gshard_loss_by_hand():
    # Best experts 2, 0, 2; mean gates 0.92 / 3, 0.33 / 3, 1.3 / 3, 0.45 / 3.
    expected = 16 * np.mean([1 / 3 * 0.92 / 3, 0, 2 / 3 * 1.3 / 3, 0])
    np.testing.assert_allclose(routers.gshard_loss(LOGITS), expected, rtol=1e-5)


def test_z_loss_by_hand():
    logits = jnp.array([[[0.0, 0.0], [math.log(3.0), 0.0]]])
    expected = (math.log(2) ** 2 + math.log(4) ** 2) / 2
    np.testing.assert_allclose(routers.z_loss(logits), expected, rtol=1e-6)


def test_load_and_entropy():
    np.testing.assert_allclose(
        routers.load(route("topk_softmax", LOGITS), 4), [2 / 6, 1 / 6, 2 / 6, 1 / 6], rtol=1e-6
    )
    groups = routers.Routes(None, jnp.array([[0, 0], [1, 2]]), jnp.ones((2, 2)))
    np.testing.assert_allclose(routers.load(groups, 4), [0.5, 0.25, 0.25, 0])
    np.testing.assert_allclose(routers.entropy(jnp.zeros((2, 3, 4))), math.log(4), rtol=1e-6)
    halves = jnp.array([[[0.0, 0.0, -1e9, -1e9]]])
    np.testing.assert_allclose(routers.entropy(halves), math.log(2), rtol=1e-6)
