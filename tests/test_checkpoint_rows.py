"""A start reads the files of class rows once, and passes over a checkpoint with a changed byte before any step, at any
number of ranks.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from harness.core import manifest
from harness.train.config import RunConfig
from tests.pool import ranks
from tests.runs import tiny_config, trainer
from tests.test_saving import state_of

SETTINGS: dict[str, Any] = {"train.steps": 4, "train.checkpoint_every": 1, "train.ema_decay": 0.5}
NEWER = "checkpoints/step-00000002"


def trained(config: RunConfig) -> None:
    """In a pool: trains."""
    with trainer(config) as t:
        t.fit()


def started(config: RunConfig) -> tuple[list[str], list[str], list[torch.Tensor], dict[str, Any]]:
    """In a pool: notes of a start; files that this rank read for their checksums only; what the start gave."""
    read: list[str] = []
    real = manifest.checksum

    def counted(file: Path, algorithm: str = "xxh3-64") -> str:
        read.append(f"{file.parent.name}/{file.name}")
        return real(file, algorithm)

    with patch.object(manifest, "checksum", counted), trainer(config) as t:
        state = t.resume.state(t.step)
        del state["config"]
        tensors = [*state_of(t), torch.tensor(t.rows.log_decay)]
        return t.notes, read, tensors, state | {"step": t.step, "first_step": t.loader.first_step}


def require_same(found: list[Any], wanted: list[Any]) -> None:
    for (_, _, tensors, state), (_, _, others, expected) in zip(found, wanted, strict=True):
        assert state == expected
        assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


@contextmanager
def changed(file: Path, place: float) -> Iterator[None]:
    """Changes one byte of `file` in the block, from the first (0) to the last (1)."""
    whole = file.read_bytes()
    at = int(place * (len(whole) - 1))
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    yield
    file.write_bytes(whole)


@pytest.fixture(scope="module")
def trained_run(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 ranks with checkpoints of steps 1 and 2. Read only!"""
    folder = tmp_path_factory.mktemp("rows") / "run"
    ranks(2).run(trained, tiny_config(catalogue, folder, **SETTINGS, **{"train.stop_at": 2}))
    return folder


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


FULL = pytest.mark.full


@pytest.mark.parametrize("world", [2, pytest.param(1, marks=FULL), pytest.param(3, marks=FULL)])
def test_rows_are_hashed_while_they_are_loaded(catalogue: Path, run: Path, world: int) -> None:
    found = ranks(world).run(started, tiny_config(catalogue, run, **SETTINGS))
    assert [state["step"] for *_, state in found] == [2] * world
    read = [name for _, names, *_ in found for name in names]
    assert "head/.metadata" in read and "towers/__0_0.distcp" in read
    assert not [name for name in read if name.startswith("head/__")]


@pytest.mark.parametrize("world", [2, 1, pytest.param(3, marks=FULL)])
def test_changed_rows_are_named_and_the_checkpoint_before_them_is_taken(catalogue: Path, run: Path, world: int) -> None:
    config = tiny_config(catalogue, run, **SETTINGS)
    (run / NEWER).rename(run / "aside")
    wanted = ranks(world).run(started, config)
    (run / "aside").rename(run / NEWER)
    for name, place in (("head/__0_0.distcp", 0.5), ("head/__1_0.distcp", 1.0)):
        with changed(run / NEWER / name, place):
            found = ranks(world).run(started, config)
        for notes, *_ in found:
            assert f"passed over checkpoint step-00000002: {name} has another checksum" in notes
        require_same(found, wanted)


def test_without_another_checkpoint_the_run_begins_from_scratch(catalogue: Path, run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "checkpoints/step-00000001")
    with changed(run / NEWER / "head/__0_0.distcp", 0.5):
        found = ranks(2).run(started, tiny_config(catalogue, run, **SETTINGS))
    assert all("passed over checkpoint step-00000002" in notes[-1] for notes, *_ in found)
    require_same(found, ranks(2).run(started, tiny_config(catalogue, tmp_path / "other", **SETTINGS)))


@FULL
@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_changed_byte_anywhere_is_named(catalogue: Path, run: Path, world: int) -> None:
    config = tiny_config(catalogue, run, **SETTINGS)
    names = sorted(str(file.relative_to(run / NEWER)) for file in (run / NEWER).rglob("*") if file.is_file())
    assert len(names) == 11
    for name in names:
        for place in (0, 0.3, 0.5, 0.8, 1):
            with changed(run / NEWER / name, place):
                found = ranks(world).run(started, config)
            named = "" if name == "manifest.json" else name  # which may seem to be what is wrong with another
            for notes, *_, state in found:
                assert state["step"] == 1, (name, place)
                assert any(note.startswith(f"passed over checkpoint step-00000002: {named}") for note in notes)
