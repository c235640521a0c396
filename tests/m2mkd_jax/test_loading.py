"""`load_model` returns the network that each phase's run trained, for images as they come."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import MOE, NAC, fill, tiny_config

import m2mkd_jax
from common_jax import checkpoint
from common_jax.config import unfreeze
from common_jax.optim import OptimConfig
from common_jax.step import init_state
from common_jax.workdir import write_json
from m2mkd_jax.config import EvaluationConfig, SourcesConfig
from m2mkd_jax.models import encoder, vit, vmoe
from m2mkd_jax.phases.networks import whole_student
from m2mkd_jax.phases.pipeline import result_folder
from m2mkd_jax.stages import stage_name
from m2mkd_jax.trained import open_run

IMAGES = encoder.Interface(image_size=8, channels=1, labels=10)


def config_of(phase, **changes):
    """A run whose networks all differ, with its own mean and std."""
    config = tiny_config(phase)
    data = dataclasses.replace(config.data, mean=(0.3,), std=(0.2,))
    meta = dataclasses.replace(config.meta, width=24, norm_eps=0.01)
    model = dataclasses.replace(config.model, norm_eps=0.1)
    return dataclasses.replace(config, data=data, meta=meta, model=model, **changes)


# Phase -> where its parameters are, and which network and stages they belong to.
RUNS = {
    "pretrain_meta": ("meta", lambda c: vit.build(c.meta, IMAGES), None),
    "train_module": ("module", lambda c: vit.build(c.teacher, IMAGES), 1),
    "assemble": ("teacher", lambda c: vit.build(c.teacher, IMAGES), None),
    "distill": ("student", lambda c: vmoe.build_students(c.model, IMAGES, meta_width=24), 0),
    "end_to_end": ("student", lambda c: vmoe.build(c.model, IMAGES, stitch_width=None), None),
    "few_shot": ("student", lambda c: vmoe.build(c.model, IMAGES, stitch_width=None), None),
}


@pytest.mark.parametrize("phase", RUNS)
def test_loaded_network_matches_the_trained_one(phase, tmp_path):
    role, build, module = RUNS[phase]
    config = config_of(phase, **{} if module is None else {"module": str(module)})
    network = build(config)
    params = fill(network.init)
    if module is not None:
        params = {stage_name(module): params[stage_name(module)]}
    checkpoint.write_params(tmp_path, {role: params}, unfreeze(config).to_dict())
    apply, loaded = m2mkd_jax.load_model(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)

    draw = np.random.default_rng(1)
    if module:  # a module takes tokens
        x = given = draw.normal(size=(2, *network.stages[module].example(1).shape[1:]))
    else:
        x = draw.integers(0, 256, (2, 8, 8, 1)).astype(np.uint8)
        given = (x / 255 - 0.3) / 0.2
    run = {} if module is None else {"start": module, "stop": module + 1}
    wanted, _ = jax.jit(lambda p, x: network.apply(p, x, **run))(params, np.float32(given))
    found = jax.jit(apply)(loaded, x if x.dtype == np.uint8 else np.float32(x))
    assert np.std(wanted) > 0.1
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert apply.config == config
    if module is None:
        head = params[stage_name(2)]["head"]
        logits = jax.jit(apply.features)(loaded, x) @ head["kernel"] + head["bias"]
        np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="is not of a whole ViT or V-MoE"):
            apply.features(loaded, x)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_ema_is_loaded_if_present(ema, tmp_path):
    optim = OptimConfig(ema=ema)
    config = dataclasses.replace(tiny_config("assemble"), optim=optim)
    params = {"teacher": fill(vit.build(config.teacher, IMAGES).init)}
    state = init_state(params, optim, trainable=".*/head/.*", metrics={})
    if ema:
        state = state.replace(ema=jax.tree.map(lambda leaf: leaf + 1, state.ema))
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1, best=None)
    checkpoints.save(state, step=0, config=unfreeze(config).to_dict(), metrics=None)
    checkpoints.close()
    _, loaded = m2mkd_jax.load_model(tmp_path)
    wanted, head = params["teacher"], params["teacher"]["stage_2"]["head"]
    wanted["stage_2"]["head"] = jax.tree.map(lambda leaf: leaf + (ema > 0), head)
    jax.tree.map(np.testing.assert_array_equal, loaded, wanted)


@pytest.mark.parametrize(
    ("phase", "asked", "message"),
    [
        ("distill", 2, r"module=2: .* trained modules \[0, 1\]: give module=K"),
        ("distill", None, r"module=None: .* \[0, 1\]: give module=K"),
        ("end_to_end", 0, r"module=0: .*phase='end_to_end' trained a whole .* leave module out"),
    ],
)
def test_untrained_module_is_refused(phase, asked, message, tmp_path):
    config = config_of(phase, module="0+1")
    params = {"student": {stage_name(i): {"x": np.ones(2)} for i in (0, 1)}}
    checkpoint.write_params(tmp_path, params, unfreeze(config).to_dict())
    with pytest.raises(ValueError, match=message):
        m2mkd_jax.load_model(tmp_path, module=asked)


def test_converted_headless_network_is_refused(tmp_path):
    sources = SourcesConfig(fresh=r"teacher/stage_\d+/head/.*")
    config = dataclasses.replace(tiny_config("assemble"), sources=sources)
    params = fill(vit.build(config.teacher, IMAGES).init)
    whole, run = tmp_path / "whole", unfreeze(config).to_dict()
    checkpoint.write_params(whole, {"teacher": params}, run)
    assert "head" in m2mkd_jax.load_model(whole)[1]["stage_2"]  # the head of a run that drew one
    del params["stage_2"]["head"]
    checkpoint.write_params(tmp_path / "headless", {"teacher": params}, run)
    with pytest.raises(
        ValueError, match=r"headless.* was converted .* it lacks stage_2/head/bias, stage_2/hea"
    ):
        m2mkd_jax.load_model(tmp_path / "headless")


def write_student(workdir, model, **changes):
    """A run of phase "end_to_end" with this network."""
    config = dataclasses.replace(tiny_config("end_to_end"), model=model, **changes)
    params = fill(whole_student(config).init)
    checkpoint.write_params(workdir, {"student": params}, unfreeze(config).to_dict())


def test_load_model_of_a_pipeline_gives_the_whole_student(tmp_path):
    config = tiny_config("end_to_end")
    write_student(tmp_path / result_folder(), config.model)
    write_json(tmp_path / "config.json", {"phase": "pipeline"})
    _, params = m2mkd_jax.load_model(tmp_path)
    assert params.keys() == {"stage_0", "stage_1", "stage_2"}


def test_loaded_nac_samples_no_edges(tmp_path):
    found = []
    for evaluation in ("kernel", "sample"):
        kernel = dataclasses.replace(NAC.kernel, evaluation=evaluation)
        noise = EvaluationConfig("mean" if evaluation == "kernel" else "fixed")
        model = dataclasses.replace(NAC, kernel=kernel)
        write_student(tmp_path / evaluation, model, evaluation=noise)
        apply, params = m2mkd_jax.load_model(tmp_path / evaluation)
        found.append(jax.jit(apply)(params, np.full((2, 8, 8, 1), 100, np.uint8)))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_capacity_routing_opens_on_one_device_per_group(tmp_path, groups, caplog):
    moe = dataclasses.replace(MOE, dispatch="capacity", groups=groups)
    model = dataclasses.replace(tiny_config("end_to_end").model, moe=moe)
    write_student(tmp_path, model)
    trained = open_run(tmp_path)
    assert trained.mesh.size == groups
    assert ("can be split over" in caplog.text) == (groups < 8)
    with pytest.raises(ValueError, match="there are 8 here"):
        open_run(tmp_path, {"mesh.data": "1"})
