"""Warm starts from other runs' weights, with an account of every parameter."""

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from jax.sharding import SingleDeviceSharding

from common_jax import checkpoint
from common_jax.weights.account import list_problems


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a subtree of parameters comes from.

    Attributes:
      source: a run's workdir or one step's folder.
      subtree: path of keys in that checkpoint, such as "module/stage_2".
      target: path of keys in the parameters to load.
      renamed: names below `subtree` -> names below `target`, where they differ.
    """

    source: epath.PathLike
    subtree: str
    target: str
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """Parameters from other runs, on their devices, and an account of them.

    The account is JSON: `taken` has one entry per origin with the size of what was taken from it,
    and `average` if that is the average of the origin's parameters;
    `adapted`, the parameters whose shape was changed; `left`, parameters of the origins that are
    not used, and `fresh`, parameters that start from scratch, both with reasons.
    """

    params: Mapping[str, Any]
    account: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Allowance:
    """Parameters that need not match: a regex of their paths `a/b/c` in the tree to load, and
    why."""

    regex: str
    reason: str
    asked: bool = False  # by the user, who is warned if it matches nothing


# workdir -> shapes of the parameters of a run that will be made there, a nested dict
Planned = Mapping[str, Mapping[str, Any]]

# adapt(array, shape) -> the array converted to that shape, for parameters such as position tables
Adapt = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


def take(
    shapes: Mapping[str, Any],
    origins: Iterable[Origin],
    *,
    leave: tuple[Allowance, ...] = (),
    fresh: tuple[Allowance, ...] = (),
    adapt: Mapping[str, Adapt] | None = None,
    average: bool = False,
    read: bool = True,
    planned: Planned | None = None,
) -> WarmStart:
    """Loads parameters from `origins` directly onto their shardings, reading only those in
    `shapes`.

    Args:
      shapes: nested dict of ShapeDtypeStructs with shardings.
      origins: disjoint subtrees of `shapes`, each with its checkpoint.
      leave: parameters of an origin that `shapes` may lack.
      fresh: parameters to leave out of the result, so that they are initialised, even if an origin
        has them.
      adapt: regex of paths -> conversion of parameters whose shape differs.
      average: whether to load the evaluated averages of parameters, where checkpoints have them.
      read: whether to read parameters; if False, only checks that all fit, and returns none.
      planned: sources that need not exist yet; for `read=False`.

    Raises:
      FileNotFoundError: if an origin has no finished checkpoint and is not planned.
      ValueError: naming all parameters that are missing, of the wrong shape, or unknown, unless
        `leave` or `fresh` allows for them.
    """
    flat, adapt = traverse_util.flatten_dict(shapes, sep="/"), adapt or {}
    account = {"taken": [], "adapted": [], "left": [], "fresh": []}
    requests, problems, covered, known = [], [], set(), set(flat)
    for origin in origins:
        if (made := (planned or {}).get(str(origin.source))) is not None:
            request = _Request(origin, epath.Path(origin.source))
        else:
            request = _Request(origin, checkpoint.common_step(origin.source))
            made = checkpoint.load_shapes(request.step)
        for name, shape in _below(made, origin.subtree, request.step).items():
            path = f"{origin.target}/{origin.renamed.get(name, name)}"
            known.add(path)
            if _allowed(path, fresh):
                continue
            if path in flat:
                covered.add(path)
                if not request.add(path, name, shape, flat[path], adapt):
                    problems.append(
                        f"{path} should be {flat[path].shape} and is {shape.shape} in "
                        f"{request.step}"
                    )
            elif reason := _allowed(path, leave):
                account["left"].append({"name": path, "reason": reason})
            else:
                problems.append(f"{path} of shape {shape.shape} has no place (from {request.step})")
        requests.append(request)
    for path in sorted(set(flat) - covered):
        if reason := _allowed(path, fresh):
            account["fresh"].append({"name": path, "reason": reason})
        else:
            problems.append(f"{path} of shape {flat[path].shape} is in none of the sources")
    for allowance in (*leave, *fresh) if read else ():
        warn_of_no_match(allowance, known)
    if problems:
        raise ValueError(
            f"the weights do not fit:{list_problems(problems)}"
            "\ngive other config.sources, or regexes of what starts from scratch in "
            "config.sources.fresh and of what may be left out in config.sources.leave"
        )
    params, averaged = {}, set()
    for request in requests:
        values, adapted = request.read(flat, average=average) if read else ({}, [])
        params |= values
        source = {"source": str(request.step), "subtree": request.origin.subtree}
        if read and average and checkpoint.has_average(request.step):
            source |= {"average": True}
            averaged.add(str(request.step))
        account["taken"].append(source | {"as": request.origin.target} | size_of(values))
        account["adapted"] += adapted
    for step in sorted(averaged):
        logging.info("%s: the average of its parameters is loaded, not the last ones", step)
    return WarmStart(traverse_util.unflatten_dict(params, sep="/"), account)


def warn_of_no_match(allowance: Allowance, paths: Collection[str]) -> None:
    """Warns about a user's regex that matches none of the `paths`."""
    if allowance.asked and not any(re.fullmatch(allowance.regex, path) for path in paths):
        logging.warning(
            "%s=%r matches no parameter and changes nothing; the regex must match a whole path, "
            "such as %s",
            allowance.reason,
            allowance.regex,
            min(paths),
        )


def size_of(params: Mapping[str, Any]) -> dict[str, int]:
    """The numbers of `arrays` and `parameters` in a nested dict, for an account."""
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(params)]
    return {"arrays": len(sizes), "parameters": sum(sizes)}


@dataclasses.dataclass
class _Request:
    """What is read from one origin.

    Attributes:
      origin, step: the origin, and the folder of its checkpoint.
      names: the names in the checkpoint, by path in the tree to load.
      shapes: the arrays to read, by name in the checkpoint.
      functions: the conversions of arrays that do not have the shape to load, by path.
    """

    origin: Origin
    step: epath.Path
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    shapes: dict[str, jax.ShapeDtypeStruct] = dataclasses.field(default_factory=dict)
    functions: dict[str, Adapt] = dataclasses.field(default_factory=dict)

    def add(
        self, path: str, name: str, found: Any, target: Any, adapt: Mapping[str, Adapt]
    ) -> bool:
        """Adds the parameter `path`; returns False if its shape is another and cannot be adapted.

        Args:
          path: its path in the tree to load.
          name: its name below the origin's subtree.
          found, target: its shape in the checkpoint; its shape, dtype and sharding to load.
          adapt: as for `take`.
        """
        sharding = target.sharding
        if found.shape != target.shape:
            function = next((f for rx, f in adapt.items() if re.fullmatch(rx, path)), None)
            if function is None:
                return False
            self.functions[path] = function
            # Adapted by numpy on the host, and resharded after that.
            sharding = SingleDeviceSharding(jax.local_devices()[0])
        self.names[path] = name = f"{self.origin.subtree}/{name}"
        self.shapes[name] = jax.ShapeDtypeStruct(found.shape, target.dtype, sharding=sharding)
        return True

    def read(
        self, targets: Mapping[str, Any], *, average: bool
    ) -> tuple[dict[str, jax.Array], list[dict[str, Any]]]:
        """The parameters by path, in the shapes and shardings of `targets`, and an account of those
        that were adapted."""
        if not self.shapes:
            return {}, []
        wanted = traverse_util.unflatten_dict(self.shapes, sep="/")
        tree = checkpoint.read_params(self.step, wanted, average=average)
        values = traverse_util.flatten_dict(tree, sep="/")
        params = {path: values[name] for path, name in self.names.items()}
        account = []
        for path, function in self.functions.items():
            before, target = params[path], targets[path]
            adapted = function(np.asarray(before), target.shape)
            shard = adapted.__getitem__
            params[path] = jax.make_array_from_callback(target.shape, target.sharding, shard)
            account.append({"name": path, "from": list(before.shape), "to": list(target.shape)})
        return params, account


def _below(shapes: Mapping[str, Any], subtree: str, step: epath.Path) -> dict[str, Any]:
    """The shapes below `subtree`, by path; `step` is their checkpoint, for messages."""
    flat = traverse_util.flatten_dict(shapes, sep="/")
    prefix = subtree + "/"
    leaves = {
        path.removeprefix(prefix): leaf for path, leaf in flat.items() if path.startswith(prefix)
    }
    if not leaves:
        raise ValueError(
            f"{step} holds no {subtree!r}, only {sorted({path.split('/')[0] for path in flat})}"
        )
    return leaves


def _allowed(path: str, allowances: tuple[Allowance, ...]) -> str | None:
    return next((a.reason for a in allowances if re.fullmatch(a.regex, path)), None)
