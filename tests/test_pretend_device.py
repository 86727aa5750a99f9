"""A whole training step of every method on a device that is not the CPU: nothing in it may lie on the host by
oversight.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from models.batch import TENSORS, Batch
from tests.pool import layout, ranks
from tests.pretend import CPU, DEVICE, RECIPES, OnDevice, Pretend, cases, on_pretend_device, own_step

SHARED = {"document_images", "document_tokens", "document_weights"}
READS = {
    "oclear": SHARED | {"query_images", "query_labels", "query_weights", "document_labels"},
    "make": SHARED
    | {"query_tokens", "query_weights", "document_labels", "categories", "keywords", "query_keywords"}
    | {"masked_tokens", "masked_patches"},
    "item": SHARED | {"document_labels", "masked_tokens", "masked_patches", "masked_titles", "other_tokens"},
}


def state(made: Any) -> torch.Tensor:
    """All numbers that a step changes, on the CPU."""
    parts = [*made.method.towers.parameters(), *made.ema.state.values()]
    parts += [made.method.head.rows] if made.rows is not None else []
    parts += made.method.memory.buffers() if made.method.memory is not None else []
    return torch.cat([(x.raw if isinstance(x, OnDevice) else x).detach().double().flatten() for x in parts])


def two_steps(made: Any, mesh: Any, num_classes: int) -> tuple[list[float], torch.Tensor]:
    """Loss and gradient norm of both, and how far they moved the state."""
    if (head := made.method.head) is not None:  # a device draws other rows than a CPU
        head.rows.copy_(head.draw(torch.empty_like(head.rows, device="cpu")).to(head.rows.device))
    data, before = own_step(made.config, num_classes, mesh), state(made)
    results = [made.train_step(data) for _ in range(2)]
    return [x for r in results for x in (r.loss.item(), r.norm)], state(made) - before


def check_step(name: str, tensor_parallel: int) -> None:
    from tests.measured import trainer

    recipe = RECIPES[name] | {"mesh.tensor_parallel": tensor_parallel, "data.micro_batches": 2}
    with layout(tensor_parallel) as mesh:
        with on_pretend_device(mesh):
            found, moved = two_steps(trainer(recipe, recipe["num_classes"], mesh), mesh, recipe["num_classes"])
        wanted, wanted_move = two_steps(trainer(recipe, recipe["num_classes"], mesh), mesh, recipe["num_classes"])
    bf16 = "train.precision" in recipe
    # Attention is another kernel there: rounding differs, and AdamW makes a full step of a gradient that is nothing but
    # rounding.
    assert found == pytest.approx(wanted, rel=3e-2 if bf16 else 1e-3)
    assert wanted_move.norm() > 0 and (bf16 or (moved - wanted_move).norm() <= 0.2 * wanted_move.norm())


@pytest.mark.parametrize(("world", "tensor_parallel", "name"), cases((1, 1), (2, 2), (2, 1)))
def test_a_step_of_every_method_runs_there_and_gives_what_the_cpu_gives(
    world: int, tensor_parallel: int, name: str
) -> None:
    ranks(world, "pretend").run(check_step, name, tensor_parallel)


def left_behind(name: str) -> set[str]:
    """The tensors of a batch without which, on the device, a step fails."""
    from tests.measured import trainer

    recipe, moved, needed = RECIPES[name] | {"data.micro_batches": 2}, Batch.to, set()
    with layout() as mesh, on_pretend_device(mesh):
        made = trainer(recipe, recipe["num_classes"], mesh)
        for tensor in TENSORS:
            try:
                Batch.to = lambda batch, *where, tensor=tensor: replace(  # type: ignore[method-assign, misc]
                    moved(batch, *where), **{tensor: getattr(batch, tensor)}
                )
                made.train_step(own_step(made.config, recipe["num_classes"], mesh))
            except RuntimeError as error:
                assert "tensors of both devices" in str(error)
                needed.add(tensor)
            finally:
                Batch.to = moved  # type: ignore[method-assign]
            if made.method.head is not None:
                made.method.head.end_step()
    return needed


@pytest.mark.parametrize("name", READS)
def test_a_tensor_of_the_batch_that_stays_on_the_host_fails_the_step(name: str) -> None:
    assert ranks(1, "pretend").run(left_behind, name) == [READS[name]]


def refusals() -> dict[str, str]:
    """Missing devices, and the reasons."""
    host, found = torch.ones(3), {}
    with layout() as mesh, Pretend():
        x = torch.ones(3, device=DEVICE)
        tries = {
            "sum": lambda: x + host,
            "product": lambda: x @ host,
            "concatenation": lambda: torch.cat([x, host]),
            "concatenation with a number": lambda: torch.cat([x, host[:1]]),
            "stack with a number": lambda: torch.stack([x.sum(), host.sum()]),
            "index": lambda: x[torch.tensor([0])],
            "place": lambda: x.index_put_((torch.tensor([0]),), x[:1]),
            "list": lambda: torch._foreach_add_([x], [host]),
            "all-reduce": lambda: dist.all_reduce(host, group=mesh.dp),
            "gather": lambda: dist.all_gather_into_tensor(x.clone(), host, group=mesh.dp),
            "data": lambda: setattr(x, "data", host),
        }
        for name, attempt in tries.items():
            try:
                attempt()
                found[name] = ""
            except RuntimeError as error:
                found[name] = str(error)
        x += host.sum()  # CUDA takes a single number from the host
        dist.all_reduce(x, group=mesh.dp)
        dist.all_gather_object([None], 1, group=mesh.dp)
        assert x.device == DEVICE and x.cpu().device == CPU and x.tolist() == [4.0] * 3
    return found


def test_the_devices_do_not_mix() -> None:
    (found,) = ranks(1, "pretend").run(refusals)
    for name, error in found.items():
        assert "of both devices" in error or "in a collective" in error or "data on cpu" in error, (name, error)


def test_without_its_mode_the_device_does_nothing() -> None:
    ranks(1, "pretend").run(check_outside)


def check_outside() -> None:
    with Pretend():
        x = torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="outside"):
        x + 1
