"""Rows of a checkpoint, read from the file into the tensor that they belong to.

torch.distributed.checkpoint unpickles each saved tensor whole before it takes its part: a rank of a smaller group would
hold another one's share beside its own. Here it holds nothing more, on a GPU one piece.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _create_file_view
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

PIECE = 1 << 26  # bytes on the host, for a tensor that lies elsewhere
_RECORD = "data/0"  # of a file by torch.save with one tensor: its numbers


class RowReader(FileSystemReader):
    """Reads folders in torch's format. What is not a range of whole rows of its own type is read torch's way."""

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Takes the description of all tensors."""
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        self._saved = metadata.state_dict_metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fills this rank's tensors."""
        rest = [item for item in plan.items if not self._read(item, planner.resolve_tensor(item).detach())]
        return super().read_data(replace(plan, items=rest), planner)

    def _read(self, item: ReadItem, into: Tensor) -> bool:
        """Fills `into` with the rows of `item`; False if they are not whole rows."""
        saved = self._saved[item.storage_index.fqn]
        if not isinstance(saved, TensorStorageMetadata) or saved.properties.dtype != into.dtype or not into.dim():
            return False
        if item.lengths[1:] != saved.size[1:]:
            return False
        chunk = next(chunk for chunk in saved.chunks if chunk.offsets == item.storage_index.offset)
        row = math.prod(saved.size[1:]) * into.itemsize
        place = self.storage_data[item.storage_index]
        with (self.path / place.relative_path).open("rb", buffering=0) as file:
            view: Any = _create_file_view(file, place.offset, place.length)
            try:
                records: Any = torch._C.PyTorchFileReader(view)
                size = records.get_record_size(_RECORD)
            except RuntimeError:  # not a file of one tensor: torch's way has the words for it
                return False
            if size != chunk.sizes[0] * row:
                return False
            file.seek(place.offset + records.get_record_offset(_RECORD) + item.storage_offsets[0] * row)
            for piece in into.split(max(1, PIECE // max(row, 1))):
                direct = piece.device.type == "cpu" and piece.is_contiguous()
                host = piece if direct else torch.empty(piece.shape, dtype=piece.dtype)
                numbers: Any = host.view(torch.uint8).flatten().numpy()
                left = memoryview(numbers)
                while left:
                    if not (got := file.readinto(left)):
                        raise ValueError(f"{place.relative_path} ends early")
                    left = left[got:]
                if not direct:
                    piece.copy_(host)
        return True
