"""The class-parallel head against a dense float64 process: loss, embedding and row gradients; uneven and empty shards and batches."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from kernels.cosine_lse import cosine_lse, cosine_lse_backward
from models.heads.class_parallel import ClassHeadConfig, ClassParallelHead
from models.heads.contrastive import info_nce
from models.heads.margin import margin_cosine
from models.heads.row_optimizer import RowAdamW, RowOptimizerConfig
from models.heads.sampling import sampled_classes
from tests.dense import dense_loss
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


def check_head(config: ClassHeadConfig, tensor_parallel: int, sizes: list[int], one_shard: bool, micro: int) -> None:
    """`sizes` are the batch sizes of the data-parallel ranks; every rank cuts its batch into `micro` calls."""
    with layout(tensor_parallel) as mesh:
        head = ClassParallelHead(config, mesh.row_group, mesh.dp, dtype=torch.float64)
        rows = head.full_weight().clone().requires_grad_()
        embeddings, labels, weights = samples(sum(sizes), config.num_classes, one_shard)
        dense_in = embeddings.clone().requires_grad_()
        own = slice(sum(sizes[: mesh.dp.rank()]), sum(sizes[: mesh.dp.rank() + 1]))
        local = embeddings[own].clone().requires_grad_()

        active = head.begin_step(labels[own], weights[own], step=5)
        everywhere = [torch.empty(0)] * mesh.world_size
        torch.distributed.all_gather_object(everywhere, active + head.start)
        whole = torch.cat(everywhere).long()
        total = torch.zeros((), dtype=torch.float64)
        for part in torch.arange(len(local)).tensor_split(micro):
            loss, _ = head(local[part], labels[own][part], weights[own][part])
            loss.backward()
            total += loss.detach()

        wanted = dense_loss(dense_in, rows, labels, weights, config, whole)
        wanted.backward()
        torch.testing.assert_close(total, wanted.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(local.grad, dense_in.grad[own], rtol=1e-9, atol=1e-11)
        index, grad = head.row_grad
        found = torch.zeros(head.stop - head.start, D, dtype=torch.float64)
        found[index] = grad
        torch.testing.assert_close(found, rows.grad[head.start : head.stop], rtol=1e-9, atol=1e-11)
        positives = set(labels[labels >= 0].tolist())
        assert positives <= set(whole.tolist()), "a positive is missing from the active set"


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
def test_uneven_shards_and_batches(margin: str, gradient: str) -> None:
    config = ClassHeadConfig(
        num_classes=11, embedding_dim=D, margin=MARGINS[margin], scale=8.0, gradient=gradient, tile=3
    )
    ranks(3).run(check_head, config, 1, [3, 0, 5], False, 1)


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
    ranks(world).run(check_head, config, 1, [4, 2, 3][:world], False, 1)


def test_the_active_set_is_the_same_at_every_world_size() -> None:
    cpu = torch.device("cpu")
    whole = sampled_classes(0, 50_000, 0.1, seed=3, step=7, device=cpu)
    parts = [sampled_classes(a, b, 0.1, 3, 7, cpu) for a, b in ((0, 4_000), (4_000, 4_097), (4_097, 50_000))]
    assert torch.equal(whole, torch.cat(parts))
    assert abs(len(whole) / 5_000 - 1) < 0.05
    other = sampled_classes(0, 50_000, 0.1, seed=3, step=8, device=cpu)
    overlap = len(set(whole.tolist()) & set(other.tolist())) / len(whole)
    assert 0.07 < overlap < 0.13, "two steps' sets are not independent"


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
    whole = cosine_lse(embeddings, rows, target, 20.0, tile=100)
    backward = cosine_lse_backward(embeddings, rows, target, 20.0, whole.lse, ones, -ones, tile=100)
    for tile in (1, 4, 13):
        for found, wanted in zip(cosine_lse(embeddings, rows, target, 20.0, tile=tile), whole, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        found_backward = cosine_lse_backward(embeddings, rows, target, 20.0, whole.lse, ones, -ones, tile=tile)
        for found, wanted in zip(found_backward, backward, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_rows_equal_torch_adamw_when_all_are_active() -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(4, D, generator=g, dtype=torch.float64)
    reference = rows.clone().requires_grad_()
    torch_adamw = torch.optim.AdamW([reference], lr=0.1, betas=(0.9, 0.999), weight_decay=0.3)
    ours = RowAdamW(rows, RowOptimizerConfig(weight_decay=0.3))
    for _ in range(5):
        grad = torch.randn(4, D, generator=g, dtype=torch.float64)
        reference.grad = grad.clone()
        torch_adamw.step()
        ours.step(torch.arange(4), grad, 0.1)
        torch.testing.assert_close(rows, reference.detach(), rtol=1e-12, atol=1e-12)


def test_inactive_rows_do_not_change_and_catch_up_on_their_decay() -> None:
    rows = torch.randn(4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = rows.clone()
    ours = RowAdamW(rows, RowOptimizerConfig(weight_decay=0.3))
    active, grad = torch.tensor([1, 3]), torch.ones(2, D, dtype=torch.float64)
    rates = [0.1, 0.2, 0.05]
    for lr in rates:
        ours.step(active, grad, lr)
    assert torch.equal(rows[[0, 2]], before[[0, 2]]) and not torch.equal(rows[[1, 3]], before[[1, 3]])
    assert ours.row_step.flatten().tolist() == [0, 3, 0, 3]
    ours.catch_up(torch.tensor([0, 2]))
    factor = math.prod(1 - lr * 0.3 for lr in rates)
    torch.testing.assert_close(rows[[0, 2]], before[[0, 2]] * factor, rtol=1e-12, atol=1e-12)


def dense_info_nce(q: torch.Tensor, d: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    logits = F.normalize(q, dim=-1) @ F.normalize(d, dim=-1).T / 0.1
    same = (labels[:, None] == labels) & ~torch.eye(len(labels), dtype=torch.bool)
    index = torch.arange(len(labels))
    terms = [F.cross_entropy(x.masked_fill(same, -torch.inf), index, reduction="none") for x in (logits, logits.T)]
    return (terms[0] + terms[1]) @ weights / 2 / weights.sum()


def check_info_nce(tensor_parallel: int, sizes: list[int]) -> None:
    with layout(tensor_parallel) as mesh:
        g = torch.Generator().manual_seed(0)
        n = sum(sizes)
        whole = [torch.randn(n, D, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        labels = torch.arange(n) % 4
        weights = torch.rand(n, generator=g, dtype=torch.float64)
        own = slice(sum(sizes[: mesh.dp.rank()]), sum(sizes[: mesh.dp.rank() + 1]))
        local = [x.detach()[own].clone().requires_grad_() for x in whole]
        loss, _ = info_nce(local[0], local[1], labels[own], 0.1, mesh.dp, weights[own])
        loss.backward()
        wanted = dense_info_nce(whole[0], whole[1], labels, weights)
        wanted.backward()
        torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
        for found, reference in zip(local, whole, strict=True):
            torch.testing.assert_close(found.grad, reference.grad[own], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("world", "tensor_parallel", "sizes"), [(1, 1, [5]), (3, 1, [4, 1, 3]), (3, 1, [0, 5, 2]), (4, 2, [3, 4])]
)
def test_info_nce_equals_one_dense_process(world: int, tensor_parallel: int, sizes: list[int]) -> None:
    ranks(world).run(check_info_nce, tensor_parallel, sizes)
