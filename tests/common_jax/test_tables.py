"""A user's tables: three formats, plain and compressed, and errors that name file, line and
column."""

import gzip
import json
import logging
import re

import pytest

from common_jax.inputs.tables import find_table, read_table, table_names

TSV = 'a\tb\n"one" two\tx, y\n\n three \t\n'
CSV = 'a,b\n"""one"" two","x, y"\n\n three ,\n'
JSONL = '{"a": "\\"one\\" two", "b": "x, y"}\n\n{"a": " three ", "b": null}\n'


def write(path, text, *, packed=False):
    content = text.encode()
    if packed:
        path = path.with_name(f"{path.name}.gz")
        content = gzip.compress(content)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("suffix", "text"), [(".tsv", TSV), (".csv", CSV), (".jsonl", JSONL)])
def test_all_table_formats_read_the_same(tmp_path, suffix, text, packed):
    table = read_table(write(tmp_path / f"t{suffix}", text, packed=packed))
    assert table.columns == ("a", "b")
    first = 1 if suffix == ".jsonl" else 2
    assert table.rows == (
        (first, {"a": '"one" two', "b": "x, y"}),
        (first + 2, {"a": "three", "b": ""}),
    )
    assert table_names(tmp_path) == ["t"]
    assert find_table(tmp_path, "t") == table.path and find_table(tmp_path, "u") is None


def test_cells_are_reduced_to_one_line(tmp_path):
    csv = read_table(write(tmp_path / "t.csv", 'a,b\r\n"one\r\n two",x\r\nthree,y\r\n'))
    assert csv.rows == ((2, {"a": "one two", "b": "x"}), (4, {"a": "three", "b": "y"}))
    jsonl = read_table(write(tmp_path / "t.jsonl", '{"a": "one\\n two", "b": 7}\n{"c": "x"}\n'))
    assert jsonl.columns == ("a", "b", "c")
    assert [[row[name] for name in "abc"] for _, row in jsonl.rows] == [
        ["one two", "7", ""],
        ["", "", "x"],
    ]


def test_rows_of_a_jsonl_hold_only_their_own_keys(tmp_path):
    lines = "".join(f'{{"en": "x", "id{number}": 1}}\n' for number in range(99))
    table = read_table(write(tmp_path / "t.jsonl", lines))
    assert len(table.columns) == 100 and {len(row) for _, row in table.rows} == {2}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.tsv", "a\tb\nx\ty\nx\n", r"t\.tsv, line 3 has 1 cells .* 2 columns: nothing for b;"),
        ("t.csv", "a,b\nx,y,z\n", r"t\.csv, line 2 has 3 cells .* columns: no name for 'z';"),
        ("t.csv", 'a,b\nx,y\n"x"z,y\n', r"t\.csv, line 3 is not CSV .*double the quotes"),
        ("t.csv", 'a,b\n"x,y\n', r"t\.csv, line 2 is not CSV"),
        (
            "t.csv",
            f'a,b\n"{"x" * 200_000}',
            r"field limit .*close a quote left open, or save it as",
        ),
        ("t.csv", "a,a\nx,y\n", r"t\.csv, line 1 has the column 'a' twice"),
        ("t.tsv", "", r"t\.tsv, line 1 is empty; it must name the columns"),
        ("t.jsonl", '{"a": "x"}\n{"a": \n', r"t\.jsonl, line 2 is not JSON .*; correct the line"),
        ("t.jsonl", '["x"]\n', r"t\.jsonl, line 1 is \['x'\] and not an object"),
        ("t.jsonl", '{"a": ["x"]}\n', r"t\.jsonl, line 1, column 'a' must be text: \['x'\]"),
        ("t.jsonl", '{"a": "\\ud83d"}\n', r"line 1, column 'a' must be text: 'half of a surr"),
        ("t.tsv", "a\tb\nx\t\0\n", r"t\.tsv, line 2 has a zero byte"),
    ],
)
def test_malformed_tables_are_reported(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_table(write(tmp_path / name, text))


def test_missing_column_error_suggests_an_existing_one(tmp_path):
    table = read_table(write(tmp_path / "t.csv", "path,lable\nx,y\n"))
    with pytest.raises(
        ValueError, match=r"t\.csv has no column 'label' \(did you mean 'lable'\?\), which should "
    ):
        table.require("label", "the classes")


@pytest.mark.parametrize(
    ("name", "mark", "way_out"),
    [
        ("t.csv", ";", "save it with commas or as TSV"),
        ("t.csv", "\t", r"rename it to \.tsv"),
        ("t.tsv", ",", r"rename it to \.csv"),
    ],
)
def test_other_separator_is_named(tmp_path, name, mark, way_out):
    table = read_table(write(tmp_path / name, f"path{mark}label\nx{mark}y\n"))
    hint = re.escape(f"it seems to be separated by {mark!r}; ") + f"{way_out}$"
    with pytest.raises(ValueError, match=rf"has no column 'path': {hint}"):
        table.require("path", "the paths")
    odd = {".csv": "x,y", ".tsv": "x\ty"}[table.path.suffix]
    write(tmp_path / name, f"path{mark}label\n{odd}\n")
    with pytest.raises(ValueError, match=rf"line 2 has 2 cells .*: no name for 'y'; {hint}"):
        read_table(tmp_path / name)
    table = read_table(write(tmp_path / "t.jsonl", f'{{"a{json.dumps(mark)[1:-1]}b": "x"}}\n'))
    with pytest.raises(ValueError, match="its columns are"):
        table.require("path", "the paths")


def test_rows_of_every_split_are_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    table = read_table(write(tmp_path / "t.csv", "a,split\nx,train\ny,trian\nz,train\n"))
    assert [row["a"] for _, row in table.rows_of("train")] == ["x", "z"]
    assert "t.csv has rows of the splits train (2), trian (1)" in caplog.text
    assert table.split_sizes(without=("train", "test")) == ["trian (1)"]
    table = read_table(write(tmp_path / "t.jsonl", '{"a": "x", "split": "train"}\n{"a": "y"}\n'))
    with pytest.raises(
        ValueError, match=r"t\.jsonl, line 2, column 'split' is empty, one of 1 such"
    ):
        table.rows_of("train")


def test_uppercase_suffix_is_accepted(tmp_path):
    (tmp_path / "t.TSV").write_text("en\tde\na\tb\n")
    assert table_names(tmp_path) == ["t"]
    assert find_table(tmp_path, "t") == tmp_path / "t.TSV"
    assert [row for _, row in read_table(tmp_path / "t.TSV").rows] == [{"en": "a", "de": "b"}]
    (tmp_path / "u.tsv.GZ").touch()  # which is not unpacked
    assert table_names(tmp_path) == ["t"]


def test_tables_with_the_same_name_are_refused(tmp_path):
    write(tmp_path / "t.csv", CSV)
    write(tmp_path / "t.tsv", TSV)
    with pytest.raises(ValueError, match=r"has both t\.tsv and t\.csv; remove or rename"):
        find_table(tmp_path, "t")
