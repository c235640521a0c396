"""Output of commands for people."""

from collections.abc import Iterable, Sequence


def format_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lines of columns, each as wide as its longest cell; numbers are aligned to the right."""
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
