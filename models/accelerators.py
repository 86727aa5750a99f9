"""Choice of fused kernels: NVIDIA's TransformerEngine and apex, where their installation works.

megatron-core checks at its import whether packages of those names exist. A TransformerEngine without its libraries then
ends the import, and a foreign package named apex (PyPI's is one) passes for NVIDIA's. So megatron-core is imported with
both hidden, and the chosen kernels are set afterwards. Never run on a machine that has these packages.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ADAM = {"transformer_engine": "transformer_engine.pytorch.optimizers", "apex": "apex.optimizers"}  # in order of choice
LAYER_NORM = ("apex.normalization.fused_layer_norm", "fused_layer_norm_affine")

# (x [..., h], weight [h], bias [h], (h,), eps) -> [..., h]
LayerNormFunction = Callable[[Tensor, Tensor, Tensor, Any, float], Tensor]


@dataclass(frozen=True)
class Accelerators:
    """Accelerators of a run: source of Adam (torch, transformer_engine or apex), fused layer norm (None: torch's), and
    a line for the log with the reasons.
    """

    adam: str
    adam_class: Any
    layer_norm: LayerNormFunction | None
    line: str


@contextmanager
def hidden() -> Iterator[None]:
    """Inside, importing TransformerEngine or apex fails as if they were not installed."""
    names = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C")
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def choose(which: str, device: torch.device) -> Accelerators:
    """Chooses the accelerators: for `which` auto the first working package, or torch without one or on a CPU; for torch
    torch.

    A package works if one call on a small tensor on `device` succeeds: an apex without its CUDA extensions imports, and
    raises at its first call.
    """
    adam: str = "torch"
    adam_class: Any = torch.optim.AdamW
    layer_norm: LayerNormFunction | None = None
    notes: list[str] = []
    if which == "auto" and device.type != "cpu":
        for package, module in ADAM.items():
            found, problem = _found(module, "FusedAdam", _try_adam, device)
            notes += [f"{module}.FusedAdam: {problem}"] if problem else []
            if found is not None:
                adam, adam_class = package, found
                break
        layer_norm, problem = _found(*LAYER_NORM, _try_layer_norm, device)
        notes += [f"{'.'.join(LAYER_NORM)}: {problem}"] if problem else []
    norm = "torch" if layer_norm is None else "apex"
    line = "; ".join([f"accelerators ({which}): Adam {adam}, layer norm {norm}", *notes])
    return Accelerators(adam, adam_class, layer_norm, line)


def use_adam(chosen: Accelerators) -> None:
    """Sets the globals from which megatron-core's optimizers take their Adam. Call before building one."""
    names = ("megatron.core.optimizer", "megatron.core.optimizer.distrib_optimizer")
    optimizers, distributed = (importlib.import_module(name) for name in names)
    for module in (optimizers, distributed):
        module.Adam = chosen.adam_class  # type: ignore[attr-defined]
    optimizers.USING_PYTORCH_OPTIMIZER = chosen.adam == "torch"  # type: ignore[attr-defined]
    distributed.HAVE_APEX_OR_TE = chosen.adam != "torch"  # type: ignore[attr-defined]
    distributed.USING_TE_OPTIMIZER = chosen.adam == "transformer_engine"  # type: ignore[attr-defined]
    distributed.USING_APEX_OPTIMIZER = chosen.adam == "apex"  # type: ignore[attr-defined]


def _found(
    module: str, name: str, attempt: Callable[[Any, torch.device], None], device: torch.device
) -> tuple[Any, str]:
    """The object, or None and the reason; a broken package may raise anything."""
    try:
        found = getattr(importlib.import_module(module), name)
        attempt(found, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # kernels fail when they run
        return found, ""
    except Exception as error:
        first = str(error).splitlines()[:1]
        return None, " ".join([type(error).__name__, *first])


def _try_adam(adam: Any, device: torch.device) -> None:
    weight = torch.nn.Parameter(torch.ones(64, device=device))
    weight.grad = torch.ones_like(weight)
    adam([weight], lr=0.1).step()


def _try_layer_norm(layer_norm: LayerNormFunction, device: torch.device) -> None:
    x, weight, bias = (torch.ones(shape, device=device, requires_grad=True) for shape in ((2, 64), 64, 64))
    layer_norm(x, weight, bias, (64,), 1e-5).sum().backward()
    if x.grad is None or weight.grad is None or bias.grad is None:
        raise RuntimeError("its backward leaves no gradients")
