"""One folder of a checkpoint, in torch's format, written in three steps: planned by all ranks, written by each in any
thread, finished by all.

torch.distributed.checkpoint has the three in one call, and megatron-core forks a process for the second. Here a rank
hashes its file while it writes it, and holds no more than its own tensors: a copy of them on the host where it trains
on meanwhile, else one tensor at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import xxhash
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _write_item
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _DistWrapper


class FolderWriter:
    """Plans `folder` with all ranks; collective.

    Args:
        folder: of torch's format, made if it does not exist.
        state: name -> tensor, or this rank's shards of one.
        planner: of the library that made `state`.
        copies: copy this rank's tensors to the host's memory now, so that training may change them.

    Attributes:
        bytes: of the tensors that this rank writes.
        sums: folder/file of this rank -> (bytes, xxh3-64), once it is written.
    """

    def __init__(self, folder: Path, state: dict[str, Any], planner: SavePlanner, copies: bool) -> None:
        self.folder = folder
        self.sums: dict[str, tuple[int, str]] = {}
        self._writer, self._ranks = FileSystemWriter(folder), _DistWrapper(None, True, 0)
        self._metadata: Metadata | None = None
        self._results: list[WriteResult] = []
        self._error: Exception | None = None

        def own() -> SavePlan:
            first = self._ranks.is_coordinator
            planner.set_up_planner(state, self._writer.storage_meta(), first)
            self._writer.set_up_storage_writer(first)
            return self._writer.prepare_local_plan(planner.create_local_plan())

        def joined(plans: list[SavePlan]) -> list[SavePlan]:
            plans, self._metadata = planner.create_global_plan(plans)
            return self._writer.prepare_global_plan(plans)

        self._plan = planner.finish_plan(self._ranks.reduce_scatter("plan", own, joined))
        self._tensor: Callable[[WriteItem], Tensor] = planner.resolve_data  # type: ignore[assignment]
        if copies:
            held = {item.index: _on_host(planner.resolve_data(item), copy=True) for item in self._plan.items}
            self._tensor = lambda item: held.pop(item.index)  # its memory is free once it is written
        self.bytes = sum(_bytes(item) for item in self._plan.items)

    def write(self) -> None:
        """Writes this rank's file and flushes it to disk; in any thread. `finish` raises its errors."""
        try:
            self._write()
        except Exception as error:  # of the disk; the other ranks have to hear of it
            self._error = error

    def finish(self) -> None:
        """Lists the files of all ranks in .metadata; collective.

        Raises:
            CheckpointException: a rank could not write its file; on every rank.
        """

        def own() -> list[WriteResult]:
            if self._error is not None:
                raise self._error
            return self._results

        def joined(results: list[list[WriteResult]]) -> None:
            assert self._metadata is not None, "rank 0 has joined the plans"
            self._writer.finish(self._metadata, results)

        self._ranks.all_reduce("write", own, joined)

    def _write(self) -> None:
        if not self._plan.items:
            return
        name = f"{self._plan.storage_data.prefix}0.distcp"
        with (self.folder / name).open("wb") as file:
            stream: Any = _Hashed(file)
            for item in self._plan.items:
                tensor = _on_host(self._tensor(item))
                format = self._writer.serialization_format
                self._results.append(_write_item(self._writer.transforms, stream, tensor, item, name, format))
            file.flush()
            os.fsync(file.fileno())
        self.sums[f"{self.folder.name}/{name}"] = stream.size, stream.digest.hexdigest()


class _Hashed:
    """A file that hashes what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.size = file, xxhash.xxh3_64(), 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += self.file.write(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        pass


def _on_host(x: Any, copy: bool = False) -> Tensor:
    """`x` in the host's memory, without the rest of a storage that it is a view of, which torch.save would write."""
    x = x.detach().to("cpu", copy=copy)
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def _bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None, "a checkpoint holds nothing but tensors"
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
