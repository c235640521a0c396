"""Our code computes what the original computed: every golden case, and the tool that reports it.

GOLDEN_DIR is a folder of cases to use instead of the stored ones.
"""

import json
import os
import pathlib
import shutil
import sys

import numpy as np
import pytest
from parity import cases
from parity import command as parity

KEPT = pathlib.Path(__file__).parent / "golden"
GOLDEN = pathlib.Path(os.environ.get("GOLDEN_DIR", KEPT))
CASES = [p for p in parity.find_cases(GOLDEN) if parity.find_runner(parity.case_name(p))]
SMALL = KEPT / "m2mkd" / "drop_path.json"


@pytest.fixture
def copied(tmp_path):
    """A folder with one small case; yields the paths of its json and npz."""
    folder = tmp_path / "m2mkd"
    folder.mkdir()
    for path in (SMALL, SMALL.with_suffix(".npz")):
        shutil.copy(path, folder)
    return folder / SMALL.name, folder / SMALL.with_suffix(".npz").name


@pytest.mark.parametrize("path", CASES, ids=parity.case_name)
def test_agrees_with_the_original(path):
    case = cases.read_case(path)
    checks = parity.run_checks(case, parity.find_runner(case.name))
    failed = [f"{c.name}: {c.problem or c.absolute}" for c in checks if not c.passed]
    assert not failed, "\n".join(failed)


def run_command(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["parity.py", *map(str, arguments)])
    return parity.main()


def rewrite(arrays: pathlib.Path, change) -> None:
    with np.load(arrays) as loaded:
        held = dict(loaded)
    change(held)
    np.savez(arrays, **held)


def test_command_prints_one_line_per_case_and_passes(copied, monkeypatch, capsys):
    assert run_command(monkeypatch, "--golden", copied[0].parents[1], "--only", "m2mkd/drop_") == 0
    head, line, total = capsys.readouterr().out.splitlines()
    assert head.split() == ["case", "max_abs_err", "max_rel_err", "tolerance"]
    assert line.startswith("m2mkd/drop_path ") and line.endswith(" ok")
    assert total == "1 passed, 0 failed, 0 without runner"


def test_command_fails_where_a_number_differs(copied, monkeypatch, capsys):
    def perturb(held):
        held["outputs/y"][0, 0, 0] += 1e-3

    rewrite(copied[1], perturb)
    assert run_command(monkeypatch, "--golden", copied[0].parents[1]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out and "    outputs/y: " in out and "0 passed, 1 failed" in out


def test_command_fails_where_an_expected_array_is_not_compared(copied, monkeypatch, capsys):
    rewrite(copied[1], lambda held: held.update({"grads_new/x": np.zeros(2, np.float32)}))
    assert run_command(monkeypatch, "--golden", copied[0].parents[1]) == 1
    assert "grads_new/x: was not compared" in capsys.readouterr().out


def test_command_continues_after_a_broken_case(copied, monkeypatch, capsys):
    broken = copied[0].with_name("drop_path_broken.json")
    broken.write_text(json.dumps({"config": {}, "tolerance": {"atol": 0, "rtol": 0}}))
    shutil.copy(copied[1], broken.with_suffix(".npz"))
    copied[0].with_name("lr_schedule.json").write_text("{}")
    assert run_command(monkeypatch, "--golden", copied[0].parents[1]) == 1
    out = capsys.readouterr().out
    assert "KeyError: 'rate'" in out and "has no lr_schedule.npz next to it" in out
    assert "1 passed, 2 failed" in out


def test_command_reports_a_case_without_runner(copied, monkeypatch, capsys):
    for path in copied:
        path.rename(path.with_name("unheard_of" + path.suffix))
    assert run_command(monkeypatch, "--golden", copied[0].parents[1]) == 0
    out = capsys.readouterr().out
    assert "without runner\n" in out and "0 passed, 0 failed, 1 without runner" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--golden", "/nowhere/at/all"], "there is no such folder"),
        (["--golden", pathlib.Path(__file__).parent / "m2mkd_jax"], "no case"),
        (["--golden", KEPT, "--only", "cliptrans/x"], "matches none of the"),
        (["--golden", KEPT, "--only", "("], "is no regex"),
    ],
)
def test_command_reports_invalid_arguments(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command(monkeypatch, *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("got", "want", "passed"),
    [
        ([1.0, 2.0], [1.0, 2.0 + 1.9e-3], True),
        ([1.0, 2.0], [1.0, 2.0 + 2.5e-3], False),
        ([np.nan], [np.nan], False),
        ([1.0, 1.0], [1.0], False),
        ([], [], True),
    ],
)
def test_check_is_element_wise(got, want, passed):
    assert cases.check(("x", got, want, 1e-3, 5e-4)).passed == passed


def test_exact_checks_allow_nothing():
    assert cases.check(("x", [3], [3], 0, 0)).passed
    assert not cases.check(("x", [1.0], [1.0 + 1e-12], 0, 0)).passed
