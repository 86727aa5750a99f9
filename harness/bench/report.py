"""The one form of every benchmark's figures, and the command line that all benchmarks share.

A report is a JSON object:

    name      the benchmark
    command   the command line that repeats it
    commit    of the code, with '-dirty' where the working tree differed
    date      ISO 8601, UTC
    hardware  the machine in words
    headline  name -> number: what a reader cites
    rows      flat objects: what the headline was computed from
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.core.versions import commit, hardware

Scalar = str | int | float | bool | None


def make_report(
    name: str, command: str, headline: Mapping[str, float], rows: Sequence[Mapping[str, Scalar]]
) -> dict[str, Any]:
    """The report of one benchmark run, with the commit, the time and the machine filled in.

    Args:
        name: the benchmark.
        command: the command line that repeats it (see `command_line`).
        headline: what a reader cites; the names carry the unit.
        rows: what the headline was computed from.
    """
    return {
        "name": name,
        "command": command,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "headline": {key: float(value) for key, value in headline.items()},
        "rows": [dict(row) for row in rows],
    }


def command_line(module: str, config: Any) -> str:
    """`python -m module` with every field of the dataclass `config` spelt out, for defaults may change."""
    flags = [
        word
        for field in dataclasses.fields(config)
        for word in (f"--{field.name.replace('_', '-')}", _spelt(getattr(config, field.name)))
    ]
    return shlex.join(["python", "-m", module, *flags])


def _spelt(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def print_report(report: Mapping[str, Any]) -> None:
    """What a reader wants of a report, on standard output."""
    print(f"{report['name']}: {report['hardware']}, commit {report['commit']}, {report['date']}\n{report['command']}")
    print(format_table(report["rows"]))
    width = max(map(len, report["headline"]), default=0)
    for key, value in report["headline"].items():
        print(f"{key:<{width}}  {_format(value)}")


def format_table(rows: Sequence[Mapping[str, Scalar]]) -> str:
    """Rows under their column names, aligned: numbers to the right, all else to the left; absent cells are '-'."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    aligned = []
    for column in columns:
        values = [row.get(column) for row in rows]
        cells = [column, *map(_format, values)]
        width = max(map(len, cells))
        numeric = all(value is None or isinstance(value, int | float) for value in values)
        aligned.append([cell.rjust(width) if numeric else cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*aligned, strict=True))


def _format(value: Scalar) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def bench_main(
    module: str, config_class: Callable[..., Any], run: Callable[[Any], dict[str, Any]], sentence: str, example: str
) -> int:
    """Entry point of a benchmark's module: flags from its configuration class, and --json FILE for the report.

    Args:
        module: its dotted name.
        config_class: frozen dataclass whose docstring describes every field.
        run: takes the configuration, prints, returns the report.
        sentence: what it measures.
        example: a command line that works.

    Returns:
        The exit code.
    """
    from harness.core.cli import Parser, run_command, write_figures  # here: to write a report needs no jsonargparse

    def body() -> None:
        parser = Parser(f"python -m {module}", sentence, example)
        parser.add_class_arguments(config_class)
        parser.add_argument("--json", type=Path | None, default=None, help="file for the report")
        values = parser.parse(sys.argv[1:]).as_dict()
        json_file = values.pop("json")
        report = run(config_class(**values))
        if os.environ.get("RANK", "0") == "0":
            write_figures(json_file, report)

    return run_command(body)
