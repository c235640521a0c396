"""Attention: its implementations, the choice among them, and multi-head self-attention with one
fused projection for queries, keys and values."""

import importlib.util
import types
from collections.abc import Callable, Mapping
from typing import Annotated

import jax
from flax import linen as nn
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from common_jax.nn import attention_cpu, attention_tpu, dense
from common_jax.ranges import one_of

INIT = nn.initializers.normal(0.02)

# The implementation for each value of a config's `attention`, by the platform that the program is
# compiled for (not the one that compiles it).
PLATFORMS: Mapping[str, Mapping[str, str]] = types.MappingProxyType(
    {
        "auto": {"cuda": "cudnn", "tpu": "splash", "cpu": "cpu", "default": "xla"},
        "xla": {"default": "xla"},
        "cudnn": {"cuda": "cudnn"},
    }
)
Implementation = Annotated[str, one_of(*PLATFORMS)]  # the type of config fields
# With fewer keys, "auto" uses XLA. cuDNN's kernel takes 0.4 times as long as XLA at 197 tokens, but
# 1.5 times as long at 64 with a mask (docs/gpu.md). On TPUs the kernel moves a quarter of XLA's
# bytes at 577 tokens, but would pad 257 tokens to 384 (docs/performance.md).
FEWEST_KEYS = {"cudnn": 128, "splash": 512}
WIDEST_HEAD = 128  # supported on all cards that cuDNN's kernel runs on
CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


def attend(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S H K"],
    values: Float[Array, "B S H K"],
    visible: Bool[Array, "#B 1 #T S"] | None = None,
    *,
    attention: str,
) -> Float[Array, "B T H K"]:
    """softmax(q k^T / sqrt(K)) v, with the softmax in float32.

    Args:
      query, keys, values: for all heads.
      visible: True for the keys (last axis) that each query attends to; None: all of them.
      attention: a key of PLATFORMS.

    Raises:
      ValueError: see `choose`.
    """

    def plain(query, keys, values, visible):
        return jax.nn.dot_product_attention(query, keys, values, mask=visible)

    def cudnn(query, keys, values, visible):
        return fused(query, keys, values, visible=visible)

    def on_tpu(query, keys, values, visible):
        return attention_tpu.splash(query, keys, values, visible=visible)

    forms = {"xla": plain, "cudnn": cudnn, "cpu": attention_cpu.attend}
    one_for_all = visible is None or visible.shape[2] == 1
    if one_for_all and query.shape[1] >= FEWEST_KEYS["splash"]:
        forms["splash"] = on_tpu
    return by_platform(attention, forms, query, keys, values, visible)


def by_platform(
    attention: str,
    forms: Mapping[str, Callable[..., jax.Array]],
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S H K"],
    *others: jax.Array | None,
) -> jax.Array:
    """Calls the implementation of attention that suits the program's platform.

    Args:
      attention: a key of PLATFORMS.
      forms: by implementation, functions of `query`, `keys` and `others` with the same result. If
        "auto" would choose one that is missing, "xla" is used.
      query, keys: the operands that the choice depends on.
      others: further operands.

    Raises:
      ValueError: see `choose`.
    """
    chosen = {
        platform: forms[name]
        for platform, name in choose(attention, query.dtype, keys.shape[1], keys.shape[3]).items()
        if name in forms or attention != "auto"
    }
    if set(chosen) == {"default"}:
        return chosen["default"](query, keys, *others)
    return jax.lax.platform_dependent(query, keys, *others, **chosen)


def choose(attention: str, dtype: DTypeLike, keys: int, width: int) -> Mapping[str, str]:
    """The implementation on each platform, given the number of keys and the `width` per head.

    Raises:
      ValueError: if cuDNN is asked for but cannot compute it.
    """
    if attention == "cudnn" and (problem := refusal(dtype, width)):
        raise ValueError(f"attention={attention!r} {problem}, or set attention to 'auto'")
    if attention != "auto":
        return PLATFORMS[attention]
    fits = {
        "xla": True,
        "cudnn": keys >= FEWEST_KEYS["cudnn"] and not refusal(dtype, width),
        "splash": keys >= FEWEST_KEYS["splash"] and attention_tpu.fits(dtype, width),
        "cpu": attention_cpu.fits(dtype),
    }
    return {platform: name for platform, name in PLATFORMS["auto"].items() if fits[name]}


def refusal(dtype: DTypeLike, width: int) -> str:
    """Why cuDNN cannot compute attention here, and the fix; "" if it can."""
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"does not compute in {dtype.name}: set config.precision to 'bfloat16'"
    if width % 8 or width > WIDEST_HEAD:
        return (
            f"needs a width per head that is a multiple of 8 and at most {WIDEST_HEAD}, and it is "
            f"{width}: change the number of heads"
        )
    if not any(importlib.util.find_spec(name) for name in CUDA_PLUGINS):
        return "needs JAX for NVIDIA GPUs: install jax[cuda12] or jax[cuda13]"
    return ""


def fused(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S H K"],
    values: Float[Array, "B S H K"],
    *,
    bias: Float[Array, "#B #H T S"] | None = None,
    visible: Bool[Array, "#B 1 #T S"] | None = None,
    implementation: str = "cudnn",
) -> Float[Array, "B T H K"]:
    """softmax(q k^T / sqrt(K) + bias) v with cuDNN's kernel, which does not materialise the T x S
    attention weights.

    Args:
      query, keys, values: in bfloat16 or float16.
      bias: added to the scores, after rounding to the dtype of `query`.
      visible: see `attend`.
      implementation: "xla" computes the same without a GPU.
    """
    batch, queries, _, _ = query.shape
    senders = keys.shape[1]
    if visible is not None:
        # The kernel broadcasts a mask over examples and heads, but not over queries.
        visible = jnp.broadcast_to(visible, (*visible.shape[:2], queries, senders))
    bias = None if bias is None else bias.astype(query.dtype)
    # The kernel refuses odd lengths, some of them only in training. XLA fuses the padding into the
    # copy that splits the projection into queries, keys and values.
    odd = queries % 2, senders % 2
    lengths = {}
    if any(odd):
        query, keys, values = (
            jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, keys, values)
        )
        bias, visible = (
            None if x is None else jnp.pad(x, ((0, 0), (0, 0), (0, odd[0]), (0, odd[1])))
            for x in (bias, visible)
        )
        lengths = {
            "query_seq_lengths": jnp.full(batch, queries, jnp.int32),
            "key_value_seq_lengths": jnp.full(batch, senders, jnp.int32),
        }
    result = jax.nn.dot_product_attention(
        query, keys, values, bias, visible, implementation=implementation, **lengths
    )
    return result[:, :queries]


class SelfAttention(nn.Module):
    """softmax(q k^T / sqrt(K)) v, with heads concatenated and projected back to the input's width
    D.

    Parameters: `qkv/kernel` (D, Q=3, H, K), `qkv/bias` (Q, H, K) if `qkv_bias`, `out/kernel` (H,
      K, D), `out/bias` (D). The softmax is computed in float32, for any `dtype`. `attention` is a
      key of PLATFORMS.
    """

    heads: int
    qkv_bias: bool
    dtype: DTypeLike
    init: nn.initializers.Initializer = INIT
    out_init: nn.initializers.Initializer = INIT
    attention: str = "auto"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], visible: Bool[Array, "#B 1 #T T"] | None = None
    ) -> Float[Array, "B T D"]:
        """`visible` is True for the tokens (last axis) that each token attends to; None: all."""
        width = x.shape[-1]
        features = (3, self.heads, width // self.heads)
        qkv = nn.DenseGeneral(
            features,
            use_bias=self.qkv_bias,
            kernel_init=self.init,
            dtype=self.dtype,
            dot_general=dense.product,
            name="qkv",
        )(x)
        query, key, value = (qkv[:, :, i] for i in range(3))
        heads = attend(query, key, value, visible, attention=self.attention)
        return nn.DenseGeneral(
            width,
            axis=(-2, -1),
            kernel_init=self.out_init,
            dtype=self.dtype,
            dot_general=dense.product,
            name="out",
        )(heads)
