"""Folders of checkpoints: the newest complete one, those that are kept, and checks before anything is loaded.

A checkpoint may come from somebody else: `problem` tells whether it is complete, and that nothing in it would run code
when a library unpickles it. Format: `harness.train.checkpoint`.
"""

from __future__ import annotations

import errno
import math
import os
import pickle
import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from harness.core.cli import nearest
from harness.core.errors import UserError
from harness.core.files import Record, printable, read_json, read_record, write_json, write_whole
from harness.core.manifest import at_first, file_sizes, verify
from harness.core.mesh import Mesh
from harness.core.waiting import on_first_rank
from harness.train.dcp_metadata import metadata_problem

LEAST_FREE = 1 << 20  # bytes: for the small files of a checkpoint
LONGEST_LEDGER = 1 << 16  # steps whose samples a resume may have to draw again
_DELETING = "delete-checkpoints"  # name of a thread
_STEP, _UNFINISHED, _DELETED = r"step-([0-9]{8,})", r"step-([0-9]{8,})\.tmp", r"\.step-([0-9]{8,})\.(?:old|replaced)"
_LIBRARY_STATE = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_FILE = re.compile(
    r"state\.json|classes\.parquet|towers/(metadata\.json|common\.pt)"
    r"|(towers|head)/(\.metadata|__[0-9]+_[0-9]+\.distcp)"
)
BEST = "best.json"
WHOLE: set[Path] = set()  # checkpoints that this process has written or found whole, the same on every rank


def _steps(folder: Path, names: str) -> list[Path]:
    """Entries of `folder` whose names match the pattern, the newest first; its first group is the step."""
    if not folder.is_dir():
        return []
    found = [(match, path) for path in folder.iterdir() if (match := re.fullmatch(names, path.name))]
    return [path for _, path in sorted(found, key=lambda pair: (int(pair[0][1]), pair[0][0]), reverse=True)]


@dataclass(frozen=True)
class Keep:
    """Checkpoints that are kept: the `newest`, the best one, and those at multiples of `every` steps (0: none)."""

    newest: int
    every: int = 0

    def beyond(self, steps: list[Path]) -> list[Path]:
        """Those of `steps`, checkpoints of one folder, that are neither the best nor at a multiple of `every`."""
        best = best_of(steps[0].parent) if steps else None
        return [path for path in steps if path != best and not (self.every and _step(path) % self.every == 0)]


def best_of(folder: Path) -> Path | None:
    """The best checkpoint under `folder` (train.keep_best); None if none was noted.

    Raises:
        UserError: best.json is damaged.
    """
    record = _best(folder)
    return None if record is None else folder / record.get("checkpoint", str)


def note_best(folder: Path, step: int, metric: str, figures: Mapping[str, float]) -> None:
    """Notes the checkpoint of `step` as the best one under `folder`, if its figure `metric` is the highest so far.

    Raises:
        UserError: there is no such figure.
    """
    if metric not in figures:
        raise UserError(f"train.keep_best is '{metric}', which is not a figure here", nearest(metric, figures))
    before = _best(folder)
    known = before is not None and before.get("metric", str) == metric
    if math.isnan(figures[metric]) or (before and known and before.get("value", float) >= figures[metric]):
        return
    write_json(folder / BEST, {"checkpoint": f"step-{step:08d}", "metric": metric, "value": figures[metric]})


def steps_since_best(folder: Path, step: int) -> int:
    """Steps from the best checkpoint under `folder` to `step`; all of them where none was noted. Negative where an
    earlier process went on to a better one.
    """
    best = best_of(folder)
    return step - (0 if best is None else _step(best))


def _best(folder: Path) -> Record | None:
    if not (folder / BEST).exists():
        return None
    record = read_record(folder / BEST, "Remove it: the next evaluation writes it again")
    if not re.fullmatch(_STEP, record.get("checkpoint", str)):
        record.refuse("checkpoint is not the name of a step folder")
    return record


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def known_whole(folder: Path) -> list[Path]:
    """Checkpoints under `folder` that this process has written or found whole, the newest first."""
    return [path for path in _steps(folder, _STEP) if path in WHOLE]


def make_room(folder: Path) -> None:
    """Makes `folder`, for a checkpoint to be written; waits until old ones are deleted, for the room on the disk.

    Raises:
        OSError: the disk is full.
    """
    for thread in threading.enumerate():
        if thread.name == _DELETING:
            thread.join()
    for names in (_UNFINISHED, _DELETED):  # the previous process may have ended amid either
        for gone in _steps(folder.parent, names):
            shutil.rmtree(gone, ignore_errors=True)
    (folder / "towers").mkdir(parents=True)
    if shutil.disk_usage(folder).free < LEAST_FREE:  # here, where one rank's error is that of all
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def publish(temporary: Path, final: Path, keep: Keep) -> None:
    """Renames `temporary` to `final`, now the newest checkpoint, and deletes old ones beyond `keep` in a thread."""
    folder = final.parent
    if final.exists():
        final.rename(folder / f".{final.name}.replaced")
    temporary.rename(final)
    write_whole(folder / "latest", final.name)
    _retire(folder, keep, final)


def _retire(folder: Path, keep: Keep, written: Path) -> None:
    """Deletes checkpoints older than `written` and than the newest that are known to be whole, except what `keep`
    spares.
    """
    steps, kept = _steps(folder, _STEP), known_whole(folder)[: keep.newest]
    rest = steps[max(steps.index(kept[-1]), steps.index(written)) + 1 :] if len(kept) == keep.newest else []
    for old in keep.beyond(rest):
        if (old / "manifest.json").is_file() and not old.is_symlink():  # one of ours; a link is the user's
            old.rename(folder / f".{old.name}.old")

    def delete() -> None:
        for gone in _steps(folder, _DELETED):
            shutil.rmtree(gone, ignore_errors=True)

    threading.Thread(target=delete, name=_DELETING).start()  # not a daemon: the process waits for it at its end


def tidy(folder: Path, keep: Keep, resumed: Path, mesh: Mesh) -> None:
    """Completes the last save of a process that was killed, and deletes checkpoints beyond a smaller `keep`;
    collective.

    With more checkpoints than that, the newest are read and compared with their manifests until as many of them are
    known to be whole.
    """
    steps = at_first(lambda: _steps(folder, _STEP), mesh, "listing checkpoints")
    if at_first(lambda: len(keep.beyond(steps)), mesh, "listing checkpoints") > keep.newest:
        for path in steps:
            if sum(step in WHOLE for step in steps) < keep.newest and path not in WHOLE and not problem(path, mesh):
                WHOLE.add(path)

    def end() -> None:
        write_whole(folder / "latest", resumed.name)
        _retire(folder, keep, resumed)

    on_first_rank(end, mesh, "removing old checkpoints")


def newest(folder: Path, mesh: Mesh | None = None, head: bool = True) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint under `folder`, and a sentence for each that was passed over.

    With `mesh` collective, and the same on every rank: each reads its share of the files. Other names than those of
    checkpoints are ignored. `head`: see `problem`.
    """
    passed_over: list[str] = []
    for candidate in at_first(lambda: _steps(folder, rf"{_STEP}(?:\.tmp)?"), mesh, "listing checkpoints"):
        wrong = "never finished" if candidate.suffix == ".tmp" else problem(candidate, mesh, head)
        if not wrong:
            WHOLE.update({candidate} if head else ())
            return candidate, passed_over
        WHOLE.discard(candidate)
        passed_over.append(f"{candidate.name}: {wrong}")
    return None, passed_over


def problem(checkpoint: Path, mesh: Mesh | None = None, head: bool = True) -> str:
    """Reason why a checkpoint cannot be loaded: a file that is damaged, or that would run code; empty if it can.

    With `mesh` collective, as `harness.core.manifest.verify`, and the same on every rank. Without `head`, for who does
    not load the class rows, most of the bytes, or hashes them while loading, their files are not read; their sizes are
    compared.
    """
    wrong = verify(checkpoint, mesh, lambda name: head or not name.startswith("head/__"))
    return wrong or at_first(lambda: _odd(checkpoint), mesh, "reading what the checkpoint says")


def _odd(checkpoint: Path) -> str:
    """Content of a checkpoint that none of ours has, though its manifest may list it, in words; empty if none."""
    try:
        for name in file_sizes(checkpoint):
            if not _FILE.fullmatch(name):  # not one of ours, but a library may read it: torch unpickles __0.metadata
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
        return reason(error)
    for part in ("towers", "head"):
        if (checkpoint / part).is_dir() and (wrong := metadata_problem(checkpoint / part / ".metadata")):
            return f"{part}/{wrong}"
    return ""


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Reads the state.json of a checkpoint.

    Raises:
        UserError: there is none, or a value is missing or of another type.
    """
    record = read_record(checkpoint / "state.json", f"{checkpoint} is not a checkpoint: name a step-N folder of a run")
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
        record.refuse(f"the ledger of step {step} is not a number of 16 digits")


def reason(error: BaseException) -> str:
    """An error on reading a checkpoint, in words."""
    if isinstance(error, pickle.UnpicklingError):  # torch's own text says how to read it all the same
        return "a file that should hold tensors holds other objects"
    return printable(f"{type(error).__name__}: {' '.join(str(error).split())}")
