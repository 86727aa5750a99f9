"""Gradients that are reduced while backward runs are those of a reduction afterwards, for every recipe and every row of
every ablation.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.core.cli import leaves
from harness.train import optimizer
from harness.train.config import parse
from harness.train.overlap import OverlappedReduction
from jobs import ablate
from tests.measured import step_of, trainer
from tests.pool import layout, ranks

ROOT = Path(__file__).parents[1]
BUCKET = 3000  # numbers; megatron-core's 40 million would put all of a tiny model into one bucket
CLASSES = 60
CATALOGUES = ("model.text.vocab_size", "model.num_keywords")  # 0 in a recipe: the catalogue's
SMALL: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "num_layers": 1, "max_length": 12}
TINY: dict[str, Any] = {
    **{
        f"model.{tower}.{key}": value for tower in ("vision", "text", "query", "fusion") for key, value in SMALL.items()
    },
    "model.vision.kind": "transformer",
    "model.vision.image_size": 32,
    "data.preprocess.image_size": 32,
    "model.vision.patch_size": 8,
    "model.vision.stem_channels": [4, 4, 8],
    "model.vision.stem_blocks": [0, 0, 0],
    "model.embedding_dim": 16,
    "model.text.vocab_size": 128,
    "model.num_keywords": 20,
    "model.memory_bank": 16,
    "model.memory_after": 0,
    "model.fusion_heads": 2,
    "data.queries_per_step": 6,
    "data.documents_per_step": 6,
    "optimizer.warmup_steps": 1,
    "optimizer.clip_norm": 0.0,  # the norm would sum over other buckets, in another order
}


def tiny(argv: list[str]) -> dict[str, Any]:
    """The run of a command line as dotted keys, in a size that takes no time; a part that it leaves out stays out."""
    keys = dict(leaves(parse(argv, 1)[0].to_dict()))
    del keys["run_dir"]
    return keys | {key: value for key, value in TINY.items() if key in keys and (keys[key] or key in CATALOGUES)}


@functools.cache
def runs() -> dict[str, dict[str, Any]]:
    """Every recipe, and every row of every ablation."""
    found = {file.stem: tiny(["--config", str(file)]) for file in sorted((ROOT / "jobs/recipes").glob("*.yaml"))}
    for file in sorted((ROOT / "jobs/ablations").glob("*.yaml")):
        ablation = ablate.Ablation.read(file)
        where = ablate.AblationConfig(file=file, catalogue=Path("catalogue"), out=Path("runs/unused"))
        for cell in ablation.cells:
            line = ablate.command(where, ablation, cell, ablation.seeds[0])
            found[f"{file.stem}: {cell}"] = tiny(line[line.index("harness.train") + 1 :])
    return found


def steps(recipe: dict[str, Any], overlap: str) -> list[torch.Tensor]:
    """The towers' parameters after three steps."""
    original = optimizer.DistributedDataParallelConfig
    optimizer.DistributedDataParallelConfig = functools.partial(original, bucket_size=BUCKET)  # type: ignore[misc]
    try:
        with layout() as mesh:
            torch.manual_seed(0)
            made = trainer(recipe | {"optimizer.overlap": overlap}, CLASSES, mesh)
            assert (made.towers._overlapped is not None) == (overlap == "always")
            assert overlap == "never" or len(made.towers.ddp.bucket_groups) > 2
            torch.manual_seed(1 + mesh.rank)
            for _ in range(3):
                made.train_step(step_of(made.config, CLASSES, mesh.dp.size()))
            return [p.detach().clone() for p in made.method.towers.parameters()]
    finally:
        optimizer.DistributedDataParallelConfig = original  # type: ignore[misc]


def check_same(recipe: dict[str, Any]) -> float:
    """Largest difference that it makes to a parameter."""
    pairs = zip(steps(recipe, "always"), steps(recipe, "never"), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


# One of each pattern of parameters without a gradient: none, some heads, a whole tower. `make test-full` has all runs.
FEW = ("oclear_demo", "make_fashion", "oclear: image only")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FEW else pytest.mark.full) for n in runs()])
def test_gradients_reduced_while_backward_runs_are_those_reduced_afterwards(name: str) -> None:
    assert (
        max(ranks(2).run(check_same, runs()[name])) < 1e-6
    )  # a gradient of only one rank makes 1e-3, the learning rate


class Group:
    """A bucket group as megatron-core drives it: of parameters 0..n-1, writing down its reductions."""

    def __init__(self, name: str, parameters: list[nn.Parameter], log: list[str]) -> None:
        self.name, self.log, self.params = name, log, set(parameters)
        self.per_param_grad_ready_counts: dict[nn.Parameter, int] = {}
        self.golden_per_param_grad_ready_counts: dict[nn.Parameter, int] = {}

    def start_grad_sync(self, force_all_reduce: bool = False) -> None:
        self.log.append(self.name)

    def got(self, parameter: nn.Parameter) -> None:
        """register_grad_ready"""
        self.per_param_grad_ready_counts[parameter] = 1
        if self.per_param_grad_ready_counts == self.golden_per_param_grad_ready_counts:
            self.start_grad_sync()

    def reset(self) -> None:
        if not self.golden_per_param_grad_ready_counts:
            assert self.params == self.per_param_grad_ready_counts.keys()
            self.golden_per_param_grad_ready_counts = self.per_param_grad_ready_counts
        self.per_param_grad_ready_counts = {}


@pytest.fixture
def driven() -> tuple[OverlappedReduction, list[Group], list[nn.Parameter], list[str]]:
    """Three groups of two parameters after a first step in which the last parameter of the first and both of the second
    got no gradient.
    """
    log: list[str] = []
    p = [nn.Parameter(torch.zeros(1)) for _ in range(6)]
    groups = [Group(name, p[2 * i : 2 * i + 2], log) for i, name in enumerate("abc")]
    reduction = OverlappedReduction(groups, {parameter: f"p{i}" for i, parameter in enumerate(p)})
    reduction.begin()
    for group, parameter in ((groups[2], p[4]), (groups[2], p[5]), (groups[0], p[0])):
        group.got(parameter)
    assert log == []  # megatron-core does not know yet what it waits for
    reduction.finish()
    assert log == ["a", "b", "c"]
    for group in groups:
        group.start_grad_sync()  # finish_grad_sync, in the first step
    assert log == ["a", "b", "c"]
    log.clear()
    for group in groups:
        group.reset()
    reduction.begin()
    return reduction, groups, p, log


def test_groups_start_in_one_order_whatever_order_they_are_ready_in(driven: Any) -> None:
    reduction, groups, p, log = driven
    for parameter in (p[5], p[4]):
        groups[2].got(parameter)
    assert log == []  # a goes first
    groups[0].got(p[0])
    assert log == ["a", "b", "c"]
    reduction.finish()
    assert log == ["a", "b", "c"]


def test_a_group_that_is_never_ready_starts_when_backward_is_over(driven: Any) -> None:
    reduction, groups, p, log = driven
    groups[0].got(p[0])
    groups[2].got(p[4])
    assert log == ["a", "b"]
    reduction.finish()
    assert log == ["a", "b", "c"]


@pytest.mark.parametrize("late", [1, 3])
def test_a_gradient_that_comes_after_its_reduction_ends_the_run(driven: Any, late: int) -> None:
    reduction, groups, p, _ = driven
    groups[0].got(p[0])
    groups[late // 2].got(p[late])
    with pytest.raises(RuntimeError, match=f"^p{late}: .*optimizer.overlap to never"):
        reduction.finish()
