"""The whole Neural Attentive Circuit: input latents attend to image tokens, mediators exchange
messages along a learned graph, and output latents attend to the mediators and are pooled."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from common_jax.mesh import constrain
from common_jax.state import fold_name
from m2mkd_jax.models.encoder import Interface
from m2mkd_jax.nac.blocks import BlockConfig, Propagator
from m2mkd_jax.nac.kernel import cosine_distance
from m2mkd_jax.nac.latents import Graph, GraphConfig, Latents
from m2mkd_jax.nac.layers import NOISE, CodeLinear, norm
from m2mkd_jax.nac.pooling import ConfidencePooling
from m2mkd_jax.nac.read_in import AttentiveReadIn, ProjectionReadIn
from m2mkd_jax.nac.tokenizer import Tokenizer, TokenizerConfig
from m2mkd_jax.stages import Params, stage_name

GRAPH = "graph"


@dataclasses.dataclass(frozen=True)
class ReadInConfig:
    """How tokens become states of input latents.

    Attributes:
      block: config of the attention and its MLP.
      kind: "attention" or "projection".
      scale: initial value of the attention's layer scale; None for no layer scale.
    """

    block: BlockConfig
    kind: str = "attention"
    scale: float | None = 1.0


@dataclasses.dataclass(frozen=True)
class ReadOutConfig:
    """How states become logits.

    Attributes:
      block: config of the output latents' attention and MLP.
      pooling: "gumbel", "gumbel_hard", "softmax", or "first_slot", the first output state as it is.
      temperature: temperature of the pooling.
      head: width of a code-conditioned layer between block and pooling; None for no such layer.
      head_norm: whether the input of that layer is normed.
    """

    block: BlockConfig
    pooling: str = "gumbel"
    temperature: float = 1.0
    head: int | None = None
    head_norm: bool = True


@dataclasses.dataclass(frozen=True)
class Wiring:
    """The connections between the groups of latents.

    Attributes:
      inputs_to_mediators: when mediators attend to input latents: "always", only in the "first"
        iteration, or "never".
      inputs_to_outputs: whether the output latents attend to the input latents.
      inputs_as_mediators: starts the mediators with the states of the input latents.
    """

    inputs_to_mediators: str = "always"
    inputs_to_outputs: bool = True
    inputs_as_mediators: bool = False


class ReadIn(nn.Module):
    """Stage 0: image -> tokens -> states of the input latents.

    Parameters: `tokenizer`, `read_in`. Sows under `intermediates`: `tokens` (B, S, U).
    """

    tokenizer: TokenizerConfig
    config: ReadInConfig
    interface: Interface
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "B I J X"],
        receivers: Float[Array, "#B T D"],
        codes: Float[Array, "#T Z"],
        *,
        train: bool,
    ) -> Float[Array, "B T D"]:
        tokens = Tokenizer(self.tokenizer, self.interface.image_size, self.dtype, name="tokenizer")(
            images
        )
        # Costs nothing unless the caller records "intermediates".
        self.sow("intermediates", "tokens", tokens)
        config, width = self.config, self.tokenizer.token_width
        if config.kind == "projection":
            read_in = ProjectionReadIn(config.block, width, self.dtype, name="read_in")
        else:
            read_in = AttentiveReadIn(config.block, width, config.scale, self.dtype, name="read_in")
        return read_in(receivers, codes, tokens, train=train)


class ReadOut(nn.Module):
    """The last stage: output latents attend to the others, and their states are pooled into logits
    (NAC, ReadOut).

    Parameters: `attention` and `ffn`, as in a `Propagator`; `code_head` if there is one; `pooling`
    unless it is "first_slot". Sows under `intermediates`: `output_states`.
    """

    config: ReadOutConfig
    labels: int
    dtype: DTypeLike

    def setup(self):
        config = self.config
        # Puts the block's parameters directly below the stage, as in a propagator.
        self.block = Propagator(config.block, self.dtype)
        nn.share_scope(self, self.block)
        if config.head is not None:
            # If its outputs are the logits, they are float32, like the logits of other heads.
            gives_logits = config.pooling == "first_slot"
            precise = jnp.promote_types(self.dtype, jnp.float32)
            self.code_head = CodeHead(config, precise if gives_logits else self.dtype)
        if config.pooling != "first_slot":
            self.pooling = ConfidencePooling(
                self.labels, config.pooling, config.temperature, self.dtype
            )

    def __call__(
        self,
        receivers: Float[Array, "B T D"],
        receiver_codes: Float[Array, "#T Z"],
        senders: tuple[Float[Array, "B _ D"], ...],
        sender_codes: Float[Array, "#S Z"],
        distance: Float[Array, "T S"] | None = None,
        *,
        train: bool,
    ) -> Float[Array, "B L"]:
        states = self.block(receivers, receiver_codes, senders, sender_codes, distance, train=train)
        if self.config.head is not None:
            states = self.code_head(states, receiver_codes, train=train)
        self.sow("intermediates", "output_states", states)
        if self.config.pooling == "first_slot":
            logits = states[:, 0]
        else:
            logits = self.pooling(states, train=train)
        return constrain(logits, "batch", "labels")


class CodeHead(nn.Module):
    """A code-conditioned linear layer on the output states. Parameters: `norm`, `linear`."""

    config: ReadOutConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, states, codes, *, train: bool) -> Float[Array, "B T _"]:
        config, block = self.config, self.config.block
        if config.head_norm:
            states = norm("norm", self.dtype)(states)
        linear = CodeLinear(
            block.linear,
            block.width,
            config.head,
            block.code_width,
            True,
            self.dtype,
            name="linear",
        )
        return linear(states, codes, train=train)


@dataclasses.dataclass(frozen=True)
class NacNetwork:
    """A NAC as a sequence of stages (read-in, propagators, read-out) and the graph of latents.

    Attributes:
      graph: all latents; their parameters are under "graph".
      read_in, propagators, read_out: stage 0, stages 1.., and the last stage; their parameters are
        under `stage_name(i)`.
      wiring: who attends to whom.
      interface: image side, channels and labels.
      share_propagators: all iterations use stage 1; no other propagator has parameters.
      share_ffns: all iterations use the MLP of stage 1.
      dtype: compute dtype.
      remat: recomputes each propagator in the backward pass.
    """

    graph: GraphConfig
    read_in: ReadIn
    propagators: tuple[Propagator, ...]
    read_out: ReadOut
    wiring: Wiring
    interface: Interface
    share_propagators: bool
    share_ffns: bool
    dtype: DTypeLike
    remat: bool = False

    def __len__(self) -> int:
        return len(self.propagators) + 2

    def init(
        self, key: jax.Array, *, signatures: Mapping[str, jax.Array | np.ndarray] | None = None
    ) -> dict[str, Any]:
        """Initialises the parameters.

        Args:
          key: PRNG key; a stage's parameters depend only on it and on the stage's name.
          signatures: given initial signatures by set of latents ("mediator", ...); those of other
            sets are drawn.
        """
        latents = Graph(self.graph, self.dtype)
        params = {GRAPH: latents.init(fold_name(key, GRAPH), 1)["params"]}
        for name, array in (signatures or {}).items():
            params[GRAPH][name]["signatures"] = jnp.asarray(array, jnp.float32)
        last, graph = len(self) - 1, self.graph
        size, channels = self.interface.image_size, self.interface.channels
        # A single latent is enough, since parameter shapes do not depend on the number of latents;
        # only a read-in by projection needs one latent per token.
        state, code = jnp.zeros((1, 1, graph.width)), jnp.zeros((1, graph.code_width))
        message = (state, code, (state,), code, jnp.zeros((1, 1)))
        image = jnp.zeros((1, size, size, channels))
        inputs = (jnp.repeat(x, graph.input.count, axis=-2) for x in (state, code))
        calls = {0: (self.read_in, (image, *inputs))}
        iterations = range(1, 2 if self.share_propagators else last)
        calls |= {i: (self.propagators[i - 1], message) for i in iterations}
        calls[last] = (self.read_out, message)
        for i, (module, arguments) in calls.items():
            name = stage_name(i)
            # Keys by name, not split in order, so that a stage is initialised alike in NACs with
            # any number of iterations.
            stage = module.init(fold_name(key, name), *arguments, train=False)["params"]
            if self.share_ffns and 1 < i < last:
                # `_propagate` puts the MLP of stage 1 in its place.
                del stage["ffn"]
            params[name] = stage
        return params

    def apply(
        self,
        params: Params,
        images: Float[Array, "B I J X"],
        *,
        train: bool = False,
        rngs: Mapping[str, jax.Array] | None = None,
        noise: Mapping[str, Any] | None = None,
        record: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "B L"], dict[str, Any]]:
        """Computes the logits of images.

        Args:
          params: parameters laid out as in `init`.
          images: images of the interface's size.
          train: adds noise to codes, samples edges, drops paths and scales.
          rngs: keys of the streams "code", "kernel" and "drop_path" (for training), "state" and
            "pooling" (for evaluation too; without them, states are means and the pooling has no
            noise).
          noise: random numbers that replace drawn ones, with a subtree for "graph" and for each
            stage, see `layers.draw`.
          record: linen collections to return; "states" adds the final states of `input` and
            `mediator` latents.

        Returns:
          Logits (B, L), and the recorded collections by part.

        Raises:
          ValueError: if the images have another shape.
        """
        self._check_images(images)
        # Every part is applied on its own with its own subtree, not as a child of one large module:
        # such a subtree is what a student trains, and the whole network uses it unchanged.
        call = _Caller(params, noise or {}, rngs or {}, train, record)
        wiring, batch = self.wiring, images.shape[0]
        latents = call(
            GRAPH,
            Graph(self.graph, self.dtype),
            batch,
            seed_mediators=not wiring.inputs_as_mediators,
        )
        inputs, mediators = latents["input"], latents["mediator"]
        states = call(stage_name(0), self.read_in, images, inputs.states, inputs.layer_codes(0))
        states = constrain(states, "batch", "tokens", "width")
        mediator_states = states if wiring.inputs_as_mediators else mediators.states

        # Unrolled rather than scanned: iterations may differ in config and parameters, and each is
        # a stage with its own subtree.
        distance = self._distance(mediators, inputs)
        cached = self._project_inputs_once(call, states, inputs, train)
        for layer in range(len(self.propagators)):
            codes = mediators.layer_codes(layer)
            attends = {"always": True, "first": layer == 0, "never": False}
            with_inputs = attends[wiring.inputs_to_mediators]
            # Input latents come first among the senders, in states, codes and distances alike.
            mediator_states = self._propagate(
                call,
                layer,
                mediator_states,
                codes,
                (states, inputs) if with_inputs else None,
                distance if with_inputs else distance[:, inputs.signatures.shape[0] :],
                cached if with_inputs else None,
            )

        # Mediators send to the read-out with the codes of their last iteration.
        output, codes = latents["output"], mediators.layer_codes(-1)
        senders, signatures = (mediator_states,), mediators.signatures
        if wiring.inputs_to_outputs:
            senders = (states, mediator_states)
            signatures = jnp.concatenate([inputs.signatures, signatures])
            codes = jnp.concatenate([inputs.layer_codes(0), codes])
        logits = call(
            stage_name(len(self) - 1),
            self.read_out,
            output.states,
            output.layer_codes(0),
            senders,
            codes,
            cosine_distance(output.signatures, signatures),
        )
        if "states" in record:
            call.recorded["states"] = {"input": states, "mediator": mediator_states}
        return logits, call.recorded

    def _propagate(self, call, layer, states, codes, inputs, distance, cached) -> jax.Array:
        """Runs one iteration: mediators attend to each other, and to the input latents unless
        `inputs` is None."""
        # Shared parameters are stored only under stage 1; noise and keys are the iteration's own.
        name, shared = stage_name(layer + 1), {}
        if self.share_propagators:
            shared = call.params[stage_name(1)]
        elif self.share_ffns:
            shared = {"ffn": call.params[stage_name(1)]["ffn"]}
        params = {**call.params.get(name, {}), **shared}
        module = self.propagators[layer]
        if cached is not None:
            arguments = (states, codes, *cached, distance)
            return call(name, module, *arguments, params=params, method="extend", remat=self.remat)
        senders, sender_codes = (states,), codes
        if inputs is not None:
            input_states, input_latents = inputs
            senders = (input_states, states)
            sender_codes = jnp.concatenate([input_latents.layer_codes(0), codes])
        arguments = (states, codes, senders, sender_codes, distance)
        return call(name, module, *arguments, params=params, remat=self.remat)

    def _distance(self, mediators: Latents, inputs: Latents) -> Float[Array, "T S"]:
        """Returns distances from mediators to input latents and mediators, for all iterations."""
        # Signatures do not change between iterations, so neither do distances; only the bandwidth
        # and the sampled edges differ. The original computes them in every iteration.
        signatures = jnp.concatenate([inputs.signatures, mediators.signatures])
        return cosine_distance(mediators.signatures, signatures)

    def _project_inputs_once(self, call, states, inputs, train: bool):
        """Projects the input latents to keys and values that all iterations share.

        Returns None if iterations cannot share them: because each has its own weights, noise on
        codes or dropped scales, or because not all attend to the input latents.
        """
        # The states of input latents do not change after the read-in. Projecting them once saves
        # their part of the senders' projections in every iteration but the first.
        noisy = train and (self.propagators[0].config.code_noise or self._drops_scales())
        always = self.wiring.inputs_to_mediators == "always"
        if not self.share_propagators or noisy or not always:
            return None
        name, codes = stage_name(1), inputs.layer_codes(0)
        return call(name, self.propagators[0], (states,), codes, method="project")

    def _drops_scales(self) -> bool:
        return self.propagators[0].config.linear.dropout > 0

    def _check_images(self, images: jax.Array) -> None:
        side, channels = self.interface.image_size, self.interface.channels
        if images.shape[1:] != (side, side, channels):
            raise ValueError(
                f"images have shape {images.shape[1:]}, but the model takes "
                f"{(side, side, channels)}; check config.data.image_size and config.data.channels"
            )


@dataclasses.dataclass
class _Caller:
    """Runs parts, each with its own parameters, noise and keys, and collects their records."""

    params: Params
    noise: Mapping[str, Any]
    rngs: Mapping[str, jax.Array]
    train: bool
    record: tuple[str, ...]
    recorded: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, name, module, *arguments, params=None, method=None, remat=False, **switches):
        variables = {"params": self.params[name] if params is None else params}
        if name in self.noise:
            variables[NOISE] = self.noise[name]
        # Fold in the stage name: linen derives keys from paths within the module, which are the
        # same in every iteration.
        keys = {stream: fold_name(key, name) for stream, key in self.rngs.items()}
        # "states" is the network's own record, not a collection of linen's.
        collections = [c for c in self.record if c != "states"]

        def run(variables, keys, *arguments):
            return module.apply(
                variables,
                *arguments,
                train=self.train,
                rngs=keys,
                mutable=collections,
                method=method,
                **switches,
            )

        # Keys and noise are arguments, so that the backward pass recomputes with the same draws.
        run = jax.checkpoint(run) if remat else run
        result, recorded = run(variables, keys, *arguments)
        if recorded:
            self.recorded[name] = recorded
        return result
