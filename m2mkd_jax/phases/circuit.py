"""What training a whole NAC needs beside its network: signatures that start from a graph prior,
regularisers that hold on to it, and a picture of what became of it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from common_jax import checkpoint
from common_jax.report import dispensable, is_picture
from common_jax.state import fold_name
from common_jax.workdir import refuse_other_config
from m2mkd_jax.config import Config
from m2mkd_jax.connectivity import draw_connectivity
from m2mkd_jax.nac.graphs import make_graph
from m2mkd_jax.nac.priors import Prior, prepare_prior
from m2mkd_jax.phases.objective import Regularizer
from m2mkd_jax.regularizers import make_regularizer

PICTURE = "connectivity.png"


@dataclasses.dataclass(frozen=True)
class Circuit:
    """Where a NAC's latents start.

    Attributes:
      signatures: first signatures (T, Y) of "input", "mediator" and "output".
      prior: the graph that the mediators' are fitted to; None where they are drawn.
    """

    signatures: Mapping[str, np.ndarray]
    prior: Prior | None


def start_circuit(config: Config, workdir: epath.Path) -> Circuit:
    """The signatures that a run starts from, a function of the config alone; a prior's fit is kept
    in `workdir`.

    Raises:
      ValueError: when the prior's graph does not fit the mediators, or the workdir is another
        run's.
    """
    refuse_other_config(workdir, config)
    model, signatures = config.model, draw_signatures(config)
    prior = prepare_prior(
        model.prior,
        nodes=model.mediators,
        signature_width=model.signature_width,
        seed=config.seed,
        cache=workdir,
    )
    if prior is not None:
        signatures["mediator"] = prior.signatures
    if model.prior.graph == "complete":
        first = np.eye(1, model.signature_width, dtype=np.float32)
        signatures = {name: np.repeat(first, len(x), axis=0) for name, x in signatures.items()}
    return Circuit(signatures, prior)


def check_circuit(config: Config) -> None:
    """Raises ValueError when the prior's graph does not fit the mediators."""
    prior = config.model.prior
    if prior.graph != "none":
        make_graph(prior, nodes=config.model.mediators, seed=config.seed)


def draw_signatures(config: Config) -> dict[str, np.ndarray]:
    """Signatures (T, Y) of "input", "mediator" and "output" latents, standard normal numbers."""
    model, key = config.model, jax.random.key(config.seed)
    counts = {"input": model.inputs, "mediator": model.mediators, "output": model.outputs}
    return {
        name: np.asarray(
            jax.random.normal(fold_name(key, f"{name} signatures"), (n, model.signature_width))
        )
        for name, n in counts.items()
    }


def circuit_regularizer(config: Config, circuit: Circuit, steps_per_epoch: int) -> Regularizer:
    """The weighted sum of config.regularizers on the student's signatures."""
    model = config.model
    kernels = [model.propagator(i, drop_path=0.0).kernel for i in range(model.iterations)]
    regularize = make_regularizer(config.regularizers, circuit.signatures, kernels=kernels)
    epochs = max(config.optim.total_steps(steps_per_epoch) // steps_per_epoch, 1)

    def regularizer(params: Any, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return regularize(params["student"], (step // steps_per_epoch) / epochs)

    return regularizer


def draw_circuit(config: Config, circuit: Circuit, workdir: epath.Path) -> None:
    """Writes connectivity.png, the mediators' graph before and after training, unless it is there;
    what fails is a warning."""
    path = workdir / PICTURE
    if jax.process_index() != 0 or is_picture(path):
        return
    with dispensable(path):
        learned = checkpoint.load(
            workdir, subtree="student/graph/mediator", average=config.optim.ema > 0
        )
        before = circuit.signatures["mediator"]
        groups = np.zeros(len(before), int) if circuit.prior is None else circuit.prior.communities
        truncation = config.model.kernel.truncation
        draw_connectivity(
            before,
            np.asarray(learned["signatures"]),
            groups,
            truncation=2.0 if truncation is None else truncation,
            path=path,
        )
