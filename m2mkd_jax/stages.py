"""Networks as sequences of stages, with one parameter subtree per stage.

So cutting a teacher means selecting subtrees, assembling modules means merging them, and a hybrid
is `meta[:i] . module . meta[i+1:]`. A `Network` can be a teacher, meta model, student or hybrid,
whole or in part: it needs only the parameters of the stages that run.
"""

import dataclasses
import enum
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
from flax import linen as nn

from common_jax.state import fold_name

Params = Mapping[str, Any]


class Place(enum.Enum):
    """The position of a stage: the first embeds images, the last has the norm and the head, and a
    single stage has both."""

    FIRST = "first"
    MIDDLE = "middle"
    LAST = "last"
    ONLY = "only"

    @classmethod
    def of(cls, stage: int, count: int) -> "Place":
        """The place of stage `stage` (0-based) among `count`; raises IndexError if out of range."""
        if not 0 <= stage < count:
            raise IndexError(f"stage {stage} is not one of the {count} stages 0..{count - 1}")
        if count == 1:
            return cls.ONLY
        return {0: cls.FIRST, count - 1: cls.LAST}.get(stage, cls.MIDDLE)


class Stage(Protocol):
    """A linen module that can be a stage of a network."""

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array: ...

    def example(self, batch: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of an input batch: images for the first stage, else tokens."""
        ...


@dataclasses.dataclass(frozen=True)
class Network:
    """A sequence of stages; the parameters of stage i are under `stage_name(i)`."""

    stages: tuple[nn.Module, ...]

    def __len__(self) -> int:
        return len(self.stages)

    def init(self, key: jax.Array, *, only: tuple[int, ...] | None = None, batch: int = 1) -> dict:
        """Initialises all stages, or those in `only`; each depends only on `key` and its stage
        number, so a module is initialised the same alone and with others."""
        numbers = range(len(self)) if only is None else only
        return {stage_name(i): self._init_stage(key, i, batch) for i in numbers}

    def apply(
        self,
        params: Params,
        x: jax.Array,
        *,
        start: int = 0,
        stop: int | None = None,
        train: bool = False,
        rngs: Mapping[str, jax.Array] | None = None,
        record: tuple[str, ...] = ("moe",),
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Runs stages `start`..`stop`-1 (to the end by default).

        Args:
          params: parameters of at least these stages.
          x: images (B, I, J, X) when `start` is 0, else tokens (B, T, D).
          start, stop: stage numbers; `start == stop` returns `x`.
          train: whether to apply stochastic depth and gate noise, drawn from `rngs`.
          rngs: one key per stream name; every stage folds its own name into it.
          record: linen collections to return.

        Returns:
          Tokens, or logits (B, L) after the last stage; and the recorded collections, one subtree
          per stage.

        Raises:
          KeyError: if `params` lacks a stage that runs.
        """
        recorded = {}
        for i in range(start, len(self) if stop is None else stop):
            name = stage_name(i)
            if name not in params:
                raise KeyError(f"no parameters for {name}, only for {sorted(params)}")
            # By stage name, so that a stage's draws do not depend on which other stages run.
            keys = {stream: fold_name(key, name) for stream, key in (rngs or {}).items()}
            # `mutable` is a list even if it is empty; with False, `apply` would return only x.
            x, records = self.stages[i].apply(
                {"params": params[name]}, x, train=train, rngs=keys, mutable=list(record)
            )
            recorded[name] = records
        return x, recorded

    def _init_stage(self, key: jax.Array, i: int, batch: int) -> dict:
        example = self.stages[i].example(batch)
        # The values do not matter: parameters depend on shapes and key alone.
        zeros = jax.numpy.zeros(example.shape, example.dtype)
        return self.stages[i].init(fold_name(key, stage_name(i)), zeros, train=False)["params"]


def module_name(stage: int) -> str:
    """The name of a stage's module in metrics, such as `module_0`."""
    return f"module_{stage}"


def stage_name(stage: int) -> str:
    """The key of a stage's parameters, such as `stage_0`."""
    return f"stage_{stage}"


def stage_number(name: str) -> int:
    """The inverse of `stage_name`; raises ValueError for any other name."""
    match = re.fullmatch(r"stage_(0|[1-9][0-9]*)", name)
    if match is None:
        raise ValueError(f"{name!r} is not the name of a stage, such as {stage_name(0)!r}")
    return int(match[1])


def locate(block: int, depths: Sequence[int]) -> tuple[int, int]:
    """The stage of a block that is numbered through the whole network, and its number within that
    stage; raises IndexError if the network has fewer blocks."""
    for stage, depth in enumerate(depths):
        if block < depth:
            return stage, block
        block -= depth
    raise IndexError(f"depths={tuple(depths)} have only {sum(depths)} blocks, numbered from 0")
