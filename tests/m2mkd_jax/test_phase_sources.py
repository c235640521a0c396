"""Which weights each phase starts from, and what it passes to the loop: every source holds distinct
numbers."""

import dataclasses
import json
import logging
import re
import shutil

import jax
import numpy as np
import pytest
from flax import traverse_util
from meshes import one_device
from tiny import OPTIM, tiny_config, write_averaged

from common_jax import checkpoint, loop
from common_jax.config import unfreeze
from common_jax.mesh import match_rules, with_shardings
from common_jax.weights import Origin
from m2mkd_jax.config import DistillConfig, FewShotConfig, InitConfig, SourcesConfig
from m2mkd_jax.phases import PHASES
from m2mkd_jax.phases.networks import (
    meta_network,
    parameter_shapes,
    student_modules,
    teacher_network,
    whole_student,
)
from m2mkd_jax.phases.pipeline import describe, run_phase
from m2mkd_jax.phases.sources import weights

MESH = one_device()
ROLES = ("meta", "teacher", "module", "student")


def number(workdir: str, role: str, stage: int) -> int:
    """The value of all parameters in a stage of a source."""
    return 100 * "ab".index(workdir) + 10 * ROLES.index(role) + stage


def filled(shapes, value):
    return jax.tree.map(lambda leaf: np.full(leaf.shape, value, np.float32), shapes)


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """Two workdirs with all roles, and one with a whole student."""
    root, config = tmp_path_factory.mktemp("held"), tiny_config("distill")
    modular = {
        "meta": meta_network(config),
        "teacher": teacher_network(config),
        "module": teacher_network(config),
        "student": student_modules(config),
    }
    for workdir in "ab":
        params = {}
        for role, network in modular.items():
            stages = jax.eval_shape(network.init, jax.random.key(0))
            params[role] = {
                name: filled(stage, number(workdir, role, int(name[6:])))
                for name, stage in stages.items()
            }
        checkpoint.write_params(root / workdir, params, config={})
    whole = jax.eval_shape(whole_student(config).init, jax.random.key(0))
    checkpoint.write_params(root / "whole", {"student": filled(whole, 7)}, config={})
    return {name: str(root / name) for name in ("a", "b", "whole")}


def altered(source, folder, *, classes=None, **changes):
    """A copy of a source, from a run with other sections or, if given, with names of classes."""
    copy = shutil.copytree(source, folder)
    stored = unfreeze(dataclasses.replace(tiny_config("distill"), **changes)).to_dict()
    (next((copy / "checkpoints").iterdir()) / "config" / "metadata").write_text(json.dumps(stored))
    if classes is not None:
        (copy / "classes.json").write_text(json.dumps({"names": classes}))
    return str(copy)


class Reached(Exception):
    """Raised where the loop would start."""


@pytest.fixture
def started(monkeypatch, tmp_path):
    """started(config) -> the task that the run passes to the loop, and the other settings."""
    given = []

    def train(task, *arguments, **settings):
        given.append((task, arguments, settings))
        raise Reached

    monkeypatch.setattr(loop, "train", train)

    def start(config):
        with pytest.raises(Reached):
            run_phase(config, tmp_path, MESH)
        return given.pop()

    return start


def values(tree) -> dict[str, set[float]]:
    """The distinct values in each stage, by role/stage."""
    found = {}
    for path, leaf in traverse_util.flatten_dict(tree, sep="/").items():
        place = "/".join(path.split("/")[:2])
        found.setdefault(place, set()).update(np.unique(leaf).tolist())
    return found


def taken(task):
    """What a task's warm start gives its parameters."""
    params = jax.eval_shape(task.init, jax.random.key(0))
    return task.warm_start(with_shardings(params, match_rules(task.rules, params, MESH)))


def config_of(phase, held, **sources):
    config = tiny_config(phase, optim=dataclasses.replace(OPTIM, batch=8))
    named = {
        name: tuple(held[w] for w in given) if isinstance(given, tuple) else held[given]
        for name, given in sources.items()
    }
    return dataclasses.replace(
        config, sources=SourcesConfig(**named), few_shot=FewShotConfig(ways=4, shots=2)
    )


def test_distill_helpers_are_meta_model_and_teacher(held, started):
    config = config_of("distill", held, meta="a", teacher="b")
    task, _, _ = started(config)
    want = {f"meta/stage_{i}": {number("a", "meta", i)} for i in range(3)}
    want |= {f"teacher/stage_{i}": {number("b", "teacher", i)} for i in range(3)}
    assert values(task.helpers) == want
    assert task.warm_start is None
    task, _, _ = started(dataclasses.replace(config, module="1"))
    assert {"teacher/stage_1"} == {name for name in values(task.helpers) if "teacher" in name}


def test_train_module_helper_is_only_the_meta_model(held, started):
    task, _, _ = started(config_of("train_module", held, meta="b"))
    want = {f"meta/stage_{i}": {number("b", "meta", i)} for i in range(3)}
    assert values(task.helpers) == want and task.warm_start is None


@pytest.mark.parametrize("given", [("a", "b", "a"), ("b",)])
def test_assemble_takes_each_module_from_its_workdir(held, started, given):
    task, _, _ = started(config_of("assemble", held, modules=given))
    start = taken(task)
    each = given * 3 if len(given) == 1 else given
    want = {f"teacher/stage_{i}": {number(w, "module", i)} for i, w in enumerate(each)}
    assert values(start.params) == want
    assert start.account["left"] == start.account["fresh"] == []
    assert not task.helpers


def test_end_to_end_takes_each_student_from_its_workdir(held, started):
    each = ("b", "a", "a")
    task, _, _ = started(config_of("end_to_end", held, students=each))
    start = taken(task)
    want = {f"student/stage_{i}": {number(w, "student", i)} for i, w in enumerate(each)}
    assert values(start.params) == want
    assert all("_stitch/" in entry["name"] for entry in start.account["left"])
    assert len(start.account["left"]) == 4 * 4  # arrays of four stitches


def test_end_to_end_without_sources_starts_from_scratch(held, started):
    task, _, _ = started(config_of("end_to_end", held))
    assert task.warm_start is None and not task.helpers


def test_baseline_teacher_is_loaded_whole(held, started):
    config = config_of("end_to_end", held, teacher="b", students=("a",))
    task, _, _ = started(dataclasses.replace(config, baseline=DistillConfig("soft")))
    want = {f"teacher/stage_{i}": {number("b", "teacher", i)} for i in range(3)}
    assert values(task.helpers) == want
    assert values(taken(task).params)["student/stage_1"] == {number("a", "student", 1)}


def test_few_shot_takes_all_but_the_head(held, started):
    task, _, _ = started(config_of("few_shot", held, network="whole"))
    start = taken(task)
    assert values(start.params) == {f"student/stage_{i}": {7} for i in range(3)}
    fresh = {entry["name"] for entry in start.account["fresh"]}
    assert fresh == {"student/stage_2/head/kernel", "student/stage_2/head/bias"}
    assert "head" not in start.params["student"]["stage_2"]
    assert start.account["left"] == []


def test_what_stays_frozen_is_the_average_that_was_evaluated(held, started, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    source, config = str(tmp_path / "a"), tiny_config("distill")
    for name in ("a", "whole"):
        write_averaged(tmp_path / name, checkpoint.load(held[name]), config, more=1000)
    runs = {"a": source, "whole": str(tmp_path / "whole")}
    for phase, roles in (("distill", ("meta", "teacher")), ("train_module", ("meta",))):
        task, _, _ = started(config_of(phase, runs, **dict.fromkeys(roles, "a")))
        want = {
            f"{role}/stage_{i}": {1000 + number("a", role, i)} for role in roles for i in range(3)
        }
        assert values(task.helpers) == want
    assert f"{source}/checkpoints/1: the average of its parameters is loaded" in caplog.text
    # A trunk under a new head stays as it is as well.
    task, _, _ = started(config_of("few_shot", runs, network="whole"))
    assert values(taken(task).params) == {f"student/stage_{i}": {1007} for i in range(3)}
    assert all(entry["average"] for entry in taken(task).account["taken"])
    joins = config_of("train_module", runs, meta="a")
    task, _, _ = started(dataclasses.replace(joins, init=InitConfig(teacher=source)))
    want = {f"module/stage_{i}": {1000 + number("a", "teacher", i)} for i in range(3)}
    assert values(taken(task).params) == want
    # What keeps training starts from the parameters themselves.
    task, _, _ = started(config_of("end_to_end", runs, students=("a",)))
    start = taken(task)
    want = {f"student/stage_{i}": {number("a", "student", i)} for i in range(3)}
    assert values(start.params) == want
    assert not any("average" in entry for entry in start.account["taken"])


def test_loop_gets_the_settings_of_the_run(held, started, tmp_path):
    config = dataclasses.replace(config_of("assemble", held, modules=("a",)), seed=11)
    task, (run, optim), settings = started(config)
    assert (run, optim) == (config.run, config.optim)
    assert settings["seed"] == 11 and settings["config"] == config
    assert settings["workdir"] == tmp_path and settings["mesh"] is MESH
    assert task.steps_per_epoch == 1437 // 8 and set(task.evaluators) == {"test"}


def shapes_and_origins(config, held, role="teacher"):
    network = {"teacher": teacher_network, "meta": meta_network}[role](config)
    origins = [Origin(held["a"], role, role)]
    return parameter_shapes(config, network, role, MESH), origins


def test_position_tables_are_resized_to_image_size(held):
    """A constant table stays constant, since the weights of each place sum to 1."""
    config = config_of("assemble", held)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=16))
    found = weights.take_weights(config, *shapes_and_origins(config, held))
    table = found.params["teacher"]["stage_0"]["pos_embed"]
    assert table.shape == (1, 17, 16)
    np.testing.assert_allclose(table, number("a", "teacher", 0), rtol=1e-6)
    (adapted,) = found.account["adapted"]
    assert adapted["name"] == "teacher/stage_0/pos_embed"


def test_position_tables_keep_the_leading_rows_of_their_network(held):
    config = config_of("assemble", held)
    # A row for the register replaces that of the class token.
    teacher = dataclasses.replace(config.teacher, class_token=False, pool="mean", registers=1)
    data = dataclasses.replace(config.data, image_size=16)
    config = dataclasses.replace(config, data=data, teacher=teacher)
    fresh = SourcesConfig(fresh=".*/register_tokens", leave=".*/cls_token")
    config = dataclasses.replace(config, sources=fresh)
    found = weights.take_weights(config, *shapes_and_origins(config, held))
    assert found.params["teacher"]["stage_0"]["pos_embed"].shape == (1, 17, 16)
    bare = dataclasses.replace(teacher, positions="patches")
    config = dataclasses.replace(config, teacher=bare)
    with pytest.raises(ValueError, match=r"5 patches after 0 leading rows .* not a square grid"):
        weights.take_weights(config, *shapes_and_origins(config, held))


def test_fresh_and_leave_are_recorded_in_the_account(held):
    config = config_of("assemble", held)
    sources = SourcesConfig(fresh=r".*/head/.*", leave=r".*/qkv/bias")
    teacher = dataclasses.replace(config.teacher, qkv_bias=False)
    config = dataclasses.replace(config, sources=sources, teacher=teacher)
    account = weights.take_weights(config, *shapes_and_origins(config, held)).account
    assert {entry["reason"] for entry in account["fresh"]} == {"config.sources.fresh"}
    assert {entry["name"] for entry in account["fresh"]} == {
        "teacher/stage_2/head/kernel",
        "teacher/stage_2/head/bias",
    }
    assert {entry["reason"] for entry in account["left"]} == {"config.sources.leave"}
    assert len(account["left"]) == 4  # arrays of the teacher's blocks
    neither = dataclasses.replace(config, sources=SourcesConfig(fresh=r".*/head/.*"))
    with pytest.raises(ValueError, match=r"qkv/bias .* has no place"):
        weights.take_weights(neither, *shapes_and_origins(config, held))


@pytest.mark.parametrize(
    ("phase", "joined", "fresh", "fixed"),
    [
        ("train_module", "", "meta/stage_0/.*", "meta/stage_0/block_0/"),
        ("train_module", "/there", "module/stage_2/.*", "module/stage_2/block_0/attention/"),
        ("distill", "", ".*/head/.*", "meta/stage_2/head/bias"),
        ("few_shot", "", "student/stage_2/.*", "student/stage_2/block_0/"),
    ],
)
def test_fresh_must_not_match_what_stays_frozen(phase, joined, fresh, fixed):
    """Known without reading a source."""
    config = dataclasses.replace(tiny_config(phase), init=InitConfig(teacher=joined))
    sources = SourcesConfig(fresh=fresh, meta="/made", teacher="/made", network="/made")
    training = describe(dataclasses.replace(config, sources=sources), MESH)
    with pytest.raises(ValueError, match=rf"fresh='.*' matches {fixed}.*'{phase}' does not train"):
        PHASES[phase].fit(training, {"/made": training.helpers})


@pytest.mark.parametrize(("phase", "joined"), [("train_module", "/there"), ("few_shot", "")])
def test_fresh_may_match_the_head_that_is_trained(phase, joined):
    config = dataclasses.replace(tiny_config(phase), init=InitConfig(teacher=joined))
    role = "module" if joined else "student"
    sources = SourcesConfig(fresh=rf"{role}/stage_\d+/head/.*")
    training = describe(dataclasses.replace(config, sources=sources), MESH)
    assert re.fullmatch(training.trainable, f"{role}/stage_2/head/kernel")


def test_checking_sources_reads_no_parameters(held):
    config = config_of("assemble", held)
    assert weights.take_weights(config, *shapes_and_origins(config, held), read=False).params == {}


@pytest.mark.parametrize("name", ["mean", "std"])
@pytest.mark.parametrize(
    ("made", "ours", "same"),
    [
        ([0.5], 0.5, True),
        ([0.5], 0.50005, True),  # rounding error
        ([0.485], 0.4853, False),
        ([0.5], 0.6, False),
        ([0.485, 0.456, 0.406], 0.5, True),  # a different number of channels shows in the shapes
    ],
)
def test_different_normalisation_is_detected(monkeypatch, caplog, name, made, ours, same):
    config = tiny_config("assemble")
    data = dataclasses.replace(config.data, **{name: (ours,)})
    config = dataclasses.replace(config, data=data)
    stored = {"data": {"mean": [0.5], "std": [0.5], "image_size": 8} | {name: made}}
    monkeypatch.setattr(checkpoint, "load_config", lambda source: stored)
    if same:
        weights.compare_images(config, "there", frozen=True)
        weights.compare_images(config, "there", frozen=False)
        assert not caplog.text
        return
    with pytest.raises(ValueError, match=rf"normalised with {name}=.*Give --config\.data\.{name}="):
        weights.compare_images(config, "there", frozen=True)
    assert not caplog.text
    weights.compare_images(config, "there", frozen=False)
    assert f"normalised with {name}=" in caplog.text


def test_different_image_size_gives_a_warning(monkeypatch, caplog):
    for stored, said in (({"image_size": 16}, True), ({"image_size": 8}, False), ({}, False)):
        monkeypatch.setattr(checkpoint, "load_config", lambda source, s=stored: {"data": s})
        caplog.clear()
        weights.compare_images(tiny_config("assemble"), "there", frozen=True)
        assert ("images of side 16" in caplog.text) == said


@pytest.mark.parametrize(
    ("phase", "name"),
    [
        ("train_module", "meta"),
        ("distill", "meta"),
        ("distill", "teacher"),
        ("few_shot", "network"),
    ],
)
def test_missing_source_is_named(phase, name, held, tmp_path):
    given = {"meta": "a", "teacher": "a", "network": "whole"}
    del given[name]
    with pytest.raises(ValueError, match=rf"config\.sources\.{name} is empty"):
        run_phase(config_of(phase, held, **given), tmp_path / "run", MESH)


@pytest.mark.parametrize(
    ("phase", "given"),
    [
        ("distill", {"meta": "a", "teacher": "a"}),
        ("train_module", {"meta": "a"}),
        ("end_to_end", {"teacher": "a"}),
    ],
)
def test_frozen_networks_need_the_same_normalisation(phase, given, held, monkeypatch, tmp_path):
    config = dataclasses.replace(config_of(phase, held, **given), baseline=DistillConfig("soft"))
    stored = {"data": {"mean": [0.1]}}
    monkeypatch.setattr(checkpoint, "load_config", lambda source: stored)
    with pytest.raises(ValueError, match="normalised with mean"):
        run_phase(config, tmp_path, MESH)


def test_trained_networks_may_switch_normalisation(held, started, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint, "load_config", lambda source: {"data": {"mean": [0.1]}})
    task, _, _ = started(config_of("assemble", held, modules=("a",)))
    taken(task)
    assert "from now on it trains on images normalised differently" in caplog.text


@pytest.mark.parametrize("role", ["meta", "teacher"])
def test_frozen_network_must_run_as_it_was_trained(held, tmp_path, role):
    """No shape of a parameter tells how tokens are pooled."""
    config = config_of("distill", held, meta="a", teacher="b")
    section = dataclasses.replace(getattr(config, role), pool="mean", remat=True)
    other = altered(held["a"], tmp_path / "other", **{role: section})
    sources = dataclasses.replace(config.sources, **{role: other})
    said = rf"other was trained with pool='mean' \(config\.{role}\.pool is 'class'\)"
    with pytest.raises(ValueError, match=rf"{said}.* --config\.{role}\.pool=mean, or"):
        run_phase(dataclasses.replace(config, sources=sources), tmp_path, MESH)


def test_trained_network_may_continue_with_other_settings(held, started, tmp_path, caplog):
    config = config_of("end_to_end", held)
    moe = dataclasses.replace(config.model.moe, chosen=1, expert_init="fan_in")
    student = dataclasses.replace(config.model, moe=moe, norm_eps=1e-3)
    other = altered(held["a"], tmp_path / "other", model=student)
    task, _, _ = started(dataclasses.replace(config, sources=SourcesConfig(students=(other,))))
    taken(task)
    assert "trained with norm_eps=0.001 (config.model.norm_eps is 1e-06), moe.chosen=1" in (
        caplog.text
    )
    assert "expert_init" not in caplog.text


@pytest.mark.parametrize(
    ("phase", "role"), [("distill", "meta"), ("train_module", "meta"), ("distill", "teacher")]
)
def test_frozen_network_must_have_the_classes_of_the_run(held, tmp_path, phase, role):
    names = [*"0123456798"]
    other = altered(held["a"], tmp_path / "other", classes=names)
    config = config_of(phase, held, meta="a", teacher="b")
    sources = dataclasses.replace(config.sources, **{role: other})
    said = rf"config\.sources\.{role}='.*other' calls class 8 '9', but config\.data calls it '8'"
    with pytest.raises(ValueError, match=said):
        run_phase(dataclasses.replace(config, sources=sources), tmp_path / "run", MESH)


def test_frozen_network_from_unfinished_run_gives_a_warning(held, started, tmp_path, caplog):
    config = config_of("train_module", held, meta="a")
    started(config)
    assert "is not finished" not in caplog.text  # converted weights are no run
    other = shutil.copytree(held["a"], tmp_path / "other")
    (other / "config.json").write_text("{}")
    config = dataclasses.replace(config, sources=SourcesConfig(meta=str(other)))
    started(config)
    assert f"{other} is not finished" in caplog.text
    caplog.clear()
    (other / "result.json").write_text("{}")
    started(config)
    assert "is not finished" not in caplog.text
