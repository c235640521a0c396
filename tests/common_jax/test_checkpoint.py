"""Checkpoints and warm starts: finding them, errors, and the record of loaded parameters."""

import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from flax import traverse_util
from jax import numpy as jnp
from meshes import split_mesh

from common_jax import checkpoint
from common_jax.checkpoint import Checkpoints, contents, reading, writing
from common_jax.state import TrainState
from common_jax.weights import Allowance, Origin, take

SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def state(step, value):
    zero = jnp.zeros((), jnp.int32)
    params = {
        "net": {"stage_0": {"kernel": jnp.full((4, 2), value)}, "stage_1": {"bias": jnp.ones(3)}}
    }
    return TrainState(
        step=zero + step,
        params=params,
        opt_state={"m": jnp.full((4, 2), value)},
        ema=None,
        sums={"loss": jnp.zeros(())},
        skipped=zero,
        skipped_in_row=zero,
    )


def save(workdir, values, *, keep=2, best="test/accuracy"):
    checkpoints = Checkpoints(workdir, keep=keep, best=best)
    for step, value in enumerate(values, start=1):
        metrics = {"test/accuracy": value}
        checkpoints.save(state(step, value), step=step, config={"a": {"b": step}}, metrics=metrics)
    checkpoints.close()


def abstract():
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SHARDING), state(0, 0.0)
    )


@pytest.fixture
def workdir(tmp_path):
    save(tmp_path, [0.1, 0.9, 0.2, 0.3, 0.4])
    return tmp_path


def test_newest_and_best_checkpoints_are_kept(workdir):
    assert checkpoint.finished_steps(workdir / "checkpoints") == [2, 4, 5]


def test_lowest_loss_is_kept_as_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, best="test/module_0/loss")
    for step, value in enumerate([0.5, 0.2, 0.9, 0.4], start=1):
        metrics = {"test/module_0/loss": value}
        checkpoints.save(state(step, value), step=step, config={}, metrics=metrics)
    checkpoints.close()
    assert checkpoint.finished_steps(tmp_path / "checkpoints") == [2, 4]


def test_restore_latest_restores_the_whole_newest_state(workdir):
    restored = Checkpoints(workdir, keep=2, best=None).restore_latest(abstract())
    jax.tree.map(np.testing.assert_array_equal, restored, state(5, 0.4))
    assert (int(restored.step), float(restored.opt_state["m"][0, 0])) == (5, np.float32(0.4))


def test_restoring_from_an_empty_folder_raises(tmp_path):
    with pytest.raises(ValueError, match=r"none of the checkpoints \[\]"):
        Checkpoints(tmp_path, keep=1, best=None).restore_latest(abstract())


def test_misspelt_best_metric_is_reported(tmp_path):
    with pytest.raises(ValueError, match=r"config\.run\.best='test/accuracies' is not one of"):
        save(tmp_path, [0.1], best="test/accuracies")


def test_subtree_is_loaded_by_its_path(workdir):
    part = checkpoint.load(workdir, subtree="net/stage_1/")  # a final slash is ignored
    np.testing.assert_array_equal(part["bias"], np.ones(3))
    assert checkpoint.load_config(workdir) == {"a": {"b": 5}}
    older = checkpoint.load(workdir / "checkpoints" / "2", subtree="net/stage_0/kernel")
    np.testing.assert_array_equal(older, np.full((4, 2), 0.9, np.float32))


def test_running_average_is_loaded_if_present(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1, best=None)
    average = {"net": {"stage_0": {"kernel": jnp.full((4, 2), 7.0)}}}
    with_average = state(1, 0.5).replace(ema=average)
    checkpoints.save(with_average, step=1, config={}, metrics=None)
    checkpoints.close()
    np.testing.assert_array_equal(
        checkpoint.load(tmp_path, average=True)["net"]["stage_0"]["kernel"], np.full((4, 2), 7.0)
    )
    np.testing.assert_array_equal(
        checkpoint.load(tmp_path, average=True, subtree="net/stage_1")["bias"], np.ones(3)
    )
    np.testing.assert_array_equal(
        checkpoint.load(tmp_path)["net"]["stage_0"]["kernel"], np.full((4, 2), 0.5, np.float32)
    )
    read, asked = reading.read, {}

    def record(step, abstract, *, item="params"):
        asked[item] = sorted(traverse_util.flatten_dict(abstract, sep="/"))
        return read(step, abstract, item=item)

    monkeypatch.setattr(reading, "read", record)
    checkpoint.load(tmp_path, average=True)
    assert asked == {"average": ["net/stage_0/kernel"], "params": ["net/stage_1/bias"]}
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SHARDING), with_average
    )
    restored = Checkpoints(tmp_path, keep=1, best=None).restore_latest(wanted)
    jax.tree.map(np.testing.assert_array_equal, restored, with_average)


def test_relative_paths_are_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("runs/a", [0.5])
    assert checkpoint.load("runs/a", subtree="net/stage_1/bias").shape == (3,)
    assert str(checkpoint.absolute("gs://bucket/run")) == "gs://bucket/run"


def test_missing_subtree_or_checkpoint_is_reported(workdir, tmp_path):
    with pytest.raises(
        KeyError, match=r"holds no 'net/stage_2'; it holds .*net/stage_0.*net/stage_1"
    ):
        checkpoint.load(workdir, subtree="net/stage_2")
    with pytest.raises(FileNotFoundError, match="gone does not exist; give a run's workdir"):
        checkpoint.load(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty has no finished checkpoint"):
        checkpoint.load(tmp_path / "empty")


def test_workdir_may_be_named_like_a_step(tmp_path):
    save(tmp_path / "7", [0.5, 0.6])
    folder = tmp_path / "7" / "checkpoints" / "2"
    for source in (tmp_path / "7", folder.parent, folder):
        assert checkpoint.find_step(source) == folder
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match=r"file is a file; give a run's workdir"):
        checkpoint.find_step(tmp_path / "file")


def test_score_added_after_saving_counts_for_best(tmp_path):
    """As if a run was stopped between saving and evaluating."""
    checkpoints = Checkpoints(tmp_path, keep=1, best="test/w")
    for step, value in ((1, 0.2), (2, 0.9), (3, None)):
        checkpoints.save(state(step, 0.0), step=step, config={}, metrics=None)
        checkpoints.score(step, {"test/w": value} if value else {"test/loss": 99.0})
        checkpoints.wait()
    checkpoints.save(state(4, 0.0), step=4, config={}, metrics={"test/w": 0.5, "test/loss": 9.0})
    checkpoints.close()
    assert checkpoint.finished_steps(tmp_path / "checkpoints") == [2, 4]


def test_best_checkpoint_survives_a_later_failed_save(tmp_path, monkeypatch):
    """A failed save replaces orbax's manager, which held the scores."""
    checkpoints = Checkpoints(tmp_path, keep=1, best="test/w", on_failed="go_on")
    check = writing.check_written

    def fail(folder, *others):
        if folder.name.startswith("2"):
            raise OSError("it is not there")
        check(folder, *others)

    monkeypatch.setattr(writing, "check_written", fail)
    for step, value in enumerate((0.9, 0.3, 0.1, 0.2), 1):
        checkpoints.save(state(step, 0.0), step=step, config={}, metrics={"test/w": value})
    checkpoints.close()
    assert checkpoint.finished_steps(tmp_path / "checkpoints") == [1, 4]


@pytest.mark.parametrize(("large", "waits"), [(1, True), (1 << 30, False)])
def test_next_step_waits_for_the_checkpoint_of_a_large_state(tmp_path, monkeypatch, large, waits):
    monkeypatch.setattr(writing, "LARGE", large)
    checkpoints, finished = Checkpoints(tmp_path, keep=1, best=None), []
    checkpoints.save(state(1, 0.0), step=1, config={}, metrics=None)
    monkeypatch.setattr(checkpoints, "_finish", lambda: finished.append(1))
    # The second step has nothing to wait for.
    assert [checkpoints.release(), checkpoints.release()] == [waits, False]
    assert finished == [1] * waits
    monkeypatch.undo()
    checkpoints.close()


@pytest.mark.parametrize(("at_once", "limit"), [(8, 1), (10**9 + 1, 2)])
def test_at_once_limits_concurrent_writes(tmp_path, monkeypatch, at_once, limit):
    used = []

    class Handler(ocp.PyTreeCheckpointHandler):
        def __init__(self, *, save_concurrent_gb=None):
            super().__init__(save_concurrent_gb=save_concurrent_gb)
            self.limit = save_concurrent_gb

        async def async_save(self, directory, *others, **more):
            used.append((directory.name.partition(".")[0], self.limit))
            return await super().async_save(directory, *others, **more)

    monkeypatch.setattr(ocp, "PyTreeCheckpointHandler", Handler)
    checkpoints = Checkpoints(tmp_path, keep=1, best=None, at_once=at_once)
    checkpoints.save(state(1, 0.5), step=1, config={}, metrics=None)
    checkpoints.wait()
    assert sorted(used) == [("params", limit), ("trainer", limit)]
    jax.tree.map(
        np.testing.assert_array_equal, checkpoints.restore_latest(abstract()), state(1, 0.5)
    )
    checkpoints.close()


@pytest.mark.parametrize("largest", [1, 1.5])
def test_files_stay_small_unless_an_array_is_larger(tmp_path, monkeypatch, largest):
    monkeypatch.setattr(writing, "FILE", 1 << 16)
    rng = np.random.default_rng(0)
    params = {f"{i}": rng.random(int(largest * (1 << 14)), np.float32) for i in range(8)}
    checkpoint.write_params(tmp_path, params, config={})
    assert {isinstance(leaf, jax.Array) for leaf in params.values()} == {True}
    files = [path.stat().st_size for path in (tmp_path / "checkpoints/0/params").rglob("d/*")]
    assert (max(files) <= 1 << 17) == (largest == 1), files
    stored = ocp.PyTreeCheckpointHandler().metadata(tmp_path / "checkpoints/0/params").tree
    for name, array in params.items():
        assert stored[name].storage.chunk_shape == array.shape  # not split


@pytest.mark.parametrize(("scheme", "driver"), [("gs", "gcs"), ("s3", "s3")])
def test_arrays_in_a_bucket_are_looked_up_in_the_bucket(scheme, driver):
    found = contents._kvstore(epath.Path(f"{scheme}://bucket/run/checkpoints/4/params"))
    base = {"driver": driver, "bucket": "bucket", "path": "run/checkpoints/4/params/"}
    assert found == {"driver": "ocdbt", "base": base}


def test_every_chunk_of_a_sharded_array_is_counted(tmp_path):
    spec = jax.sharding.PartitionSpec("fsdp", ("data", "expert"))
    table = np.arange(32.0, dtype=np.float32).reshape(4, 8)
    params = {"a": jax.device_put(table, jax.sharding.NamedSharding(split_mesh(), spec))}
    checkpoint.write_params(tmp_path, params, config={})
    folder = checkpoint.find_step(tmp_path)
    np.testing.assert_array_equal(checkpoint.load(tmp_path)["a"], table)
    outline = {"params": contents.outline(params)}
    contents.check_written(folder, outline, {"config": {}})
    store = contents.ts.KvStore.open(contents._kvstore(folder / "params")).result()
    store.delete_range(contents.ts.KvStore.KeyRange("a/1.0", "a/1.1")).result()
    with pytest.raises(OSError, match="a has 7 of its 8 chunks"):
        contents.check_written(folder, outline, {"config": {}})


def test_sources_of_a_moved_pipeline_are_found_in_its_new_folder(tmp_path):
    pipe = tmp_path / "pipe"
    for name in ("meta", "modules/module_0", "students/module_0", "meta/meta"):
        checkpoint.write_params(pipe / name, {"w": np.ones(1)}, {})
    checkpoint.write_params(tmp_path / "meta", {"w": np.ones(1)}, {})
    student = pipe / "students" / "module_0"

    def found(source, workdir=student):
        return checkpoint.find_moved("config.sources.x", source, workdir)

    assert found("/old/meta") == "/old/meta"  # in no pipeline
    (pipe / "config.json").write_text("{}")
    for name in ("meta", "modules/module_0", "modules/module_0/checkpoints/0"):
        assert found(f"/old/{name}") == found(f"old/{name}") == str(pipe / name)
    assert found("/old/meta", pipe / "network") == str(pipe / "meta")
    for same in ("", "/old/none", str(tmp_path / "meta")):
        assert found(same) == same


def test_unfinished_folders_are_ignored_and_moved_aside(workdir):
    folder = workdir / "checkpoints"
    (folder / "7" / "params").mkdir(parents=True)
    (folder / "3" / "params").mkdir(parents=True)  # the rest of a deletion, since 5 is complete
    (folder / "8.orbax-checkpoint-tmp").mkdir()
    shutil.copytree(folder / "5", folder / "007")  # no name of a step, so not the run's to delete
    assert checkpoint.finished_steps(folder) == [2, 4, 5]
    Checkpoints(workdir, keep=2, best=None).close()
    assert {path.name for path in folder.iterdir()} == {"2", "4", "5", "007", "unfinished_7"}


def test_partial_checkpoints_prevent_a_restart_from_scratch(workdir):
    for marker in (workdir / "checkpoints").rglob("commit_success.txt"):
        marker.unlink()
    with pytest.raises(ValueError, match=r"none of the checkpoints \[2, 4, 5\] in .* is complete"):
        checkpoint.take_stock(workdir, config={}, total=5)


def test_step_is_finished_only_with_all_commit_markers(workdir):
    folder = workdir / "checkpoints"
    for item in (".", "params", "trainer", "config"):
        marker = folder / "5" / item / "commit_success.txt"
        marker.rename(marker.with_suffix(".away"))
        assert checkpoint.finished_steps(folder) == [2, 4]
        marker.with_suffix(".away").rename(marker)
    assert checkpoint.finished_steps(folder) == [2, 4, 5]


def test_run_with_only_damaged_checkpoints_does_not_restart_silently(workdir):
    for path in (workdir / "checkpoints").rglob("*"):
        if path.is_file() and "trainer" in path.parts and path.name != "commit_success.txt":
            path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the checkpoints \[2, 4, 5\]"):
        Checkpoints(workdir, keep=2, best=None).restore_latest(abstract())


def wanted(**shapes):
    return {
        "student": {
            name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=SHARDING)
            for name, shape in shapes.items()
        }
    }


def test_account_lists_taken_left_and_fresh_parameters(workdir):
    warm = take(
        wanted(kernel=(4, 2), extra=(5,)),
        [Origin(workdir, "net/stage_0", "student"), Origin(workdir, "net/stage_1", "student")],
        leave=(Allowance(r"student/bias", "not in this network"),),
        fresh=(Allowance(r"student/extra", "new"),),
    )
    assert list(warm.params["student"]) == ["kernel"]
    assert [entry["arrays"] for entry in warm.account["taken"]] == [1, 0]
    assert warm.account["left"] == [{"name": "student/bias", "reason": "not in this network"}]
    assert warm.account["fresh"] == [{"name": "student/extra", "reason": "new"}]


def test_all_mismatches_are_reported_at_once(workdir):
    origins = [Origin(workdir, "net/stage_0", "student"), Origin(workdir, "net/stage_1", "student")]
    with pytest.raises(ValueError, match="the weights do not fit") as error:
        take(wanted(kernel=(4, 3), extra=(5,)), origins)
    message = str(error.value)
    assert "student/kernel should be (4, 3) and is (4, 2)" in message
    assert "student/bias of shape (3,) has no place" in message
    assert "student/extra of shape (5,) is in none of the sources" in message
    assert "config.sources.fresh" in message


def test_parameter_can_be_adapted_to_another_shape(workdir):
    warm = take(
        wanted(kernel=(2, 2)),
        [Origin(workdir, "net/stage_0", "student")],
        adapt={r".*/kernel": lambda array, shape: array[: shape[0]]},
    )
    np.testing.assert_array_equal(
        warm.params["student"]["kernel"], np.full((2, 2), 0.4, np.float32)
    )
    assert warm.account["adapted"] == [{"name": "student/kernel", "from": [4, 2], "to": [2, 2]}]
