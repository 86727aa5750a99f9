"""Partial FC's scheme, as rewritten for the benchmark, beside our head in float64: equal where both mean the same, else
different in known ways.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from harness.bench.baselines import PartialFC
from harness.bench.ranks import Traffic
from models.heads.class_parallel import ClassHeadConfig, ClassParallelHead
from tests.pool import layout, ranks

D = 6
COSFACE, ARCFACE = (1.0, 0.0, 0.35), (1.0, 0.5, 0.0)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, by the largest value wanted."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def check_both(config: ClassHeadConfig, batch: int) -> tuple[float, float, float]:
    """Differences of Partial FC's loss, embedding gradients and row gradients from ours; `batch` samples a rank, the
    same active rows.
    """
    with layout() as mesh:
        head = ClassParallelHead(config, mesh.row_group, mesh.dp, dtype=torch.float64)
        theirs = PartialFC(head.rows.clone(), head.start, config.margin, config.scale, 0.5, mesh.row_group)
        generator = torch.Generator().manual_seed(17 + mesh.rank)
        labels = torch.randint(config.num_classes, (batch,), generator=generator)
        ours_in = torch.randn(batch, D, generator=generator, dtype=torch.float64).requires_grad_()
        theirs_in = ours_in.detach().clone().requires_grad_()

        active = head.begin_step(labels, step=3)
        loss, _ = head(ours_in, labels)
        loss.backward()
        wanted = torch.zeros_like(head.rows)
        wanted[active] = head.row_grad[1]
        found = theirs(theirs_in, labels, active)
        found.backward()
        pairs = [(found.detach()[None], loss.detach()[None]), (theirs_in.grad, ours_in.grad)]
        pairs.append((theirs.weight.grad, wanted))
        return tuple(off(*gathered(*pair)) for pair in pairs)


def gathered(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Each tensor's parts of all ranks in one: errors count by the largest value of the whole world."""
    result = []
    for tensor in tensors:
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, tensor)
        result.append(torch.cat(everyone))
    return result


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(
    ("margin", "gradient", "classes", "rate"),
    [
        (COSFACE, "exact", 11, 1.0),
        (COSFACE, "exact", 203, 0.3),
        (ARCFACE, "straight_through", 11, 1.0),
        (ARCFACE, "straight_through", 203, 0.3),
    ],
)
def test_equal_to_partial_fc(world: int, margin: tuple, gradient: str, classes: int, rate: float) -> None:
    config = ClassHeadConfig(
        num_classes=classes, embedding_dim=D, margin=margin, scale=16.0, gradient=gradient, sample_rate=rate, tile=4
    )
    for errors in ranks(world).run(check_both, config, 5):
        assert max(errors) < 1e-6


@pytest.mark.parametrize("world", [1, 2, 4])
def test_partial_fc_takes_another_gradient_of_arcface(world: int) -> None:
    config = ClassHeadConfig(num_classes=11, embedding_dim=D, margin=ARCFACE, scale=16.0)
    for loss, embeddings, rows in ranks(world).run(check_both, config, 5):
        assert loss < 1e-6
        assert 0.02 < embeddings < 1 and 0.02 < rows < 1


def check_clamp() -> tuple[float, float]:
    """Loss of a sample that points away from its class, towards 100 others: (theirs, ours)."""
    with layout() as mesh:
        config = ClassHeadConfig(num_classes=102, embedding_dim=2, scale=64.0, margin=COSFACE)
        head = ClassParallelHead(config, mesh.row_group, mesh.dp, dtype=torch.float64)
        rows = torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(102, 1)
        rows[0] = -rows[0]
        head.load_full_weight(rows)
        theirs = PartialFC(head.rows.clone(), head.start, config.margin, config.scale, 1.0, mesh.row_group)
        embedding, label = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([0])
        return theirs(embedding, label).item(), head(embedding, label)[0].item()


def test_partial_fc_loses_the_loss_that_ours_tells() -> None:
    for theirs, ours in ranks(2).run(check_clamp):
        assert theirs == pytest.approx(-math.log(1e-30)) and ours == pytest.approx(64 * 2.35 + math.log(101))


def check_step() -> tuple[list[int], int, int, int]:
    """A step with its own sampling and torch's AdamW: sampled rows' ids, rows with a gradient, rows changed, positives
    among them.
    """
    with layout() as mesh:
        torch.manual_seed(mesh.rank)
        rows, start = torch.randn(100, D), 100 * mesh.rank
        head = PartialFC(rows.clone(), start, COSFACE, 16.0, 0.2, mesh.row_group)
        optimizer = torch.optim.AdamW(head.parameters(), lr=0.1, foreach=False, fused=False)
        labels = torch.tensor([0, 7, 100 * mesh.world_size - 1])
        head(torch.randn(3, D), labels).backward()
        touched = head.weight.grad.abs().sum(1).nonzero()[:, 0]
        optimizer.step()
        changed = (head.weight.detach() != rows).any(1).sum().item()
        own = {int(label) - start for label in labels if 0 <= label - start < 100}
        return touched.tolist(), len(head.weight.grad), changed, len(own - set(touched.tolist()))


def test_partial_fc_samples_a_fixed_number_and_updates_every_row() -> None:
    found = ranks(2).run(check_step)
    for touched, gradients, changed, positives_left_out in found:
        assert len(touched) == 20 and positives_left_out == 0
        assert gradients == 100 and changed == 100
    assert found[0][0] != found[1][0]


def check_traffic() -> tuple[float, float]:
    with layout():
        traffic, x = Traffic(), torch.zeros(6)
        plain = dist.all_reduce
        with traffic.counted():
            dist.all_reduce(x)
            dist.all_gather([torch.zeros(6) for _ in range(3)], tensor=x)
        assert dist.all_reduce is plain
        counted = traffic.bytes
        dist.all_reduce(x)
        return counted, traffic.bytes


def test_bytes_are_those_of_a_ring() -> None:
    """24 bytes over 3 ranks: an all-reduce passes 2/3 of them twice, an all-gather 2/3 of its 72."""
    assert ranks(3).run(check_traffic) == [(32 + 48, 32 + 48)] * 3
