"""Runs of earlier versions load and resume, despite fields added or removed since."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tiny_cliptrans
from etils import epath

import cliptrans_jax
import m2mkd_jax
from cliptrans_jax.config import Config as CliptransConfig
from cliptrans_jax.runs.pipeline import run_stage
from common_jax import checkpoint
from common_jax.config import freeze
from common_jax.mesh import make_mesh
from common_jax.metrics import read_metrics
from common_jax.workdir import freeze_stored, read_json, refuse_other_config, versions
from m2mkd_jax.config import Config as M2mkdConfig
from m2mkd_jax.phases.pipeline import run_phase

KEPT = pathlib.Path(__file__).parent / "workdirs"
SYSTEMS = {"m2mkd": (M2mkdConfig, run_phase), "cliptrans": (CliptransConfig, run_stage)}
# For each system, a field with its default value in the stored runs, and one with another value.
DEFAULT = {"m2mkd": ("optim", "accumulate", 1), "cliptrans": ("decode", "length_penalty", 1.0)}
ENDS = ("finished", "unfinished")
CHOSEN = {"m2mkd": ("optim", "steps", 6), "cliptrans": ("decode", "beams", 2)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The stored runs, copied, with CLIPTrans' corpus next to them."""
    shutil.copytree(KEPT, tmp_path, dirs_exist_ok=True)
    tiny_cliptrans.write_corpus(tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def restart(system: str, workdir: pathlib.Path) -> dict:
    """Starts today's command with the run's own config; returns the result."""
    cls, run = SYSTEMS[system]
    config = freeze(cls, read_json(KEPT / workdir.name / "config.json"))
    return run(config, epath.Path(workdir), make_mesh(config.mesh, jax.devices()[:1]))


def edit(path: pathlib.Path, change) -> None:
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def make_older(system: str, config: dict) -> None:
    """Changes a config to look like an earlier version's: without one of today's fields, and with
    one that is gone."""
    section, name, default = DEFAULT[system]
    assert config[section].pop(name) == default
    config["optim"]["warp"] = 9


def edit_all(workdir: pathlib.Path, change) -> None:
    """Changes a run's config wherever it is stored."""
    for path in [workdir / "config.json", *workdir.glob("checkpoints/*/config/metadata")]:
        edit(path, change)


def assert_ends_as_undisturbed(system: str, workdir: pathlib.Path, result: dict) -> None:
    """Requires the finished run's results: the lines up to the checkpoint are its own, the later
    ones are computed here, so that CPUs may round them differently."""
    finished = KEPT / f"{system}_finished"
    for name, value in read_json(finished / "result.json").items():
        if isinstance(value, str):
            assert result[name] == value
        else:
            np.testing.assert_allclose(result[name], value, rtol=1e-4, err_msg=name)
    lines, wanted = (read_metrics(run / "metrics.jsonl") for run in (workdir, finished))
    assert [sorted(line) for line in lines] == [sorted(line) for line in wanted]
    for line, want in zip(lines, wanted, strict=True):
        for name, value in want.items():
            np.testing.assert_allclose(line[name], value, rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("system", SYSTEMS)
def test_finished_run_is_left_unchanged(system, folder):
    workdir = folder / f"{system}_finished"
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert restart(system, workdir)["steps"] == 6
    assert before == {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def test_unfinished_m2mkd_run_resumes_to_the_end(folder, caplog):
    workdir = folder / "m2mkd_unfinished"
    result = restart("m2mkd", workdir)
    assert_ends_as_undisturbed("m2mkd", workdir, result)
    # It has an id by now, and records which steps had none.
    identity = read_json(workdir / "run.json")
    assert identity["unmarked"] == [4]
    newest = checkpoint.find_step(workdir)
    assert read_json(newest / "run" / "metadata") == {"id": identity["id"], "step": 6}
    assert "aside:" not in caplog.text


def test_unfinished_cliptrans_run_resumes_despite_changed_fields(folder, caplog):
    workdir = folder / "cliptrans_unfinished"
    edit_all(workdir, lambda config: make_older("cliptrans", config))
    result = restart("cliptrans", workdir)
    assert_ends_as_undisturbed("cliptrans", workdir, result)
    assert "this version has no config.optim.warp=9" in caplog.text
    assert read_json(workdir / "run.json")["unmarked"] == [3]


@pytest.mark.parametrize("system", SYSTEMS)
def test_new_fields_take_their_defaults(system, folder, caplog):
    workdir, (section, name, value) = folder / f"{system}_unfinished", CHOSEN[system]
    config = freeze(SYSTEMS[system][0], read_json(workdir / "config.json"))
    edit_all(workdir, lambda stored: make_older(system, stored))
    refuse_other_config(workdir, config)
    assert "this version has no config.optim.warp=9" in caplog.text
    for step in (checkpoint.load_config(folder / f"{system}_{end}") for end in ENDS):
        assert freeze_stored(type(config), step, "x") == config
    edit_all(workdir, lambda stored: stored[section].pop(name))
    with pytest.raises(ValueError, match=rf"{section}\.{name}: .* -> {value}"):
        refuse_other_config(workdir, config)


@pytest.mark.parametrize("system", SYSTEMS)
def test_models_load_despite_changed_fields(system, folder, caplog):
    workdir = folder / f"{system}_finished"
    edit_all(workdir, lambda config: make_older(system, config))
    package = {"m2mkd": m2mkd_jax, "cliptrans": cliptrans_jax}[system]
    package.load_model(workdir)
    assert "this version has no config.optim.warp=9" in caplog.text


def test_invalid_stored_value_is_reported_with_its_run(folder):
    edit_all(folder / "m2mkd_finished", lambda config: config.update(drop_path="much"))
    message = r"config of .*m2mkd_finished/checkpoints/6 .*config\.drop_path='much' must be"
    with pytest.raises(ValueError, match=message):
        m2mkd_jax.load_model(folder / "m2mkd_finished")


def test_sections_are_filled_in_by_their_kind(tmp_path):
    (tmp_path / "result.json").write_text("{}")  # else another config may take over the workdir
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model": {"kind": "nac", "width": 16}}))
    nac = freeze(M2mkdConfig, {"model": {"kind": "nac", "width": 16}})
    refuse_other_config(tmp_path, nac)
    with pytest.raises(ValueError, match=r"model\.kind: 'nac' -> 'vmoe'"):
        refuse_other_config(tmp_path, M2mkdConfig())
    path.write_text(json.dumps({"model": {"kind": "gone", "depths": [1]}}))
    with pytest.raises(ValueError, match=r"model\.kind: 'gone' -> 'nac'"):
        refuse_other_config(tmp_path, nac)
    with pytest.raises(ValueError, match=r"the config of x .*config\.model\.kind='gone' must be"):
        freeze_stored(M2mkdConfig, read_json(path), "x")


def test_removed_fields_are_reported_in_printable_form(caplog):
    versions.name_gone({"warp\ud800": "a\x1b[2J"}, "run")
    assert "this version has no config.warp?=a?[2J" in caplog.text


def test_difference_of_many_fields_gives_a_short_message(tmp_path):
    (tmp_path / "result.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps({"x" * 300 + str(i): i for i in range(300)}))
    with pytest.raises(ValueError, match="holds a run of another config") as error:
        refuse_other_config(tmp_path, {"a": 1})
    assert len(str(error.value)) < 2000 + len(str(tmp_path))
    assert "and 289 more" in str(error.value)
