"""What an evaluation draws, and what a phase adds to its loss, on a linear classifier of digits."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import PartitionSpec
from meshes import one_device, split_mesh
from tiny import NAC, feed_of, tiny_config

from common_jax.checkpoint import finished_steps
from common_jax.metrics import read_metrics
from common_jax.optim import OptimConfig
from common_jax.state import evaluation_key, fold_name
from m2mkd_jax.config import DistillConfig, EvaluationConfig
from m2mkd_jax.data.ood import OodConfig
from m2mkd_jax.families import family_of
from m2mkd_jax.phases import PHASES
from m2mkd_jax.phases.objective import Outputs, make_loss, make_sums
from m2mkd_jax.phases.phase import Training, config_feed
from m2mkd_jax.phases.training import train_phase, with_feed

# 1,437 images make three steps per epoch; 360 test images make two batches, the last one padded.
OPTIM = OptimConfig(steps=9, batch=400, lr=1e-2, lr_per=None, warmup_epochs=0)
STREAMS = family_of(NAC).evaluation_streams


def config_of(noise, **changes):
    config = tiny_config("end_to_end", optim=OPTIM)
    noise = EvaluationConfig(noise=noise)
    return dataclasses.replace(config, model=NAC, evaluation=noise, **changes)


def init(key):
    return {"net": {"kernel": 0.1 * jax.random.normal(key, (64, 10))}}


def forward(params, helpers, images, train, rngs):
    """Logits, plus a draw from each evaluation stream that has keys."""
    logits = images.reshape(len(images), 64) @ params["net"]["kernel"]
    if rngs is not None and not train:
        for name in STREAMS:
            logits += jax.random.normal(rngs[name], logits.shape)
    return {"net": Outputs(logits, None, {})}


def training_of(config, **settings):
    return Training(
        PHASES[config.phase],
        config,
        init=init,
        rules=(("/net/kernel", PartitionSpec()),),
        forward=forward,
        **settings,
    )


def evaluator(config, tmp_path, mesh):
    """The test-set evaluation of a run with `config`."""
    task = with_feed(training_of(config), feed_of(config, tmp_path), mesh)
    return task.evaluators["test"]


@pytest.mark.parametrize("noise", ["mean", "fixed", "sampled"])
def test_forward_gets_evaluation_streams_unless_noise_is_mean(tmp_path, noise):
    config, seen = config_of(noise), []

    def spy(params, helpers, images, train, rngs):
        seen.append((train, rngs))
        return forward(params, helpers, images, train, rngs)

    key = evaluation_key(np.uint32(0), 0)
    batch = jax.tree.map(jnp.asarray, next(feed_of(config, tmp_path).evaluation()))
    make_sums(spy, config, ["classification"])(init(jax.random.key(0)), {}, batch, key)
    ((train, rngs),) = seen
    assert train is False
    if noise == "mean":
        assert rngs is None
    else:
        assert set(rngs) == {"state", "pooling", "kernel"}
        assert all(rngs[name] == fold_name(key, name) for name in rngs)


def test_only_sampled_noise_differs_between_steps(tmp_path):
    params = init(jax.random.key(1))
    first, again, later = {}, {}, {}
    for noise in ("mean", "fixed", "sampled"):
        config = config_of(noise)
        run = evaluator(config, tmp_path, one_device())
        first[noise], later[noise] = run(params, {}, 3), run(params, {}, 6)
        again[noise] = evaluator(config, tmp_path, one_device())(params, {}, 3)
    assert first == again
    assert first["mean"] == later["mean"] and first["fixed"] == later["fixed"]
    assert first["sampled"]["loss"] != later["sampled"]["loss"]
    assert len({result["loss"] for result in first.values()}) == 3


@pytest.mark.parametrize("noise", ["mean", "fixed", "sampled"])
def test_evaluation_draws_depend_on_run_seed(tmp_path, noise):
    params = init(jax.random.key(1))
    first, second = (
        evaluator(config_of(noise, seed=seed), tmp_path, one_device())(params, {}, 3)["loss"]
        for seed in (0, 1)
    )
    assert (first == second) == (noise == "mean")


def test_ood_set_is_scored_among_its_own_classes(tmp_path):
    """A model that is right among all ten; no rendition shows the digits 6 and 9."""
    config = config_of("mean", ood=OodConfig(source="digits_r"))
    feed = feed_of(config, tmp_path)
    evaluators = with_feed(training_of(config), feed, one_device()).evaluators
    assert list(evaluators) == ["test", "ood"]
    favoured = {"net": {"kernel": jnp.zeros((64, 10)).at[:, 6].set(100.0)}}
    # 6 wins wherever it counts; the others are all equal, and the first class is taken.
    found = evaluators["ood"](favoured, {}, 0)
    labels = np.concatenate([b["label"][b["_mask"] > 0] for b in feed.ood()])
    assert found["loss"] == pytest.approx(np.log(8), rel=1e-5)
    assert found["accuracy"] == pytest.approx(np.mean(labels == 0))
    assert evaluators["test"](favoured, {}, 0)["loss"] > 10


@pytest.mark.parametrize("noise", ["mean", "fixed", "sampled"])
def test_evaluation_draws_match_on_eight_devices(tmp_path, noise):
    params, config = init(jax.random.key(2)), config_of(noise)
    one, eight = (
        evaluator(config, tmp_path, mesh)(params, {}, 3) for mesh in (one_device(), split_mesh())
    )
    assert one["accuracy"] == eight["accuracy"]
    assert one["loss"] == pytest.approx(eight["loss"], rel=1e-6)


def test_padding_is_ignored(tmp_path):
    config, params = config_of("mean"), init(jax.random.key(3))
    found = evaluator(config, tmp_path, one_device())(params, {}, 0)
    batches = list(feed_of(config, tmp_path).evaluation())
    real = [batch["_mask"] == 1 for batch in batches]
    assert [int(mask.sum()) for mask in real] == [360] and len(real[0]) == 400
    images = np.concatenate([b["image"][m] for b, m in zip(batches, real, strict=True)])
    labels = np.concatenate([b["label"][m] for b, m in zip(batches, real, strict=True)])
    pixels = (images.reshape(360, 64) / 255 - 0.5) / 0.5
    logits = pixels @ np.asarray(params["net"]["kernel"], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert found["accuracy"] == pytest.approx(np.mean(logits.argmax(axis=1) == labels), rel=1e-6)
    assert found["loss"] == pytest.approx(-log_p[np.arange(360), labels].mean(), rel=1e-5)


def test_an_unknown_noise_is_named():
    with pytest.raises(ValueError, match=r"^noise='fixd' .*'fixed'\?"):
        EvaluationConfig(noise="fixd")


def regularizer(params, step):
    term = step * jnp.sum(params["net"]["kernel"] ** 2)
    return 2.0 * term, {"penalty": term}


def test_regularizer_adds_to_loss_and_metrics():
    config, params = config_of("mean"), init(jax.random.key(4))
    batch = {"image": jnp.zeros((4, 8, 8, 1), jnp.uint8), "label": jnp.arange(4)}
    rngs = {name: jax.random.key(0) for name in ("augment", "mix")}
    none = DistillConfig(kind="none")
    plain, few = make_loss(forward, config, none)(params, {}, batch, rngs, 3)
    total, more = make_loss(forward, config, none, regularizer=regularizer)(
        params, {}, batch, rngs, 3
    )
    assert float(total - plain) == pytest.approx(float(2.0 * more["penalty"]), rel=1e-4)
    assert more == few | {"penalty": 3 * jnp.sum(params["net"]["kernel"] ** 2)}


def test_run_with_draws_resumes_byte_for_byte(tmp_path):
    config = config_of("sampled", ood=OodConfig(source="digits_r"))

    def run(workdir):
        training = training_of(config, regularizer=lambda steps_per_epoch: regularizer)
        return train_phase(training, workdir, one_device(), feed=config_feed(training, workdir))

    result = run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "result.json").unlink()
    checkpoints = tmp_path / "cut" / "checkpoints"
    shutil.rmtree(checkpoints / str(finished_steps(checkpoints)[-1]))
    assert finished_steps(checkpoints)[-1] == 6
    assert run(tmp_path / "cut") == result
    name = "metrics.jsonl"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    lines = read_metrics(tmp_path / "whole" / name)
    tested = [line for line in lines if "test/loss" in line]
    assert [line["step"] for line in tested] == [3, 6, 9]
    assert all({"ood/loss", "ood/accuracy", "ood/accuracy_top5"} <= set(line) for line in tested)
    penalties = [line["train/penalty"] for line in lines if "train/loss" in line]
    assert len(penalties) == 5 and min(penalties) > 0
    saved = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert saved["ood/accuracy"] == tested[-1]["ood/accuracy"]
