"""A sweep: its cells and their checks; what is run, skipped and retried.

Runs are stand-ins, except in one test.
"""

import contextlib
import fcntl
import itertools
import json
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import threading
import time

import pytest
import sweep
from processes import DEADLINE, QUICKLY
from sweeps import DIGITS, EMOJI, ROOT, WHOLE, cells, read_csv, replace_python, start, until

from common_jax import checkpoint
from common_jax.commands.sweep import cells as sweep_cells
from common_jax.commands.sweep import jobs

NAC = f"{ROOT}/configs/m2mkd/digits_nac.py"
SWEPT = [
    path for path in sorted((ROOT / "configs").rglob("*.py")) if "def sweep(" in path.read_text()
]


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    return replace_python(tmp_path, monkeypatch)


# The grid and its cells.


def test_grid_is_a_product_and_brackets_keep_commas():
    grid = sweep_cells.parse_grid("a.b=(1,1),(2,2); :prior=ring ;c='x;y',[1,(2,3)]")
    expected = itertools.product(["(1,1)", "(2,2)"], ["ring"], ["'x;y'", "[1,(2,3)]"])
    assert [tuple(one.values()) for one in grid] == list(expected)
    assert list(grid[0]) == ["a.b", ":prior", "c"]


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ("distill.alpha", "'distill.alpha' must be KEY=VALUE"),
        ("distill.alpha=", "'distill.alpha=' must be KEY=VALUE"),
        ("distill.alpha=1,,2", "no value left empty"),
        ("a=1;a=2", "'a' is given twice"),
        ("a=(1,2", r"lacks a closing '\)'"),
        ("a=1]", r"closes a bracket '\]' that is not open"),
        (" ; ", "sweeps nothing"),
    ],
)
def test_malformed_grid_is_refused(grid, said):
    with pytest.raises(ValueError, match=said):
        sweep_cells.parse_grid(grid)


def test_cell_names_are_short_plain_and_equal_for_equal_values():
    names = [cell.name for cell in cells("model.moe.experts=4;baseline.alpha=0.30,5e-1")]
    assert names == ["alpha=0.3,experts=4", "alpha=0.5,experts=4"]
    assert cells("baseline.alpha=.3;model.moe.experts=4")[0].name == names[0]
    tuples = cells("model.depths=(1,1),(2, 2);teacher.depths=(1,1)")
    assert [cell.name for cell in tuples] == [
        "model.depths=1-1,teacher.depths=1-1",
        "model.depths=2-2,teacher.depths=1-1",
    ]
    assert "--config.model.depths=(2,2)" in tuples[1].command
    paths = [cell.name for cell in cells("sources.students=('a/b',),('a-b',)")]
    assert len(set(paths)) == 2 and not set(" /'()") & set("".join(paths))


def test_config_arguments_are_swept_beside_the_given_ones():
    found = cells(":prior=ring,none;optim.clip=None,1", f"{NAC}:phase=end_to_end")
    assert [cell.name for cell in found[1::2]] == ["clip=1.0,prior=ring", "clip=1.0,prior=none"]
    assert found[0].command[1:] == (
        "m2mkd_jax.main",
        f"--config={NAC}:phase=end_to_end,prior=ring",
        "--config.optim.clip=None",
    )
    assert found[0].config["optim"]["clip"] is None


@pytest.mark.parametrize(
    ("config", "package", "main", "files"),
    [
        (DIGITS, "m2mkd_jax", "end_to_end", {"meta": 1, "students": 1, "few_shot": 1}),
        (f"{DIGITS}:phase=distill", "m2mkd_jax", "", {"": 1}),
        (f"{DIGITS}:phase=distill,module=2", "m2mkd_jax", "", {"": 1}),
        (EMOJI, "cliptrans_jax", "translate", {"clip": 1, "translate": 2}),
        (f"{EMOJI}:stage=translate", "cliptrans_jax", "", {"": 2}),
        (f"{EMOJI}:stage=clip", "cliptrans_jax", "", {"": 1}),
    ],
)
def test_config_determines_the_command_and_result_files(config, package, main, files):
    cell = cells("run.log_every=1", config)[0]
    assert cell.command[:2] == ("-m", f"{package}.main") and cell.main == main
    assert {name: len(cell.files[name]) for name in files} == files


def test_config_of_neither_system_is_refused(tmp_path):
    file = tmp_path / "other.py"
    file.write_text(
        "import ml_collections\ndef get_config(arg=None):\n"
        "    return ml_collections.ConfigDict({'size': 1})\n"
    )
    with pytest.raises(ValueError, match=r"one of the fields \['phase', 'stage'\].*\['size'\]"):
        cells("size=2", str(file))


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ("distil.alpha=1", ["config has no field 'distil'", "did you mean 'distill'"]),
        ("distill.alfa=1", ["config.distill has no field 'alfa'", "did you mean 'alpha'"]),
        ("alpha=1", ["config has no field 'alpha'", "an argument", "begins with a colon"]),
        (":prior=ring", ["'prior=ring' is not understood", "['module', 'phase', 'scale']"]),
        (":phase=distil", ["phase='distil' must be one of", "end_to_end"]),
        ("baseline.alpha=0.1,1.5", ["alpha=1.5", "must be in [0, 1]"]),
        (
            "model.moe.experts=4,x",
            ["experts=x must be a whole number", "unswept, ", "experts=4"],
        ),
        ("optim.lr=None,1", ["config.optim.lr=None must be of type float"]),
        ("model.depths=1,(1.5,2)", ["config.model.depths[0]=1.5 must be of type int"]),
        ("distill=1", ["config.distill is a section", "'alpha'"]),
        ("baseline.alpha=1,1.0", ["alpha=1.0: two cells have the same settings"]),
        ("seed=1,2", ["--seeds N"]),
        ("optim.epochs=1", ["'optim.epochs' is swept, but --config.optim.epochs=2 sets it"]),
    ],
)
def test_bad_cell_is_found_before_any_run_starts(tmp_path, capsys, stand_in, grid, said):
    _, take = stand_in
    config = DIGITS if grid.startswith(":") else WHOLE
    flags = ["--config.optim.epochs=2"] if config == WHOLE else []
    assert start(tmp_path / "sweep", *flags, config=config, grid=grid) == 2
    printed = capsys.readouterr().err
    assert all(text in printed for text in said), printed
    assert not take() and not (tmp_path / "sweep").exists()


def test_all_bad_cells_are_reported_at_once(tmp_path, capsys):
    assert start(tmp_path, grid="baseline.alpha=2,0.5,3") == 2
    printed = capsys.readouterr().err
    assert "alpha=2.0" in printed and "alpha=3.0" in printed and "alpha=0.5" not in printed


@pytest.mark.parametrize(
    ("config", "grid", "said"),
    [
        (WHOLE, "distill.alpha=0.3,0.7", ["phase='end_to_end' does not read config.distill.alpha"]),
        (WHOLE, "few_shot.ways=2,3", ["does not read config.few_shot.ways", "'baseline'"]),
        (f"{DIGITS}:phase=train_module", "distill.tau=1,2", ["'distill.pairs_at_once'"]),
        (DIGITS, "optim.lr=1,2", ["did you mean --config.recipes.assemble.optim.lr or"]),
        (DIGITS, ":phase=end_to_end,distill;distill.tau=1,2", ["phase='end_to_end' does not read"]),
        (
            f"{DIGITS}:phase=distill",
            "distill.kind=soft,hard;distill.tau=1,2",
            ["kind=hard, distill.tau=2: config.distill.tau changes nothing: config.distill.kind="],
        ),
        (WHOLE, ":module=0,1", ["config.module changes nothing: phase='end_to_end' does not"]),
        (
            "configs/m2mkd/cifar10_vmoe.py:phase=end_to_end",
            "optim.epochs=5,10",
            ["config.optim.epochs changes nothing: config.optim.steps=390 is used in its place"],
        ),
        (
            f"{EMOJI}:stage=clip",
            "model.mapper.kind=mlp,x",
            ["stage='clip' does not read config.mod"],
        ),
    ],
)
def test_sweeping_a_field_that_changes_nothing_is_refused(config, grid, said):
    with pytest.raises(ValueError, match="cells that cannot run") as caught:
        cells(grid, config)
    for text in said:
        assert text in str(caught.value)
    assert len(cells("distill.alpha=0.3,0.7", f"{DIGITS}:phase=distill")) == 2
    assert len(cells("recipes.distill.optim.lr=1,2;distill.alpha=0.3", DIGITS)) == 2


@pytest.mark.parametrize("path", SWEPT, ids=lambda path: path.stem)
def test_sweeps_in_config_files_have_distinct_cells(path):
    settings = sweep_cells.read_sweep(str(path))
    found = sweep_cells.plan_cells(str(path), (), settings, sweep.programs())
    assert len({cell.name for cell in found}) == len(settings) > 1
    assert len(list(runpy.run_path(str(path))["sweep"]())) == len(settings)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("", "has no sweep"),
        ("def sweep():\n    return [1]\n", "must yield dicts"),
        ("def sweep():\n    return []\n", "must yield dicts"),
        ("def sweep():\n    return [{'a': 1}, {'b': 1}]\n", "must have the same keys"),
    ],
)
def test_malformed_sweep_is_refused(tmp_path, body, said):
    (tmp_path / "config.py").write_text(body)
    with pytest.raises(ValueError, match=said):
        sweep_cells.read_sweep(f"{tmp_path}/config.py:phase=x")


# What is run.


def test_failed_runs_stop_no_others_and_are_retried(tmp_path, capsys, stand_in):
    give, take = stand_in
    workdir = tmp_path / "sweep"
    give({"alpha=0.3,seed=0": "fail", "alpha=0.5,seed=1": "die"})
    assert start(workdir, "--seeds=2", "--jobs=2") == 1
    runs = [f"alpha={alpha},seed={seed}" for alpha in (0.3, 0.5) for seed in (0, 1)]
    assert take() == sorted(runs)
    printed = capsys.readouterr().out
    assert "2 cells, 4 runs: 0 finished, 4 to go" in printed
    assert "Not finished: 2;" in printed
    assert f"alpha=0.3,seed=0  failed with status 3; see {workdir}/alpha=0.3,seed=0.log" in printed
    assert "alpha=0.5,seed=1  ended by SIGKILL; see" in printed
    assert (workdir / "alpha=0.3,seed=0.log").read_text() == "out of paper\n"
    assert [row["test/accuracy n"] for row in read_csv(workdir)] == ["1", "1"]

    give({})
    assert start(workdir, "--seeds=2") == 0
    assert take() == ["alpha=0.3,seed=0", "alpha=0.5,seed=1"]
    assert [row["test/accuracy n"] for row in read_csv(workdir)] == ["2", "2"]
    assert start(workdir, "--seeds=2") == 0 and not take()


def test_sweep_can_be_extended_but_not_replaced(tmp_path, capsys, stand_in):
    _, take = stand_in
    assert start(tmp_path / "s") == 0 and len(take()) == 2
    assert start(tmp_path / "s", "--seeds=2", grid="baseline.alpha=0.4,0.3") == 0
    assert take() == ["alpha=0.3,seed=1", "alpha=0.4,seed=0", "alpha=0.4,seed=1"]
    table = [(row["baseline.alpha"], row["test/accuracy n"]) for row in read_csv(tmp_path / "s")]
    assert table == [("0.3", "2"), ("0.4", "2"), ("0.5", "1")]
    record = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert record["seeds"] == 2 and set(record["cells"]) == {f"alpha=0.{i}" for i in (3, 4, 5)}
    capsys.readouterr()
    assert start(tmp_path / "s", grid="baseline.tau=1,2") == 2
    assert "holds a sweep of ['baseline.alpha'], and this is one of" in capsys.readouterr().err
    assert start(tmp_path / "s", "--config.optim.epochs=3") == 2
    assert "optim.epochs: 20 -> 3" in capsys.readouterr().err
    assert not take()


def test_signal_is_passed_on_and_the_sweep_resumes_later(tmp_path, capsys, stand_in):
    give, take = stand_in
    workdir, first = tmp_path / "sweep", "alpha=0.3,seed=0"
    give({first: "wait"})
    locked = []

    def interrupt():
        until(lambda: (workdir / first / "started").exists())
        with open(workdir / f"{first}.log") as log:
            try:
                fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                locked.append(first)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert start(workdir) == 128 + signal.SIGTERM
    thread.join()
    assert locked, "a run must keep its log to itself"
    assert take() == [first] and (workdir / first / "saved").exists()
    printed, said = capsys.readouterr()
    assert "SIGTERM: passed on to 1 run; waiting until" in said
    assert f"{first} stopped\n" in printed
    assert f"{first}  stopped early" in printed and "alpha=0.5,seed=0  not started" in printed
    give({})
    assert start(workdir) == 0 and len(take()) == 2


def test_run_locked_by_another_process_is_skipped(tmp_path, capsys, stand_in):
    _, take = stand_in
    workdir = tmp_path / "sweep"
    workdir.mkdir()
    with open(workdir / "alpha=0.3,seed=0.log", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert start(workdir) == 1
    assert take() == ["alpha=0.5,seed=0"]
    assert "alpha=0.3,seed=0  is being run by another process" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux's affinity masks")
def test_runs_use_only_cores_that_their_parent_may_use(tmp_path):
    allowed = os.sched_getaffinity(0)
    last = max(allowed)
    code = "import os; print(os.sched_getaffinity(0))"
    try:
        os.sched_setaffinity(0, {last})
        runs = {name: jobs.Job(("-c", code)) for name in "ab"}
        jobs.run_all(runs, tmp_path, at_a_time=2)
    finally:
        os.sched_setaffinity(0, allowed)
    assert {(tmp_path / f"{name}.log").read_text() for name in "ab"} == {f"{{{last}}}\n"}


def test_demo_runs_keep_memory_unless_the_user_says_otherwise(tmp_path, monkeypatch):
    said = "import os; print(os.environ['GLIBC_TUNABLES'], os.environ['JAX_PLATFORMS'])"
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    jobs.run_all({"ours": jobs.Job(("-c", said))}, tmp_path, at_a_time=1)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.perturb=0")
    jobs.run_all({"theirs": jobs.Job(("-c", said))}, tmp_path, at_a_time=1)
    (settings,) = jobs.KEPT_MEMORY.values()
    assert (tmp_path / "ours.log").read_text() == f"{settings} cpu\n"
    assert (tmp_path / "theirs.log").read_text() == "glibc.malloc.perturb=0 cpu\n"


DEMO = """
import pathlib, sys
from common_jax.commands.sweep import jobs
from common_jax.signals import ends_quietly
SAVE = "import os, pathlib, signal, sys, time; place = pathlib.Path(sys.argv[1][10:] + '.pid')\\n"
SAVE += "end = lambda *_: (time.sleep(1), place.unlink(), sys.exit())\\n"
SAVE += "signal.signal(signal.SIGTERM, end)\\n"
SAVE += "place.touch(); time.sleep(60)"

@ends_quietly
def main():
    jobs.run_all({"run": jobs.Job(("-c", SAVE))}, pathlib.Path(sys.argv[1]), at_a_time=1)

main()
"""


def test_demo_waits_for_its_runs_after_sigterm(tmp_path):
    running = tmp_path / "run.pid"  # exists as long as the run lives
    with subprocess.Popen([sys.executable, "-c", DEMO, tmp_path]) as demo:
        until(running.exists)
        demo.terminate()
    assert demo.returncode == 143
    assert not running.exists()


def test_demo_ends_its_runs_on_any_error(tmp_path):
    def fail(name):
        raise KeyError(name)

    long = jobs.Job(("-c", "import time; time.sleep(60)"))
    start = time.monotonic()
    with pytest.raises(KeyError, match="short"):
        jobs.run_all(
            {"long": long, "short": jobs.Job(("-c", ""))}, tmp_path, at_a_time=2, after_each=fail
        )
    assert time.monotonic() - start < 30


def test_demo_runs_wait_for_their_needs_and_end_at_a_failure(tmp_path, capsys, stand_in):
    give, take = stand_in
    flags = ("--config.seed=0",)
    plan = {"second": jobs.Job(flags, "first"), "first": jobs.Job(flags)}
    jobs.run_all(
        plan, tmp_path / "runs", at_a_time=2, after_each=lambda name: print(f"after {name}")
    )
    ends = re.findall(r"s  (\w+) done\nafter (\w+)", capsys.readouterr().out)
    assert ends == [("first", "first"), ("second", "second")]
    # If the job needs only a file, the sweep waits for that.
    made = tmp_path / "made"
    others = {"third": jobs.Job(flags, file=made), "first": jobs.Job(flags)}
    jobs.run_all(others, tmp_path / "runs", at_a_time=1, after_each=lambda _: made.touch())
    assert re.findall(r"s  (\w+) done", capsys.readouterr().out) == ["first", "third"]
    take()
    give({"first": "fail"})
    with pytest.raises(SystemExit, match="1"):
        jobs.run_all(plan, tmp_path / "runs", at_a_time=2)
    assert capsys.readouterr().err == f"first failed with status 3; see {tmp_path}/runs/first.log\n"
    assert take() == ["first"]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (0, "done"),
        (1, "failed with status 1"),
        (143, "ended by SIGTERM"),
        (-15, "ended by SIGTERM"),
        (255, "failed with status 255"),
        (None, "is being run by another process"),
    ],
)
def test_end_of_a_run_in_words(status, said):
    assert jobs.describe(status) == said


def test_killed_run_resumes(tmp_path, monkeypatch, capsys):
    """The sweep's only cell, a meta model of one block, is killed after a checkpoint."""
    monkeypatch.setenv("XLA_FLAGS", QUICKLY)
    settings = {
        "meta.depths": "(1,)",
        "meta.patch": 8,
        "meta.heads": 2,
        "optim.epochs": 12,
        "optim.batch": 512,
        "run.checkpoint_every": 1,
        "run.eval_every": 12,
        "run.log_every": 1,
        "run.compilation_cache": None,
    }
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    config, grid = f"{DIGITS}:phase=pretrain_meta", "meta.width=8"
    workdir, first = tmp_path / "sweep", "width=8,seed=0"

    def kill():
        saved = lambda: checkpoint.finished_steps(workdir / first / "checkpoints")  # noqa: E731
        until(saved, seconds=DEADLINE)
        for command in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # other processes come and go
                if f"--workdir={workdir / first}".encode() in command.read_bytes().split(b"\0"):
                    os.kill(int(command.parent.name), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    assert start(workdir, *flags, config=config, grid=grid) == 1
    thread.join()
    assert f"{first}  ended by SIGKILL" in capsys.readouterr().out
    assert [row["test/accuracy n"] for row in read_csv(workdir)] == ["0"]
    before = len((workdir / f"{first}.log").read_text())
    assert start(workdir, *flags, config=config, grid=grid) == 0
    steps = re.findall(r"step (\d+)/24", (workdir / f"{first}.log").read_text()[before:])
    assert 1 < int(steps[0]) < 24 and steps[-1] == "24", steps
    found = json.loads((workdir / first / "result.json").read_text())["test/accuracy"]
    assert float(read_csv(workdir)[0]["test/accuracy mean"]) == found
