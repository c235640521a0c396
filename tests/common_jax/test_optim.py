"""Schedules, weight decay groups and the optimizer's arithmetic."""

import dataclasses

import numpy as np
import optax
import pytest
from jax import numpy as jnp

from common_jax import optim
from common_jax.optim import (
    OptimConfig,
    clip_by_norm,
    decay_mask,
    make_optimizer,
    make_schedule,
    replaced_lengths,
    scale_lengths,
)

CONFIG = OptimConfig(epochs=5, batch=64, lr=5e-4, warmup_epochs=2)


def directions(config, params, gradients, **settings):
    """The optimizer's updates for a sequence of gradients, with the parameters held constant."""
    optimizer, found = make_optimizer(config, **settings), []
    state = optimizer.init(params)
    for gradient in gradients:
        direction, state = optimizer.update(gradient, state, params)
        found.append(direction)
    return found


def rates(config, steps_per_epoch, steps):
    schedule = make_schedule(config, steps_per_epoch)
    return [float(schedule(jnp.asarray(step, jnp.int32))) for step in steps]


def test_defaults_match_the_original():
    assert dataclasses.asdict(OptimConfig()) == {
        "epochs": 300, "steps": None, "batch": 512, "accumulate": 1, "lr": 5e-4, "lr_per": 512,
        "schedule": "epoch_cosine", "warmup_epochs": 20, "warmup_steps": None, "warmup_lr": 1e-6,
        "min_lr": 1e-5, "power": 2.0, "optimizer": "adamw", "weight_decay": 0.05, "b1": 0.9,
        "b2": 0.999, "eps": 1e-8, "momentum": 0.9, "decay_all": False,
        "no_decay": r".*/(pos_embed|cls_token)", "clip": None, "ema": 0.0,
    }  # fmt: skip


def test_micro_batch_peak_lr_and_lengths_are_derived():
    config = OptimConfig(batch=64, accumulate=4, lr=0.5, lr_per=256, epochs=7, warmup_epochs=3)
    assert (config.micro_batch, config.peak_lr) == (16, 0.125)
    assert dataclasses.replace(config, lr_per=None).peak_lr == 0.5
    assert (config.total_steps(10), config.total_warmup(10)) == (70, 30)
    config = dataclasses.replace(config, steps=9, warmup_steps=0)
    assert (config.total_steps(10), config.total_warmup(10)) == (9, 0)


def test_epoch_cosine_lags_by_one_epoch_and_never_reaches_the_peak():
    schedule = make_schedule(CONFIG, steps_per_epoch=3)
    by_epoch = [float(schedule(3 * epoch)) for epoch in range(5)]
    expected = [1e-6, 1e-6, 3.175e-05, 4.436169610234237e-05, 2.8138303897657636e-05]
    np.testing.assert_allclose(by_epoch, expected, rtol=1e-6)
    assert float(schedule(3)) == float(schedule(5))  # constant within an epoch
    assert max(by_epoch) < CONFIG.peak_lr


def test_unlagged_epoch_cosine_jumps_where_the_warmup_ends():
    config = dataclasses.replace(CONFIG, schedule="epoch_cosine_unlagged", lr_per=None)
    schedule = make_schedule(config, steps_per_epoch=3)
    by_epoch = [float(schedule(3 * epoch + 2)) for epoch in range(5)]
    cosine = [1e-5 + 0.5 * 4.9e-4 * (1 + np.cos(np.pi * t / 5)) for t in (2, 3, 4)]
    np.testing.assert_allclose(by_epoch, [1e-6, 2.505e-4, *cosine], rtol=1e-5)


def test_epoch_schedules_count_a_partial_last_epoch():
    config = OptimConfig(
        schedule="epoch_cosine_unlagged", steps=7, lr=0.1, lr_per=None, warmup_epochs=1,
        warmup_lr=0.01, min_lr=0.02,
    )  # fmt: skip
    # 1 + cos(pi / 3) is 1.5, and 1 + cos(2 pi / 3) is 0.5: three epochs of 3, 3 and 1 steps.
    wanted = [0.01, 0.01, 0.08, 0.08, 0.04, 0.04]
    assert rates(config, 3, (0, 2, 3, 5, 6, 99)) == pytest.approx(wanted, rel=1e-5)
    lagged = dataclasses.replace(config, schedule="epoch_cosine")
    wanted = [0.01, 0.01, 0.01, 0.01, 0.08, 0.08]
    assert rates(lagged, 3, (0, 2, 3, 5, 6, 99)) == pytest.approx(wanted, rel=1e-5)
    unwarmed = dataclasses.replace(lagged, warmup_epochs=0)
    assert rates(unwarmed, 3, (0, 3, 6)) == pytest.approx([0.1, 0.1, 0.08], rel=1e-5)


def test_constant_schedule_is_the_peak():
    schedule = make_schedule(dataclasses.replace(CONFIG, schedule="constant"), steps_per_epoch=3)
    assert float(schedule(0)) == float(schedule(14)) == CONFIG.peak_lr


def test_warmup_cosine_reaches_peak_and_floor():
    config = dataclasses.replace(CONFIG, schedule="warmup_cosine")
    schedule = make_schedule(config, steps_per_epoch=10)
    values = [float(schedule(step)) for step in (0, 20, 50)]
    np.testing.assert_allclose(values, [1e-6, config.peak_lr, config.min_lr], rtol=1e-5)


def test_warmup_cosine_is_linear_then_half_a_cosine():
    config = OptimConfig(
        schedule="warmup_cosine", epochs=5, lr=0.1, lr_per=None, warmup_epochs=2, warmup_lr=0.02,
        min_lr=0.01,
    )  # fmt: skip
    third = 0.01 + 0.09 * 1.5 / 2  # after a third of the decay, at cos(pi / 3)
    wanted = [0.02, 0.04, 0.1, third, 0.055, 0.01, 0.01]
    assert rates(config, 10, (0, 5, 20, 30, 35, 50, 60)) == pytest.approx(wanted, rel=1e-5)
    in_steps = dataclasses.replace(config, warmup_steps=5)
    assert rates(in_steps, 10, (0, 1, 5, 50)) == pytest.approx([0.02, 0.036, 0.1, 0.01], rel=1e-5)
    unwarmed = dataclasses.replace(config, warmup_epochs=0)
    assert rates(unwarmed, 10, (0, 25)) == pytest.approx([0.1, 0.055], rel=1e-5)


def test_polynomial_decays_from_the_peak_without_warmup():
    config = OptimConfig(
        schedule="polynomial", steps=10, lr=0.01, lr_per=None, min_lr=0.002, power=3.0,
        warmup_epochs=9, warmup_steps=9,
    )  # fmt: skip
    wanted = [0.01, 0.002 + 0.008 * 0.512, 0.003, 0.002, 0.002]
    assert rates(config, 4, (0, 2, 5, 10, 15)) == pytest.approx(wanted, rel=1e-5)


def test_a_warmup_longer_than_the_run_is_refused():
    config = dataclasses.replace(CONFIG, schedule="warmup_cosine", steps=10)
    with pytest.raises(ValueError, match=r"config\.optim\.warmup_epochs=2 is a warm-up of 20"):
        make_schedule(config, steps_per_epoch=10)


def test_decay_mask_spares_vectors_and_biases():
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


def test_decay_mask_matches_whole_names_of_biases_and_positions():
    leaf = jnp.ones((2, 2))
    params = {
        "bias": leaf,  # at the top level, with no slash before it
        "bias_table": leaf,
        "down_bias": leaf,
        "log_scale": jnp.ones(()),
        "a": {"pos_embed": leaf, "bias": {"kernel": leaf}, "my_bias": leaf},
        "b": {"pos_embed": {"kernel": leaf}, "my_pos_embed": leaf},
    }
    assert decay_mask(params, CONFIG.no_decay) == {
        "bias": False,
        "bias_table": True,
        "down_bias": False,
        "log_scale": False,
        "a": {"pos_embed": False, "bias": {"kernel": True}, "my_bias": True},
        "b": {"pos_embed": {"kernel": True}, "my_pos_embed": True},
    }


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_no_decay_exempts_matching_parameters(optimizer):
    config = dataclasses.replace(
        CONFIG, optimizer=optimizer, weight_decay=0.5, momentum=0.0, no_decay="head/.*"
    )
    params = {name: {"kernel": jnp.full((2, 1), 3.0)} for name in ("body", "head")}
    params["body"]["bias"] = jnp.ones(1)
    zero = {name: {key: 0 * leaf for key, leaf in part.items()} for name, part in params.items()}
    (direction,) = directions(config, params, [zero])
    np.testing.assert_array_equal(direction["body"]["kernel"], 1.5)
    np.testing.assert_array_equal(direction["body"]["bias"], 0)
    np.testing.assert_array_equal(direction["head"]["kernel"], 0)


def test_decay_all_decays_everything():
    config = dataclasses.replace(CONFIG, decay_all=True, weight_decay=0.5)
    params = {"bias": jnp.array([2.0]), "cls_token": jnp.array([[4.0]])}
    optimizer = make_optimizer(config)
    zero = {name: jnp.zeros_like(leaf) for name, leaf in params.items()}
    direction, _ = optimizer.update(zero, optimizer.init(params), params)
    assert (direction["bias"], direction["cls_token"]) == (1.0, 2.0)


def test_sgd_uses_nesterov_momentum():
    config = dataclasses.replace(CONFIG, optimizer="sgd", weight_decay=0.1, momentum=0.7)
    optimizer, p, trace = make_optimizer(config), np.array([[1.0]]), 0.0
    state = optimizer.init({"kernel": jnp.asarray(p)})
    for g in (0.5, -0.25, 1.0):
        direction, state = optimizer.update(
            {"kernel": jnp.array([[g]])}, state, {"kernel": jnp.asarray(p)}
        )
        decayed = g + 0.1 * p
        trace = 0.7 * trace + decayed
        np.testing.assert_allclose(direction["kernel"], decayed + 0.7 * trace, rtol=1e-6)
        p = p - 0.1 * np.asarray(direction["kernel"])


def test_adamw_steps_match_a_hand_computation():
    config = OptimConfig(b1=0.6, b2=0.8, eps=0.1, weight_decay=0.3)
    params = {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([4.0])}
    gradients = [
        {"kernel": jnp.array([[0.5, 1.0]]), "bias": jnp.array([-1.0])},
        {"kernel": jnp.array([[-0.25, 0.0]]), "bias": jnp.array([2.0])},
        {"kernel": jnp.array([[1.5, -3.0]]), "bias": jnp.array([0.0])},
    ]
    found = directions(config, params, gradients)
    for name, decay in (("kernel", 0.3), ("bias", 0.0)):
        m = v = 0.0
        for t, gradient in enumerate(gradients, 1):
            g = np.asarray(gradient[name], np.float64)
            m, v = 0.6 * m + 0.4 * g, 0.8 * v + 0.2 * g**2
            u = m / (1 - 0.6**t) / (np.sqrt(v / (1 - 0.8**t)) + 0.1)
            wanted = u + decay * np.asarray(params[name])
            np.testing.assert_allclose(found[t - 1][name], wanted, rtol=1e-5, atol=1e-6)


def test_gradient_is_clipped_to_the_norm_and_smaller_ones_are_unchanged():
    gradient = {"a": {"x": jnp.array([3.0]), "y": jnp.array([0.0])}, "b": {"x": jnp.array([4.0])}}
    for largest, depth, wanted in (
        (5.0, 0, (3.0, 4.0)),
        (1.0, 0, (0.6, 0.8)),  # total norm 5
        (3.5, 1, (3.0, 3.5)),
        (1.0, 2, (1.0, 1.0)),
    ):
        clip = clip_by_norm(largest, depth)
        clipped, _ = clip.update(gradient, clip.init(gradient), gradient)
        found = [float(clipped[name]["x"][0]) for name in ("a", "b")]
        assert found == pytest.approx(wanted), (largest, depth)
        assert float(clipped["a"]["y"][0]) == 0


def test_part_is_clipped_by_the_norm_of_all_its_parameters():
    gradient = {"a": {"x": jnp.array([3.0]), "y": jnp.array([4.0])}, "b": {"x": jnp.array([0.5])}}
    clip = clip_by_norm(1.0, 1)
    clipped, _ = clip.update(gradient, clip.init(gradient), gradient)
    found = (clipped["a"]["x"][0], clipped["a"]["y"][0], clipped["b"]["x"][0])
    assert tuple(map(float, found)) == pytest.approx((0.6, 0.8, 0.5))


def test_weight_decay_is_not_clipped():
    config = dataclasses.replace(CONFIG, optimizer="sgd", momentum=0.0, clip=1.0, weight_decay=0.5)
    params = {"a": {"kernel": jnp.array([[10.0]])}, "b": {"kernel": jnp.array([[20.0]])}}
    gradient = {"a": {"kernel": jnp.array([[3.0]])}, "b": {"kernel": jnp.array([[4.0]])}}
    for depth, wanted in ((0, (5.6, 10.8)), (1, (6.0, 11.0))):
        (direction,) = directions(config, params, [gradient], clip_depth=depth)
        found = [direction[name]["kernel"].item() for name in ("a", "b")]
        assert found == pytest.approx(wanted), depth


def test_adamw_uses_the_clipped_gradient():
    config = dataclasses.replace(CONFIG, clip=1.0, weight_decay=0.3)
    params = {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]])}
    gradient = {"kernel": jnp.array([[3.0, 4.0], [0.0, 12.0]])}  # norm 13
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
def test_out_of_range_settings_are_reported(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_inverse_sqrt_rises_to_the_peak_and_falls():
    config = OptimConfig(
        schedule="inverse_sqrt", lr=0.01, lr_per=None, steps=100, warmup_steps=4, warmup_epochs=9
    )
    rate = make_schedule(config, 7)
    wanted = [0.0025, 0.005, 0.0075, 0.01, 0.01 * (4 / 5) ** 0.5, 0.005]
    assert [float(rate(step)) for step in (0, 1, 2, 3, 4, 15)] == pytest.approx(wanted, rel=1e-5)


def test_inverse_sqrt_warms_up_over_epochs_or_not_at_all():
    config = OptimConfig(schedule="inverse_sqrt", lr=0.01, lr_per=None, steps=99, warmup_epochs=2)
    assert rates(config, 3, (2, 5, 23)) == pytest.approx([0.005, 0.01, 0.005], rel=1e-5)
    config = dataclasses.replace(config, warmup_epochs=0)
    # As after a warm-up of one step.
    wanted = [0.01, 0.01 / 2**0.5, 0.01 / 3**0.5, 0.005]
    assert rates(config, 3, range(4)) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    "schedule", ["epoch_cosine", "epoch_cosine_unlagged", "warmup_cosine", "inverse_sqrt"]
)
def test_warmup_must_be_shorter_than_the_run(schedule):
    config = OptimConfig(schedule=schedule, epochs=10, warmup_epochs=20)
    said = (
        r"config\.recipes\.distill\.optim\.warmup_epochs=20 is a warm-up of 200 steps, and the run "
        r"has only 100 \(config\.recipes\.distill\.optim\.epochs=10, 10 steps per epoch.*\): give "
        r"a shorter warm-up"
    )
    # Without a warm-up this one falls at once, to half the peak in four steps.
    said += "" if schedule == "inverse_sqrt" else r", such as --config\..*optim\.warmup_epochs=0"
    said += ", or a longer run"
    with pytest.raises(ValueError, match=said):
        config.check_warmup(10, key="config.recipes.distill.optim")
    lag = optim.SCHEDULES[schedule].lag
    for fine in (
        {"epochs": 21 + lag},
        {"steps": 201 + 10 * lag},
        {"warmup_epochs": 9 - lag},
        {"warmup_epochs": 0},
    ):
        dataclasses.replace(config, **fine).check_warmup(10)
    with pytest.raises(ValueError, match=rf"config\.optim\.steps={200 + 10 * lag}"):
        dataclasses.replace(config, steps=200 + 10 * lag).check_warmup(10)


def test_lagged_warmup_that_never_ends_is_refused():
    config = OptimConfig(epochs=2, warmup_epochs=1, warmup_lr=0.0)
    assert rates(config, 3, range(6)) == [0.0] * 6
    with pytest.raises(ValueError, match=r"3 steps, .* only 6 .*; schedule='epoch_cosine' is 3 st"):
        config.check_warmup(3)


def test_run_length_is_limited_by_its_counter_and_schedule():
    config = OptimConfig(epochs=10**6)
    config.check_length(2147)
    with pytest.raises(ValueError, match=r"config\.optim\.epochs=1000000 is a run of 2148000000"):
        config.check_length(2148)
    by_steps = OptimConfig(steps=10**7 + 1)
    with pytest.raises(ValueError, match=r"x\.steps=10000001 is a run of 1000001 epochs, and x\.s"):
        by_steps.check_length(10, key="x")
    dataclasses.replace(by_steps, schedule="warmup_cosine").check_length(10)


def test_warmup_steps_count_only_for_schedules_that_use_them():
    config = OptimConfig(schedule="inverse_sqrt", steps=100, warmup_steps=100)
    with pytest.raises(ValueError, match=r"config\.optim\.warmup_steps=100 is a warm-up of 100"):
        config.check_warmup(10)
    dataclasses.replace(config, warmup_steps=99).check_warmup(10)
    for schedule in ("constant", "polynomial"):  # these have no warm-up
        dataclasses.replace(config, schedule=schedule).check_warmup(10)
    for schedule in ("epoch_cosine", "epoch_cosine_unlagged"):  # these change only between epochs
        by_epoch = dataclasses.replace(config, schedule=schedule, warmup_epochs=1)
        by_epoch.check_warmup(10)
        with pytest.raises(
            ValueError, match=r"config\.optim\.warmup_epochs=10 is a warm-up of 100"
        ):
            dataclasses.replace(by_epoch, warmup_steps=1, warmup_epochs=10).check_warmup(10)


@dataclasses.dataclass(frozen=True)
class Recipe:
    optim: OptimConfig
    other: int = 3


def lengths(optim):
    return optim.epochs, optim.steps, optim.warmup_epochs, optim.warmup_steps


@pytest.mark.parametrize(
    ("given", "scale", "expected"),
    [
        ((100, None, 20, None), 0.1, (10, None, 2, None)),
        ((10, None, 2, None), 0.1, (1, None, 0, None)),
        ((20, None, 18, None), 0.2, (4, None, 2, None)),  # 3 of 4 epochs would be 4, with the lag
        ((10, None, 9, None), 0.1, (1, None, 0, None)),
        ((300, 800, 20, 400), 0.25, (75, 200, 5, 100)),
        ((300, 3, 20, 2), 0.1, (30, 1, 2, 0)),
        ((10, 50, 2, 5), 2.0, (20, 100, 4, 10)),
    ],
)
def test_scale_lengths_scales_lengths_and_warmups_only(given, scale, expected):
    names = ("epochs", "steps", "warmup_epochs", "warmup_steps")
    optim = dataclasses.replace(CONFIG, **dict(zip(names, given, strict=True)))
    scaled = scale_lengths({"one": Recipe(optim)}, scale)["one"]
    assert lengths(scaled.optim) == expected
    back = dataclasses.replace(scaled.optim, **dict(zip(names, given, strict=True)))
    assert (back, scaled.other) == (optim, 3)


def test_scale_of_one_changes_nothing_and_invalid_scales_are_refused():
    recipes = {"one": Recipe(dataclasses.replace(CONFIG, epochs=5, warmup_epochs=5))}
    assert scale_lengths(recipes, 1.0) == recipes
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"scale=.* must be positive, such as 0\.1"):
            scale_lengths(recipes, scale)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"warmup_steps": 5}, ["warmup_steps"]),
        ({"schedule": "warmup_cosine", "warmup_steps": 5, "min_lr": 1e-3, "warmup_lr": 0.1}, []),
        ({"schedule": "inverse_sqrt", "min_lr": 1e-3, "warmup_lr": 0.1}, ["min_lr", "warmup_lr"]),
        ({"schedule": "polynomial", "warmup_epochs": 5, "power": 3.0}, ["warmup_epochs"]),
        ({"schedule": "polynomial", "warmup_epochs": 0, "min_lr": 0.0}, []),
        ({"power": 3.0, "momentum": 0.5}, ["momentum", "power"]),
        ({"optimizer": "sgd", "b1": 0.5, "momentum": 0.5}, ["b1"]),
        ({"decay_all": True, "no_decay": "x"}, ["no_decay"]),
        ({"warmup_epochs": 0, "warmup_lr": 0.1}, ["warmup_lr"]),
        ({"schedule": "warmup_cosine", "warmup_steps": 0, "warmup_lr": 0.1}, ["warmup_lr"]),
    ],
)
def test_idle_lists_the_fields_that_are_not_read(fields, names):
    assert sorted(OptimConfig(**fields).idle) == names


@pytest.mark.parametrize("name", ["warmup_epochs", "warmup_steps", "warmup_lr", "min_lr", "power"])
@pytest.mark.parametrize("schedule", optim.SCHEDULES)
def test_schedules_read_exactly_their_declared_fields(schedule, name):
    start = OptimConfig(schedule=schedule, steps=40, warmup_epochs=1, warmup_steps=None)
    values = {"warmup_epochs": 2, "warmup_steps": 7, "warmup_lr": 0.1, "min_lr": 1e-4, "power": 3.0}
    other = dataclasses.replace(start, **{name: values[name]})
    rates = [[float(make_schedule(one, 10)(step)) for step in range(40)] for one in (start, other)]
    assert (rates[0] != rates[1]) == (name in optim.SCHEDULES[schedule].reads)


@pytest.mark.parametrize("section", ["optim", "recipes.one.optim"])
def test_epochs_are_replaced_by_updates_in_any_section(section):
    lengths = {"steps": 7, "epochs": 50, "warmup_steps": None, "warmup_epochs": 1}
    lengths["schedule"] = "warmup_cosine"
    config = {"optim": lengths, "recipes": {"one": {"optim": lengths}}, "epochs": 3}
    paths = ["epochs", *(f"{section}.{name}" for name in lengths)]
    why = f"config.{section}.steps=7 is used in its place"
    assert replaced_lengths(config, paths) == {f"{section}.epochs": why}
