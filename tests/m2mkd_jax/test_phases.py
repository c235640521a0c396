"""What each phase computes: its networks against the whole hybrid run in one pass; their stochastic
depth, precision and sizes; and what reaches the loop."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from meshes import one_device
from tiny import NAC, OPTIM, SIZES, feed_of, fill, tiny_config

from m2mkd_jax.config import Config, DistillConfig, FewShotConfig, ModuleDistillConfig
from m2mkd_jax.data.augment import AugmentConfig
from m2mkd_jax.data.ood import OodConfig
from m2mkd_jax.hybrid import replace_stage
from m2mkd_jax.models import encoder
from m2mkd_jax.phases import training as phase_training
from m2mkd_jax.phases.networks import meta_network, student_modules, teacher_network, whole_student
from m2mkd_jax.phases.objective import Outputs
from m2mkd_jax.phases.pipeline import describe
from m2mkd_jax.phases.sources.weights import require_stage_sources

MESH = one_device()
RNGS = {name: jax.random.key(i) for i, name in enumerate(("drop_path", "gate"))}
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 1)), jnp.float32)
DEPTHS = {"meta": (1, 1, 1), "teacher": (1, 2, 1), "model": (1, 1, 3)}
WIDTHS = {"meta": 8, "teacher": 12, "model": 16}


def config_of(phase: str, *, rate=0.3, widths=None, **changes) -> Config:
    """A run whose networks differ in depth and, if `widths` are given, in width."""
    config = tiny_config(phase)
    sections = {
        name: dataclasses.replace(
            getattr(config, name), depths=depths, width=(widths or {}).get(name, SIZES["width"])
        )
        for name, depths in DEPTHS.items()
    }
    # Experts are slow to compile, so only the last block has them.
    sections["model"] = dataclasses.replace(sections["model"], moe_blocks="last_1")
    return dataclasses.replace(
        config, augment=AugmentConfig(), drop_path=rate, **(sections | changes)
    )


def params_of(config: Config):
    networks = {
        "meta": meta_network(config),
        "teacher": teacher_network(config),
        "student": student_modules(config),
    }
    # Every role has distinct numbers.
    return {
        role: jax.tree.map(lambda leaf, s=sign: s * leaf, fill(network.init))
        for (role, network), sign in zip(networks.items(), (1.0, -1.0, 0.7), strict=True)
    }


def hybrid_logits(config: Config, params, role, stage, *, train):
    """The meta model with one stage of `role`, run in one pass. In training, stochastic depth ramps
    over the student's own blocks, and over the teacher's together with the meta model's."""
    build = {"teacher": teacher_network, "student": student_modules}[role]
    rate = config.drop_path if role == "student" else 0.0
    network = replace_stage(meta_network(config), stage, build(config, drop_path=rate))
    if train and role == "teacher":
        network = encoder.ramp_drop_path(network, config.drop_path)
    name = f"stage_{stage}"
    stages = params["meta"] | {name: params[role][name]}
    return network.apply(stages, IMAGES, train=train, rngs=RNGS)[0]


def test_distill_runs_student_and_teacher_within_the_meta_model():
    config = config_of("distill", module="2", rate=0.5)
    params = params_of(config)
    training = describe(config, MESH)

    @jax.jit
    def both(params):
        own = {"student": params["student"]}
        found = training.forward(own, params, IMAGES, True, RNGS)
        want = (
            hybrid_logits(config, params, "student", 2, train=True),
            hybrid_logits(config, params, "teacher", 2, train=False),
        )
        return found, want

    found, (logits, taught) = both(params)
    (output,) = found.values()
    assert list(found) == ["module_2"] and set(output.recorded) == {"stage_2"}
    np.testing.assert_allclose(output.logits, logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(output.teacher, taught, rtol=1e-4, atol=1e-5)
    assert np.abs(logits - taught).max() > 0.1


def test_train_module_runs_a_teacher_module_within_the_meta_model():
    config = config_of("train_module", module="1", rate=0.5)
    params = params_of(config)
    training = describe(config, MESH)
    helpers = {"meta": {name: params["meta"][name] for name in ("stage_0", "stage_2")}}
    assert set(training.helpers["meta"]) == set(helpers["meta"])

    @jax.jit
    def both(params):
        own = {"module": params["teacher"]}
        found = training.forward(own, helpers, IMAGES, True, RNGS)
        return found, hybrid_logits(config, params, "teacher", 1, train=True)

    found, want = both(params)
    (output,) = found.values()
    assert list(found) == ["module_1"] and output.teacher is None
    np.testing.assert_allclose(output.logits, want, rtol=1e-4, atol=1e-5)


def test_baseline_teacher_is_whole_and_in_evaluation_mode(monkeypatch):
    student = Outputs(jnp.ones((4, 10)), None, {"stage_0": {}})
    forward = lambda *arguments: {"student": student}  # noqa: E731
    monkeypatch.setattr(phase_training, "whole_forward", lambda network, role: forward)
    config = config_of("end_to_end", rate=0.5, baseline=DistillConfig("soft", 0.2, 3.0))
    training, network = describe(config, MESH), teacher_network(config)
    params = fill(network.init)

    def taught(params):
        found = training.forward({}, {"teacher": params}, IMAGES, True, RNGS)
        assert found["student"]._replace(teacher=None) == student
        return found["student"].teacher

    got, want = jax.jit(lambda p: (taught(p), network.apply(p, IMAGES)[0]))(params)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def rates_of(config: Config, *, train=True, monkeypatch):
    """Rates of stochastic depth, in the order in which branches are dropped; nothing is
    computed."""
    rates = []

    def spy(branch, uniform, rate):
        rates.append(round(rate, 6))
        return branch

    monkeypatch.setattr(encoder, "drop_path", spy)
    training = describe(config, MESH)
    params = jax.eval_shape(training.init, jax.random.key(0))
    jax.eval_shape(
        lambda p, h: training.forward(p, h, IMAGES, train, RNGS), params, training.helpers
    )
    return rates


# One number per block that drops, for depths (1, 1, 1), (1, 2, 1) and (1, 1, 3).
RATES = {
    "pretrain_meta": [0.15, 0.3],
    "train_module": [0.1, 0.2, 0.3],  # the whole hybrid with module 1 of the teacher
    "assemble": [0.1, 0.2, 0.3],
    "distill": [0.15, 0.3],  # within the student of module 2
    "end_to_end": [0.075, 0.15, 0.225, 0.3],
    "few_shot": [0.075, 0.15, 0.225, 0.3],
}


@pytest.mark.parametrize("phase", RATES)
def test_drop_path_rates_of_each_phase(phase, monkeypatch):
    module = {"train_module": "1", "distill": "2"}.get(phase, "all")
    baseline = DistillConfig("soft" if phase == "end_to_end" else "none")
    config = config_of(phase, module=module, baseline=baseline)
    # Two branches per block.
    found = rates_of(config, monkeypatch=monkeypatch)
    assert found == [rate for rate in RATES[phase] for _ in range(2)]
    if module != "all":  # test_objective.py covers how a whole network is run
        assert rates_of(config, train=False, monkeypatch=monkeypatch) == []


NETWORKS = {
    "meta": meta_network,
    "teacher": teacher_network,
    "whole student": whole_student,
    "students": student_modules,
}


@pytest.mark.parametrize("student", ["vmoe", "nac"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_computes_in_configured_precision(name, student):
    config = config_of("distill", precision="bfloat16")
    if student == "nac":
        config = dataclasses.replace(config, model=NAC)
    network = NETWORKS[name](config)
    parts = network.stages if hasattr(network, "stages") else [network, *network.propagators]
    assert all(part.dtype == jnp.bfloat16 for part in parts)


def test_every_network_has_the_sizes_of_its_section():
    config = config_of("distill", widths=WIDTHS)
    for name, section in {
        "meta": "meta",
        "teacher": "teacher",
        "whole student": "model",
        "students": "model",
    }.items():
        network = NETWORKS[name](config)
        assert [len(stage.blocks) for stage in network.stages] == [*DEPTHS[section]]
        assert {stage.encoder.width for stage in network.stages} == {WIDTHS[section]}


def test_students_are_stitched_to_the_meta_model_width():
    config = config_of("distill", widths=WIDTHS)
    blocks = [block for stage in student_modules(config).stages for block in stage.blocks]
    assert [block.pre_stitch for block in blocks] == [None, 8, 8, None, None]
    assert [block.post_stitch for block in blocks] == [8, 8, None, None, None]
    model = dataclasses.replace(config.model, stitches="kept")
    kept = whole_student(dataclasses.replace(config, model=model))
    for whole, student in zip(kept.stages, student_modules(config).stages, strict=True):
        assert whole == student
    dropped = [block for stage in whole_student(config).stages for block in stage.blocks]
    assert {(block.pre_stitch, block.post_stitch) for block in dropped} == {(None, None)}


@pytest.mark.parametrize(
    ("phase", "roles", "helpers", "distill"),
    [
        ("pretrain_meta", ["meta"], {}, "none"),
        ("train_module", ["module"], {"meta": {0, 1, 2}}, "none"),
        ("assemble", ["teacher"], {}, "none"),
        ("distill", ["student"], {"meta": {0, 1, 2}, "teacher": {0, 1, 2}}, "hard"),
        ("end_to_end", ["student"], {"teacher": {0, 1, 2}}, "soft_batch_mean"),
        ("few_shot", ["student"], {}, "none"),
    ],
)
def test_roles_and_helpers_of_each_phase(phase, roles, helpers, distill):
    config = config_of(
        phase,
        distill=ModuleDistillConfig("hard", 0.3, 2.0),
        baseline=DistillConfig("soft_batch_mean", 0.7, 4.0),
    )
    training = describe(config, MESH)
    assert list(jax.eval_shape(training.init, jax.random.key(0))) == roles
    held = {role: {int(name[6:]) for name in tree} for role, tree in training.helpers.items()}
    assert held == helpers
    assert training.distill.kind == distill
    alphas = {"distill": (0.3, 2.0), "end_to_end": (0.7, 4.0)}
    if phase in alphas:
        assert (training.distill.alpha, training.distill.tau) == alphas[phase]
    # Each module is clipped separately; "student/stage_1" is two keys deep.
    assert training.clip_depth == (2 if phase in ("train_module", "distill") else 0)
    task = training.task(steps_per_epoch=5)
    assert (task.clip_depth, task.trainable) == (training.clip_depth, training.trainable)
    assert task.steps_per_epoch == 5 and task.helpers is training.helpers


def test_program_holds_only_its_own_modules():
    training = describe(config_of("distill", module="0+2"), MESH)
    params = jax.eval_shape(training.init, jax.random.key(0))
    assert set(params["student"]) == set(training.helpers["teacher"]) == {"stage_0", "stage_2"}
    assert len(training.helpers["meta"]) == 3
    training = describe(config_of("train_module", module="0+2"), MESH)
    assert len(training.helpers["meta"]) == 3  # each is needed around another module
    assert set(jax.eval_shape(training.init, jax.random.key(0))["module"]) == {"stage_0", "stage_2"}


def test_task_uses_micro_batches_and_episode_labels():
    optim = dataclasses.replace(OPTIM, batch=64, accumulate=4)
    training = describe(config_of("end_to_end", optim=optim), MESH)
    assert training.task(steps_per_epoch=1).batch["image"].shape == (16, 8, 8, 1)
    config = config_of("few_shot", few_shot=FewShotConfig(ways=3))
    training = describe(config, MESH)
    params = jax.eval_shape(training.init, jax.random.key(0))
    assert params["student"]["stage_2"]["head"]["kernel"].shape == (16, 3)
    assert training.config.data.labels == 3 and config.data.labels == 10


def test_feed_gives_full_training_and_micro_evaluation_batches(tmp_path):
    optim = dataclasses.replace(OPTIM, batch=64, accumulate=4)
    feed = feed_of(config_of("end_to_end", optim=optim), tmp_path)
    assert next(feed.batches(0))["image"].shape == (64, 8, 8, 1)
    assert next(iter(feed.evaluation()))["image"].shape == (16, 8, 8, 1)
    assert feed.steps_per_epoch == 1437 // 64 and feed.ood is None


def test_training_order_depends_on_seed(tmp_path):
    first, same, other = (
        next(feed_of(config_of("end_to_end", seed=seed), tmp_path).batches(0))["label"]
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, same)
    assert np.any(first != other)


@pytest.mark.parametrize("phase", ["pretrain_meta", "train_module", "assemble", "distill"])
def test_only_whole_networks_are_evaluated_out_of_distribution(phase, tmp_path):
    config = config_of(phase, ood=OodConfig(source="digits_r"))
    feed = feed_of(config, tmp_path)
    assert (feed.ood is not None) == (phase in ("pretrain_meta", "assemble"))


def test_stages_come_from_one_workdir_or_one_each():
    config = config_of("assemble")
    for given, want in {("a", "b", "c"): ("a", "b", "c"), ("a",): ("a", "a", "a")}.items():
        sources = dataclasses.replace(config.sources, modules=given)
        found = require_stage_sources(dataclasses.replace(config, sources=sources), "modules", 3)
        assert found == want
    for given in ((), ("a", "b"), ("a",) * 4):
        sources = dataclasses.replace(config.sources, modules=given)
        with pytest.raises(
            ValueError, match=rf"names {len(given)} workdirs .*needs 3, one per stage"
        ):
            require_stage_sources(dataclasses.replace(config, sources=sources), "modules", 3)
