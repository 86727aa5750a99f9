"""The CPU proxy touches what it says, and nothing else: an upgrade of megatron-core fails here first."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch

from models import megatron_cpu


@pytest.mark.parametrize("name", megatron_cpu.PATCHED)
def test_every_patched_module_still_mentions_cuda(name: str) -> None:
    assert "cuda" in inspect.getsource(importlib.import_module(name)), f"{name} needs no proxy any more"


def test_torch_itself_is_left_alone() -> None:
    megatron_cpu.install()
    assert torch.Tensor.type.__qualname__ != "cuda_type_names.<locals>.named"
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError)):
            torch.cuda.current_device()
    with megatron_cpu.cuda_type_names():
        assert torch.ones(1).type().startswith("torch.cuda.")
        assert torch.ones(1, dtype=torch.int64).type().endswith("LongTensor")
    assert torch.ones(1).type() == "torch.FloatTensor" or torch.cuda.is_available()


def test_megatron_core_is_the_version_that_was_read() -> None:
    from importlib.metadata import version

    assert version("megatron-core") == "0.16.1"
