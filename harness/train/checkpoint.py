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

A folder is written as step-N.tmp, flushed, checksummed and renamed; only then does `latest` move. Here are the tensors;
`harness.train.checkpoint_files` has the folders: the newest, those that are kept, checks before anything is loaded.
The only importer of either checkpoint library.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from harness.core.errors import UserError
from harness.core.manifest import write_manifest
from harness.core.mesh import Mesh
from harness.core.waiting import on_first_rank
from harness.train import checkpoint_files
from harness.train.checkpoint_files import Keep, reason
from harness.train.class_rows import ClassMap, move_rows
from harness.train.ema import Ema
from harness.train.optimizer import TowerOptimizer
from models.heads.class_parallel import ClassParallelHead, class_range
from models.heads.row_optimizer import RowAdamW

from megatron.core import dist_checkpointing  # isort: skip  (after the CPU proxy)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint  # isort: skip

AVERAGE = "average."  # key of a parameter's average: this and the parameter's own
MEMORY = "memory."  # before the keys of memory banks
LARGEST_WEIGHT = 1e6  # none that learns is so large; a few in a row, squared by a normalisation, leave float32


@dataclass
class Trainable:
    """Content of a checkpoint besides its state.json. Optimizers are None where only the weights are wanted."""

    towers: nn.Module
    head: ClassParallelHead | None
    tower_optimizer: TowerOptimizer | None
    row_optimizer: RowAdamW | None
    ema: Ema | None = None
    memory: nn.Module | None = None


def save(
    folder: Path, step: int, parts: Trainable, state: dict[str, Any], classes: Path, mesh: Mesh, keep: Keep
) -> Path:
    """Writes the checkpoint of `step` under `folder`, and returns it; collective.

    Deletes checkpoints older than the newest of those that this process has written or found whole, as many as `keep`
    says; damaged ones do not count.

    Raises:
        UserError: a weight is not finite (nothing is written), the disk is full, or the folder cannot be written.
    """
    if not _finite(parts, mesh):
        good = [path.name for path in checkpoint_files.known_whole(folder)]
        raise UserError(
            f"step {step}: a weight is not finite, or beyond {LARGEST_WEIGHT:g}; no checkpoint was written",
            f"Lower optimizer.lr, then start again: the run resumes {good[0]}" if good else "Lower optimizer.lr",
        )
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{final.name}.tmp"
    with _disk_errors(temporary):
        on_first_rank(lambda: checkpoint_files.make_room(temporary), mesh, "making room for the checkpoint")
        model = _model_state(parts.towers, mesh)
        towers: dict[str, Any] = {"model": model, **_average_state(parts, mesh), **_memory_state(parts, mesh)}
        if parts.tower_optimizer is not None:
            towers["optimizer"] = parts.tower_optimizer.sharded_state_dict(model, _metadata(mesh), loading=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dist_checkpointing.save(towers, str(temporary / "towers"), content_metadata=_content_metadata())
            if parts.head is not None:
                dcp.save(_head_state(parts.head, parts.row_optimizer, mesh), checkpoint_id=temporary / "head")

        def describe() -> None:
            shutil.copyfile(classes, temporary / "classes.parquet")
            (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))

        on_first_rank(describe, mesh, "describing the checkpoint")
        write_manifest(temporary, mesh)
        checkpoint_files.WHOLE.add(final)
        on_first_rank(lambda: checkpoint_files.publish(temporary, final, keep), mesh, "renaming the checkpoint")
    return final


def _finite(parts: Trainable, mesh: Mesh) -> bool:
    """True if all weights and their average are finite and of a usable size; collective, the same on every rank."""
    tensors = [*parts.towers.parameters(), *([] if parts.ema is None else parts.ema.state.values())]
    tensors += [] if parts.head is None else [parts.head.rows]
    largest = [torch.linalg.vector_norm(x.detach(), float("inf")) for x in tensors if x.numel()]
    bad = [~(x <= LARGEST_WEIGHT) for x in largest]  # so written, NaN is bad
    return not mesh.sum(torch.stack([*bad, torch.zeros_like(bad[0])]).sum()).item()


def has_average(checkpoint: Path) -> bool:
    """True for a checkpoint with an average of the towers' weights (train.ema_decay)."""
    return bool(_averaged(checkpoint))


def load(checkpoint: Path, parts: Trainable, mesh: Mesh, classes: ClassMap | None = None) -> None:
    """Loads `parts` from a checkpoint, at any layout of the ranks; collective.

    Without a tower_optimizer the towers take the average of the weights, if there is one. An `ema` that the checkpoint
    lacks restarts from its weights. With `classes`, rows and their optimizer state follow the class keys; those of new
    classes stay as they are.

    Raises:
        UserError: its tensors do not fit this model, or are not finite.
    """
    model, averaged = _model_state(parts.towers, mesh), _averaged(checkpoint)
    wanted: dict[str, Any] = {"model": model, **_memory_state(parts, mesh)}
    if averaged:
        wanted |= _average_state(parts, mesh)
    if parts.tower_optimizer is not None:
        wanted["optimizer"] = parts.tower_optimizer.sharded_state_dict(model, _metadata(mesh), loading=True)
    else:
        model |= {name: replace(model[name], key=AVERAGE + name) for name in averaged}
    with _load_errors(checkpoint), warnings.catch_warnings():
        warnings.simplefilter("ignore")
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
        if parts.head is not None:
            _load_head(checkpoint / "head", parts.head, parts.row_optimizer, mesh, classes)
    if not _finite(parts, mesh):
        raise UserError(
            f"{checkpoint}: a weight is not finite, or beyond {LARGEST_WEIGHT:g}",
            "An earlier version saved it so: move it elsewhere, then start again with the previous checkpoint",
        )
    mesh.barrier()


def _model_state(towers: nn.Module, mesh: Mesh) -> dict[str, Any]:
    """The towers' parameters as megatron-core ShardedTensors; keys are the state names of the plain twin."""
    state = towers.state_dict(keep_vars=True)
    # megatron-core's linear layers have an `_extra_state`, which is empty and which plain ones lack.
    return _sharded({k: v for k, v in state.items() if not k.endswith("_extra_state")}, "", towers, mesh)


def _average_state(parts: Trainable, mesh: Mesh) -> dict[str, Any]:
    """The entry for parts.ema; empty where that is None."""
    return {} if parts.ema is None else {"average": _sharded(parts.ema.state, AVERAGE, parts.towers, mesh)}


def _memory_state(parts: Trainable, mesh: Mesh) -> dict[str, Any]:
    """The entry for parts.memory, which is the same on every rank; empty where that is None."""
    if parts.memory is None:
        return {}
    return {"memory": _sharded(parts.memory.state_dict(), MEMORY, parts.memory, mesh)}


def _averaged(checkpoint: Path) -> list[str]:
    """Names of the parameters whose average a checkpoint holds."""
    keys = dist_checkpointing.load_tensors_metadata(str(checkpoint / "towers"))
    return [key.removeprefix(AVERAGE) for key in keys if key.startswith(AVERAGE)]


def _sharded(tensors: Mapping[str, torch.Tensor], prefix: str, towers: nn.Module, mesh: Mesh) -> dict[str, Any]:
    """`tensors`, sharded like the parameters of `towers` with the same names, as ShardedTensors with keys prefix +
    name.
    """
    axes = {
        name: parameter.partition_dim  # type: ignore[attr-defined]
        for name, parameter in towers.named_parameters()
        if getattr(parameter, "tensor_model_parallel", False)
    }
    groups = {"tp_group": mesh.tp, "dp_cp_group": mesh.groups.dp_cp}
    return make_sharded_tensors_for_checkpoint(tensors, prefix, axes, **groups)


def _content_metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,  # gathers over gloo, on CPUs and GPUs alike
    }


def _metadata(mesh: Mesh) -> dict[str, Any]:
    return {**_content_metadata(), "dp_cp_group": mesh.groups.dp_cp}


def _row_tensors(head: ClassParallelHead, optimizer: RowAdamW | None) -> dict[str, torch.Tensor]:
    """Tensors with an entry for each local row: name in a checkpoint -> tensor."""
    return {"rows": head.rows, **({} if optimizer is None else optimizer.row_state())}


def _logical(local: torch.Tensor, num_classes: int, mesh: Mesh) -> DTensor:
    """One logical [num_classes, ...] tensor of shards, also empty ones, in torch.chunk's ranges over the row group."""
    shape = torch.Size((num_classes, *local.shape[1:]))
    return DTensor.from_local(
        local,
        DeviceMesh.from_group(mesh.row_group, mesh.device.type),
        [Shard(0)],
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


def _head_state(head: ClassParallelHead, optimizer: RowAdamW | None, mesh: Mesh) -> dict[str, Any]:
    tensors = _row_tensors(head, optimizer)
    state: dict[str, Any] = {name: _logical(local, head.config.num_classes, mesh) for name, local in tensors.items()}
    if optimizer is not None:
        state["log_decay"] = torch.tensor(optimizer.log_decay, dtype=torch.float64)
    return state


def _load_head(
    folder: Path, head: ClassParallelHead, optimizer: RowAdamW | None, mesh: Mesh, classes: ClassMap | None
) -> None:
    state = _head_state(head, optimizer, mesh)
    if classes is not None:
        # One tensor at a time in its previous ranges, so that no more than one shard lies in memory twice.
        first, last = class_range(classes.num_before, mesh.row_group.rank(), mesh.row_group.size())
        for name, into in _row_tensors(head, optimizer).items():
            before = into.new_empty(last - first, *into.shape[1:])
            dcp.load({name: _logical(before, classes.num_before, mesh)}, checkpoint_id=folder)
            move_rows(before, into, classes, mesh.row_group)
            del state[name], before
    if state:
        dcp.load(state, checkpoint_id=folder)
    if optimizer is not None:
        optimizer.log_decay = float(state["log_decay"])


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
        raise UserError(f"checkpoint {folder} was not written: {what}", "Earlier checkpoints are untouched") from error
