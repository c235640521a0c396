"""AdamW with decay groups, SGD, and clipping; none changes its state at a skipped step."""

import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import optax
from flax import traverse_util
from jax import numpy as jnp

from common_jax.state import subtrees

if TYPE_CHECKING:
    from common_jax.optim.config import OptimConfig

# Includes biases with several axes, such as those of layers stacked over experts. Decay would pull
# a scale that is learned as its logarithm towards 1.
NO_DECAY = r"(.*/)?(bias|up_bias|down_bias|log_scale)"


def make_optimizer(
    config: "OptimConfig", *, clip_depth: int = 0
) -> optax.GradientTransformationExtraArgs:
    """AdamW or SGD, which map the clipped gradient to a direction u. If `finite`, an argument of
    its update, is False, the optimizer state does not change and u is meaningless.

    The learning rate is applied outside: the train step computes p <- p - lr u, with the rate at
    the run's step rather than at the optimizer's own count, which skipped steps do not advance.

        g <- g min(1, clip / |g|)
        adamw:  u = m / (sqrt(v) + eps) + weight_decay p
        sgd:    g <- g + weight_decay p;  t <- momentum t + g;  u = g + momentum t

    Vectors, biases and logarithms of scales do not decay, unless `config.decay_all`; see
    `decay_mask`.
    """
    mask = None if config.decay_all else lambda params: decay_mask(params, config.no_decay)
    decay = optax.add_decayed_weights(config.weight_decay, mask)
    clip = [clip_by_norm(config.clip, clip_depth)] if config.clip is not None else []
    kind = OPTIMIZERS[config.optimizer]
    optimizer = optax.chain(*clip, *kind.make(config, decay))
    return optimizer if kind.skips else _skipping(optimizer)


def _adamw(
    config: "OptimConfig", decay: optax.GradientTransformation
) -> tuple[optax.GradientTransformation, ...]:
    return _adam(config.b1, config.b2, config.eps), decay


def _sgd(
    config: "OptimConfig", decay: optax.GradientTransformation
) -> tuple[optax.GradientTransformation, ...]:
    return decay, optax.trace(config.momentum, nesterov=True)


@dataclasses.dataclass(frozen=True)
class OptimizerKind:
    """A kind of optimizer.

    Attributes:
      make: takes the config and the weight decay; returns both in the order they are chained.
      reads: the fields that it reads and some other kind does not.
      skips: whether its update takes `finite` itself and then keeps its state. Any other is
        wrapped: optax would not pass `finite` on, and one NaN would stay in its state for ever.
    """

    make: Callable[..., tuple[optax.GradientTransformation, ...]]
    reads: tuple[str, ...] = ()
    skips: bool = False


OPTIMIZERS = {
    "adamw": OptimizerKind(_adamw, ("b1", "b2", "eps"), skips=True),
    "sgd": OptimizerKind(_sgd, ("momentum",)),
}


def _skipping(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that its state does not change unless `finite`."""

    def update(gradient: Any, state: Any, params: Any = None, *, finite: Any = True):
        direction, new = optimizer.update(gradient, state, params)
        return direction, keep(finite, new, state)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, but with the direction computed from the moments that are kept."""
    adam = _skipping(optax.scale_by_adam(b1, b2, eps))

    def update(gradient: Any, state: Any, params: Any = None, *, finite: Any = True):
        # optax computes the direction from the moments before `keep`, and XLA for CPU recomputes
        # those from the old moments. Since the kept moments overwrite the old ones in place, XLA
        # then has to copy the old ones first, which takes twice the size of the parameters.
        state = adam.update(gradient, state, params, finite=finite)[1]
        mean = optax.tree.bias_correction(state.mu, b1, state.count)
        square = optax.tree.bias_correction(state.nu, b2, state.count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square), state

    return optax.GradientTransformationExtraArgs(adam.init, update)


def keep(finite: jax.Array | bool, new: Any, old: Any) -> Any:
    """The new tree if `finite`, else the old one. Selects element by element, since a conditional
    would hold a copy for each branch."""
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)


def clip_by_norm(largest: float, depth: int) -> optax.GradientTransformation:
    """Clips each subtree `depth` keys deep separately to the global norm `largest`; a `depth` of 0
    clips the whole gradient by one norm."""

    whole = optax.clip_by_global_norm(largest)
    if not depth:
        return whole

    def clip(gradient: Any, params: Any) -> Any:
        parts = subtrees(gradient, depth)
        clipped = {path: whole.update(part, optax.EmptyState())[0] for path, part in parts.items()}
        return traverse_util.unflatten_dict(clipped)

    return optax.stateless(clip)


def decay_mask(params: Any, no_decay: str) -> Any:
    """True for parameters that decay: all but arrays with one axis, biases and logarithms of
    scales. Other scalars decay.

    Args:
      params: nested dict.
      no_decay: regex of further paths `a/b/c` without decay, such as class token and position
        embeddings.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    mask = {
        path: leaf.ndim != 1
        and not re.fullmatch(NO_DECAY, path)
        and not re.fullmatch(no_decay, path)
        for path, leaf in flat.items()
    }
    return traverse_util.unflatten_dict(mask, sep="/")
