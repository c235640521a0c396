"""`PROGRAM show RUN_OR_CONFIG`: the resolved config with descriptions of its fields, the
parameters, and the FLOPs of a step."""

import argparse
import dataclasses
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from common_jax import checkpoint
from common_jax.command_line import (
    System,
    check_system,
    read_config_file,
    read_settings,
    set_field,
)
from common_jax.commands.field_docs import Field, list_fields
from common_jax.commands.output import format_table
from common_jax.commands.plan.flops import UnknownLength
from common_jax.commands.plan.steps import step_flops
from common_jax.config import freeze, unfreeze
from common_jax.mesh import MeshConfig, make_mesh, match_rules
from common_jax.optim import OptimConfig
from common_jax.state import partition
from common_jax.task import Task
from common_jax.workdir import freeze_stored, read_json

WIDTH = 100  # columns


@dataclasses.dataclass(frozen=True)
class Training:
    """One run of a config: its name, task, and optimizer settings."""

    name: str
    task: Task
    optim: OptimConfig


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a package contributes to `show`.

    Attributes:
      system: the system that its configs belong to.
      config: the dataclass of its configs.
      trainings: (config, mesh) -> the config's runs, several for a pipeline.
    """

    system: System
    config: type
    trainings: Callable[[Any, Mesh], Iterable[Training]]


def show(args: argparse.Namespace, subject: Subject) -> None:
    """Prints everything about a run or a config."""
    config = read(_source(args), read_settings(args.rest), subject)
    fields = [field for field in list_fields(config) if args.only in field.path]
    print("\n".join(map(format_field, fields)))
    mesh = mesh_of(config.mesh)
    for training in subject.trainings(config, mesh):
        print(f"\n{describe_training(training, mesh, only=args.only)}", flush=True)


def _source(args: argparse.Namespace) -> str:
    given = [source for source in (args.source, args.config) if source is not None]
    if len(given) != 1:
        raise ValueError(
            "show takes one run or config, such as WORKDIR or FILE.py:ARGUMENT=VALUE,..., and got "
            f"{' and '.join(given) or 'none'}"
        )
    return given[0]


def read(source: str, settings: Mapping[str, str], subject: Subject) -> Any:
    """The frozen config of a run or a config file, with fields set from text.

    Raises:
      ValueError, OSError: if there is none, or it belongs to another system.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        file = folder / "config.json"
        saved = read_json(file) if file.exists() else checkpoint.load_config(folder)
        check_system(saved, subject.system, source)
        config = unfreeze(freeze_stored(subject.config, saved, source))
    else:
        if ".py" not in source:
            raise FileNotFoundError(
                f"{source} does not exist; give a run's workdir, or a config, FILE.py:ARGUMENTS"
            )
        config = read_config_file(source)
        check_system(config, subject.system, source)
    for path, text in settings.items():
        set_field(config, path, text)
    return freeze(subject.config, config)


def mesh_of(config: MeshConfig) -> Mesh:
    """The config's mesh on the devices here or, if it does not fit them, one over `data` alone:
    partition specs are the same on both."""
    try:
        return make_mesh(config)
    except ValueError:
        return make_mesh(MeshConfig())


def format_field(field: Field) -> str:
    """A field's path and value, its default if different, its description and its choices."""
    default = field.default
    other = default is not dataclasses.MISSING and default != field.value
    line = f"{field.path} = {field.value!r}" + (f"   (default {default!r})" if other else "")
    choices = f"One of {', '.join(map(repr, field.choices))}." if len(field.choices) > 1 else ""
    text = f"{field.meaning} {choices}".strip()
    meaning = textwrap.fill(text, WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 4)
    return f"{line}\n{meaning}" if text else line


def describe_training(training: Training, mesh: Mesh, *, only: str = "") -> str:
    """A table of a run's parameters, and the FLOPs of its step."""
    task = training.task
    params = jax.eval_shape(task.init, jax.random.key(0))
    trained, frozen = partition(params, task.trainable)
    shardings = match_rules(task.rules, params, mesh)
    rows = list_parameters(trained, shardings, "trained") + list_parameters(
        frozen, shardings, "frozen"
    )
    helpers = jax.tree.map(lambda leaf: leaf.sharding, dict(task.helpers))
    rows += list_parameters(task.helpers, helpers, "helper")
    table = format_table(
        ("parameters", "use", "shape", "type", "split over", "arrays", "numbers"),
        [row for row in rows if only in row[0]],
    )
    try:
        flops = step_flops(task, training.optim)
        cost = (
            f"{flops.model:.4g} FLOPs of products per step of {training.optim.batch} examples"
            + (f", and {flops.again:.4g} recomputed" if flops.again else "")
        )
    except UnknownLength as error:
        cost = f"FLOPs per step unknown: {error}"
    return (
        f"{training.name}: {count(trained):,} parameters trained, {count(frozen):,} frozen, "
        f"{count(task.helpers):,} of other networks\n{cost}\n\n{table}"
    )


def count(params: Any) -> int:
    """The total number of elements in all arrays."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def list_parameters(params: Mapping[str, Any], shardings: Any, use: str) -> list[tuple[str, ...]]:
    """One row per parameter; parameters of the same shape whose paths differ only in numbers share
    a row."""
    placed = traverse_util.flatten_dict(dict(shardings), sep="/")
    groups: dict[tuple[str, ...], list[int]] = {}
    for path, leaf in traverse_util.flatten_dict(dict(params), sep="/").items():
        spec = placed[path].spec
        axes = ["+".join(axis) if isinstance(axis, tuple) else axis or "-" for axis in spec]
        shape = " x ".join(map(str, leaf.shape)) or "scalar"
        key = re.sub(r"\d+", "*", path), use, shape, leaf.dtype.name, ", ".join(axes) or "none"
        groups.setdefault(key, []).append(count(leaf))
    return [(*key, str(len(sizes)), f"{sum(sizes):,}") for key, sizes in groups.items()]
