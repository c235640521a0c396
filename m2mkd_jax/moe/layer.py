"""The mixture-of-experts layer that replaces the MLP of a V-MoE block.

A router sends tokens to the experts and back (routing.py); this module holds the parameters of the
experts and records the router's metrics.
"""

from collections.abc import Mapping

import jax
from flax import linen as nn
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from m2mkd_jax.moe.config import EXPERT_INITS, ROUTERS, MoeConfig, check_moe
from m2mkd_jax.moe.grouped import Experts


class MoeMlp(nn.Module):
    """Mixture of expert MLPs, D -> hidden -> D, exact gelu (V-MoE; fastmoe's FMoETransformerMLP).

    If mutable, the collection `moe` gets the router's metrics and balance_loss (weighted, to be
    added to the training loss), and `routing` gets the router's choices. The rng stream `gate` is
    for the router's noise in training.

    Initialisation does not run the experts, so a batch of one suffices on any mesh.

    `jax.vmap` and forward over reverse mode (`jax.hessian`) work; reverse over reverse does not, as
    JAX cannot differentiate the experts' loop (see `grouped`).
    """

    config: MoeConfig
    hidden: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], *, train: bool = False) -> Float[Array, "B T D"]:
        config, router = self.config, ROUTERS[self.config.router]
        # In bfloat16 the scores of two experts would often tie.
        gate_dtype = jnp.promote_types(x.dtype, jnp.float32)
        logits = router.gate(config, "router")(x.astype(gate_dtype))
        experts = self._experts(x.shape[-1])
        if self.is_initializing() or not x.shape[0]:  # an empty batch has nothing to route
            return x.astype(self.dtype)

        check_moe(config, dict(jax.sharding.get_abstract_mesh().shape), x.shape[0])
        # Drawn here and not in the gate, because flax folds the module path into the key.
        key = self.make_rng("gate") if train and config.noisy else None
        routing = router.route(config, logits, key)
        y, metrics = routing.mix(x.astype(self.dtype), experts)

        if self.is_mutable_collection("moe"):
            losses, active = routing.losses(), config.balance.active()
            terms = [weight * losses[name]() for name, weight in active.items()]
            self._put("moe", {**metrics, "balance_loss": sum(terms, jnp.zeros((), gate_dtype))})
        if self.is_mutable_collection("routing"):
            self._put("routing", routing.choices())
        return y

    def _experts(self, width: int) -> Experts:
        count, bound = self.config.experts, EXPERT_INITS[self.config.expert_init]

        def matrices(name: str, d_in: int, d_out: int) -> Float[Array, "E _ _"]:
            limit = bound(d_in, d_out)

            def init(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
                return jax.random.uniform(key, shape, minval=-limit, maxval=limit)

            return jnp.asarray(self.param(name, init, (count, d_in, d_out)), self.dtype)

        def biases(name: str, d_out: int) -> Float[Array, "E _"]:
            return jnp.asarray(self.param(name, nn.initializers.zeros, (count, d_out)), self.dtype)

        return Experts(
            up=matrices("up", width, self.hidden),
            up_bias=biases("up_bias", self.hidden),
            down=matrices("down", self.hidden, width),
            down_bias=biases("down_bias", width),
        )

    def _put(self, collection: str, values: Mapping[str, Array]) -> None:
        # By default `sow` appends to a tuple; keep the value itself instead.
        for name, value in values.items():
            self.sow(collection, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)
