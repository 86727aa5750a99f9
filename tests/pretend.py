"""A pretend device: its tensors are CPU tensors in disguise; operations that would fail on a GPU fail, waits are
listed.

torch's private-use backend, filled in Python. Inside `Pretend()`
    mixing the devices raises, also an index on the host, which CUDA would copy over with a wait;
    a CPU tensor in a collective raises, as with NCCL; tensors of the device go through the group's gloo;
    what makes the host wait for the device is listed in `waits`.
Of the kernels only the class-parallel head's are launched by hand: their twin stands in for them (`launched`).
It changes its process for good, and must be there before the first backward, so it runs in ranks of its own:
tests.pool.ranks(n, "pretend").
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
from torch.utils.weak import WeakTensorKeyDictionary

from harness.data.step_data import StepData
from models import megatron_cpu
from models.batch import TENSORS
from models.comm import share
from models.heads import class_parallel
from tests.measured import TINY, step_of

DEVICE = torch.device("privateuseone", 0)
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]

_SMALL = TINY | {
    "model.text.hidden_size": 32,
    "model.text.num_layers": 1,
    "model.text.max_length": 12,
    "data.queries_per_step": 4,
    "data.documents_per_step": 6,
    "train.ema_decay": 0.9,
    "optimizer.clip_norm": 0.01,
}
_VISION = {"model.vision.hidden_size": 32, "model.vision.num_layers": 1}
_MASKED = _SMALL | {"data.masking.word_rate": 0.25, "num_classes": 50}
RECIPES: dict[str, dict[str, Any]] = {
    "oclear": _SMALL | _VISION | {"num_classes": 9000, "head.sample_rate": 0.1},
    "make": _MASKED
    | _VISION
    | {
        "method": "make",
        "evaluation.query_attributes": ["colour"],
        "model.query.num_layers": 1,
        "model.fusion.num_layers": 1,
        "model.num_keywords": 20,
        "model.memory_bank": 16,
        "model.memory_after": 5,
        "model.qic.symmetric": True,
    },
    "item": _MASKED | {"method": "item", "model.weights.contrast": 1.0},
}
RECIPES |= {
    "oclear, all classes": RECIPES["oclear"] | {"head.sample_rate": 1.0},
    "oclear, bf16, dropout, 8-bit rows": RECIPES["oclear"]
    | {"train.precision": "bf16", "model.text_dropout": 0.3, "model.vision.drop_path": 0.2, "head.row_dtype": "bf16"}
    | {"optimizer.rows.state": "8bit", "optimizer.rows.bf16_rows": "stochastic", "optimizer.rows.weight_decay": 0.1},
    "oclear, contrastive": RECIPES["oclear"] | {"model.objective": "contrastive"},
    "oclear, sum, sides and pairs": RECIPES["oclear"]
    | {
        "model.fusion_kind": "sum",
        "model.image_anchor": 0.5,
        "model.document_share": 0.5,
        "model.contrast_weight": 1.0,
        "model.contrast_margin": 0.1,
        "model.wrong_texts": True,
        "model.fused_stop_gradient": True,
    },
    "make, hidden words, equal weights": RECIPES["make"] | {"model.hide_words": True, "model.modalities": "equal"},
    "item, all targets": RECIPES["item"] | {"model.global_targets": "all", "model.aligned": True},
}


def cases(*layouts: tuple[int, int]) -> list[Any]:
    """(world, tensor_parallel, name of a recipe): all recipes on the first layout, the three methods on the second, the
    rest in the full run.
    """
    found = []
    for number, layout in enumerate(layouts):
        for place, name in enumerate(RECIPES):
            quick = number == 0 or (number == 1 and place < 3)
            found.append(pytest.param(*layout, name, marks=() if quick else pytest.mark.full))
    return found


# The host asks for a number, or for a shape, that only the device knows.
_ASKING = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "bincount", "histc", "_unique2", "unique_dim")
# Beside tensors of the device CUDA takes a single number on the CPU, but not here.
_NO_SCALARS = ("cat", "stack", "index", "index_copy_", "index_select", "scatter_", "gather")


class OnDevice(Tensor):
    """A tensor of the pretend device; `raw` is its data."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> OnDevice:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=DEVICE
        )

    def __init__(self, raw: Tensor) -> None:
        self.raw = raw

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on the pretend device, but outside of Pretend()")

    @property
    def data(self) -> Tensor:
        with torch.no_grad():
            return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, OnDevice):
            raise RuntimeError(f"data on {value.device} for a tensor on {DEVICE}")
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.raw = value.raw

    def tolist(self) -> Any:
        return self.cpu().tolist()


class Pretend(TorchDispatchMode):
    """See the module docstring.

    Attributes:
        waits: of every wait of the host, in order, the file of ours that asked for it, and the operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._pinned = WeakTensorKeyDictionary()
        self._patches = [
            mock.patch.object(class_parallel, "_kernel", lambda rows: _Kernels),
            mock.patch.object(megatron_cpu, "device", DEVICE),
            mock.patch.object(nn.Module, "_apply", _moved),
        ]

    def __enter__(self) -> Pretend:
        _register()
        for patch in self._patches:
            patch.start()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(x, device=...) is a copy that can be seen
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)
        for patch in self._patches:
            patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name == "_pin_memory":
            pinned = args[0].clone()
            self._pinned[pinned] = True
            return pinned
        if name == "is_pinned":
            return args[0] in self._pinned
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        host = [x for x in tensors if not isinstance(x, OnDevice)]
        here = len(host) < len(tensors)
        asked = kwargs.get("device")
        to_device = here if asked is None else torch.device(asked).type == DEVICE.type
        if func.namespace == "c10d" and host and not _of_objects():
            raise RuntimeError(f"{func}: a CPU tensor in a collective of the device")
        if here and name != "copy_" and any(x.dim() or name in _NO_SCALARS for x in host):
            raise RuntimeError(f"{func}: tensors of both devices, on the CPU {[tuple(x.shape) for x in host]}")
        if self._waits(name, args, kwargs, here, host, to_device):
            self.waits.append(f"{_file()} {name}")
        return _run(func, args, kwargs, to_device)

    def _waits(self, name: str, args: Any, kwargs: Any, here: bool, host: list[Tensor], to_device: bool) -> bool:
        if name == "_to_copy" and here != to_device:
            return here or not (kwargs.get("non_blocking") and args[0] in self._pinned)
        if name == "copy_" and here and host:
            return args[1] is not host[0] or not (True in args[2:] and host[0] in self._pinned)
        if not here:
            return False
        if name in ("index", "index_put", "index_put_"):
            mask = any(i is not None and i.dtype == torch.bool for i in args[1])
            # CUDA makes a masked_fill of a mask and one number; one number for other places it copies to the device.
            return mask if name == "index" else mask != (not args[2].dim())
        if name == "repeat_interleave":
            return kwargs.get("output_size") is None
        return name in _ASKING


class _Backend(_DummyBackendModule):
    """The functions that torch calls in a device's module."""

    get_rng_state, set_rng_state = staticmethod(torch.get_rng_state), staticmethod(torch.set_rng_state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


@functools.cache
def _register() -> None:
    _setup_privateuseone_for_python_backend("pretend", _Backend())


def _run(func: Callable[..., Any], args: Any, kwargs: Any, to_device: bool) -> Any:
    """`func` on the data; what it gives back of its arguments are the same objects again."""
    owners: dict[int, OnDevice] = {}

    def bare(x: Any) -> Any:
        if isinstance(x, OnDevice):
            owners[id(x.raw)] = x
            return x.raw
        return CPU if isinstance(x, torch.device) and x.type == DEVICE.type else x

    def dressed(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, OnDevice) or not to_device:
            return x
        return owners[id(x)] if id(x) in owners else OnDevice(x)

    args, kwargs = pytree.tree_map(bare, (args, kwargs))
    return pytree.tree_map(dressed, func(*args, **kwargs))


def launched(twin: Callable[..., Any]) -> Callable[..., Any]:
    """`twin` as a kernel: all its tensors must be on the device, and nothing inside it is seen."""

    def launch(*args: Any) -> Any:
        if any(isinstance(x, Tensor) and not isinstance(x, OnDevice) for x in args):
            raise RuntimeError(f"{twin.__name__}: a CPU tensor for a kernel")
        with _disable_current_modes():
            return _run(twin, args, {}, True)

    return launch


class _Kernels:
    """Stands for the Triton kernels of the class-parallel head."""

    cosine_lse = staticmethod(launched(class_parallel.twin.cosine_lse))
    cosine_lse_backward = staticmethod(launched(class_parallel.twin.cosine_lse_backward))


_apply = nn.Module._apply


def _moved(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply, which makes new parameters here where it would fill the old ones on CUDA: they keep
    megatron-core's marks.
    """
    before = {name: dict(vars(p)) for name, p in module._parameters.items() if p is not None}
    _apply(module, function, recurse)
    for name, marks in before.items():
        vars(module._parameters[name]).update((key, mark) for key, mark in marks.items() if key != "raw")
    return module


def _of_objects() -> bool:
    """True for a collective of Python objects, which go over gloo on a GPU too."""
    return any("_object" in frame.name and "distributed" in frame.filename for frame in traceback.extract_stack())


def _file() -> str:
    """The file of ours that is being run."""
    for frame in reversed(traceback.extract_stack()):
        file = Path(frame.filename)
        if ROOT in file.parents and ".venv" not in file.parts and file != Path(__file__):
            return str(file.relative_to(ROOT))
    return "?"


@contextmanager
def on_pretend_device(mesh: Any) -> Iterator[Pretend]:
    """Inside, `mesh` has the pretend device, and megatron-core takes it for CUDA's."""
    before, mesh.device = mesh.device, DEVICE
    try:
        with Pretend() as pretend:
            yield pretend
    finally:
        mesh.device = before


def own_step(config: Any, num_classes: int, mesh: Any, known: bool = True) -> StepData:
    """This rank's part of a drawn step of two micro-batches: one sample of the first rank only, then the rest of all.

    Each knows how many the others have if they are `known`, as from the loader.
    """
    torch.manual_seed(1)
    whole = step_of(config, num_classes, 1)
    (batch,), ranks, rank = whole.batches, mesh.dp.size(), mesh.dp.rank()
    batches = []
    for rest in (False, True):
        places: dict[str, slice] = {}
        sizes: dict[str, list[int]] = {}
        for side in ("query", "document"):
            n = len(getattr(batch, f"{side}_labels"))
            one = min(1, n)
            sizes[side] = [len(share(n - one, ranks, r)) for r in range(ranks)] if rest else [one] + [0] * (ranks - 1)
            start = rest * one + sum(sizes[side][:rank])
            places[side] = slice(start, start + sizes[side][rank])
        own = {name: getattr(batch, name)[places["query" if "query" in name else "document"]] for name in TENSORS}
        batches.append(replace(batch, **own, sizes=sizes if known else None))
    return replace(whole, batches=batches)
