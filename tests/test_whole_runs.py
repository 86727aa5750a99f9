"""Whole runs by the command that torchrun starts: with sequence parallelism and recomputation, and with ranks that get
no sample, the same losses.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pool import ranks
from tests.runs import arguments

STEPS, CLIP = 20, 0.5
# 17 tokens of an image and 15 of a text: no number of tensor-parallel ranks divides them. Every kind of parameter that
# sees a range of them.
SETTINGS: dict[str, Any] = {
    "train.steps": STEPS,
    "model.vision.num_layers": 2,
    "model.vision.pooling": "class",
    "model.vision.layer_scale": 0.5,
    "model.vision.qk_norm": True,
    "model.text.max_length": 15,
    "model.text.post_norm": True,
    "optimizer.warmup_steps": 5,
    "optimizer.clip_norm": CLIP,
    "data.queries_per_step": 13,
    "data.documents_per_step": 6,
}
FROZEN = {
    "optimizer.frozen": ["vision.stem", "vision.block.layers.0", "text.block.*.self_attn_bda", "*.layers.1.mlp.*.bias"]
}
SEQUENCE = {"mesh.tensor_parallel": 2, "mesh.sequence_parallel": True}
FULL = SEQUENCE | {"mesh.recompute": "full"}


def trained(catalogue: Path, run: Path, settings: dict[str, Any]) -> None:
    """On every rank of a pool: what torchrun starts."""
    from harness.train.run import train

    train(arguments(catalogue, run, **SETTINGS | settings))


def curve(catalogue: Path, run: Path, world: int, settings: dict[str, Any]) -> list[tuple[float, float]]:
    """(loss, gradient norm before clipping) of all steps that the run folder has after its training."""
    ranks(world).run(trained, catalogue, run, settings)
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [(line["train/loss"], line["train/gradient_norm"]) for line in lines if "train/loss" in line]


def require_equal(found: list[tuple[float, float]], wanted: list[tuple[float, float]], steps: int = STEPS) -> None:
    assert len(found) == len(wanted) == steps
    assert all(norm > CLIP for _, norm in wanted), "a step was not clipped"
    for step, ((loss, norm), (wanted_loss, wanted_norm)) in enumerate(zip(found, wanted, strict=True)):
        assert abs(loss / wanted_loss - 1) < 1e-4, f"step {step}: loss {loss} against {wanted_loss}"
        assert abs(norm / wanted_norm - 1) < 1e-3, f"step {step}: norm {norm} against {wanted_norm}"


@pytest.fixture(scope="module")
def plain(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    """The curve of one rank."""
    found = curve(catalogue, tmp_path_factory.mktemp("plain") / "run", 1, {})
    assert found[-1][0] < found[0][0]
    return found


@pytest.mark.parametrize(
    ("world", "mesh"),
    [pytest.param(2, SEQUENCE, marks=pytest.mark.full), (2, FULL), pytest.param(4, FULL, marks=pytest.mark.full)],
)
def test_a_sequence_parallel_run_equals_that_of_one_rank(
    world: int, mesh: Any, plain: list[tuple[float, float]], catalogue: Path, tmp_path: Path
) -> None:
    require_equal(curve(catalogue, tmp_path / "run", world, mesh), plain)


def test_with_frozen_parts_it_goes_on_without_at_another_layout(catalogue: Path, tmp_path: Path) -> None:
    wanted = curve(catalogue, tmp_path / "plain", 1, FROZEN)
    ranks(2).run(trained, catalogue, tmp_path / "run", FROZEN | SEQUENCE | {"train.stop_at": 10})
    require_equal(curve(catalogue, tmp_path / "run", 1, FROZEN), wanted)


FEW = {"train.steps": 4, "data.queries_per_step": 3, "data.documents_per_step": 1}


@pytest.fixture(scope="module", params=["classification", pytest.param("contrastive", marks=pytest.mark.full)])
def few(request: Any, catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any]:
    """Settings of a run of 3 queries in a step, and its curve of one rank."""
    settings = FEW | {"model.objective": request.param, "model.vision.pooling": "attention"}
    return settings, curve(catalogue, tmp_path_factory.mktemp("few") / "run", 1, settings)


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (4, {}),
        pytest.param(4, FULL, marks=pytest.mark.full),
        (1, {"data.micro_batches": 5}),
        pytest.param(2, {"data.micro_batches": 3}, marks=pytest.mark.full),
    ],
)
def test_ranks_and_micro_batches_without_a_sample(
    world: int, settings: dict[str, Any], few: tuple[dict[str, Any], Any], catalogue: Path, tmp_path: Path
) -> None:
    same, wanted = few
    require_equal(curve(catalogue, tmp_path / "run", world, same | settings), wanted, 4)
