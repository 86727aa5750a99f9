"""`shelfmark eval`: Evaluate a run's checkpoint; also under torchrun."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.catalogue.catalogue import Catalogue
from harness.catalogue.wholeness import require_whole
from harness.core.errors import UserError
from harness.core.mesh import Device, Mesh, MeshConfig
from harness.evaluate.evaluation import Evaluation, print_report
from harness.evaluate.tasks.task import require_attributes
from harness.text.tokenizer import Tokenizer
from harness.train.config import RunConfig
from harness.train.open_run import find_checkpoint, load_method, open_settings
from models.ranges import PositiveInt

EXAMPLE = "python jobs/torchrun.py --nproc-per-node 2 -m harness eval runs/grocery --split test --slices department"


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluates a run's checkpoint.

    Args:
        run: the run folder that training wrote.
        checkpoint: a step folder of it, or best (train.keep_best); the newest complete one by default.
        catalogue: another catalogue to evaluate on; the run's own by default.
        split: split of the queries.
        tasks: evaluation tasks (harness/evaluate/tasks); the recipe's tasks and final tasks by default.
        views: what is seen of documents: both, title, image; the recipe's by default.
        slices: attribute columns whose values get figures of their own.
        distractors: other catalogues whose documents join the gallery.
        batch_size: images embedded at once.
        tensor_parallel: ranks that share one copy of the towers.
        device: cuda, cpu, or auto, the GPUs where there are any.
    """

    run: Path = field(kw_only=False)
    checkpoint: Path | None = None
    catalogue: Path | None = None
    split: str = "test"
    tasks: tuple[str, ...] = ()
    views: tuple[str, ...] = ()
    slices: tuple[str, ...] = ()
    distractors: tuple[Path, ...] = ()
    batch_size: PositiveInt = 128
    tensor_parallel: PositiveInt = 1
    device: Device = "auto"


def run(config: EvalConfig) -> dict[str, Any]:
    """Evaluates, prints a table on rank 0 and returns the figures with their slices.

    Raises:
        UserError: no run or checkpoint there, an empty split, an unknown slice, a layout that does not divide.
    """
    settings = open_settings(config.run, config.tensor_parallel)
    catalogue = Catalogue(config.catalogue or settings.data.catalogue)
    with Mesh(MeshConfig(tensor_parallel=config.tensor_parallel, device=config.device)) as mesh:
        require_whole(catalogue, mesh, ("pairs",))
        path = find_checkpoint(config.run, config.checkpoint, mesh)
        report = _evaluate(config, settings, path, catalogue, mesh)
    if mesh.rank == 0:
        print_report(report, f"{config.run} at {path.name}: split {config.split} of {catalogue.path}")
    made_by = {"checkpoint": str(path), "split": config.split, "precision": settings.train.precision}
    return {**made_by, **report.figures, "slices": report.rows}


def _evaluate(config: EvalConfig, settings: RunConfig, path: Path, catalogue: Catalogue, mesh: Mesh) -> Any:
    tokenizer = Tokenizer.load(config.run)
    method, _ = load_method(settings, path, tokenizer, mesh)
    task = replace(
        settings.evaluation,
        split=config.split,
        tasks=config.tasks or settings.evaluation.tasks,
        final_tasks=() if config.tasks else settings.evaluation.final_tasks,
        views=config.views or settings.evaluation.views,
        slices=config.slices or settings.evaluation.slices,
        distractors=config.distractors,
        batch_size=config.batch_size,
    )
    require_attributes(catalogue, config.slices, "--slices")
    if errors := task.errors(settings.method):
        raise UserError(errors[0])
    classes = path / "classes.parquet"
    evaluation = Evaluation(task, settings.method, settings.data, settings.model, catalogue, tokenizer, classes, mesh)
    return evaluation.run(method)
