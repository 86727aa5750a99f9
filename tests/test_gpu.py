"""Tests that need a GPU: the compiled kernels and the head on CUDA against the CPU. Skipped elsewhere;
`jobs/gpu_check.sh` runs them.

Needs no more than torch, triton and pytest.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from kernels.keyed import fill_normal, random_bits
from kernels.rounding import decode, encode
from models.heads.class_parallel import ClassHeadConfig, ClassParallelHead
from models.heads.row_optimizer import RowAdamW, RowOptimizerConfig
from models.heads.sampling import sampled_classes
from tests.kernel_error import draw, error_over_bound
from tests.row_updates import SETTINGS, updated

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "a", "d"), [(1, 37, 48), (300, 5_000, 256), (1024, 20_000, 512), (257, 3_001, 768)])
@pytest.mark.parametrize("filter_above", [1.0, 0.1])
def test_kernel_against_twin(dtype: torch.dtype, n: int, a: int, d: int, filter_above: float) -> None:
    """Fresh random inputs: the kernel is no further from float64 than its arithmetic makes it (tests/test_kernel.py
    tries the bound on a CPU).
    """
    from kernels import cosine_lse_triton as kernel

    seed = random.randrange(1 << 30)
    ratios = error_over_bound(kernel, draw(n, a, d, dtype, filter_above, seed, GPU))
    assert max(ratios.values()) <= 1, (seed, ratios)


def test_keys_and_codes_are_the_same_on_both_devices() -> None:
    for step in range(3):
        a, b = (sampled_classes(5, 50_000, 0.03, 1, step, device).cpu() for device in (CPU, GPU))
        assert torch.equal(a, b)
    keys = torch.arange(1_000) * 7919
    bits = random_bits(keys, 64)
    assert torch.equal(bits, random_bits(keys.to(GPU), 64).cpu())
    x = torch.randn(1_000, 64)
    for signed in (True, False):
        value = x if signed else x.abs()
        codes, scales = encode(value, bits, signed)
        for ours, theirs in zip(encode(value.to(GPU), bits.to(GPU), signed), (codes, scales), strict=True):
            assert torch.equal(ours.cpu(), theirs)
        assert torch.equal(decode(codes.to(GPU), scales.to(GPU), signed).cpu(), decode(codes, scales, signed))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("d", [1, 48, 300, 512, 768, 1024])
def test_the_row_update_gives_the_cpus_bits(d: int, setting: tuple[Any, ...]) -> None:
    """Moments, counts and what was paid to the last bit; rows up to roots and float64 functions, whose last bits are
    each device's own.
    """
    found, wanted = updated(d, setting, "cuda"), updated(d, setting)
    rows, wanted_rows = found.pop("rows").float(), wanted.pop("rows").float()
    if "master" in found:
        assert torch.equal(rows, found["master"].bfloat16().float())
        rows, wanted_rows = found.pop("master"), wanted.pop("master")
    for name, value in wanted.items():
        assert torch.equal(found[name], value), (name, int((found[name] != value).sum()), value.numel())
    if setting[1] == "stochastic":
        other = rows != wanted_rows
        assert other.float().mean() < 0.01, "a last bit seldom decides a rounding"
        torch.testing.assert_close(rows, wanted_rows, rtol=2**-6, atol=1e-6)
    else:
        torch.testing.assert_close(rows, wanted_rows, rtol=2**-20, atol=1e-8)


def test_rows_drawn_on_the_gpu_are_those_of_their_ids() -> None:
    whole, here = torch.empty(70_000, 513, device=GPU), torch.empty(70_000, 513)  # more than one piece
    fill_normal(whole, 0.05, 0, seed=2**62 + 5)
    fill_normal(here, 0.05, 0, seed=2**62 + 5)
    torch.testing.assert_close(whole.cpu(), here, rtol=1e-4, atol=1e-6)
    part = torch.empty(33_333, 513, device=GPU)
    fill_normal(part, 0.05, 22_222, seed=2**62 + 5)
    assert torch.equal(part, whole[22_222 : 22_222 + 33_333])


@pytest.fixture
def nccl(tmp_path: object) -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("row_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("state", ["fp32", "8bit"])
def test_training_steps_of_the_head_equal_the_cpus(nccl: dist.ProcessGroup, row_dtype: str, state: str) -> None:
    found = []
    for device in (CPU, GPU):
        config = ClassHeadConfig(num_classes=20_000, embedding_dim=128, sample_rate=0.1, row_dtype=row_dtype)
        head = ClassParallelHead(config, nccl, nccl, device)
        if device == CPU:
            rows = head.rows.clone()
        head.load_full_weight(rows)  # each device draws its own
        optimizer = RowAdamW.for_head(head, RowOptimizerConfig(state=state, bf16_rows="stochastic", weight_decay=0.01))
        g, losses = torch.Generator().manual_seed(0), []
        for step in range(5):
            x = torch.randn(64, 128, generator=g).to(device).requires_grad_()
            labels = torch.randint(20_000, (64,), generator=g).to(device)
            optimizer.catch_up(head.begin_step(labels, step=step))
            loss, _ = head(x, labels)
            loss.backward()
            optimizer.step(*head.row_grad, 1e-3)
            head.end_step()
            losses.append(loss.item())
        found.append((losses, head.rows.float().cpu()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-2 if row_dtype == "bf16" else 1e-4)
    assert float((found[0][1] - found[1][1]).norm() / found[0][1].norm()) < 2e-2
