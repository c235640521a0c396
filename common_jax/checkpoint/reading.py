"""Reads checkpoints, whatever mesh wrote them."""

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh, SingleDeviceSharding

from common_jax import hosts
from common_jax.checkpoint.belonging import FOLDER, own_steps, step_of
from common_jax.checkpoint.contents import JSON
from common_jax.mesh import Rules, match_rules, replicated, with_shardings
from common_jax.state import merge
from common_jax.workdir import ABOVE, in_bucket, read_json

AVERAGE = "average"  # an extra item, in runs that evaluate an average of their parameters
PATTERN = re.compile(r"[*?\[\]\\]")  # valid in file names, but special in glob patterns


def load(
    source: epath.PathLike,
    *,
    subtree: str = "",
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    average: bool = False,
) -> Any:
    """Loads a checkpoint's parameters, or those below `subtree`, without the trainer's state.

    Reads only the parameters that it returns. Any mesh may have written them. If several processes
    form one run, all of them must call this together, and load the same step.

    Args:
      source: a run's workdir (for its newest finished checkpoint), its `checkpoints` folder, or one
        step's folder.
      subtree: path of keys, such as "encoder/block_2"; empty for all.
      mesh: devices to put them on; None for the first device only.
      rules: partition rules over `mesh`; None replicates.
      average: whether to load the evaluated average of the trained parameters, if the checkpoint
        has one (config.optim.ema, or config.run.average_last at the last step).

    Returns:
      The nested dict below `subtree`, or the array that it names.

    Raises:
      FileNotFoundError: if there is no finished checkpoint, naming `source`.
      ValueError: if all checkpoints contradict the run whose folder they are in.
      KeyError: if the checkpoint lacks `subtree`, naming the subtrees that it has.
    """
    step, subtree = common_step(source), subtree.rstrip("/")
    shapes = _shapes(step)
    selection = {
        path: shape
        for path, shape in traverse_util.flatten_dict(shapes, sep="/").items()
        if not subtree or path == subtree or path.startswith(subtree + "/")
    }
    if not selection:
        there = sorted({"/".join(path[:2]) for path in traverse_util.flatten_dict(shapes)})
        raise KeyError(f"{step} holds no {subtree!r}; it holds {there}")
    abstract = traverse_util.unflatten_dict(selection, sep="/")
    if mesh is not None and rules is not None:
        shardings = match_rules(rules, abstract, mesh)
    else:
        first = SingleDeviceSharding(jax.local_devices()[0])
        whole = first if mesh is None else replicated(mesh)
        shardings = jax.tree.map(lambda _: whole, abstract)
    abstract = with_shardings(abstract, shardings)
    restored = read_params(step, abstract, average=average)
    for key in filter(None, subtree.split("/")):
        restored = restored[key]
    return restored


def read_params(
    step: epath.Path, abstract: Mapping[str, Any], *, average: bool = False
) -> dict[str, Any]:
    """Reads the parameters in `abstract`, ShapeDtypeStructs with shardings, and nothing else; with
    `average`, the averages of those that have one."""
    # The average has only the trained parameters; frozen ones come from `params`.
    averages = _shapes(step, AVERAGE) if average and has_average(step) else {}
    averaged = traverse_util.flatten_dict(averages).keys()
    items = {AVERAGE: {}, "params": {}}
    for path, leaf in traverse_util.flatten_dict(abstract).items():
        items[AVERAGE if path in averaged else "params"][path] = leaf
    return merge(
        *(
            read(step, traverse_util.unflatten_dict(leaves), item=item)
            for item, leaves in items.items()
            if leaves
        )
    )


def has_average(step: epath.Path) -> bool:
    """Whether a step holds the average of the trained parameters that is evaluated, complete."""
    return (step / AVERAGE).exists()


def read(step: epath.Path, abstract: Mapping[str, Any], *, item: str = "params") -> dict[str, Any]:
    """Reads the parameters in `abstract`, ShapeDtypeStructs with shardings, from an item of a step,
    and nothing else."""
    return ocp.PyTreeCheckpointer().restore(
        step / item,
        args=ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        ),
    )


def load_config(source: epath.PathLike) -> dict[str, Any]:
    """Reads the config of the checkpoint that `load` would load from `source`."""
    return read_json(find_step(source) / "config" / JSON)


def load_shapes(source: epath.PathLike) -> dict[str, Any]:
    """Returns ShapeDtypeStructs of all parameters of `source`, a nested dict; reads no array."""
    return _shapes(find_step(source))


def check_source(key: str, source: str) -> None:
    """Raises FileNotFoundError, naming the field `key`, unless the run at `source` has a finished
    checkpoint. An empty `source` passes, since it names no run.
    """
    with naming_field(key, source):
        if source:
            find_step(source)


@contextlib.contextmanager
def naming_field(key: str, source: str) -> Iterator[None]:
    """An OSError raised inside also names the field `key` and its value, `source`."""
    try:
        yield
    except OSError as error:
        raise type(error)(f"{key}={source!r}: {error}") from error


def find_moved(key: str, source: str, workdir: epath.PathLike) -> str:
    """Returns the run that a field of a pipeline's run names: `source` or, if that is missing and
    the pipeline was moved, the run of the same name in the pipeline's new folder, with a warning.

    Args:
      key: name of the field.
      source: its value. "", and one that is found nowhere, is returned as it is.
      workdir: folder of the pipeline's run that has the field.
    """
    if not source or absolute(source).exists():
        return source
    parts = epath.Path(source).parts
    for root in absolute(workdir).parents[:ABOVE]:
        if not (root / "config.json").exists():
            continue  # not a pipeline's folder: runs that happen to lie there are other runs
        for length in range(len(parts) - 1, 0, -1):
            moved = root.joinpath(*parts[-length:])
            with contextlib.suppress(FileNotFoundError):
                find_step(moved)
                logging.warning("%s=%r does not exist; %s is used", key, source, moved)
                return str(moved)
    return source


def warn_if_unfinished(source: epath.PathLike) -> None:
    """Warns if `source` is the workdir of a run without a result; converted weights are no run."""
    folder = absolute(source)
    if (folder / "config.json").exists() and not (folder / "result.json").exists():
        logging.warning(
            "%s is not finished; one of its checkpoints so far is used, and a later start may find "
            "another one",
            source,
        )


def find_step(source: epath.PathLike) -> epath.Path:
    """Returns a step's folder: `source` itself, or the newest finished one of the run there.

    Raises as `load`.
    """
    source = absolute(source)
    if "\\" in str(source):
        raise ValueError(
            f"{str(source)[:300]!r}: no checkpoint can be read there, since orbax treats a "
            "backslash in a path as a slash; rename the folder, or give a link to it"
        )
    # An explicit step is not checked against its run, so that any checkpoint can be loaded.
    if step_of(source) is not None and (source / "params").exists():
        return source
    if source.exists() and not source.is_dir():
        raise FileNotFoundError(f"{source} is a file; give a run's workdir, or a step in it")
    for folder in (source / FOLDER, source):
        if steps := own_steps(folder):
            return folder / str(steps[-1])
    problem = "has no finished checkpoint" if source.exists() else "does not exist"
    raise FileNotFoundError(
        f"{source} {problem}; give a run's workdir, its {FOLDER} folder, or a step in it"
    )


def common_step(source: epath.PathLike) -> epath.Path:
    """Returns `find_step` of process 0 in all processes, which must call this together: the newest
    step of a run that has just ended, or is still training, may not be the same for all of them."""
    folder = absolute(source)
    return folder / hosts.decide(lambda: str(find_step(folder).relative_to(folder)))


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns the absolute path, which orbax requires; bucket paths (`gs://...`) already are."""
    path = epath.Path(path)
    return path if in_bucket(path) else path.expanduser().resolve()


def refuse_pattern(path: epath.PathLike, name: str) -> None:
    """Raises ValueError for a folder that orbax cannot write checkpoints to.

    orbax globs for the files that it merges, with a pattern that begins with the folder's path.
    Special characters in the path would leave a checkpoint without its arrays. The target of a link
    does not matter, since orbax does not follow it.

    Args:
      path: the folder.
      name: its name in messages, for example "--workdir".
    """
    resolved = absolute(path)
    try:
        str(resolved).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{name}={str(path)[:300]!r} is not UTF-8, and orbax cannot write checkpoints there; "
            "give another folder"
        ) from None
    if special := sorted(set(PATTERN.findall(str(resolved)))):
        raise ValueError(
            f"{name}={str(path)[:300]!r}: checkpoints cannot be written below "
            f"{str(resolved)[:300]!r}, since orbax treats {' '.join(special)} in a path as "
            "patterns; give a folder without them, or a link to this one"
        )


def _shapes(step: epath.Path, item: str = "params") -> dict[str, Any]:
    metadata = ocp.PyTreeCheckpointHandler().metadata(step / item).tree
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata)
