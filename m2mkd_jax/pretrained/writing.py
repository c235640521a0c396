"""Converting the parameters of a run to a file of the original."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util

from common_jax import checkpoint
from common_jax.weights import Account, list_problems
from common_jax.weights.table import Pretrained, expected_tensors, list_differences, write
from common_jax.workdir import freeze_stored
from m2mkd_jax.config import Config
from m2mkd_jax.phases import PHASES
from m2mkd_jax.phases.networks import SECTIONS, family_of_role
from m2mkd_jax.pretrained.kinds import KINDS, Kind
from m2mkd_jax.pretrained.reading import without_fresh
from m2mkd_jax.stages import stage_name, stage_number


def kind_of_run(config: Config, tree: Mapping[str, Any], *, single: bool = False) -> str:
    """The kind of file for a run's parameters `tree`, {role: {"stage_0": ...}}, or for a `single`
    stage of them. Raises ValueError if networks of its family have no published names."""
    role = PHASES[config.phase].role
    family = family_of_role(config, role)
    if family.files is None:
        raise ValueError(
            f"config.{SECTIONS[role]} is a {family.config.__name__}, and such networks have no "
            "published tensor names (`files` in the record of their family), so a run of them "
            "cannot be exported or converted"
        )
    alike = [name for name, kind in KINDS.items() if kind.role == role and kind.family is family]
    # A phase that has no kinds of its own trains a whole network.
    own = [name for name in alike if KINDS[name].phase == config.phase] or [
        name for name in alike if not KINDS[name].form.single
    ]
    # A run of some modules has fewer stages than its network.
    single |= len(tree.get(role, ())) < len(KINDS[own[0]].depths(config))
    return min(own, key=lambda name: KINDS[name].form.single != single)


def load_run(source: epath.PathLike, *, stage: int | None = None) -> Pretrained:
    """The parameters of a run that fit into one file of the original; if the run averages its
    parameters, the averages, as in evaluation.

    Args:
      source: the run's workdir, or a step's folder.
      stage: which stage to take, if the run has several modules, or to cut one from a teacher.

    Raises:
      FileNotFoundError: if there is no finished checkpoint.
      ValueError: if the run is not of m2mKD, has several modules and `stage` is none of them, or
        has parameters that do not match its own config; the message names all of these.
    """
    source = checkpoint.find_step(source)
    saved = checkpoint.load_config(source)
    if saved.get("phase") not in PHASES:
        raise ValueError(
            f"{source} is not a run of m2mKD: its config has phase={saved.get('phase')!r}"
        )
    config = freeze_stored(Config, saved, source)
    stored = checkpoint.load_shapes(source)
    name = kind_of_run(config, stored, single=stage is not None)
    kind, stages = KINDS[name], ()
    if stage is not None and not kind.form.single:
        raise ValueError(
            f"{source} is of kind={name!r}, whose files hold a whole network: do not give a "
            f"module, here {stage}"
        )
    if kind.form.single:
        there = sorted(stored[kind.role], key=stage_number)
        stages = there if stage is None else [stage_name(stage)]
        if len(stages) != 1 or stages[0] not in there:
            raise ValueError(
                f"{source} holds {', '.join(there)} of kind={name!r}, but a file holds only one: "
                "give its number (export: --module=K; tools/convert_weights.py: --config.module=K)"
            )
        config = dataclasses.replace(config, module=str(stage_number(stages[0])))
    tree = checkpoint.load(source, subtree="/".join((kind.role, *stages)), average=True)
    # A stage is loaded without its name, which tables and shapes expect.
    tree = {stages[0]: tree} if stages else tree
    # What config.sources.fresh names, a conversion leaves out, but a run initialises it and has it.
    there = traverse_util.flatten_dict(tree, sep="/")
    shapes, _ = without_fresh(kind.shapes(config, _stage(kind, config)), kind, config, there)
    if problems := list_differences(tree, shapes):
        raise ValueError(f"{source} does not match its own config:{list_problems(problems)}")
    expected = expected_tensors(kind.table(config, _stage(kind, config)), shapes)
    taken = [(n, f"{kind.role}/{path}", shape) for n, (path, shape) in expected.items()]
    params = {kind.role: jax.tree.map(np.asarray, dict(tree))}
    return Pretrained(name, config, params, Account(tuple(taken)), str(source))


def to_tensors(found: Pretrained) -> dict[str, np.ndarray]:
    """The tensors of a network, or of a single stage under the stage's own names, in float32."""
    kind = KINDS[found.kind]
    state = write(kind.table(found.config, _stage(kind, found.config)), found.params[kind.role])
    return {name: np.asarray(x, np.float32, order="C") for name, x in state.items()}


def as_checkpoint(found: Pretrained, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The content of a file of the original, for `common_jax.weights.write_torch`; `state` comes
    from `to_tensors`.

    Files of a network list its tensors under root names and again by stage (`stages.<i>.X`, and in
    `model_stages`); files of a module state its place in the network. See the original's
    `utils.save_on_master` and `split_teacher.py`. Files of a NAC do not list tensors by stage.
    """
    kind, config, state = KINDS[found.kind], found.config, dict(state)
    depths, single = kind.depths(config), kind.form.single
    place = {"block_index": _stage(kind, config), "divided_depths": list(depths)} if single else {}
    if kind.form.cut:
        return {"model_name": _variant(kind, config), "block_state_dict": state} | place
    aliases = kind.table(config, _stage(kind, config)).aliases
    if not aliases:
        # Tensors of NACs are not listed by stage: the original's students have an empty list, whole
        # NACs none.
        return {"model": state} | ({"model_stages": []} if single else {})
    listed = {alias: state[name] for alias, name in aliases.items() if name in state}
    stages = [{} for _ in range(1 if single else len(depths))]
    for alias, array in listed.items():
        _, number, name = alias.split(".", 2)
        stages[int(number)][name] = array
    return {"model": state | listed, "model_stages": stages} | place


def _stage(kind: Kind, config: Config) -> int | None:
    return int(config.module) if kind.form.single else None


def _variant(kind: Kind, config: Config) -> str:
    """The published name of the network; "" if it has none."""
    # A name stands for the sizes, not for how a network is cut or computed.
    plain = {"depths": (1,), "attention": "auto", "remat": False, "scan_layers": False}
    sizes = dataclasses.replace(getattr(config, kind.section), **plain)
    for name, (image_size, _, changes) in kind.family.files.variants.items():
        if image_size == config.data.image_size and type(sizes)(depths=(1,), **changes) == sizes:
            return name
    return ""
