"""Check of a .metadata file before torch.distributed.checkpoint reads it: a pickle, which could run anything, may build
nothing but this format.

The check unpickles it with stand-ins for all classes, by an unpickler that knows only the opcodes which such a file
needs. What passes has only tensors, in files beside it: the library would unpickle any other object of a checkpoint
without a restriction.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any

import torch

LARGEST = 1 << 30  # bytes; that of 10,000 ranks has 1e8
_NAMES = {
    "pathlib": "PosixPath",
    "torch": "Size",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.distributed.checkpoint.metadata": "ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties TensorStorageMetadata "
    "_MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.planner": "SavePlan TensorWriteData WriteItem WriteItemType",
    "torch.serialization": "_get_layout",
}
_ALLOWED = {(module, name) for module, names in _NAMES.items() for name in names.split()}
_OPCODE_NAMES = (
    "PROTO FRAME STOP MEMOIZE BINGET LONG_BINGET MARK TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM "
    "SETITEMS NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 SHORT_BINUNICODE BINUNICODE STACK_GLOBAL NEWOBJ REDUCE BUILD"
)
_OPCODES = {ord(opcode.code) for opcode in pickletools.opcodes if opcode.name in _OPCODE_NAMES.split()}
_DATA = re.compile(r"__[0-9]+_[0-9]+\.distcp")


def metadata_problem(file: Path) -> str:
    """Names what a .metadata file holds besides tensors in files beside it; empty if nothing. Nothing of it is run."""
    try:
        if file.stat().st_size > LARGEST:
            return f"{file.name} is larger than {LARGEST:,} bytes"
        content = file.read_bytes()
        top = _Reader(io.BytesIO(content)).load()
        if type(top).__name__ != "Metadata":
            return f"{file.name} is no checkpoint's"
        for key, entry in top.state_dict_metadata.items():
            if type(key) is not str or type(entry).__name__ != "TensorStorageMetadata":
                return f"{file.name} lists what is no tensor"
        for place in top.storage_data.values():
            if not _DATA.fullmatch(place.relative_path) or hasattr(place, "transform_descriptors"):
                return f"{file.name} names another file than those of tensors"
        pickle.loads(content)  # what these classes do not take is met here, where it is told in a line
    except Exception as error:  # what an arbitrary file can do is arbitrary
        return f"{file.name} is damaged, or holds what no checkpoint needs ({' '.join(str(error).split())[:80]})"
    return ""


def _stand_in(name: str) -> type:
    """A class of that name whose objects hold what the file gives them, and do nothing; the class itself cannot be
    changed.
    """

    def new(cls: type, *args: Any) -> Any:
        return object.__new__(cls)

    def set_state(self: Any, state: Any) -> None:
        if name != "TensorProperties":  # its state is a tuple, of which nothing is asked here
            vars(self).update(state)

    return type(name, (), {"__new__": new, "__setstate__": set_state})


class _Reader(pickle._Unpickler):
    """An unpickler in Python, for the one in C takes memory at a word of the file: the allowed opcodes, and stand-ins
    of the allowed classes.
    """

    dispatch = {code: pickle._Unpickler.dispatch[code] for code in _OPCODES}  # noqa: RUF012

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED and not (
            module == "torch" and type(getattr(torch, name, None)) is torch.dtype
        ):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return _stand_in(name)

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("a persistent id")
