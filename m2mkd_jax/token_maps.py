"""Token maps of a trained ViT or V-MoE, for its use as a backbone in detection, segmentation and
retrieval."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from common_jax.mesh import to_devices
from common_jax.step import one_behind
from m2mkd_jax.data.feed import prepare_evaluation
from m2mkd_jax.phases import PHASES
from m2mkd_jax.phases.networks import SECTIONS, whole_network
from m2mkd_jax.stages import stage_name
from m2mkd_jax.trained import Trained


class Features(NamedTuple):
    """The features of a batch.

    Attributes:
      maps: patch tokens after a stage, arranged as in the image.
      pooled: the input of the head, normed and pooled.
    """

    maps: Float[np.ndarray, "B I J D"]
    pooled: Float[np.ndarray, "B _"]


def check_maps(trained: Trained, stage: int | None) -> int:
    """The stage to take token maps from; None means the last.

    Raises:
      ValueError: if the run has modules or a network without token maps, or no such stage.
    """
    config, role = trained.config, trained.role
    if PHASES[config.phase].modular:
        raise ValueError(
            f"{trained.source} holds modules, but only whole networks have token maps: give the "
            "run of a meta model, a teacher or a student"
        )
    if trained.family.leading_tokens is None:
        raise ValueError(
            f"{trained.source} holds a network whose tokens are not a grid of patches, so it has "
            "no token maps"
        )
    count = len(getattr(config, SECTIONS[role]).depths)
    stage = count - 1 if stage is None else stage
    if not 0 <= stage < count:
        raise ValueError(f"--stage={stage} must be from 0 to {count - 1}")
    return stage


def run_features(
    trained: Trained, batches: Iterable[Mapping[str, np.ndarray]], stage: int
) -> Iterator[tuple[Mapping[str, np.ndarray], Features]]:
    """Yields every batch with its features.

    Args:
      trained: the run.
      batches: as `common_jax.inputs.eval_batches` yields them.
      stage: the stage whose output the maps are, before the last norm; see `check_maps`.
    """
    config, role = trained.config, trained.role
    network = whole_network(config, role)
    leading = trained.family.leading_tokens(getattr(config, SECTIONS[role]))

    @jax.jit
    def compute(params: Any, batch: Any) -> Features:
        images = prepare_evaluation(batch, config.data)
        _, recorded = network.apply(params[role], images, record=("intermediates",))
        tokens = recorded[stage_name(stage)]["intermediates"]["block"][-1][:, leading:]
        side = round(tokens.shape[1] ** 0.5)
        (pooled,) = recorded[stage_name(len(network) - 1)]["intermediates"]["features"]
        return Features(tokens.reshape(len(tokens), side, side, -1), pooled)

    def dispatched() -> Iterator[tuple[Mapping[str, np.ndarray], Features]]:
        for batch in batches:
            with jax.set_mesh(trained.mesh):
                found = compute(trained.params, to_devices(batch, trained.mesh))
            yield batch, found

    for batch, found in one_behind(dispatched()):
        # float32, since npz files cannot hold bfloat16.
        yield batch, jax.tree.map(lambda x: np.asarray(x, np.float32), jax.device_get(found))
