"""Reports are written atomically, and never fail a run."""

import os

import pytest

from common_jax.report import dispensable, is_picture, page, write_report


@pytest.fixture
def run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    return tmp_path


def test_broken_picture_is_redrawn(run):
    page = write_report(run, title="t").read_bytes()
    curves = run / "plots" / "curves.png"
    whole = curves.read_bytes()
    for broken in (b"", whole[:-20], b"no picture"):
        curves.write_bytes(broken)
        assert not is_picture(curves)
        assert write_report(run, title="t").read_bytes() == page
        assert curves.read_bytes() == whole


@pytest.mark.parametrize("hours", [-1, 1])
def test_picture_of_outdated_curves_is_redrawn_whatever_its_mtime(run, hours):
    write_report(run, title="t")
    curves, metrics = run / "plots" / "curves.png", run / "metrics.jsonl"
    before = curves.read_bytes()
    metrics.write_text(metrics.read_text() + '{"step": 2, "train/loss": 1.0}\n')
    os.utime(curves, (time := metrics.stat().st_mtime + 3600 * hours, time))
    write_report(run, title="t")
    assert curves.read_bytes() != before


def test_unchanged_report_is_not_rewritten(run, monkeypatch):
    write_report(run, title="t")

    def read_only(path, content):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(page, "write_bytes", read_only)
    write_report(run, title="t")
    with pytest.raises(OSError, match="Read-only"):
        write_report(run, title="another")


def test_report_errors_do_not_fail_the_run(tmp_path, caplog):
    for error in (OSError(28, "No space left on device"), ValueError("odd"), KeyError("x")):
        with dispensable(tmp_path / "report.html"):
            raise error
    assert caplog.text.count("report.html could not be made") == 3
    assert "No space left on device" in caplog.text
