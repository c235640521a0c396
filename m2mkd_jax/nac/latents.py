"""The latents of a NAC: signatures (who attends to whom), codes (what each latent computes), and
initial states."""

import dataclasses
from typing import Annotated

import jax
from flax import linen as nn
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from common_jax.config import FieldError, Section
from common_jax.ranges import NonNegative, Size, one_of
from m2mkd_jax.nac.layers import (
    Linear,
    add_code_noise,
    can_draw,
    draw,
    norm,
    normal,
    uniform_init,
)

SEEDINGS = ("noise", "mean", "code", "learned")
LOG_VARIANCE = -5.0
NORMAL = nn.initializers.normal(1.0)


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """A set of latents.

    Attributes:
      count: number of latents.
      layers: number of layers with codes of their own; None for the same codes in all layers.
      identical_codes: starts all latents with the same code.
      identical_signatures: starts all latents with the same signature e_1, which connects all to
        all.
    """

    count: int
    layers: int | None = None
    identical_codes: bool = False
    identical_signatures: bool = False


@dataclasses.dataclass(frozen=True)
class GraphConfig(Section):
    """All latents and how their initial states are made.

    Attributes:
      input, mediator, output: the three sets.
      width, signature_width, code_width: D, Y and Z.
      seeding: "noise" draws states around a linear function of the code, also in evaluation;
        "mean" uses that function without noise; "code" uses the code itself (Z = D); "learned"
        makes the states parameters.
      code_noise: noise on the seeder's codes in training.
    """

    input: LatentConfig
    mediator: LatentConfig
    output: LatentConfig
    width: Size
    signature_width: Size
    code_width: Size
    seeding: Annotated[str, one_of(*SEEDINGS)] = "noise"
    code_noise: NonNegative = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.seeding == "code" and self.code_width != self.width:
            raise FieldError(
                f"code_width={self.code_width} must be width={self.width} with seeding='code'"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Latents:
    """The values of one set of latents.

    Attributes:
      signatures: (T, Y).
      codes: (T, Z), or (layers, T, Z) if every layer has its own.
      states: the initial states (B, T, D); None if the set starts from another set's states.
    """

    signatures: jax.Array
    codes: jax.Array
    states: jax.Array | None

    def layer_codes(self, layer: int) -> Float[Array, "T Z"]:
        """Returns the codes of a layer, numbered from 0; -1 is the last."""
        return self.codes[layer] if self.codes.ndim == 3 else self.codes


class LatentSet(nn.Module):
    """The parameters of one set of latents (NAC, Latents).

    Parameters: `signatures` (T, Y), `codes` (T, Z) or (layers, T, Z), and `states` (T, D) if they
    are learned.
    """

    config: LatentConfig
    graph: GraphConfig

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        config, graph = self.config, self.graph
        shape = (config.count, graph.signature_width)
        init = _first_unit if config.identical_signatures else NORMAL
        layers = () if config.layers is None else (config.layers,)
        code_init = _identical if config.identical_codes else NORMAL
        arrays = {
            "signatures": self.param("signatures", init, shape),
            "codes": self.param("codes", code_init, (*layers, config.count, graph.code_width)),
        }
        if graph.seeding == "learned":
            arrays["states"] = self.param("states", NORMAL, (config.count, graph.width))
        return arrays


class Seeder(nn.Module):
    """Initial states from codes: mu(c) + exp(log_variance(c) / 2) eps, c the normed code (NAC,
    LatentSeeder).

    Parameters: `norm`, `mean`, and `log_variance` if there is noise.
    """

    graph: GraphConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, codes: Float[Array, "T Z"]
    ) -> tuple[Float[Array, "T D"], Float[Array, "T D"] | None]:
        """Returns mean and standard deviation of the states; the latter is None without noise."""
        if self.graph.seeding == "code":
            return codes, None
        # In float32 for any `dtype`: there is one row per latent, not per example, and `_states`
        # casts the states that are made from them.
        codes = norm("norm", jnp.float32)(codes)
        mean = Linear(self.graph.width, codes.dtype, name="mean")(codes)
        if self.graph.seeding == "mean":
            return mean, None
        log_variance = LogVariance(self.graph.width, name="log_variance")(codes)
        return mean, jnp.exp(0.5 * log_variance)


class LogVariance(nn.Module):
    """A linear layer whose bias starts at -5, so that states initially have a standard deviation of
    exp(-2.5) = 0.08."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "T Z"]) -> Float[Array, "T D"]:
        width = x.shape[-1]
        kernel = self.param("kernel", uniform_init(width), (width, self.features))
        bias = self.param("bias", nn.initializers.constant(LOG_VARIANCE), (self.features,))
        return x @ kernel + bias


class Graph(nn.Module):
    """All latents of a NAC with their initial states.

    Parameters: `input`, `mediator`, `output`, each a `LatentSet`, and `seeder`.
    """

    config: GraphConfig
    dtype: DTypeLike

    def setup(self):
        config = self.config
        self.input = LatentSet(config.input, config)
        self.mediator = LatentSet(config.mediator, config)
        self.output = LatentSet(config.output, config)
        if config.seeding != "learned":
            self.seeder = Seeder(config, self.dtype)

    def __call__(
        self, batch: int, *, train: bool = False, seed_mediators: bool = True
    ) -> dict[str, Latents]:
        """Returns the latents of "input", "mediator" and "output".

        The noise of the states (stream "state") is drawn in evaluation too, but left out there if
        the collection "noise" has no numbers and the stream has no key.

        Args:
          batch: number of examples B; with noise every example has states of its own.
          train: adds noise to the codes (stream "code").
          seed_mediators: False if the mediators start from the input latents' states.
        """
        # The order matters for random draws: linen folds the number of earlier draws from a stream
        # into the key of the next.
        sets = {"input": self.input(), "mediator": self.mediator(), "output": self.output()}
        latents = {}
        for name, arrays in sets.items():
            states = None
            if name != "mediator" or seed_mediators:
                states = self._states(name, arrays, batch, train=train)
            latents[name] = Latents(arrays["signatures"], arrays["codes"], states)
        return latents

    def _states(self, name: str, arrays, batch: int, *, train: bool) -> Float[Array, "B T D"]:
        if self.config.seeding == "learned":
            states = arrays["states"]
            return jnp.broadcast_to(states, (batch, *states.shape)).astype(self.dtype)
        codes = arrays["codes"]
        # Initial states feed the first layer, so its codes seed them.
        codes = codes[0] if codes.ndim == 3 else codes
        codes = add_code_noise(self, f"{name}_codes", codes, self.config.code_noise, train=train)
        mean, deviation = self.seeder(codes)
        states = jnp.broadcast_to(mean, (batch, *mean.shape))
        # A missing key means no noise in evaluation. In training it would be a mistake, on which
        # `draw` raises.
        if deviation is not None and (train or can_draw(self, f"{name}_states", stream="state")):
            noise = draw(self, f"{name}_states", normal(states.shape), stream="state")
            states = states + deviation * noise
        return states.astype(self.dtype)


def _first_unit(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.zeros(shape).at[..., 0].set(1.0)


def _identical(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    # Equal at first, but every latent then learns its own. The original stores one expanded row,
    # whose updates all latents share.
    return jnp.broadcast_to(jax.random.normal(key, shape[-1:]), shape)
