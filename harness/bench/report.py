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

from harness.core.tables import Scalar, format_table, format_value
from harness.core.versions import commit, hardware


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
    """Prints a report's table and headline."""
    print(f"{report['name']}: {report['hardware']}, commit {report['commit']}, {report['date']}\n{report['command']}")
    print(format_table(report["rows"]))
    width = max(map(len, report["headline"]), default=0)
    for key, value in report["headline"].items():
        print(f"{key:<{width}}  {format_value(value)}")


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
