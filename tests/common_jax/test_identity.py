"""A run uses only its own checkpoints, and only after checking them."""

import json
import pathlib
import shutil

import convert_weights
import jax
import numpy as np
import pytest
import sweep
from descent import STEPS, descend
from jax import numpy as jnp

import cliptrans_jax.main
import m2mkd_jax.main
from common_jax import app, checkpoint, hosts, signals
from common_jax.checkpoint import Checkpoints, SaveError, contents
from common_jax.checkpoint.writing import write_params
from common_jax.state import TrainState
from common_jax.workdir import keep_identity, read_identity, read_result

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run with seed 0 and 12 steps, stopped after step 6, with checkpoints 4 and 6."""
    workdir, left = tmp_path_factory.mktemp("half") / "run", iter(range(5))

    def check() -> None:
        if next(left, None) is None:
            raise signals.Stopped

    with pytest.MonkeyPatch.context() as patch, pytest.raises(signals.Stopped):
        patch.setattr(hosts, "check", check)
        descend(workdir)
    assert steps(workdir) == [4, 6]
    return workdir


@pytest.fixture
def stopped(half, tmp_path):
    """A copy of its folder, to be modified."""
    copy(half, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What the same run logs if it is not stopped."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    descend(workdir)
    return log(workdir)


def steps(workdir) -> list[int]:
    return checkpoint.finished_steps(workdir / "checkpoints")


def log(workdir) -> tuple[str, str]:
    return (workdir / "metrics.jsonl").read_text(), (workdir / "result.json").read_text()


def copy(source, target) -> None:
    shutil.copytree(source, target)


def forget(workdir) -> None:
    """Removes ids, as in a run of an earlier version."""
    (workdir / "run.json").unlink(missing_ok=True)
    for step in (workdir / "checkpoints").iterdir():
        if (step / "run").exists():
            shutil.rmtree(step / "run")


def test_run_and_its_checkpoints_share_one_id(stopped):
    identity = json.loads((stopped / "run.json").read_text())
    assert len(identity["id"]) == 12
    assert int(identity["id"], 16) >= 0
    assert set(identity) == {"id", "version", "made"}
    for step in (4, 6):
        mark = stopped / "checkpoints" / str(step) / "run" / "metadata"
        assert json.loads(mark.read_text()) == {"id": identity["id"], "step": step}
    descend(stopped)
    assert json.loads((stopped / "run.json").read_text()) == identity


def test_runs_have_distinct_ids(tmp_path):
    ids = {keep_identity(tmp_path / name).id for name in ("a", "b", "a")}
    assert len(ids) == 2


@pytest.mark.parametrize("run_id", ["00000000002a", "ffffffffffff", "0123456789ab"])
def test_all_processes_use_the_id_of_the_first(run_id, tmp_path, monkeypatch):
    """Also if they do not see its file yet."""
    assert keep_identity(tmp_path, adopt=run_id, unmarked=(4,)).unmarked == (4,)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    given = []
    monkeypatch.setattr(hosts, "largest", lambda value: given.append(value) or np.array([value]))
    assert keep_identity(tmp_path).id == run_id
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(hosts, "largest", lambda value: np.maximum([value], float(given[0])))
    assert keep_identity(tmp_path / "not there yet").id == run_id
    assert not (tmp_path / "not there yet").exists()


@pytest.mark.parametrize("marked", [True, False])
def test_foreign_checkpoint_is_set_aside(marked, stopped, undisturbed, tmp_path, caplog):
    other = tmp_path / "other"
    descend(other, seed=1)
    copy(other / "checkpoints" / "8", stopped / "checkpoints" / "8")
    if not marked:
        forget(stopped)
    descend(stopped)
    assert log(stopped) == undisturbed
    assert steps(stopped) == [8, 12]
    assert (stopped / "checkpoints" / "foreign_8" / "params").exists()
    assert "checkpoints/8 aside: it belongs to a run with another config (seed: 1 -> 0" in (
        caplog.text
    )


def test_checkpoint_of_another_run_with_the_same_config_is_foreign(
    stopped, undisturbed, tmp_path, caplog
):
    other = tmp_path / "other"
    descend(other)
    copy(other / "checkpoints" / "8", stopped / "checkpoints" / "8")
    descend(stopped)
    assert log(stopped) == undisturbed
    ids = [read_identity(workdir).id for workdir in (other, stopped)]
    assert f"it belongs to run {ids[0]!r}, and this is run {ids[1]!r}" in caplog.text


@pytest.mark.parametrize("marked", [True, False])
def test_own_checkpoint_under_the_wrong_step_is_set_aside(marked, stopped, undisturbed, caplog):
    copy(stopped / "checkpoints" / "4", stopped / "checkpoints" / "8")
    if not marked:
        forget(stopped)
    descend(stopped)
    assert log(stopped) == undisturbed
    assert (stopped / "checkpoints" / "foreign_8").exists()
    assert "step 4, so " in caplog.text


def test_step_beyond_the_end_is_set_aside(stopped, undisturbed, caplog):
    copy(stopped / "checkpoints" / "4", stopped / "checkpoints" / "2400")
    descend(stopped)
    assert log(stopped) == undisturbed
    assert "checkpoints/2400 aside: the run ends at step 12" in caplog.text
    assert steps(stopped) == [8, 12]


def test_checkpoints_set_aside_earlier_are_kept(stopped, undisturbed):
    for name in ("foreign_2400", "2400"):
        copy(stopped / "checkpoints" / "4", stopped / "checkpoints" / name)
    descend(stopped)
    assert (stopped / "checkpoints" / "foreign_2400").exists()
    assert (stopped / "checkpoints" / "foreign_2400_2").exists()


def test_workdir_with_only_foreign_checkpoints_is_left_untouched(stopped, tmp_path):
    workdir = tmp_path / "new"
    copy(stopped / "checkpoints", workdir / "checkpoints")
    before = sorted(str(path) for path in workdir.rglob("*"))
    with pytest.raises(ValueError, match="to this run: step 4: it belongs to a run with") as error:
        descend(workdir, seed=1)
    assert "Give another --workdir, or move the folder away" in str(error.value)
    assert sorted(str(path) for path in workdir.rglob("*")) == before


def test_lost_run_json_is_rebuilt_from_the_checkpoints(stopped, undisturbed):
    before = read_identity(stopped)
    (stopped / "run.json").unlink()
    descend(stopped)
    assert log(stopped) == undisturbed
    assert read_identity(stopped) == before


def test_run_without_an_id_gets_one_and_keeps_its_checkpoints(stopped, undisturbed):
    forget(stopped)
    descend(stopped, keep=4)
    assert log(stopped) == undisturbed
    assert read_identity(stopped).unmarked == (4, 6)
    assert checkpoint.own_steps(stopped / "checkpoints") == [4, 6, 8, 12]


def test_newest_checkpoint_identifies_a_run_without_run_json(stopped, tmp_path):
    other = tmp_path / "other"
    descend(other, keep=9)
    shutil.rmtree(stopped / "checkpoints" / "4")
    copy(other / "checkpoints" / "4", stopped / "checkpoints" / "4")
    run_id = read_identity(stopped).id
    (stopped / "run.json").unlink()
    assert checkpoint.own_steps(stopped / "checkpoints") == [6]
    stock = checkpoint.take_stock(stopped, config={"seed": 0}, total=STEPS)
    assert (stock.steps, stock.id, stock.unmarked, list(stock.foreign)) == ((6,), run_id, (), [4])


def test_unmarked_checkpoint_is_foreign_to_a_run_with_an_id(stopped):
    shutil.rmtree(stopped / "checkpoints" / "6" / "run")
    stock = checkpoint.take_stock(stopped, config={"seed": 0}, total=STEPS)
    assert stock.steps == (4,)
    assert stock.foreign[6].startswith("it does not say which run it belongs to, and this is run '")
    assert checkpoint.take_stock(stopped, config={}, total=5).foreign == {
        6: "the run ends at step 5"
    }


def test_result_of_an_unsaved_step_does_not_end_the_run(stopped):
    for total, own in ((5, [4, 6]), (4, [4])):
        (stopped / "result.json").write_text(json.dumps({"steps": total}))
        assert checkpoint.own_steps(stopped / "checkpoints") == own


def test_broken_run_json_is_reported(stopped):
    (stopped / "run.json").write_text('{"id": 3}')
    with pytest.raises(ValueError, match=r"run/run\.json must hold the id of a run"):
        descend(stopped)


def test_broken_run_mark_counts_as_damage(stopped, undisturbed, caplog):
    (stopped / "checkpoints" / "6" / "run" / "metadata").write_text("{")
    descend(stopped)
    assert log(stopped) == undisturbed
    assert (stopped / "checkpoints" / "damaged_6").exists()
    assert "checkpoints/6 cannot be read" in caplog.text


def test_loading_skips_foreign_checkpoints(stopped, tmp_path, caplog):
    want = checkpoint.load(stopped)["w"]
    other = tmp_path / "other"
    descend(other, seed=1)
    copy(other / "checkpoints" / "12", stopped / "checkpoints" / "12")
    copy(stopped / "checkpoints" / "4", stopped / "checkpoints" / "20")
    assert checkpoint.find_step(stopped).name == "6"
    assert checkpoint.load(stopped)["w"] == want
    assert "checkpoints/12 is left out: it belongs to a run with another config (seed: 1 -> 0" in (
        caplog.text
    )
    assert "checkpoints/20 is left out: it holds step 4" in caplog.text
    # A step's own folder is taken as it is.
    assert checkpoint.find_step(stopped / "checkpoints" / "12").name == "12"
    for step in (4, 6):
        shutil.rmtree(stopped / "checkpoints" / str(step))
    with pytest.raises(ValueError, match=r"belongs to its run: step 12: .*; step 20: "):
        checkpoint.load(stopped)


def test_finished_run_ignores_later_steps(tmp_path):
    workdir = tmp_path / "run"
    descend(workdir)
    forget(workdir)
    copy(workdir / "checkpoints" / "12", workdir / "checkpoints" / "2400")
    assert checkpoint.find_step(workdir).name == "12"


@pytest.mark.parametrize("name", ["020", "²", "20.tmp"])
def test_only_numbered_folders_are_steps(name, stopped):
    copy(stopped / "checkpoints" / "4", stopped / "checkpoints" / name)
    assert steps(stopped) == [4, 6]


@pytest.mark.parametrize("letter", "[]*?\\")
def test_folders_orbax_cannot_write_are_refused(letter, tmp_path):
    workdir = tmp_path / f"lr={letter}1e-3" / "run"
    with pytest.raises(ValueError, match="checkpoints cannot be written below") as error:
        descend(workdir)
    assert letter in str(error.value)
    with pytest.raises(ValueError, match="checkpoints cannot be written below"):
        write_params(workdir, {"w": np.ones(3)}, {})
    assert not list(tmp_path.iterdir())
    # What counts is the path as orbax sees it: a link with another name is a workaround.
    workdir.mkdir(parents=True)
    (tmp_path / "link").symlink_to(workdir)
    write_params(tmp_path / "link", {"w": np.ones(3, np.float32)}, {})
    np.testing.assert_array_equal(checkpoint.load(tmp_path / "link")["w"], np.ones(3))
    (tmp_path / "plain").mkdir()
    (tmp_path / f"link{letter}").symlink_to(tmp_path / "plain")
    with pytest.raises(ValueError, match="checkpoints cannot be written below"):
        write_params(tmp_path / f"link{letter}", {"w": np.ones(3)}, {})


@pytest.mark.parametrize("program", [m2mkd_jax.main, cliptrans_jax.main])
def test_workdir_orbax_cannot_write_is_reported_with_its_flag(program, tmp_path, capsys):
    config = {m2mkd_jax.main: "m2mkd/digits.py", cliptrans_jax.main: "cliptrans/emoji.py"}[program]
    flags = ["", f"--config={ROOT}/configs/{config}", f"--workdir={tmp_path}/lr=[1e-3]"]
    with pytest.raises(SystemExit, match="2"):
        app.run(program.main, "", flags)
    message = capsys.readouterr().err
    assert f"error: --workdir='{tmp_path}/lr=[1e-3]': checkpoints cannot be written" in message
    assert not list(tmp_path.iterdir())


def test_convert_and_sweep_refuse_folders_orbax_cannot_write(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        convert_weights.main([f"{tmp_path}/none.pth", f"{tmp_path}/a[1]"])
    assert f"OUT='{tmp_path}/a[1]': checkpoints cannot be written" in capsys.readouterr().err
    config = f"--config={ROOT}/configs/m2mkd/digits.py"
    assert sweep.main([config, f"--workdir={tmp_path}/a*", "--grid=optim.lr=1,2"]) == 2
    assert f"--workdir='{tmp_path}/a*': checkpoints cannot be written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_checkpoints_in_a_folder_orbax_cannot_write_still_load(stopped, tmp_path):
    want = checkpoint.load(stopped)["w"]
    moved = tmp_path / "lr=[1e-3]"
    shutil.move(stopped, moved)
    assert checkpoint.load(moved)["w"] == want
    shutil.move(moved, tmp_path / "lr=\\")
    with pytest.raises(ValueError, match="orbax treats a backslash in a path as a slash"):
        checkpoint.load(tmp_path / "lr=\\")


def state(step: int) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero + step,
        params={"a": {"b": jnp.ones((4, 2))}, "c": jnp.ones(3)},
        opt_state=({"m": jnp.ones(3)},),
        ema=None,
        sums={},
        skipped=zero,
        skipped_in_row=zero,
    )


@pytest.fixture
def two(tmp_path):
    """Checkpoints that keep one, with step 1 saved."""
    found = Checkpoints(tmp_path, keep=1, best=None)
    found.save(state(1), step=1, config={"x": [1, 2]}, metrics=None)
    found.wait()
    return found


def spoil(monkeypatch, change) -> None:
    """Makes change(folder) modify every later save after it is written."""
    check = contents.check_written

    def spoilt(folder, arrays, texts):
        change(folder)
        check(folder, arrays, texts)

    monkeypatch.setattr("common_jax.checkpoint.writing.check_written", spoilt)


CHANGES = {
    "'params' cannot be read": lambda at: (at / "params" / "manifest.ocdbt").unlink(),
    "'trainer' cannot be read": lambda at: (at / "trainer" / "_METADATA").write_text("{"),
    "'config' reads back with other content": lambda at: (at / "config" / "metadata").write_text(
        '{"x": [1]}'
    ),
    "No such file": lambda at: shutil.rmtree(at / "config"),
}


@pytest.mark.parametrize("message", CHANGES)
def test_save_counts_only_if_it_reads_back(message, two, tmp_path, monkeypatch):
    spoil(monkeypatch, CHANGES[message])
    two.save(state(2), step=2, config={"x": [1, 2]}, metrics=None)
    with pytest.raises(SaveError, match=message) as error:
        two.wait()
    assert "step 2 could not be written" in str(error.value)
    assert "Make room" not in str(error.value)
    # It does not count, and the previous one was not deleted for it.
    assert steps(tmp_path) == [1]
    assert not (tmp_path / "checkpoints" / "2").exists()


def test_save_that_does_not_read_back_causes_a_warning(tmp_path, monkeypatch, caplog):
    found = Checkpoints(tmp_path, keep=2, best=None, on_failed="go_on")
    with monkeypatch.context() as patch:
        spoil(patch, CHANGES["'params' cannot be read"])
        found.save(state(1), step=1, config={}, metrics=None)
        found._attempt(found._finish)
    found.save(state(2), step=2, config={}, metrics=None)
    found.close()
    assert steps(tmp_path) == [2]
    assert "step 1 could not be written" in caplog.text


def test_check_written_reports_array_differences(two, tmp_path):
    folder = checkpoint.find_step(tmp_path)
    outline = contents.outline(state(1).params)
    assert outline == {"a.b": ((4, 2), np.float32), "c": ((3,), np.float32)}
    contents.check_written(folder, {"params": outline}, {"config": {"x": [1, 2]}})
    for change, message in (
        ({"a.b": ((4, 3), np.dtype("f4"))}, r"a\.b is float32 \(4, 2\), not float32 \(4, 3\)"),
        ({"c": ((3,), np.dtype("i4"))}, r"c is float32 \(3,\), not int32 \(3,\)"),
        ({"d": ((), np.dtype("f4"))}, "d is missing"),
    ):
        with pytest.raises(OSError, match=message):
            contents.check_written(folder, {"params": outline | change}, {})
    with pytest.raises(OSError, match="c is unexpected"):
        contents.check_written(folder, {"params": {"a.b": outline["a.b"]}}, {})


def test_check_written_reports_missing_chunks(two, tmp_path, monkeypatch):
    folder = checkpoint.find_step(tmp_path)
    outline = contents.outline(state(1).params)
    store = contents.ts.KvStore.open(contents._kvstore(folder / "params")).result()
    store.delete_range(contents.ts.KvStore.KeyRange("c/0", "c/1")).result()
    with pytest.raises(OSError, match="c has 0 of its 1 chunks"):
        contents.check_written(folder, {"params": outline}, {})


def test_saving_to_a_deleted_workdir_fails(tmp_path):
    workdir = tmp_path / "run"
    run_id = keep_identity(workdir).id
    found = Checkpoints(workdir, keep=1, best=None, run_id=run_id)
    found.save(state(1), step=1, config={}, metrics=None)
    found.wait()
    shutil.rmtree(workdir)
    with pytest.raises(SaveError, match=r"step 1 could not be written.*it is missing"):
        found.wait()
    found.save(state(2), step=2, config={}, metrics=None)
    with pytest.raises(SaveError, match=r"run\.json beside it is gone, so the workdir was"):
        found.wait()


def test_result_must_belong_to_its_workdir(tmp_path):
    workdir, config = tmp_path / "run", {"seed": 0, "optim": {"steps": 12}}
    descend(workdir)
    assert read_result(workdir, config, phase="descent", steps=12)["steps"] == 12
    assert read_result(tmp_path / "none", config, phase="descent") is None
    with pytest.raises(ValueError, match="its phase is 'descent', and this run is 'ascent'"):
        read_result(workdir, config, phase="ascent")
    with pytest.raises(ValueError, match="it has 12 steps, and this run has 24"):
        read_result(workdir, config, phase="descent", steps=24)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(workdir / "result.json", alone)
    with pytest.raises(ValueError, match=r"there is no config\.json beside it"):
        descend(alone)


def test_converted_weights_have_an_identity(tmp_path):
    write_params(tmp_path / "weights", {"w": np.ones(3, np.float32)}, {"a": 1})
    run_id = read_identity(tmp_path / "weights").id
    mark = tmp_path / "weights" / "checkpoints" / "0" / "run" / "metadata"
    assert json.loads(mark.read_text()) == {"id": run_id, "step": 0}
    np.testing.assert_array_equal(checkpoint.load(tmp_path / "weights")["w"], np.ones(3))
