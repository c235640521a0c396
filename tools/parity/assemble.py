"""Runner for assembling real checkpoints with `common_jax.weights.take`."""

import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import SingleDeviceSharding

from common_jax.checkpoint import Checkpoints
from common_jax.optim import OptimConfig, decay_mask
from common_jax.state import merge
from common_jax.step import init_state
from common_jax.weights import Allowance, Origin, take
from m2mkd_jax.stages import stage_name
from parity.cases import Case, Comparison, compare_lists, compare_trees
from parity.names import read_stage, write_network, write_stage
from parity.networks import build_vit, build_vmoe, load_network, to_images

BUILDERS = {"vit": build_vit, "vmoe": build_vmoe}
ROLE = "network"


def run_assemble(case: Case) -> Iterator[Comparison]:
    """Assembles stage i from checkpoint i: every tensor, the dropped tensors, the logits."""
    sizes, arrays = case.config["config"], case.arrays
    full = sizes["full"]
    network = BUILDERS[sizes["kind"]](full)
    before = load_network(arrays.below("params/before/"), full)
    checkpoints = [_load_checkpoint(case, i) for i in range(len(network))]
    for i, stages in enumerate(checkpoints):
        yield from _compare_structure(case, i, stages)

    with tempfile.TemporaryDirectory() as folder:
        origins = []
        for i, stages in enumerate(checkpoints):
            workdir = pathlib.Path(folder) / str(i)
            _save(workdir, {"module": stages})
            origins.append(Origin(workdir, f"module/{stage_name(i)}", f"{ROLE}/{stage_name(i)}"))
        here = SingleDeviceSharding(jax.devices()[0])
        shapes = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), {ROLE: before}
        )
        own = {ROLE: {stage_name(i): checkpoints[i][stage_name(i)] for i in range(len(network))}}
        missing = _paths(shapes) - _paths(own)
        # The original loads tensors with matching names and silently drops the rest.
        fresh = [Allowance(re.escape(path), "in no checkpoint") for path in sorted(missing)]
        start = take(
            shapes, origins, leave=(Allowance(".*", "no place for it"),), fresh=tuple(fresh)
        )
    assembled = merge(before, start.params.get(ROLE, {}))
    depths = full["divided_depths"]
    state = write_network(assembled, depths=depths)
    want = arrays.below("outputs/assembled/")
    yield from compare_trees("outputs/assembled/", state, want, case.tolerance("assembled"))
    logits, _ = network.apply(assembled, to_images(arrays["inputs/images"]))
    yield "outputs/logits", logits, arrays["outputs/logits"], *case.tolerance("logits")

    left = {entry["name"] for entry in start.account["left"]}
    fresh = {entry["name"] for entry in start.account["fresh"]}
    for entry in case.config["per_stage_report"]:
        stage = stage_name(entry["stage"])
        dropped = _names(own[ROLE][stage], f"{ROLE}/{stage}/", left)
        yield compare_lists(f"{stage}/dropped", dropped, entry["silently_dropped"])
        at_init = _names(before[stage], f"{ROLE}/{stage}/", fresh)
        yield compare_lists(f"{stage}/left_at_init", at_init, entry["left_at_init"])
    old = write_network(before, depths=depths)
    unchanged = sorted(name for name in state if np.array_equal(state[name], old[name]))
    expected = sorted(case.config["parameters_not_changed_by_assembly"])
    yield compare_lists("parameters_not_changed_by_assembly", unchanged, expected)


def _load_checkpoint(case: Case, i: int) -> dict[str, Any]:
    """Checkpoint i by stage; a student's only stage is stage i of the whole network."""
    sizes = case.config["config"]["incubated"][i]
    keys = case.config["checkpoint_structure"][i]["model_stages_keys"]
    stages = {}
    for j in range(len(keys)):
        state = case.arrays.below(f"params/ckpt_{i}/model_stages/{j}/")
        name = stage_name(i if len(keys) == 1 else j)
        stages[name] = read_stage(state, heads=sizes["num_heads"])
    return stages


def _compare_structure(case: Case, i: int, stages: Mapping[str, Any]) -> Iterator[Comparison]:
    """Names in the checkpoint, and the number of parameters with weight decay."""
    structure = case.config["checkpoint_structure"][i]
    states = [write_stage(stage) for stage in stages.values()]
    for j, (state, names) in enumerate(zip(states, structure["model_stages_keys"], strict=True)):
        yield compare_lists(f"ckpt_{i}/stage {j} names", state, names)
    count = sum(len(state) for state in states)
    yield f"ckpt_{i}/model_key_count", 2 * count, structure["model_key_count"], 0, 0
    mask = decay_mask({ROLE: stages}, OptimConfig.no_decay)[ROLE]
    full = jax.tree.map(lambda decays, leaf: np.full(leaf.shape, decays), mask, dict(stages))
    decays = [a.all() for stage in full.values() for a in write_stage(stage).values()]
    groups = [len(decays) - sum(decays), sum(decays)]
    yield f"ckpt_{i}/group sizes", groups, structure["optimizer_param_group_sizes"], 0, 0


def _save(workdir: pathlib.Path, params: Mapping[str, Any]) -> None:
    """Saves a finished checkpoint of `params` in a run's workdir."""
    state = init_state(params, OptimConfig(), trainable=".*", metrics={})
    checkpoints = Checkpoints(workdir, keep=1, best=None)
    checkpoints.save(state, step=int(state.step), config={}, metrics=None)
    checkpoints.close()


def _paths(tree: Mapping[str, Any]) -> set[str]:
    return set(traverse_util.flatten_dict(tree, sep="/"))


def _names(stage: Mapping[str, Any], prefix: str, paths: set[str]) -> list[str]:
    """The original's names of the stage's parameters that are in `paths`."""
    flat = traverse_util.flatten_dict(stage, sep="/")
    chosen = {path: leaf for path, leaf in flat.items() if prefix + path in paths}
    return list(write_stage(traverse_util.unflatten_dict(chosen, sep="/")))
