"""Builds NAC's networks, students and random draws from a golden case's json and arrays."""

import collections
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import numpy as jnp

from m2mkd_jax.models.encoder import Interface
from m2mkd_jax.nac.blocks import Propagator
from m2mkd_jax.nac.latents import GraphConfig, LatentConfig
from m2mkd_jax.nac.model import NacConfig
from m2mkd_jax.nac.network import NacNetwork, ReadIn, ReadOut, Wiring
from m2mkd_jax.nac.students import MediatorStudent, ReadInStudent, ReadOutStudent
from m2mkd_jax.stages import stage_name
from parity import nac_arguments as original
from parity.nac_arguments import Arguments, by_layer, fill, inherit, pick
from parity.nac_configs import (
    propagator_config,
    read_in_config,
    read_out_config,
    seeding,
    share_ffn,
    tokenizer_config,
)
from parity.names import read_nac

Params = Mapping[str, Any]
ROOT = "latent_graphs.0."
SETS = ("input", "mediator", "output")


class Draws:
    """The random draws that a case recorded as `<prefix><module>/<kind>/<k>`, where k numbers a
    module's draws."""

    def __init__(self, noise: Mapping[str, np.ndarray], prefix: str = ""):
        self._noise, self._prefix, self._counts = noise, prefix, collections.Counter()

    def take(self, module: str, kind: str) -> np.ndarray | None:
        """A module's next draw of a kind; None when there are no more."""
        key = f"{self._prefix}{module}/{kind}"
        self._counts[key] += 1
        return self._noise.get(f"{key}/{self._counts[key] - 1}")

    def propagator(self, prefix: str = "", *, ffn: str | None = None) -> dict[str, Any]:
        """Draws of a propagator; `ffn` is the path of an MLP that it shares."""
        ffn = f"{prefix}ffn" if ffn is None else ffn
        attention = f"{prefix}latent_attention"
        return _present(
            receiver_codes=self.take(f"{prefix}code_noiser", "uniform"),
            sender_codes=self.take(f"{prefix}code_noiser", "uniform"),
            attention=_present(
                kernel=self.take(f"{attention}.kernel", "uniform"),
                drop_path=self.take(f"{attention}.drop_path", "uniform"),
            ),
            ffn=_present(drop_path=self.take(f"{ffn}.drop_path", "uniform")),
        )

    def read_in(self, prefix: str = "") -> dict[str, Any]:
        """Draws of a read-in."""
        return _present(
            receiver_codes=self.take(f"{prefix}code_noiser", "uniform"),
            ffn=_present(drop_path=self.take(f"{prefix}ffn.drop_path", "uniform")),
        )

    def network(self, network: NacNetwork) -> dict[str, Any]:
        """Draws of a whole NAC, by stage."""
        graph = {}
        for name in SETS:
            if name != "mediator" or not network.wiring.inputs_as_mediators:
                seeder = f"{ROOT}latent_seeder"
                graph[f"{name}_codes"] = self.take(f"{seeder}.code_noiser", "uniform")
                graph[f"{name}_states"] = self.take(seeder, "normal")
        stages = {stage_name(0): _present(read_in=self.read_in(f"{ROOT}read_in."))}
        shared_ffn = f"{ROOT}propagators.0.ffn" if network.share_ffns else None
        for i in range(len(network.propagators)):
            own = f"{ROOT}propagators.{0 if network.share_propagators else i}."
            stages[stage_name(i + 1)] = self.propagator(own, ffn=shared_ffn)
        last = self.propagator(f"{ROOT}read_out.")
        pooling = _present(gumbel=self.take("output_tokenizer", "gumbel"))
        stages[stage_name(len(network) - 1)] = last | _present(pooling=pooling)
        return _present(graph=_present(**graph), **stages)


def to_device(tree: Any) -> Any:
    """The tree with its leaves as JAX arrays."""
    return jax.tree.map(jnp.asarray, tree)


def build_network(
    config: Arguments, state: Mapping[str, np.ndarray], image_size: int
) -> tuple[NacNetwork, Params, NacConfig]:
    """A whole NAC, its parameters, and a config that says what its iterations share."""
    whole = fill("NeuralCompiler", config, original.NETWORK)
    sizes = {"state_dim": whole["state_dim"], "output_dim": whole["output_dim"]}
    graph = fill("LatentGraph", whole["latent_graph_kwargs"], original.GRAPH, **sizes)
    count = graph["num_iterations"]
    sharing = NacConfig(
        iterations=count,
        share_propagators=graph["share_propagator_weights"],
        share_ffns=graph["share_ffn_between_propagators"],
    )
    params = to_device(read_nac(state, sharing))
    channels = {"input_dim": whole["input_dim"]}
    tokenizer = tokenizer_config(
        {**channels, **(whole["input_tokenizer_kwargs"] or {})}, width=whole["state_dim"]
    )
    shared = {
        **pick(graph, {**original.PROPAGATOR, **original.READ_OUT}),
        "input_dim": tokenizer.token_width,
        "ffn_layer_scale_initial_value": graph["layer_scale_initial_value"],
    }
    del shared["output_dim"]
    kinds = {
        "AttentiveReadIn": original.ATTENTIVE_READ_IN,
        "ProjectionReadIn": original.PROJECTION_READ_IN,
    }
    read_in = inherit(graph["read_in_kwargs"], pick(shared, kinds[graph["read_in_cls"]]))
    block = inherit(graph["propagator_kwargs"], pick(shared, original.PROPAGATOR))
    blocks = by_layer(
        block, graph["propagator_layerwise_kwargs"], 1 if sharing.share_propagators else count
    )
    blocks = [propagator_config(own, original.PROPAGATOR) for own in blocks]
    if sharing.share_propagators:
        blocks *= count
    elif sharing.share_ffns:
        blocks = [blocks[0], *(share_ffn(block, blocks[0]) for block in blocks[1:])]
    read_out = inherit(
        graph["read_out_kwargs"],
        {**pick(shared, original.PROPAGATOR), "output_dim": graph["output_dim"]},
    )
    pooling = (
        whole["output_tokenizer_type"],
        inherit(whole["output_tokenizer_kwargs"], sizes)
        if whole["output_tokenizer_type"] == "OutputLatentPooling"
        else None,
    )
    config_out = read_out_config(read_out, pooling)
    interface = Interface(image_size, whole["input_dim"], whole["output_dim"])
    network = NacNetwork(
        graph=_graph(graph),
        read_in=ReadIn(
            tokenizer,
            read_in_config(read_in, params[stage_name(0)]["read_in"]),
            interface,
            jnp.float32,
        ),
        propagators=tuple(Propagator(own, jnp.float32) for own in blocks),
        read_out=ReadOut(config_out, whole["output_dim"], jnp.float32),
        wiring=_wiring(graph),
        interface=interface,
        dtype=jnp.float32,
        share_propagators=sharing.share_propagators,
        share_ffns=sharing.share_ffns,
    )
    return network, params, sharing


def build_student(
    kind: str, kwargs: Arguments, params: Params, *, image: int, tokens: int, labels: int
) -> nn.Module:
    """A "readin", "mediator" or "readout" student.

    Args:
      kind: "readin", "mediator" or "readout".
      kwargs: its arguments, and those shared by all students.
      params: its parameters, from which the meta model's width is read.
      image: side of the image.
      tokens: number of the meta model's tokens.
      labels: number of labels.
    """
    post = kind != "readout"
    kernel = (params["post_stitch"] if post else params["pre_stitch"])["kernel"]
    fixed = {"stitch_width": kernel.shape[1 if post else 0], "seed": 0, "dtype": jnp.float32}
    if kind == "readin":
        options = fill(
            "read-in student", pick(kwargs, original.READ_IN_STUDENT), original.READ_IN_STUDENT
        )
        tokenizer = tokenizer_config(
            {"input_dim": options["input_dim"], **(options["tokenizer_kwargs"] or {})},
            width=options["state_dim"],
        )
        # Its inputs are the tokens, and it ignores layer_scale_initial_value.
        own = pick(options, original.ATTENTIVE_READ_IN) | {"input_dim": tokenizer.token_width}
        interface = Interface(image, options["input_dim"], labels)
        return ReadInStudent(tokenizer, read_in_config(own, {}), interface, **fixed)
    table = {"mediator": original.MEDIATOR_STUDENT, "readout": original.READ_OUT_STUDENT}[kind]
    options = fill(f"{kind} student", kwargs, table, stitch_dim=None)
    own = pick(options, original.READ_OUT if kind == "readout" else original.PROPAGATOR)
    if kind == "mediator":
        return MediatorStudent(
            propagator_config(own, original.PROPAGATOR, kernel=False), tokens, **fixed
        )
    pooling = options["tokenizer_type"], options["tokenizer_kwargs"]
    config = read_out_config(own, pooling, kernel=False)
    return ReadOutStudent(config, labels, tokens, **fixed)


def _graph(options: Arguments) -> GraphConfig:
    sizes = pick(options, {"code_dim": None, "signature_dim": None, "state_dim": None})
    layers = None if options["share_codes_between_iterations"] else options["num_iterations"]
    sets = {}
    for name in SETS:
        own = {"num_latents": options[f"num_{name}_latents"], **sizes}
        own |= {"num_layers": layers} if name == "mediator" else {}
        latents = fill(f"{name} latents", options[f"{name}_latent_kwargs"], original.LATENTS, **own)
        sets[name] = LatentConfig(latents["num_latents"], layers=latents["num_layers"])
    seeder = pick(options, original.SIZES)
    if options["use_code_noise_in_latent_seeder"]:
        seeder["code_noise_scale"] = options["code_noise_scale"]
    own = fill("LatentSeeder", options["latent_seeder_kwargs"], original.SEEDER, **seeder)
    return GraphConfig(
        **sets,
        width=options["state_dim"],
        signature_width=options["signature_dim"],
        code_width=options["code_dim"],
        seeding=seeding(own, {}) if options["use_latent_seeder"] else "learned",
        code_noise=float(own["code_noise_scale"] or 0),
    )


def _wiring(options: Arguments) -> Wiring:
    inputs = "always" if options["enable_persistent_input_mediator_communication"] else "first"
    return Wiring(
        "never" if options["disable_input_mediator_communication"] else inputs,
        options["enable_input_output_communication"],
        options["use_input_states_as_mediator_states"],
    )


def _present(**parts: Any) -> dict[str, Any]:
    """The parts that are neither None nor empty."""
    return {n: p for n, p in parts.items() if p is not None and not (isinstance(p, dict) and not p)}
