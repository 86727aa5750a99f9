"""Waits of the host for the device in one training step: counted on the pretend device, and bounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from unittest import mock

import pytest
import torch

from tests.pool import layout, ranks
from tests.pretend import DEVICE, RECIPES, Pretend, cases, on_pretend_device, own_step

GATE = (
    "harness/train/trainer.py _to_copy"  # loss and gradient norm: nothing is updated before they are known to be finite
)
ACTIVE = "models/heads/class_parallel.py nonzero"  # how many class rows the step draws
EXCHANGE = ["models/comm.py _to_copy"] * 2  # a number there, the numbers of all ranks back


def waits(name: str, tensor_parallel: int, known: bool, added: str = "") -> list[str]:
    """Those of a second step, in which `added` is done beside a loss."""
    from models.heads import mean
    from tests.measured import trainer

    plain = mean.global_mean

    def with_more(terms: torch.Tensor, *rest: object) -> torch.Tensor:
        ADDED[added](terms)
        return plain(terms, *rest)  # type: ignore[arg-type]

    with layout(tensor_parallel) as mesh, on_pretend_device(mesh) as pretend:
        recipe = RECIPES[name] | {"mesh.tensor_parallel": tensor_parallel, "data.micro_batches": 2}
        made = trainer(recipe, recipe["num_classes"], mesh)
        step = own_step(made.config, recipe["num_classes"], mesh, known)
        made.train_step(step)
        pretend.waits.clear()
        with mock.patch("models.item.global_mean", with_more if added else plain):
            made.train_step(step)
        return pretend.waits


@pytest.mark.parametrize(("world", "tensor_parallel", "name"), cases((1, 1), (2, 1), (2, 2)))
def test_a_step_waits_for_the_finite_gate_and_for_the_number_of_active_rows(
    world: int, tensor_parallel: int, name: str
) -> None:
    sampled = RECIPES[name].get("head.sample_rate", 1.0) < 1 and RECIPES[name].get("model.objective") != "contrastive"
    for found in ranks(world, "pretend").run(waits, name, tensor_parallel, True):
        assert found == [ACTIVE] * sampled + [GATE]


@pytest.mark.parametrize(("name", "exchanges"), [("oclear", 3), ("item", 2), ("make", 12)])
def test_who_does_not_tell_the_sizes_waits_for_their_exchange(name: str, exchanges: int) -> None:
    """Of each micro-batch, and of the head's whole step; so the count above is not an accident of the counter."""
    for found in ranks(2, "pretend").run(waits, name, 1, False):
        assert Counter(found) == Counter([ACTIVE] * (name == "oclear") + [GATE] + EXCHANGE * exchanges)


ADDED: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "tensor from numbers": lambda x: torch.tensor([1.0], device=x.device),
    "copy of pageable memory": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "one number into places": lambda x: (
        x.detach().clone().__setitem__(torch.zeros(1, dtype=torch.int64, device=x.device), 1.0)
    ),
    "repeats from a tensor": lambda x: x.repeat_interleave(torch.ones(len(x), dtype=torch.int64, device=x.device)),
}


@pytest.mark.parametrize("added", ADDED)
def test_a_wait_anywhere_in_a_step_is_counted(added: str) -> None:
    """ITEm without a mask of words has one term per loss: what is added waits once in each."""
    (found,) = ranks(1, "pretend").run(waits, "item", 1, True, added)
    more = Counter(found) - Counter([GATE])
    assert sum(more.values()) == 2 * 5 and len(more) == 1, more


def no_waits() -> list[str]:
    with Pretend() as pretend:
        x = torch.zeros(4, 3, device=DEVICE)
        mask = x > 0
        torch.full((), 2.0, device=DEVICE)
        torch.ones(3).pin_memory().to(DEVICE, non_blocking=True)
        x[mask] = 1.0
        x[0] = 1.0
        x.index_fill_(0, torch.arange(2, device=DEVICE), 1.0)
        torch.where(mask, x, 0.0)
        x.repeat_interleave(2, 0)
        return pretend.waits


def test_what_runs_in_the_devices_queue_alone_is_no_wait() -> None:
    assert ranks(1, "pretend").run(no_waits) == [[]]
