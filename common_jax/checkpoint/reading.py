"""Reading checkpoints of any mesh, whole or in part."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh, SingleDeviceSharding

from common_jax.checkpoint.belonging import FOLDER, own_steps
from common_jax.checkpoint.contents import JSON
from common_jax.mesh import Rules, match_rules, replicated, with_shardings
from common_jax.state import merge
from common_jax.workdir import read_json

AVERAGE = "average"  # a further item, of runs that keep a running average
PATTERN = re.compile(r"[*?\[\]\\]")  # letters that file systems allow and globbing interprets


def load(
    source: epath.PathLike,
    *,
    subtree: str = "",
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    average: bool = False,
) -> dict[str, Any]:
    """Parameters of a checkpoint, or the part of them below `subtree`, without building the
    trainer.

    Only the files of that part are read, whatever mesh wrote them.

    Args:
      source: a run's workdir (its newest finished checkpoint), its `checkpoints` folder, or one
        step's folder.
      subtree: path of keys, such as "encoder/block_2"; empty for all.
      mesh: devices to put them on; None for the first device alone.
      rules: how they are split over `mesh`; None holds them whole on every device.
      average: takes the running average of the trained parameters, which is what was evaluated,
        where the run kept one (config.optim.ema).

    Returns:
      The nested dict below `subtree`.

    Raises:
      FileNotFoundError: when there is no finished checkpoint, naming the place.
      ValueError: when there are checkpoints, and none belongs to the run in whose folder they are.
      KeyError: when `subtree` is not in the checkpoint, naming the subtrees there.
    """
    step = find_step(source)
    shapes = _shapes(step)
    chosen = {
        path: shape
        for path, shape in traverse_util.flatten_dict(shapes, sep="/").items()
        if not subtree or path == subtree or path.startswith(subtree + "/")
    }
    if not chosen:
        raise KeyError(f"{step} holds no {subtree!r}; it holds {_outline(shapes)}")
    wanted = traverse_util.unflatten_dict(chosen, sep="/")
    if mesh is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), wanted)
    elif rules is None:
        shardings = jax.tree.map(lambda _: replicated(mesh), wanted)
    else:
        shardings = match_rules(rules, wanted, mesh)
    wanted = with_shardings(wanted, shardings)
    restored = read(step, wanted)
    kept = _shapes(step, AVERAGE) if average and (step / AVERAGE).exists() else {}
    if averaged := _common(wanted, kept):
        restored = merge(restored, read(step, averaged, item=AVERAGE))
    for key in filter(None, subtree.split("/")):
        restored = restored[key]
    return restored


def read(step: epath.Path, wanted: Mapping[str, Any], *, item: str = "params") -> dict[str, Any]:
    """The parameters of `wanted`, ShapeDtypeStructs with shardings, from an item of a step;
    reads no others."""
    return ocp.PyTreeCheckpointer().restore(
        step / item,
        args=ocp.args.PyTreeRestore(
            item=wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        ),
    )


def load_config(source: epath.PathLike) -> dict[str, Any]:
    """The config that made the checkpoint that `load` would read from `source`."""
    return read_json(find_step(source) / "config" / JSON)


def load_shapes(source: epath.PathLike) -> dict[str, Any]:
    """Nested dict of ShapeDtypeStructs of all parameters in `source`; reads no array."""
    return _shapes(find_step(source))


def check_source(key: str, source: str) -> None:
    """Raises FileNotFoundError, naming the field `key`, unless the run `source` has a finished
    checkpoint; an empty `source` is not checked."""
    try:
        if source:
            find_step(source)
    except OSError as error:
        raise type(error)(f"{key}={source!r}: {error}") from error


def find_step(source: epath.PathLike) -> epath.Path:
    """The folder of the step that `source` means: itself, or the newest finished one of the run
    below it; raises as `load`."""
    source = absolute(source)
    if "\\" in str(source):
        raise ValueError(
            f"{str(source)[:300]!r}: no checkpoint can be read there, since a backslash in a path "
            "is taken for a slash; rename the folder, or give a link to it"
        )
    if source.name.isdigit() and (source / "params").exists():
        return source
    if source.exists() and not source.is_dir():
        raise FileNotFoundError(f"{source} is a file; give a run's workdir, or a step in it")
    for folder in (source / FOLDER, source):
        if steps := own_steps(folder):
            return folder / str(steps[-1])
    state = "exists and has none" if source.exists() else "does not exist"
    raise FileNotFoundError(
        f"no finished checkpoint at {source}, which {state}; give a run's workdir, its {FOLDER} "
        "folder, or a step in it"
    )


def absolute(path: epath.PathLike) -> epath.Path:
    """The absolute path, which orbax requires; in a bucket (`gs://...`) it is so already."""
    path = epath.Path(path)
    return path if "://" in str(path) else path.expanduser().resolve()


def refuse_pattern(path: epath.PathLike, name: str) -> None:
    """Raises ValueError for a folder that no checkpoint can be written to.

    orbax finds the files that it merges by a pattern that begins with the folder's own path.
    Letters that mean something in a pattern would leave a checkpoint without its arrays. The target
    of a link does not matter: orbax does not follow it.

    Args:
      path: of the folder.
      name: its name in the message, for example "--workdir".
    """
    resolved = absolute(path)
    if found := sorted(set(PATTERN.findall(str(resolved)))):
        raise ValueError(
            f"{name}={str(path)[:300]!r}: checkpoints cannot be written below "
            f"{str(resolved)[:300]!r}, since {' '.join(found)} in a path stand for other names; "
            "give a folder without them, or a link to this one"
        )


def _shapes(step: epath.Path, item: str = "params") -> dict[str, Any]:
    metadata = ocp.PyTreeCheckpointHandler().metadata(step / item).tree
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata)


def _common(wanted: Mapping[str, Any], held: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of `wanted` whose paths are in `held` too."""
    paths = traverse_util.flatten_dict(held)
    flat = traverse_util.flatten_dict(wanted)
    return traverse_util.unflatten_dict({p: leaf for p, leaf in flat.items() if p in paths})


def _outline(shapes: Mapping[str, Any]) -> list[str]:
    return sorted({"/".join(path[:2]) for path in traverse_util.flatten_dict(shapes)})
