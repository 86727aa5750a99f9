"""Checkpoints: one folder a step, one manifest; saved at any world size and tensor-parallel size, loaded at any other.

    step-00001000/
        towers/         parameters, their average, memory banks and AdamW state, megatron-core dist_checkpointing (torch_dist, fully reshardable)
        head/           class rows and their optimizer state, torch.distributed.checkpoint with row ranges
        classes.parquet class id -> class key, so that rows keep their meaning when the catalogue grows
        state.json      step, data phases and position, ledger, identity of the run, layout
        manifest.json   size and xxh3-64 of every other file; written last
    latest              name of the step folder that was written last

A folder is written as step-N.tmp, flushed, checksummed and renamed; only then does `latest` move. Nothing in it is
unpickled without a restriction: `problem` tells what may be loaded. The only importer of either checkpoint library.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from harness.core.errors import UserError
from harness.core.files import Record, printable, read_json, read_record, write_whole
from harness.core.manifest import at_first, file_sizes, verify, write_manifest
from harness.core.mesh import Mesh
from harness.core.waiting import on_first_rank
from harness.train.class_rows import ClassMap, move_rows
from harness.train.dcp_metadata import metadata_problem
from harness.train.ema import Ema
from harness.train.optimizer import TowerOptimizer
from models.heads.class_parallel import ClassParallelHead, class_range
from models.heads.row_optimizer import RowAdamW

from megatron.core import dist_checkpointing  # isort: skip  (after the CPU proxy)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint  # isort: skip

AVERAGE = "average."  # key of a parameter's average: this and the parameter's own
MEMORY = "memory."  # before the keys of memory banks
LONGEST_LEDGER = 1 << 16  # steps whose samples a resume may have to draw again
LARGEST_WEIGHT = 1e6  # none that learns is so large; a few in a row, squared by a normalisation, leave float32
_DELETING = "delete-checkpoints"  # name of a thread
_STEP, _UNFINISHED, _DELETED = r"step-([0-9]{8,})", r"step-([0-9]{8,})\.tmp", r"\.step-([0-9]{8,})\.(?:old|replaced)"
_LIBRARY_STATE = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_FILE = re.compile(
    r"state\.json|classes\.parquet|towers/(metadata\.json|common\.pt)|(towers|head)/(\.metadata|__[0-9]+_[0-9]+\.distcp)"
)
_whole: set[Path] = set()  # checkpoints that this process has written, or found whole


@dataclass
class Trainable:
    """All that a checkpoint holds besides its state.json. Optimizers are None where only the weights are wanted."""

    towers: nn.Module
    head: ClassParallelHead | None
    tower_optimizer: TowerOptimizer | None
    row_optimizer: RowAdamW | None
    ema: Ema | None = None
    memory: nn.Module | None = None


def save(
    folder: Path, step: int, parts: Trainable, state: dict[str, Any], classes: Path, mesh: Mesh, keep: int
) -> Path:
    """Writes the checkpoint of `step` under `folder`, and returns it; collective.

    Deletes what is older than the newest `keep` of those that this process has written or found whole: damaged ones do
    not count.

    Raises:
        UserError: a weight is not finite (nothing is written), the disk is full, or the folder cannot be written.
    """
    if not _finite(parts, mesh):
        good = [path.name for path in _steps(folder, _STEP) if path in _whole]
        raise UserError(
            f"step {step}: a weight is not finite, or beyond {LARGEST_WEIGHT:g}; no checkpoint was written",
            f"Lower optimizer.lr, then start again: the run resumes {good[0]}" if good else "Lower optimizer.lr",
        )
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{final.name}.tmp"
    with _disk_errors(temporary):
        on_first_rank(lambda: _make_room(temporary), mesh, "making room for the checkpoint")
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
        _whole.add(final)
        on_first_rank(lambda: _publish(temporary, final, keep), mesh, "renaming the checkpoint")
    return final


def _finite(parts: Trainable, mesh: Mesh) -> bool:
    """Tells whether all weights, their average included, are numbers of use; collective, the same on every rank."""
    tensors = [*parts.towers.parameters(), *([] if parts.ema is None else parts.ema.state.values())]
    tensors += [] if parts.head is None else [parts.head.rows]
    largest = [torch.linalg.vector_norm(x.detach(), float("inf")) for x in tensors if x.numel()]
    bad = [~(x <= LARGEST_WEIGHT) for x in largest]  # so written, NaN is bad
    return not mesh.sum(torch.stack([*bad, torch.zeros_like(bad[0])]).sum()).item()


def _steps(folder: Path, names: str) -> list[Path]:
    """Entries of `folder` whose names match the pattern, the newest first; its first group is the step."""
    if not folder.is_dir():
        return []
    found = [(match, path) for path in folder.iterdir() if (match := re.fullmatch(names, path.name))]
    return [path for _, path in sorted(found, key=lambda pair: (int(pair[0][1]), pair[0][0]), reverse=True)]


def _make_room(folder: Path) -> None:
    """An empty `folder`; what is being deleted is gone before more is written."""
    for thread in threading.enumerate():
        if thread.name == _DELETING:
            thread.join()
    for names in (_UNFINISHED, _DELETED):  # the process before may have ended amid either
        for gone in _steps(folder.parent, names):
            shutil.rmtree(gone, ignore_errors=True)
    (folder / "towers").mkdir(parents=True)


def _publish(temporary: Path, final: Path, keep: int) -> None:
    """`temporary` becomes `final` and the newest; what it replaces is deleted meanwhile, for training need not wait for
    that.
    """
    folder = final.parent
    if final.exists():
        final.rename(folder / f".{final.name}.replaced")
    temporary.rename(final)
    write_whole(folder / "latest", final.name)
    _retire(folder, keep, final)


def _retire(folder: Path, keep: int, written: Path) -> None:
    """Deletes what is older than `written` and than the newest `keep` that are known to be whole."""
    steps = _steps(folder, _STEP)
    kept = [path for path in steps if path in _whole][:keep]
    for old in steps[max(steps.index(kept[-1]), steps.index(written)) + 1 :] if len(kept) == keep else []:
        if (old / "manifest.json").is_file() and not old.is_symlink():  # one of ours; a link is the user's
            old.rename(folder / f".{old.name}.old")

    def delete() -> None:
        for gone in _steps(folder, _DELETED):
            shutil.rmtree(gone, ignore_errors=True)

    threading.Thread(target=delete, name=_DELETING).start()  # no daemon: the process ends after it


def tidy(folder: Path, keep: int, resumed: Path, mesh: Mesh) -> None:
    """Ends what a process began that was killed after its last save, and deletes what a smaller `keep` asks for;
    collective.

    Where there are more than `keep` checkpoints, the newest are read through until so many are known to be whole.
    """
    steps = at_first(lambda: _steps(folder, _STEP), mesh, "listing checkpoints")
    if len(steps) > keep:
        for path in steps:
            if sum(step in _whole for step in steps) < keep and path not in _whole and not problem(path, mesh):
                _whole.add(path)

    def end() -> None:
        write_whole(folder / "latest", resumed.name)
        _retire(folder, keep, resumed)

    on_first_rank(end, mesh, "removing old checkpoints")


def newest(folder: Path, mesh: Mesh | None = None) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint under `folder`, and a sentence for each that was passed over.

    With `mesh` collective, and the same on every rank: each reads its share of the files. What has another name than
    ours is let alone.
    """
    passed_over: list[str] = []
    for candidate in at_first(lambda: _steps(folder, rf"{_STEP}(?:\.tmp)?"), mesh, "listing checkpoints"):
        wrong = "never finished" if candidate.suffix == ".tmp" else problem(candidate, mesh)
        if not wrong:
            _whole.add(candidate)
            return candidate, passed_over
        _whole.discard(candidate)
        passed_over.append(f"{candidate.name}: {wrong}")
    return None, passed_over


def problem(checkpoint: Path, mesh: Mesh | None = None) -> str:
    """Names why a checkpoint cannot be loaded: a file that is damaged, or that would run something; empty if it can.

    With `mesh` collective, as `harness.core.manifest.verify`, and the same on every rank.
    """
    return verify(checkpoint, mesh) or at_first(lambda: _odd(checkpoint), mesh, "reading what the checkpoint says")


def _odd(checkpoint: Path) -> str:
    """Checks a checkpoint for content that none of ours has, though its manifest may list it; the error, or ''."""
    try:
        for name in file_sizes(checkpoint):
            if not _FILE.fullmatch(name):  # none of ours, but a library may read it: torch unpickles __0.metadata
                return f"{printable(name)} does not belong to a checkpoint"
        read_state(checkpoint)
        if read_json(checkpoint / "towers/metadata.json") != _LIBRARY_STATE:
            return "towers/metadata.json names another format"
        torch.load(checkpoint / "towers/common.pt", map_location="cpu", weights_only=True)
        columns = pq.read_schema(checkpoint / "classes.parquet")
        if columns.field("class_id").type != pa.int64() or not pa.types.is_string(columns.field("class_key").type):
            return "classes.parquet has other columns"
    except UserError as error:
        return str(error)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        return _said(error)
    for part in ("towers", "head"):
        if (checkpoint / part).is_dir() and (wrong := metadata_problem(checkpoint / part / ".metadata")):
            return f"{part}/{wrong}"
    return ""


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state.json of a checkpoint.

    Raises:
        UserError: there is none, or a value is missing or of another kind.
    """
    record = read_record(checkpoint / "state.json", f"{checkpoint} is no checkpoint: name a step-N folder of a run")
    _ledger(record, record.number("step", 1 << 62))
    record.number("world_size", 1 << 31, 1)
    record.get("order_id", str)
    record.get("config", dict)
    if "ledger_before" in record.values:
        before = Record(record.file, record.get("ledger_before", dict), record.remedy)
        _ledger(before, before.number("step", record.values["step"], record.values["step"] - LONGEST_LEDGER))
    return dict(record.values)


def _ledger(record: Record, step: int) -> None:
    if not re.fullmatch("[0-9a-f]{16}", record.get("ledger", str)):
        record.refuse(f"the ledger of step {step} is no number of 16 digits")


def has_average(checkpoint: Path) -> bool:
    """True for a checkpoint with an average of the towers' weights (train.ema_decay)."""
    return bool(_averaged(checkpoint))


def load(checkpoint: Path, parts: Trainable, mesh: Mesh, classes: ClassMap | None = None) -> None:
    """Loads what `parts` asks for, at whatever layout the ranks have now; collective.

    Without a tower_optimizer the towers take the average of the weights, if there is one. An `ema` that the checkpoint
    lacks starts anew from the weights that it has. With `classes` rows and their optimizer state follow the class keys;
    those of new classes stay as they are.

    Raises:
        UserError: its tensors are others than those of this model, or not finite.
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
        elif parts.ema is not None:  # with what may be the very tensors that it has
            for key, average in loaded["average"].items():
                parts.ema.state[key.removeprefix(AVERAGE)].copy_(average)
        if parts.head is not None:
            _load_head(checkpoint / "head", parts.head, parts.row_optimizer, mesh, classes)
    if not _finite(parts, mesh):
        raise UserError(
            f"{checkpoint}: a weight is not finite, or beyond {LARGEST_WEIGHT:g}",
            "An earlier version saved it so: move it elsewhere, then start again with the checkpoint before",
        )
    mesh.barrier()


def _model_state(towers: nn.Module, mesh: Mesh) -> dict[str, Any]:
    """The towers' parameters as megatron-core ShardedTensors; keys are the state names of the plain twin.

    Without the `_extra_state` of megatron-core's linear layers, which is empty and which plain ones do not have.
    """
    state = towers.state_dict(keep_vars=True)
    return _sharded({k: v for k, v in state.items() if not k.endswith("_extra_state")}, "", towers, mesh)


def _average_state(parts: Trainable, mesh: Mesh) -> dict[str, Any]:
    """The entry of a checkpoint of towers for parts.ema; none where that is None."""
    return {} if parts.ema is None else {"average": _sharded(parts.ema.state, AVERAGE, parts.towers, mesh)}


def _memory_state(parts: Trainable, mesh: Mesh) -> dict[str, Any]:
    """The entry for parts.memory, which is the same on every rank; none where that is None."""
    if parts.memory is None:
        return {}
    return {"memory": _sharded(parts.memory.state_dict(), MEMORY, parts.memory, mesh)}


def _averaged(checkpoint: Path) -> list[str]:
    """Names of the parameters of which a checkpoint holds the average."""
    keys = dist_checkpointing.load_tensors_metadata(str(checkpoint / "towers"))
    return [key.removeprefix(AVERAGE) for key in keys if key.startswith(AVERAGE)]


def _sharded(tensors: Mapping[str, torch.Tensor], prefix: str, towers: nn.Module, mesh: Mesh) -> dict[str, Any]:
    """`tensors`, cut like the parameters of `towers` that have their names, as ShardedTensors with the keys prefix +
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
    """Every tensor with an entry for each local row, by its name in a checkpoint."""
    return {"rows": head.rows, **({} if optimizer is None else optimizer.row_state())}


def _logical(local: torch.Tensor, num_classes: int, mesh: Mesh) -> DTensor:
    """Shards in torch.chunk's ranges over the row group, also empty ones, as one logical [num_classes, ...] tensor."""
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
        # One tensor at a time in the ranges of before, so that no more than one shard lies in memory twice.
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
        raise UserError(f"{checkpoint} does not fit this model ({_said(first)})", "Name another checkpoint") from error


def _said(error: BaseException) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch says how to read it all the same
        return "a file that should hold tensors holds other objects"
    return printable(f"{type(error).__name__}: {' '.join(str(error).split())}")


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """A full or failing disk becomes a UserError; both libraries wrap what the system said in exceptions of their own."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException, dist_checkpointing.core.CheckpointingException) as error:
        full = os.strerror(errno.ENOSPC) in str(error) or shutil.disk_usage(folder.parent).free < 1 << 20
        if isinstance(error, RuntimeError) and not full:
            raise
        shutil.rmtree(folder, ignore_errors=True)  # half a checkpoint would only hold the space
        what = "the disk is full" if full else str(error).strip().splitlines()[-1]
        raise UserError(f"checkpoint {folder} was not written: {what}", "Earlier checkpoints are untouched") from error
