"""Details of the loop that do not show in whole runs."""

import dataclasses
import itertools
import json
import re
import types

import jax
import numpy as np
import pytest
from descent import OPTIM, descend, make_task
from meshes import one_device

from common_jax import log, loop
from common_jax.log import clocks
from common_jax.loop import RunConfig
from common_jax.optim import OptimConfig
from common_jax.run_config import Due
from common_jax.workdir import refuse_other_config


@pytest.mark.parametrize(
    ("start", "total", "steps"),
    [(0, 100, range(5, 9)), (6, 100, range(7, 9)), (8, 100, range(9, 9)), (0, 6, range(5, 7))],
)
def test_profile_is_limited_to_the_steps_to_run(start, total, steps):
    traced = loop._traced_steps(RunConfig(profile=(5, 8)), start, total)
    assert list(traced) == list(steps)
    assert list(loop._traced_steps(RunConfig(), start, total)) == []


def test_only_fields_without_effect_on_results_may_change(tmp_path):
    config = {
        "optim": {"lr": 1e-3},
        "mesh": {"data": 1, "fsdp": 1},
        "run": {"profile": []},
        "meta": {"remat": False, "attention": "auto"},
        "model": {"mbart": {"remat": False}},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "result.json").write_text("{}")
    passing = config | {"mesh": {"data": 4, "fsdp": 2}, "run": {"profile": [1, 2]}}
    passing |= {"meta": {"remat": True, "attention": "xla"}, "model": {"mbart": {"remat": True}}}
    refuse_other_config(tmp_path, passing)
    with pytest.raises(ValueError, match=r"optim\.lr: 0\.001 -> 0\.01") as error:
        refuse_other_config(tmp_path, config | {"optim": {"lr": 1e-2}})
    assert "--workdir" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_every": 0}, r"^log_every=0 must be at least 1"),
        (
            {"profile": (3,)},
            r"^profile=\(3,\) must be \(\) or \(first step, last step\)",
        ),
        ({"profile": (4, 3)}, r"^profile=\(4, 3\)"),
        ({"average_last": 0}, r"^average_last=0 must be at least 1"),
    ],
)
def test_out_of_range_settings_are_reported(change, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**change)


def test_lines_and_evaluations_are_due_at_multiples_and_at_the_end():
    due = Due(RunConfig(log_every=3, eval_every=2, checkpoint_every=3), 3, 14)
    assert [step for step in range(1, 15) if due.line(step)] == [3, 6, 9, 12, 14]
    assert [step for step in range(1, 15) if due.evaluation(step)] == [6, 12, 14]
    assert [step for step in range(1, 15) if due.checkpoint(step)] == [9, 14]


@pytest.mark.parametrize(
    ("last", "every", "total", "steps"),
    [(1, 1, 14, ()), (2, 1, 14, (12, 14)), (2, 3, 18, (9, 18)), (4, 1, 12, (3, 6, 9, 12))],
)
def test_average_last_selects_the_last_epoch_checkpoints(last, every, total, steps):
    run = RunConfig(average_last=last, checkpoint_every=every, best=None)
    due = Due(run, 3, total)
    assert due.averaged == steps and set(steps) <= set(filter(due.checkpoint, range(total + 1)))
    whole = [step for step in range(1, total + 1) if due.whole_average(step)]
    assert whole == ([total] if steps else [*range(1, total + 1)])


def test_log_line_averages_over_the_steps_that_counted():
    sums = {"loss": np.float32(6), "load": np.array([3.0, 9.0]), "steps": np.float32(3)}
    counts = {"skipped": np.int32(4), "skipped_in_row": np.int32(2)}
    line = log.averages(sums | counts)
    np.testing.assert_array_equal(line.pop("train/load"), [1, 3])
    assert line == {"train/loss": 2, "train/skipped": 4, "train/skipped_in_row": 2}
    assert np.isnan(log.averages(sums | counts | {"steps": np.float32(0)})["train/loss"])


@pytest.fixture
def at(monkeypatch):
    """at(seconds) sets the clocks."""
    now = [0.0]
    clock = types.SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: now[0])
    monkeypatch.setattr(clocks, "time", clock)

    def set_to(seconds):
        now[0] = seconds

    return set_to


def test_clock_excludes_the_first_interval_and_evaluations(at):
    clock = log.Clock(10, 64)
    at(100.0)
    assert clock.read(12) is None  # this step compiled
    at(102.0)
    assert clock.read(16) == {"examples_per_second": 128.0, "milliseconds": 500.0}
    at(150.0)
    clock.restart(17)  # an evaluation
    at(151.0)
    assert clock.read(17) is None
    at(153.0)
    assert clock.read(18) == {"examples_per_second": 32.0, "milliseconds": 2000.0}


def test_clock_does_not_time_an_interval_that_compiled(at):
    clock = log.Clock(10, 64)
    clock.restart(10)
    at(30.0)
    clock.discard()  # a batch of another shape
    assert clock.read(12) is None
    at(32.0)
    assert clock.read(14) == {"examples_per_second": 64.0, "milliseconds": 1000.0}


def test_only_blocks_that_compile_are_noticed(at):
    @jax.jit
    def double(x):
        at(100.0 * x.size)  # while it is traced
        return 2 * x

    noticed = []
    for size in (1, 1, 3, 1, 3):
        with log.watch_compilation(noticed.append):
            double(np.ones(size))
    assert noticed == [100.0, 200.0]


def test_run_says_which_steps_compile_for_another_shape(tmp_path, caplog):
    def batches(first):
        for step in itertools.count(first):
            yield {"x": np.ones(16 if step in (6, 8) else 8, np.float32)}

    task = make_task(lambda params, helpers, step: {"w": 0.0})
    caplog.set_level("INFO")
    descend(tmp_path / "run", task=dataclasses.replace(task, batches=batches))
    said = [message for message in caplog.messages if "another shape" in message]
    assert len(said) == 1 and "step 7 has" in said[0]


def test_alarm_counts_minutes_since_the_last_save(at):
    alarm = log.Alarm(2.0)
    at(120.0)
    assert not alarm.rings()
    at(120.5)
    assert alarm.rings()
    alarm.restart()
    assert not alarm.rings()
    at(1e9)
    assert alarm.rings() and not log.Alarm(None).rings()


@pytest.mark.parametrize(
    ("changes", "seed", "message"),
    [
        ({}, 2**32, r"config\.seed=4294967296 must be at least 0 and below"),
        ({}, -1, r"config\.seed=-1 must be"),
        ({"best": "val/w"}, 0, r"config\.run\.best='val/w' is not measured: .* begin with test/"),
        ({"best": "tes"}, 0, r"config\.run\.best='tes' is not measured"),
        ({"profile": (13, 14)}, 0, r"profile=\(13, 14\) begins after the last step of descent, 12"),
    ],
)
def test_untrainable_settings_are_refused_before_anything_is_read(changes, seed, message):
    task = make_task(lambda params, helpers, step: {"w": 0.0})
    settings = {"mesh": one_device(), "seed": seed}
    with pytest.raises(ValueError, match=message):
        loop.check_settings(task, RunConfig(**{"best": None} | changes), OPTIM, **settings)


@pytest.mark.parametrize(
    ("last", "ema", "best", "message"),
    [
        (2, 0.0, "test/w", r"config\.run\.average_last=2 .*\.best='test/w' would choose"),
        (4, 0.0, None, r"config\.run\.average_last=4 is more than the 3 checkpoints of descent: "),
        (2, 0.9, None, r"config\.run\.average_last=2 and config\.optim\.ema=0\.9 are two averages"),
    ],
)
def test_impossible_averages_are_refused(last, ema, best, message, tmp_path):
    optim = dataclasses.replace(OPTIM, ema=ema)
    with pytest.raises(ValueError, match=message):
        descend(tmp_path / "run", optim=optim, average_last=last, best=best)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("evaluated", "saved", "best", "warns"),
    [(2, 3, "test/w", True), (2, 3, None, False), (2, 4, "test/w", False), (6, 3, "x", False)],
)
def test_best_checkpoint_of_few_candidates_gives_a_warning(evaluated, saved, best, warns, caplog):
    run = RunConfig(eval_every=evaluated, checkpoint_every=saved, best=best)
    Due(run, steps_per_epoch=5, total=100).warn_of_unscored()
    assert ("'test/w' is chosen only among every 6 epochs and" in caplog.text) == warns


@pytest.mark.parametrize("steps", [1, 7, 440, 99999])
def test_average_over_more_steps_than_the_run_has_gives_a_warning(steps, caplog):
    config = OptimConfig(steps=steps, ema=0.999999)
    config.warn_of_average(11, key="config.recipes.distill.optim")
    (said,) = caplog.messages
    key = r"config\.recipes\.distill\.optim\.ema"
    share = f"{100 * 0.999999**steps:.0f} % of the average"
    assert re.match(rf"{key}=0\.999999 averages over .* has, {steps}: {share}", said)
    # What it advises is enough, and no more than enough.
    advised = float(re.search(rf"with --{key}=([\d.]+),", said)[1])
    assert 0.005 < advised**steps <= 0.01
    caplog.clear()
    for ema in (advised, 0.0):
        dataclasses.replace(config, ema=ema).warn_of_average(11)
    assert not caplog.messages


def test_a_run_warns_once_of_an_average_that_is_too_long(tmp_path, caplog):
    descend(tmp_path / "run", optim=dataclasses.replace(OPTIM, ema=0.9))
    (said,) = [line for line in caplog.messages if "averages over more steps" in line]
    assert said.startswith("config.optim.ema=0.9 ") and "12: 28 % of the average" in said


def test_valid_seeds_and_metrics_are_accepted():
    task = make_task(lambda params, helpers, step: {"w": 0.0})
    for seed in (0, 2**32 - 1):
        for best in (None, "test/w", "test/a/b"):
            run = RunConfig(best=best)
            assert loop.check_settings(task, run, OPTIM, seed=seed, mesh=one_device()) is None
