"""Which runs of the comparison on CIFAR-10 need which others."""

import argparse
import pathlib

import compare_m2mkd
import pytest


@pytest.mark.parametrize("one_teacher", [False, True])
def test_students_of_several_seeds_may_share_one_teacher(tmp_path, one_teacher):
    flags = argparse.Namespace(
        workdir=tmp_path,
        seeds=2,
        only=["vmoe_kept"],
        one_teacher=one_teacher,
        data=pathlib.Path("/data"),
        per_class=0,
        long_steps=10,
        flags=[],
    )
    jobs = compare_m2mkd.plan(flags)
    assert jobs["vmoe_m2mkd_0"].needs is None
    first, second = f"{tmp_path}/vmoe_m2mkd_0", f"{tmp_path}/vmoe_m2mkd_1"
    given = [f"--config.sources.{role}={first}/{role}" for role in ("meta", "teacher")]
    assert jobs["vmoe_m2mkd_1"].needs == ("vmoe_m2mkd_0" if one_teacher else None)
    sources = [flag for flag in jobs["vmoe_m2mkd_1"].command if "config.sources" in flag]
    assert sources == (given if one_teacher else [])
    assert jobs["vmoe_kept_1"].needs == "vmoe_m2mkd_1"  # its students are those of its own seed
    assert f"--config.sources.students={(f'{second}/students',)}" in jobs["vmoe_kept_1"].command


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--per-class=-1", "argument --per-class: '-1' must be a whole number from 0"),
        ("--long-steps=0", "argument --long-steps: '0' must be a whole number from 1"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, monkeypatch, capsys, flag, said):
    monkeypatch.setattr("sys.argv", ["compare", "--data", str(tmp_path), flag])
    with pytest.raises(SystemExit) as end:
        compare_m2mkd.parse_flags()
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_overrides_reach_every_run(tmp_path, monkeypatch):
    argv = ["compare", "--data", str(tmp_path), "--only", "vmoe_long", "--config.run.log_every=3"]
    monkeypatch.setattr("sys.argv", argv)
    flags = compare_m2mkd.parse_flags()
    assert flags.only == ["vmoe_long"]
    jobs = compare_m2mkd.plan(flags)
    assert jobs and all("--config.run.log_every=3" in job.command for job in jobs.values())
