"""`shelfmark eval`: Evaluate a run's checkpoint; also under torchrun."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.catalogue.catalogue import Catalogue
from harness.catalogue.wholeness import require_whole
from harness.core.errors import UserError
from harness.core.files import require_writable
from harness.core.mesh import Device, Mesh, MeshConfig
from harness.core.page import save
from harness.core.waiting import on_first_rank
from harness.evaluate.baselines import Baselines, baselines_of
from harness.evaluate.evaluation import Evaluation, EvaluationConfig, Report, print_report
from harness.evaluate.report_page import WORST, draw_report
from harness.evaluate.signs import warnings
from harness.evaluate.tasks.task import require_attributes
from harness.text.tokenizer import Tokenizer
from harness.train import run_baselines
from harness.train.config import RunConfig
from harness.train.frozen_eval import open_frozen
from harness.train.open_run import choose_part_weights, find_checkpoint, load_weights, open_settings, start_method
from models.method import Method
from models.ranges import PositiveInt

EXAMPLE = "python jobs/torchrun.py --nproc-per-node 2 -m harness eval runs/grocery --split test --slices department"


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluates a run's checkpoint, or imported weights as they are.

    Args:
        run: the run folder that training wrote; with --frozen the catalogue.
        frozen: a folder of `shelfmark import`: photo search by its image tower, without any training.
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
        weigh_parts: choose the weights of the parts of a document's vector on the recipe's split (evaluation.split)
            first, where documents are a sum of parts (OCLEAR's fusion_kind sum); as export does.
        report: HTML file to write: worst queries with what they found, products confused, scores, recall by slice.
    """

    run: Path = field(kw_only=False)
    frozen: Path | None = None
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
    weigh_parts: bool = False
    report: Path | None = None


def run(config: EvalConfig) -> dict[str, Any]:
    """Evaluates, prints a table on rank 0 and returns the figures with their slices and baselines.

    Raises:
        UserError: no run, checkpoint or weights there, an empty split, an unknown slice, a layout that does not divide.
    """
    if config.report is not None:
        require_writable(config.report, "--report")
    if config.frozen is not None:
        return _run_frozen(config, config.frozen)
    settings = open_settings(config.run, config.tensor_parallel)
    catalogue = Catalogue(config.catalogue or settings.data.catalogue)
    with Mesh(MeshConfig(tensor_parallel=config.tensor_parallel, device=config.device)) as mesh:
        require_whole(catalogue, mesh, ("pairs",))
        path = find_checkpoint(config.run, config.checkpoint, mesh)
        report, baselines = _evaluate(config, settings, path, catalogue, mesh)
    if mesh.rank == 0:
        _show(report, baselines, f"{config.run} at {path.name}", config.split, catalogue)
    return _figures(report, baselines, config.split, checkpoint=str(path), precision=settings.train.precision)


def _run_frozen(config: EvalConfig, weights: Path) -> dict[str, Any]:
    """`run` for imported weights."""
    for name in ("checkpoint", "catalogue", "tasks", "views", "weigh_parts"):
        if getattr(config, name):
            raise UserError(f"--{name.replace('_', '-')} is of a run, and --frozen has none", f"Leave out --{name}")
    catalogue, title = Catalogue(config.run), f"{weights}, image tower without training"
    with Mesh(MeshConfig(tensor_parallel=config.tensor_parallel, device=config.device)) as mesh:
        require_whole(catalogue, mesh, ("pairs",))
        task = replace(EvaluationConfig(tasks=("photo",)), **_chosen(config))
        require_attributes(catalogue, config.slices, "--slices")
        method, evaluation = open_frozen(weights, task, catalogue, mesh)
        report = _report(config, evaluation, method, title)
        baselines = None
        if evaluation.sample is not None:
            baselines = baselines_of(evaluation.sample, config.split, mesh)
    if mesh.rank == 0:
        _show(report, baselines, title, config.split, catalogue)
    return _figures(report, baselines, config.split, weights=str(weights), precision="fp32")


def _chosen(config: EvalConfig) -> dict[str, Any]:
    """Keys of evaluation that the command line always gives."""
    names = ("split", "slices", "distractors", "batch_size")
    return {name: getattr(config, name) for name in names}


def _evaluate(
    config: EvalConfig, settings: RunConfig, path: Path, catalogue: Catalogue, mesh: Mesh
) -> tuple[Report, Baselines | None]:
    tokenizer = Tokenizer.load(config.run)
    method, _ = start_method(settings, tokenizer, mesh)
    task = replace(
        settings.evaluation,
        **{**_chosen(config), "slices": config.slices or settings.evaluation.slices},
        tasks=config.tasks or settings.evaluation.tasks,
        final_tasks=() if config.tasks else settings.evaluation.final_tasks,
        views=config.views or settings.evaluation.views,
    )
    require_attributes(catalogue, config.slices, "--slices")
    if errors := task.errors(settings.method):
        raise UserError(errors[0])
    classes = path / "classes.parquet"
    evaluation = Evaluation(task, settings.method, settings.data, settings.model, catalogue, tokenizer, classes, mesh)
    baselines = None
    if evaluation.sample is not None:
        baselines = run_baselines.kept(settings, evaluation, mesh)
        baselines = baselines or run_baselines.of_start(settings, evaluation, method, mesh)
    load_weights(method, settings, path, mesh)
    if config.weigh_parts:
        choice = choose_part_weights(settings, method, tokenizer, path, mesh)
        if mesh.rank == 0:
            print(choice)
    return _report(config, evaluation, method, f"{config.run} at {path.name}"), baselines


def _report(config: EvalConfig, evaluation: Evaluation, method: Method, title: str) -> Report:
    """Evaluates `method`, and writes --report; collective."""
    if (page := config.report) is None:
        return evaluation.run(method)
    report = evaluation.run(method, worst=WORST)
    titled = f"{title}, split {config.split}"
    on_first_rank(
        lambda: save(page, draw_report(report, evaluation, titled), "--report"), evaluation.mesh, "drawing the report"
    )
    return report


def _show(report: Report, baselines: Baselines | None, what: str, split: str, catalogue: Catalogue) -> None:
    print_report(report, f"{what}: split {split} of {catalogue.path}", baselines)
    for line in warnings(report.signs, baselines, split) if report.signs else []:
        print(line)


def _figures(report: Report, baselines: Baselines | None, split: str, **made_by: str) -> dict[str, Any]:
    compared = {} if baselines is None else {"baselines": asdict(baselines)}
    return {**made_by, "split": split, **report.figures, "slices": report.rows, **compared}
