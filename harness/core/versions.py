"""Versions behind a figure: commit, packages, hardware."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from harness.core.device import driver_version

DALI = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")  # one of them
_PACKAGES = (
    "shelfmark",
    "torch",
    "megatron-core",
    *DALI,
    "numpy",
    "sentencepiece",
    "pyarrow",
    "pillow",
)


def commit() -> str:
    """The git commit of the working tree, with '-dirty' where it differs; 'unknown' outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Package -> version, for the packages that affect a run's numbers; with the commit and Python's version."""
    found = {"commit": commit(), "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            if package not in DALI:
                found[package] = "absent"
    return found


def hardware() -> str:
    """The machine in words: cores and, if there is one, GPU with its driver's number."""
    cores = f"{len(os.sched_getaffinity(0))} cores {platform.machine()}"
    if not torch.cuda.is_available():
        return cores
    return f"{cores}, {torch.cuda.get_device_name()}, driver {driver_version()}"
