"""Several modules in one program: each computes, learns and saves what it would alone."""

import dataclasses
import json
import zlib

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax import numpy as jnp
from meshes import one_device
from same import assert_close
from tiny import NAC, tiny_config

import m2mkd_jax
from common_jax import checkpoint
from common_jax.checkpoint import Checkpoints
from common_jax.commands.plan.flops import count_flops
from common_jax.commands.plan.steps import step_flops
from common_jax.mesh import MeshConfig, make_mesh, match_rules, to_devices
from common_jax.metrics import read_metrics
from common_jax.optim import OptimConfig
from common_jax.state import step_rngs
from common_jax.step import init_state
from m2mkd_jax.config import PRECISIONS, Config, ModuleDistillConfig, SourcesConfig
from m2mkd_jax.data.augment import AugmentConfig
from m2mkd_jax.main import results_table
from m2mkd_jax.phases.networks import meta_network, teacher_network
from m2mkd_jax.phases.pipeline import describe, run_phase

# Depths of networks whose meta model has the depths FLAT.
FLAT, EVEN, RAGGED = (1, 1, 1), (2, 2, 2), (2, 1, 1)


def modular(phase: str, *, student="vmoe", depths=FLAT, **changes) -> Config:
    """A run of all three modules together."""
    config = tiny_config(phase)
    vmoe = dataclasses.replace(config.model, depths=depths)
    return dataclasses.replace(
        config,
        teacher=dataclasses.replace(config.teacher, depths=depths),
        model=NAC if student == "nac" else vmoe,
        drop_path=0.3,
        **changes,
    )


def alone(config: Config) -> list[Config]:
    return [dataclasses.replace(config, module=str(stage)) for stage in range(3)]


def make_task(config: Config, *, mesh=None):
    return describe(config, mesh or one_device()).task(steps_per_epoch=10)


def numbers(shapes):
    """Normal draws for parameters, the same for the same path."""
    flat = traverse_util.flatten_dict(shapes, sep="/")
    rngs = {path: np.random.default_rng(zlib.crc32(path.encode())) for path in flat}
    values = {path: 0.3 * rngs[path].normal(size=leaf.shape) for path, leaf in flat.items()}
    return traverse_util.unflatten_dict(values, sep="/")


def attend(query, key, value, mask):
    assert mask is None
    logits = jnp.einsum("BTHK,BSHK->BHTS", query, key) / np.sqrt(query.shape[-1])
    return jnp.einsum("BHTS,BSHK->BTHK", jax.nn.softmax(logits), value)


def first_step(config: Config, *, mesh=None):
    """A run's loss function, and its arguments in the first step."""
    task, rng = make_task(config, mesh=mesh), np.random.default_rng(0)
    batch = {
        name: rng.integers(10, size=part.shape).astype(part.dtype)
        for name, part in task.batch.items()
    }
    params = numbers(jax.eval_shape(task.init, jax.random.key(0)))
    rules = task.rules
    if mesh is not None:
        batch, params = (
            to_devices(batch, mesh),
            jax.device_put(params, match_rules(rules, params, mesh)),
        )
    rngs = step_rngs(0, 0, task.streams)
    return task.loss, (params, numbers(task.helpers), batch, rngs, np.int32(0))


def differentiate(config: Config, *, mesh=None):
    """Loss, metrics and gradients by path in a run's first step."""
    loss, arguments = first_step(config, mesh=mesh)
    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(*arguments)
    flat = traverse_util.flatten_dict(gradient, sep="/")
    return float(value), metrics, {path: np.asarray(leaf) for path, leaf in flat.items()}


@pytest.mark.parametrize(
    ("phase", "student", "depths"),
    [
        ("distill", "vmoe", RAGGED),
        ("distill", "nac", FLAT),
        ("train_module", "vmoe", RAGGED),
    ],
)
def test_gradients_match_single_module_runs(phase, student, depths, monkeypatch):
    monkeypatch.setitem(PRECISIONS, "float64", np.float64)
    # jax's own attention computes logits in float32 for any input.
    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    config = modular(phase, student=student, depths=depths)
    config = dataclasses.replace(config, precision="float64", augment=AugmentConfig(smoothing=0.1))
    with jax.enable_x64(True):
        total, metrics, together = differentiate(config)
        own = [differentiate(one) for one in alone(config)]
        loss, arguments = first_step(dataclasses.replace(config, drop_path=0.0))
        still = float(jax.jit(loss)(*arguments)[0])
    np.testing.assert_allclose(total, sum(value for value, _, _ in own), 1e-10)
    for stage, (_, alone_metrics, gradient) in enumerate(own):
        np.testing.assert_allclose(
            metrics[f"module_{stage}/label_loss"], alone_metrics["label_loss"], 1e-10
        )
        for path, wanted in gradient.items():
            assert wanted.dtype == np.float64
            error = np.abs(together.pop(path) - wanted).max()
            assert error <= 1e-10 * np.abs(wanted).max(), path
    assert not together and total != still


@pytest.mark.parametrize("phase", ["distill", "train_module"])
def test_meta_model_stages_run_once_for_all_modules(phase):
    config = modular(phase, depths=EVEN)
    flops = lambda config: step_flops(make_task(config), config.optim).model  # noqa: E731
    meta = meta_network(config)
    shapes = jax.eval_shape(meta.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((config.optim.micro_batch, 8, 8, 1), np.float32)
    first = count_flops(lambda params, x: meta.apply(params, x, stop=1)[0], shapes, images).model
    # Modules 1 and 2 both need the first stage; no other stage is needed more than once.
    assert sum(map(flops, alone(config))) - flops(config) == first


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Workdirs of an untrained meta model and teacher."""
    folder, config = tmp_path_factory.mktemp("taught"), modular("distill")
    for role, network in (("meta", meta_network(config)), ("teacher", teacher_network(config))):
        params = {role: numbers(jax.eval_shape(network.init, jax.random.key(0)))}
        params = jax.tree.map(np.float32, params)
        checkpoints = Checkpoints(folder / role, keep=1, best=None)
        state = init_state(params, OptimConfig(), trainable=".*", metrics={})
        checkpoints.save(state, step=int(state.step), config={}, metrics=None)
        checkpoints.close()
    return SourcesConfig(meta=str(folder / "meta"), teacher=str(folder / "teacher"))


@pytest.fixture(scope="module")
def together(sources, tmp_path_factory):
    """The folder and config of a run of all students, strongly clipped."""
    config = modular("distill", sources=sources)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, clip=1e-3))
    workdir = tmp_path_factory.mktemp("together")
    run_phase(config, workdir, one_device())
    return workdir, config


def test_run_matches_single_module_runs(together, tmp_path):
    workdir, config = together
    lines = read_metrics(workdir / "metrics.jsonl")
    for stage in (0, 2):  # the gradient of the one in between is compared above
        one = alone(config)[stage]
        folder, name = tmp_path / str(stage), f"student/stage_{stage}"
        run_phase(one, folder, one_device())
        wanted = checkpoint.load(folder, subtree=name)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
            checkpoint.load(workdir, subtree=name),
            wanted,
        )
        for line, own in zip(lines, read_metrics(folder / "metrics.jsonl"), strict=True):
            for metric, together in {
                "train/distillation": f"train/module_{stage}/distillation",
                "train/gradient_norm": f"train/{name}/gradient_norm",
                "test/accuracy": f"test/module_{stage}/accuracy",
            }.items():
                if metric in own:
                    np.testing.assert_allclose(line[together], own[metric], 1e-4)


def test_overall_metrics_are_means_over_modules(together):
    last = read_metrics(together[0] / "metrics.jsonl")[-1]
    own = [last[f"test/module_{stage}/accuracy"] for stage in range(3)]
    np.testing.assert_allclose(last["test/accuracy"], np.mean(own), 1e-6)


def test_load_model_selects_module_by_number(together):
    workdir, _ = together
    apply, params = m2mkd_jax.load_model(workdir, module=1)
    assert list(params) == ["stage_1"]
    assert jax.jit(apply)(params, jnp.zeros((8, 5, 16))).shape == (8, 5, 16)
    for wrong in (None, 3):
        with pytest.raises(ValueError, match=rf"module={wrong}: .* trained modules \[0, 1, 2\]"):
            m2mkd_jax.load_model(workdir, module=wrong)


def test_without_distillation_no_teacher_is_loaded_or_run():
    """With alpha 0 the teacher runs, but its term counts nothing."""
    kinds = ("none", "soft")
    none, zero = (modular("distill", distill=ModuleDistillConfig(x, alpha=0.0)) for x in kinds)
    assert list(make_task(none).helpers) == ["meta"]
    (value, _, gradient), (same, _, wanted) = differentiate(none), differentiate(zero)
    assert value == pytest.approx(same, rel=1e-6)
    assert gradient.keys() == wanted.keys()
    assert_close([*gradient.values()], [*wanted.values()], 1e-5)


def test_pairs_at_once_limits_modules_per_program(sources, tmp_path):
    config = modular("distill", sources=sources, distill=ModuleDistillConfig(pairs_at_once=2))
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps=1))
    run_phase(config, tmp_path, one_device())
    assert {path.parent.name for path in tmp_path.rglob("result.json")} == {
        "module_0+1",
        "module_2",
    }
    with pytest.raises(ValueError, match=r"has 2 programs: name .* \['0\+1', '2'\]"):
        describe(config, one_device())
    with pytest.raises(ValueError, match=r"^pairs_at_once=-1 must be at least 0"):
        ModuleDistillConfig(pairs_at_once=-1)


def test_all_programs_are_checked_before_the_first_one(tmp_path):
    """The second program has only module 2; the first would even miss the meta model's weights."""
    config = modular("train_module", distill=ModuleDistillConfig(pairs_at_once=2))
    config = dataclasses.replace(
        config, run=dataclasses.replace(config.run, best="test/module_0/accuracy")
    )
    with pytest.raises(ValueError, match=r"best='test/module_0/accuracy' is never measured"):
        run_phase(config, tmp_path / "run", one_device())
    assert not (tmp_path / "run").exists()


def test_duplicate_modules_are_refused():
    with pytest.raises(ValueError, match=r"'0\+0' must be .* each once"):
        modular("distill", module="0+0")


def test_gradients_match_on_mesh():
    config, gradients = modular("distill"), []
    for sizes in (MeshConfig(data=1), MeshConfig(data=2, fsdp=2, expert=2)):
        mesh = make_mesh(sizes, jax.devices()[: sizes.data * sizes.fsdp * sizes.expert])
        with jax.set_mesh(mesh):
            gradients.append(differentiate(config, mesh=mesh)[2])
    for path, wanted in gradients[0].items():
        error = np.abs(gradients[1][path] - wanted).max()
        assert error <= 1e-4 * np.abs(wanted).max(), path


def test_results_table_has_a_row_per_module(tmp_path):
    result = {"steps": 5, "test/accuracy": 0.3, "test/loss": 1.5}
    for stage in (10, 9):
        result |= {f"test/module_{stage}/{term}": stage / 100 for term in ("accuracy", "loss")}
    (tmp_path / "students").mkdir()
    (tmp_path / "students" / "result.json").write_text(json.dumps(result))
    assert results_table(tmp_path, ["students"]).rows == (
        ("students", "5", "30.0 %", "1.500"),
        ("students, module 9", "5", "9.0 %", "0.090"),
        ("students, module 10", "5", "10.0 %", "0.100"),
    )
