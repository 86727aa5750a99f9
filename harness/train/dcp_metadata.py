"""Check of a .metadata file before torch.distributed.checkpoint reads it. The file is a pickle and could run any code.

The check unpickles it with stand-ins for all classes, by an unpickler that knows only the opcodes of this format. A
file that passes lists only tensors, in files beside it: the library would unpickle any other object without a
restriction.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any

import torch

LARGEST = 1 << 30  # bytes; the file of 10,000 ranks has 1e8
_NAMES = {
    "pathlib": "PosixPath",
    "torch": "Size",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.distributed.checkpoint.metadata": (
        "ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties TensorStorageMetadata "
        "_MEM_FORMAT_ENCODING"
    ),
    "torch.distributed.checkpoint.planner": "SavePlan TensorWriteData WriteItem WriteItemType",
    "torch.serialization": "_get_layout",
}
_ALLOWED = {(module, name) for module, names in _NAMES.items() for name in names.split()}
_OPCODE_NAMES = (
    "PROTO FRAME STOP MEMOIZE BINGET LONG_BINGET MARK TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS "
    "EMPTY_DICT SETITEM SETITEMS NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 SHORT_BINUNICODE BINUNICODE "
    "STACK_GLOBAL NEWOBJ REDUCE BUILD"
)
_OPCODES = {ord(opcode.code) for opcode in pickletools.opcodes if opcode.name in _OPCODE_NAMES.split()}
_DATA = re.compile(r"__[0-9]+_[0-9]+\.distcp")


def metadata_problem(file: Path) -> str:
    """Content of a .metadata file other than tensors in files beside it, in words; empty if none. Runs none of it."""
    try:
        if file.stat().st_size > LARGEST:
            return f"{file.name} is larger than {LARGEST:,} bytes"
        content = file.read_bytes()
        top = _Reader(io.BytesIO(content)).load()
        if type(top).__name__ != "Metadata":
            return f"{file.name} is not that of a checkpoint"
        for key, entry in top.state_dict_metadata.items():
            if type(key) is not str or type(entry).__name__ != "TensorStorageMetadata":
                return f"{file.name} lists what is not a tensor"
        for place in top.storage_data.values():
            if not _DATA.fullmatch(place.relative_path) or hasattr(place, "transform_descriptors"):
                return f"{file.name} names another file than those of tensors"
        pickle.loads(content)  # arguments that the real classes refuse are met here, where they make one line
    except Exception as error:  # an arbitrary file may cause any
        return f"{file.name} is damaged, or holds what no checkpoint needs ({' '.join(str(error).split())[:80]})"
    return ""


def _stand_in(name: str) -> type:
    """A class of that name whose objects hold what the file gives them and do nothing. The file cannot change the class
    itself.
    """

    def new(cls: type, *args: Any) -> Any:
        return object.__new__(cls)

    def set_state(self: Any, state: Any) -> None:
        if name != "TensorProperties":  # its state is a tuple, which the check does not need
            vars(self).update(state)

    return type(name, (), {"__new__": new, "__setstate__": set_state})


class _Reader(pickle._Unpickler):
    """Unpickler with the allowed opcodes and stand-ins of the allowed classes. In Python, because the one in C
    allocates as much memory as the file asks for.
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
