"""Opens a trained run for evaluation or export: its configuration, a checkpoint, the method with its weights."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from harness.catalogue.catalogue import Catalogue
from harness.catalogue.wholeness import require_whole
from harness.core.build import build
from harness.core.errors import UserError
from harness.core.files import printable
from harness.core.manifest import at_first
from harness.core.mesh import Mesh
from harness.evaluate.evaluation import Evaluation
from harness.evaluate.part_weights import PHOTOS, Choice, weigh_parts
from harness.text.tokenizer import Tokenizer
from harness.train import checkpoint, checkpoint_files
from harness.train.config import RunConfig, load
from models.method import Method, MethodConfig


def open_settings(run: Path, tensor_parallel: int) -> RunConfig:
    """The configuration of `run`, checked for a layout before any process group starts.

    Raises:
        UserError: `run` is not a run folder, or the layout does not divide the model.
    """
    settings = load(run)
    if errors := settings.model.errors(tensor_parallel):
        raise UserError(errors[0])
    return settings


def find_checkpoint(run: Path, wanted: Path | None, mesh: Mesh | None = None, head: bool = False) -> Path:
    """The checkpoint `wanted`, the best one of `run` where that is `best`, or else its newest complete one. With `mesh`
    collective: each rank checks its share of the files, those of the class rows only with `head`.

    Raises:
        UserError: no checkpoint is complete, or `wanted` is not, or no best one was kept.
    """
    if wanted == Path("best"):
        wanted = at_first(
            lambda: checkpoint_files.best_of(run / "checkpoints"), mesh, "looking for the best checkpoint"
        )
        if wanted is None:
            raise UserError(f"{run} has no best checkpoint", "It keeps one where train.keep_best names a figure")
    if wanted is not None:
        if problem := checkpoint_files.problem(wanted, mesh, head):
            raise UserError(f"{wanted}: {problem}", "Name another step folder, or leave out --checkpoint")
        return wanted
    path, passed_over = checkpoint_files.newest(run / "checkpoints", mesh, head)
    if path is None:
        raise UserError(f"{run} has no complete checkpoint", "; ".join(passed_over))
    if os.environ.get("RANK", "0") == "0":
        for line in passed_over:
            print(printable(f"passed over checkpoint {line}", 1000))
    return path


def load_method(settings: RunConfig, path: Path, tokenizer: Tokenizer, mesh: Mesh) -> tuple[Method, MethodConfig]:
    """The method without its head, in evaluation mode, with the weights of checkpoint `path`, and its configuration;
    collective.
    """
    method, model = start_method(settings, tokenizer, mesh)
    load_weights(method, settings, path, mesh)
    return method, model


def choose_part_weights(settings: RunConfig, method: Method, tokenizer: Tokenizer, path: Path, mesh: Mesh) -> Choice:
    """Weighs the parts of a document's vector by the run's own catalogue and evaluation.split, for --weigh-parts;
    collective.

    Args:
        settings: of the run.
        method: with the weights of checkpoint `path`.
        tokenizer: the run's.
        path: the checkpoint, whose classes tell products never trained on from others.
        mesh: the ranks.

    Raises:
        UserError: the documents are not a sum of parts, or there is no photo to choose by.
    """
    if not method.part_weights:
        fusion = getattr(settings.model, "fusion_kind", "")
        what = f"model.fusion_kind {fusion}" if fusion else settings.method
        raise UserError(f"--weigh-parts weighs the parts of a sum, {what} has none", "OCLEAR's fusion_kind sum has")
    task = replace(settings.evaluation, tasks=("photo",), final_tasks=(), distractors=(), baselines=PHOTOS)
    catalogue, classes = Catalogue(settings.data.catalogue), path / "classes.parquet"
    require_whole(catalogue, mesh, ("pairs",))
    evaluation = Evaluation(task, settings.method, settings.data, settings.model, catalogue, tokenizer, classes, mesh)
    return weigh_parts(evaluation, method)


def start_method(settings: RunConfig, tokenizer: Tokenizer, mesh: Mesh) -> tuple[Method, MethodConfig]:
    """The method without its head, in evaluation mode, with the weights that its seed gives, and its configuration."""
    method, model = build(
        settings.method,
        settings.model,
        settings.head,
        mesh,
        num_classes=0,
        vocab_size=tokenizer.vocab_size,
        seed=settings.seed,
        precision=settings.train.precision,
    )
    method.towers.eval()
    return method, model


def load_weights(method: Method, settings: RunConfig, path: Path, mesh: Mesh) -> None:
    """Loads the towers of checkpoint `path`; collective.

    A checkpoint with an average of its weights (train.ema_decay) gives that.
    """
    checkpoint.load(path, checkpoint.Trainable(method.towers, None, None, None), mesh)
    if mesh.rank == 0 and checkpoint.has_average(path):
        print(f"{path.name}: the average of the weights (train.ema_decay {settings.train.ema_decay})")
