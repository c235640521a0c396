"""The command as a user sees it: one-line errors with nothing written; a folder of images; a
trace."""

import contextlib
import errno
import json
import logging
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

import m2mkd_jax
from common_jax import app
from common_jax.workdir import lock
from m2mkd_jax import main as command
from m2mkd_jax.main import DESCRIPTION, main
from m2mkd_jax.phases import PHASES

ROOT = pathlib.Path(__file__).parents[2]
DIGITS = f"--config={ROOT}/configs/m2mkd/digits.py:phase=end_to_end"
SMALL = (
    "--config.optim.steps=3",
    "--config.optim.warmup_epochs=0",
    "--config.optim.batch=16",
    "--config.model.width=16",
    "--config.model.depths=(1,1)",
    "--config.meta.depths=(1,1)",
    "--config.mesh.data=8",
    "--config.run.log_every=1",
    "--config.run.compilation_cache=None",
)


def refusal(capsys, *flags) -> str:
    """The command's message when it refuses, with exit status 2."""
    with pytest.raises(SystemExit) as stop:
        app.run(main, DESCRIPTION, ["m2mkd", *flags])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--config.model.moe.expert=8"],
            ["config.model.moe has no field 'expert'", "did you mean 'experts'"],
        ),
        (["--config.optin.lr=8"], ["config has no field 'optin'", "did you mean 'optim'"]),
        (
            ["--config.mesh.data=3"],
            ["config.mesh=data 3", "there are 8 here", "change config.mesh"],
        ),
        (
            ["--config.mesh.expert=8"],
            ["config.model.moe.experts=4", "expert axis, 8", "config.mesh.expert"],
        ),
        (["--config.optim.batch=60"], ["config.optim.batch", "60", "8 devices"]),
        (["--config.optim.batch=5000"], ["5000", "1437"]),
        (["--config.optim.lr=fast"], ["config.optim.lr", "fast"]),
        (["--config.optim.lr=None"], ["config.optim.lr=None must be of type float"]),
        (
            [
                "--config.augment.mixup=0.8",
                "--config.optim.batch=24",
                "--config.optim.accumulate=8",
            ],
            ["config.optim.batch=24 / accumulate=8 must be even"],
        ),
        (["--config.model.moe.router=best"], ["config.model.moe.router='best'", "topk_softmax"]),
        (["--config.model.moe_blocks=9"], ["config.model.moe_blocks='9'", "outside 0..3"]),
        (["--config.model.depths=(1,0,1,1)"], ["config.model.depths[1]=0 must be at least 1"]),
        (["--config.model.patch=3"], ["config.model.patch=3 must divide config.data.image_size=8"]),
        (["--config.data.labels=12"], ["config.data.labels=12"]),
        (["--config.data.source=folder", "--config.data.path=/nowhere"], ["/nowhere"]),
        (["--config.sources.students=('a','b')"], ["config.sources.students names 2", "needs 4"]),
        (["--wrokdir=x"], ["wrokdir"]),
        (["extra"], ["extra"]),
    ],
    ids=lambda value: value[0] if value[0].startswith("-") else "",
)
def test_user_errors_are_reported_before_writing(capsys, tmp_path, flags, said):
    message = refusal(capsys, DIGITS, f"--workdir={tmp_path / 'run'}", *flags)
    for text in said:
        assert text in message
    assert not (tmp_path / "run").exists()


def test_workdir_without_room_for_a_lock_is_reported_first(capsys, tmp_path, monkeypatch):
    """Not after the data were read and the networks traced."""
    monkeypatch.setattr(lock._Lock, "_create", full_disk)
    monkeypatch.setattr(command, "run_phase", None)
    message = refusal(capsys, DIGITS, f"--workdir={tmp_path / 'run'}")
    assert "no lock can be written: No space left on device" in message
    assert "Make room, and start the same command again" in message


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_finished_run_needs_no_lock_and_no_fitting_mesh(capsys, tmp_path, monkeypatch):
    (tmp_path / "result.json").write_text("{}")
    monkeypatch.setattr(lock._Lock, "_create", full_disk)
    monkeypatch.setattr(command, "run_phase", lambda *_: {})
    monkeypatch.setattr(command, "reporting", lambda *_: contextlib.nullcontext())
    # Otherwise refused: the batch does not divide over the devices.
    run = (DIGITS, f"--workdir={tmp_path}", "--config.optim.batch=12")
    app.run(main, DESCRIPTION, ["m2mkd", *run, "--config.run.compilation_cache=None"])
    (tmp_path / "result.json").unlink()
    monkeypatch.undo()
    assert "12 must be a multiple" in refusal(capsys, *run)


def test_missing_flags_and_files_are_named(capsys, tmp_path):
    assert "--workdir is missing" in refusal(capsys, DIGITS)
    assert "--config is missing" in refusal(capsys, f"--workdir={tmp_path}")
    assert "nowhere.py" in refusal(capsys, "--config=nowhere.py", f"--workdir={tmp_path}")
    misspelt = DIGITS.replace("phase", "phas")
    assert "did you mean 'phase'" in refusal(capsys, misspelt, f"--workdir={tmp_path}")


def test_missing_source_is_named(capsys, tmp_path):
    distill = DIGITS.replace("end_to_end", "distill,module=1")
    run = f"--workdir={tmp_path / 'run'}"
    assert "config.sources.meta is empty" in refusal(capsys, distill, run)
    message = refusal(
        capsys,
        distill,
        run,
        f"--config.sources.meta={tmp_path / 'meta'}",
        "--config.sources.teacher=x",
    )
    assert "does not exist; give a run's workdir" in message
    assert not (tmp_path / "run").exists()


def test_help_shows_the_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        app.run(main, DESCRIPTION, ["m2mkd", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--config", "--workdir", "--debug", "digits.py"))


def test_nan_run_stops_and_keeps_its_checkpoint(tmp_path, capsys):
    flags = ["m2mkd", DIGITS, f"--workdir={tmp_path / 'run'}", *SMALL, "--config.optim.lr=1e9"]
    flags += ["--config.run.nan_patience=2", "--config.optim.steps=300", "--config.optim.clip=None"]
    with pytest.raises(SystemExit) as stopped:
        app.run(main, DESCRIPTION, flags)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert re.search(r"error: .*config\.run\.nan_patience=2.*config\.optim\.lr", said)
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.fixture
def folder(tmp_path):
    """A folder of images: two classes with 12 and 4 images, and one file that is not an image."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (50, 40 + i, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{i}.jpg")
    (tmp_path / "images" / "train" / "cat" / "3.jpg").write_bytes(b"not an image")
    return tmp_path / "images"


def test_image_folder_trains_from_flags_alone(folder, tmp_path, monkeypatch, capsys):
    flags = [
        f"--config={ROOT}/configs/m2mkd/vmoe_base.py:phase=end_to_end",
        f"--config.data.path={folder}",
        "--config.data.image_size=48",
        "--config.data.labels=2",
        "--config.data.workers=1",
        "--config.data.bad_share=0.1",
        "--config.model.depths=(1,1)",
        "--config.meta.depths=(1,1)",
        "--config.model.width=16",
        "--config.model.heads=2",
        "--config.optim.batch=8",
        "--config.optim.steps=4",
        "--config.mesh.expert=2",
        "--config.run.log_every=1",
        "--config.run.profile=(2,3)",
        "--config.run.compilation_cache=None",
    ]
    monkeypatch.chdir(tmp_path)
    app.run(main, DESCRIPTION, ["m2mkd", *flags, "--workdir=run"])
    scores, use = capsys.readouterr().err.splitlines()[-2:]
    assert "finished: test/loss " in scores and ", test/accuracy " in scores
    assert use.endswith(f"to use it: m2mkd predict {tmp_path}/run PICTURE")
    apply, params = m2mkd_jax.load_model("run")
    assert jax.jit(apply)(params, np.zeros((2, 48, 48, 3), np.uint8)).shape == (2, 2)
    workdir = tmp_path / "run"
    assert (workdir / "result.json").exists()
    assert (workdir / "report.html").stat().st_size > 10_000
    bad = (workdir / "bad_examples.jsonl").read_text().splitlines()
    assert len(bad) == 1
    assert "3.jpg" in bad[0]
    assert list((workdir / "profile").rglob("*.xplane.pb"))


def test_short_run_on_folder_without_splits(folder, tmp_path):
    (folder / "train" / "cat" / "3.jpg").unlink()
    flags = [
        f"{DIGITS},scale=0.05",
        f"--config.data.path={folder / 'train'}",
        "--config.data.source=folder",
        "--config.data.test_share=0.25",
        "--config.data.image_size=48",
        "--config.data.channels=3",
        "--config.data.labels=2",
        "--config.data.mean=(0.5,0.5,0.5)",
        "--config.data.std=(0.5,0.5,0.5)",
        "--config.model.patch=24",
        "--config.model.width=16",
        "--config.model.depths=(1,1)",
        "--config.meta.depths=(1,1)",
        "--config.optim.batch=8",
        "--config.run.compilation_cache=None",
    ]
    app.run(main, DESCRIPTION, ["m2mkd", *flags, f"--workdir={tmp_path / 'run'}"])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 2  # 17 images in one epoch


def test_startup_imports_no_other_framework_or_slow_module():
    slow = "{'tensorflow', 'torch', 'scipy.stats', 'sklearn'}"
    code = f"import sys, m2mkd_jax.main; print(sorted({slow} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=dict(os.environ),
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(("result", "run"), [({}, "x"), ({"episodes": 3}, "x/episode_0")])
def test_command_says_which_folder_to_predict_with(result, run, caplog):
    with caplog.at_level(logging.INFO):
        command._conclude(result, PHASES["few_shot"], epath.Path("x"))
    assert caplog.messages[-1].endswith(f"m2mkd predict {run} PICTURE")
