"""Paths on a command line: inputs exist, and outputs can be created."""

import pytest

from common_jax import app
from common_jax.checkpoint import check_source
from common_jax.workdir import check_input, check_output, check_output_file
from m2mkd_jax.data.files.folders import require_path


def test_missing_input_error_names_the_last_existing_part(tmp_path):
    (tmp_path / "file").touch()
    check_input("config.data.path", "", "images")
    check_input("config.data.path", "gs://bucket/images", "images")
    check_input("config.data.path", str(tmp_path / "file"), "images")
    missing = rf"config\.data\.path='{tmp_path}/a/b' cannot be found \(No such file or directory; "
    with pytest.raises(FileNotFoundError, match=rf"^{missing}{tmp_path} is the last part.*images$"):
        check_input("config.data.path", f"{tmp_path}/a/b", "images")
    with pytest.raises(FileNotFoundError, match=rf"Not a directory; {tmp_path}/file, a file, is"):
        check_input("config.data.path", f"{tmp_path}/file/b", "images")
    with pytest.raises(FileNotFoundError) as caught:
        check_input("config.data.path", "x" * 5000, "images")
    assert len(str(caught.value)) < 1000


def test_missing_images_are_reported(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.data\.path='/nfs/images' "):
        require_path("/nfs/images", "a folder")
    with pytest.raises(FileNotFoundError, match=r"give a folder; .*: images"):
        require_path(f"{tmp_path}/imags", "a folder")
    with pytest.raises(FileNotFoundError, match=r"config\.data\.path='' "):
        require_path("", "a folder")


def test_impossible_output_folder_is_refused_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "file").touch()
    check_output("--workdir", tmp_path)
    check_output("--workdir", tmp_path / "a" / "b")
    check_output("--workdir", "gs://bucket/run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(NotADirectoryError, match=rf"--workdir='{tmp_path}/file' .*it is a file"):
        check_output("--workdir", tmp_path / "file")
    with pytest.raises(NotADirectoryError, match=rf"{tmp_path}/file, a file, is the last part"):
        check_output("--workdir", tmp_path / "file" / "run")
    with pytest.raises(OSError, match=r"--workdir='/proc/run/1' cannot be made a folder"):
        check_output("--workdir", "/proc/run/1")


def test_file_that_cannot_be_written_is_refused_and_nothing_is_left_behind(tmp_path):
    (tmp_path / "file").write_text("old")
    for name in ("file", "new"):
        assert check_output_file("--json", str(tmp_path / name)) == tmp_path / name
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"
    with pytest.raises(IsADirectoryError, match=rf"^--json='{tmp_path}' cannot be written \(it is"):
        check_output_file("--json", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} is the last part of it that exists"):
        check_output_file("--json", f"{tmp_path}/missing/new")
    with pytest.raises(NotADirectoryError, match=rf"{tmp_path}/file, a file, is the last part"):
        check_output_file("--json", f"{tmp_path}/file/new")
    with pytest.raises(IsADirectoryError, match=r"^--json='' cannot be written"):
        check_output_file("--json", "")


def test_impossible_compilation_cache_causes_a_warning(tmp_path, caplog):
    (tmp_path / "file").touch()
    app.use_compilation_cache(str(tmp_path / "file"))
    assert "config.run.compilation_cache=" in caplog.text
    assert "every start will recompile" in caplog.text


def test_source_without_a_checkpoint_is_reported(tmp_path):
    (tmp_path / "file").touch()
    check_source("config.sources.meta", "")
    with pytest.raises(
        FileNotFoundError,
        match=r"^config\.sources\.meta='/nfs/x': /nfs/x does not exist; give a run's workdir",
    ):
        check_source("config.sources.meta", "/nfs/x")
    with pytest.raises(FileNotFoundError, match=r"/file is a file; give a run's workdir"):
        check_source("config.sources.meta", f"{tmp_path}/file")
