"""The block of a NAC: attention between latents, modulated by a kernel over their signatures, and a
code-conditioned MLP."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
from flax import linen as nn
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from common_jax.config import FieldError, Section
from common_jax.mesh import constrain
from common_jax.nn.attention import Implementation, by_platform, fused
from common_jax.nn.mlp import gelu
from common_jax.ranges import BelowOne, NonNegative, Positive, Size
from m2mkd_jax.models import encoder
from m2mkd_jax.nac import kernel as kernels
from m2mkd_jax.nac.layers import (
    CodeLinear,
    LinearConfig,
    add_code_noise,
    can_draw,
    draw,
    norm,
    uniform,
)

CUT = -(2.0**41)  # a finite log affinity low enough that the attention weight is 0


@dataclasses.dataclass(frozen=True)
class BlockConfig(Section):
    """Sizes and switches of a block.

    Attributes:
      width: width D of a latent's state.
      code_width: width Z of a latent's code.
      heads, head_width: number of heads and width of a head; their product need not be D.
      qkv_bias: whether queries, keys and values have a bias; the exit layer always has one.
      ffn_factor: hidden width of the MLP relative to D; the product is rounded.
      geglu: gates the hidden layer: first half times GELU of the second half.
      layer_scale: initial value of the layer scale of each branch; None for no layer scale.
      linear: the linear layers.
      code_noise: noise on the codes in training, relative to their size.
      drop_path: probability of dropping a branch in training.
      residual: whether the attention is added to the receivers' states.
      ffn_residual: whether the MLP's output is added to its input.
      share_norm: norms the senders with the receivers' LayerNorm.
      kernel: kernel of the attention; None for attention without a kernel.
      mask: whether the log kernel is added to the scores.
      scale_after_softmax: multiplies the attention weights by the affinities, after the softmax.
      attention: implementation, a key of `common_jax.nn.attention.PLATFORMS`. With
        `scale_after_softmax` "auto" is "xla", since cuDNN does not return the weights.
      normalise_kernel: normalises those affinities over the senders. Matters only with
        `scale_after_softmax`, since the softmax ignores a factor that a whole row shares.
    """

    width: Size
    code_width: Size
    heads: Size
    head_width: Size
    qkv_bias: bool = False
    ffn_factor: Positive = 1.0
    geglu: bool = True
    layer_scale: NonNegative | None = 0.1
    linear: LinearConfig = LinearConfig()
    code_noise: NonNegative = 0.0
    drop_path: BelowOne = 0.0
    residual: bool = True
    ffn_residual: bool = True
    share_norm: bool = False
    kernel: kernels.KernelConfig | None = None
    mask: bool = True
    scale_after_softmax: bool = False
    normalise_kernel: bool = True
    attention: Implementation = "auto"

    def __post_init__(self):
        super().__post_init__()
        if self.drop_path and not self.residual:
            raise FieldError(
                f"drop_path={self.drop_path} needs residual=True, since it drops the branch that "
                "is added to the states: set drop_path to 0"
            )
        if self.scale_after_softmax and self.attention == "cudnn":
            raise FieldError(
                "attention='cudnn' cannot scale weights after the softmax, but "
                "scale_after_softmax=True: set attention to 'auto'"
            )
        if self.hidden < 1:
            raise FieldError(
                f"ffn_factor={self.ffn_factor} of width={self.width} must be at least 1 hidden unit"
            )

    @property
    def inner(self) -> int:
        """Width of all heads together."""
        return self.heads * self.head_width

    @property
    def hidden(self) -> int:
        """Hidden width F of the MLP; with GEGLU its first layer is twice as wide."""
        # Half to even, as in the original.
        return round(self.ffn_factor * self.width)

    @property
    def ffn_shape(self) -> tuple[Any, ...]:
        """What the shapes of the MLP's parameters depend on besides the widths."""
        scaled, linear = self.layer_scale is not None, self.linear
        return (self.hidden, self.geglu, scaled, linear.kind, linear.learnable_gain)

    def layer(self, dtype: DTypeLike, inputs: int, outputs: int, use_bias: bool) -> CodeLinear:
        """A code-conditioned layer of the block."""
        return CodeLinear(self.linear, inputs, outputs, self.code_width, use_bias, dtype)

    @property
    def uses_kernel(self) -> bool:
        """True if affinities affect the result."""
        return self.kernel is not None and (self.mask or self.scale_after_softmax)


class LatentAttention(nn.Module):
    """Attention from receivers to senders, modulated by a kernel over their signatures (NAC,
    KernelModulatedLatentAttention).

    softmax(q k^T / sqrt(K) + log kernel) v, heads concatenated (head is the slower index), then
    exit layer, layer scale and residual.

    Parameters: `receiver_norm`, `sender_norm` unless shared, `query`, `key`, `value`, `exit`,
    `layer_scale` (D), and `bandwidth` () if the kernel learns it.
    """

    config: BlockConfig
    dtype: DTypeLike

    def setup(self):
        config = self.config
        self.receiver_norm = norm(None, self.dtype)
        if not config.share_norm:
            self.sender_norm = norm(None, self.dtype)
        self.query, self.key, self.value = (
            config.layer(self.dtype, config.width, config.inner, config.qkv_bias) for _ in range(3)
        )
        self.exit = config.layer(self.dtype, config.inner, config.width, True)
        self.layer_scale = layer_scale(self, config.layer_scale, config.width)
        if config.kernel is not None and config.kernel.learnable_bandwidth:
            # Unconstrained, as in the original: training can push a bandwidth below 0.
            init = nn.initializers.constant(config.kernel.bandwidth)
            self.bandwidth = self.param("bandwidth", init, ())

    def project(
        self, senders: Float[Array, "B S D"], codes: Float[Array, "#S Z"], *, train: bool
    ) -> tuple[Float[Array, "B S H K"], Float[Array, "B S H K"]]:
        """Projects senders to keys and values.

        Separate from `__call__`, so that senders whose states do not change are projected once.
        """
        normed = (self.receiver_norm if self.config.share_norm else self.sender_norm)(senders)
        key, value = (f(normed, codes, train=train) for f in (self.key, self.value))
        return self._split(key), self._split(value)

    def __call__(
        self,
        receivers: Float[Array, "B T D"],
        codes: Float[Array, "#T Z"],
        keys: Float[Array, "B S H K"],
        values: Float[Array, "B S H K"],
        distance: Float[Array, "T S"] | None,
        *,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        """Returns the receivers' new states.

        Args:
          receivers: the receivers' states.
          codes: their codes, or one code for all.
          keys, values: keys and values of the senders, from `project`.
          distance: distances between their signatures and the senders'; only needed with a kernel.
          train: samples the edges of a stochastic kernel (stream "kernel") and drops paths (stream
            "drop_path").
        """
        config = self.config
        query = self._split(self.query(self.receiver_norm(receivers), codes, train=train))
        log_affinity = None
        if config.uses_kernel:
            log_affinity = self._log_affinity(distance, receivers.shape[0], train=train)
        pooled = attend(query, keys, values, log_affinity, config=config)
        pooled = pooled.reshape(*pooled.shape[:2], config.inner)
        # The exit layer is conditioned on the receivers' codes, as the query is.
        branch = scale_branch(self.exit(pooled, codes, train=train), self.layer_scale)
        if not config.residual:
            return branch
        return receivers + drop_branch(self, branch, config.drop_path, train=train)

    def _log_affinity(self, distance, batch: int, *, train: bool) -> jax.Array:
        """Log affinities (1 or B, T, S), in float32."""
        kernel = self.config.kernel
        # Signatures do not depend on the image, so one matrix serves the whole batch; there is a
        # batch axis only if every example samples its own edges.
        bandwidth = self.bandwidth if kernel.learnable_bandwidth else kernel.bandwidth
        logs = kernels.log_kernel(distance, bandwidth, kernel)[None]
        if not kernel.stochastic:
            return logs
        sampled = kernel.evaluation == "sample" and can_draw(self, "kernel", stream="kernel")
        if train or sampled:
            shape = (batch, *distance.shape)
            # Every example has edges of its own, which all heads share. At the size of the ImageNet
            # NAC these are 23.6 million numbers per iteration for 32 images.
            u = draw(self, "kernel", uniform(shape), stream="kernel")
            return kernels.sample_log(logs, u, temperature=kernel.temperature)
        # Evaluation without samples uses the edge probabilities themselves, or thresholds them.
        return kernels.threshold_log(logs) if kernel.evaluation == "threshold" else logs

    def _split(self, x: jax.Array) -> Float[Array, "B T H K"]:
        return x.reshape(*x.shape[:-1], self.config.heads, self.config.head_width)


class Ffn(nn.Module):
    """x + scale * down(act(up(norm(x)))) with code-conditioned layers (NAC, ModFFN).

    Parameters: `norm`, `up`, `down`, `layer_scale` (D).
    """

    config: BlockConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], codes: Float[Array, "#T Z"], *, train: bool = False
    ) -> Float[Array, "B T D"]:
        config = self.config
        up = config.hidden * (2 if config.geglu else 1)
        shared = {"code_width": config.code_width, "use_bias": True, "dtype": self.dtype}
        # With GEGLU, value and gate are the two halves of one projection, in this order.
        y = norm("norm", self.dtype)(x)
        y = CodeLinear(config.linear, config.width, up, name="up", **shared)(y, codes, train=train)
        if config.geglu:
            y, gate = jnp.split(y, 2, axis=-1)
            y = y * gelu(gate)
        else:
            y = gelu(y)
        down = CodeLinear(config.linear, config.hidden, config.width, name="down", **shared)
        y = scale_branch(
            down(y, codes, train=train), layer_scale(self, config.layer_scale, config.width)
        )
        if config.ffn_residual:
            y = x + drop_branch(self, y, config.drop_path, train=train)
        return constrain(y, "batch", "tokens", "width")


class Propagator(nn.Module):
    """Attention to the senders, then the MLP (NAC, Propagator).

    Parameters: `attention`, `ffn`.
    """

    config: BlockConfig
    dtype: DTypeLike

    def setup(self):
        self.attention = LatentAttention(self.config, self.dtype)
        self.ffn = Ffn(self.config, self.dtype)

    def __call__(
        self,
        receivers: Float[Array, "B T D"],
        receiver_codes: Float[Array, "#T Z"],
        senders: tuple[Float[Array, "B _ D"], ...],
        sender_codes: Float[Array, "#S Z"],
        distance: Float[Array, "T S"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        """Returns the receivers' new states.

        Args:
          receivers, receiver_codes: states and codes of the receivers.
          senders: states of the senders, by group of latents; if the norm is shared, a group that
            also receives is normed only once.
          sender_codes: codes of all groups, concatenated, or one code for all.
          distance: distances between the receivers' signatures and those of all senders.
          train: see `LatentAttention`; also adds noise to the codes (stream "code").
        """
        # Two independent draws, even for a latent that both receives and sends.
        noise = self.config.code_noise
        receiver_codes = add_code_noise(self, "receiver_codes", receiver_codes, noise, train=train)
        sender_codes = add_code_noise(self, "sender_codes", sender_codes, noise, train=train)
        keys, values = self.project(senders, sender_codes, train=train)
        return self.receive(receivers, receiver_codes, keys, values, distance, train=train)

    def project(self, senders, codes, *, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Projects groups of senders to keys and values, (B, S, H, K) each; adds no noise."""
        # Group by group instead of concatenating first: then the norm of a group that also receives
        # is the same expression on both sides, and the compiler computes it only once.
        pairs = [
            self.attention.project(group, group_codes, train=train)
            for group, group_codes in zip(senders, split_codes(codes, senders), strict=True)
        ]
        return tuple(jnp.concatenate(parts, axis=1) for parts in zip(*pairs, strict=True))

    def extend(self, receivers, codes, keys, values, distance, *, train: bool = False) -> jax.Array:
        """Like `__call__`, but with some senders already projected.

        The senders are those of `keys` and `values`, followed by the receivers themselves; no noise
        is added to the codes.
        """
        own = self.project((receivers,), codes, train=train)
        keys, values = (
            jnp.concatenate(pair, axis=1) for pair in zip((keys, values), own, strict=True)
        )
        return self.receive(receivers, codes, keys, values, distance, train=train)

    def receive(self, receivers, codes, keys, values, distance, *, train: bool = False):
        """Attends to keys and values, then applies the MLP; adds no noise to the codes."""
        states = self.attention(receivers, codes, keys, values, distance, train=train)
        return self.ffn(states, codes, train=train)


def attend(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S H K"],
    values: Float[Array, "B S H K"],
    log_affinity: Float[Array, "#B T S"] | None,
    *,
    config: BlockConfig,
) -> Float[Array, "B T H K"]:
    """Returns the values weighted by the attention of each head.

    A receiver without any edge gets 0, or NaN if `config.kernel.empty_row` is "nan".

    Raises:
      ValueError: see `common_jax.nn.attention.choose`.
    """
    forms = {"xla": _attend_plainly, "cudnn": _attend_fused}
    forms = {name: partial(form, config=config) for name, form in forms.items()}
    attention = "xla" if config.scale_after_softmax else config.attention
    return by_platform(attention, forms, query, keys, values, log_affinity)


def _attend_plainly(query, keys, values, log_affinity, *, config: BlockConfig) -> jax.Array:
    # Scores and weights stay in float32 until the last product, whatever the compute dtype, since
    # log affinities range from 0 to minus infinity.
    scores = head_scores(query, keys)
    if log_affinity is None:
        weights = jax.nn.softmax(scores)
        return jnp.einsum("BHTS,BSHK->BTHK", weights.astype(values.dtype), values)
    empty_row = config.kernel.empty_row
    log_affinity = log_affinity[:, None]  # the same for all heads
    if config.mask:
        weights = masked_softmax(scores, log_affinity, empty_row=empty_row)
    else:
        weights = jax.nn.softmax(scores)
    if config.scale_after_softmax:
        # Together with the mask, an edge is weighted by the square of its affinity, and the weights
        # of a row no longer sum to 1; kept from the original.
        if config.normalise_kernel:
            log_affinity = kernels.normalise_log_rows(log_affinity, empty_row=empty_row)
        weights = weights * jnp.exp(log_affinity)
    return jnp.einsum("BHTS,BSHK->BTHK", weights.astype(values.dtype), values)


def _attend_fused(query, keys, values, log_affinity, *, config: BlockConfig) -> jax.Array:
    if log_affinity is None:
        return fused(query, keys, values)
    # The fused kernel cannot take an infinite bias; CUT gives the same weights and gradients, 0.
    bias = jnp.maximum(log_affinity, CUT)[:, None]
    heads = fused(query, keys, values, bias=bias)
    empty = kernels.is_empty(log_affinity)[..., None]
    return jnp.where(empty, jnp.nan if config.kernel.empty_row == "nan" else 0.0, heads)


def head_scores(
    query: Float[Array, "B T H K"], keys: Float[Array, "B S H K"]
) -> Float[Array, "B H T S"]:
    """q k^T / sqrt(K), at least in float32."""
    precise = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("BTHK,BSHK->BHTS", query, keys, preferred_element_type=precise)
    return scores / math.sqrt(query.shape[-1])


def masked_softmax(
    scores: Float[Array, "B H T S"], log_mask: Float[Array, "#B 1 T S"], *, empty_row: str
) -> Float[Array, "B H T S"]:
    """Returns softmax(scores + log_mask) over the last axis.

    A row of the mask without an edge gives zeros and no gradient, or NaN if `empty_row` is "nan".
    """
    if empty_row == "nan":
        return jax.nn.softmax(scores + log_mask)
    # Replaced before the softmax as well as after it: the softmax of a row of minus infinities is
    # NaN, and selecting zeros only afterwards would still propagate NaN to the gradient.
    empty = kernels.is_empty(log_mask)
    weights = jax.nn.softmax(scores + jnp.where(empty, 0.0, log_mask))
    return jnp.where(empty, 0.0, weights)


def split_codes(codes: jax.Array, groups: tuple[jax.Array, ...]) -> list[jax.Array]:
    """Splits codes (S, Z) of all groups by group; a single code (1, Z) serves all groups."""
    sizes = [group.shape[1] for group in groups]
    if codes.shape[0] == 1:
        return [codes] * len(sizes)
    # The codes come concatenated because their noise is a single draw for all groups.
    assert sum(sizes) == codes.shape[0], (sizes, codes.shape)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    return jnp.split(codes, ends)


def layer_scale(module: nn.Module, value: float | None, width: int) -> jax.Array | None:
    """Creates the layer scale of a branch, (D), or returns None if `value` is None."""
    if value is None:
        return None
    return module.param("layer_scale", nn.initializers.constant(value), (width,))


def scale_branch(branch: jax.Array, factors: jax.Array | None) -> jax.Array:
    """Returns the branch times its layer scale, if it has one."""
    return branch if factors is None else branch * factors.astype(branch.dtype)


def drop_branch(module: nn.Module, branch: jax.Array, rate: float, *, train: bool) -> jax.Array:
    """Applies stochastic depth in training, one draw per example (stream "drop_path")."""
    if not train or not rate:
        return branch
    u = draw(module, "drop_path", uniform((branch.shape[0], 1, 1)), stream="drop_path")
    return encoder.drop_path(branch, u, rate)
