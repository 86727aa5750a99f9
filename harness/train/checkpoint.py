"""Checkpoints: one folder a step, one manifest; saved at any world size and tensor-parallel size, loaded at any other.

    step-00001000/
        towers/         parameters, their average, memory banks and AdamW state: megatron-core dist_checkpointing
                        (torch_dist, fully reshardable)
        head/           class rows and their optimizer state: torch.distributed.checkpoint with row ranges
        classes.parquet class id -> class key, so that rows keep their meaning when the catalogue grows
        state.json      step, data phases and position, ledger, identity of the run, layout
        manifest.json   size and xxh3-64 of every other file; written last
    latest              name of the step folder that was written last
    best.json           the step folder with the best figure so far (train.keep_best)

A folder is written as step-N.tmp, flushed, checksummed and renamed; only then does `latest` move. Where each tensor
belongs: `harness.train.checkpoint_tensors`; folders, the newest, those that are kept, checks before anything is loaded:
`harness.train.checkpoint_files`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from harness.core.errors import UserError
from harness.core.manifest import write_manifest
from harness.core.mesh import Mesh
from harness.core.waiting import in_own_time, on_first_rank
from harness.train import checkpoint_files
from harness.train import checkpoint_tensors as tensors
from harness.train.checkpoint_files import Keep, reason
from harness.train.checkpoint_rows import load_rows
from harness.train.checkpoint_tensors import AVERAGE, MEMORY, Trainable
from harness.train.checkpoint_writer import FolderWriter
from harness.train.class_rows import ClassMap

from megatron.core import dist_checkpointing  # isort: skip  (after the CPU proxy)
from megatron.core.dist_checkpointing.strategies import torch as torch_dist  # isort: skip

__all__ = ["NotWritten", "Save", "Trainable", "has_average", "load", "save"]

LARGEST_WEIGHT = 1e6  # none that learns is so large; a few in a row, squared by a normalisation, leave float32

# As megatron-core reads them; the names of the optimizer's tensors follow from the first.
CONTENT = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": True}


class NotWritten(UserError):
    """A checkpoint that the disk did not take; the weights are good."""


def save(
    folder: Path, step: int, parts: Trainable, state: dict[str, Any], classes: Path, mesh: Mesh, keep: Keep
) -> Path:
    """Writes the checkpoint of `step` under `folder`, and returns it; collective. Raises what `Save` does."""
    return Save(folder, step, parts, state, classes, mesh, keep).finish()


class Save:
    """Begins the checkpoint of `step` under `folder`; collective. It exists under its name once `finish` has run.

    Deletes checkpoints older than the newest of those that this process has written or found whole, as many as `keep`
    says; damaged ones do not count.

    Args:
        folder: of the run's checkpoints.
        step: finished steps.
        parts: what is saved.
        state: for state.json.
        classes: the run's classes.parquet.
        mesh: the ranks.
        keep: checkpoints that are kept.
        background: a thread writes this rank's part from a copy in the host's memory, so that training goes on.

    Attributes:
        step: of the checkpoint.
        bytes: of the tensors that this rank writes, so of its copy.

    Raises:
        UserError: a weight is not finite; nothing is written.
        NotWritten: the disk is full, or the folder cannot be written.
    """

    def __init__(
        self, folder: Path, step: int, parts: Trainable, state: dict[str, Any], classes: Path, mesh: Mesh, keep: Keep,
        background: bool = False,
    ) -> None:  # fmt: skip
        if not _finite(parts, mesh):
            good = [path.name for path in checkpoint_files.known_whole(folder)]
            raise UserError(
                f"step {step}: a weight is not finite, or beyond {LARGEST_WEIGHT:g}; no checkpoint was written",
                f"Lower optimizer.lr, then start again: the run resumes {good[0]}" if good else "Lower optimizer.lr",
            )
        self.step, self.mesh, self.keep, self.final = step, mesh, keep, folder / f"step-{step:08d}"
        self._temporary = folder / f"{self.final.name}.tmp"
        self._thread: threading.Thread | None = None
        with _disk_errors(self._temporary):
            on_first_rank(lambda: checkpoint_files.make_room(self._temporary), mesh, "making room for the checkpoint")
            self._writers = _plan(self._temporary, parts, mesh, background)

            def describe() -> None:
                shutil.copyfile(classes, self._temporary / "classes.parquet")
                (self._temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))

            on_first_rank(describe, mesh, "describing the checkpoint")
        self.bytes = sum(writer.bytes for writer in self._writers)
        if background:
            self._thread = threading.Thread(target=self._write, name="write-checkpoint")
            self._thread.start()

    @property
    def written(self) -> bool:
        """True once this rank's thread has ended, well or not."""
        return self._thread is not None and not self._thread.is_alive()

    def finish(self) -> Path:
        """Waits until every rank has written its part, lists them in the manifest and renames the folder; collective.

        Returns:
            The checkpoint.

        Raises:
            NotWritten: a rank could not write; on every rank.
        """
        with _disk_errors(self._temporary):
            in_own_time(self._write if self._thread is None else self._thread.join, self.mesh, "writing the checkpoint")
            for writer in self._writers:
                writer.finish()
            sums = {name: one for writer in self._writers for name, one in writer.sums.items()}
            write_manifest(self._temporary, self.mesh, known=sums)
            checkpoint_files.WHOLE.add(self.final)
            publish = lambda: checkpoint_files.publish(self._temporary, self.final, self.keep)  # noqa: E731
            on_first_rank(publish, self.mesh, "renaming the checkpoint")
        return self.final

    def _write(self) -> None:
        for writer in self._writers:
            writer.write()


class _Planned(torch_dist.TorchDistSaveShardedStrategy):
    """megatron-core's strategy, whose `save` plans only."""

    def __init__(self, copies: bool) -> None:
        super().__init__("torch_dist", 1)
        self.copies = copies

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        by_key, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        planner = torch_dist.MCoreSavePlanner(flatten_state_dict=False, can_run_decentralized_global_plan=False)
        state = torch_dist.mcore_to_pyt_state_dict(by_key, False)
        self.writer = FolderWriter(Path(checkpoint_dir), state, planner, self.copies)


def _plan(folder: Path, parts: Trainable, mesh: Mesh, copies: bool) -> list[FolderWriter]:
    """Plans the files of towers/ and head/; collective."""
    model = tensors.model_state(parts.towers, mesh)
    towers = {"model": model, **tensors.average_state(parts, mesh), **tensors.memory_state(parts, mesh)}
    if parts.tower_optimizer is not None:
        towers["optimizer"] = parts.tower_optimizer.sharded_state_dict(model, loading=False)
    strategy = _Planned(copies)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist_checkpointing.save(towers, str(folder / "towers"), strategy, content_metadata=CONTENT)
        if parts.head is None:
            return [strategy.writer]
        head = tensors.head_state(parts.head, parts.row_optimizer, mesh)
        return [strategy.writer, FolderWriter(folder / "head", head, DefaultSavePlanner(), copies)]


def _finite(parts: Trainable, mesh: Mesh) -> bool:
    """True if all weights and their average are finite and of a usable size; collective, the same on every rank."""
    weights = [*parts.towers.parameters(), *([] if parts.ema is None else parts.ema.state.values())]
    weights += [] if parts.head is None else [parts.head.rows]
    largest = [torch.linalg.vector_norm(x.detach(), float("inf")) for x in weights if x.numel()]
    bad = [~(x <= LARGEST_WEIGHT) for x in largest]  # so written, NaN is bad
    return not mesh.sum(torch.stack([*bad, torch.zeros_like(bad[0])]).sum()).item()


def has_average(checkpoint: Path) -> bool:
    """True for a checkpoint with an average of the towers' weights (train.ema_decay)."""
    return bool(_averaged(checkpoint))


def has_rows(checkpoint: Path) -> bool:
    """True for a checkpoint with class rows: of a run that has an objective on classes in any stage."""
    return (checkpoint / "head").is_dir()


def load(checkpoint: Path, parts: Trainable, mesh: Mesh, classes: ClassMap | None = None) -> None:
    """Loads `parts` from a checkpoint, at any layout of the ranks; collective.

    Without a tower_optimizer the towers take the average of the weights, if there is one. An `ema` that the checkpoint
    lacks restarts from its weights. With `classes`, rows and their optimizer state follow the class keys; those of new
    classes stay as they are. Without, the files of the rows are hashed while they are read.

    Raises:
        DamagedRows: a file of the rows is damaged; the rows have changed, the towers have not.
        UserError: its tensors do not fit this model, or are not finite.
    """
    model, averaged = tensors.model_state(parts.towers, mesh), _averaged(checkpoint)
    wanted: dict[str, Any] = {"model": model, **tensors.memory_state(parts, mesh)}
    if averaged:
        wanted |= tensors.average_state(parts, mesh)
    if parts.tower_optimizer is not None:
        wanted["optimizer"] = parts.tower_optimizer.sharded_state_dict(model, loading=True)
    else:
        model |= {name: replace(model[name], key=AVERAGE + name) for name in averaged}
    with _load_errors(checkpoint), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if parts.head is not None:
            load_rows(checkpoint, parts.head, parts.row_optimizer, mesh, classes)
        loaded = dist_checkpointing.load(wanted, str(checkpoint / "towers"))
        parts.towers.load_state_dict(loaded["model"])
        if parts.tower_optimizer is not None:
            parts.tower_optimizer.load_state_dict(loaded["optimizer"])
        if parts.memory is not None:
            parts.memory.load_state_dict({key.removeprefix(MEMORY): x for key, x in loaded["memory"].items()})
        if parts.ema is not None and not averaged:
            parts.ema.restart()
        elif parts.ema is not None:  # in place: what was loaded may share its tensors
            for key, average in loaded["average"].items():
                parts.ema.state[key.removeprefix(AVERAGE)].copy_(average)
    if not _finite(parts, mesh):
        raise UserError(
            f"{checkpoint}: a weight is not finite, or beyond {LARGEST_WEIGHT:g}",
            "An earlier version saved it so: move it elsewhere, then start again with the previous checkpoint",
        )
    mesh.barrier()


def _averaged(checkpoint: Path) -> list[str]:
    """Names of the parameters whose average a checkpoint holds."""
    keys = dist_checkpointing.load_tensors_metadata(str(checkpoint / "towers"))
    return [key.removeprefix(AVERAGE) for key in keys if key.startswith(AVERAGE)]


@contextmanager
def _load_errors(checkpoint: Path) -> Iterator[None]:
    """Turns the libraries' errors about a checkpoint's content into UserErrors."""
    try:
        yield
    except (CheckpointException, dist_checkpointing.core.CheckpointingException, KeyError, ValueError) as error:
        first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        if isinstance(first, KeyboardInterrupt):
            raise first from error
        raise UserError(f"{checkpoint} does not fit this model ({reason(first)})", "Name another checkpoint") from error


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turns the errors of a full or failing disk, which both libraries wrap in their own, into UserErrors."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException, dist_checkpointing.core.CheckpointingException) as error:
        full = os.strerror(errno.ENOSPC) in str(error) or shutil.disk_usage(folder.parent).free < 1 << 20
        if isinstance(error, RuntimeError) and not full:
            raise
        shutil.rmtree(folder, ignore_errors=True)  # half a checkpoint would only hold the space
        what = "the disk is full" if full else str(error).strip().splitlines()[-1]
        raise NotWritten(f"checkpoint {folder} was not written: {what}", "Earlier checkpoints are untouched") from error
