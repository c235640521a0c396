"""Schedules, decay groups and the optimizer's arithmetic."""

import dataclasses

import numpy as np
import optax
import pytest
from jax import numpy as jnp

from common_jax.optim import OptimConfig, decay_mask, make_optimizer, make_schedule

CONFIG = OptimConfig(epochs=5, batch=64, lr=5e-4, warmup_epochs=2)


def test_epoch_cosine_lags_by_one_epoch_and_never_reaches_the_peak():
    schedule = make_schedule(CONFIG, steps_per_epoch=3)
    by_epoch = [float(schedule(3 * epoch)) for epoch in range(5)]
    expected = [1e-6, 1e-6, 3.175e-05, 4.436169610234237e-05, 2.8138303897657636e-05]
    np.testing.assert_allclose(by_epoch, expected, rtol=1e-6)
    assert float(schedule(3)) == float(schedule(5))  # constant within an epoch
    assert max(by_epoch) < CONFIG.peak_lr


def test_unlagged_epochs_jump_where_the_warmup_ends():
    config = dataclasses.replace(CONFIG, schedule="epoch_cosine_unlagged", lr_per=None)
    schedule = make_schedule(config, steps_per_epoch=3)
    by_epoch = [float(schedule(3 * epoch + 2)) for epoch in range(5)]
    cosine = [1e-5 + 0.5 * 4.9e-4 * (1 + np.cos(np.pi * t / 5)) for t in (2, 3, 4)]
    np.testing.assert_allclose(by_epoch, [1e-6, 2.505e-4, *cosine], rtol=1e-5)


def test_constant_is_the_peak():
    schedule = make_schedule(dataclasses.replace(CONFIG, schedule="constant"), steps_per_epoch=3)
    assert float(schedule(0)) == float(schedule(14)) == CONFIG.peak_lr


def test_warmup_cosine_reaches_peak_and_floor():
    config = dataclasses.replace(CONFIG, schedule="warmup_cosine")
    schedule = make_schedule(config, steps_per_epoch=10)
    values = [float(schedule(step)) for step in (0, 20, 50)]
    np.testing.assert_allclose(values, [1e-6, config.peak_lr, config.min_lr], rtol=1e-5)


def test_a_warmup_longer_than_the_run_is_refused():
    config = dataclasses.replace(CONFIG, schedule="warmup_cosine", steps=10)
    with pytest.raises(ValueError, match=r"config\.optim\.warmup_epochs=2 is 20 steps"):
        make_schedule(config, steps_per_epoch=10)


def test_decay_spares_vectors_and_biases():
    leaf = jnp.ones
    params = {
        "stage_0": {
            "cls_token": leaf((1, 1, 4)),
            "patches": {"kernel": leaf((4, 4)), "bias": leaf(4)},
            "qkv": {"bias": leaf((3, 2, 2))},
            "moe": {"up": leaf((2, 4, 4)), "up_bias": leaf((2, 4))},
            "norm": {"scale": leaf(4)},
            "gain": leaf(()),
        }
    }
    mask = decay_mask(params, CONFIG.no_decay)["stage_0"]
    assert mask["patches"] == {"kernel": True, "bias": False}
    assert mask["moe"] == {"up": True, "up_bias": False}
    assert not mask["cls_token"]
    assert not mask["qkv"]["bias"]
    assert not mask["norm"]["scale"]
    assert mask["gain"]


def test_everything_decays_if_asked():
    config = dataclasses.replace(CONFIG, decay_all=True, weight_decay=0.5)
    params = {"bias": jnp.array([2.0]), "cls_token": jnp.array([[4.0]])}
    optimizer = make_optimizer(config)
    zero = {name: jnp.zeros_like(leaf) for name, leaf in params.items()}
    direction, _ = optimizer.update(zero, optimizer.init(params), params)
    assert (direction["bias"], direction["cls_token"]) == (1.0, 2.0)


def test_sgd_is_nesterovs():
    config = dataclasses.replace(CONFIG, optimizer="sgd", weight_decay=0.1)
    optimizer, p, trace = make_optimizer(config), np.array([[1.0]]), 0.0
    state = optimizer.init({"kernel": jnp.asarray(p)})
    for g in (0.5, -0.25, 1.0):
        direction, state = optimizer.update(
            {"kernel": jnp.array([[g]])}, state, {"kernel": jnp.asarray(p)}
        )
        decayed = g + 0.1 * p
        trace = 0.9 * trace + decayed
        np.testing.assert_allclose(direction["kernel"], decayed + 0.9 * trace, rtol=1e-6)
        p = p - 0.1 * np.asarray(direction["kernel"])


def test_the_direction_is_clipped_adamw():
    config = dataclasses.replace(CONFIG, clip=1.0, weight_decay=0.3)
    params = {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]])}
    gradient = {"kernel": jnp.array([[3.0, 4.0], [0.0, 12.0]])}  # of norm 13
    optimizer = make_optimizer(config)
    direction, _ = optimizer.update(gradient, optimizer.init(params), params)
    g = np.asarray(gradient["kernel"]) / 13
    expected = g / (np.abs(g) + config.eps) + 0.3 * np.asarray(params["kernel"])
    # 1 - b2 in float32 is exact to 6e-5, and its root enters
    np.testing.assert_allclose(direction["kernel"], expected, rtol=5e-5)
    assert optax.tree.norm(gradient) == 13


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "cosine"}, r"^schedule='cosine' must be one of"),
        ({"accumulate": 3}, r"^batch=64 must be a multiple"),
        ({"optimizer": "adam"}, r"^optimizer='adam' must be one of"),
        ({"ema": 1.0}, r"^ema=1\.0"),
        ({"steps": 0}, r"^steps=0 must be at least 1"),
    ],
)
def test_settings_out_of_range_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_inverse_sqrt_rises_to_the_peak_and_falls():
    config = OptimConfig(
        schedule="inverse_sqrt", lr=0.01, lr_per=None, steps=100, warmup_steps=4, warmup_epochs=9
    )
    rate = make_schedule(config, 7)
    wanted = [0.0025, 0.005, 0.0075, 0.01, 0.01 * (4 / 5) ** 0.5, 0.005]
    assert [float(rate(step)) for step in (0, 1, 2, 3, 4, 15)] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("schedule", ["epoch_cosine", "epoch_cosine_unlagged", "warmup_cosine"])
def test_a_warmup_is_shorter_than_the_run(schedule):
    config = OptimConfig(schedule=schedule, epochs=10, warmup_epochs=20)
    said = (
        r"config\.recipes\.distill\.optim\.warmup_epochs=20 is a warm-up of 200 steps, and the run "
        r"has only 100 \(config\.recipes\.distill\.optim\.epochs=10, 10 steps an epoch\): give a "
        r"shorter warm-up, such as --config\.recipes\.distill\.optim\.warmup_epochs=0"
    )
    with pytest.raises(ValueError, match=said):
        config.check_warmup(10, key="config.recipes.distill.optim")
    for fine in ({"epochs": 21}, {"steps": 201}, {"warmup_epochs": 9}, {"warmup_epochs": 0}):
        dataclasses.replace(config, **fine).check_warmup(10)
    with pytest.raises(ValueError, match=r"config\.optim\.steps=200"):
        dataclasses.replace(config, steps=200).check_warmup(10)


def test_a_warmup_in_steps_counts_where_the_schedule_knows_it():
    config = OptimConfig(schedule="inverse_sqrt", steps=100, warmup_steps=100)
    with pytest.raises(ValueError, match=r"config\.optim\.warmup_steps=100 is a warm-up of 100"):
        config.check_warmup(10)
    dataclasses.replace(config, warmup_steps=99).check_warmup(10)
    for schedule in ("constant", "polynomial"):  # which have no warm-up
        dataclasses.replace(config, schedule=schedule).check_warmup(10)
