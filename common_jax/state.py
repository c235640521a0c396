"""The state of a run, and the random keys of its steps.

No key is carried in the state. Each is a function of (seed, step, stream name), so a resumed run
replays exactly, and adding a stream does not change the others.
"""

import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax import struct, traverse_util


@struct.dataclass
class TrainState:
    """Everything that a run needs to resume where it stopped.

    Attributes:
      step: updates done so far, including those skipped for a non-finite loss or gradient.
      params: nested dict of all parameters that the run saves, trained or not.
      opt_state: optax state over the trained parameters.
      ema: average of the trained parameters, a running one or one over the last checkpoints; or
        None.
      sums: metrics summed over the steps since the last log line.
      skipped: steps skipped so far for a non-finite loss or gradient.
      skipped_in_row: number of consecutive skipped steps up to now.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    sums: dict[str, jax.Array]
    skipped: jax.Array
    skipped_in_row: jax.Array


def step_rngs(seed: jax.Array, step: jax.Array, streams: Iterable[str]) -> dict[str, jax.Array]:
    """A key for each stream at a step: fold_in(fold_in(key(seed), step), name)."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return {name: fold_name(key, name) for name in streams}


def evaluation_key(
    seed: jax.Array, batch: jax.Array, *, step: jax.Array | None = None
) -> jax.Array:
    """The key of evaluation batch number `batch`: fold_in(fold_name(key(seed), "evaluation"),
    batch). `step`, if given, is folded in too, so that every evaluation draws new numbers.

    The name is folded in where training folds in the step, so the two share no stream.
    """
    key = jax.random.fold_in(fold_name(jax.random.key(seed), "evaluation"), batch)
    return key if step is None else jax.random.fold_in(key, step)


def fold_name(key: jax.Array, name: str) -> jax.Array:
    """The key of `name`, independent of all other names."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def partition(params: Mapping[str, Any], regex: str) -> tuple[dict, dict]:
    """Splits a nested dict of parameters into those whose full path `a/b/c` matches `regex`, and
    the rest. Raises ValueError if none matches."""
    flat = traverse_util.flatten_dict(params, sep="/")
    chosen = {path: leaf for path, leaf in flat.items() if re.fullmatch(regex, path)}
    if not chosen:
        raise ValueError(f"no parameter matches {regex!r}; there are {sorted(flat)[:5]}, ...")
    rest = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return tuple(traverse_util.unflatten_dict(part, sep="/") for part in (chosen, rest))


def subtrees(tree: Mapping[str, Any], depth: int) -> dict[tuple[str, ...], Any]:
    """The subtrees `depth` keys deep in a nested dict, by path; for depth 0, the whole dict under
    the path ()."""
    parts = {(): tree}
    for _ in range(depth):
        parts = {(*path, key): leaf for path in parts for key, leaf in parts[path].items()}
    return parts


def merge(*trees: Mapping[str, Any]) -> dict:
    """Merges nested dicts leaf by leaf; a later tree's leaf replaces an earlier one's."""
    flat = {}
    for tree in trees:
        flat |= traverse_util.flatten_dict(tree, sep="/")
    return traverse_util.unflatten_dict(flat, sep="/")
