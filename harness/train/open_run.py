"""A trained run, opened again for evaluation or export: which checkpoint, and the method with its weights."""

from __future__ import annotations

import os
from pathlib import Path

from harness.core.build import build
from harness.core.errors import UserError
from harness.core.files import printable
from harness.core.mesh import Mesh
from harness.text.tokenizer import Tokenizer
from harness.train import checkpoint
from harness.train.config import RunConfig, load
from models.method import Method, MethodConfig


def open_settings(run: Path, tensor_parallel: int, batch_size: int) -> RunConfig:
    """The configuration of `run`, checked for use on that layout before any process group starts.

    Raises:
        UserError: no run there, a layout that does not divide, no image in a batch.
    """
    settings = load(run)
    errors = settings.model.errors(tensor_parallel) if tensor_parallel > 0 else []
    if errors or batch_size < 1:
        raise UserError(errors[0] if errors else f"--batch-size is {batch_size}; it must be at least 1")
    return settings


def find_checkpoint(run: Path, wanted: Path | None, mesh: Mesh | None = None) -> Path:
    """The checkpoint `wanted`, or else the newest complete one of `run`; with `mesh` collective, the files shared out
    over the ranks.

    Raises:
        UserError: there is no complete one.
    """
    if wanted is not None:
        if problem := checkpoint.problem(wanted, mesh):
            raise UserError(f"{wanted}: {problem}", "Name another step folder, or leave out --checkpoint")
        return wanted
    path, passed_over = checkpoint.newest(run / "checkpoints", mesh)
    if path is None:
        raise UserError(f"{run} has no complete checkpoint", "; ".join(passed_over))
    if os.environ.get("RANK", "0") == "0":
        for line in passed_over:
            print(printable(f"passed over checkpoint {line}", 1000))
    return path


def load_method(settings: RunConfig, path: Path, tokenizer: Tokenizer, mesh: Mesh) -> tuple[Method, MethodConfig]:
    """The method without its head, in evaluation mode, with the weights of checkpoint `path`, and its configuration;
    collective.

    Where the checkpoint holds an average of its weights (train.ema_decay), that is taken.
    """
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
    checkpoint.load(path, checkpoint.Trainable(method.towers, None, None, None), mesh)
    if mesh.rank == 0 and checkpoint.has_average(path):
        print(f"{path.name}: the average of the weights (train.ema_decay {settings.train.ema_decay})")
    method.towers.eval()
    return method, model
