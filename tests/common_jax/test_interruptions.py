"""The loop on a one-parameter model: stopped, out of disk space, and saving by wall-clock time."""

import dataclasses
import errno
import functools
import json
import logging
import os

import descent
import pytest
from descent import EPOCH, STEPS, make_task
from meshes import one_device

from common_jax import hosts, loop, metrics, signals
from common_jax.checkpoint import SaveError, finished_steps
from common_jax.optim import OptimConfig
from common_jax.step import Programs

OPTIM = OptimConfig(steps=STEPS, batch=8, lr=0.1, lr_per=None, schedule="constant", warmup_epochs=0)


def run_config(**changes) -> loop.RunConfig:
    return loop.RunConfig(**{"log_every": 2, "compilation_cache": None} | changes)


@pytest.fixture(scope="module")
def descend():
    """descend(workdir, run, evaluate): a noisy descent, compiled once; returns its result."""
    programs = Programs()

    def run(workdir, config: loop.RunConfig, evaluate=lambda params, *_: accuracy(params)):
        return loop.train(
            make_task(evaluate),
            config,
            OPTIM,
            seed=0,
            workdir=workdir,
            mesh=one_device(),
            config={"a": 1},
            programs=programs,
        )

    return run


@pytest.fixture
def train(descend, tmp_path):
    """train(run, evaluate): the same, in tmp_path/run."""
    return functools.partial(descend, tmp_path / "run")


def accuracy(params) -> dict[str, float]:
    return {"accuracy": -abs(float(params["w"]))}


def kept(tmp_path) -> list[int]:
    return finished_steps(tmp_path / "run" / "checkpoints")


def log(tmp_path) -> str:
    return (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.fixture
def asked(monkeypatch):
    """asked(n): the stop request arrives at the n-th check from now; asked() cancels it."""

    def ask(question: int | None = None) -> None:
        monkeypatch.setattr(hosts, "_stopping", False)
        monkeypatch.setattr(hosts, "_polls", 0)
        monkeypatch.setattr(hosts, "_requested", lambda polls: polls == question)

    return ask


@pytest.fixture(scope="module")
def undisturbed(descend, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return descend(folder / "run", run_config()), log(folder)


@pytest.mark.parametrize("question", [1, 4, 5, STEPS])
def test_stop_request_saves_and_resume_is_bitwise_identical(
    train, asked, undisturbed, tmp_path, question, caplog
):
    caplog.set_level(logging.INFO)
    asked(question)
    with pytest.raises(signals.Stopped):
        train(run_config())
    assert kept(tmp_path)[-1] == question  # one check per step
    assert "resumes" not in caplog.text
    asked()
    assert (train(run_config()), log(tmp_path)) == undisturbed
    place = tmp_path / "run" / "checkpoints" / str(question)
    assert f"descent resumes at step {question} from {place}" in caplog.text
    assert "another size" not in caplog.text


def test_resume_warns_if_the_number_of_examples_changed(asked, tmp_path, caplog):
    asked(EPOCH + 1)
    with pytest.raises(signals.Stopped):
        descent.descend(tmp_path / "run")
    asked()
    fewer = dataclasses.replace(make_task(lambda *_: {"w": 0.0}), steps_per_epoch=EPOCH - 1)
    descent.descend(tmp_path / "run", task=fewer)
    assert "an epoch has 3 steps, and had 4" in caplog.text


def test_average_in_progress_refuses_another_epoch_length(asked, tmp_path):
    task = make_task(lambda *_: {"w": 0.0})
    for stop, spared in ((EPOCH + 1, True), (2 * EPOCH + 1, False)):
        asked(stop)
        with pytest.raises(signals.Stopped):
            descent.descend(tmp_path / str(stop), task=task, average_last=2)
        asked()
        more = dataclasses.replace(task, steps_per_epoch=EPOCH + 2)
        resume = functools.partial(descent.descend, tmp_path / str(stop), task=more, average_last=2)
        if spared:
            resume()
            continue
        with pytest.raises(ValueError, match=r"average_last\) has begun, and with 6 .* of 4"):
            resume()


@pytest.mark.parametrize("at", [EPOCH, STEPS])
def test_resume_repeats_an_interrupted_evaluation(train, undisturbed, tmp_path, at):
    def stopped(params, helpers, step):
        if step == at:
            raise signals.Stopped
        return accuracy(params)

    with pytest.raises(signals.Stopped):
        train(run_config(), stopped)
    assert kept(tmp_path)[-1] == at
    assert not any(line["step"] == at and "test/accuracy" in line for line in lines(tmp_path))
    assert (train(run_config()), log(tmp_path)) == undisturbed


def test_repeated_evaluation_counts_for_the_best_checkpoint(train, tmp_path):
    """As if the checkpoint had been saved with its metrics."""

    def best_first(params, helpers, step):
        if step == EPOCH and not stopped:
            stopped.append(step)
            raise signals.Stopped
        return {"accuracy": -float(step)}

    stopped = []
    with pytest.raises(signals.Stopped):
        train(run_config(keep=1), best_first)
    train(run_config(keep=1), best_first)
    assert kept(tmp_path) == [EPOCH, STEPS]


def lines(tmp_path) -> list[dict]:
    return [json.loads(line) for line in log(tmp_path).splitlines()]


def test_timed_saves_happen_at_log_lines(train, undisturbed, tmp_path):
    result = train(run_config(checkpoint_minutes=1e-9, keep=100))
    assert kept(tmp_path) == [2, 4, 6, 8, 10, 12]
    assert (result, log(tmp_path)) == undisturbed


def test_without_checkpoint_minutes_only_epochs_are_saved(train, tmp_path):
    train(run_config(checkpoint_minutes=None, keep=100))
    assert kept(tmp_path) == [4, 8, 12]


@pytest.fixture
def no_room(monkeypatch):
    """no_room(*steps): saves of these steps fail, in the thread that writes."""
    import orbax.checkpoint as ocp

    serialize = ocp.JsonCheckpointHandler._save_fn

    def fail(*steps, number: int = errno.ENOSPC) -> None:
        async def save(self, x, directory):
            if any(f"/{step}." in str(directory) for step in steps):
                raise OSError(number, os.strerror(number), str(directory))
            await serialize(self, x, directory)

        monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", save)

    return fail


def test_failed_save_stops_the_run_and_a_restart_continues(train, no_room, undisturbed, tmp_path):
    no_room(8)
    with pytest.raises(SaveError, match=r"step 8 .*No space left.*is that of step 4") as error:
        train(run_config())
    assert "Make room, and start the same command again" in str(error.value)
    assert kept(tmp_path) == [4]
    no_room()
    assert (train(run_config()), log(tmp_path)) == undisturbed


def test_file_over_the_size_limit_has_a_remedy_of_its_own(train, no_room, undisturbed, tmp_path):
    no_room(8, number=errno.EFBIG)
    said = r"File too large.*Raise the limit on the size of files \(ulimit -f\), and start the same"
    with pytest.raises(SaveError, match=said):
        train(run_config())
    no_room()
    assert (train(run_config()), log(tmp_path)) == undisturbed


def test_failed_save_can_be_a_warning(train, no_room, undisturbed, tmp_path, caplog):
    no_room(8)
    assert (train(run_config(on_failed_save="go_on")), log(tmp_path)) == undisturbed
    assert "step 8 could not be written" in caplog.text
    assert kept(tmp_path) == [4, 12]


@pytest.fixture
def full_log(monkeypatch):
    """full_log(first, last): log lines from step `first` to step `last` cannot be written."""
    add = metrics._add_to_end

    def fail(first: int, last: int) -> None:
        def add_to_end(path, text):
            steps = [json.loads(line)["step"] for line in text.splitlines()]
            if path.name == "metrics.jsonl" and steps and first <= steps[-1] <= last:
                raise OSError(28, "No space left on device")
            add(path, text)

        monkeypatch.setattr(metrics, "_add_to_end", add_to_end)

    return fail


def test_failed_log_write_stops_the_run(train, full_log, undisturbed, tmp_path):
    full_log(6, 7)
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
        train(run_config())
    assert kept(tmp_path) == [4]
    full_log(0, -1)
    assert (train(run_config()), log(tmp_path)) == undisturbed


def test_failed_log_lines_can_be_deferred(train, full_log, undisturbed, tmp_path, caplog):
    full_log(6, 8)
    assert (train(run_config(on_failed_save="go_on")), log(tmp_path)) == undisturbed
    assert "its lines are kept" in caplog.text
    assert "step 8 was not saved" in caplog.text
    assert kept(tmp_path) == [4, 12]


def test_last_log_lines_must_be_written(train, full_log, undisturbed, tmp_path):
    full_log(10, 12)
    with pytest.raises(OSError, match="No space left on device"):
        train(run_config(on_failed_save="go_on"))
    assert not (tmp_path / "run" / "result.json").exists()
    full_log(0, -1)
    assert (train(run_config(on_failed_save="go_on")), log(tmp_path)) == undisturbed


def test_full_disk_for_events_does_not_stop_the_run(
    train, undisturbed, tmp_path, monkeypatch, caplog
):
    def full(self, event):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics._Events, "_write", full)
    assert (train(run_config()), log(tmp_path)) == undisturbed
    assert caplog.text.count("stopped writing TensorBoard events") == 1


def test_last_save_must_succeed(train, no_room, undisturbed, tmp_path):
    no_room(12)
    with pytest.raises(SaveError, match="step 12 could not be written"):
        train(run_config(on_failed_save="go_on"))
    assert not (tmp_path / "run" / "result.json").exists()
    no_room()
    assert (train(run_config()), log(tmp_path)) == undisturbed


def test_damaged_checkpoint_is_set_aside(train, asked, undisturbed, tmp_path, caplog):
    asked(11)
    with pytest.raises(signals.Stopped):
        train(run_config())
    damaged = tmp_path / "run" / "checkpoints" / "11"
    (damaged / "params" / "manifest.ocdbt").unlink()
    asked()
    assert (train(run_config()), log(tmp_path)) == undisturbed
    assert f"checkpoint {damaged} cannot be read" in caplog.text
    assert (damaged.parent / "damaged_11" / "trainer").exists()
    assert kept(tmp_path) == [8, 12]


def test_log_in_a_bucket_is_written_as_a_whole(train, undisturbed, tmp_path, monkeypatch):
    opened = loop.Recorder.__init__

    def in_a_bucket(self, *args, **settings):
        opened(self, *args, **settings)
        self._appends = False

    monkeypatch.setattr(loop.Recorder, "__init__", in_a_bucket)
    assert (train(run_config()), log(tmp_path)) == undisturbed
