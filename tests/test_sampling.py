"""Classes drawn by a step: equal at every world size, in proportion, uniform, independent of other steps and blocks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from models.heads.sampling import ID_BLOCK, sampled_classes

CPU = torch.device("cpu")


def drawn_classes(start: int, stop: int, rate: float, seed: int, step: int) -> torch.Tensor:
    """The result of sampled_classes without its empty places."""
    ids = sampled_classes(start, stop, rate, seed, step, CPU)
    return ids[ids != -1]


@pytest.mark.parametrize("rate", [0.1, 0.0001, 0.9999])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_active_set_is_the_same_at_every_world_size(ranks: int, rate: float) -> None:
    classes = 50_000
    whole = drawn_classes(0, classes, rate, 3, 7).sort().values
    bounds = [classes * r // ranks for r in range(ranks + 1)]
    parts = [drawn_classes(a, b, rate, 3, 7) for a, b in pairwise(bounds)]
    assert torch.equal(whole, torch.cat(parts).sort().values)
    assert len(whole.unique()) == len(whole)
    assert torch.equal(whole, drawn_classes(0, classes, rate, 3, 7).sort().values)


def test_an_empty_shard_draws_nothing() -> None:
    assert sampled_classes(7, 7, 0.5, 0, 0, CPU).tolist() == []
    assert drawn_classes(9, 10, 1e-9, 0, 0).tolist() == []


def counts(rate: float, classes: int, steps: int) -> torch.Tensor:
    """[steps, classes], whether each step drew each class."""
    drawn = torch.zeros(steps, classes, dtype=torch.float64)
    for step in range(steps):
        drawn[step, drawn_classes(0, classes, rate, 1, step)] = 1
    return drawn


def test_every_class_is_drawn_equally_often() -> None:
    """Chi-square over the classes of two blocks and a part of a third, 2,000 steps."""
    rate, classes, steps = 0.05, 2 * ID_BLOCK + 100, 2_000
    drawn = counts(rate, classes, steps)
    spread = steps * rate * (1 - rate)
    statistic = float(((drawn.sum(0) - steps * rate) ** 2).sum() / spread)
    # with so many degrees of freedom chi-square is normal: mean `classes`, variance 2 * classes
    assert abs(statistic - classes) < 3.5 * (2 * classes) ** 0.5
    assert abs(float(drawn.mean()) / rate - 1) < 0.002


def test_pairs_within_a_block_steps_and_blocks_are_independent() -> None:
    rate, steps = 0.1, 500
    drawn = counts(rate, 2 * ID_BLOCK, steps) - rate
    one, other = drawn[:, :ID_BLOCK], drawn[:, ID_BLOCK:]
    spread = rate * (1 - rate)

    def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
        """In standard deviations of what independent draws would give."""
        return float((a * b).mean() / spread * (a.numel() ** 0.5))

    assert abs(correlation(one, other)) < 4, "blocks: the same place in two blocks"
    assert abs(correlation(drawn[1:], drawn[:-1])) < 4, "steps"
    for shift in (1, 2, 64, 65, 1024):  # neighbours, and what shares a half of the Feistel network
        pairs = one[:, shift:], one[:, :-shift]
        # without replacement, two places of a block repel each other slightly
        expected = -1 / (ID_BLOCK - 1) * pairs[0].numel() ** 0.5
        assert abs(correlation(*pairs) - expected) < 4, f"places {shift} apart"
    sizes = (one + rate).sum(1)
    assert set(sizes.tolist()) == {409.0, 410.0}  # 409.6, rounded up or down by the key
