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


def test_the_proxy_follows_the_device_that_a_run_chooses() -> None:
    from megatron.core.tensor_parallel import random

    def proxied() -> set[bool]:
        return {importlib.import_module(name).torch is not torch for name in megatron_cpu.PATCHED}

    assert proxied() == {True}
    reads, disabled = random._get_cuda_rng_state, torch._dynamo.config.disable
    try:
        megatron_cpu.use_cpu(False)
        assert proxied() == {False} and random._get_cuda_rng_state.__module__ == random.__name__
        with megatron_cpu.cuda_type_names():
            assert torch.ones(1).type() == "torch.FloatTensor"
        megatron_cpu.install()  # once is all: it must not decide again
        assert proxied() == {False}
    finally:
        megatron_cpu.use_cpu(True)
    assert proxied() == {True} and torch.equal(random._get_cuda_rng_state(), torch.get_rng_state())
    assert random._get_cuda_rng_state is not reads and torch._dynamo.config.disable == disabled


def test_megatron_core_is_the_version_that_was_read() -> None:
    from importlib.metadata import version

    assert version("megatron-core") == "0.16.1"
