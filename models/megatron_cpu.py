"""Lets megatron-core 0.16 run on a CPU.

megatron-core writes `torch.cuda.current_device()`, `device='cuda'` and `'torch.cuda.FloatTensor'` into a few modules
that otherwise need no GPU. torch itself is never patched: in each module named in `PATCHED` the global name `torch` is
a proxy that answers those three for the CPU. Our own attention core, norm, clipping and loop keep the list short.
Source: ours.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from models import accelerators

# module -> why it needs the proxy. tests/test_megatron_cpu.py fails when one of them no longer mentions CUDA.
PATCHED = {
    "megatron.core.tensor_parallel.random": "RNG tracker reads and writes the CUDA generator",
    "megatron.core.tensor_parallel.layers": "buffers of sequence parallelism allocated on torch.cuda.current_device()",
    "megatron.core.tensor_parallel.mappings": "gathered and scattered tensors allocated on torch.cuda.current_device()",
    "megatron.core.utils": "global memory buffer allocated on torch.cuda.current_device()",
    "megatron.core.distributed.param_and_grad_buffer": "buffers allocated on torch.cuda.current_device()",
    "megatron.core.optimizer.optimizer": "found_inf lives on 'cuda'",
    "megatron.core.optimizer.distrib_optimizer": "state shards allocated on torch.cuda.current_device()",
    "megatron.core.dist_checkpointing.exchange_utils": "exchange buffers on 'cuda'",
    "megatron.core.dist_checkpointing.strategies.fully_parallel": "exchange buffers on 'cuda'",
}

# The rest of megatron-core that we import: all of it is loaded at once, where TransformerEngine and apex are hidden.
USED = (
    "megatron.core.transformer.attention",
    "megatron.core.transformer.mlp",
    "megatron.core.transformer.transformer_block",
    "megatron.core.dist_checkpointing",
)

_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}
device = torch.device("cpu")
"""Device that stands for megatron-core's 'cuda'; a test's pretend device takes its place."""
_FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange", "empty_like", "zeros_like", "ones_like")


class _CpuCuda(types.ModuleType):
    """Stand-in for torch.cuda in one patched module."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        return device

    @staticmethod
    def synchronize(*_: Any) -> None:
        """Does nothing: a CPU runs nothing ahead."""

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    @staticmethod
    def get_rng_state(*_: Any) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, *_: Any) -> None:
        torch.set_rng_state(state)


class _CpuTorch(types.ModuleType):
    """Stand-in for torch in one patched module: `device='cuda'` means the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CpuCuda("torch.cuda")
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def build(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = device
        return factory(*args, **kwargs)

    return build


_replaced: dict[str, Any] = {}  # originals that `use_cpu` replaced, by name; empty while nothing is proxied


@functools.cache
def install() -> None:
    """Imports and patches megatron-core, once; for a CPU where torch sees no GPU. Call before using megatron-core."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Transformer Engine and Apex are not installed"
        with accelerators.hidden():
            for name in (*USED, *PATCHED):
                importlib.import_module(name)
    # On a CPU the tracker's streams share torch's one generator, so its warning about that fires at every fork.
    rng = logging.getLogger("megatron.core.tensor_parallel.random")
    rng.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
    use_cpu(not torch.cuda.is_available())


def use_cpu(cpu: bool) -> None:
    """Installs the proxies of `PATCHED`, or puts torch back. Decided by the device of the run, not by the machine."""
    if cpu == bool(_replaced):
        return
    rng: Any = sys.modules["megatron.core.tensor_parallel.random"]
    if cpu:
        _replaced.update(get=rng._get_cuda_rng_state, set=rng._set_cuda_rng_state)
        rng._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
        rng._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    else:
        rng._get_cuda_rng_state, rng._set_cuda_rng_state = _replaced["get"], _replaced["set"]
        _replaced.clear()
    for name in PATCHED:
        sys.modules[name].torch = _CpuTorch() if cpu else torch  # type: ignore[attr-defined]


@contextlib.contextmanager
def cuda_type_names() -> Iterator[None]:
    """Context in which, on a CPU, `tensor.type()` reads like that of a CUDA tensor: megatron's optimizer sorts
    parameters by that string.
    """
    if not _replaced:
        yield
        return
    original = torch.Tensor.type

    def named(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None and self.dtype in _TYPE_NAMES:
            return _TYPE_NAMES[self.dtype]
        return original(self, dtype, *args, **kwargs)

    torch.Tensor.type = named  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]
