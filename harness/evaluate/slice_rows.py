"""Slices of an evaluation as they are shown: the largest first, not too many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MOST = 12  # values of a slice that are shown


def largest(rows: Sequence[dict[str, Any]], most: int = MOST) -> list[tuple[str, list[dict[str, Any]], int]]:
    """Name, largest rows and number of rows left out of each slice, by queries, or by documents (mean weights)."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["slice"], []).append(row)
    shown = []
    for name, group in by_name.items():
        ordered = sorted(group, key=lambda row: -row.get("queries", row.get("documents", 0)))
        shown.append((name, ordered[:most], max(0, len(group) - most)))
    return shown
