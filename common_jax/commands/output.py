"""Output of commands: tables for people, and npz files."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def format_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Formats rows in columns, each as wide as its longest cell, with numbers right-aligned."""
    rows = [[str(cell) for cell in row] for row in rows]
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    # A column of numbers, with or without a unit.
    right = [bool(rows) and all(cell[:1].isdigit() for cell in column[1:]) for column in columns]
    lines = []
    for row in (header, *rows):
        cells = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def writable(text: str) -> str:
    r"""Escapes bytes of a file name that are not UTF-8, as \udcff: `print` cannot write them."""
    return text.encode("utf-8", "backslashreplace").decode()


def json_line(value: Any) -> str:
    """A value as one line of JSON, whose own escapes are those of `writable`."""
    return writable(json.dumps(value, ensure_ascii=False))


def check_npz(name: str) -> Path:
    """The path of --out.

    Raises:
      ValueError: if it is not the name of an npz file.
      OSError: if no file can be written there.
    """
    from common_jax.workdir import check_output_file

    if Path(name).suffix != ".npz":
        raise ValueError(f"--out={name} must be a name that ends in .npz")
    return check_output_file("--out", name)


def write_npz(path: Path, arrays: "Mapping[str, np.ndarray]") -> None:
    """Writes an npz file, atomically."""
    import numpy as np

    from common_jax.workdir import replacing

    with replacing(path) as part, part.open("wb") as file:
        np.savez(file, **arrays)
