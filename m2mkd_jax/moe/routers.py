"""From gate logits to (token, expert, weight) pairs, balance losses and router metrics.

A routing function takes (logits, chosen=A, slots=C, order=name in ORDERS): those by which experts
choose read `slots`, those by which tokens choose read `chosen` and `order`. An entry of `ROUTERS`
in config.py makes it a router.

Axes: G routing groups, N tokens per group, E experts, A experts per token, P pairs per group. Each
group is routed separately; losses and metrics are over all tokens of the batch, so that they are
the same on any mesh. The V-MoE code writes S for N and K for A.

Everything is computed in float32 (float64 if the logits are).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


class Routes(NamedTuple):
    """The pairs of every group, in order of priority: earlier pairs take slots first.

    token: `[G, P]` int32, index of the token in its group.
    expert: `[G, P]` int32, index of the expert.
    weight: `[G, P]` float, weight of the expert's output in the token's sum.
    """

    token: Array
    expert: Array
    weight: Array


def topk_softmax(logits: Float[Array, "G N E"], *, chosen: int, slots: int, order: str) -> Routes:
    """w = softmax(z over the A largest z of a token); A = `chosen` (fastmoe, naive gate)."""
    del slots
    _, expert = jax.lax.top_k(logits, chosen)
    weight = jax.nn.softmax(jnp.take_along_axis(logits, expert, axis=-1), axis=-1)
    return _pairs(expert, weight, logits, order)


def softmax_topk(logits: Float[Array, "G N E"], *, chosen: int, slots: int, order: str) -> Routes:
    """w = the A largest of softmax(z over all experts), not renormalised (V-MoE, eq. 1)."""
    del slots
    _, expert = jax.lax.top_k(logits, chosen)
    weight = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), expert, axis=-1)
    return _pairs(expert, weight, logits, order)


def expert_choice(logits: Float[Array, "G N E"], *, chosen: int, slots: int, order: str) -> Routes:
    """Expert e takes the C tokens n of its group with the largest w_ne = softmax_e(z_ne).

    C = `slots`, P = E C; any number of experts may take the same token (Zhou et al. 2022).
    """
    del chosen, order
    scores = jnp.swapaxes(jax.nn.softmax(logits, axis=-1), -1, -2)
    _, token = jax.lax.top_k(scores, slots)
    weight = jnp.take_along_axis(scores, token, axis=-1)
    # (G, E, C), like `token` and `weight`.
    expert = jnp.broadcast_to(jnp.arange(logits.shape[-1])[:, None], token.shape)
    return Routes(*(_flat(leaf) for leaf in (token, expert.astype(jnp.int32), weight)))


def _by_position(logits: Float[Array, "G N E"]) -> Int[Array, "G N"]:
    return jnp.broadcast_to(jnp.arange(logits.shape[1]), logits.shape[:2])


def _by_probability(logits: Float[Array, "G N E"]) -> Int[Array, "G N"]:
    # In the log domain, so that gates that round to the same probability are still ordered. An
    # order has no gradient.
    top = jnp.max(jax.nn.log_softmax(jax.lax.stop_gradient(logits), axis=-1), axis=-1)
    return jnp.argsort(-top, axis=-1, stable=True)


# Order in which the tokens of a group are served: by position, or by descending top gate
# probability (batch-priority routing, V-MoE Alg. 2).
ORDERS: dict[str, Callable[[Array], Array]] = {"token": _by_position, "priority": _by_probability}


def _pairs(
    expert: Int[Array, "G N A"],
    weight: Float[Array, "G N A"],
    logits: Float[Array, "G N E"],
    order: str,
) -> Routes:
    """The pairs in order of priority: all first choices before all second choices and so on, with
    the tokens of each in `order`."""
    token = ORDERS[order](logits).astype(jnp.int32)
    if order != "token":
        expert = jnp.take_along_axis(expert, token[..., None], axis=1)
        weight = jnp.take_along_axis(weight, token[..., None], axis=1)
    return Routes(
        token=jnp.tile(token, (1, expert.shape[-1])),
        expert=_flat(jnp.swapaxes(expert, 1, 2)).astype(jnp.int32),
        weight=_flat(jnp.swapaxes(weight, 1, 2)),
    )


def _flat(leaf: Array) -> Array:
    return leaf.reshape(leaf.shape[0], -1)


def by_token(routes: Routes, chosen: int) -> tuple[Int[Array, "G N A"], Float[Array, "G N A"]]:
    """Experts and weights of every token, best choice first; only if tokens choose."""
    groups, pairs = routes.token.shape
    # Every choice lists the tokens in the same order, so one inverse permutation undoes them all.
    place = jnp.argsort(routes.token[:, : pairs // chosen], axis=-1)[:, None]

    def unsort(leaf: Array) -> Array:
        choices = leaf.reshape(groups, chosen, pairs // chosen)
        return jnp.swapaxes(jnp.take_along_axis(choices, place, axis=-1), 1, 2)

    return unsort(routes.expert), unsort(routes.weight)


def rank_in_expert(
    expert: Int[Array, " P"], experts: int
) -> tuple[Int[Array, " P"], Int[Array, " E"]]:
    """For each pair, the number of earlier pairs of its expert; and the number of pairs per expert.

    Pairs whose expert is outside 0..experts-1 are not counted, and their own rank is meaningless.
    """
    # A running count per expert: P x E small integers, no slower than sorting the pairs.
    one_hot = (expert[:, None] == jnp.arange(experts)).astype(jnp.int32)
    counts = jnp.cumsum(one_hot, axis=0)
    index = jnp.clip(expert, 0, experts - 1)[:, None]
    return jnp.take_along_axis(counts, index, axis=1)[:, 0] - 1, counts[-1]


def noisy(logits: Float[Array, "G N E"], key: PRNGKeyArray, std: float) -> Float[Array, "G N E"]:
    """Logits + N(0, (std / E)^2): `std` is in units of one expert's fair share (V-MoE)."""
    return logits + std / logits.shape[-1] * jax.random.normal(key, logits.shape, logits.dtype)


def importance_loss(logits: Float[Array, "... E"]) -> Float[Array, ""]:
    """(std(I) / mean(I))^2 over experts, I_e = sum over tokens of softmax(logits)_e.

    `logits` are without noise. Importance loss, V-MoE App. A.2.
    """
    gates = jax.nn.softmax(logits, axis=-1).reshape(-1, logits.shape[-1])
    return _variation(jnp.sum(gates, axis=0))


def load_loss(
    logits: Float[Array, "... E"], noisy_logits: Float[Array, "... E"], *, chosen: int, std: float
) -> Float[Array, ""]:
    """(std(L) / mean(L))^2 over experts, L_e = mean over tokens of P(e among the chosen).

    P is over a new draw of one expert's noise: P = 1 - Phi((threshold - logit_e) E / std), where
    the token's threshold is its `chosen`-th largest noisy logit. Load loss, V-MoE App. A.2.

    `std` is as in `noisy`, and positive.
    """
    experts = logits.shape[-1]
    # The A-th largest of all experts, e included, as in V-MoE's code. Shazeer et al. (2017) leave e
    # out, which for a chosen e gives the A-th largest of the others, a lower threshold.
    _, best = jax.lax.top_k(noisy_logits, chosen)
    threshold = jnp.take_along_axis(noisy_logits, best[..., -1:], axis=-1)
    won = jax.scipy.stats.norm.sf((threshold - logits) * experts / std)
    return _variation(jnp.mean(won.reshape(-1, experts), axis=0))


def gshard_loss(logits: Float[Array, "... E"]) -> Float[Array, ""]:
    """E^2 mean over experts of f_e m_e; f_e is the share of tokens whose best expert is e, m_e the
    mean gate of e.

    `logits` are those that tokens were routed by, including any noise. The gradient flows only
    through the mean gates. l_aux of GShard Alg. 1, scaled so that perfect balance gives 1.
    """
    experts = logits.shape[-1]
    gates = jax.nn.softmax(logits, axis=-1).reshape(-1, experts)
    first = jax.nn.one_hot(jnp.argmax(gates, axis=-1), experts, dtype=gates.dtype)
    return experts**2 * jnp.mean(jnp.mean(first, axis=0) * jnp.mean(gates, axis=0))


def z_loss(logits: Float[Array, "... E"]) -> Float[Array, ""]:
    """Mean over tokens of logsumexp(logits)^2 (ST-MoE, router z-loss)."""
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)


def _variation(amount: Float[Array, " E"]) -> Float[Array, ""]:
    # Variance over squared mean: the standard deviation has no gradient at perfect balance.
    return jnp.var(amount) / jnp.mean(amount) ** 2


def load(routes: Routes, experts: int) -> Float[Array, " E"]:
    """Share of all pairs that go to each expert, before any is dropped; sums to 1."""
    dtype = routes.weight.dtype
    return jnp.mean(jax.nn.one_hot(routes.expert, experts, dtype=dtype), axis=(0, 1))


def entropy(logits: Float[Array, "... E"]) -> Float[Array, ""]:
    """Mean over tokens of the entropy of softmax(logits), in nats, from 0 to log E."""
    log_gates = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.mean(jnp.sum(jnp.exp(log_gates) * log_gates, axis=-1))
