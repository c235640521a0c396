"""Text files that only look like lines of sentences: pointers, gzip files, classic Mac files."""

import gzip

import pytest

from common_jax.inputs.tables import read_table
from common_jax.inputs.texts import find_text, read_lines
from common_jax.workdir import read_json

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("a.en", read_lines),
        ("a.en.gz", read_lines),
        ("a.tsv", read_table),
        ("a.jsonl", read_table),
        ("a.json", read_json),
    ],
)
def test_git_lfs_pointer_is_not_read_as_the_file(tmp_path, name, read):
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{name} is a git-lfs pointer .*; run `git lfs pull`"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"one\ntwo\n", mtime=13), r"a\.en is a gzip file; rename it to a\.en\.gz"),
        (b"one\rtwo\rthree\r", r"a\.en ends its lines with carriage returns alone"),
        (b"one\rtwo\rthree\r\n", r"a\.en ends its lines with carriage returns alone.* perl -pi"),
    ],
)
def test_file_without_lines_is_refused(tmp_path, content, message):
    (tmp_path / "a.en").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_lines(tmp_path / "a.en")


def test_few_lone_carriage_returns_are_part_of_their_lines(tmp_path):
    (tmp_path / "a.en").write_bytes(b"one\rmore\r\ntwo\r\nthree\n")
    assert read_lines(tmp_path / "a.en") == ("one\rmore", "two", "three")


def test_plain_file_is_read_rather_than_its_packed_copy(tmp_path, caplog):
    for name in ("a.en", "a.en.gz", "b.en.gz"):
        (tmp_path / name).touch()
    assert find_text(tmp_path / "a.en") == tmp_path / "a.en"
    assert "a.en is read, and a.en.gz beside it is not" in caplog.text
    caplog.clear()
    assert find_text(tmp_path / "b.en") == tmp_path / "b.en.gz" and not caplog.text
