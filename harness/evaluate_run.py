"""`shelfmark eval RUN`: a run's newest checkpoint against a split of its catalogue; under torchrun the work is shared."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import checkpoint
from harness.config import RunConfig, load
from harness.data.catalogue import Catalogue
from harness.data.tokenizer import Tokenizer
from harness.errors import UserError
from harness.evaluate import Evaluation, print_report
from harness.mesh import Mesh, MeshConfig
from harness.methods import build

EXAMPLE = "torchrun --nproc-per-node 2 -m harness eval runs/grocery --split test --slices department"


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluates a run's checkpoint.

    Args:
        run: the run folder that training wrote.
        checkpoint: a step folder of it; the newest complete one by default.
        catalogue: another catalogue to evaluate on; the run's own by default.
        split: split of the queries.
        slices: attribute columns whose values get figures of their own.
        distractors: other catalogues whose documents join the gallery.
        batch_size: images embedded at once.
        tensor_parallel: ranks that share one copy of the towers.
    """

    run: Path
    checkpoint: Path | None = None
    catalogue: Path | None = None
    split: str = "test"
    slices: tuple[str, ...] = ()
    distractors: tuple[Path, ...] = ()
    batch_size: int = 128
    tensor_parallel: int = 1


def run(config: EvalConfig) -> dict[str, Any]:
    """Evaluates, prints a table on rank 0 and returns the figures with their slices.

    Raises:
        UserError: no run or checkpoint there, an empty split, an unknown slice, a layout that does not divide.
    """
    settings = load(config.run)
    errors = settings.model.errors(config.tensor_parallel) if config.tensor_parallel > 0 else []
    if errors or config.batch_size < 1:
        raise UserError(errors[0] if errors else f"--batch-size is {config.batch_size}; it must be at least 1")
    path, catalogue = find_checkpoint(config), Catalogue(config.catalogue or settings.data.catalogue)
    mesh = Mesh(MeshConfig(tensor_parallel=config.tensor_parallel))
    try:
        report = _evaluate(config, settings, path, catalogue, mesh)
    finally:
        mesh.close()
    if mesh.rank == 0:
        print_report(report, f"{config.run} at {path.name}: split {config.split} of {catalogue.path}")
    return {"checkpoint": str(path), "split": config.split, **report.figures, "slices": report.rows}


def find_checkpoint(config: EvalConfig) -> Path:
    """The checkpoint that was asked for.

    Raises:
        UserError: there is no complete one.
    """
    if config.checkpoint is not None:
        if problem := checkpoint.verify(config.checkpoint):
            raise UserError(f"{config.checkpoint}: {problem}", "Name another step folder, or leave out --checkpoint")
        return config.checkpoint
    path, passed_over = checkpoint.newest(config.run / "checkpoints")
    if path is None:
        raise UserError(f"{config.run} has no complete checkpoint", "; ".join(passed_over))
    if os.environ.get("RANK", "0") == "0":
        for line in passed_over:
            print(f"passed over checkpoint {line}")
    return path


def _evaluate(config: EvalConfig, settings: RunConfig, path: Path, catalogue: Catalogue, mesh: Mesh) -> Any:
    tokenizer = Tokenizer.load(config.run)
    method, _ = build(
        settings.method,
        settings.model,
        settings.head,
        mesh,
        num_classes=0,
        vocab_size=tokenizer.vocab_size,
        seed=settings.seed,
        precision=settings.train.precision,
    )
    checkpoint.load(path, checkpoint.Trainable(method.towers, None, None, None), mesh)
    task = replace(
        settings.evaluation,
        split=config.split,
        slices=config.slices or settings.evaluation.slices,
        distractors=config.distractors,
        batch_size=config.batch_size,
    )
    evaluation = Evaluation(task, settings.data, settings.model, catalogue, tokenizer, path / "classes.parquet", mesh)
    return evaluation.run(method)
