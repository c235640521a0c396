"""The update as a pure function: accumulation, skipped steps, running averages, sums of metrics."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from meshes import one_device

from common_jax.optim import OptimConfig, make_schedule
from common_jax.state import STREAMS, evaluation_key, fold_name, merge, partition, step_rngs
from common_jax.step import init_state, make_evaluator, make_step

CONFIG = OptimConfig(
    steps=8, batch=8, lr=0.1, lr_per=None, schedule="warmup_cosine", warmup_epochs=0, warmup_lr=0.0
)


def loss(params, helpers, batch, rngs, step):
    """Least squares with a frozen offset."""
    error = batch["x"] @ params["net"]["kernel"] + params["net"]["offset"] - batch["y"]
    return jnp.mean(error**2) * helpers["scale"], {"error": jnp.mean(jnp.abs(error))}


def problem():
    rng = np.random.default_rng(0)
    params = {"net": {"kernel": jnp.ones((3, 2)), "offset": jnp.full((2,), 0.5)}}
    batch = {"x": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32), "y": jnp.ones((8, 2))}
    return params, batch, {"scale": jnp.ones(())}


def run(config, steps, *, batches=None, log_every=100, trainable="net/kernel"):
    params, batch, helpers = problem()
    step = jax.jit(
        make_step(loss, config, make_schedule(config, 8), trainable=trainable, log_every=log_every)
    )
    metrics = {"error": jax.ShapeDtypeStruct((), jnp.float32)}
    state = init_state(params, config, trainable=trainable, metrics=metrics)
    reports = []
    for i in range(steps):
        state, report = step(state, helpers, batches[i] if batches else batch, np.uint32(0))
        reports.append(jax.device_get(report))
    return state, reports


def test_only_what_is_trainable_moves():
    state, _ = run(CONFIG, 3)
    params, _, _ = problem()
    np.testing.assert_array_equal(state.params["net"]["offset"], params["net"]["offset"])
    assert np.all(state.params["net"]["kernel"] != params["net"]["kernel"])


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    whole, one = run(CONFIG, 3)
    split, four = run(dataclasses.replace(CONFIG, accumulate=4), 3)
    np.testing.assert_allclose(
        split.params["net"]["kernel"], whole.params["net"]["kernel"], rtol=1e-5
    )
    assert four[-1]["loss"] == pytest.approx(one[-1]["loss"], rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_knows_the_step(accumulate):
    def stepping(params, helpers, batch, rngs, step):
        value, metrics = loss(params, helpers, batch, rngs, step)
        return value * step, metrics | {"step": step.astype(jnp.float32)}

    params, batch, helpers = problem()
    config = dataclasses.replace(CONFIG, accumulate=accumulate)
    shapes = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in ("error", "step")}
    step = make_step(stepping, config, lambda _: 0.1, trainable="net/kernel", log_every=1)
    state = init_state(params, config, trainable="net/kernel", metrics=shapes)
    for count in range(3):
        state, report = jax.jit(step)(state, helpers, batch, np.uint32(0))
        assert report["step"] == count
        assert (report["gradient_norm"] > 0) == (count > 0)


def test_a_non_finite_step_changes_nothing_but_the_counts():
    _, batch, _ = problem()
    bad = batch | {"y": batch["y"].at[0, 0].set(jnp.nan)}
    clean, _ = run(CONFIG, 1)
    state, reports = run(CONFIG, 3, batches=[batch, bad, bad])
    jax.tree.map(np.testing.assert_array_equal, state.params, clean.params)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, clean.opt_state)
    assert (int(state.step), int(state.skipped), int(state.skipped_in_row)) == (3, 2, 2)
    assert np.isfinite(reports[-1]["loss"])
    assert reports[-1]["steps"] == 1
    state, _ = run(CONFIG, 3, batches=[batch, bad, batch])
    assert (int(state.skipped), int(state.skipped_in_row)) == (1, 0)


def test_the_average_follows_the_parameters():
    config = dataclasses.replace(CONFIG, ema=0.75)
    state, _ = run(config, 1)
    params, _, _ = problem()
    start, end = params["net"]["kernel"], state.params["net"]["kernel"]
    np.testing.assert_allclose(state.ema["net"]["kernel"], 0.75 * start + 0.25 * end, rtol=1e-6)
    assert "offset" not in state.ema["net"]


def test_sums_start_anew_after_every_line():
    _, reports = run(CONFIG, 5, log_every=2)
    assert [report["steps"] for report in reports] == [1, 2, 1, 2, 1]
    _, single = run(CONFIG, 5, log_every=1)
    assert reports[3]["loss"] == pytest.approx(single[2]["loss"] + single[3]["loss"], rel=1e-6)


def test_keys_depend_on_seed_step_and_name_alone():
    keys = step_rngs(np.uint32(3), np.int32(7), ("drop_path", "gate"))
    more = step_rngs(np.uint32(3), np.int32(7), ("new", "gate", "drop_path"))
    for name, key in keys.items():
        assert jnp.all(jax.random.key_data(key) == jax.random.key_data(more[name]))
    others = [
        step_rngs(np.uint32(4), np.int32(7))["gate"],
        step_rngs(np.uint32(3), np.int32(8))["gate"],
        keys["drop_path"],
        fold_name(keys["gate"], "stage_0"),
    ]
    for other in others:
        assert jnp.any(jax.random.key_data(other) != jax.random.key_data(keys["gate"]))


def test_partition_and_merge_are_inverse():
    params, _, _ = problem()
    chosen, rest = partition(params, r"net/kernel")
    assert list(chosen["net"]) == ["kernel"]
    assert jax.tree.structure(merge(rest, chosen)) == jax.tree.structure(params)
    with pytest.raises(ValueError, match=r"no parameter matches 'gone/.*'"):
        partition(params, "gone/.*")


def test_evaluation_counts_every_example_once():
    mesh = one_device()

    def sums(params, helpers, batch, key):
        return {"value": jnp.sum(batch["v"] * batch["_mask"]), "count": jnp.sum(batch["_mask"])}

    batches = [{"v": np.array([1.0, 2.0]), "_mask": np.ones(2)}]
    batches.append({"v": np.array([6.0, 99.0]), "_mask": np.array([1.0, 0.0])})
    assert make_evaluator(sums, lambda: batches, mesh=mesh, seed=0)({}, {}, 5) == {"value": 3.0}
    with pytest.raises(ValueError, match="the set is empty"):
        make_evaluator(sums, list, mesh=mesh, seed=0)({}, {}, 5)


@pytest.mark.parametrize("fold_step", [False, True])
def test_draws_of_an_evaluation_come_from_seed_step_and_batch_alone(fold_step):
    def sums(params, helpers, batch, key):
        return {
            f"batch_{i}": jnp.where(batch["number"][0] == i, jax.random.uniform(key), 0.0)
            for i in range(2)
        } | {"count": 0.5}  # of two batches: what is read are totals

    def evaluate(step, seed=3):
        mesh = one_device()
        batches = [{"number": np.array([i])} for i in range(2)]
        evaluator = make_evaluator(sums, lambda: batches, mesh=mesh, seed=seed, fold_step=fold_step)
        return evaluator({}, {}, step)

    first = evaluate(10)
    assert first == evaluate(10)
    assert first["batch_0"] != first["batch_1"]
    assert all((evaluate(20)[name] == value) != fold_step for name, value in first.items())
    assert all(evaluate(10, seed=4)[name] != value for name, value in first.items())


def test_evaluation_shares_no_key_with_training():
    trained = [key for step in range(9) for key in step_rngs(np.uint32(3), step, STREAMS).values()]
    drawn = [
        evaluation_key(np.uint32(3), batch, step=step)
        for batch in range(3)
        for step in (None, *range(9))
    ]
    words = {tuple(np.asarray(jax.random.key_data(key))) for key in trained + drawn}
    assert len(words) == len(trained) + len(drawn)
