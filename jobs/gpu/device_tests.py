"""Runs the tests that need a GPU (tests/test_gpu*.py) and writes each outcome as it comes.

Needs torch, triton and pytest, and DALI for the decoding tests, which are left out without it.

python jobs/gpu/device_tests.py OUT.json [--tests FILE ...]
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from harness.bench.gpu import Program

# Compiling takes longer than running, and one process compiles on one core.
PROCESSES = 8


class Recorder:
    """A pytest plugin that makes a row of every test."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.passed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest after each phase of a test; also for those that other processes ran."""
        if report.when == "call" or not report.passed:
            self.passed += report.passed and report.when == "call"
            row: dict[str, Any] = {"test": report.nodeid, "state": report.outcome, "seconds": round(report.duration, 2)}
            if report.failed:
                self.program.add(**row, ok=False, why=str(report.longrepr).strip().splitlines()[-1][:300])
            else:
                self.program.add(**row)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Called for each file that was read."""
        if report.failed:
            self.program.add(test=report.nodeid, state="not read", ok=False, why=str(report.longrepr)[-300:])


def main() -> None:
    """Entry point."""
    tests = ["tests/test_gpu.py"]
    if all(importlib.util.find_spec(name) for name in ("nvidia", "nvidia.dali")):
        tests.append("tests/test_gpu_decode.py")
    program = Program("gpu tests", "Tests that need a GPU.", {"tests": tests})
    recorder = Recorder(program)
    many = [] if program.tiny or importlib.util.find_spec("xdist") is None else ["-n", str(PROCESSES)]
    # conftest.py hides the GPU from the tests that are a CPU's, and needs what this machine may lack
    options = ["-p", "no:cacheprovider", "--noconftest", *many, *program.given.tests]
    pytest.main(options, plugins=[recorder])
    program.cite(passed=recorder.passed)
    if not recorder.passed and not program.tiny:
        program.add(test="all", state="no test ran", ok=False)
    program.exit()


if __name__ == "__main__":
    main()
