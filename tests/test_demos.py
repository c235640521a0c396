"""The demos: their runs, several runs in one process, and the commands that they end with."""

import argparse
import pathlib
import re
import shlex
import subprocess
import sys

import demo
import demo_cliptrans
import demo_m2mkd
import in_turn
import numpy as np
import pytest
import use
from PIL import Image

import cliptrans_jax.main
import m2mkd_jax.main
from cliptrans_jax.config import Config as ClipTransConfig
from common_jax import app
from common_jax.config import freeze
from m2mkd_jax.config import Config as M2mkdConfig
from m2mkd_jax.data import digits

ROOT = pathlib.Path(__file__).parents[1]


def flags(folder, *more, seeds=2):
    return argparse.Namespace(workdir=folder, seeds=seeds, flags=list(more))


def configs(monkeypatch, kind, lines):
    """The frozen configs of command lines, by run folder."""
    found = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(app.logging, "basicConfig", lambda **_: None)
    for line in lines:
        run, *arguments = shlex.split(line)
        argv = ["demo", *arguments, f"--workdir={run}", "--debug"]
        app.run(
            lambda config, workdir: found.update({workdir.name: freeze(kind, config)}), "", argv
        )
    return found


def test_digits_runs_are_valid_and_use_the_teacher_of_their_seed(tmp_path, monkeypatch):
    jobs = demo_m2mkd.plan(flags(tmp_path / "a b", "--config.run.log_every=3"))
    lines = [line for job in jobs.values() for line in job.command[2:]]
    runs = configs(monkeypatch, M2mkdConfig, lines)
    assert sorted(runs) == sorted(
        demo_m2mkd.run_name(student, name, seed)
        for student in demo_m2mkd.CONFIGS
        for name in ("scratch", "m2mkd")
        for seed in range(2)
    )
    for name, config in runs.items():
        assert config.seed == int(name[-1]) and config.run.log_every == 3
        assert config.phase == ("pipeline" if "m2mkd" in name else "end_to_end")
        teacher = str(tmp_path / "a b" / f"vmoe_m2mkd_{config.seed}" / "teacher")
        assert config.sources.teacher == (teacher if "nac_m2mkd" in name else "")
    # A NAC starts after the V-MoE whose teacher it uses.
    assert {name: job.needs for name, job in jobs.items() if job.needs} == {"seed_1": "first"}
    teacher = tmp_path / "a b" / "vmoe_m2mkd_0" / "teacher" / "result.json"
    assert {name: job.file for name, job in jobs.items() if job.file} == {"first_nac": teacher}
    assert [line.split()[0] for line in jobs["seed_1"].command[2:]] == [
        "vmoe_m2mkd_1",
        "nac_m2mkd_1",
    ]
    assert jobs["first"].command[2].split()[0] == "vmoe_m2mkd_0"


def test_first_seed_is_shown_once_both_of_its_jobs_are_done(tmp_path, capsys):
    runs = ("vmoe_m2mkd_0/teacher", "vmoe_scratch_0", "vmoe_m2mkd_0/end_to_end")
    for number, name in enumerate(runs, 1):
        run = tmp_path / name
        run.mkdir(parents=True)
        (run / "result.json").write_text(f'{{"test/accuracy": 0.9{number}}}')
        (run / "metrics.jsonl").write_text(f'{{"step": 44, "test/accuracy": 0.{number}}}\n')
    demo_m2mkd.show_progress(tmp_path, "first", {"first"})
    demo_m2mkd.show_progress(tmp_path, "first_nac", {"first", "first_nac", "scratch"})
    assert capsys.readouterr().out == ""
    demo_m2mkd.show_progress(tmp_path, "scratch", {"first", "scratch"})
    table = [re.split("  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert table[-4:-1] == [
        ["teacher", "91.0 %"],
        ["V-MoE, from scratch", "20.0 %", "92.0 %"],
        ["V-MoE, with m2mKD", "30.0 %", "93.0 %"],
    ]


def test_demos_share_the_cores_and_finish_with_their_own_runs(tmp_path, monkeypatch):
    events = []
    for name, module in demo.DEMOS.items():

        def finish(part, start, name=name):
            events.append(("finish", part.workdir))

        monkeypatch.setattr(module, "finish", finish)
    monkeypatch.setattr(
        demo_m2mkd, "show_progress", lambda workdir, name, done: events.append((name, sorted(done)))
    )

    def run_all(jobs, workdir, *, at_a_time, after_each):
        assert workdir == tmp_path and at_a_time == 2
        assert all("--config.run.log_every=3" in job.command[2] for job in jobs.values())
        ours = ["m2mkd/first", "m2mkd/scratch", "m2mkd/first_nac", "m2mkd/seed_1"]
        theirs = [name for name in jobs if name.startswith("cliptrans/")]
        assert list(jobs) == [*ours, *theirs] and "cliptrans/text_only_1" in theirs
        assert jobs["m2mkd/seed_1"].needs == "m2mkd/first"
        for name in ("m2mkd/first", *theirs, "m2mkd/scratch"):
            after_each(name)

    monkeypatch.setattr(demo, "run_all", run_all)
    override = "--config.run.log_every=3"
    monkeypatch.setattr(sys, "argv", ["demo", override, "--workdir", str(tmp_path), "--seeds=2"])
    demo.main()
    assert events == [
        ("first", ["first"]),
        ("finish", tmp_path / "cliptrans"),
        ("scratch", ["first", "scratch"]),
    ]


def test_emoji_runs_are_valid_and_share_an_m_clip(tmp_path, monkeypatch):
    jobs = demo_cliptrans.plan(flags(tmp_path, seeds=2))
    lines = [line for job in jobs.values() for line in job.command[2:]]
    runs = configs(monkeypatch, ClipTransConfig, lines)
    names = [f"{name}_{seed}" for name in demo_cliptrans.MODELS.values() for seed in range(2)]
    assert sorted(runs) == sorted(["clip", *names]) and list(runs)[:2] == ["clip", "cliptrans_0"]
    for name, config in runs.items():
        assert config.data.further_tests == ("compositions",)
        assert config.seed == (0 if name == "clip" else int(name[-1]))
        shares = name.startswith(("cliptrans", "no_captioning"))
        assert config.sources.clip == (str(tmp_path / "clip") if shares else "")
        if name not in ("clip", "cliptrans_0"):  # these two run in this order in one process
            assert jobs[name].file == (tmp_path / "clip" / "result.json" if shares else None)


def test_runs_in_one_process_have_own_workdirs_and_stop_on_request(tmp_path, monkeypatch):
    called = []

    def run(main, description, argv, *, system):
        called.append((main, argv, system))

    monkeypatch.setattr(app, "run", run)
    lines = ["a --config=x:y=1 --config.seed=0", "b '--config=c d'", f"--workdir={tmp_path}/job"]
    in_turn.main(["m2mkd_jax.main", *lines])
    assert [argv[1:] for _, argv, _ in called] == [
        ["--config=x:y=1", "--config.seed=0", f"--workdir={tmp_path}/a"],
        ["--config=c d", f"--workdir={tmp_path}/b"],
    ]
    for main, _, system in called:
        assert (main, system) == (m2mkd_jax.main.main, m2mkd_jax.main.SYSTEM)
    called.clear()
    monkeypatch.setattr(in_turn.signals, "requested", lambda: True)
    with pytest.raises(SystemExit) as end:  # not 0, which would mean that all runs are finished
        in_turn.main(["cliptrans_jax.main", *lines])
    assert end.value.code == 143
    assert [main for main, _, _ in called] == [cliptrans_jax.main.main]


def test_example_command_is_printed_and_its_failure_ends_the_demo(monkeypatch, capfd):
    called = []

    def run(command, **settings):
        assert settings["env"]["XLA_FLAGS"].endswith("--xla_backend_optimization_level=0")
        called.append((command, settings["env"]["JAX_PLATFORMS"]))
        return subprocess.CompletedProcess(command, returncode=len(called) - 1)

    monkeypatch.setattr(use.subprocess, "run", run)
    use.show_use("cliptrans", "translate", "runs/a", "red apple")
    assert called == [
        ([sys.executable, "-m", "cliptrans_jax", "translate", "runs/a", "red apple"], "cpu")
    ]
    assert capfd.readouterr().out == "\n$ cliptrans translate runs/a 'red apple'\n"
    with pytest.raises(SystemExit) as stop:
        use.show_use("m2mkd", "predict", "runs/a")
    assert stop.value.code == 1


def test_digits_are_written_unchanged_with_their_labels(tmp_path):
    demo_m2mkd.write_digits(tmp_path / "digits")
    images, labels = digits.load_split("test")
    paths = list((tmp_path / "digits").iterdir())
    assert len(paths) == demo_m2mkd.PICTURES
    for path in paths:
        place, digit = map(int, path.stem.split("_is_"))
        assert labels[place] == digit
        np.testing.assert_array_equal(np.asarray(Image.open(path)), images[place, ..., 0])
