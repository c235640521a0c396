"""Whole runs, against values worked out by hand: draws, learning rates, averages, log lines,
checkpoints."""

import dataclasses
import functools
import json
import types

import jax
import numpy as np
import pytest
from descent import OPTIM, STEPS, descend, make_task, numbers, shared_programs
from jax import numpy as jnp

from common_jax import checkpoint, hosts, loop, signals
from common_jax.checkpoint import finished_steps
from common_jax.log import clocks
from common_jax.metrics import read_metrics
from common_jax.state import fold_name, step_rngs
from common_jax.weights import WarmStart

PLAIN = dataclasses.replace(OPTIM, optimizer="sgd", momentum=0.0, weight_decay=0.0, lr=0.1)
AVERAGED = dataclasses.replace(PLAIN, ema=0.75)
BROKEN = (2, 5, 6)  # steps, counted from 0, whose batch is NaN


@functools.cache
def by_hand(*, seed=0, broken=(), start=None, decay=0.75):
    """The loss at every step, and the parameter and its average after it."""
    key = fold_name(jax.random.key(np.uint32(seed)), "init")
    w = average = float(jax.random.normal(key)) if start is None else start
    losses, values, averages = [], [w], [w]
    for step in range(STEPS):
        dropout = step_rngs(np.uint32(seed), np.int32(step), ("dropout",))["dropout"]
        noise = float(jax.random.normal(fold_name(dropout, "noise")))
        errors = w - numbers(step).astype(np.float64) - 0.1 * noise
        losses.append(np.nan if step in broken else np.mean(errors**2))
        if step not in broken:
            w -= 0.1 * 2 * np.mean(errors)
            average = decay * average + (1 - decay) * w
        values.append(w)
        averages.append(average)
    return losses, values, averages


def task(broken=(), **changes):
    found = make_task(lambda params, helpers, step: {"w": float(params["w"])}, broken=broken)
    return dataclasses.replace(found, **changes)


def train(workdir, *, task, optim=OPTIM, log_every=1, **settings):
    settings |= {"log_every": log_every, "programs": shared_programs(optim, log_every)}
    return descend(workdir, task=task, optim=optim, **settings)


def lines(workdir, name):
    """One metric in the log, by step."""
    log = read_metrics(workdir / "metrics.jsonl")
    return {line["step"]: line[name] for line in log if name in line}


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """The folder and result of a run with an average and three skipped steps."""
    workdir = tmp_path_factory.mktemp("averaged") / "run"
    return workdir, train(workdir, task=task(BROKEN), optim=AVERAGED, keep=9)


def test_every_step_matches_a_hand_computation(averaged):
    losses, _, _ = by_hand(broken=BROKEN)
    close(list(lines(averaged[0], "train/loss").values()), losses)
    skipped = list(lines(averaged[0], "train/skipped").values())
    assert skipped == [0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3]
    in_row = list(lines(averaged[0], "train/skipped_in_row").values())
    assert in_row == [0, 0, 1, 0, 0, 1, 2, 0, 0, 0, 0, 0]


def test_evaluation_uses_the_average_without_skipped_steps(averaged):
    workdir, result = averaged
    _, values, averages = by_hand(broken=BROKEN)
    evaluated = lines(workdir, "test/w")
    assert list(evaluated) == [4, 8, 12]
    close(list(evaluated.values()), [averages[step] for step in evaluated])
    assert abs(averages[12] - values[12]) > 1e-2
    assert result == {
        "phase": "descent",
        "steps": STEPS,
        "skipped": 3,
        "test/w": evaluated[12],
    }
    assert json.loads((workdir / "result.json").read_text()) == result


def test_checkpoints_hold_parameters_and_average(averaged):
    _, values, averages = by_hand(broken=BROKEN)
    for step in (4, 8, 12):
        folder = averaged[0] / "checkpoints" / str(step)
        close(checkpoint.load(folder)["w"], values[step])
        close(checkpoint.load(folder, average=True)["w"], averages[step])
    assert finished_steps(averaged[0] / "checkpoints") == [4, 8, 12]


def test_log_counts_epochs(averaged):
    assert lines(averaged[0], "epoch") == {step: step / 4 for step in range(1, STEPS + 1)}


def stop_after(step, monkeypatch):
    """Requests a stop after that step."""
    left = iter(range(step - 1))

    def check():
        if next(left, None) is None:
            raise signals.Stopped

    monkeypatch.setattr(hosts, "check", check)


def test_run_may_resume_with_another_log_interval(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(signals.Stopped):
        stop_after(5, patch)
        train(tmp_path, task=task(), optim=PLAIN)
    train(tmp_path, task=task(), optim=PLAIN, log_every=4)
    _, values, _ = by_hand()
    close(checkpoint.load(tmp_path)["w"], values[STEPS])
    assert list(lines(tmp_path, "train/loss")) == [1, 2, 3, 4, 5, 8, 12]


@pytest.mark.parametrize("stopped", [3, 6])
def test_resumed_average_is_bitwise_identical(averaged, stopped, tmp_path, monkeypatch):
    """Stopped right after a skipped step, or in a row of them."""
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(signals.Stopped):
        stop_after(stopped, patch)
        train(workdir, task=task(BROKEN), optim=AVERAGED, keep=9)
    assert finished_steps(workdir / "checkpoints")[-1] == stopped
    assert train(workdir, task=task(BROKEN), optim=AVERAGED, keep=9) == averaged[1]
    text = [(folder / "metrics.jsonl").read_bytes() for folder in (workdir, averaged[0])]
    assert text[0] == text[1]
    for average in (False, True):
        found, want = (checkpoint.load(x, average=average) for x in (workdir, averaged[0]))
        np.testing.assert_array_equal(found["w"], want["w"])


MEAN = {"optim": PLAIN, "average_last": 2, "keep": 9, "checkpoint_minutes": None}


@pytest.fixture(scope="module")
def mean(tmp_path_factory):
    """The folder and result of a run whose result is the mean of its last two checkpoints."""
    workdir = tmp_path_factory.mktemp("mean") / "run"
    return workdir, descend(workdir, task=task(), **MEAN)


def test_checkpoint_mean_is_evaluated_and_loaded_at_the_end(mean):
    workdir, result = mean
    _, values, _ = by_hand()
    wanted = np.mean([values[8], values[12]])
    evaluated = lines(workdir, "test/w")
    close([evaluated[4], evaluated[8], evaluated[12]], [values[4], values[8], wanted])
    assert abs(wanted - values[12]) > 1e-2 and result["test/w"] == evaluated[12]
    close(checkpoint.load(workdir, average=True)["w"], wanted)
    close(checkpoint.load(workdir)["w"], values[12])
    earlier = checkpoint.load(workdir / "checkpoints" / "8", average=True)
    close(earlier["w"], values[8])  # not the partial mean


@pytest.mark.parametrize("stopped", [7, 8, 9])
def test_resumed_checkpoint_mean_is_bitwise_identical(mean, stopped, tmp_path, monkeypatch):
    """Stopped before, right after and past a step that counts, in a run that keeps one
    checkpoint."""
    workdir, settings = tmp_path / "run", MEAN | {"keep": 1}
    with monkeypatch.context() as patch, pytest.raises(signals.Stopped):
        stop_after(stopped, patch)
        descend(workdir, task=task(), **settings)
    assert descend(workdir, task=task(), **settings) == mean[1]
    assert finished_steps(workdir / "checkpoints") == [12]
    for average in (False, True):
        found, want = (checkpoint.load(x, average=average) for x in (workdir, mean[0]))
        np.testing.assert_array_equal(found["w"], want["w"])
    (workdir / "result.json").unlink()
    assert descend(workdir, task=task(), **settings) == mean[1]


def test_timed_saves_are_excluded_from_the_mean(ticking, mean, tmp_path):
    """Saves after steps 6 and 12; a batch takes ten seconds."""
    settings = MEAN | {"checkpoint_minutes": 1.0, "log_every": 2, "checkpoint_every": 2}
    descend(tmp_path, task=ticking(10.0), **settings)
    assert finished_steps(tmp_path / "checkpoints") == [6, 8, 12]
    loaded = (checkpoint.load(x, average=True)["w"] for x in (tmp_path, mean[0]))
    np.testing.assert_array_equal(*loaded)


def test_parameters_are_evaluated_without_an_average(tmp_path):
    """In a run with another seed, longer logging intervals, and epochs between evaluations and
    saves."""
    settings = {"log_every": 5, "eval_every": 3, "checkpoint_every": 2, "keep": 9}
    (tmp_path / "warm_start.json").write_text("{}")  # from a failed start
    train(tmp_path, seed=3, task=task((6,)), optim=PLAIN, **settings)
    losses, values, _ = by_hand(seed=3, broken=(6,))
    assert list(lines(tmp_path, "test/w")) == [12]
    close(lines(tmp_path, "test/w")[12], values[12])
    assert finished_steps(tmp_path / "checkpoints") == [8, 12]
    assert not (tmp_path / "checkpoints" / "12" / "average").exists()
    assert not (tmp_path / "warm_start.json").exists()
    logged = lines(tmp_path, "train/loss")
    wanted = [np.mean(losses[:5]), np.nanmean(losses[5:10]), np.mean(losses[10:])]
    assert list(logged) == [5, 10, 12]
    close(list(logged.values()), wanted)


def test_run_killed_before_its_result_is_evaluated_without_logging(tmp_path):
    result = train(tmp_path, task=task(), optim=AVERAGED)
    text = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "result.json").unlink()
    assert train(tmp_path, task=task(), optim=AVERAGED) == result
    assert (tmp_path / "metrics.jsonl").read_bytes() == text
    (tmp_path / "checkpoints" / "12").rename(tmp_path / "elsewhere")
    assert train(tmp_path, task=task(), optim=AVERAGED) == result  # result.json is returned
    assert not (tmp_path / "checkpoints" / "12").exists()


def test_interval_of_skipped_steps_logs_nan_and_the_run_continues(tmp_path):
    result = train(tmp_path, task=task((0, 1, 2)), optim=PLAIN, log_every=3, nan_patience=4)
    assert result["skipped"] == 3
    logged = list(lines(tmp_path, "train/loss").values())
    assert np.isnan(logged[0]) and np.isfinite(logged[1:]).all()


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path):
    broken = task((1, 4, 5, 6, 7))
    with pytest.raises(FloatingPointError, match=r"the last 3 steps up to step 7 .*nan_patience=3"):
        train(tmp_path, task=broken, optim=PLAIN, nan_patience=3)
    assert finished_steps(tmp_path / "checkpoints") == [4]
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(("lower", "best"), [((), 8), (("w",), 4)])
def test_best_checkpoint_has_the_highest_score_or_the_lowest(tmp_path, lower, best):
    rising_and_falling = {4: 0.1, 8: 0.9, 12: 0.5}
    evaluate = lambda params, helpers, step: {"w": rising_and_falling[step]}  # noqa: E731
    task = dataclasses.replace(make_task(evaluate), lower=lower)
    train(tmp_path, task=task, keep=1, best="test/w")
    assert finished_steps(tmp_path / "checkpoints") == [best, 12]


@pytest.fixture
def ticking(monkeypatch):
    """ticking(seconds, evaluation, values): a task in which every batch takes `seconds` and every
    evaluation `evaluation`; `values` are its metrics by step."""
    now = [0.0]
    clock = types.SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: now[0])
    monkeypatch.setattr(clocks, "time", clock)
    save = loop.Checkpoints.save

    def slow_save(self, *args, **settings):
        now[0] += 500
        save(self, *args, **settings)

    def make(seconds, evaluation=0.0, scores=(0.0, 0.0, 0.0)):
        def evaluate(params, helpers, step):
            now[0] += evaluation
            return {"w": scores[step // 4 - 1]}

        def batches(first):
            for batch in made.batches(first):
                now[0] += seconds
                yield batch

        monkeypatch.setattr(loop.Checkpoints, "save", slow_save)
        made = make_task(evaluate)
        return dataclasses.replace(made, batches=batches)

    return make


@pytest.mark.parametrize(("eval_every", "checkpoint_every"), [(1, 3), (3, 1)])
def test_step_time_excludes_evaluations_and_saves(ticking, eval_every, checkpoint_every, tmp_path):
    settings = {"eval_every": eval_every, "checkpoint_every": checkpoint_every, "log_every": 2}
    optim = dataclasses.replace(OPTIM, accumulate=2)  # 8 examples per step, however it is split
    train(tmp_path, task=ticking(2.0, 100.0), optim=optim, **settings)
    timing = read_metrics(tmp_path / "timing.jsonl")
    assert [line["step"] for line in timing] == [4, 6, 8, 10, 12]
    # Batches are prefetched by one step, so that the time of one may count on the other side.
    assert {line["milliseconds_per_step"] for line in timing} <= {1000.0, 2000.0, 3000.0}
    for line in timing:
        assert line["examples_per_second"] * line["milliseconds_per_step"] == pytest.approx(8000)


def test_every_save_resets_the_save_clock(ticking, tmp_path):
    """Each batch is prefetched by one step: after step 6, more than a minute has passed."""
    settings = {"checkpoint_every": 3, "checkpoint_minutes": 1.0, "log_every": 2, "keep": 9}
    train(tmp_path, task=ticking(10.0), **settings)
    assert finished_steps(tmp_path / "checkpoints") == [6, 12]


def test_timed_save_does_not_inherit_an_earlier_score(ticking, tmp_path):
    task = ticking(10.0, scores=(0.9, 0.1, 0.2))
    settings = {"checkpoint_every": 2, "checkpoint_minutes": 1.0, "log_every": 2, "keep": 1}
    train(tmp_path, task=task, best="test/w", **settings)
    assert finished_steps(tmp_path / "checkpoints") == [12]  # out of 6, 8 and 12


def test_warm_start_replaces_initialisation_once(tmp_path, monkeypatch):
    starts = []

    def warm_start(wanted):
        starts.append(wanted["w"].shape)
        account = {"taken": [{"arrays": 1}], "adapted": [], "left": [], "fresh": []}
        return WarmStart({"w": jax.device_put(jnp.float32(5.0), wanted["w"].sharding)}, account)

    warm = task(warm_start=warm_start)
    with monkeypatch.context() as patch, pytest.raises(signals.Stopped):
        stop_after(6, patch)
        train(tmp_path, task=warm, optim=AVERAGED)
    train(tmp_path, task=warm, optim=AVERAGED)
    assert starts == [()]
    _, values, averages = by_hand(start=5.0)
    close(checkpoint.load(tmp_path)["w"], values[12])
    close(lines(tmp_path, "test/w")[12], averages[12])
    account = json.loads((tmp_path / "warm_start.json").read_text())
    assert account["taken"] == [{"arrays": 1}]


def test_loss_and_evaluation_receive_helpers(tmp_path):
    evaluate = lambda params, helpers, step: {"w": float(helpers["x"]) + step}  # noqa: E731

    def loss(params, helpers, batch, rngs, step):
        return params["w"] * 0 + helpers["x"], {"seen": step.astype(jnp.float32)}

    made = dataclasses.replace(make_task(evaluate), loss=loss, helpers={"x": jnp.float32(100)})
    descend(tmp_path, task=made, optim=PLAIN)
    assert lines(tmp_path, "test/w") == {4: 104, 8: 108, 12: 112}
    assert set(lines(tmp_path, "train/loss").values()) == {100}
    assert lines(tmp_path, "train/seen") == {step + 1: step for step in range(STEPS)}


def test_micro_batches_split_the_batch(tmp_path):
    """Each has its own draw: the mean of two."""
    train(tmp_path, task=task(), optim=dataclasses.replace(PLAIN, accumulate=2), log_every=1)
    w = by_hand()[1][0]
    losses = []
    key = step_rngs(np.uint32(0), np.int32(0), ("dropout",))["dropout"]
    for row in range(2):
        noise = float(jax.random.normal(fold_name(jax.random.fold_in(key, row), "noise")))
        losses.append(np.mean((w - numbers(0)[row::2].astype(np.float64) - 0.1 * noise) ** 2))
    close(lines(tmp_path, "train/loss")[1], np.mean(losses))
