"""The parameters of a run as a file of the original."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util

from common_jax import checkpoint
from common_jax.weights import Account, list_problems
from common_jax.weights.table import (
    Pretrained,
    Table,
    expected_tensors,
    list_differences,
    write,
)
from common_jax.workdir import freeze_stored
from m2mkd_jax.config import Config
from m2mkd_jax.families import kind_of
from m2mkd_jax.models import vit
from m2mkd_jax.pretrained.kinds import KINDS, Kind
from m2mkd_jax.stages import stage_name

# phase -> the kind of its parameters; of a student's, by the kind of the student.
KIND_OF_PHASE = {
    "pretrain_meta": "meta",
    "train_module": "module",
    "assemble": "teacher",
    "distill": "{student}_student",
    "end_to_end": "{student}",
    "few_shot": "{student}",
}


def kind_of_run(config: Config, tree: Mapping[str, Any]) -> str:
    """The kind of file that a run's parameters make.

    Args:
      config: of the run.
      tree: what its checkpoint holds, {role: {"stage_0": ...}}.
    """
    name = KIND_OF_PHASE[config.phase].format(student=kind_of(config.model))
    whole = len(tree.get("teacher", ())) == len(config.teacher.depths)
    return "teacher_module" if name == "teacher" and not whole else name


def load_run(source: epath.PathLike, *, stage: int | None = None) -> Pretrained:
    """The parameters of a run that one file of the original can hold; of a run that kept a running
    average, that average, as it was evaluated.

    Args:
      source: the run's workdir, or a step's folder.
      stage: the one that is meant, where the run has single modules.

    Raises:
      FileNotFoundError: when there is no finished checkpoint.
      ValueError: when it is not of m2mKD, or has several modules, or not this one; for parameters
        that are not of its config, all of which are named.
    """
    source = checkpoint.find_step(source)
    saved = checkpoint.load_config(source)
    if saved.get("phase") not in KIND_OF_PHASE:
        raise ValueError(
            f"{source} is no run of m2mKD: its config has phase={saved.get('phase')!r}"
        )
    config = freeze_stored(Config, saved, source)
    shapes = checkpoint.load_shapes(source)
    name = kind_of_run(config, shapes)
    if stage is not None and name == "teacher":
        name = "teacher_module"
    kind = KINDS[name]
    if kind.single:
        there = sorted(shapes[kind.role], key=lambda one: int(one.removeprefix("stage_")))
        chosen = there if stage is None else [stage_name(stage)]
        if len(chosen) != 1 or chosen[0] not in there:
            raise ValueError(
                f"{source} holds {', '.join(there)} of kind={name!r}, and a file holds one: give "
                "--config.module=K"
            )
        config = dataclasses.replace(config, module=chosen[0].removeprefix("stage_"))
        subtree, average = f"{kind.role}/{chosen[0]}", config.optim.ema > 0
        tree = {chosen[0]: checkpoint.load(source, subtree=subtree, average=average)}
    else:
        tree = checkpoint.load(source, subtree=kind.role, average=config.optim.ema > 0)
    shapes = _without_absent(kind.shapes(config, _stage(kind, config)), tree, kind.role, config)
    if problems := list_differences(tree, shapes):
        raise ValueError(f"{source} is not of its own config:{list_problems(problems)}")
    expected = expected_tensors(_table(kind, config), shapes)
    taken = [(n, f"{kind.role}/{path}", shape) for n, (path, shape) in expected.items()]
    params = {kind.role: jax.tree.map(np.asarray, dict(tree))}
    return Pretrained(name, config, params, Account(tuple(taken)), str(source))


def to_tensors(found: Pretrained) -> dict[str, np.ndarray]:
    """The tensors of a network, or of one stage under its own names, in float32."""
    kind = KINDS[found.kind]
    state = write(_table(kind, found.config), found.params[kind.role])
    return {name: np.asarray(x, np.float32, order="C") for name, x in state.items()}


def as_checkpoint(found: Pretrained, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The content of a file of the original, for `common_jax.weights.write_torch`; `state` is what
    `to_tensors` gives.

    A network lists its tensors under root names and, by stage, once more (`stages.<i>.X`, and in
    `model_stages`), and the files of a module name its place in the network; see the original's
    `utils.save_on_master` and `split_teacher.py`.
    """
    kind, config, state = KINDS[found.kind], found.config, dict(state)
    if kind.is_nac:
        return {"model": state, "model_stages": []} if kind.single else {"model": state}
    depths, stage = kind.depths(config), _stage(kind, config)
    if found.kind == "teacher_module":
        return {
            "model_name": _variant(config),
            "block_index": stage,
            "block_state_dict": state,
            "divided_depths": list(depths),
        }
    aliases = _table(kind, config).aliases
    listed = {alias: state[name] for alias, name in aliases.items() if name in state}
    stages = [{} for _ in range(1 if kind.single else len(depths))]
    for alias, array in listed.items():
        _, number, name = alias.split(".", 2)
        stages[int(number)][name] = array
    place = {"block_index": stage, "divided_depths": list(depths)} if kind.single else {}
    return {"model": state | listed, "model_stages": stages} | place


def _without_absent(
    shapes: Mapping[str, Any], tree: Mapping[str, Any], role: str, config: Config
) -> dict[str, Any]:
    """The shapes without parameters that a conversion left out, as config.sources.fresh says."""
    flat, there = (traverse_util.flatten_dict(one, sep="/") for one in (shapes, tree))
    fresh = config.sources.fresh
    kept = {
        path: shape
        for path, shape in flat.items()
        if path in there or not (fresh and re.fullmatch(fresh, f"{role}/{path}"))
    }
    return traverse_util.unflatten_dict(kept, sep="/")


def _table(kind: Kind, config: Config) -> Table:
    return kind.table(config, _stage(kind, config))


def _stage(kind: Kind, config: Config) -> int | None:
    return int(config.module) if kind.single else None


def _variant(config: Config) -> str:
    """The published name of the teacher; "" where it has none."""
    plain = dataclasses.replace(config.teacher, depths=(1,), remat=False, scan_layers=False)
    for name, (image_size, _, changes) in (vit.VARIANTS | vit.PRETRAINED).items():
        if image_size == config.data.image_size and vit.ViTConfig(depths=(1,), **changes) == plain:
            return name
    return ""
