"""Report of a benchmark, and the command line that all benchmarks share.

A report is a JSON object:

    name      the benchmark
    command   command line that repeats it
    commit    commit of the code, with '-dirty' if the working tree differed
    date      ISO 8601, UTC
    hardware  the machine in words
    headline  name -> number: figures to cite
    rows      flat objects: measurements behind the headline
"""

from __future__ import annotations

import dataclasses
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.bench.ranks import is_first
from harness.core.tables import Scalar, format_table, format_value
from harness.core.versions import commit, hardware


def make_report(
    name: str, command: str, headline: Mapping[str, float], rows: Sequence[Mapping[str, Scalar]]
) -> dict[str, Any]:
    """Makes the report of one run; fills in the commit, the time and the machine.

    Args:
        name: the benchmark.
        command: command line that repeats it (see `command_line`).
        headline: figures to cite; their names contain the unit.
        rows: measurements behind the headline.
    """
    return {
        "name": name,
        "command": command,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "headline": {key: float(value) for key, value in headline.items()},
        "rows": list(map(dict, rows)),
    }


def command_line(module: str, config: Any) -> str:
    """Returns `python -m module` with every field of the dataclass `config`, because defaults may change."""
    flags = [
        word
        for field in dataclasses.fields(config)
        for word in (f"--{field.name.replace('_', '-')}", _spelt(getattr(config, field.name)))
    ]
    return shlex.join(["python", "-m", module, *flags])


def _spelt(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Figures for a headline: the median of `values`, the least and the largest."""
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def finish(
    module: str, config: Any, headline: Mapping[str, float], rows: Sequence[Mapping[str, Scalar]]
) -> dict[str, Any]:
    """Makes the report of the benchmark in `module`, prints it on the first rank and returns it."""
    report = make_report(module.rsplit(".", 1)[-1], command_line(module, config), headline, rows)
    if is_first():
        print_report(report)
    return report


def print_report(report: Mapping[str, Any]) -> None:
    """Prints a report's table and headline."""
    print(f"{report['name']}: {report['hardware']}, commit {report['commit']}, {report['date']}\n{report['command']}")
    print(format_table(report["rows"]))
    width = max(map(len, report["headline"]), default=0)
    for key, value in report["headline"].items():
        print(f"{key:<{width}}  {format_value(value)}")


def bench_main(
    module: str,
    config_class: Callable[..., Any],
    run: Callable[[Any], dict[str, Any] | Iterator[dict[str, Any]]],
    sentence: str,
    example: str,
) -> int:
    """Entry point of a benchmark's module: flags from its configuration class, and --json FILE for the report.

    Args:
        module: dotted name of the module.
        config_class: frozen dataclass whose docstring describes every field.
        run: takes the configuration, prints and returns the report, or gives it again after each row, so that a stop
            keeps the rows before it.
        sentence: subject of the measurement, for --help.
        example: a command line that works.

    Returns:
        The exit code.
    """
    from harness.core.cli import Parser, run_command, write_figures  # here: a report needs no jsonargparse

    def body() -> None:
        parser = Parser(f"python -m {module}", sentence, example)
        parser.add_class_arguments(config_class)
        parser.add_argument("--json", type=Path | None, default=None, help="file for the report")
        values = parser.parse(sys.argv[1:]).as_dict()
        json_file = values.pop("json")
        made = run(config_class(**values))
        for report in [made] if isinstance(made, dict) else made:
            if is_first():
                write_figures(json_file, report)

    return run_command(body)
