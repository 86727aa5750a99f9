"""`shelfmark checkpoint`: List the checkpoints of a run, or read them through; also under torchrun."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from harness.core.errors import UserError
from harness.core.files import printable
from harness.core.manifest import MANIFEST, at_first, file_sizes, verify
from harness.core.tables import format_table

EXAMPLE = "shelfmark checkpoint list runs/products"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Prints a line for each checkpoint: step, time of writing, size, and whether it can be loaded.

    Args:
        action: list compares names and sizes with the manifest; verify also reads every file, shared out over the ranks
            of torchrun, and compares its checksum. Exit code 0 of verify means that all are whole.
        path: a run folder, or with verify one of its step folders.
    """

    action: Literal["list", "verify"] = field(kw_only=False)
    path: Path = field(kw_only=False)


def run(config: CheckpointConfig) -> dict[str, Any]:
    """Prints and returns the rows.

    Raises:
        UserError: there is no checkpoint; with verify, one is damaged.
    """
    from harness.core.mesh import Mesh, MeshConfig  # here: they load PyTorch
    from harness.train import checkpoint_files

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    with ExitStack() as stack:
        mesh = stack.enter_context(Mesh(MeshConfig(device="cpu"))) if several else None
        steps = at_first(lambda: _steps(config.path), mesh)
        if not steps:
            raise UserError(
                f"{config.path} has no checkpoint", "Name a run folder that training wrote, or one of its step folders"
            )
        first = mesh is None or mesh.rank == 0
        marks = at_first(lambda: _marks(steps[0].parent), mesh)
        rows = []
        for step in steps:
            if step.suffix:
                state = "never finished"
            elif config.action == "list":
                state = at_first(partial(verify, step, read=lambda _: False), mesh)
            else:
                state = checkpoint_files.problem(step, mesh)
            rows.append({**at_first(partial(_facts, step), mesh), "kept as": marks.get(step.name, "")})
            rows[-1]["state"] = printable(state, 300) or ("complete" if config.action == "list" else "whole")
        if first:
            print(format_table(rows))
    wrong = sum(row["state"] not in ("complete", "whole", "never finished") for row in rows)
    if wrong and config.action == "verify":
        raise UserError(f"{wrong} of {len(rows)} are damaged", "Training goes on from the newest one that is whole")
    return {"checkpoints": rows}


def _steps(path: Path) -> list[Path]:
    """The step folders of a run, or `path` if it is one, the oldest first."""
    if (path / "state.json").exists() or (path / MANIFEST).exists():
        return [path]
    return sorted(step for step in (path / "checkpoints").glob("step-*") if step.is_dir())


def _marks(folder: Path) -> dict[str, str]:
    """Name of a step folder -> best, latest or both."""
    from harness.train.checkpoint_files import best_of

    latest, best = folder / "latest", best_of(folder)
    found = {"latest": latest.read_text().strip() if latest.is_file() else "", "best": best.name if best else ""}
    return {step: ", ".join(mark for mark, of in found.items() if of == step) for step in found.values()}


def _facts(step: Path) -> dict[str, Any]:
    written = datetime.fromtimestamp(step.stat().st_mtime).isoformat(" ", "minutes")
    size = sum(max(size, 0) for size in file_sizes(step).values())
    return {"checkpoint": step.name, "written": written, "MB": round(size / 1e6, 1)}
