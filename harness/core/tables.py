"""Plain tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Scalar = str | int | float | bool | None


def format_table(rows: Sequence[Mapping[str, Scalar]]) -> str:
    """Rows under their column names, aligned: numbers to the right, all else to the left; absent cells are '-'."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    aligned = []
    for column in columns:
        values = [row.get(column) for row in rows]
        cells = [column, *map(format_value, values)]
        width = max(map(len, cells))
        numeric = all(value is None or isinstance(value, int | float) for value in values)
        aligned.append([cell.rjust(width) if numeric else cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*aligned, strict=True))


def format_value(value: Scalar) -> str:
    """A cell: numbers at three digits, or in thousands; '-' for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)
