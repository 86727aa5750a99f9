"""Trains the cells of an ablation with equal budgets and writes one table.

bash jobs/ablate.sh FILE …
sbatch --array=1-n jobs/ablate.sh FILE …

A cell is a recipe with changed settings, trained once for each seed, for the same number of steps. A finished cell is
not trained again, a stopped one resumes, a failed one does not stop the others. Every task writes the table of the
cells that are finished by then.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.commands.ingest import parse_part
from harness.core.cli import Parser, run_command
from harness.core.errors import UserError
from harness.core.files import read_yaml, write_json
from harness.core.versions import versions
from models.ranges import PositiveInt


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """An ablation.

    Args:
        file: YAML with `recipe` (path relative to the file), `metrics` (names of final figures), `seeds`, `settings`
            (for all cells), and `cells` (name -> settings, dotted keys as on the command line).
        catalogue: the catalogue to train on; its name may be replaced in a cell by data.catalogue.
        out: folder with a run folder for each cell and seed, and table.md.
        ranks: processes that train one cell.
        part: 'i/n' trains every n-th cell from the i-th (from 1) on; all of them by default.
        steps: steps of every cell, in place of the file's; for a trial.
    """

    file: Path
    catalogue: Path
    out: Path
    ranks: PositiveInt = 2
    part: str | None = None
    steps: PositiveInt | None = None


@dataclass(frozen=True)
class Ablation:
    """The content of an ablation's file; runs are (cell, seed)."""

    recipe: Path
    metrics: list[str]
    seeds: list[int]
    settings: dict[str, Any]
    cells: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, file: Path) -> Ablation:
        """Reads and checks a file.

        Raises:
            UserError: it cannot be read, a key is missing, unknown or of another kind, or two runs would have one name.
        """
        content = read_yaml(file, str(file), aliases=True)
        keys = {"recipe", "metrics", "seeds", "settings", "cells"}
        if not isinstance(content, dict) or set(content) != keys:
            found = ", ".join(map(str, content)) if isinstance(content, dict) else "none"
            raise UserError(f"{file} must have the keys {', '.join(sorted(keys))}; it has {found}")
        cells, seeds = content["cells"], content["seeds"]
        if not (isinstance(cells, dict) and cells and all(isinstance(c, dict) for c in cells.values())):
            raise UserError(f"{file}: 'cells' must give each cell a mapping of keys to values", "{} changes nothing")
        if not (isinstance(seeds, list) and seeds and all(isinstance(seed, int) for seed in seeds)):
            raise UserError(f"{file}: 'seeds' must be a list of whole numbers")
        if not isinstance(content["settings"], dict) or not isinstance(content["metrics"], list):
            raise UserError(f"{file}: 'settings' must be a mapping of keys to values and 'metrics' a list")
        names = [run_name(str(cell), seed) for cell in cells for seed in seeds]
        if len(set(names)) < len(names) or any("/" in name for name in names):
            raise UserError(f"{file}: two runs have one name, or a cell's name holds a slash", "Rename them")
        recipe = (file.parent / str(content["recipe"])).resolve()
        if not recipe.is_file():
            raise UserError(f"{file} names the recipe {content['recipe']}, which does not exist there")
        named = {str(name): changed for name, changed in cells.items()}
        return cls(recipe, content["metrics"], seeds, content["settings"], named)

    def runs(self) -> list[tuple[str, int]]:
        """All (cell, seed), all cells of a seed before the next seed."""
        return [(cell, seed) for seed in self.seeds for cell in self.cells]


def ablate(config: AblationConfig) -> None:
    """Trains this task's share of the runs, and writes the table.

    Raises:
        UserError: the file, figures of another number of steps, or runs that failed, once the others have ended.
    """
    ablation = Ablation.read(config.file)
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {config.out}: {error.strerror}", "Name another folder") from error
    failed = []
    number, parts = (1, 1) if config.part is None else parse_part(config.part)
    for cell, seed in ablation.runs()[number - 1 :: parts]:
        figures = figures_file(config.out, cell, seed)
        if figures.is_file():
            print(f"[{cell}, seed {seed}] is there: {figures}", flush=True)
            continue
        line = command(config, ablation, cell, seed)
        print(f"\n[{cell}, seed {seed}]\n$ {shlex.join(line)}", flush=True)
        if code := subprocess.run(line).returncode:
            failed.append(f"[{cell}, seed {seed}] ended with exit code {code}")
    rows: list[tuple[str, list[dict[str, float]]]] = []
    while rows != (found := [(cell, finished(config, ablation, cell)) for cell in ablation.cells]):
        rows = found  # again where another task has ended since: it may have written its table before this one
        text = table(config, ablation, rows)
        (config.out / "table.md").write_text(text, encoding="utf-8")
        write_json(config.out / "table.json", {"cells": dict(rows), "versions": versions()})
    print(f"\n{text}\n{config.out}/table.md", flush=True)
    if failed:
        raise UserError("; ".join(failed), "The reasons stand above; start again to go on")


def figures_file(out: Path, cell: str, seed: int) -> Path:
    """File of a finished run's figures."""
    return out / f"{run_name(cell, seed)}.json"


def run_name(cell: str, seed: int) -> str:
    """The name of a run's folder."""
    return f"{cell.replace(' ', '-')}-seed{seed}"


def command(config: AblationConfig, ablation: Ablation, cell: str, seed: int) -> list[str]:
    """The command line of one run."""
    figures = figures_file(config.out, cell, seed)
    settings = settings_of(config, ablation, cell) | {"seed": seed}
    given = [word for key, value in settings.items() for word in (f"--{key}", _spelt(value))]
    return [
        *(
            sys.executable,
            str(Path(__file__).parent / "torchrun.py"),
            "--nproc-per-node",
            str(config.ranks),
        ),
        *("-m", "harness.train", "--config", str(ablation.recipe), "--run-dir", str(figures.with_suffix(""))),
        *(*given, "--json", str(figures)),
    ]


def settings_of(config: AblationConfig, ablation: Ablation, cell: str) -> dict[str, Any]:
    """Settings of a cell that differ from the recipe."""
    settings = {"data.catalogue": config.catalogue, **ablation.settings, **ablation.cells[cell]}
    return settings if config.steps is None else settings | {"train.steps": config.steps}


def finished(config: AblationConfig, ablation: Ablation, cell: str) -> list[dict[str, float]]:
    """The figures of a cell's finished runs, one for each seed.

    Raises:
        UserError: one of them lacks a metric, or is of another number of steps.
    """
    found, steps = [], settings_of(config, ablation, cell).get("train.steps")
    for file in (figures_file(config.out, cell, seed) for seed in ablation.seeds):
        if file.is_file():
            figures = json.loads(file.read_text())
            if steps not in (None, figures["steps"]):
                raise UserError(
                    f"{file} is of {figures['steps']} steps, this ablation of {steps}",
                    "Choose another --out, or remove that file and the run folder of that name",
                )
            for metric in [name for name in ablation.metrics if name not in figures]:
                raise UserError(f"{file} has no figure '{metric}'", f"It has {', '.join(figures)}")
            found.append({name: figures[name] for name in (*ablation.metrics, "steps", "seconds")})
    return found


def table(config: AblationConfig, ablation: Ablation, rows: Sequence[tuple[str, list[dict[str, float]]]]) -> str:
    """Markdown: a row for each cell; of each metric the mean over the seeds and, with several, least and largest."""
    columns = [*ablation.metrics, "steps", "seconds"]
    lines = [
        f"`bash jobs/ablate.sh {config.file} --catalogue {config.catalogue} --out {config.out} --ranks {config.ranks}`",
        "",
        "| cell | seeds | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for cell, found in rows:
        values = []
        for name in columns:
            values.append(_value([figures[name] for figures in found], name in ablation.metrics))
        lines.append(f"| {cell} | {len(found)} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def _value(values: Sequence[float], spread: bool) -> str:
    if not values:
        return "-"
    if not spread:
        return f"{statistics.mean(values):,.0f}"
    ends = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{ends}"


def _spelt(value: Any) -> str:
    """A setting as the command line takes it."""
    if isinstance(value, bool | Mapping):
        return json.dumps(value)
    return json.dumps(value) if isinstance(value, list) else str(value)


def main(argv: list[str]) -> int:
    """Entry point."""
    parser = Parser(
        "jobs/ablate.sh",
        "Train the cells of an ablation and write one table.",
        "bash jobs/ablate.sh jobs/ablations/make.yaml --catalogue catalogues/fashion --out runs/ablate-make",
    )
    parser.add_argument("file", type=Path, help="the ablation's YAML file")
    parser.add_class_arguments(AblationConfig, skip={"file"})
    return run_command(lambda: ablate(AblationConfig(**parser.parse(argv).as_dict())))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
