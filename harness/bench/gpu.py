"""Shared parts of the programs of jobs/gpu: flags, device, and a report that is written row by row.

Such a program proves or measures one thing on one GPU; with --tiny the same code runs small on a CPU, as in the tests.
Exit codes: 0; 1 if a row has ok = false; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from harness.bench.report import make_report
from harness.core.files import write_whole
from harness.core.tables import Scalar


class Program:
    """One program: reads the command line, then collects rows.

    Args:
        name: name of the report.
        purpose: one sentence for --help.
        flags: flag -> default; a list makes a flag that takes several values. OUT and --tiny are added.

    Attributes:
        given: values of the flags.
        out: file of the report (harness/bench/report.py), written whole after every row, so that a crash keeps the
            rows before it.
        tiny: True to run small on a CPU.
        device: the GPU, or the CPU with --tiny.
    """

    def __init__(self, name: str, purpose: str, flags: Mapping[str, Any] | None = None) -> None:
        parser = argparse.ArgumentParser(description=purpose)
        parser.add_argument("out", type=Path, help="file for the report")
        parser.add_argument("--tiny", action="store_true", help="small, on a CPU")
        for flag, default in (flags or {}).items():
            kind = int if isinstance(default, int) else str
            parser.add_argument(
                f"--{flag}", type=kind, default=default, nargs="*" if isinstance(default, list) else None
            )
        self.given = parser.parse_args()
        self.out, self.tiny = self.given.out, self.given.tiny
        if self.tiny:
            # For code that chooses a device by itself, and for child processes.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if not self.tiny and not torch.cuda.is_available():
            print("error: torch sees no GPU here. --tiny runs small on the CPU", file=sys.stderr)
            sys.exit(2)
        self.device = torch.device("cpu" if self.tiny else "cuda")
        self.failed = 0
        self._report = make_report(name, shlex.join(["python", *sys.argv]), {}, [])
        self._write()

    def add(self, **row: Scalar) -> None:
        """Adds, prints and writes a row; ok = False makes the program fail."""
        self.failed += row.get("ok") is False
        self._report["rows"].append(row)
        print(", ".join(f"{key} {f'{x:.4g}' if isinstance(x, float) else x}" for key, x in row.items()), flush=True)
        self._write()

    @property
    def rows(self) -> list[dict[str, Scalar]]:
        """All rows so far."""
        return list(self._report["rows"])

    def cite(self, **figures: float) -> None:
        """Adds figures to the headline; their names contain the unit."""
        self._report["headline"] |= {key: float(value) for key, value in figures.items()}
        self._write()

    def bar(self, what: str, value: float, bar: float, at_least: bool = True) -> None:
        """Adds a row that compares a figure with the bar for one H100 (docs/gpu.md), and the figure to the headline.
        Never fails.
        """
        self.cite(**{what: value})
        self.add(bar_of=what, value=value, bar=bar, ratio=value / bar, met=value >= bar if at_least else value <= bar)

    def exit(self) -> None:
        """Ends the process, with exit code 1 if a row was not ok."""
        sys.exit(int(self.failed > 0))

    def synchronize(self) -> float:
        """Waits for the device; returns the clock in seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _write(self) -> None:
        write_whole(self.out, json.dumps(self._report, indent=1, default=str) + "\n")


def empty_folder(folder: Path) -> None:
    """Makes an empty `folder` in place of nothing or of an earlier program's; ends this program if it holds anything
    else.
    """
    mark = folder / ".gpu-check"
    if os.path.lexists(folder) and not mark.is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        print(f"error: {folder} holds something that no check of a GPU made. Name another folder", file=sys.stderr)
        sys.exit(2)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mark.touch()


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the best of several: the reachable rate of this machine."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        c = a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    del c
    return 2 * n**3 / best


def bandwidth(device: torch.device) -> float:
    """Bytes/s read and written in copying a large tensor, the best of several."""
    a = torch.ones(1 << (29 if device.type == "cuda" else 22), device=device)
    b, best = torch.empty_like(a), float("inf")
    for _ in range(8):
        start = time.perf_counter()
        b.copy_(a)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * a.nbytes / best
