"""Moving tokens to their experts and back: y = sum over a token's pairs of weight * expert(token).

Two ways. `dropless` serves every pair; `capacity` gives every expert a fixed number of slots a
group and drops the pairs that find none, as V-MoE does. Which pairs there are, and in which order
they are served, is the routers' matter.

The mesh is the one that `jax.set_mesh` set: axes data, fsdp and expert, all Auto. The groups are
split over all three, the experts over `expert`; without a mesh everything is local. On any mesh the
results are those of the local computation, up to rounding.

Axes: G groups, N tokens of a group, P pairs of a group, E experts, C slots, D width, F hidden.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from common_jax.mesh import AXES
from common_jax.nn.mlp import gelu
from m2mkd_jax.moe.grouped import Experts, arrange, block_size, grouped_mlp
from m2mkd_jax.moe.routers import Routes, rank_in_expert


def dropless(
    x: Float[Array, "G N D"], routes: Routes, experts: Experts, slots: int
) -> tuple[Float[Array, "G N D"], Float[Array, ""]]:
    """Every pair is served: returns y and the dropped share, 0. `slots` is not read.

    With e devices on the expert axis the tokens are gathered over it, every device computes the
    pairs of its own experts (and only those), and the partial sums are reduced and scattered back.
    Sending each token only where it belongs would save nothing. Let a device hold n = G N / e
    tokens. Shapes are static, and all n tokens of a device may want the same peer, so an all-to-all
    that drops none has room for n rows a peer: every device sends (e - 1) n rows and receives as
    many. The all-gather receives (e - 1) n rows a device too. On the way back the reduce-scatter
    sends (e - 1) n rows a device, and so does the padded all-to-all.
    """
    del slots
    y = _over_mesh(_dropless_local, x, routes, experts)
    return y, jnp.zeros((), routes.weight.dtype)


def capacity(
    x: Float[Array, "G N D"], routes: Routes, experts: Experts, slots: int
) -> tuple[Float[Array, "G N D"], Float[Array, ""]]:
    """Each expert serves the first `slots` pairs of each group; returns y and the dropped share.

    Tokens are brought to slots and back by index (no one-hot products), and over the expert axis by
    an all-to-all each way: G E C rows a device.
    """
    y, dropped = _over_mesh(partial(_capacity_local, slots=slots), x, routes, experts)
    return y, jnp.mean(dropped)


Dispatcher = Callable[[Array, Routes, Experts, int], tuple[Array, Array]]
DISPATCHERS: dict[str, Dispatcher] = {"dropless": dropless, "capacity": capacity}


def _over_mesh(
    local: Callable[..., Any], x: Float[Array, "G N D"], routes: Routes, experts: Experts
) -> Any:
    """Runs `local(x, routes, experts, peers=size of the expert axis)` on every device's share.

    What `local` returns must have the groups in front.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(x, routes, experts, peers=1)
    if set(mesh.axis_names) != set(AXES):
        raise ValueError(
            f"the mesh has axes {mesh.axis_names}, the mixture of experts needs {AXES}; "
            "axes of size 1 cost nothing"
        )
    groups = PartitionSpec(AXES)
    # check_vma off: it would ask for a cast around every constant in the hand-written backward
    # pass. What it guards, gradients summed over the right axes, is tested against no mesh.
    return jax.shard_map(
        partial(local, peers=mesh.shape["expert"]),
        in_specs=(groups, groups, PartitionSpec("expert")),
        out_specs=groups,
        check_vma=False,
    )(x, routes, experts)


def _dropless_local(
    x: Float[Array, "G N D"], routes: Routes, experts: Experts, *, peers: int
) -> Float[Array, "G N D"]:
    mine = experts.up.shape[0]
    expert = routes.expert
    if peers > 1:
        x, routes = jax.lax.all_gather((x, routes), "expert", tiled=True)
        expert = routes.expert - mine * jax.lax.axis_index("expert")
    groups, tokens, width = x.shape
    token = (routes.token + tokens * jnp.arange(groups, dtype=jnp.int32)[:, None]).reshape(-1)
    rows = arrange(
        token,
        expert.reshape(-1),
        tokens=groups * tokens,
        experts=mine,
        block=block_size(token.shape[0], mine * peers),
    )
    y = grouped_mlp(x.reshape(-1, width), routes.weight.reshape(-1), experts, rows)
    y = y.reshape(x.shape)
    if peers > 1:
        y = jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)
    return y


def _capacity_local(
    x: Float[Array, "G N D"], routes: Routes, experts: Experts, *, peers: int, slots: int
) -> tuple[Float[Array, "G N D"], Float[Array, "G"]]:
    groups, tokens, width = x.shape
    count = experts.up.shape[0] * peers
    wide = jnp.promote_types(x.dtype, jnp.float32)

    # Slots stand in the order expert, group, slot, so that an expert's rows are one matrix.
    rank, _ = jax.vmap(partial(rank_in_expert, experts=count))(routes.expert)
    group = jnp.arange(groups, dtype=jnp.int32)[:, None]
    slot = (routes.expert * groups + group) * slots + rank
    slot = jnp.where(rank < slots, slot, count * groups * slots).reshape(-1)
    token = (group * tokens + routes.token).reshape(-1)
    pairs = jnp.arange(token.shape[0], dtype=jnp.int32)
    # An empty slot points beyond the last token and the last pair: it reads zeros, writes nothing.
    empty = jnp.zeros(count * groups * slots, jnp.int32)
    slot_token = (empty + groups * tokens).at[slot].set(token, mode="drop")
    slot_pair = (empty + token.shape[0]).at[slot].set(pairs, mode="drop")

    rows = x.reshape(-1, width).at[slot_token].get(mode="fill", fill_value=0)
    rows = rows.reshape(count, groups * slots, width)
    if peers > 1:
        rows = jax.lax.all_to_all(rows, "expert", split_axis=0, concat_axis=1, tiled=True)
    hidden = jnp.einsum("ERD,EDF->ERF", rows, experts.up) + experts.up_bias[:, None]
    active = gelu(hidden.astype(wide)).astype(x.dtype)
    rows = jnp.einsum("ERF,EFD->ERD", active, experts.down) + experts.down_bias[:, None]
    if peers > 1:
        rows = jax.lax.all_to_all(rows, "expert", split_axis=1, concat_axis=0, tiled=True)
    weight = routes.weight.reshape(-1).at[slot_pair].get(mode="fill", fill_value=0)
    answers = (weight[:, None] * rows.reshape(-1, width)).astype(wide)
    y = jnp.zeros((groups * tokens, width), wide).at[slot_token].add(answers, mode="drop")
    dropped = jnp.mean(rank >= slots, axis=1, dtype=routes.weight.dtype)
    return y.reshape(x.shape).astype(x.dtype), dropped
