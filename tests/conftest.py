"""Fixtures that several test files share."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these tests are a CPU's; tests/test_gpu.py runs with --noconftest


@pytest.fixture(scope="session")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A governed and tokenized catalogue: 6 classes of 1 document and 5 queries (3 train, 1 val, 1 test). Read only!"""
    from tests.runs import prepared_catalogue  # here: it imports torch and megatron-core, which takes seconds

    return prepared_catalogue(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a disk of so many KiB and gives its folder."""
    mounted: list[Path] = []

    def mount(kib: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        try:
            command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"only root may mount a small disk ({error})")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)
