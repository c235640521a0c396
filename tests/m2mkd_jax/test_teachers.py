"""Students with several teachers: who teaches whom, what is run only once, and what joins networks
of different widths and patches."""

import dataclasses
import re
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
from m2mkd_jax.phases.networks import meta_network, teacher_network
from m2mkd_jax.phases.pipeline import chosen_phases, describe, run_phase
from m2mkd_jax.phases.sources.teachers import load_teachers
from m2mkd_jax.trained import open_run, run_batches

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
    """The folder of an untrained meta model and untrained teachers."""
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
    """A run with these teachers."""
    sources = SourcesConfig(
        meta=str(root / "meta"), teachers=tuple(str(root / name) for name in names)
    )
    distill = dataclasses.replace(PLAIN.distill, teachers=table)
    changes = {"sources": sources, "distill": distill, "drop_path": 0.0} | changes
    return dataclasses.replace(tiny_config(phase), **changes)


def taught_by_one(root) -> Config:
    """The same with a single teacher, as config.teacher."""
    sources = SourcesConfig(meta=str(root / "meta"), teacher=str(root / "a"))
    return taught(root, sources=sources, teacher=section_of("a"))


def params_of(root, name):
    return checkpoint.load(root / name)


def arguments_of(config: Config, root):
    """A run's training, parameters for it, and the helpers from its sources."""
    training = describe(config, MESH)
    helpers = params_of(root, "meta") | load_teachers(config, training.helpers)[0]
    if "teacher" in training.helpers:
        helpers |= params_of(root, "a")
    return training, fill(training.init), helpers


def targets_of(config: Config, root, by_hand):
    """The teachers' logits in a run, by the name of the network that they teach, and
    `by_hand(parameters of all networks)`."""
    training, params, helpers = arguments_of(config, root)
    everything = params_of(root, "meta")
    everything |= {name: params_of(root, name)["teacher"] for name in TEACHERS}

    @jax.jit
    def both(params, helpers, everything):
        outputs = training.forward(params, helpers, IMAGES, False, None)
        return {name: one.teacher for name, one in outputs.items()}, by_hand(everything)

    return both(params, helpers, everything)


def loss_of(config: Config, root) -> float:
    """The loss in a run's first step."""
    training, params, helpers = arguments_of(config, root)
    task, rng = training.task(steps_per_epoch=10), np.random.default_rng(0)
    batch = {
        name: rng.integers(10, size=part.shape).astype(part.dtype)
        for name, part in task.batch.items()
    }
    rngs = {name: jax.random.key(1) for name in task.streams}
    return float(jax.jit(task.loss)(params, helpers, batch, rngs, np.int32(0))[0])


def module_logits(params, name, stage):
    """By hand: the meta model with one of a teacher's stages, between conversions of the tokens."""
    config = dataclasses.replace(PLAIN, teacher=section_of(name))
    meta, teacher = meta_network(config), teacher_network(config)
    section = config.teacher
    layouts = (
        Layout(True, 0, 2),
        Layout(section.class_token, section.registers, 8 // section.patch),
    )
    x, _ = meta.apply(params["meta"], IMAGES, stop=stage)
    x = convert_tokens(x, *layouts) if stage else x
    x, _ = teacher.apply(params[name], x, start=stage, stop=stage + 1)
    x = convert_tokens(x, *reversed(layouts)) if stage < 2 else x
    return meta.apply(params["meta"], x, start=stage + 1)[0]


def test_table_assigns_teachers_to_modules(root):
    table = {0: "b", 1: "ab", 2: "a"}

    def by_hand(params):
        return {
            f"module_{stage}": jnp.stack([module_logits(params, name, stage) for name in names])
            for stage, names in table.items()
        }

    config = taught(root, "a", "b", table=("1", "0+1", "0"))
    found, expected = targets_of(config, root, by_hand)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)
    assert np.ptp(found["module_1"], axis=0).max() > 1e-3


def test_duplicate_teacher_runs_once_and_counts_as_one(root):
    single, twice, two = (
        dataclasses.replace(config, module="1")
        for config in (taught_by_one(root), taught(root, "a", "a"), taught(root, "a", "b"))
    )
    np.testing.assert_allclose(loss_of(twice, root), loss_of(single, root), rtol=1e-5)
    flops = {
        name: step_flops(describe(config, MESH).task(steps_per_epoch=1), config.optim).model
        for name, config in (("single", single), ("twice", twice), ("two", two))
    }
    assert flops["single"] == flops["twice"] < flops["two"]
    assert set(describe(twice, MESH).helpers) == {"meta", "teacher_0"}


def test_program_reads_only_the_teachers_of_its_modules(root):
    config = taught(root, "a", "b", table=("0", "1", "1"), module="1+2")
    shapes = describe(config, MESH).helpers
    assert set(shapes) == {"meta", "teacher_1"}
    assert set(shapes["teacher_1"]) == {"stage_1", "stage_2"}


def test_several_teachers_distill_into_a_nac(root):
    config = taught(root, "a", "b", model=NAC)
    task = describe(config, MESH).task(steps_per_epoch=10)
    params = jax.eval_shape(task.init, jax.random.key(0))
    rngs = {name: jax.random.key(1) for name in task.streams}
    _, metrics = jax.eval_shape(task.loss, params, task.helpers, task.batch, rngs, np.int32(0))
    assert {f"module_{stage}/distillation" for stage in range(3)} <= set(metrics)


def test_whole_student_is_taught_logits_of_whole_teachers(root):
    config = taught(root, "a", "wide", phase="end_to_end", baseline=DistillConfig("soft"))

    def by_hand(params):
        networks = {
            name: teacher_network(dataclasses.replace(PLAIN, teacher=section_of(name)))
            for name in ("a", "wide")
        }
        return jnp.stack([one.apply(params[name], IMAGES)[0] for name, one in networks.items()])

    found, expected = targets_of(config, root, by_hand)
    np.testing.assert_allclose(found["student"], expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def joined(root):
    """A run that joins a module of the widest teacher to the meta model."""
    config = dataclasses.replace(
        tiny_config("train_module"),
        module="1",
        teacher=section_of("wide"),
        init=InitConfig(teacher=str(root / "wide")),
        sources=SourcesConfig(meta=str(root / "meta")),
    )
    run_phase(config, root / "joined", MESH)
    return config


def test_joining_trains_only_stitches_and_head(root, joined):
    before = traverse_util.flatten_dict(params_of(root, "wide")["teacher"]["stage_1"], sep="/")
    after = traverse_util.flatten_dict(params_of(root, "joined")["module"]["stage_1"], sep="/")
    stitches = {path for path in after if "_stitch/" in path}
    assert after["block_0/pre_stitch/linear/kernel"].shape == (16, 24)
    assert after["block_0/post_stitch/linear/kernel"].shape == (24, 16)
    assert len(stitches) == 2 * 4 and set(before) == set(after) - stitches
    assert all(np.array_equal(before[path], after[path]) for path in before)
    assert np.any(after["block_0/pre_stitch/linear/bias"])  # starts at 0
    training = describe(dataclasses.replace(joined, module="all"), MESH)
    paths = traverse_util.flatten_dict(jax.eval_shape(training.init, jax.random.key(0)), sep="/")
    trained = {path for path in paths if re.fullmatch(training.trainable, path)}
    head = {f"module/stage_2/head/{name}" for name in ("kernel", "bias")}
    assert {path for path in trained if "_stitch/" not in path} == head
    assert len(trained - head) == 4 * 4


def test_joining_needs_the_config_of_the_teacher(root, joined, tmp_path):
    other = dataclasses.replace(joined, teacher=dataclasses.replace(joined.teacher, heads=2))
    with pytest.raises(
        ValueError, match=r"is not the network that .* --config\.teacher\.heads='3'"
    ):
        run_phase(other, tmp_path, MESH)


@pytest.fixture(scope="module")
def run(root, joined, tmp_path_factory):
    """A run of a student taught by the joined module and by another teacher's."""
    del joined
    config, workdir = taught(root, "joined", "a", module="1"), tmp_path_factory.mktemp("run")
    optim = dataclasses.replace(config.optim, steps=24)  # an epoch has 22
    config = dataclasses.replace(config, optim=optim)
    run_phase(config, workdir, MESH)
    return config, workdir


def test_account_records_how_each_teacher_is_joined(run):
    account = read_json(run[1] / "teachers.json")
    assert list(account) == [f"config.sources.teachers[{i}]" for i in range(2)]
    wide, plain = account.values()
    assert (wide["network"]["width"], wide["network"]["patch"]) == (24, 8)
    assert wide["stitches"] and not plain["stitches"]
    own = "class token, 2 x 2 patches"
    assert wide["tokens"] == {"teacher": "1 x 1 patches", "meta": own, "converted": True}
    assert plain["tokens"] == {"teacher": own, "meta": own, "converted": False}
    assert plain["stages"] == ["stage_1"]
    assert [entry["subtree"] for entry in wide["taken"]] == ["module/stage_1"]


def test_run_with_several_teachers_resumes_bit_for_bit(run, tmp_path):
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


def test_open_run_with_several_teachers(run):
    trained = open_run(run[1])
    batch = {"image": np.zeros((8, 8, 8, 1), np.uint8)}
    ((_, found),) = run_batches(trained, [batch], lambda logits, batch: logits)
    assert {name: logits.shape for name, logits in found.items()} == {"module_1": (8, 10)}


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (("0", "1"), r"\('0', '1'\) must have an entry for each of the 3 stages"),
        (("0", "2", "1"), r"distill\.teachers\[1\]='2' must be indices of the 2 "),
        (("0", "0+0", "1"), r"distill\.teachers\[1\]='0\+0' must be .* each once"),
        (("0", "1+", "1"), r"distill\.teachers\[1\]='1\+' must be indices"),
        (("0", "", "1"), r"teachers\[1\]='' must be a non-empty string"),
    ],
)
def test_invalid_teacher_tables_are_refused(root, table, problem):
    with pytest.raises(ValueError, match=problem):
        taught(root, "a", "b", table=table)


def test_teacher_and_teachers_are_mutually_exclusive():
    with pytest.raises(ValueError, match=r"name all teachers in sources\.teachers"):
        dataclasses.replace(PLAIN, sources=SourcesConfig(teacher="a", teachers=("b",)))


def test_mismatched_teachers_are_refused_before_compiling(root, joined):
    del joined
    missing = taught(root, "a", "gone")
    with pytest.raises(FileNotFoundError, match=r"^config\.sources\.teachers\[1\]=.*gone"):
        check_places(missing, root / "run")
    with pytest.raises(FileNotFoundError, match=r"^config\.sources\.teachers\[1\]=.*gone"):
        describe(missing, MESH)
    with pytest.raises(ValueError, match=r"teachers\[0\]=.* width 24, .* --config\.init\.teacher"):
        describe(taught(root, "wide"), MESH)
    data = dataclasses.replace(PLAIN.data, labels=5)
    with pytest.raises(ValueError, match=r"has 10 classes, but config\.data\.labels=5"):
        describe(taught(root, "a", data=data), MESH)
    meta = dataclasses.replace(PLAIN.meta, depths=(1, 1))
    two = dataclasses.replace(PLAIN.model, depths=(1, 1))
    with pytest.raises(ValueError, match=r"cut into \(2, 1, 1\) blocks, .* same number of stages"):
        describe(taught(root, "a", meta=meta, model=two), MESH)
    data = dataclasses.replace(PLAIN.data, image_size=12)
    with pytest.raises(ValueError, match=r"^config\.sources\.teachers\[0\]\.patch=8 must divide"):
        describe(taught(root, "b", data=data), MESH)
    whole = taught(root, "joined", phase="end_to_end", baseline=DistillConfig("soft"))
    with pytest.raises(ValueError, match=r"holds modules, but a whole ViT is needed"):
        describe(whole, MESH)


def test_teachers_with_other_class_names_are_refused(root, run, tmp_path):
    config, workdir = run
    other = shutil.copytree(root / "a", tmp_path / "other")
    names = read_json(workdir / "classes.json")["names"]
    (other / "classes.json").write_text(
        '{"names": ["x", ' + ", ".join(f'"{name}"' for name in names[1:]) + "]}"
    )
    config = dataclasses.replace(
        config, sources=dataclasses.replace(config.sources, teachers=(str(other),))
    )
    with pytest.raises(ValueError, match=r"calls class 0 'x', but config\.data calls it '0'"):
        run_phase(config, tmp_path / "run", MESH)


def test_pipeline_with_teachers_needs_a_given_meta_model(root):
    sources = SourcesConfig(meta=str(root / "meta"), teachers=(str(root / "a"),))
    config = dataclasses.replace(tiny_pipeline(), sources=sources)
    check_sources(config)
    assert chosen_phases(config) == ["distill", "end_to_end", "few_shot"]
    alone = dataclasses.replace(config, sources=dataclasses.replace(sources, meta=""))
    with pytest.raises(ValueError, match=r"needs config\.sources\.meta"):
        check_sources(alone)
