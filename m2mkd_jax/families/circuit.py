"""Training a whole NAC: signatures initialised from a graph prior, regularisers that keep them
close to it, and a picture of the learned graph."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from common_jax import checkpoint, hosts
from common_jax.optim import OptimConfig
from common_jax.report import dispensable, is_picture
from common_jax.state import fold_name
from m2mkd_jax.families.family import Regularizer
from m2mkd_jax.nac.graphs import make_graph
from m2mkd_jax.nac.model import NacConfig
from m2mkd_jax.nac.network import NacNetwork
from m2mkd_jax.nac.priors import Prior, prepare_prior
from m2mkd_jax.regularizers import RegularizersConfig, make_regularizer

PICTURE = "connectivity.png"
CAPTION = "mediators before and after training: distances, and the graph"


@dataclasses.dataclass(frozen=True)
class Circuit:
    """Initial values of a NAC's latents.

    Attributes:
      signatures: signatures (T, Y) of "input", "mediator" and "output".
      prior: the graph that the mediators' signatures are fitted to; None if they are random.
    """

    signatures: Mapping[str, np.ndarray]
    prior: Prior | None


def start_circuit(model: NacConfig, seed: int, workdir: epath.Path) -> Circuit:
    """Initial signatures, which depend only on model and seed; the fit to a prior is cached in
    `workdir`.

    Raises:
      ValueError: if the prior's graph does not fit the mediators.
    """
    signatures = draw_signatures(model, seed)
    prior = prepare_prior(
        model.prior,
        nodes=model.mediators,
        signature_width=model.signature_width,
        seed=seed,
        cache=workdir,
    )
    if prior is not None:
        signatures["mediator"] = prior.signatures
    if model.prior.graph == "complete":
        # Identical signatures are at distance 0, so that all latents are connected.
        first = np.eye(1, model.signature_width, dtype=np.float32)
        signatures = {name: np.repeat(first, len(x), axis=0) for name, x in signatures.items()}
    return Circuit(signatures, prior)


def sketch_circuit(model: NacConfig, seed: int) -> Circuit:
    """Random signatures of the same shapes, without the fit to the prior."""
    return Circuit(draw_signatures(model, seed), None)


def check_circuit(model: NacConfig, seed: int) -> None:
    """Raises ValueError if the prior's graph does not fit the mediators."""
    if model.prior.graph != "none":
        make_graph(model.prior, nodes=model.mediators, seed=seed)


def draw_signatures(model: NacConfig, seed: int) -> dict[str, np.ndarray]:
    """Standard normal signatures (T, Y) of "input", "mediator" and "output" latents."""
    # Not in the network's `init`, since a regulariser is fitted to the signatures before the step
    # is compiled. Keys by name, so that no set depends on the size of another.
    key = jax.random.key(seed)
    counts = {"input": model.inputs, "mediator": model.mediators, "output": model.outputs}
    return {
        name: np.asarray(
            jax.random.normal(fold_name(key, f"{name} signatures"), (n, model.signature_width))
        )
        for name, n in counts.items()
    }


def circuit_init(network: NacNetwork, circuit: Circuit) -> Callable[[jax.Array], Any]:
    """The network's `init` with the circuit's signatures."""
    return functools.partial(network.init, signatures=circuit.signatures)


def circuit_regularizer(
    model: NacConfig,
    circuit: Circuit,
    config: RegularizersConfig,
    optim: OptimConfig,
    steps_per_epoch: int,
) -> Regularizer:
    """The weighted sum of the regularisers in `config`, applied to the student's parameters; the
    weights change once per epoch."""
    # `layerwise` may give every iteration a kernel of its own.
    kernels = [model.propagator(i, drop_path=0.0).kernel for i in range(model.iterations)]
    regularize = make_regularizer(config, circuit.signatures, kernels=kernels)
    # A run of less than an epoch counts as one.
    epochs = max(optim.total_steps(steps_per_epoch) // steps_per_epoch, 1)

    def regularizer(params: Any, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        # Whole epochs, as in the original, which sets the weights at the start of each.
        return regularize(params["student"], (step // steps_per_epoch) / epochs)

    return regularizer


def draw_circuit(model: NacConfig, circuit: Circuit, workdir: epath.Path) -> None:
    """Writes connectivity.png, the mediators' graph before and after training, unless it exists. A
    failure only causes a warning. If the run averages its parameters, the averages are drawn."""
    path, first = workdir / PICTURE, jax.process_index() == 0
    if not hosts.any_process(first and not is_picture(path)):
        return
    with dispensable(path):
        # orbax waits for every process at the end of a read, so all of them load.
        learned = checkpoint.load(workdir, subtree="student/graph/mediator", average=True)
        if not first:
            return
        # Matplotlib, which it needs, takes long to import.
        from m2mkd_jax.connectivity import draw_connectivity

        before = circuit.signatures["mediator"]
        groups = np.zeros(len(before), int) if circuit.prior is None else circuit.prior.communities
        truncation = model.kernel.truncation
        draw_connectivity(
            before,
            np.asarray(learned["signatures"]),
            groups,
            # 2 is the largest cosine distance: without a truncation, all pairs are connected.
            truncation=2.0 if truncation is None else truncation,
            path=path,
        )
