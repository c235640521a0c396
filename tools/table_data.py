"""Stores the numbers of a table in docs/ as data, read from the runs that the table reports.

    python tools/table_data.py docs/data/emoji.json runs/demo/cliptrans

The file says where to find the numbers, and this tool adds them as `values`, in full precision:

    {"command": "python tools/demo_cliptrans.py --workdir runs/demo/cliptrans",
     "rows": {"text only": ["text_only_0/translate"]},
     "columns": [{"title": "BLEU", "file": "scores.json", "key": "bleu"}, {"title": "hours"}],
     "values": {"text only": [[17.21], []]}}

Rows and columns have the titles they have in the table. `rows` lists the folders of each row's
runs, below the second argument. `key` names a value in `file`; in a metrics.jsonl, it is taken from
the line with `epoch`. `times` is a factor, such as 100 for fractions shown in percent. A column
without `file` is not checked. If no run of a row has a value, its cell stays empty.
tests/test_results.py compares the tables in README.md and docs/results.md with these files.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from common_jax.app import USER_ERRORS
from common_jax.metrics import read_metrics
from common_jax.workdir import describe_error, read_json, write_bytes


def main(arguments: Sequence[str] | None = None) -> None:
    """Adds the values to a file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=pathlib.Path, help="docs/data/NAME.json")
    parser.add_argument("runs", type=pathlib.Path, help="folder with the runs of its rows")
    flags = parser.parse_args(arguments)
    try:
        data = read_json(flags.file, {"rows": dict, "columns": list})
        data["values"] = collect(data, flags.runs)
        write_bytes(flags.file, dump(data).encode())
    except USER_ERRORS as error:
        print(f"error: {describe_error(error)}", file=sys.stderr)
        sys.exit(2)


def collect(data: Mapping[str, Any], runs: pathlib.Path) -> dict[str, list[list[float]]]:
    """The values of every row: for each column, a list with one value per run.

    Raises:
      FileNotFoundError: a run does not exist.
      ValueError: some runs of a row have a value that others lack, or a file is damaged.
    """
    values = {}
    for row, names in data["rows"].items():
        folders = [runs / name for name in names]
        if missing := [str(folder) for folder in folders if not folder.is_dir()]:
            raise FileNotFoundError(f"row {row!r} needs {missing}, which do not exist")
        values[row] = []
        for column in data["columns"]:
            found = [_read(folder, column) for folder in folders]
            lacking = [str(folder) for folder, one in zip(folders, found, strict=True) if not one]
            if 0 < len(lacking) < len(folders):
                raise ValueError(
                    f"row {row!r}: other runs have {column['key']!r} in {column['file']}, but not "
                    f"{lacking}; finish them, or take them out of the row"
                )
            values[row].append([value for one in found for value in one])
    return values


def dump(data: Mapping[str, Any]) -> str:
    """The content of a file: JSON with one line per row and column."""
    parts = []
    for name, content in data.items():
        if isinstance(content, dict):
            lines = [f"    {_json(key)}: {_json(value)}" for key, value in content.items()]
            text = "{\n" + ",\n".join(lines) + "\n  }"
        elif name == "columns":
            text = "[\n" + ",\n".join(f"    {_json(one)}" for one in content) + "\n  ]"
        else:
            text = _json(content)
        parts.append(f"  {_json(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _read(folder: pathlib.Path, column: Mapping[str, Any]) -> list[float]:
    """The value of a run in a column, in a list; empty if it has no such file or metric."""
    path = folder / column.get("file", "")
    if not path.is_file():
        return []
    if path.suffix == ".jsonl":
        content = {}
        for line in read_metrics(path):
            content |= line if line.get("epoch") == column["epoch"] else {}
    else:
        content = read_json(path)
    if column["key"] not in content:
        return []
    value = content[column["key"]]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{path} has {column['key']!r}: {value!r}, which is not a number")
    return [value * column.get("times", 1)]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    main()
