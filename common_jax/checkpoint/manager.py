"""orbax's checkpoint manager, and the rules of what it keeps."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from common_jax.checkpoint.contents import FAILURES
from common_jax.checkpoint.meeting import Meeting


@dataclasses.dataclass(frozen=True)
class Best(checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoint with the highest finite value; ties go to the earliest."""

    value: Callable[[Any], float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns True for the checkpoint to keep."""
        values = [self.value(checkpoint) for checkpoint in checkpoints]
        # Filtered, since the `max` of a list with NaN depends on the order.
        best = max(filter(np.isfinite, values), default=None)
        first = None if best is None else values.index(best)
        return [place == first for place in range(len(values))]


@dataclasses.dataclass(frozen=True)
class These(checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoints of these steps, which may change."""

    steps: Collection[int]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns True for the checkpoints to keep."""
        return [checkpoint.step in self.steps for checkpoint in checkpoints]


class Manager(ocp.CheckpointManager):
    """orbax's manager without its check for preemption, which the train loop does itself. All
    processes learn of a save that failed in one of them."""

    def __init__(self, folder: epath.Path, meeting: Meeting, **settings: Any):
        self._meeting = meeting
        super().__init__(folder, **settings)

    def _wait_for_checkpointers(self) -> None:
        # orbax calls this in the thread that ends a save, and only there.
        try:
            super()._wait_for_checkpointers()
        except FAILURES as error:
            self._meeting.fail(error)
            raise

    def reached_preemption(self, step: int) -> bool:
        """Returns False."""
        # jax agrees on where to stop by counting the calls in every process. Calls from orbax,
        # which pass the run's step instead of that count, would make them miss the agreed point.
        del step
        return False
