"""Towers that stay on the devices, for sentences and pictures that arrive in parts."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32

from cliptrans_jax.data.examples import pad
from cliptrans_jax.encoders import BUCKET, ImageTower, TextTower, by_length
from common_jax.mesh import move_to_devices, replicated, to_devices
from common_jax.step import one_behind


@dataclasses.dataclass(frozen=True)
class Resident:
    """A tower that is moved to the devices once, and compiled once per shape.

    Attributes:
      tower: a text or image tower.
      mesh: devices; a batch is split over all of them.
      batch: sentences or pictures per call; smaller sets are padded to it.
    """

    tower: TextTower | ImageTower
    mesh: Mesh
    batch: int

    def sentences(self, texts: Sequence[str]) -> Float32[np.ndarray, "B M"]:
        """One feature per sentence; those too long for the tower are truncated, with a warning."""
        tower = self.tower
        # A tower trained here may have fewer positions than its tokenizer, the translator's,
        # allows.
        limit = min(tower.tokenizer.limit, tower.longest)
        ids = dataclasses.replace(tower.tokenizer, limit=limit).encode(texts, None)
        order = by_length(ids)

        def batches() -> Iterator[np.ndarray]:
            for first in range(0, len(order), self.batch):
                rows = [ids[place] for place in order[first : first + self.batch]]
                # The last of them is the longest.
                length = min(-(-len(rows[-1]) // BUCKET) * BUCKET, tower.longest)
                yield pad(rows, length, pad_id=tower.tokenizer.pad)

        # The argsort of a permutation is its inverse: back to the order of `texts`.
        return self._encode(batches())[np.argsort(order)]

    def pictures(self, pictures: Sequence[np.ndarray]) -> Float32[np.ndarray, "B M"]:
        """One feature per picture, uint8 (I, J, 3), (I, J, 4) or (I, J)."""
        batches = (
            np.stack([self.tower.prepare(x) for x in pictures[first : first + self.batch]])
            for first in range(0, len(pictures), self.batch)
        )
        return self._encode(batches)

    @functools.cached_property
    def _params(self) -> Any:
        # In place, so that the tower's numpy arrays do not stay in memory as well.
        move_to_devices(self.tower.params, replicated(self.mesh))
        return self.tower.params

    @functools.cached_property
    def _apply(self) -> Any:
        return jax.jit(self.tower.apply, out_shardings=replicated(self.mesh))

    def _encode(self, batches: Iterable[np.ndarray]) -> Float32[np.ndarray, "B M"]:
        """The features of all inputs. A smaller batch is filled up with copies of its last
        input."""

        def dispatched() -> Iterator[tuple[jax.Array, int]]:
            for inputs in batches:
                count = len(inputs)
                width = [(0, self.batch - count), *[(0, 0)] * (inputs.ndim - 1)]
                batch = to_devices({"inputs": np.pad(inputs, width, mode="edge")}, self.mesh)
                yield self._apply(self._params, batch["inputs"]), count

        with jax.set_mesh(self.mesh):  # without it, `constrain` in the towers would do nothing
            parts = [np.asarray(x, np.float32)[:count] for x, count in one_behind(dispatched())]
        features = np.concatenate(parts)
        if not np.isfinite(features).all():
            raise FloatingPointError("features are not finite; check the weights of the tower")
        return features
