"""The update as a pure function: gradient accumulation, skipped steps, running averages, summed
metrics."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp
from meshes import one_device

from common_jax.optim import OPTIMIZERS, OptimConfig, OptimizerKind, make_schedule
from common_jax.state import evaluation_key, step_rngs
from common_jax.step import (
    Programs,
    _split,
    init_state,
    make_evaluator,
    make_step,
    one_behind,
    part_norms,
)

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


def test_only_trainable_parameters_change():
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


def test_micro_batches_take_every_nth_example():
    np.testing.assert_array_equal(_split(jnp.arange(6), 2), [[0, 2, 4], [1, 3, 5]])
    rows = jnp.arange(12).reshape(6, 2)
    np.testing.assert_array_equal(_split(rows, 3)[1], [[2, 3], [8, 9]])


def test_loss_metrics_and_gradient_are_means_over_micro_batches():
    def square(params, helpers, batch, rngs, step):
        mean = jnp.mean(batch["x"])
        return params["w"] * mean**2, {"mean": mean, "first": batch["x"][:1]}

    config = OptimConfig(steps=1, batch=4, accumulate=2)
    shapes = {"mean": jnp.zeros(()), "first": jnp.zeros(1)}
    state = init_state({"w": jnp.array(2.0)}, config, trainable="w", metrics=shapes)
    step = jax.jit(make_step(square, config, lambda _: 0.1, trainable="w", log_every=1))
    _, report = step(state, {}, {"x": jnp.array([1.0, 2.0, 3.0, 4.0])}, np.uint32(0))
    # The mean of 1 and 3 is 2; of 2 and 4, 3.
    assert report["loss"] == 2 * (4 + 9) / 2
    assert (report["mean"], report["gradient_norm"]) == (2.5, 6.5)
    np.testing.assert_array_equal(report["first"], [1.5])
    assert report["learning_rate"] == np.float32(0.1)


DRAWN = ("augment", "code", "dropout")


@pytest.fixture(scope="module")
def keys_of():
    """keys_of(accumulate, seed, step): for each stream, every micro-batch's key, as numbers."""

    @functools.cache
    def make(accumulate):
        def drawing(params, helpers, batch, rngs, step):
            mine = jnp.arange(accumulate) == batch["row"][0]  # its first row is its index
            words = {name: mine[:, None] * jax.random.key_data(rngs[name]) for name in DRAWN}
            high = {f"{name}/high": (x >> 16).astype(jnp.float32) for name, x in words.items()}
            low = {f"{name}/low": (x & 0xFFFF).astype(jnp.float32) for name, x in words.items()}
            return params["w"] ** 2, high | low

        config = OptimConfig(steps=9, batch=8, accumulate=accumulate)
        parts = [f"{name}/{part}" for name in DRAWN for part in ("high", "low")]
        shapes = dict.fromkeys(parts, jnp.zeros((accumulate, 2)))
        fresh = init_state({"w": jnp.ones(())}, config, trainable="w", metrics=shapes)
        settings = {"trainable": "w", "log_every": 1, "streams": DRAWN}
        return fresh, jax.jit(make_step(drawing, config, lambda _: 0.1, **settings))

    def keys_of(accumulate, *, seed, step):
        fresh, update = make(accumulate)
        state = fresh.replace(step=jnp.asarray(step, jnp.int32))
        _, report = update(state, {}, {"row": jnp.arange(8)}, np.uint32(seed))
        report = {name: np.asarray(value, np.float64) for name, value in report.items()}
        words = {name: 2**16 * report[f"{name}/high"] + report[f"{name}/low"] for name in DRAWN}
        return {name: (accumulate * x).astype(np.int64).tolist() for name, x in words.items()}

    return keys_of


def test_each_micro_batch_has_its_own_keys(keys_of):
    keys = step_rngs(np.uint32(3), np.int32(5), DRAWN)
    data = lambda key: jax.random.key_data(key).tolist()  # noqa: E731
    folded = jax.random.fold_in
    assert keys_of(4, seed=3, step=5) == {
        name: [data(folded(key, number)) for number in range(4)] for name, key in keys.items()
    }
    assert keys_of(1, seed=3, step=5) == {name: [data(key)] for name, key in keys.items()}


def test_streams_steps_seeds_and_micro_batches_share_no_key(keys_of):
    found = [
        tuple(key)
        for seed, step in ((3, 5), (3, 6), (4, 5), (5, 3))
        for keys in keys_of(4, seed=seed, step=step).values()
        for key in keys
    ]
    assert len(set(found)) == len(found) == 4 * 4 * len(DRAWN)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loss_receives_the_step(accumulate):
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


def test_non_finite_step_changes_only_the_counters():
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


def fragile(params, helpers, batch, rngs, step):
    """The gradient is NaN where `zero` is 0; `offset` determines the value."""
    root = jnp.sqrt(params["w"] * batch["zero"])
    return root + batch["offset"], {"error": jnp.isfinite(root).astype(jnp.float32)}


@pytest.mark.parametrize(
    ("zero", "offset"), [(0.0, 0.0), (1.0, np.nan), (1.0, np.inf), (1.0, -np.inf)]
)
@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "new"])
def test_non_finite_loss_or_gradient_alone_skips_the_step(monkeypatch, optimizer, zero, offset):
    """With any optimizer, also one that is added as plain optax."""
    new = OptimizerKind(lambda config, decay: (optax.scale_by_lion(config.b1, config.b2), decay))
    monkeypatch.setitem(OPTIMIZERS, "new", new)
    config = OptimConfig(steps=9, batch=1, optimizer=optimizer, ema=0.5)
    shapes = {"error": jax.ShapeDtypeStruct((), jnp.float32)}
    fresh = init_state({"w": jnp.array(4.0)}, config, trainable="w", metrics=shapes)
    step = jax.jit(make_step(fragile, config, lambda _: 0.1, trainable="w", log_every=9))
    good = {"zero": jnp.array(1.0), "offset": jnp.array(0.0)}
    before, _ = step(fresh, {}, good, np.uint32(0))
    bad = {"zero": jnp.array(zero), "offset": jnp.array(offset)}
    after, report = step(before, {}, bad, np.uint32(0))
    assert (int(after.step), int(after.skipped), int(after.skipped_in_row)) == (2, 1, 1)
    for kept in ("params", "opt_state", "ema", "sums"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, kept), getattr(before, kept))
    assert before.ema["w"] != before.params["w"] != fresh.params["w"]
    assert (report["steps"], report["skipped"], report["skipped_in_row"]) == (1, 1, 1)


def linear(params, helpers, batch, rngs, step):
    """The gradient is the batch."""
    return jnp.sum(params["w"] * batch["g"]), {}


def test_sgd_steps_and_average_match_a_hand_computation():
    """Each has its own learning rate, also after a skipped step."""
    config = OptimConfig(
        steps=9, batch=1, optimizer="sgd", momentum=0.5, weight_decay=0.1, ema=0.75
    )
    state = init_state({"w": jnp.array([[2.0]])}, config, trainable="w", metrics={})
    schedule = lambda step: 0.1 * (step + 1)  # noqa: E731
    step = jax.jit(make_step(linear, config, schedule, trainable="w", log_every=1))
    p = average = 2.0
    trace = 0.0
    for number, g in enumerate((1.0, -3.0, np.nan, 0.5, 2.0)):
        state, report = step(state, {}, {"g": jnp.array([[g]])}, np.uint32(0))
        rate = 0 if np.isnan(g) else 0.1 * (number + 1)
        assert float(report["learning_rate"]) == pytest.approx(rate)  # of this step only
        assert report["steps"] == (0 if np.isnan(g) else 1)
        if not np.isnan(g):
            decayed = g + 0.1 * p
            trace = 0.5 * trace + decayed
            p -= 0.1 * (number + 1) * (decayed + 0.5 * trace)
            average = 0.75 * average + 0.25 * p
        assert state.params["w"].item() == pytest.approx(p, rel=1e-5)
        assert state.ema["w"].item() == pytest.approx(average, rel=1e-5)


def test_gradient_norms_are_measured_before_clipping():
    def loss(params, helpers, batch, rngs, step):
        return 3 * params["a"]["x"] + 4 * params["b"]["x"] + 99 * params["c"]["x"], {}

    config = OptimConfig(
        steps=9, batch=1, optimizer="sgd", momentum=0.0, clip=1.0, decay_all=True, weight_decay=0.0
    )
    params = {name: {"x": jnp.array(5.0)} for name in "abc"}
    for depth, wanted in ((0, (4.4, 4.2, 5.0)), (1, (4.0, 4.0, 5.0))):
        parts = ("a/gradient_norm", "b/gradient_norm") if depth else ()
        shapes = dict.fromkeys(parts, jnp.zeros(()))
        state = init_state(params, config, trainable="[ab]/x", metrics=shapes)
        settings = {"trainable": "[ab]/x", "log_every": 1, "clip_depth": depth}
        step = jax.jit(make_step(loss, config, lambda _: 1.0, **settings))
        state, report = step(state, {}, {"x": jnp.ones(1)}, np.uint32(0))
        assert report["gradient_norm"] == 5
        assert [report[name] for name in parts] == [3, 4][: len(parts)]
        found = [float(state.params[name]["x"]) for name in "abc"]
        assert found == pytest.approx(wanted)


def test_network_with_one_part_has_one_norm():
    gradient = {"a": {"x": jnp.array(3.0), "y": jnp.array(4.0)}}
    assert part_norms(gradient, 0) == part_norms(gradient, 1) == {}
    assert part_norms(gradient, 2) == {"a/x/gradient_norm": 3.0, "a/y/gradient_norm": 4.0}
    assert part_norms(gradient | {"b": {"x": jnp.array(1.0)}}, 1) == {
        "a/gradient_norm": 5.0,
        "b/gradient_norm": 1.0,
    }


def test_average_starts_at_the_parameters_or_is_none():
    params, _, _ = problem()
    settings = {"trainable": "net/kernel", "metrics": {"load": jnp.zeros((2, 3))}}
    state = init_state(params, dataclasses.replace(CONFIG, ema=0.9), **settings)
    np.testing.assert_array_equal(state.ema["net"]["kernel"], params["net"]["kernel"])
    assert state.ema["net"]["kernel"] is not params["net"]["kernel"]  # the parameters are donated
    assert init_state(params, CONFIG, **settings).ema is None
    assert {name: x.shape for name, x in state.sums.items()} == {
        "load": (2, 3), "loss": (), "learning_rate": (), "gradient_norm": (), "steps": ()
    }  # fmt: skip
    assert (int(state.step), int(state.skipped), int(state.skipped_in_row)) == (0, 0, 0)


def test_average_follows_the_parameters():
    config = dataclasses.replace(CONFIG, ema=0.75)
    state, _ = run(config, 1)
    params, _, _ = problem()
    start, end = params["net"]["kernel"], state.params["net"]["kernel"]
    np.testing.assert_allclose(state.ema["net"]["kernel"], 0.75 * start + 0.25 * end, rtol=1e-6)
    assert "offset" not in state.ema["net"]


def test_sums_are_reset_after_every_line():
    _, reports = run(CONFIG, 5, log_every=2)
    assert [report["steps"] for report in reports] == [1, 2, 1, 2, 1]
    _, single = run(CONFIG, 5, log_every=1)
    assert reports[3]["loss"] == pytest.approx(single[2]["loss"] + single[3]["loss"], rel=1e-6)


def test_evaluation_counts_every_example_once():
    mesh = one_device()

    def sums(params, helpers, batch, key):
        return {"value": jnp.sum(batch["v"] * batch["_mask"]), "count": jnp.sum(batch["_mask"])}

    batches = [{"v": np.array([1.0, 2.0]), "_mask": np.ones(2)}]
    batches.append({"v": np.array([6.0, 99.0]), "_mask": np.array([1.0, 0.0])})
    assert make_evaluator(sums, lambda: batches, mesh=mesh, seed=0)({}, {}, 5) == {"value": 3.0}
    with pytest.raises(ValueError, match="the set is empty"):
        make_evaluator(sums, list, mesh=mesh, seed=0)({}, {}, 5)


def test_runs_sharing_programs_compile_their_evaluation_once():
    programs, batches = Programs(), [{"v": np.array([1.0, 3.0])}]
    sums = lambda params, helpers, batch, key: {"v": jnp.sum(batch["v"]), "count": 2}  # noqa: E731
    refuse = lambda *_: pytest.fail("is compiled again")  # noqa: E731
    for totals in (sums, refuse):
        evaluator = make_evaluator(
            totals, lambda: batches, mesh=one_device(), seed=0, programs=programs
        )
        assert evaluator({}, {}, 1) == {"v": 2.0}
    double = lambda *given: sums(*given) | {"v": 8.0}  # noqa: E731
    evaluator = make_evaluator(
        double, lambda: batches, mesh=one_device(), seed=0, programs=programs, name="another"
    )
    assert evaluator({}, {}, 1) == {"v": 4.0}


@pytest.mark.parametrize("fold_step", [False, True])
def test_evaluation_draws_depend_on_seed_step_and_batch_only(fold_step):
    def sums(params, helpers, batch, key):
        return {
            f"batch_{i}": jnp.where(batch["number"][0] == i, jax.random.uniform(key), 0.0)
            for i in range(2)
        } | {"count": 0.5}  # over two batches: what is read are totals

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
    trained = [key for step in range(9) for key in step_rngs(np.uint32(3), step, DRAWN).values()]
    drawn = [
        evaluation_key(np.uint32(3), batch, step=step)
        for batch in range(3)
        for step in (None, *range(9))
    ]
    words = {tuple(np.asarray(jax.random.key_data(key))) for key in trained + drawn}
    assert len(words) == len(trained) + len(drawn)


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_compiled_step_does_not_copy_the_moments(average):
    config = dataclasses.replace(CONFIG, ema=average)
    params = {f"layer_{i}": jnp.ones((256, 256)) for i in range(8)}

    def product(params, helpers, batch, rngs, step):
        x = functools.reduce(lambda x, kernel: jnp.tanh(x @ kernel), params.values(), batch["x"])
        return jnp.mean(x**2), {}

    step = make_step(product, config, make_schedule(config, 8), trainable=".*", log_every=1)
    state = init_state(params, config, trainable=".*", metrics={})
    batch, seed = {"x": jnp.ones((8, 256))}, np.uint32(0)
    compiled = jax.jit(step, donate_argnums=0).lower(state, {}, batch, seed).compile()
    # The gradient and little else; with copies of both moments, it would be three times the size.
    size = sum(leaf.nbytes for leaf in params.values())
    assert size <= compiled.memory_analysis().temp_size_in_bytes < 1.5 * size


class Result:
    """Records when it is dispatched, and when it is read on the host."""

    def __init__(self, number, events):
        self.number, self.events = number, events
        events.append(f"dispatch {number}")

    def read(self):
        self.events.append(f"read {self.number}")
        return self.number


@pytest.mark.parametrize("count", [0, 1, 3])
def test_one_behind_reads_after_the_next_dispatch(count):
    events = []
    results = (Result(number, events) for number in range(count))
    assert [result.read() for result in one_behind(results)] == [*range(count)]
    order = ["dispatch 0", "dispatch 1", "read 0", "dispatch 2", "read 1", "read 2"]
    assert events == {0: [], 1: ["dispatch 0", "read 0"], 3: order}[count]


def test_one_behind_raises_errors_of_the_next_result():
    def results():
        yield 0
        yield 1
        raise ValueError("out of memory")

    found = one_behind(results())
    assert next(found) == 0
    with pytest.raises(ValueError, match="out of memory"):
        next(found)
