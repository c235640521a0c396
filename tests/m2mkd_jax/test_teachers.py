"""Students that several teachers teach: who teaches whom, what runs once, and what joins networks of
other widths and patches."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax import numpy as jnp
from meshes import one_device
from tiny import NAC, fill, tiny_config, tiny_pipeline

from common_jax import checkpoint
from common_jax.commands.plan.steps import step_flops
from common_jax.config import unfreeze
from common_jax.workdir import read_json
from m2mkd_jax.config import Config, DistillConfig, InitConfig, SourcesConfig
from m2mkd_jax.main import check_places
from m2mkd_jax.models.bridge import Layout, convert_tokens
from m2mkd_jax.phases.fields import check_sources
from m2mkd_jax.phases.networks import meta_network, stitched_modules, teacher_network
from m2mkd_jax.phases.pipeline import chosen_phases, describe, run_phase
from m2mkd_jax.phases.teachers import load_teachers
from m2mkd_jax.trained import open_run, run_batches

pytestmark = pytest.mark.usefixtures("compiled_quickly")

MESH = one_device()
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 1)), jnp.float32)
PLAIN = tiny_config("distill")
# The teachers' differences from the meta model, which has width 16, patches of 4 and one block per
# stage. The third has another width and needs stitches.
TEACHERS = {
    "a": {"depths": (2, 1, 1)},
    "b": {"depths": (1, 1, 1), "patch": 8, "registers": 1},
    "wide": {"depths": (1, 1, 1), "patch": 8, "width": 24, "heads": 3, "class_token": False}
    | {"pool": "mean"},
}


def section_of(name: str):
    return dataclasses.replace(PLAIN.meta, **TEACHERS[name])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder of an untrained meta model and of untrained teachers."""
    root = tmp_path_factory.mktemp("teachers")
    for seed, name in enumerate(("meta", *TEACHERS)):
        role = "meta" if name == "meta" else "teacher"
        config = PLAIN
        if role == "teacher":
            config = dataclasses.replace(PLAIN, phase="assemble", teacher=section_of(name))
        network = {"meta": meta_network, "teacher": teacher_network}[role](config)
        params = jax.tree.map(lambda x, s=seed: np.asarray(x) * (1 - 0.1 * s), fill(network.init))
        stored = unfreeze(config).to_dict()
        checkpoint.write_params(root / name, {role: params}, config=stored)
    return root


def taught(root, *names, table=(), phase="distill", **changes) -> Config:
    """A run whose teachers are these."""
    sources = SourcesConfig(
        meta=str(root / "meta"), teachers=tuple(str(root / name) for name in names)
    )
    distill = dataclasses.replace(PLAIN.distill, teachers=table)
    config = dataclasses.replace(tiny_config(phase), drop_path=0.0, distill=distill)
    return dataclasses.replace(config, sources=sources, **changes)


def params_of(root, name):
    return checkpoint.load(root / name)


def outputs_of(config: Config, root):
    """The forward pass of a run, with the helpers of its sources, and its loss."""
    training = describe(config, MESH)
    helpers = params_of(root, "meta") | load_teachers(config, training.helpers)[0]
    if "teacher" in training.helpers:
        helpers |= params_of(root, "a")
    params = fill(training.init)
    outputs = jax.jit(lambda p, h: training.forward(p, h, IMAGES, False, None))(params, helpers)
    task = training.task(steps_per_epoch=10)
    rng = np.random.default_rng(0)
    batch = {
        name: rng.integers(10, size=part.shape).astype(part.dtype)
        for name, part in task.batch.items()
    }
    rngs = {name: jax.random.key(1) for name in task.streams}
    loss, _ = jax.jit(task.loss)(params, helpers, batch, rngs, np.int32(0))
    return outputs, float(loss)


def module_logits(root, name, stage):
    """By hand: the meta model with a stage of a teacher, whose tokens are converted on both sides."""
    config = dataclasses.replace(PLAIN, teacher=section_of(name))
    meta, teacher = meta_network(config), teacher_network(config)
    params, own = params_of(root, "meta")["meta"], params_of(root, name)["teacher"]
    section = config.teacher
    layouts = (
        Layout(True, 0, 2),
        Layout(section.class_token, section.registers, 8 // section.patch),
    )
    x, _ = meta.apply(params, IMAGES, stop=stage)
    x = convert_tokens(x, *layouts) if stage else x
    x, _ = teacher.apply(own, x, start=stage, stop=stage + 1)
    x = convert_tokens(x, *reversed(layouts)) if stage < 2 else x
    return meta.apply(params, x, start=stage + 1)[0]


def test_a_table_says_which_teachers_teach_which_module(root):
    table = {0: "b", 1: "ab", 2: "a"}
    outputs, _ = outputs_of(taught(root, "a", "b", table=("1", "0+1", "0")), root)
    for stage, names in table.items():
        expected = np.stack([module_logits(root, name, stage) for name in names])
        found = outputs[f"module_{stage}"].teacher
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    single = taught(root, "a")
    single = dataclasses.replace(single, sources=SourcesConfig(meta="m", teacher="a"))
    alone, _ = outputs_of(dataclasses.replace(single, teacher=section_of("a")), root)
    for stage in range(3):
        own = alone[f"module_{stage}"]
        np.testing.assert_allclose(outputs[f"module_{stage}"].logits, own.logits, 1e-5, 1e-6)
    np.testing.assert_allclose(outputs["module_2"].teacher[0], alone["module_2"].teacher, 1e-5)


def test_a_teacher_named_twice_runs_once_and_teaches_as_one(root):
    one, twice = taught(root, "a"), taught(root, "a", "a")
    single = dataclasses.replace(one, sources=SourcesConfig(meta="m", teacher="a"))
    single = dataclasses.replace(single, teacher=section_of("a"))
    expected = outputs_of(single, root)[1]
    for combine in ("losses", "logits"):
        distill = dataclasses.replace(twice.distill, combine=combine)
        found = outputs_of(dataclasses.replace(twice, distill=distill), root)[1]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    flops = {
        name: step_flops(describe(config, MESH).task(steps_per_epoch=1), config.optim).model
        for name, config in (("single", single), ("twice", twice), ("two", taught(root, "a", "b")))
    }
    assert flops["single"] == flops["twice"] < flops["two"]
    assert set(describe(twice, MESH).helpers) == {"meta", "teacher_0"}


def test_a_program_of_some_modules_reads_their_teachers_alone(root):
    config = taught(root, "a", "b", table=("0", "1", "1"), module="1+2")
    shapes = describe(config, MESH).helpers
    assert set(shapes) == {"meta", "teacher_1"}
    assert set(shapes["teacher_1"]) == {"stage_1", "stage_2"}


def test_teachers_teach_a_nac(root):
    config = taught(root, "a", "b", module="0", model=NAC)
    outputs, loss = outputs_of(config, root)
    assert outputs["module_0"].teacher.shape == (2, 4, 10) and np.isfinite(loss)


def test_whole_teachers_teach_a_whole_student_their_logits(root):
    config = taught(root, "a", "wide", phase="end_to_end", baseline=DistillConfig("soft"))
    outputs, _ = outputs_of(config, root)
    for name, logits in zip(("a", "wide"), outputs["student"].teacher, strict=True):
        network = teacher_network(dataclasses.replace(PLAIN, teacher=section_of(name)))
        expected, _ = network.apply(params_of(root, name)["teacher"], IMAGES)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def joined(root):
    """The run that joins the widest teacher to the meta model."""
    config = dataclasses.replace(
        tiny_config("train_module"),
        teacher=section_of("wide"),
        init=InitConfig(teacher=str(root / "wide")),
        sources=SourcesConfig(meta=str(root / "meta")),
    )
    run_phase(config, root / "joined", MESH)
    return config


def test_joining_trains_the_stitches_and_the_head_alone(root, joined):
    before = traverse_util.flatten_dict(params_of(root, "wide")["teacher"], sep="/")
    after = traverse_util.flatten_dict(params_of(root, "joined")["module"], sep="/")
    stitches = {path for path in after if "_stitch/" in path}
    assert len(stitches) == 4 * 4 and set(before) == set(after) - stitches
    trained = {path for path in before if np.any(before[path] != after[path])}
    assert trained == {"stage_2/head/kernel", "stage_2/head/bias"}
    drawn = stitched_modules(joined).init(jax.random.key(0))
    assert after["stage_1/block_0/pre_stitch/linear/kernel"].shape == (16, 24)
    assert drawn["stage_1"]["block_0"]["post_stitch"]["linear"]["kernel"].shape == (24, 16)


def test_joining_needs_the_section_of_the_network(root, joined, tmp_path):
    other = dataclasses.replace(joined, teacher=dataclasses.replace(joined.teacher, heads=2))
    with pytest.raises(ValueError, match=r"is another network .* --config\.teacher\.heads='3'"):
        run_phase(other, tmp_path, MESH)


@pytest.fixture(scope="module")
def run(root, joined, tmp_path_factory):
    """A run of all students, taught by the joined teacher and another."""
    del joined
    config, workdir = taught(root, "joined", "a"), tmp_path_factory.mktemp("run")
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, checkpoint_every=3))
    run_phase(config, workdir, MESH)
    return config, workdir


def test_the_account_says_what_joins_each_teacher(run):
    wide, plain = read_json(run[1] / "teachers.json")
    assert wide["field"] == "config.sources.teachers[0]" and wide["network"]["width"] == 24
    assert wide["stitches"] and not plain["stitches"]
    own = "class token, 2 x 2 patches"
    assert wide["tokens"] == {"teacher": "1 x 1 patches", "meta": own, "converted": True}
    assert plain["tokens"] == {"teacher": own, "meta": own, "converted": False}
    assert plain["stages"] == ["stage_0", "stage_1", "stage_2"]
    assert [entry["parameters"] > 0 for entry in wide["taken"]] == [True] * 3


def test_a_run_with_several_teachers_resumes_to_the_bit(run, tmp_path):
    config, workdir = run
    resumed = tmp_path / "run"
    shutil.copytree(workdir, resumed)
    (resumed / "result.json").unlink()
    steps = checkpoint.finished_steps(resumed / "checkpoints")
    assert len(steps) > 1
    shutil.rmtree(resumed / "checkpoints" / str(steps[-1]))
    run_phase(config, resumed, MESH)
    for name in ("metrics.jsonl", "teachers.json"):
        assert (resumed / name).read_bytes() == (workdir / name).read_bytes()


def test_a_run_with_several_teachers_is_opened(run):
    trained = open_run(run[1])
    batch = {"image": np.zeros((2, 8, 8, 1), np.uint8)}
    ((_, found),) = run_batches(trained, [batch], lambda logits, batch: logits)
    assert {name: logits.shape for name, logits in found.items()} == {
        f"module_{stage}": (2, 10) for stage in range(3)
    }


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (("0", "1"), r"\('0', '1'\) must have an entry for each of the 3 stages"),
        (("0", "2", "1"), r"distill\.teachers\[1\]='2' must be numbers of the 2 "),
        (("0", "0+0", "1"), r"distill\.teachers\[1\]='0\+0' must be .* each once"),
        (("0", "1+", "1"), r"distill\.teachers\[1\]='1\+' must be numbers"),
        (("0", "", "1"), r"teachers\[1\]='' must be a string that is not empty"),
    ],
)
def test_a_table_that_leaves_a_module_without_a_teacher_is_refused(root, table, problem):
    with pytest.raises(ValueError, match=problem):
        taught(root, "a", "b", table=table)


def test_one_teacher_and_several_are_not_both_named():
    with pytest.raises(ValueError, match=r"name all teachers in sources\.teachers"):
        dataclasses.replace(PLAIN, sources=SourcesConfig(teacher="a", teachers=("b",)))


def test_teachers_that_do_not_fit_are_refused_before_anything_is_compiled(root, joined):
    del joined
    missing = taught(root, "a", "gone")
    with pytest.raises(FileNotFoundError, match=r"^config\.sources\.teachers\[1\]=.*gone"):
        check_places(missing, root / "run")
    with pytest.raises(FileNotFoundError, match=r"^config\.sources\.teachers\[1\]=.*gone"):
        describe(missing, MESH)
    with pytest.raises(ValueError, match=r"teachers\[0\]=.* width 24 .* --config\.init\.teacher"):
        describe(taught(root, "wide"), MESH)
    data = dataclasses.replace(PLAIN.data, labels=5)
    with pytest.raises(ValueError, match=r"knows 10 classes and config\.data\.labels=5"):
        describe(taught(root, "a", data=data), MESH)
    meta = dataclasses.replace(PLAIN.meta, depths=(1, 1))
    two = dataclasses.replace(PLAIN.model, depths=(1, 1))
    with pytest.raises(ValueError, match=r"cut into \(2, 1, 1\) blocks .* as many stages"):
        describe(taught(root, "a", meta=meta, model=two), MESH)
    data = dataclasses.replace(PLAIN.data, image_size=12)
    with pytest.raises(ValueError, match=r"^config\.sources\.teachers\[0\]\.patch=8 must divide"):
        describe(taught(root, "b", data=data), MESH)
    whole = taught(root, "joined", phase="end_to_end", baseline=DistillConfig("soft"))
    with pytest.raises(ValueError, match=r"holds modules, and a whole ViT is needed"):
        describe(whole, MESH)


def test_classes_of_other_names_are_refused(root, run, tmp_path):
    config, workdir = run
    other = shutil.copytree(root / "a", tmp_path / "other")
    names = read_json(workdir / "classes.json")["names"]
    (other / "classes.json").write_text(
        '{"names": ["x", ' + ", ".join(f'"{name}"' for name in names[1:]) + "]}"
    )
    config = dataclasses.replace(
        config, sources=dataclasses.replace(config.sources, teachers=(str(other),))
    )
    with pytest.raises(ValueError, match=r"calls class 0 'x' and config\.data '0'"):
        run_phase(config, tmp_path / "run", MESH)


def test_a_pipeline_with_teachers_needs_their_meta_model_and_trains_neither(root):
    sources = SourcesConfig(meta=str(root / "meta"), teachers=(str(root / "a"),))
    config = dataclasses.replace(tiny_pipeline(), sources=sources)
    check_sources(config)
    assert chosen_phases(config) == ["distill", "end_to_end", "few_shot"]
    alone = dataclasses.replace(config, sources=dataclasses.replace(sources, meta=""))
    with pytest.raises(ValueError, match=r"needs config\.sources\.meta"):
        check_sources(alone)
