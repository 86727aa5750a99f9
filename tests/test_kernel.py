"""The fused kernel under Triton's interpreter, against autograd in float64 over all logits; compiled for GPUs that are
not here; its error bound.
"""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.bench.kernels import KernelsConfig, blocks_of_processor
from harness.core.errors import UserError
from kernels.cosine_lse import NO_TARGET
from tests.kernel_error import Emulated, bfloat16, draw, error_over_bound, one_tf32, tf32x3

SCALE = 30.0
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NAMES = ("lse", "max_cosine", "target_cosine", "grad_embeddings", "grad_rows")
Matmul = Callable[[Tensor, Tensor], Tensor]

SHAPES = [  # n, a, d, the active rows are a part of the table, filter_above (-1: no negative is left)
    (0, 37, 8, True, 1.0),
    (17, 0, 8, True, 1.0),
    (0, 0, 8, False, 1.0),
    *((n, a, 8, False, 1.0) for n in (17, 64) for a in (1, 37)),
    (17, 300, 8, True, 0.5),
    (17, 37, 8, True, -1.0),
    (1, 1, 8, True, 1.0),
    (1, 37, 48, False, 1.0),
    (64, 1, 130, True, 1.0),
    (17, 37, 130, False, 0.1),
    (64, 300, 48, True, 1.0),
    (64, 300, 130, True, 0.2),
    (150, 140, 272, True, 0.1),  # the other entries of the blocks' table; more than one block of every kind
    (20, 130, 300, False, 1.0),
    (9, 70, 768, False, 1.0),
]


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., None]]:
    """process(interpret, check, *args) runs the check in a process of its own: Triton looks at TRITON_INTERPRET only
    when it is first imported, and megatron-core imports it.
    """
    cache, pools = tmp_path_factory.mktemp("triton"), {}

    def run(interpret: bool, check: Callable[..., None], *args: Any) -> None:
        if interpret not in pools:
            context = multiprocessing.get_context("spawn")
            pools[interpret] = ProcessPoolExecutor(1, context, initializer=_start, initargs=(interpret, cache))
        pools[interpret].submit(check, *args).result()

    yield run
    for pool in pools.values():
        pool.shutdown()


def _start(interpret: bool, cache: Path) -> None:
    os.environ.update(TRITON_INTERPRET=str(int(interpret)), TRITON_CACHE_DIR=str(cache))
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # numpy's, where the interpreter makes a nan or an overflow


class RoundedMatmul(torch.autograd.Function):
    """a b^T of operands rounded to bfloat16, summed in float32, in both directions: what a GPU does in bfloat16."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.bfloat16().float(), b.bfloat16().float()
        ctx.save_for_backward(a, b)
        return a @ b.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        grad = grads[0].bfloat16().float()
        return grad @ b, grad.T @ a


def dense(inputs: dict[str, Any], dtype: torch.dtype, matmul: Matmul = lambda a, b: a @ b.T) -> list[Tensor]:
    """NAMES by autograd over all logits, computed in `dtype`."""
    embeddings = inputs["embeddings"].to(dtype).requires_grad_()
    rows = inputs["table"] if inputs["index"] is None else inputs["table"][inputs["index"]]
    rows = rows.to(dtype).requires_grad_()
    unit, target = F.normalize(rows, dim=-1), inputs["target"]
    cosine = matmul(embeddings, unit)
    own = target[:, None] == torch.arange(len(rows))
    hidden = own | inputs["filtered"]
    lone = hidden.all(1, keepdim=True)  # samples without negatives
    logits = (SCALE * cosine).masked_fill(hidden & ~lone, -torch.inf)
    lse = torch.where(lone[:, 0], -torch.inf, torch.logsumexp(logits, 1))
    largest = cosine.masked_fill(hidden, -torch.inf)
    largest = largest.amax(1) if len(rows) else lse
    target_cosine = torch.where(own, (embeddings[:, None] * unit).sum(-1), 0.0).sum(1)
    everywhere = torch.logaddexp(torch.where(lone[:, 0], -100.0, lse), inputs["elsewhere"].to(dtype))
    weights = [inputs[name].to(dtype) for name in ("grad_lse", "grad_target")]
    (everywhere @ weights[0] + target_cosine @ weights[1]).backward()
    return [lse.detach(), largest.detach(), target_cosine.detach(), embeddings.grad, rows.grad]


def random_inputs(
    n: int, a: int, d: int, indexed: bool, filter_above: float = 1.0, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1000 * n + a + d)
    table = torch.randn(2 * a + 3 if indexed else a, d, generator=g)
    embeddings = F.normalize(torch.randn(n, d, generator=g), dim=-1)
    index = torch.randperm(len(table), generator=g)[:a].sort().values if indexed else None
    target = torch.randint(0, max(1, a // 4), (n,), generator=g)  # many samples of a class
    target[::3] = NO_TARGET
    if not a:
        target[:] = NO_TARGET
    if a > 30:
        table[a // 2 if index is None else index[a // 2]] = 0.0
        near = target >= 0  # targets as after training: margins act where the target's cosine is large
        own = table[target[near] if index is None else index[target[near]]]
        embeddings[near] = F.normalize(embeddings[near] + F.normalize(own, dim=-1), dim=-1)
    table = table.to(dtype)
    rows = (table if index is None else table[index]).double()
    # of embeddings as the kernel rounds them: it must not matter on which side of the threshold a rounding falls
    cosine = embeddings.to(dtype).double() @ F.normalize(rows, dim=-1).T
    return {
        "filter_above": filter_above,
        "filtered": cosine > (filter_above if filter_above < 1 else torch.inf),
        "embeddings": embeddings,
        "table": table,
        "index": index,
        "target": target,
        "elsewhere": torch.where(torch.arange(n) % 2 == 0, 12 + torch.rand(n, generator=g), -torch.inf),
        "grad_lse": torch.rand(n, generator=g),
        "grad_target": -SCALE * torch.rand(n, generator=g),
    }


def fused(inputs: dict[str, Any]) -> list[Tensor]:
    from kernels.cosine_lse_triton import cosine_lse, cosine_lse_backward

    given = (inputs["embeddings"], inputs["table"], inputs["index"], inputs["target"], SCALE)
    found = cosine_lse(*given, inputs["filter_above"])
    everywhere = torch.logaddexp(found.lse, inputs["elsewhere"])
    grads = cosine_lse_backward(*given, everywhere, inputs["grad_lse"], inputs["grad_target"], inputs["filter_above"])
    return [*found, *grads]


def relative_errors(found: list[Tensor], truth: list[Tensor], case: Any) -> list[float]:
    """Largest error of each of NAMES over its largest value; infinite entries must be equal."""
    errors = []
    for name, ours, exact in zip(NAMES, found, truth, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == exact.shape, (case, name)
        finite = exact.isfinite()
        assert torch.equal(ours[~finite].double(), exact[~finite]), (case, name)
        some = finite.any() and exact[finite].any()
        errors.append(float((ours - exact)[finite].abs().max() / exact[finite].abs().max()) if some else 0.0)
        assert some or not ours[finite].any(), (case, name)
    return errors


def check_error(kind: str) -> None:
    """Compares means over the shapes: of a single shape the largest rounding is luck."""
    ours, plain = {}, {}
    matmul = [RoundedMatmul.apply] if kind == "bf16" else []
    for case in SHAPES:
        inputs = random_inputs(*case, TYPES[kind])
        truth = dense(inputs, torch.float64)
        ours[case] = relative_errors(fused(inputs), truth, case)
        plain[case] = relative_errors(dense(inputs, torch.float32, *matmul), truth, case)
    for i, name in enumerate(NAMES):
        error, allowed = (sum(errors[i] for errors in side.values()) for side in (ours, plain))
        worst = max(ours, key=lambda case: ours[case][i])
        assert error <= 2 * allowed, (name, error / allowed, worst, ours[worst][i])


@pytest.mark.parametrize("kind", TYPES)
def test_kernel_error_is_within_twice_that_of_a_plain_computation(process: Callable[..., None], kind: str) -> None:
    process(True, check_error, kind)


def check_splits() -> None:
    import kernels.cosine_lse_triton as kernel

    inputs = random_inputs(17, 300, 8, True, 0.5)
    results = {}
    for kernel.PROGRAMS in (512, 1, 2):  # one split for each block of rows, one for all, one for a few
        results[kernel.PROGRAMS] = fused(inputs)
        assert all(map(torch.equal, fused(inputs), results[kernel.PROGRAMS]))
    assert {kernel._splits(17, 300, 32, 32)[0] for kernel.PROGRAMS in (512, 1, 2)} == {10, 1, 2}
    for found in results.values():
        torch.testing.assert_close(found, results[512], rtol=1e-5, atol=1e-6)


def test_kernel_repeats_to_the_last_bit_and_splits_do_not_matter(process: Callable[..., None]) -> None:
    process(True, check_splits)


def check_large_table() -> None:
    inputs = random_inputs(3, 40, 64, False)
    rows = inputs["table"]
    table = torch.empty(2**25 + 40, 64, dtype=torch.bfloat16)  # only the pages that are written take memory
    inputs |= {"index": torch.cat([torch.arange(20), torch.arange(20) + len(table) - 20]), "table": table}
    table[inputs["index"]] = rows.bfloat16()
    assert len(table) * 64 > 2**31
    found = fused(inputs)
    inputs |= {"index": None, "table": rows.bfloat16()}
    assert all(map(torch.equal, found, fused(inputs)))


def test_kernel_reaches_rows_past_two_thousand_million_entries(process: Callable[..., None]) -> None:
    process(True, check_large_table)


def check_bad_input() -> None:
    inputs = random_inputs(5, 37, 8, False)
    inputs["embeddings"][2, 3] = torch.nan
    for found in fused(inputs)[0], fused(inputs | {"filter_above": 0.5})[0]:
        assert found.isnan().nonzero().flatten().tolist() == [2]
    for name in ("embeddings", "table"):
        with pytest.raises(TypeError, match=r"float32 or bfloat16 table.*float64"):
            fused(inputs | {name: inputs[name].double()})
    with pytest.raises(ValueError, match="contiguous"):
        fused(inputs | {"table": torch.zeros(8, 37).T})


def test_kernel_hides_no_nan_and_refuses_what_it_cannot_do(process: Callable[..., None]) -> None:
    process(True, check_bad_input)


def check_one_order() -> None:
    from kernels import cosine_lse_triton as kernel

    tables = (kernel._FORWARD, kernel._EMBEDDINGS, kernel._ROWS)
    assert len({kernel._blocks(table, torch.float32, d).inner for table in tables for d in (256, 512, 1024)}) == 1


def test_float32_cosines_are_summed_in_one_order_in_all_kernels(process: Callable[..., None]) -> None:
    process(True, check_one_order)


def check_fits(launches: tuple[str, ...], dims: tuple[int, ...]) -> None:
    from harness.bench.kernels import KernelsConfig, run

    report = run(KernelsConfig(kernels=launches, dim=dims))
    rows, headline = report["rows"], report["headline"]
    kernels = {"inverse_length", "forward", "embeddings_gradient", "rows_gradient"}
    assert {row["kernel"] for row in rows if row["launch"].startswith("cosine_lse")} == kernels
    products = sum(launch.startswith("cosine_lse") for launch in launches)
    assert sum(row["multiplies"] for row in rows) == 3 * products * 2 * len(dims)
    assert headline["sm_90_spill_bytes"] == 0 and headline["sm_90_without_tensor_cores"] == 0, rows
    assert headline["sm_90_shared_kib"] <= 227 and min(row["blocks_per_sm"] for row in rows) >= 1, rows
    assert not any(row["serialized"] for row in rows)
    assert all(row["warps"] * row["blocks_per_sm"] >= 8 for row in rows)  # two groups of warps that take turns


def test_kernels_fit_a_hopper_gpu_and_use_its_tensor_cores(process: Callable[..., None]) -> None:
    process(False, check_fits, ("cosine_lse", "row_update"), (512,))


@pytest.mark.full
def test_kernels_of_all_widths_fit_a_hopper_gpu(process: Callable[..., None]) -> None:
    process(False, check_fits, ("cosine_lse", "cosine_lse_filtered", "row_update"), (48, 256, 384, 768, 1024))


def check_other_gpus() -> None:
    from harness.bench.kernels import KernelsConfig, run

    report = run(KernelsConfig(kernels=("cosine_lse",), dim=(256, 512, 1024), capability=(80, 100)))
    for capability, room in ((80, 163), (100, 227)):
        assert report["headline"][f"sm_{capability}_without_tensor_cores"] == 0
        assert report["headline"][f"sm_{capability}_shared_kib"] <= room


@pytest.mark.full
def test_kernels_have_room_on_other_gpus(process: Callable[..., None]) -> None:
    process(False, check_other_gpus)


def check_interpreted() -> None:
    from harness.bench.kernels import KernelsConfig, run
    from harness.core.errors import UserError

    with pytest.raises(UserError, match="TRITON_INTERPRET"):
        run(KernelsConfig(dim=(16,)))


def test_the_bench_refuses_what_it_cannot_compile(process: Callable[..., None]) -> None:
    process(True, check_interpreted)
    for flags, named in [
        ({"dtype": ("fp16",)}, "--dtype"),
        ({"capability": (70,)}, "--capability"),
    ]:
        with pytest.raises(UserError, match=named):
            KernelsConfig(**flags)


def test_occupancy_is_that_of_nvidias_calculator() -> None:
    """registers, warps, shared bytes of a block -> blocks of a processor of sm_90."""
    for registers, warps, shared, blocks in [
        (32, 4, 0, 16),
        (128, 8, 0, 2),
        (129, 8, 0, 1),
        (255, 8, 0, 1),
        (168, 4, 0, 3),
        (32, 4, 100 << 10, 2),
        (32, 1, 0, 32),
    ]:
        assert blocks_of_processor(90, registers, warps, shared) == blocks


ARITHMETIC = {torch.float32: tf32x3, torch.bfloat16: bfloat16}


@pytest.mark.parametrize("dtype", ARITHMETIC)
@pytest.mark.parametrize("filter_above", [1.0, 0.1])
@pytest.mark.parametrize(("n", "a", "d", "seeds"), [(1, 37, 48, 60), (50, 400, 256, 4), (40, 301, 768, 2)])
def test_the_gpu_tests_bound_holds_for_the_kernels_arithmetic(
    dtype: torch.dtype, filter_above: float, n: int, a: int, d: int, seeds: int
) -> None:
    """With room: seeds are fixed here, there they are fresh."""
    for seed in range(seeds):
        inputs = draw(n, a, d, dtype, filter_above, seed)
        ratios = error_over_bound(Emulated(ARITHMETIC[dtype]), inputs)
        assert max(ratios.values()) < 0.7, (seed, ratios)


@pytest.mark.parametrize("filter_above", [1.0, 0.1])
@pytest.mark.parametrize("dtype", ARITHMETIC)
def test_the_gpu_tests_bound_catches_wrong_kernels(dtype: torch.dtype, filter_above: float) -> None:
    """One of 1,000 rows left out; products off by 1e-4; in float32, products of operands that were rounded once."""
    inputs, product = draw(64, 1000, 256, dtype, filter_above, 5), ARITHMETIC[dtype]
    assert max(error_over_bound(Emulated(product), inputs).values()) < 0.7
    wrong = {"row": Emulated(product, last=999), "products": Emulated(lambda a, b: product(a, b) * (1 + 1e-4))}
    if dtype == torch.float32:
        wrong["tf32"] = Emulated(one_tf32)
    ratios = {name: error_over_bound(kernel, inputs) for name, kernel in wrong.items()}
    assert min(max(ratio.values()) for ratio in ratios.values()) > 2, ratios
    if dtype == torch.float32:
        assert all(ratios["tf32"][name] > 5 for name in NAMES if name != "target_cosine"), ratios
