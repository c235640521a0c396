"""Layers that the parts of a NAC share (code-conditioned linear layers, LayerNorm), and helpers
that draw random numbers."""

import dataclasses
import math
import types
from collections.abc import Callable
from typing import Annotated

import jax
from flax import linen as nn
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from common_jax.config import Section
from common_jax.nn import dense
from common_jax.nn.mlp import gelu
from common_jax.nn.norm import LayerNorm
from common_jax.ranges import BelowOne, Finite, Positive, one_of
from m2mkd_jax.nac.products import scale_by

NORM_EPS = 1e-5
L2_EPS = 1e-12  # of torch's `normalize`
WEIGHT_EPS = 1e-6
NOISE = "noise"  # collection of the numbers that replace draws, see `draw`

ACTIVATIONS = types.MappingProxyType({"none": lambda x: x, "gelu": gelu})


def layer_normalise(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Returns (x - mean) / sqrt(variance + 1e-5) over the last axis, without parameters."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + NORM_EPS)


def l2_normalise(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Returns x / max(|x|, 1e-12) over the last axis, with a finite gradient at 0."""
    # The argument of the root is replaced where it is small: the derivative at 0 is infinite, and
    # selecting the other branch only afterwards would give NaN gradients.
    square = jnp.sum(x**2, axis=-1, keepdims=True)
    small = square <= L2_EPS**2
    norm = jnp.sqrt(jnp.where(small, 1.0, square))
    return x / jnp.where(small, L2_EPS, norm)


NORMALISATIONS = types.MappingProxyType(
    {
        "layer": layer_normalise,
        "l2": l2_normalise,
        "none": lambda x: x,
        "sigmoid": jax.nn.sigmoid,
        "tanh": jnp.tanh,
    }
)
RENORMALISATIONS = ("none", "layer", "l2")
KINDS = ("modulated", "plain", "weight_modulated")


@dataclasses.dataclass(frozen=True)
class LinearConfig(Section):
    """The linear layers of a NAC, `config.model.linear`.

    Attributes:
      kind: "modulated" scales the input depending on the code (ModFC), "weight_modulated" scales
        the weights (WModFC), "plain" ignores the code (FC).
      normalization: normalisation of a modulated layer's scales: "layer", "l2", "none", "sigmoid"
        or "tanh".
      gain: factor of the normalised scales, or its initial value if it is learned.
      learnable_gain: whether the gain is a parameter.
      add_one: adds 1 to the scales, so that with a gain of 0 the layer is an ordinary linear layer.
      renormalization: normalisation of the scaled input: "none", "layer" or "l2".
      dropout: dropout rate of the scales in training.
      weight_gain: factor of the initial weights.
      activation: activation after the layer, "none" or "gelu".
    """

    kind: Annotated[str, one_of(*KINDS)] = "modulated"
    normalization: Annotated[str, one_of(*NORMALISATIONS)] = "layer"
    gain: Finite = 0.1
    learnable_gain: bool = True
    add_one: bool = True
    renormalization: Annotated[str, one_of(*RENORMALISATIONS)] = "none"
    dropout: BelowOne = 0.0
    weight_gain: Positive = 1.0
    activation: Annotated[str, one_of(*ACTIVATIONS)] = "none"

    @property
    def is_linear(self) -> bool:
        """True if, for a fixed code, the layer is a linear map of its input."""
        return self.renormalization == "none" and self.activation == "none"


class CodeLinear(nn.Module):
    """A linear layer conditioned on codes (NAC: ModFC, WModFC, FC).

    With x the input and c the code of a position:
      modulated:         N'(x * s) W + b,  s = gain N(c W_code) [+ 1]
      weight_modulated:  x V + b,  V = W * m / |W * m| per output,  m = c W_code + b_code + 1
      plain:             x W + b

    Parameters: `kernel` (in, out), `bias` (out) if `use_bias`, `code_kernel` (Z, in) unless plain,
    `gain` () if learnable, `code_bias` (in) if weight-modulated.

    Scales are computed in float32 and without a batch axis; only the product with `kernel` is in
    `dtype`.
    """

    config: LinearConfig
    inputs: int
    outputs: int
    code_width: int
    use_bias: bool
    dtype: DTypeLike

    def setup(self):
        config = self.config
        init = uniform_init(self.inputs, config.weight_gain)
        self.kernel = self.param("kernel", init, (self.inputs, self.outputs))
        if self.use_bias:
            # The plain layer is PyTorch's, which draws the bias too; the original starts those of
            # the modulated layers at 0.
            plain = config.kind == "plain"
            init = uniform_init(self.inputs) if plain else nn.initializers.zeros
            self.bias = self.param("bias", init, (self.outputs,))
        if config.kind != "plain":
            init = uniform_init(self.code_width)
            self.code_kernel = self.param("code_kernel", init, (self.code_width, self.inputs))
        if config.kind == "weight_modulated":
            # `init` is still that of `code_kernel`: PyTorch's bound depends on the fan-in, for the
            # bias too.
            self.code_bias = self.param("code_bias", init, (self.inputs,))
        if config.kind == "modulated" and config.learnable_gain:
            self.gain = self.param("gain", nn.initializers.constant(config.gain), ())

    def __call__(
        self, x: Float[Array, "*B T _"], codes: Float[Array, "#T Z"], *, train: bool = False
    ) -> Float[Array, "*B T _"]:
        config, x = self.config, x.astype(self.dtype)
        if config.kind == "weight_modulated":
            # (T, out, in) by (B, T, in); the matrix of a single code broadcasts over T.
            y = jnp.matvec(self._matrices(codes).astype(self.dtype), x)
        else:
            if config.kind == "modulated":
                x = scale_by(x, self.scales(codes, train=train).astype(self.dtype))
                x = NORMALISATIONS[config.renormalization](x)
            y = dense.matmul(x, self.kernel.astype(self.dtype))
        if self.use_bias:
            y = y + self.bias.astype(self.dtype)
        return ACTIVATIONS[config.activation](y)

    def scales(self, codes: Float[Array, "T Z"], *, train: bool = False) -> Float[Array, "T _"]:
        """Returns the factors (T, in) that scale a modulated layer's input; 1 for a plain layer."""
        config = self.config
        if config.kind == "plain":
            return jnp.ones((codes.shape[0], self.inputs), codes.dtype)
        gain = self.gain if config.learnable_gain else config.gain
        scales = gain * NORMALISATIONS[config.normalization](codes @ self.code_kernel)
        if train and config.dropout:
            keep = 1 - config.dropout
            # The whole batch shares the mask, since scales have no batch axis.
            mask = draw(self, "dropout", uniform(scales.shape), stream="code") < keep
            scales = scales * mask / keep
        # After the dropout: where a scale is dropped, the input passes unchanged.
        return scales + 1 if config.add_one else scales

    def _matrices(self, codes: Float[Array, "T Z"]) -> Float[Array, "T _ _"]:
        """Returns one matrix (out, in) per code, with rows of unit length."""
        modulation = codes @ self.code_kernel + self.code_bias + 1
        matrices = self.kernel.T * modulation[:, None, :]
        square = jnp.sum(matrices**2, axis=-1, keepdims=True)
        return matrices * jax.lax.rsqrt(square + WEIGHT_EPS)


class Linear(nn.Module):
    """x W + b, with both initialised uniformly within +-1 / sqrt(in).

    Parameters: `kernel` (in, out), `bias` (out).
    """

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "*B _"]) -> Float[Array, "*B _"]:
        init = uniform_init(x.shape[-1])
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        bias = self.param("bias", init, (self.features,))
        x, kernel, bias = (part.astype(self.dtype) for part in (x, kernel, bias))
        return dense.matmul(x, kernel) + bias


def norm(name: str | None, dtype: DTypeLike, epsilon: float = NORM_EPS) -> LayerNorm:
    """A LayerNorm with the epsilon of a NAC."""
    return LayerNorm(epsilon, dtype, name=name)


def uniform_init(fan_in: int, gain: float = 1.0) -> jax.nn.initializers.Initializer:
    """Uniform within +-gain / sqrt(fan_in); with gain 1, PyTorch's default for linear layers."""
    bound = gain / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def draw(
    module: nn.Module, name: str, sample: Callable[[jax.Array], jax.Array], *, stream: str
) -> jax.Array:
    """Draws random numbers, or returns those that the collection "noise" has under `name`.

    Golden cases and tests use this collection to inject the original's draws.

    Args:
      module: the module that draws; the collection has its numbers under the module's path.
      name: what the numbers are for.
      sample: maps a key to an array.
      stream: name of the rng stream.

    Raises:
      ValueError: if the collection's array has the wrong shape.
      flax.errors.InvalidRngError: if the collection has no array and the stream has no key.
    """
    if not module.has_variable(NOISE, name):
        return sample(module.make_rng(stream))
    noise = module.get_variable(NOISE, name)
    # Traces `sample`, without drawing.
    expected = jax.eval_shape(sample, jax.random.key(0)).shape
    if noise.shape != expected:
        path = "/".join((*module.path, name))
        raise ValueError(f"noise {path} has shape {noise.shape}, expected {expected}")
    return noise


def can_draw(module: nn.Module, name: str, *, stream: str) -> bool:
    """Returns True if `draw` has numbers or a key.

    Otherwise evaluation skips its draws (states, pooling, edges).
    """
    return module.has_variable(NOISE, name) or module.has_rng(stream)


def uniform(shape: tuple[int, ...]) -> Callable[[jax.Array], jax.Array]:
    """Returns a function from a key to float32 numbers of a shape, uniform in [0, 1)."""
    return lambda key: jax.random.uniform(key, shape)


def normal(shape: tuple[int, ...]) -> Callable[[jax.Array], jax.Array]:
    """Returns a function from a key to standard normal float32 numbers of a shape."""
    return lambda key: jax.random.normal(key, shape)


def add_code_noise(
    module: nn.Module, name: str, codes: Float[Array, "T Z"], scale: float, *, train: bool
) -> Float[Array, "T Z"]:
    """Returns c + scale |c| (2 u - 1) in training, u uniform in [0, 1) (NAC, VectorScaleNoise).

    The whole batch shares one draw, and no gradient passes through the noise.
    """
    if not train or not scale:
        return codes
    u = draw(module, name, uniform(codes.shape), stream="code")
    spread = scale * jnp.abs(jax.lax.stop_gradient(codes))
    return codes + (2 * spread * u - spread)
