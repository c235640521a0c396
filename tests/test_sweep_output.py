"""The output of a sweep: its table and plot, and scripts that start its runs elsewhere."""

import json
import os
import re
import shlex
import statistics
import subprocess

import pytest
from etils import epath
from PIL import Image
from sweeps import EMOJI, cells, read_csv, replace_python, start, until

from common_jax.commands.sweep import jobs
from common_jax.commands.sweep import table as sweep_table


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    return replace_python(tmp_path, monkeypatch)


# The table.


def rows(values):
    """Rows of a sweep over (experts, router), with an accuracy per seed."""
    return [
        sweep_table.Row(
            {"model.moe.experts": experts, ":router": router},
            [{"test/accuracy": value, "test/loss": 2.0} for value in found],
        )
        for (experts, router), found in values.items()
    ]


VALUES = {
    ("16", "a"): [0.5, 0.7],
    ("4", "a"): [0.25],
    ("4", "b"): [0.125, 0.375],
    ("16", "b"): [],
}


def test_non_finite_metric_shows_in_the_table(tmp_path):
    values = {("4", "a"): [0.5, float("nan")], ("16", "a"): [float("inf"), 1.0]}
    table = sweep_table.write_table(epath.Path(tmp_path), rows(values), ["test/accuracy"])
    assert [row[2:] for row in table.rows] == [("nan ± nan", "2"), ("inf ± nan", "2")]


def test_table_has_mean_spread_and_count_of_finished_runs(tmp_path):
    ordered = sweep_table.sort_rows(rows(VALUES))
    places = [tuple(row.swept.values()) for row in ordered]
    assert places == [("4", "a"), ("4", "b"), ("16", "a"), ("16", "b")]
    table = sweep_table.write_table(epath.Path(tmp_path), ordered, ["test/accuracy", "test/loss"])
    found = read_csv(tmp_path)
    for line, row in zip(found, ordered, strict=True):
        numbers = row.values("test/accuracy")
        assert [line["model.moe.experts"], line["router"]] == list(row.swept.values())
        assert line["test/accuracy n"] == str(len(numbers))
        mean = str(statistics.mean(numbers)) if numbers else ""
        spread = str(statistics.stdev(numbers)) if len(numbers) > 1 else ""
        assert (line["test/accuracy mean"], line["test/accuracy spread"]) == (mean, spread)
    assert table.header == ("experts", "router", "test/accuracy", "n", "test/loss", "n")
    assert table.rows[1] == ("4", "b", "0.25 ± 0.18", "2", "2 ± 0", "2")
    assert table.rows[2][2] == "0.60 ± 0.14" and table.rows[0][2] == "0.25"
    assert table.rows[3] == ("16", "b", "", "0", "", "0")
    lines = (tmp_path / "sweep.md").read_text().splitlines()
    assert lines[2:] == [
        f"| {' | '.join(cells)} |" for cells in (table.header, ["---"] * 6, *table.rows)
    ]
    with Image.open(tmp_path / "sweep.png") as picture:
        assert min(picture.size) > 300 and len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_plot_has_a_line_with_error_bars_per_setting():
    figure = sweep_table.plot(sweep_table.sort_rows(rows(VALUES)), ["test/accuracy", "test/loss"])
    axes = figure.axes[0]
    first, second = axes.containers
    assert [first.get_label(), second.get_label()] == ["router a", "router b"]
    assert first.lines[0].get_xydata().tolist() == [[4, 0.25], [16, 0.6]]
    assert second.lines[0].get_xydata().tolist() == [[4, 0.25]]
    (bars,) = first.lines[2]
    low, high = bars.get_segments()[1][:, 1]
    assert high - low == pytest.approx(2 * statistics.stdev([0.5, 0.7]))
    assert axes.get_xlabel() == "model.moe.experts" and axes.get_ylabel() == "test/accuracy"
    words = sweep_table.plot(rows({("one", "a"): [1.0], ("two", "a"): [2.0]}), ["test/accuracy"])
    ticks = [tick.get_text() for tick in words.axes[0].get_xticklabels()]
    assert ticks == ["one", "two"]


def test_pipeline_results_are_named_by_their_folders(tmp_path):
    (cell,) = cells("run.log_every=1", EMOJI)
    root = epath.Path(tmp_path)
    for name in ("clip", "caption", "translate"):
        (root / name).mkdir()
        (root / name / "result.json").write_text('{"stage": "x", "val/bleu": 3.5}')
        assert sweep_table.read_results(root, cell, 0) is None
        if name != "clip":
            scores = '{"set": "test", "step": 9, "sentences": 2, "bleu": 8.0, "signatures": {}}'
            (root / name / "scores.json").write_text(scores)
    found = sweep_table.read_results(root, cell, 0)
    assert found["test/bleu"] == 8.0 and found["caption/val/bleu"] == found["val/bleu"] == 3.5
    assert "clip/test/bleu" not in found and "test/step" not in found


def test_results_of_another_run_in_a_cell_folder_are_refused(tmp_path):
    (cell,) = cells("run.log_every=1", EMOJI)
    root = epath.Path(tmp_path)
    config = dict(cell.config) | {"seed": 0}
    (root / "config.json").write_text(json.dumps(config))
    assert sweep_table.read_results(root, cell, 0) is None
    with pytest.raises(ValueError, match=r"config differs from this cell .*\n  seed: 0 -> 1"):
        sweep_table.read_results(root, cell, 1)


def test_unknown_metric_is_reported(tmp_path, capsys, stand_in):
    assert start(tmp_path / "s", "--metric=test/acuracy") == 2
    printed = capsys.readouterr().err
    assert "--metric=test/acuracy: no finished run has it (did you mean 'test/accuracy'" in printed
    assert start(tmp_path / "s", "--emit=table", "--metric=test/accuracy,steps") == 0
    assert list(read_csv(tmp_path / "s")[0])[1::3] == ["test/accuracy mean", "steps mean"]


def test_emit_table_leaves_the_record_of_a_sweep_that_has_just_begun(tmp_path, capsys, stand_in):
    workdir = tmp_path / "s"
    assert start(workdir, "--emit=commands") == 0  # no run has begun yet
    files = [workdir / name for name in ("sweep.json", "config.json")]
    before = [file.read_bytes() for file in files]
    assert start(workdir, "--emit=table", grid="optim.batch=64") == 1  # it is not finished
    assert [file.read_bytes() for file in files] == before
    assert start(workdir) == 0


# Scripts that start the runs elsewhere.


def emitted(capsys, workdir, form, *flags):
    capsys.readouterr()
    assert start(workdir, f"--emit={form}", "--seeds=2", *flags) == 0
    return capsys.readouterr().out


def stub(folder, name, body):
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


def bash(script, folder, **environment):
    path = {"PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-s"], input=script, text=True, env=os.environ | path | environment, timeout=60
    ).returncode


def test_emitted_commands_are_those_that_would_be_run(tmp_path, capsys, stand_in):
    _, take = stand_in
    workdir = tmp_path / "a sweep"
    assert start(workdir) == 0 and len(take()) == 2
    lines = emitted(capsys, workdir, "commands").splitlines()
    assert len(lines) == 2 and not take()  # without the finished ones
    for line in lines:
        assert bash(line, tmp_path) == 0
    assert take() == ["alpha=0.3,seed=1", "alpha=0.5,seed=1"]
    assert emitted(capsys, workdir, "commands") == emitted(capsys, workdir, "slurm") == ""
    assert start(workdir, "--seeds=2") == 0 and not take()


def test_slurm_array_runs_one_cell_per_task_and_requeues_when_stopped(tmp_path, capsys, stand_in):
    give, take = stand_in
    stub(tmp_path, "srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
    stub(tmp_path, "scontrol", f'echo "$@" >> {tmp_path}/requeued')
    workdir = tmp_path / "s"
    script = emitted(capsys, workdir, "slurm", "--jobs=3")
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert "#SBATCH --array=0-3%3\n" in script and "#SBATCH --requeue\n" in script
    task = {"SLURM_ARRAY_JOB_ID": "7"}
    give({"alpha=0.5,seed=0": "fail"})
    status = [bash(script, tmp_path, **task, SLURM_ARRAY_TASK_ID=str(i)) for i in range(5)]
    assert status == [0, 3, 0, 0, 2] and len(take()) == 4 and not (tmp_path / "requeued").exists()

    give({"alpha=0.5,seed=0": "wait"})
    (tmp_path / "script").write_text(script)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "1"}
    process = subprocess.Popen(["bash", tmp_path / "script"], env=os.environ | task | path)
    try:
        until(lambda: (workdir / "alpha=0.5,seed=0" / "started").exists())
    finally:
        process.terminate()
    assert process.wait(30) == 143
    assert (workdir / "alpha=0.5,seed=0" / "saved").exists()
    assert (tmp_path / "requeued").read_text() == "requeue 7_1\n"


def test_xpk_gets_one_workload_per_run(tmp_path, capsys, stand_in):
    stub(tmp_path, "xpk", f'printf "%s\\n" "$@" >> {tmp_path}/made')
    script = emitted(capsys, tmp_path / "s", "xpk")
    place = {"CLUSTER": "c", "TPU_TYPE": "v5litepod-16"}
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert bash(script, tmp_path, **place) != 0  # no image
    assert bash(script, tmp_path, **place, IMAGE="i:1") == 0
    made = (tmp_path / "made").read_text()
    names = re.findall(r"--workload=(.*)", made)
    assert len(set(names)) == 4
    assert all(re.fullmatch(r"[a-z]([-a-z0-9]{0,37}[a-z0-9])", name) for name in names)
    commands = [shlex.split(text) for text in re.findall(r"--command=(.*)", made)]
    assert [command[-1] for command in commands] == [
        f"--workdir={tmp_path}/s/alpha={alpha},seed={seed}"
        for seed in (0, 1)
        for alpha in (0.3, 0.5)
    ]
    assert made.count("--docker-image=i:1") == 4
    assert commands[0][:3] == ["python", "-m", "m2mkd_jax.main"]


def test_cells_with_identical_results_are_marked(tmp_path):
    """One swept field changes no number; the other does."""
    same = [{"test/accuracy": 0.5, "test/loss": 1.25}, {"test/accuracy": 0.75, "test/loss": 0.5}]
    near = [{"test/accuracy": 0.5, "test/loss": 1.2500000000000002}, same[1]]
    rows = [
        sweep_table.Row({"a": "1"}, same),
        sweep_table.Row({"a": "2"}, same[:1]),  # its second seed is not finished
        sweep_table.Row({"a": "3"}, near),
        sweep_table.Row({"a": "4"}, []),
    ]
    assert sweep_table.find_twins(rows) == {0, 1}
    table = sweep_table.write_table(epath.Path(tmp_path), rows, ["test/accuracy"])
    assert [row[1].endswith("†") for row in table.rows] == [True, True, False, False]
    assert "†: every number equals that of another cell" in table.caption
    assert "†" in (tmp_path / "sweep.md").read_text()
    assert "†" not in (tmp_path / "sweep.csv").read_text()
    table = sweep_table.write_table(epath.Path(tmp_path), rows[1:3], ["test/accuracy"])
    assert "†" not in table.caption


@pytest.mark.parametrize("number", ["0", "-1", "x", "1.5", "", "9" * 5000])
def test_invalid_number_of_runs_is_refused(tmp_path, capsys, number):
    parser = jobs.demo_parser("", workdir="runs", seeds=1)
    assert parser.parse_args(["--seeds=3", "--jobs=12"]).jobs == 12
    for flag in ("seeds", "jobs"):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args([f"--{flag}={number}"])
        assert stop.value.code == 2
        assert "must be a whole number from 1" in capsys.readouterr().err


def test_overrides_for_the_runs_of_a_demo_may_stand_anywhere():
    parser = jobs.demo_parser("", workdir="runs", seeds=1)
    argv = ["--config.a=1", "--jobs=3", "--config.b=x y", "--", "--debug", "--config.c", "2"]
    flags = jobs.parse_demo(parser, argv)
    assert (flags.jobs, str(flags.workdir)) == (3, "runs")
    assert flags.flags == ["--config.a=1", "--config.b=x y", "--debug", "--config.c", "2"]
    assert jobs.parse_demo(parser, []).flags == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--config.a", "1"], "--config.a lacks a value; write --config.a=VALUE"),
        (["--debug"], "unrecognized arguments: --debug; flags for the runs, other than"),
        (["--jobs=3", "a"], "unrecognized arguments: a; flags for the runs"),
    ],
)
def test_unknown_flag_of_a_demo_is_refused_with_the_way_to_pass_it_on(argv, said, capsys):
    with pytest.raises(SystemExit) as stop:
        jobs.parse_demo(jobs.demo_parser("", workdir="runs", seeds=1), argv)
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_impossible_workdir_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        jobs.run_all({}, tmp_path / "file" / "runs", at_a_time=1)
    assert stop.value.code == 2
    assert f"{tmp_path}/file, a file, is the last part" in capsys.readouterr().err
    assert start(tmp_path / "file") == 2
    assert "--workdir=" in capsys.readouterr().err
