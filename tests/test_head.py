"""The class-parallel head against a dense float64 process: loss, embedding and row gradients; uneven and empty shards
and batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.bench.ranks import Traffic
from kernels.cosine_lse import cosine_lse, cosine_lse_backward
from models.comm import own_slice
from models.heads import class_parallel
from models.heads.class_parallel import ClassHeadConfig, ClassParallelHead, fixed_scale
from models.heads.margin import margin_cosine
from tests.dense import dense_loss, dense_loss_and_metrics
from tests.pool import layout, ranks

D = 6
MARGINS = {
    "cosface": (1.0, 0.0, 0.35),
    "arcface": (1.0, 0.5, 0.0),
    "sphereface": (1.35, 0.0, 0.0),
    "all": (1.2, 0.4, 0.1),
}


def samples(count: int, classes: int, one_shard: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(count * 1000 + classes)
    labels = torch.randint(0, classes, (count,), generator=g)
    if one_shard:
        labels %= max(1, classes // 4)
    if count > 2:
        labels[1] = -1
    embeddings = torch.randn(count, D, generator=g, dtype=torch.float64) * 3
    return embeddings, labels, torch.rand(count, generator=g, dtype=torch.float64) + 0.1


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-10) -> None:
    """Equal to `tolerance` of the largest magnitude wanted."""
    assert found.shape == wanted.shape
    if wanted.numel():
        error = (found - wanted).abs().max().item()
        assert error <= tolerance * max(wanted.abs().max().item(), 1e-300), (
            f"error {error:.3e} of {wanted.abs().max():.3e}"
        )


@contextmanager
def sharded(shards: list[int] | None) -> Iterator[None]:
    """Inside a check: heads spread their rows as told, instead of evenly."""
    even = class_parallel.class_range
    if shards is not None:
        class_parallel.class_range = lambda _, rank, __: (sum(shards[:rank]), sum(shards[: rank + 1]))
    try:
        yield
    finally:
        class_parallel.class_range = even


def check_head(
    config: ClassHeadConfig,
    tensor_parallel: int,
    sizes: list[int],
    one_shard: bool = False,
    micro: int = 1,
    shards: list[int] | None = None,
) -> None:
    """`sizes` are the batch sizes of the data-parallel ranks; every rank cuts its batch into `micro` calls."""
    with layout(tensor_parallel) as mesh, sharded(shards):
        head = ClassParallelHead(config, mesh.row_group, mesh.dp, dtype=torch.float64, copy_group=mesh.tp)
        rows = head.full_weight().clone().requires_grad_()
        embeddings, labels, weights = samples(sum(sizes), config.num_classes, one_shard)
        dense_in = embeddings.clone().requires_grad_()
        own = slice(sum(sizes[: mesh.dp.rank()]), sum(sizes[: mesh.dp.rank() + 1]))
        local = embeddings[own].clone().requires_grad_()

        active = head.begin_step(labels[own], weights[own], step=5)
        everywhere = [torch.empty(0)] * mesh.world_size
        torch.distributed.all_gather_object(everywhere, active + head.start)
        whole = torch.cat(everywhere).long()
        total, sums = torch.zeros((), dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
        for part in torch.arange(len(local)).tensor_split(micro):
            loss, metrics = head(local[part], labels[own][part], weights[own][part])
            loss.backward()
            total += loss.detach()
            sums += torch.stack([metrics["positive_cosine"], metrics["accuracy"]])
        torch.distributed.all_reduce(sums, group=mesh.dp)

        wanted, cosine, accuracy = dense_loss_and_metrics(dense_in, rows, labels, weights, config, whole)
        wanted.backward()
        close(total, wanted.detach())
        close(sums[:, 0] / sums[:, 1], torch.stack([cosine, accuracy]))
        close(sums[0, 1], (weights * (labels >= 0)).sum())
        # each rank's part against the whole gradient's largest entry: an empty part does not lower the scale
        grad = torch.zeros_like(embeddings)
        grad[own] = local.grad
        torch.distributed.all_reduce(grad, group=mesh.dp)
        close(grad, dense_in.grad)
        index, row_grad = head.row_grad
        found = torch.zeros(config.num_classes, D, dtype=torch.float64)
        found[index + head.start] = row_grad
        torch.distributed.all_reduce(found, group=mesh.row_group)
        close(found, rows.grad)
        positives = set(labels[labels >= 0].tolist())
        assert positives <= set(whole.tolist()), "a positive is missing from the active set"


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
def test_uneven_shards_and_batches(margin: str, gradient: str) -> None:
    config = ClassHeadConfig(
        num_classes=11, embedding_dim=D, margin=MARGINS[margin], scale=8.0, gradient=gradient, tile=3
    )
    ranks(3).run(check_head, config, 1, [3, 0, 5])


@pytest.mark.parametrize("shards", [[4, 8], [3, 9], [0, 12], [12, 0]])
def test_any_split_of_the_rows(shards: list[int]) -> None:
    config = ClassHeadConfig(num_classes=12, embedding_dim=D, scale=8.0, margin=(1.0, 0.5, 0.0), tile=5)
    ranks(2).run(check_head, config, 1, [4, 3], False, 1, shards)


@given(
    st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 2)]),
    st.integers(1, 70),
    st.lists(st.integers(0, 6), min_size=4, max_size=4).filter(lambda sizes: sizes[0] > 0),
    st.tuples(st.floats(1, 1.6), st.floats(0, 0.7), st.floats(0, 0.5)),
    st.floats(0.05, 1),
    st.floats(1, 30),
    st.sampled_from(["exact", "straight_through"]),
)
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
def test_any_shape_margin_and_rate(
    layout_: tuple[int, int],
    classes: int,
    sizes: list[int],
    margin: tuple[float, float, float],
    rate: float,
    scale: float,
    gradient: str,
) -> None:
    world, tensor_parallel = layout_
    config = ClassHeadConfig(
        num_classes=classes,
        embedding_dim=D,
        margin=margin,
        sample_rate=rate,
        scale=scale,
        gradient=gradient,
        tile=16,
    )
    ranks(world).run(check_head, config, tensor_parallel, sizes[: world // tensor_parallel])


@pytest.mark.parametrize(
    ("world", "tensor_parallel", "classes", "sizes", "one_shard", "micro"),
    [
        (1, 1, 9, [7], False, 3),
        (2, 1, 9, [1, 6], False, 1),
        (2, 2, 9, [5], False, 2),
        (3, 1, 2, [2, 2, 3], False, 1),  # the last rank owns no class
        (4, 1, 5, [1, 0, 0, 4], False, 1),
        (4, 2, 40, [4, 3], True, 2),  # all labels on one shard
        (4, 4, 3, [6], False, 1),
        (3, 1, 1, [2, 1, 1], False, 1),  # one class: no negatives at all
    ],
)
def test_layouts(world: int, tensor_parallel: int, classes: int, sizes: list[int], one_shard: bool, micro: int) -> None:
    config = ClassHeadConfig(num_classes=classes, embedding_dim=D, scale=10.0, margin=(1.0, 0.2, 0.1), tile=4)
    ranks(world).run(check_head, config, tensor_parallel, sizes, one_shard, micro)


@pytest.mark.parametrize("world", [1, 3])
def test_sampled_and_filtered_negatives(world: int) -> None:
    config = ClassHeadConfig(
        num_classes=10_000, embedding_dim=D, scale=6.0, margin=(1.0, 0.0, 0.2), sample_rate=0.05, filter_above=0.6
    )
    ranks(world).run(check_head, config, 1, [4, 2, 3][:world])


def check_float32(config: ClassHeadConfig, sizes: list[int]) -> None:
    """float32's error against float64 is at most twice that of a dense float32 process."""
    with layout() as mesh:
        embeddings, labels, weights = samples(sum(sizes), config.num_classes)
        own = slice(sum(sizes[: mesh.dp.rank()]), sum(sizes[: mesh.dp.rank() + 1]))
        head = ClassParallelHead(config, mesh.row_group, mesh.dp)
        rows, local = head.full_weight(), embeddings[own].float().requires_grad_()
        loss, _ = head(local, labels[own], weights[own].float())
        loss.backward()
        found = [loss.detach(), torch.zeros_like(embeddings).float(), torch.zeros_like(rows)]
        assert local.grad is not None
        found[1][own] = local.grad
        active, row_grad = head.row_grad
        found[2][active + head.start] = row_grad
        for whole in found[1:]:
            torch.distributed.all_reduce(whole)
        reference = {}
        for dtype in (torch.float32, torch.float64):
            inputs = [x.detach().to(dtype).requires_grad_() for x in (embeddings, rows)]
            value = dense_loss(*inputs, labels, weights.to(dtype), config)
            value.backward()
            reference[dtype] = [value.detach(), *(x.grad for x in inputs)]
        for ours, dense, exact in zip(found, reference[torch.float32], reference[torch.float64], strict=True):
            error, allowed = ((x.double() - exact).norm() for x in (ours, dense))
            assert error <= 2 * allowed + 1e-7 * exact.norm(), f"{error:.3e} against {allowed:.3e} of the dense float32"


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("scale", [10.0, 64.0])
def test_float32_is_as_exact_as_a_dense_float32_process(margin: str, scale: float) -> None:
    config = ClassHeadConfig(num_classes=3_000, embedding_dim=D, margin=MARGINS[margin], scale=scale)
    ranks(3).run(check_float32, config, [30, 1, 17])


def test_embeddings_travel_in_their_own_type_and_gradients_to_their_owner_alone() -> None:
    ranks(3).run(check_traffic, 1, [3, 0, 5])
    ranks(4).run(check_traffic, 2, [3, 5])


def check_traffic(tensor_parallel: int, sizes: list[int]) -> None:
    """bfloat16 embeddings give what their float32 copies give, bit for bit, at half the bytes; all bytes as a ring
    passes them.
    """
    with layout(tensor_parallel) as mesh:
        config = ClassHeadConfig(num_classes=50, embedding_dim=D, row_dtype="bf16")
        head = ClassParallelHead(config, mesh.row_group, mesh.dp, copy_group=mesh.tp)
        embeddings, labels, _ = samples(sum(sizes), 50)
        own = own_slice(sizes, mesh.dp.rank())
        losses, grads, forth = [], [], []
        for kind in (torch.bfloat16, torch.float32):
            local = embeddings[own].to(torch.bfloat16).to(kind).requires_grad_()
            head.begin_step(labels[own], sizes=sizes)
            one, other = Traffic(), Traffic()
            with one.counted():
                loss, _ = head(local, labels[own], sizes=sizes)
            with other.counted():
                loss.backward()
            head.end_step()
            assert local.grad is not None
            losses.append(loss.detach())
            grads.append(local.grad)
            forth.append(one.bytes)
            dp, tp, row = mesh.dp.size(), tensor_parallel, 4 * D
            scattered = (dp - 1) / dp * dp * max(sizes) * row
            assert other.bytes == pytest.approx(scattered + 2 * (tp - 1) / tp * len(local) * row)
        assert torch.equal(*losses) and torch.equal(grads[0], grads[1].to(torch.bfloat16))
        assert forth[1] - forth[0] == pytest.approx((dp - 1) * max(sizes) * 2 * D)


def test_a_head_is_told_of_ranks_that_bring_the_same_samples() -> None:
    ranks(2).run(check_copies)


def check_copies() -> None:
    with layout(2) as mesh, pytest.raises(ValueError, match="2 ranks share the rows, but 1 x 1"):
        ClassParallelHead(ClassHeadConfig(num_classes=5, embedding_dim=2), mesh.row_group, mesh.dp)


def test_the_scale_follows_from_the_number_of_classes() -> None:
    """So that a cosine of 1 among C - 1 orthogonal rows has a probability of about 1 - (C - 1)^(1 - sqrt 2)."""
    for classes, scale in ((204, 7.514), (1_000_000, 19.538), (3, 1.0), (1, 1.0)):
        assert fixed_scale(classes) == pytest.approx(scale, abs=1e-3)


def test_initial_rows_do_not_depend_on_the_world() -> None:
    config = ClassHeadConfig(num_classes=9_001, embedding_dim=D)
    one = ranks(1).run(full_weight, config)[0]
    for found in ranks(3).run(full_weight, config):
        assert torch.equal(found, one)


def full_weight(config: ClassHeadConfig) -> torch.Tensor:
    with layout() as mesh:
        head = ClassParallelHead(config, mesh.row_group, mesh.dp)
        weight = head.full_weight()
        head.load_full_weight(weight * 2)
        assert torch.equal(head.full_weight(), weight * 2)
        return weight


def test_the_loss_is_true_where_others_saturate_or_cancel() -> None:
    """Partial FC's clamp stops at 69.08; a margin composed from a full log-sum-exp gives 0 where the truth is 4.23."""
    ranks(1).run(check_truth)


def check_truth() -> None:
    with layout() as mesh:
        config = ClassHeadConfig(num_classes=20_001, embedding_dim=2, scale=64.0, margin=(1.0, 0.0, 0.35))
        head = ClassParallelHead(config, mesh.row_group, mesh.dp)
        angle = torch.linspace(-0.4, 0.4, 20_001) + math.pi / 2
        rows = torch.stack([angle.cos(), angle.sin()], 1)
        for target_cosine in (0.3, 0.5, 0.9, -1.0):
            rows[0] = torch.tensor([target_cosine, math.sqrt(1 - target_cosine**2)])
            head.load_full_weight(rows)
            embedding, label = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
            loss, _ = head(embedding, label)
            head.end_step()
            wanted = dense_loss(embedding.double(), rows.double(), label, torch.ones(1).double(), config)
            assert abs(loss.item() - wanted.item()) <= 2e-6 * max(1.0, wanted.item()), (target_cosine, loss, wanted)
        assert wanted > 100, "the last case is past Partial FC's clamp"


def test_wrong_labels_are_refused() -> None:
    ranks(1).run(check_wrong_label)


def check_wrong_label() -> None:
    with layout() as mesh:
        head = ClassParallelHead(ClassHeadConfig(num_classes=5, embedding_dim=2), mesh.row_group, mesh.dp)
        with pytest.raises(ValueError, match=r"\[-1, 5\)"):
            head(torch.ones(1, 2), torch.tensor([5]))


def test_margin_is_monotone_past_pi_and_defined_at_zero_angle() -> None:
    cosine = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    for margin in MARGINS.values():
        value, slope = margin_cosine(cosine, margin, straight_through=False)
        assert (value.diff() > 0).all(), margin
        assert slope.isfinite().all() and (slope[1:-1] >= 0).all()
    inner = cosine[1:-1].clone().requires_grad_()
    value, slope = margin_cosine(inner, MARGINS["all"], straight_through=False)
    angle = torch.acos(inner) * 1.2 + 0.4
    past = angle > math.pi
    (torch.where(past, -2 - torch.cos(angle), torch.cos(angle)) - 0.1).sum().backward()
    inside = inner.detach().abs() < 1 - 1e-6
    torch.testing.assert_close(slope[inside], inner.grad[inside], rtol=1e-9, atol=1e-9)


def test_kernel_twin_does_not_depend_on_its_tiles() -> None:
    g = torch.Generator().manual_seed(0)
    embeddings = F.normalize(torch.randn(5, D, generator=g, dtype=torch.float64), dim=-1)
    rows = torch.randn(13, D, generator=g, dtype=torch.float64)
    target, ones = torch.tensor([0, 12, -1, 5, 5]), torch.ones(5, dtype=torch.float64)
    whole = cosine_lse(embeddings, rows, None, target, 20.0, tile=100)
    backward = cosine_lse_backward(embeddings, rows, None, target, 20.0, whole.lse, ones, -ones, tile=100)
    for tile in (1, 4, 13):
        for found, wanted in zip(cosine_lse(embeddings, rows, None, target, 20.0, tile=tile), whole, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        found_backward = cosine_lse_backward(embeddings, rows, None, target, 20.0, whole.lse, ones, -ones, tile=tile)
        for found, wanted in zip(found_backward, backward, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
