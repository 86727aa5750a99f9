"""tests/house.py on a tree of three files whose counts are known."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import house

LOW = '''"""Which sums there are."""


def sums(rows):
    """Sums of rows.

    By row.
    """

    # alone
    return [sum(x for x in row) for row in rows]  # a comment behind code
'''
HIGH = '''from harness.low.sums import sums

TEXT = """two
lines, anew"""


def total(rows):
    for row in [row for row in rows]:
        print([x for x in row])
    if not rows:
        raise ValueError("is no table; there is no row")
    return sums(rows)
'''


def test_known_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in {"low/sums.py": LOW, "high/total.py": HIGH, "high/__init__.py": "", "top.py": HIGH}.items():
        file = tmp_path / "harness" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + ("import harness.high\n" if name == "top.py" else ""))
    house.main(tmp_path)
    lines = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    found = {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}
    wanted = {
        "entries": 3, "import arrows between them": 3, "floors: entries on the longest import path": 3,
        "harness/low": 2, "harness/high": 9, "harness": 10, "harness, all": 21,
        "docstrings": 2, "docstrings that begin with What, How, Where, Whether, Which": 1,
        "statements with two or more comprehensions": 1, "lines over 120 columns": 0,
        "'is no', 'are no'": 2, "'alone'": 1, "'anew'": 2, "'of before'": 0,
    }  # fmt: skip
    assert found == wanted
