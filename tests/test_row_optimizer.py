"""The row-sparse AdamW: dense torch AdamW at rate 1, a dense reference of the stated schedule below; 8-bit moments;
bf16 rows; the Triton kernel under its interpreter against its plain-torch twin; rows as a GPU draws them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from harness.train.optimizer import sum_of_squares
from kernels import row_update as twin
from kernels.keyed import LARGE, fill_normal, random_bits
from kernels.rounding import decode, encode, round_bf16
from kernels.row_update import CHUNK
from models.heads import row_optimizer
from models.heads.class_parallel import ClassHeadConfig, ClassParallelHead, class_range
from models.heads.row_optimizer import RowAdamW, RowOptimizerConfig
from tests import test_kernel
from tests.pool import layout, ranks
from tests.row_updates import SETTINGS, updated

D = 6
process = test_kernel.process  # runs a check where Triton interprets


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noise(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return random_bits(torch.arange(n) * 7919 + seed * 104729, d)


@pytest.mark.parametrize("n", [4, CHUNK // D + 3])
def test_rows_equal_torch_adamw_when_all_are_active(n: int) -> None:
    rows = drawn(n, D)
    reference = rows.clone().requires_grad_()
    torch_adamw = torch.optim.AdamW([reference], lr=0.1, betas=(0.9, 0.999), weight_decay=0.3)
    ours = RowAdamW(rows, RowOptimizerConfig(weight_decay=0.3))
    for step in range(5):
        grad = drawn(n, D, seed=step)
        reference.grad = grad.clone()
        torch_adamw.step()
        ours.step(torch.arange(n), grad, 0.1)
        torch.testing.assert_close(rows, reference.detach(), rtol=1e-12, atol=1e-12)


class Dense:
    """The stated schedule, every row in every step: decay always; moments and bias correction only where the row is
    active.
    """

    def __init__(self, rows: torch.Tensor, config: RowOptimizerConfig) -> None:
        self.rows, self.config = rows.clone(), config
        self.first, self.second, self.count = torch.zeros_like(rows), torch.zeros_like(rows), torch.zeros(len(rows), 1)

    def step(self, active: torch.Tensor, grad: torch.Tensor, lr: float) -> None:
        c = self.config
        self.rows *= 1 - lr * c.weight_decay
        mask = torch.zeros(len(self.rows), 1, dtype=torch.bool)
        mask[active] = True
        full = torch.zeros_like(self.rows)
        full[active] = grad
        self.count += mask
        self.first = torch.where(mask, c.betas[0] * self.first + (1 - c.betas[0]) * full, self.first)
        self.second = torch.where(mask, c.betas[1] * self.second + (1 - c.betas[1]) * full**2, self.second)
        count = self.count.double().clamp_min(1)
        update = self.first / (1 - c.betas[0] ** count) / ((self.second / (1 - c.betas[1] ** count)).sqrt() + c.eps)
        self.rows = torch.where(mask, self.rows - lr * update, self.rows)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-6)])
def test_200_sparse_steps_equal_a_dense_reference_of_the_schedule(dtype: torch.dtype, tolerance: float) -> None:
    n, config = 50, RowOptimizerConfig(weight_decay=0.1, betas=(0.9, 0.99))
    rows = drawn(n, D, dtype=dtype)
    dense, ours = Dense(rows.double(), config), RowAdamW(rows, config)
    g = torch.Generator().manual_seed(1)
    for step in range(200):
        active = (torch.rand(n, generator=g) < 0.2).nonzero()[:, 0]
        lr = 0.05 * (1 + math.cos(step / 30))
        ours.catch_up(active)
        # the gradient depends on the row as it is read: a row that owes its decay would show
        shared = drawn(len(active), D, seed=step)
        grads = [(x[active] + shared).to(x.dtype) for x in (rows, dense.rows)]
        ours.step(active, grads[0], lr)
        dense.step(active, grads[1], lr)
    ours.catch_up(torch.arange(n))
    error = (rows - dense.rows).abs().max() / dense.rows.abs().max()
    assert error < tolerance, f"{error:.2e}"


def active_rows_alone_change(state: str, row_dtype: str, bf16_rows: str) -> None:
    with layout() as mesh:
        config = ClassHeadConfig(num_classes=9_000, embedding_dim=D, sample_rate=0.05, row_dtype=row_dtype)
        head = ClassParallelHead(config, mesh.row_group, mesh.dp)
        options = RowOptimizerConfig(state=state, bf16_rows=bf16_rows, weight_decay=0.1)
        optimizer = RowAdamW.for_head(head, options)
        for step in range(3):
            before = [head.rows.clone(), *(x.clone() for x in optimizer.row_state().values())]
            embeddings = drawn(4, D, seed=step + 10 * mesh.rank, dtype=torch.float32).requires_grad_()
            active = head.begin_step(torch.randint(0, 9_000, (4,)), step=step)
            head(embeddings, torch.full((4,), 17))[0].backward() if step else head(embeddings, torch.full((4,), -1))
            optimizer.catch_up(active)
            index, grad = head.row_grad
            assert torch.equal(index, active)
            optimizer.step(index, grad + 0.01, 0.1)
            head.end_step()
            wanted = torch.zeros(len(head.rows), dtype=torch.bool)
            wanted[active] = True
            for old, new in zip(before[:1], [head.rows], strict=True):
                assert torch.equal((old != new).any(1), wanted)
            for old, (name, new) in zip(before[1:], optimizer.row_state().items(), strict=True):
                changed = (old != new).any(1)
                assert not changed[~wanted].any(), f"{name} of an inactive row changed"
                if name in ("row_step", "paid", "exp_avg", "exp_avg_sq", "master"):  # 8 bits may happen to stay
                    assert changed[wanted].all(), f"{name} of an active row did not change"


@pytest.mark.parametrize(
    ("state", "row_dtype", "bf16_rows"),
    [
        ("fp32", "fp32", "master"),
        ("8bit", "fp32", "master"),
        ("fp32", "bf16", "master"),
        ("8bit", "bf16", "stochastic"),
    ],
)
def test_exactly_the_active_rows_change_in_weights_and_state(state: str, row_dtype: str, bf16_rows: str) -> None:
    ranks(2).run(active_rows_alone_change, state, row_dtype, bf16_rows)


def trained_rows(options: RowOptimizerConfig, row_dtype: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    from models.comm import gather_shards

    with layout() as mesh:
        config = ClassHeadConfig(num_classes=5_000, embedding_dim=D, sample_rate=0.1, row_dtype=row_dtype)
        head = ClassParallelHead(config, mesh.row_group, mesh.dp)
        optimizer = RowAdamW.for_head(head, options)
        for step in range(4):
            active = head.begin_step(torch.tensor([3, 4_999]), step=step)
            optimizer.catch_up(active)
            # exact in any order of summation, so that only the rounding could depend on the number of ranks
            grad = ((active + head.start)[:, None] % 7 - 3.0) * torch.arange(1, D + 1) / 64
            optimizer.step(active, grad, 0.01)
            head.end_step()
        state = {name: gather_shards(value, mesh.row_group) for name, value in optimizer.row_state().items()}
        return head.full_weight(), state


@pytest.mark.parametrize("bf16_rows", ["master", "stochastic"])
def test_rounding_does_not_depend_on_the_number_of_ranks(bf16_rows: str) -> None:
    options = RowOptimizerConfig(state="8bit", bf16_rows=bf16_rows, weight_decay=0.1)
    rows, state = ranks(1).run(trained_rows, options, "bf16")[0]
    for world in (2, 3):
        for found, found_state in ranks(world).run(trained_rows, options, "bf16"):
            assert torch.equal(found, rows)
            for name, value in state.items():
                assert torch.equal(found_state[name], value), name


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bits_keep_every_value_within_a_step_without_bias(signed: bool) -> None:
    x = (drawn(2_000, 64, dtype=torch.float32) * torch.exp(drawn(2_000, 1, seed=1, dtype=torch.float32) * 8)) ** 3
    x = x if signed else x.abs()
    x[0], x[1, 1:] = 0, 0
    codes, scales = encode(x, noise(*x.shape), signed)
    found = decode(codes, scales, signed)
    assert codes.dtype == torch.uint8 and torch.equal(found[x == 0], x[x == 0])
    inside = x.abs() > scales * 2**-14
    step = 1 / 8 if signed else 1 / 16
    error = (found - x)[inside] / x[inside]
    assert error.abs().max() < step * 1.001
    assert abs(error.mean()) < 5 * error.std() / len(error) ** 0.5 + 1e-4, "the rounding has a bias"
    smallest = 2 ** (-16 if signed else -15.9)
    assert ((found - x).abs()[~inside] <= (scales * smallest * 2).expand_as(x)[~inside] * 2).all()


def test_a_second_moment_never_rounds_to_nothing_where_there_was_a_gradient() -> None:
    x = torch.tensor([[1.0, 1e-30, 1e-7, 0.0], [0.0, 0.0, 0.0, 1e-20]])
    codes, scales = encode(x, noise(2, 4), signed=False)
    assert torch.equal(codes > 0, x > 0)
    assert (decode(codes, scales, signed=False)[x > 0] > 0).all()


@pytest.mark.parametrize("signed", [True, False])
def test_what_does_not_change_takes_no_new_error_when_the_scale_does(signed: bool) -> None:
    x = drawn(100, 32, dtype=torch.float32)
    x = x if signed else x.abs()
    value = decode(*encode(x, noise(100, 32), signed), signed)
    value[value.abs() < 2**-10] = 0  # what falls below the range of the new scale is another matter
    largest = value.clone()
    largest[:, 0] = 15.0
    again = decode(*encode(largest, noise(100, 32, seed=1), signed), signed)
    assert torch.equal(again[:, 1:], value[:, 1:])


def test_bf16_rounding_is_unbiased_and_to_a_neighbour() -> None:
    x = drawn(500, 64, dtype=torch.float32)
    rounded = torch.stack([round_bf16(x, noise(500, 64, seed=s)).float() for s in range(64)])
    down = (x.view(torch.int32) & -0x10000).view(torch.float32)
    up = ((x.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    assert ((rounded == down) | (rounded == up)).all()
    width = (up - down).abs()
    assert (
        (rounded.mean(0) - x) / width
    ).abs().mean() < 0.06  # 0.05 by chance with 64 draws; rounding down would give 0.5
    assert abs(((rounded - x) / width).mean()) < 0.001


def test_eight_bit_moments_follow_the_exact_ones() -> None:
    """1,000 steps of gradients whose size differs 100-fold between columns and falls 10-fold: the moments end where the
    exact ones do.
    """
    n, d, steps = 64, 64, 1_000
    sizes = torch.logspace(-2, 0, d)
    exact, rounded = (torch.zeros(n, d) for _ in range(2))
    optimizers = [
        RowAdamW(rows, RowOptimizerConfig(state=state, betas=(0.9, 0.99)))
        for rows, state in ((exact, "fp32"), (rounded, "8bit"))
    ]
    for step in range(steps):
        grad = drawn(n, d, seed=step, dtype=torch.float32) * sizes * 10 ** (-step / steps)
        for optimizer in optimizers:
            optimizer.step(torch.arange(n), grad, 1e-3)
    wanted = optimizers[0].row_state()["exp_avg_sq"]
    state = optimizers[1].row_state()
    ratio = decode(state["exp_avg_sq_codes"], state["exp_avg_sq_scales"], signed=False) / wanted
    assert abs(float(ratio.mean()) - 1) < 0.02 and float(ratio.std()) < 0.2, (ratio.mean(), ratio.std())
    assert float((rounded - exact).norm() / exact.norm()) < 0.15  # each update is 7 % off, without bias


def triton_kernel() -> Any:
    """The kernel; the interpreter's FMA (numpy's product and sum) and root give way to torch's: bits then do not hang
    on this processor.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from kernels import row_update_triton

    def of(handle: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(handle.data))

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        return TensorHandle(torch.addcmul(of(z), of(x), of(y)).numpy(), z.dtype.scalar)

    InterpreterBuilder.create_fma = fma
    InterpreterBuilder.create_precise_sqrt = lambda self, x: TensorHandle(of(x).sqrt().numpy(), x.dtype.scalar)
    return row_update_triton


def check_bits(d: int) -> None:
    kernel = triton_kernel()
    for setting in SETTINGS:
        found, wanted = {}, {}
        for given, results in ((kernel, found), (twin, wanted)):
            row_optimizer._kernel = lambda rows, given=given: given  # this process does nothing else
            results |= updated(d, setting)
        assert wanted["rows"].isfinite().all()
        for name, value in wanted.items():
            assert torch.equal(found[name], value), (setting, name, int((found[name] != value).sum()))


@pytest.mark.parametrize("d", [1, 48, 300, 512, 768])
def test_the_kernel_gives_its_twins_bits(process: Callable[..., None], d: int) -> None:
    process(True, check_bits, d)


def check_large_rows() -> None:
    n, d, active = 2**25 + 40, 64, torch.tensor([0, 5, 2**25 - 1, 2**25, 2**25 + 39])  # more than 2^31 entries
    results = []
    for kernel in (triton_kernel(), twin):
        rows = torch.empty(n, d, dtype=torch.bfloat16)  # only the pages that are written take memory
        state = {"row_step": torch.empty(n, 1, dtype=torch.int32)}
        for name in ("exp_avg", "exp_avg_sq"):
            state |= {f"{name}_codes": torch.empty(n, d, dtype=torch.uint8), f"{name}_scales": torch.empty(n, 1)}
        for number, value in enumerate((rows, *state.values())):
            value[active] = (torch.arange(5)[:, None] + number).to(value.dtype)
        table = twin.RowTable(rows, state, 2**60, 10**9)
        one = torch.ones(5, 1)
        kernel.decay_rows(table, active, 0.7 * one)
        kernel.adamw_rows(table, active, drawn(5, d, dtype=torch.float32), 0.9 * one, -one, one, (0.9, 0.99), 1e-8)
        results.append([value[active] for value in (rows, *state.values())])
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found, wanted)


def test_the_kernel_reaches_rows_past_two_thousand_million_entries(process: Callable[..., None]) -> None:
    process(True, check_large_rows)


class Counted(TorchDispatchMode):
    """Counts launches, and what the largest result takes: of all, and of those on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.largest, self.on_host = 0, 0, 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = op(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and not op.is_view:
            self.launches += 1
            self.largest = max(self.largest, found.nbytes)
            self.on_host = max(self.on_host, found.nbytes if found.device.type == "cpu" else 0)
        return found


def check_launches(n: int) -> None:
    """Through the optimizer as a GPU takes it, but that the rows are here and the kernel's launch is only counted."""
    from kernels import row_update_triton

    row_optimizer._kernel = lambda rows: row_update_triton
    row_update_triton._columns(D, torch.device("cpu"))  # made once, at the first step
    counted, kernel = Counted(), row_update_triton._row_update_kernel
    grids = []

    class Launch:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            def launch(*args: Any, **options: Any) -> None:
                counted.launches += 1
                grids.append(grid)
                with _disable_current_modes():
                    kernel[(min(3, *grid),)](*args, **options)

            return launch

    row_update_triton._row_update_kernel = Launch()  # type: ignore[assignment]
    options = RowOptimizerConfig(state="8bit", bf16_rows="stochastic", weight_decay=0.1)
    optimizer = RowAdamW(torch.zeros(n, D, dtype=torch.bfloat16), options)
    optimizer.log_decay = -0.1
    active = torch.arange(n)
    with counted:
        optimizer.catch_up(active)
        optimizer.step(active, torch.ones(n, D), 0.1)
    assert grids == [(n,), (n,)]
    assert counted.launches <= 40, counted.launches
    row_update_triton._row_update_kernel = kernel


@pytest.mark.parametrize("n", [1, 100_001])
def test_any_number_of_rows_takes_at_most_40_launches(process: Callable[..., None], n: int) -> None:
    process(True, check_launches, n)


def test_without_the_kernel_a_device_takes_large_chunks() -> None:
    options = RowOptimizerConfig(state="8bit", bf16_rows="stochastic", weight_decay=0.1)
    optimizer = RowAdamW(torch.zeros(3 * LARGE // 512, 512, dtype=torch.bfloat16, device="meta"), options)
    active = torch.arange(3 * LARGE // 512, device="meta")
    with Counted() as counted:
        optimizer.step(active, torch.ones(len(active), 512, device="meta"), 0.1)
    assert 3 * 50 < counted.launches < 3 * 250, counted.launches


def test_a_gradients_squares_are_summed_in_few_large_pieces_on_a_device() -> None:
    grad = torch.empty(1_000_000, 512, device="meta")
    with Counted() as counted:
        sum_of_squares(grad)
    assert counted.launches < 100 and counted.largest <= 8 * LARGE, (counted.launches, counted.largest)
    grad = drawn(20_000, 3, dtype=torch.float32)
    torch.testing.assert_close(sum_of_squares(grad), grad.double().norm() ** 2, rtol=1e-13, atol=0)


@pytest.mark.parametrize(("n", "d"), [(9_001, 64), (7, 5), (3, 1)])
def test_rows_drawn_on_a_device_do_not_depend_on_the_world(n: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def shard(rank: int, world: int) -> Tensor:
        start, stop = class_range(n, rank, world)
        rows = torch.full((stop - start, d), torch.nan)
        fill_normal(rows, 0.05, start, seed=2**62 + 5)
        return rows

    whole = shard(0, 1)
    assert whole.isfinite().all()
    monkeypatch.setattr("kernels.keyed.LARGE", 64 * 1000)  # pieces that fit none of the shards
    for world in (1, 2, 3, 5):
        assert torch.equal(torch.cat([shard(rank, world) for rank in range(world)]), whole)


def test_rows_drawn_on_a_device_are_normal_and_independent() -> None:
    rows, other = torch.empty(2, 20_000, 50)
    fill_normal(rows, 0.5, 0, seed=1)
    fill_normal(other, 0.5, 0, seed=2)
    count = rows.numel()
    ordered = rows.double().flatten().sort().values
    share = torch.special.ndtr(ordered / 0.5)
    distance = (share - (torch.arange(count) + 0.5) / count).abs().max()
    assert distance < 1.95 / count**0.5, "Kolmogorov and Smirnov: 1.95 is passed once in a thousand draws"
    assert ordered[-1] > 4.2 * 0.5 and ordered[0] < -4.2 * 0.5, "no tails"
    for x in (rows, rows.T, rows.abs() - rows.abs().mean()):  # columns, rows, and whether large ones come together
        shared = torch.corrcoef(x[:1000] if len(x) > 1000 else x)
        shared.fill_diagonal_(0)
        assert shared.abs().max() < 6 / x.shape[1] ** 0.5
    assert abs(float(torch.corrcoef(torch.stack([rows.flatten(), other.flatten()]))[0, 1])) < 4 / count**0.5
    assert len(rows.unique(dim=0)) == len(rows)


def test_a_head_on_a_device_draws_its_rows_there() -> None:
    config = ClassHeadConfig(num_classes=10_000_000, embedding_dim=512)
    head: Any = SimpleNamespace(config=config, start=0, stop=10_000_000)
    rows = torch.empty(10_000_000, 512, dtype=torch.bfloat16, device="meta")
    with Counted() as counted:
        assert ClassParallelHead.draw(head, rows) is rows
    assert counted.launches < 100 * (rows.numel() / LARGE + 1) and counted.on_host == 8, (
        counted.launches,
        counted.on_host,
    )
    assert counted.largest <= 4 * LARGE, counted.largest
    config = ClassHeadConfig(num_classes=5, embedding_dim=4, seed=2**63 - 1)
    head = SimpleNamespace(config=config, start=0, stop=5)
    assert ClassParallelHead.draw(head, torch.full((5, 4), torch.nan)).isfinite().all(), "any seed of 63 bits"
