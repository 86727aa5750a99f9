"""Saving at scale: each rank writes and hashes its share, in the background if asked; steps that are not finite."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed.checkpoint as dcp

from harness.commands.checkpoint import CheckpointConfig
from harness.commands.checkpoint import run as run_checkpoint
from harness.core import manifest
from harness.core.errors import UserError
from harness.train import checkpoint, checkpoint_files, checkpoint_reader
from harness.train.checkpoint_writer import FolderWriter
from harness.train.config import RunConfig
from harness.train.optimizer import TowerOptimizer, blocks
from models import megatron_cpu
from tests.pool import ranks
from tests.runs import tiny_config, trainer
from tests.test_signals import losses, steps_saved

STEPS = 5
SETTINGS: dict[str, Any] = {
    "train.steps": STEPS,
    "train.checkpoint_every": 2,
    "train.keep_checkpoints": 9,
    "train.ema_decay": 0.5,
}


def state_of(t: Any) -> list[torch.Tensor]:
    """This rank's weights, rows, averages, moments and float32 weights."""
    (part,) = t.towers._parts
    moments = [entry[kind] for entry in part.optimizer.state.values() for kind in ("exp_avg", "exp_avg_sq")]
    masters = [p for group in part.optimizer.param_groups for p in group["params"]]
    tensors = [*t.method.towers.parameters(), t.method.head.rows, *t.rows.row_state().values(), *t.ema.state.values()]
    return [x.detach().clone() for x in (*tensors, *moments, *masters)]


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (2, 1, 3, 2)])
def test_any_range_of_a_flat_tensor_is_a_few_blocks_in_order(shape: tuple[int, ...]) -> None:
    x = torch.arange(math.prod(shape)).view(shape)
    for start in range(x.numel()):
        for stop in range(start + 1, x.numel() + 1):
            found, pieces = [], list(blocks(shape, start, stop))
            for offsets, sizes in pieces:
                block = x
                for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
                    block = block.narrow(dim, offset, size)
                found += block.flatten().tolist()
            assert found == list(range(start, stop)) and len(pieces) <= max(1, 2 * len(shape) - 1)


# --- each rank its share ---


def shares(config: RunConfig, tensor_parallel: int) -> tuple[list[str], int, bool]:
    """In a pool: files that this rank read while it saved; bytes that it wrote of the towers; whether a load gives the
    state back.
    """
    read: list[str] = []
    real = manifest.checksum

    def counted(file: Path, algorithm: str) -> str:
        read.append(file.name)
        return real(file, algorithm)

    with trainer(config, tensor_parallel) as t:
        for data in t.loader.steps(0, 2):
            t.train_step(data)
        with patch.object(manifest, "checksum", counted):
            path = t.save()
        wanted = state_of(t)
        t.train_step(t.loader.load(2))
        checkpoint.load(path, t.parts, t.mesh)
        same = all(torch.equal(a, b) for a, b in zip(wanted, state_of(t), strict=True))
        # Of the head a rank without rows writes no file: the last of 4 with 6 classes.
        return read, (path / f"towers/__{t.mesh.rank}_0.distcp").stat().st_size, same


@pytest.mark.parametrize(("world", "tensor_parallel"), [(3, 1), pytest.param(4, 2, marks=pytest.mark.full)])
def test_every_rank_writes_and_hashes_its_share(
    catalogue: Path, tmp_path: Path, world: int, tensor_parallel: int
) -> None:
    config = tiny_config(catalogue, tmp_path / "run", **SETTINGS)
    found = ranks(world).run(shares, config, tensor_parallel)
    assert all(same for _, _, same in found)
    assert not [name for read, _, _ in found for name in read if name.endswith(".distcp")], "no file is read again"
    towers = [own for _, own, _ in found]
    assert max(towers) < 1.5 * sum(towers) / world, towers
    assert checkpoint_files.problem(tmp_path / "run/checkpoints/step-00000002") == ""


def test_a_manifest_takes_no_sum_of_a_file_that_has_another_size(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b"abc")
    sums = {"rows": (3, manifest.checksum(tmp_path / "rows"))}
    manifest.write_manifest(tmp_path, known=sums)
    assert manifest.verify(tmp_path) == ""
    (tmp_path / "rows").write_bytes(b"ab")  # a disk that lost a part of it
    with pytest.raises(OSError, match="rows has 2 bytes, not the 3 that were written"):
        manifest.write_manifest(tmp_path, known=sums)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_rows_are_read_into_their_tensors_by_pieces(tmp_path: Path) -> None:
    rows = torch.randn(1000, 7)
    saved = {"rows": rows, "moments": rows.bfloat16(), "steps": torch.arange(1000), "decay": torch.tensor(3.0)}
    dcp.save(saved, checkpoint_id=tmp_path)
    found = {"rows": torch.zeros(7, 1000).T, **{name: torch.zeros_like(saved[name]) for name in [*saved][1:]}}
    real, unpickled = torch.load, []

    def counted(*given: Any, **named: Any) -> Any:
        unpickled.append(real(*given, **named))
        return unpickled[-1]

    reader = checkpoint_reader.RowReader(tmp_path)
    with patch.object(checkpoint_reader, "PIECE", 4096), patch.object(torch, "load", counted):
        dcp.load(found, storage_reader=reader)
    assert reader.sums == {f"{tmp_path.name}/__0_0.distcp": manifest.checksum(tmp_path / "__0_0.distcp")}
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    assert [x.shape for x in unpickled] == [()], "only what is no row"


def as_before(config: RunConfig) -> bool:
    """In a pool: saves as earlier versions did, all moments of the towers gathered by one rank; whether a load gives
    the state back, and a save as of now holds tensors of the same names.
    """

    def gathered(self: Any, model_state: dict[str, Any], loading: bool) -> dict[str, Any]:
        for sharded in model_state.values():  # the first data-parallel rank wrote all of them
            sharded.replica_id = (*sharded.replica_id[:2], self.mesh.dp.rank())
        metadata = {**checkpoint.CONTENT, "dp_cp_group": self.mesh.groups.dp_cp}
        with megatron_cpu.cuda_type_names():
            return self.optimizer.sharded_state_dict(model_state, is_loading=loading, metadata=metadata)

    with trainer(config) as t:
        for data in t.loader.steps(0, 2):
            t.train_step(data)
        with patch.object(TowerOptimizer, "sharded_state_dict", gathered):
            path = t.save()
        wanted = state_of(t)
        t.train_step(t.loader.load(2))
        checkpoint.load(path, t.parts, t.mesh)
        same = all(torch.equal(a, b) for a, b in zip(wanted, state_of(t), strict=True))
        names = sorted(checkpoint.dist_checkpointing.load_tensors_metadata(str(path / "towers")))
        again = t.save()
        return same and names == sorted(checkpoint.dist_checkpointing.load_tensors_metadata(str(again / "towers")))


def test_a_checkpoint_of_an_earlier_version_loads_and_names_the_same_tensors(catalogue: Path, tmp_path: Path) -> None:
    assert ranks(2).run(as_before, tiny_config(catalogue, tmp_path / "run", **SETTINGS)) == [True, True]


# --- in the background ---


def train(
    config: RunConfig, late: bool = False, fails_on: int = -1, stops_at: int = -1
) -> tuple[str, list[tuple[int, list[int]]]]:
    """In a pool: trains; the error that ended it, and (step, checkpoints there) before each step. `late`: each write of
    the last rank takes until the step after the next begins; `fails_on`: the second save finds no room on that rank;
    `stops_at`: a signal comes to the first rank before that step.
    """
    real, saves, seen = FolderWriter._write, 0, []

    with trainer(config) as t:
        step = t.train_step

        def write(self: FolderWriter) -> None:
            nonlocal saves
            saves += self.folder.name == "towers"
            until, deadline = min(t.step + 2, STEPS), time.monotonic() + 20
            waits = late and t.mesh.rank == t.mesh.world_size - 1 and self.folder.name == "towers"
            while waits and t.step < until and time.monotonic() < deadline:
                time.sleep(0.005)
            if saves == 2 and t.mesh.rank == fails_on:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(self)

        def seeing(data: Any) -> Any:
            published = (config.run_dir / "checkpoints").glob("step-????????")
            if t.step == stops_at and t.mesh.rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            seen.append((t.step, sorted(int(path.name[5:]) for path in published)))
            return step(data)

        t.train_step = seeing
        with patch.object(FolderWriter, "_write", write):
            try:
                t.fit()
            except UserError as error:
                return str(error), seen
    return "", seen


def content(run: Path) -> dict[str, bytes]:
    """Tensors of all checkpoints."""
    return {str(file.relative_to(run)): file.read_bytes() for file in sorted(run.rglob("*.distcp"))}


def test_a_save_in_the_background_is_that_of_its_step_and_appears_when_all_ranks_have_written(
    catalogue: Path, tmp_path: Path
) -> None:
    for name, asynchronous in (("waits", False), ("later", True)):
        config = tiny_config(catalogue, tmp_path / name, **SETTINGS, **{"train.checkpoint_async": asynchronous})
        found = ranks(2).run(train, config, asynchronous)
        assert [error for error, _ in found] == ["", ""]
    seen = dict(found[0][1])
    assert seen[2] == seen[3] == [] and seen[4] == [2], "training went on, and the second save waited for the first"
    assert content(tmp_path / "later") == content(tmp_path / "waits")
    assert losses(tmp_path / "later") == losses(tmp_path / "waits")
    assert steps_saved(tmp_path / "later") == [2, 4, 5]
    for step in (2, 4, 5):
        assert checkpoint_files.problem(tmp_path / f"later/checkpoints/step-{step:08d}") == ""


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_of_one_rank_stops_all_or_none(catalogue: Path, tmp_path: Path, asynchronous: bool) -> None:
    settings = {**SETTINGS, "train.checkpoint_async": asynchronous}
    found = ranks(2).run(train, tiny_config(catalogue, tmp_path / "stop", **settings), False, 1)
    for error, _ in found:
        assert "step-00000004.tmp was not written: the disk is full. Earlier checkpoints are untouched" in error
    assert steps_saved(tmp_path / "stop") == [2]
    config = tiny_config(catalogue, tmp_path / "on", **settings, **{"train.checkpoint_full_disk": "go_on"})
    assert [error for error, _ in ranks(2).run(train, config, False, 1)] == ["", ""]
    assert steps_saved(tmp_path / "on") == [2, 5] and len(losses(tmp_path / "on")) == STEPS
    config = tiny_config(catalogue, tmp_path / "signal", **settings, **{"train.checkpoint_full_disk": "go_on"})
    for error, _ in ranks(2).run(train, config, False, 1, 2):
        assert "step-00000003.tmp was not written" in error, "a run that a signal ends says so"
    assert steps_saved(tmp_path / "signal") == [2]


def test_a_run_on_a_small_disk_goes_on_and_resumes_with_more_room(
    catalogue: Path, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(2560)  # room for the run's other files and one checkpoint, not for two
    config = tiny_config(catalogue, disk / "run", **SETTINGS, **{"train.checkpoint_full_disk": "go_on"})
    for error, _ in ranks(2).run(train, config):
        assert "step-00000005.tmp was not written: the disk is full. Earlier checkpoints are untouched" in error
    assert steps_saved(disk / "run") == [2] and len(losses(disk / "run")) == STEPS
    subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
    assert [error for error, _ in ranks(2).run(train, config)] == ["", ""]
    assert steps_saved(disk / "run") == [2, 4, 5]


# --- steps that are not finite ---


def with_nan(config: RunConfig, at: tuple[int, ...], on: int) -> tuple[str, list[bool]]:
    """In a pool: trains with a loss that is not a number in steps `at` on one rank; the error, and for each step
    whether it changed anything.
    """
    changed: list[bool] = []
    with trainer(config) as t:
        step, plain = t.train_step, t.method.losses

        def judged(data: Any) -> Any:
            before = state_of(t)
            result = step(data)
            changed.append(not all(torch.equal(a, b) for a, b in zip(before, state_of(t), strict=True)))
            return result

        def spoilt(batches: Any) -> Any:
            for loss, metrics in plain(batches):
                yield loss * (math.nan if t.step in at and t.mesh.rank == on else 1.0), metrics

        t.train_step, t.method.losses = judged, spoilt
        try:
            t.fit()
        except UserError as error:
            return str(error), changed
    return "", changed


def test_steps_that_are_not_finite_are_left_out_within_the_budget(catalogue: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, "train.nonfinite": "skip", "train.skip_budget": 2}
    config = tiny_config(catalogue, tmp_path / "run", **settings)
    assert ranks(2).run(with_nan, config, (1, 3), 1) == [("", [True, False, True, False, True])] * 2
    assert steps_saved(tmp_path / "run") == [2, 4, 5]
    parts: set[str] = set()
    for rank in (0, 1):
        found = json.loads((tmp_path / f"run/nonfinite-step-3-rank-{rank}.json").read_text())
        assert found["sample_ids"] and "nan" in found["norms"].values()
        parts |= found["norms"].keys()
    assert {"rows", "vision", "text"} <= parts
    assert "NaN" not in (tmp_path / "run/log.jsonl").read_text(), "JSON has no such number"
    config = tiny_config(catalogue, tmp_path / "spent", **settings, **{"train.checkpoint_async": True})
    found = ranks(2).run(with_nan, config, (1, 2, 3), 0)
    for error, changed in found:
        assert "step 3: loss" in error and "train.skip_budget = 2 is spent" in error
        assert changed == [True, False, False]
    assert steps_saved(tmp_path / "spent") == [2], "what was begun is there for the next start"


# --- shelfmark checkpoint ---


def test_checkpoints_are_listed_and_read_through(
    catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with trainer(tiny_config(catalogue, run, **SETTINGS)) as t:
        t.fit()

    def states(action: Any, path: Path = run) -> list[str]:
        return [row["state"] for row in run_checkpoint(CheckpointConfig(action=action, path=path))["checkpoints"]]

    (run / "checkpoints/step-00000006.tmp").mkdir()
    assert states("list") == ["complete", "complete", "complete", "never finished"]
    assert states("verify") == ["whole", "whole", "whole", "never finished"]
    damaged = run / "checkpoints/step-00000004/head/__0_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert states("list") == ["complete", "complete", "complete", "never finished"], "sizes are all that it reads"
    with pytest.raises(UserError, match="1 of 4 are damaged"):
        states("verify")
    assert "head/__0_0.distcp has another checksum" in capsys.readouterr().out
    assert states("verify", run / "checkpoints/step-00000005") == ["whole"]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert states("list")[1] == "head/__0_0.distcp is missing or has another size"
    shown = capsys.readouterr().out.splitlines()[-4:]
    assert ["latest" in line for line in shown] == [False, False, True, False]
    with pytest.raises(UserError, match="has no checkpoint"):
        states("list", tmp_path)
