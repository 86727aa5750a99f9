"""Rows of a checkpoint, read from the file into the tensor that they belong to, and hashed on the way.

torch.distributed.checkpoint unpickles each saved tensor whole before it takes its part: a rank of a smaller group would
hold another one's share beside its own. Here it holds nothing more, on a GPU one piece.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _create_file_view
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

PIECE = 1 << 26  # bytes on the host, for a tensor that lies elsewhere
_CHUNK = 1 << 18  # bytes: what was read is still in the core's cache when it is hashed
_RECORD = "data/0"  # of a file by torch.save with one tensor: its numbers


class RowReader(FileSystemReader):
    """Reads folders in torch's format. What is not a range of whole rows of its own type is read torch's way.

    Attributes:
        sums: folder/file -> xxh3-64, of files whose first row is this rank's, so that one rank reads each to its end.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder
        self.sums: dict[str, str] = {}

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Takes the description of all tensors."""
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        self._saved = metadata.state_dict_metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fills this rank's tensors."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in sorted(plan.items, key=lambda item: self.storage_data[item.storage_index].offset):
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        rest = []
        for name, items in by_file.items():
            first = any(item.lengths and not item.storage_offsets[0] for item in items)
            with _Forwards(self.folder / name, first) as file:
                rest += [item for item in items if not self._read(item, planner.resolve_tensor(item).detach(), file)]
                if first:
                    self.sums[f"{self.folder.name}/{name}"] = file.checksum()
        return super().read_data(replace(plan, items=rest), planner)

    def _read(self, item: ReadItem, into: Tensor, file: _Forwards) -> bool:
        """Fills `into` with the rows of `item`; False if they are not whole rows."""
        saved = self._saved[item.storage_index.fqn]
        if not isinstance(saved, TensorStorageMetadata) or saved.properties.dtype != into.dtype or not into.dim():
            return False
        if item.lengths[1:] != saved.size[1:]:
            return False
        chunk = next(chunk for chunk in saved.chunks if chunk.offsets == item.storage_index.offset)
        row = math.prod(saved.size[1:]) * into.itemsize
        place = self.storage_data[item.storage_index]
        with file.path.open("rb", buffering=0) as whole:
            view: Any = _create_file_view(whole, place.offset, place.length)
            try:
                records: Any = torch._C.PyTorchFileReader(view)
                size, offset = records.get_record_size(_RECORD), records.get_record_offset(_RECORD)
            except RuntimeError:  # not a file of one tensor: torch's way has the words for it
                return False
        if size != chunk.sizes[0] * row or not file.go(place.offset + offset + item.storage_offsets[0] * row):
            return False
        for piece in into.split(max(1, PIECE // max(row, 1))):
            direct = piece.device.type == "cpu" and piece.is_contiguous()
            host = piece if direct else torch.empty(piece.shape, dtype=piece.dtype)
            numbers: Any = host.view(torch.uint8).flatten().numpy()
            file.fill(memoryview(numbers))
            if not direct:
                piece.copy_(host)
        return True


class _Forwards:
    """A file that is read forwards; where it is hashed, all of it."""

    def __init__(self, path: Path, hashed: bool) -> None:
        self.path, self._file, self._at = path, path.open("rb", buffering=0), 0
        self._digest = xxhash.xxh3_64() if hashed else None

    def __enter__(self) -> _Forwards:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def go(self, offset: int) -> bool:
        """Goes on to `offset`; False if that lies behind."""
        if offset < self._at:
            return False
        if self._digest is None:
            self._at = self._file.seek(offset)
        else:
            self._hash_to(offset)
        return True

    def fill(self, into: memoryview) -> None:
        """Reads on until `into` is full.

        Raises:
            ValueError: the file ends early.
        """
        for start in range(0, len(into), _CHUNK):
            left = piece = into[start : start + _CHUNK]
            while left:
                if not (got := self._file.readinto(left)):
                    raise ValueError(f"{self.path.name} ends early")
                left = left[got:]
            self._at += len(piece)
            if self._digest is not None:
                self._digest.update(piece)

    def checksum(self) -> str:
        """Reads to the end; the checksum of the whole file."""
        assert self._digest is not None, "a file that is hashed"
        self._hash_to(self.path.stat().st_size)
        return self._digest.hexdigest()

    def _hash_to(self, offset: int) -> None:
        buffer = memoryview(bytearray(min(_CHUNK, offset - self._at)))
        while self._at < offset:
            self.fill(buffer[: offset - self._at])
