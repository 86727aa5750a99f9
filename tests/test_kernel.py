"""The fused kernel under Triton's interpreter, against autograd in float64 over all logits; and compiled for GPUs that are not here."""

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

from kernels.cosine_lse import NO_TARGET

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
]


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., None]]:
    """process(interpret, check, *args) runs the check in a process of its own: Triton looks at TRITON_INTERPRET only when it is first imported,
    and megatron-core imports it."""
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


def check_compiles(capability: int, shared_memory: int, products: str) -> None:
    """Launches the kernels, but compiles where a launch would start."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    names = []

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: int) -> None:
        signature, constants, aligned = {}, {}, {}
        for i, (parameter, value) in enumerate(zip(self.params, args, strict=True)):
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[(i,)] = "constexpr", value
            elif isinstance(value, Tensor):
                kinds = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}
                signature[parameter.name], aligned[(i,)] = kinds[value.dtype], [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
                if parameter.name == "stride" and value % 16 == 0:
                    aligned[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(self, signature, constants, aligned)
        binary = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert binary.metadata.shared <= shared_memory, (self.__name__, binary.metadata.shared)
        names.append(self.__name__)
        table = args[self.arg_names.index("table")]
        if "length" not in self.__name__ and table.dtype == torch.bfloat16:
            assert products in binary.asm["ptx"], self.__name__

    JITFunction.run = launch
    for kind, d, indexed, filter_above in [("bf16", 512, True, 0.5), ("fp32", 130, False, 1.0)]:
        fused(random_inputs(40, 100, d, indexed, filter_above, TYPES[kind]))
    assert len(set(names)) == 4 and len(names) == 2 * 5, names  # the lengths twice


@pytest.mark.parametrize(
    ("capability", "shared_memory", "products"), [(80, 163 << 10, "mma.sync"), (90, 227 << 10, "wgmma")]
)
@pytest.mark.full
def test_kernels_compile_for_gpus_and_fit_them(
    process: Callable[..., None], capability: int, shared_memory: int, products: str
) -> None:
    process(False, check_compiles, capability, shared_memory, products)
