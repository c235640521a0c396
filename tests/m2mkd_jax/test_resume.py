"""Killed runs go on as if nothing had happened: the same lines of metrics.jsonl, byte for byte."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from common_jax.checkpoint import finished_steps

ROOT = pathlib.Path(__file__).parents[2]
RUN = (
    "--config=configs/m2mkd/digits.py:phase=end_to_end",
    "--config.model.depths=(1,1)",
    "--config.meta.depths=(1,1)",
    "--config.teacher.depths=(1,1)",
    "--config.model.width=16",
    "--config.data.image_size=8",
    "--config.model.patch=4",
    "--config.drop_path=0.1",
    "--config.optim.ema=0.9",
    "--config.optim.batch=128",
    "--config.optim.steps=44",
    "--config.optim.warmup_epochs=1",
    "--config.run.log_every=3",
    "--config.run.eval_every=1",
    "--config.run.checkpoint_every=1",
    "--config.run.compilation_cache=None",
)


def start(workdir, *more) -> subprocess.Popen:
    """A run in a process of its own, on one device."""
    quickly = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    environment = os.environ | {"XLA_FLAGS": quickly, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-m", "m2mkd_jax.main", *RUN, f"--workdir={workdir}", *more]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()
    return output.decode()


def kill_when(process: subprocess.Popen, condition) -> None:
    """Kills the process at the moment the condition holds, which must be before it ends."""
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def unfinished_saves(workdir) -> list[str]:
    folder = workdir / "checkpoints"
    return [path.name for path in folder.glob("*tmp*")] if folder.exists() else []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start(workdir))
    return workdir


def same_run(workdir, undisturbed) -> bool:
    names = ("metrics.jsonl", "result.json", "config.json")
    return all((workdir / n).read_bytes() == (undisturbed / n).read_bytes() for n in names)


def test_the_lines_are_those_of_44_steps(undisturbed):
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [*range(3, 43, 3), 44]
    assert [line["step"] for line in lines if "test/accuracy" in line] == [11, 22, 33, 44]


def test_killed_between_checkpoints(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    metrics = workdir / "metrics.jsonl"
    process = start(workdir)
    # past the first checkpoint, in the middle of a stretch of the log
    kill_when(process, lambda: metrics.exists() and '"step": 27' in metrics.read_text())
    assert 0 < finished_steps(workdir / "checkpoints")[-1] < 27
    finish(start(workdir))
    assert same_run(workdir, undisturbed)


def test_killed_in_the_middle_of_a_save(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir)
    kill_when(
        process,
        lambda: finished_steps(workdir / "checkpoints") and unfinished_saves(workdir),
    )
    assert unfinished_saves(workdir)
    output = finish(start(workdir))
    assert "removing the unfinished checkpoint" in output
    assert not unfinished_saves(workdir)
    assert same_run(workdir, undisturbed)


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    metrics = workdir / "metrics.jsonl"
    process = start(workdir)
    kill_when(process, lambda: metrics.exists() and '"step": 39' in metrics.read_text())
    newest = workdir / "checkpoints" / str(finished_steps(workdir / "checkpoints")[-1])
    for path in (newest / "params").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:500])
    output = finish(start(workdir))
    assert f"checkpoint {newest} cannot be read" in output
    assert same_run(workdir, undisturbed)


def test_another_config_is_refused_with_the_difference(undisturbed):
    before = {path: path.read_bytes() for path in undisturbed.glob("*.json*")}
    process = start(undisturbed, "--config.optim.lr=3e-3", "--config.model.moe.experts=8")
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 2
    assert "model.moe.experts: 4 -> 8" in output.decode()
    assert "optim.lr: 0.001 -> 0.003" in output.decode()
    assert before == {path: path.read_bytes() for path in undisturbed.glob("*.json*")}
