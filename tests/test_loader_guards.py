"""The loader's guards: too much damage, an order that changed under a run, and memory without a bound."""

from __future__ import annotations

import json
import math
import shutil
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from harness.catalogue.catalogue import Catalogue
from harness.core import manifest as checksums
from harness.core.errors import UserError
from harness.data.loader import StepLoader
from harness.train import checkpoint_files
from harness.train import run as train
from tests.pool import ranks
from tests.runs import arguments, tiny_config, trainer
from tests.test_loop import damage, log_lines, open_loader

# 250 samples a step, so that a run may stop for damage after 4 steps and no sooner.
MANY = {"data.queries_per_step": 200, "data.documents_per_step": 50, "train.steps": 6, "train.checkpoint_every": 2}


@pytest.fixture
def mostly_damaged(catalogue: Path, tmp_path: Path) -> tuple[Path, list[int]]:
    """A copy of the catalogue in which 22 of the 24 training samples are damaged; their ids, ascending."""
    folder = tmp_path / "catalogue"
    shutil.copytree(catalogue, folder)
    ids = Catalogue(folder).table([], split="train")["sample_id"].to_pylist()
    damage(folder, ids[2:])
    return folder, ids[2:]


def stopped(catalogue: Path, run: Path, settings: dict[str, Any]) -> tuple[int, str]:
    """Trains; the last step and what ended the run."""
    with trainer(tiny_config(catalogue, run, **settings)) as t:
        try:
            t.fit()
        except UserError as error:
            return t.step, str(error)
        return t.step, ""


def test_too_much_damage_ends_the_run_on_all_ranks_alike(
    mostly_damaged: tuple[Path, list[int]], tmp_path: Path
) -> None:
    catalogue, ids = mostly_damaged
    found = ranks(2).run(stopped, catalogue, tmp_path / "run", MANY)
    assert found[0] == found[1]
    step, message = found[0]
    assert step == 4, "not before 1,000 samples were read"
    bad = int(log_lines(tmp_path / "run")[-1]["data/bad_samples"])
    assert 500 < bad < 1000 and f"{bad} of the 1000 samples read since this start were damaged" in message
    assert f"samples {', '.join(map(str, ids[:20]))} and 2 more." in message and "max_bad_fraction = 0.01" in message
    assert checkpoint_files.newest(tmp_path / "run/checkpoints") == (tmp_path / "run/checkpoints/step-00000002", [])


def test_the_share_of_damage_that_is_allowed_is_configured(
    mostly_damaged: tuple[Path, list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalogue, _ = mostly_damaged
    assert stopped(catalogue, tmp_path / "a", {**MANY, "data.max_bad_fraction": 1.0}) == (6, "")
    assert train.main(arguments(catalogue, tmp_path / "b", **{**MANY, "data.max_bad_fraction": 0.3})) == 2
    assert "max_bad_fraction = 0.3 allows" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(UserError, match=r"data.max_bad_fraction is 1.5"):
        tiny_config(catalogue, tmp_path, **{"data.max_bad_fraction": 1.5})


def train_to(catalogue: Path, run: Path, end: int) -> tuple[int, list[str]]:
    """Trains to step `end`, comparing 4 steps at a resume; the ledger of all and what the start noted."""
    with (
        mock.patch("harness.train.ledger.LEDGER_STEPS", 4),
        trainer(tiny_config(catalogue, run, **{"train.steps": 9})) as t,
    ):
        for data in t.loader.steps(t.step, end):
            t.train_step(data)
        t.save()
        return t.ledger.total, t.notes


def rewrite_state(run: Path, step: int, change: dict[str, Any]) -> None:
    """Changes keys of a checkpoint's state (None removes), and its manifest with it."""
    folder = run / f"checkpoints/step-{step:08d}"
    state = {**checkpoint_files.read_state(folder), **change}
    (folder / "state.json").write_text(json.dumps({key: value for key, value in state.items() if value is not None}))
    (folder / "manifest.json").unlink()  # or it would list itself
    checksums.write_manifest(folder)


@pytest.mark.full
def test_a_sound_ledger_passes_at_any_number_of_ranks(catalogue: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for world, end in ((1, 3), (2, 5), (3, 6), (1, 9)):
        found = ranks(world).run(train_to, catalogue, run, end)
        state = checkpoint_files.read_state(run / f"checkpoints/step-{end:08d}")
        with open_loader(catalogue) as loader:
            ledgers = [sum(loader.ledgers(0, last)) % 2**64 for last in range(end + 1)]
            assert [loader.load(step).ledger for step in range(end)] == loader.ledgers(0, end)
        first = max(0, end - 4)
        assert found[0][0] == ledgers[end] and int(state["ledger"], 16) == ledgers[end]
        assert state["ledger_before"] == {"step": first, "ledger": f"{ledgers[first]:016x}"}


@pytest.mark.parametrize("paired", [False, True])
def test_ledgers_need_no_images(catalogue: Path, paired: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_loader(catalogue, paired=paired) as loader:
        wanted = [loader.load(step).ledger for step in range(5)]
        monkeypatch.setattr(loader.images, "read", None)
        assert loader.ledgers(1, 5) == wanted[1:] and loader.ledgers(2, 2) == []
        monkeypatch.setattr("harness.data.loader._POSITIONS_AT_ONCE", 17)  # two steps at once
        assert loader.ledgers(0, 5) == wanted


def test_another_order_than_the_trained_one_is_refused(catalogue: Path, tmp_path: Path) -> None:
    folder, run = tmp_path / "catalogue", tmp_path / "run"
    shutil.copytree(catalogue, folder)
    train_to(folder, run, 3)
    members = np.load(folder / "classes/query.members.npy")
    np.save(folder / "classes/query.members.npy", np.roll(members, 1))  # under the same order id
    with pytest.raises(
        UserError, match=r"step-00000003: the samples of its steps 0 to 2 .* not the one that was trained"
    ):
        train_to(folder, run, 4)
    np.save(folder / "classes/query.members.npy", members)
    train_to(folder, run, 4)


def test_an_altered_ledger_is_refused_and_a_missing_one_is_noted(catalogue: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ledger, _ = train_to(catalogue, run, 2)
    rewrite_state(run, 2, {"ledger": f"{ledger ^ 1:016x}"})
    with pytest.raises(UserError, match="not the one that was trained on"):
        train_to(catalogue, run, 3)
    rewrite_state(run, 2, {"ledger": f"{ledger:016x}", "ledger_before": None})
    _, notes = train_to(catalogue, run, 3)
    assert "step-00000002 was saved by an earlier version: its last samples are not compared" in notes
    assert checkpoint_files.read_state(run / "checkpoints/step-00000003")["ledger_before"]["step"] == 2
    _, notes = train_to(catalogue, run, 4)
    assert not any("earlier version" in line for line in notes)


@pytest.mark.parametrize(("steps", "depth"), [(0.5, 1), (1, 1), (2.9, 2), (100, 3)])
def test_the_read_ahead_is_bounded_in_bytes(
    catalogue: Path, steps: float, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, waiting, decode = 0, threading.Event(), StepLoader._decode

    def counted(self: StepLoader, planned: Any) -> Any:
        nonlocal begun
        begun += 1
        return decode(self, planned)

    monkeypatch.setattr(StepLoader, "_decode", counted)
    with open_loader(catalogue, 1, 3, micro_batches=2) as loader:
        batches = loader.load(0).batches
        size = sum(b.query_images.nbytes + b.document_images.nbytes for b in batches)
        assert size == loader.step_bytes > 0
    settings = {"data.read_ahead": 3, "data.read_ahead_bytes": math.ceil(steps * size)}
    with open_loader(catalogue, 1, 3, micro_batches=2, **settings) as loader:
        begun = 0
        assert loader.depth == depth
        for taken, data in enumerate(loader.steps(0, 8), 1):
            end = time.monotonic() + 20
            while loader._ahead.ready < min(depth, 8 - taken) and time.monotonic() < end:
                waiting.wait(0.01)
            waiting.wait(0.05)  # time in which a reader without a bound would begin another
            assert begun == min(8, taken + depth)
            assert taken == 1 or data.ready == 1.0
