"""Runs of a NAC: students distilled and merged, whole networks trained, stopped, resumed and
sharded."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import traverse_util
from meshes import one_device
from tiny import AUGMENT, NAC, OPTIM, SIZES, fill

import m2mkd_jax
from common_jax import checkpoint
from common_jax.checkpoint import Checkpoints
from common_jax.config import freeze, unfreeze
from common_jax.loop import RunConfig
from common_jax.mesh import MeshConfig, make_mesh
from common_jax.metrics import read_metrics
from common_jax.optim import OptimConfig
from common_jax.step import init_state
from m2mkd_jax.config import Config, EvaluationConfig, Recipe, SourcesConfig
from m2mkd_jax.models.vit import ViTConfig
from m2mkd_jax.nac import model
from m2mkd_jax.nac.graphs import PriorConfig
from m2mkd_jax.nac.kernel import KernelConfig
from m2mkd_jax.phases import end_to_end
from m2mkd_jax.phases.networks import meta_network, teacher_network
from m2mkd_jax.phases.pipeline import run_phase
from m2mkd_jax.regularizers import HingeConfig, MixtureConfig, RegularizersConfig

STILL = dataclasses.replace(OPTIM, lr=0.0, min_lr=0.0, weight_decay=0.0, steps=2)


def nac_config(phase: str, **changes) -> Config:
    """A run with three stages that logs and saves often."""
    vit = ViTConfig(depths=(1, 1, 1), **SIZES)
    config = Config(
        phase=phase,
        meta=vit,
        teacher=vit,
        model=NAC,
        regularizers=RegularizersConfig(
            hinge=HingeConfig(weight=0.1, weight_end=0.5, hinge=0.9),
            mixture=MixtureConfig(weight=0.01),
        ),
        evaluation=EvaluationConfig("sampled"),
        optim=OPTIM,
        augment=AUGMENT,
        drop_path=0.1,
        mesh=MeshConfig(data=1),
        run=RunConfig(log_every=2, compilation_cache=None),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """Workdirs of an untrained meta model and teacher."""
    folder, config = tmp_path_factory.mktemp("taught"), nac_config("distill")
    for role, network in (("meta", meta_network(config)), ("teacher", teacher_network(config))):
        state = init_state({role: fill(network.init)}, OptimConfig(), trainable=".*", metrics={})
        checkpoints = Checkpoints(folder / role, keep=1, best=None)
        checkpoints.save(state, step=int(state.step), config={}, metrics=None)
        checkpoints.close()
    return SourcesConfig(meta=str(folder / "meta"), teacher=str(folder / "teacher"))


@pytest.fixture(scope="module")
def pipeline(taught, tmp_path_factory):
    """A finished pipeline whose end-to-end run leaves everything as it was merged."""
    workdir = tmp_path_factory.mktemp("pipeline")
    recipe = Recipe(OPTIM, AUGMENT, 0.1)
    few_shot = dataclasses.replace(recipe, optim=dataclasses.replace(OPTIM, batch=8, steps=2))
    recipes = {
        "distill": dataclasses.replace(recipe, optim=dataclasses.replace(OPTIM, steps=2)),
        "end_to_end": dataclasses.replace(recipe, optim=STILL),
        "few_shot": few_shot,
    }
    run_phase(nac_config("pipeline", sources=taught, recipes=recipes), workdir, one_device())
    return workdir


def flat(workdir, subtree: str) -> dict[str, np.ndarray]:
    return traverse_util.flatten_dict(checkpoint.load(workdir, subtree=subtree), sep="/")


def test_given_meta_model_and_teacher_are_not_trained_again(pipeline):
    runs = {path.parent.name for path in pipeline.rglob("result.json")}
    assert runs == {"students", "end_to_end", "few_shot"}


def test_students_are_merged_into_the_whole_network(pipeline):
    whole = flat(pipeline / "end_to_end", "student")
    arrived = 0
    for stage in range(3):
        for name, array in flat(pipeline / "students", f"student/stage_{stage}").items():
            if "stitch" not in name:
                np.testing.assert_array_equal(whole[f"stage_{stage}/{name}"], array)
                arrived += 1
    assert arrived > 60


def test_warm_start_account_lists_left_and_fresh_parameters(pipeline):
    account = json.loads((pipeline / "end_to_end" / "warm_start.json").read_text())
    assert [entry["as"] for entry in account["taken"]] == [f"student/stage_{i}" for i in range(3)]
    left = {entry["name"].split("/")[2] for entry in account["left"]}
    assert left == {"pre_stitch", "post_stitch"}
    fresh = {entry["name"] for entry in account["fresh"]}
    assert "student/stage_1/attention/bandwidth" in fresh
    assert {name for name in fresh if not name.endswith("bandwidth")} == {
        f"student/graph/{name}" for name in flat(pipeline / "end_to_end", "student/graph")
    }


def test_mediators_start_from_the_prior_and_are_plotted(pipeline):
    folder = pipeline / "end_to_end"
    with np.load(folder / "prior.npz") as prior:
        start = prior["signatures"]
    kept = flat(folder, "student/graph/mediator")["signatures"]
    np.testing.assert_array_equal(kept, start)
    assert (folder / "connectivity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("spelling", ["tinyimnet", "tinynet"])
def test_spellings_of_student_dataset_are_equivalent(spelling):
    student = dataclasses.replace(NAC, students=spelling)
    assert student == dataclasses.replace(NAC, students="tinyimagenet")


def test_tinyimagenet_students_start_grid_and_pooling_from_scratch(pipeline, tmp_path):
    sources = SourcesConfig(students=(str(pipeline / "students"),))
    student = dataclasses.replace(NAC, students="tinyimagenet", learn_signatures=False)
    config = nac_config("end_to_end", model=student, sources=sources, precision="bfloat16")
    result = end_to_end.run(config, tmp_path, one_device())
    assert result["skipped"] == 0
    account = json.loads((tmp_path / "warm_start.json").read_text())
    fresh = {entry["name"] for entry in account["fresh"]}
    assert {"student/stage_0/tokenizer/grid", "student/stage_2/pooling/head/kernel"} <= fresh
    with np.load(tmp_path / "prior.npz") as prior:
        start = prior["signatures"]
    mediator = flat(tmp_path, "student/graph/mediator")
    np.testing.assert_array_equal(mediator["signatures"], start)


def test_whole_network_is_trained_further_with_its_latents(pipeline, tmp_path):
    source = pipeline / "end_to_end"
    config = nac_config("end_to_end", optim=STILL, sources=SourcesConfig(students=(str(source),)))
    end_to_end.run(dataclasses.replace(config, seed=config.seed + 1), tmp_path, one_device())
    account = json.loads((tmp_path / "warm_start.json").read_text())
    assert account["fresh"] == account["left"] == []
    before, after = flat(source, "student"), flat(tmp_path, "student")
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


def test_few_shot_trains_only_the_head(pipeline):
    before, after = (flat(pipeline / run, "student") for run in ("end_to_end", "few_shot"))
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {"stage_2/pooling/head/kernel", "stage_2/pooling/head/bias"}
    assert after["stage_2/pooling/head/bias"].shape == (8,)


def test_networks_are_loaded_from_a_workdir(pipeline):
    images = np.zeros((2, 8, 8, 1), np.float32)
    apply, params = m2mkd_jax.load_model(pipeline / "end_to_end")
    assert jax.jit(apply)(params, images).shape == (2, 10)
    apply, params = m2mkd_jax.load_model(pipeline / "students", module=0)
    assert jax.jit(apply)(params, images).shape == (2, 1, 16)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run on one device, for an epoch and four steps."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    config = nac_config("end_to_end", optim=dataclasses.replace(OPTIM, steps=26))
    end_to_end.run(config, workdir, one_device())
    return config, workdir


def test_stopped_run_resumes_with_the_same_metrics(alone, tmp_path):
    config, workdir = alone
    resumed = tmp_path / "run"
    shutil.copytree(workdir, resumed)
    (resumed / "result.json").unlink()
    steps = checkpoint.finished_steps(resumed / "checkpoints")
    assert len(steps) > 1
    shutil.rmtree(resumed / "checkpoints" / str(steps[-1]))
    end_to_end.run(config, resumed, one_device())
    for name in ("metrics.jsonl", "result.json"):
        assert (resumed / name).read_bytes() == (workdir / name).read_bytes()
    one, two = (flat(path, "student") for path in (workdir, resumed))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_eight_devices_match_one(alone, tmp_path):
    config, workdir = alone
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    end_to_end.run(dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=4)), tmp_path, mesh)
    one, eight = (
        [
            line["train/loss"]
            for line in read_metrics(path / "metrics.jsonl")
            if "train/loss" in line
        ]
        for path in (workdir, tmp_path)
    )
    assert len(one) > 5
    np.testing.assert_allclose(eight, one, rtol=2e-5)
    params = checkpoint.load(tmp_path, mesh=mesh, rules=model.PARTITION_RULES)["student"]
    kernel = params["stage_1"]["attention"]["query"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (4, 16)


def test_changed_config_is_refused_before_touching_the_prior(alone):
    config, workdir = alone
    before = (workdir / "prior.npz").read_bytes()
    other = dataclasses.replace(NAC, prior=PriorConfig("hypercube", steps=3))
    with pytest.raises(ValueError, match="ring_of_cliques' -> 'hypercube'"):
        end_to_end.run(dataclasses.replace(config, model=other), workdir, one_device())
    assert (workdir / "prior.npz").read_bytes() == before


def test_prior_not_fitting_the_mediators_is_refused(tmp_path):
    other = dataclasses.replace(NAC, prior=PriorConfig("grid", dims=(3, 3)))
    with pytest.raises(ValueError, match=r"config\.model\.prior\.dims"):
        end_to_end.run(nac_config("end_to_end", model=other), tmp_path / "run", one_device())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mediator": 4}, r"config\.model has no field 'mediator' \(did you mean 'mediators'"),
        ({"kind": "nak"}, r"config\.model\.kind='nak' must be one of \['vmoe', 'nac'\]"),
        ({"kernel": {"truncate": 1}}, r"config\.model\.kernel has no field 'truncate'"),
    ],
)
def test_misspelt_fields_of_the_student_are_named(change, said):
    config = unfreeze(nac_config("end_to_end")).to_dict()
    config["model"] |= change
    with pytest.raises(ValueError, match=said):
        freeze(Config, config)


def test_sampled_edges_need_noise_in_evaluation():
    student = dataclasses.replace(NAC, kernel=KernelConfig(evaluation="sample"))
    with pytest.raises(
        ValueError, match=r"^model\.kernel\.evaluation=.* evaluation\.noise='mean' draws nothing"
    ):
        nac_config("end_to_end", model=student, evaluation=EvaluationConfig("mean"))
