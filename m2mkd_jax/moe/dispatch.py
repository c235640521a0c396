"""Dispatching tokens to experts and combining: y = sum over a token's pairs of weight *
expert(token).

There are two dispatchers of (token, expert) pairs. `dropless` serves every pair; `capacity` gives
every expert a fixed number of slots per group and drops the pairs that find none, like V-MoE.
Routers choose the pairs and their order. `serve_slots` serves any router whose experts have slots.

The mesh is the one set by `jax.set_mesh`, with axes data, fsdp and expert, all Auto. Groups are
sharded over all three, experts over `expert`; without a mesh everything is local. On any mesh the
results equal those of the local computation up to rounding.

Axes: G groups, N tokens per group, P pairs per group, E experts, C slots per expert and group,
R = G C rows per expert, D width, F hidden.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jax import numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from common_jax.mesh import AXES
from common_jax.nn.mlp import gelu
from m2mkd_jax.moe.grouped import Experts, arrange, block_for_target, grouped_mlp
from m2mkd_jax.moe.routers import Routes, rank_in_expert


def dropless(
    x: Float[Array, "G N D"], routes: Routes, experts: Experts, slots: int
) -> tuple[Float[Array, "G N D"], Float[Array, ""]]:
    """Serves every pair; returns y and the dropped fraction, 0. `slots` is ignored.

    With e devices on the expert axis, the tokens are all-gathered over it, every device computes
    the pairs of its own experts, and the partial sums are reduce-scattered back. An all-to-all that
    sends each token only where it is needed would save nothing. Let a device have n = G N / e
    tokens. Shapes are static, and all n tokens of a device may choose experts on the same peer, so
    without drops the all-to-all needs room for n rows per peer: every device sends and receives
    (e - 1) n rows. The all-gather receives (e - 1) n rows per device too. On the way back, the
    reduce-scatter and the padded all-to-all both send (e - 1) n rows per device.
    """
    del slots
    y = over_mesh(_dropless_local, x, routes, experts)
    return y, jnp.zeros((), routes.weight.dtype)


def capacity(
    x: Float[Array, "G N D"], routes: Routes, experts: Experts, slots: int
) -> tuple[Float[Array, "G N D"], Float[Array, ""]]:
    """Each expert serves the first `slots` pairs of each group; returns y and the dropped fraction.

    Tokens move to slots and back by indexing (no one-hot products), and over the expert axis by an
    all-to-all each way: G E C rows per device.
    """
    y, dropped = over_mesh(partial(_capacity_local, slots=slots), x, routes, experts)
    return y, jnp.mean(dropped)


class Dispatcher(NamedTuple):
    """An entry of `DISPATCHERS`.

    run: (tokens, routes, experts, slots per expert) -> y and the dropped fraction.
    grouped: whether the tokens of a group compete for slots.
    """

    run: Callable[[Array, Routes, Experts, int], tuple[Array, Array]]
    grouped: bool


# The dispatchers, by their name in `config.model.moe.dispatch`.
DISPATCHERS: dict[str, Dispatcher] = {
    "dropless": Dispatcher(dropless, grouped=False),
    "capacity": Dispatcher(capacity, grouped=True),
}


@runtime_checkable
class Slots(Protocol):
    """The slots of all experts for one device's groups: dispatch fills them, combine reads them."""

    def dispatch(self, x: Float[Array, "G N D"]) -> Float[Array, "E R D"]:
        """The experts' input rows, ordered by group."""
        ...

    def combine(self, answers: Float[Array, "E R D"]) -> Float[Array, "G N D"]:
        """Each token's weighted sum of expert outputs, at least in float32."""
        ...


def serve_slots(
    x: Float[Array, "G N D"], slots: Slots, experts: Experts, *, peers: int
) -> Float[Array, "G N D"]:
    """combine(expert(dispatch(x))) for one device's groups, run by `over_mesh`.

    Args:
      x: tokens of the device.
      slots: slots of all experts, for these groups.
      experts: experts of the device.
      peers: number of devices on the expert axis.
    """
    rows = slots.dispatch(x)
    # A device has the rows of its own groups for all experts, and needs the rows of all groups for
    # its own experts: the all-to-all exchanges one for the other, and its inverse the outputs.
    if peers > 1:
        rows = jax.lax.all_to_all(rows, "expert", split_axis=0, concat_axis=1, tiled=True)
    hidden = jnp.einsum("ERD,EDF->ERF", rows, experts.up) + experts.up_bias[:, None]
    active = gelu(hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))).astype(x.dtype)
    answers = jnp.einsum("ERF,EFD->ERD", active, experts.down) + experts.down_bias[:, None]
    if peers > 1:
        answers = jax.lax.all_to_all(answers, "expert", split_axis=1, concat_axis=0, tiled=True)
    return slots.combine(answers).astype(x.dtype)


def over_mesh(
    local: Callable[..., Any], x: Float[Array, "G N D"], routing: Any, experts: Experts
) -> Any:
    """Runs `local(x, routing, experts, peers=size of the expert axis)` on every device's shard.

    The first axis of the leaves of `routing` and of the results of `local` must be the groups.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(x, routing, experts, peers=1)
    if set(mesh.axis_names) != set(AXES):
        raise ValueError(
            f"the mesh has axes {mesh.axis_names}, but the mixture of experts needs {AXES}; "
            "axes of size 1 cost nothing"
        )
    groups = PartitionSpec(AXES)
    # check_vma would require a cast around every constant in the hand-written backward pass. What
    # it guards, gradients summed over the right axes, is tested against runs without a mesh.
    return jax.shard_map(
        partial(local, peers=mesh.shape["expert"]),
        in_specs=(groups, groups, PartitionSpec("expert")),
        out_specs=groups,
        check_vma=False,
    )(x, routing, experts)


def _dropless_local(
    x: Float[Array, "G N D"], routes: Routes, experts: Experts, *, peers: int
) -> Float[Array, "G N D"]:
    local_experts = experts.up.shape[0]
    expert = routes.expert
    if peers > 1:
        x, routes = jax.lax.all_gather((x, routes), "expert", tiled=True)
        # Numbered from this device's first expert, so that pairs of other devices are out of range:
        # they get no row and cost nothing here.
        expert = routes.expert - local_experts * jax.lax.axis_index("expert")
    groups, tokens, width = x.shape
    token = (routes.token + tokens * jnp.arange(groups, dtype=jnp.int32)[:, None]).reshape(-1)
    rows = arrange(
        token,
        expert.reshape(-1),
        tokens=groups * tokens,
        experts=local_experts,
        # Sized by the mean over all experts: this device's share is known only at run time.
        block=block_for_target(
            token.shape[0],
            local_experts * peers,
            dtype=x.dtype,
            width=width,
            hidden=experts.up.shape[2],
        ),
    )
    y = grouped_mlp(x.reshape(-1, width), routes.weight.reshape(-1), experts, rows)
    y = y.reshape(x.shape)
    if peers > 1:
        # Every peer has a partial sum for every token: add them up where the token lives.
        y = jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)
    return y


class PairSlots(NamedTuple):
    """Slots that hold at most one pair each, ordered by expert, group, slot.

    token: `[E*G*C]` int32, index among the tokens of all groups; past the end for an empty slot.
    weight: `[E*G*C]`, weight of the output; 0 for an empty slot.
    groups, tokens, experts: G, N and E.
    """

    token: Int[Array, " slots"]
    weight: Float[Array, " slots"]
    groups: int
    tokens: int
    experts: int

    def dispatch(self, x: Float[Array, "G N D"]) -> Float[Array, "E R D"]:
        width = x.shape[-1]
        rows = x.reshape(-1, width).at[self.token].get(mode="fill", fill_value=0)
        return rows.reshape(self.experts, -1, width)

    def combine(self, answers: Float[Array, "E R D"]) -> Float[Array, "G N D"]:
        width = answers.shape[-1]
        # Summed in float32: in bfloat16, 256 + 1 is 256.
        wide = jnp.promote_types(answers.dtype, jnp.float32)
        weighted = (self.weight[:, None] * answers.reshape(-1, width)).astype(wide)
        y = jnp.zeros((self.groups * self.tokens, width), wide)
        y = y.at[self.token].add(weighted, mode="drop")
        return y.reshape(self.groups, self.tokens, width)


def _capacity_local(
    x: Float[Array, "G N D"], routes: Routes, experts: Experts, *, peers: int, slots: int
) -> tuple[Float[Array, "G N D"], Float[Array, " G"]]:
    groups, tokens, _ = x.shape
    count = experts.up.shape[0] * peers

    # A pair's slot is its rank among the pairs of its expert in its group: earlier pairs win. The
    # expert is the slowest axis, so that the rows of an expert form one matrix.
    rank, _ = jax.vmap(partial(rank_in_expert, experts=count))(routes.expert)
    group = jnp.arange(groups, dtype=jnp.int32)[:, None]
    slot = (routes.expert * groups + group) * slots + rank
    slot = jnp.where(rank < slots, slot, count * groups * slots).reshape(-1)
    token = (group * tokens + routes.token).reshape(-1)
    pairs = jnp.arange(token.shape[0], dtype=jnp.int32)
    # Each slot looks up its pair, since gathering rows is cheaper than scattering them. An empty
    # slot points past the last token and pair: it reads zeros and writes nothing.
    empty = jnp.zeros(count * groups * slots, jnp.int32)
    slot_token = (empty + groups * tokens).at[slot].set(token, mode="drop")
    slot_pair = (empty + token.shape[0]).at[slot].set(pairs, mode="drop")
    weight = routes.weight.reshape(-1).at[slot_pair].get(mode="fill", fill_value=0)

    pair_slots = PairSlots(slot_token, weight, groups, tokens, count)
    dropped = jnp.mean(rank >= slots, axis=1, dtype=routes.weight.dtype)
    return serve_slots(x, pair_slots, experts, peers=peers), dropped
