"""The ablation runner: its files, its shares, its table; and a few real runs of a tiny catalogue."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.core.errors import UserError
from harness.train.config import RunConfig, parse
from jobs import ablate
from tests.runs import RECIPE

ROOT = Path(__file__).parents[1]
CELLS = {"plain": {}, "by InfoNCE": {"model.objective": "contrastive"}}


@pytest.fixture
def written(tmp_path: Path, catalogue: Path) -> Callable[..., ablate.AblationConfig]:
    """Writes an ablation of 2 cells and 2 seeds, some of its keys otherwise; gives its configuration."""

    def write(**changed: Any) -> ablate.AblationConfig:
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
        content = {"recipe": "tiny.yaml", "metrics": ["recall_at_1", "map"], "seeds": [1, 2], "cells": CELLS}
        content |= {"settings": {"train.steps": 2}, **changed}
        (tmp_path / "file.yaml").write_text(
            yaml.safe_dump({key: value for key, value in content.items() if value != "left out"}, sort_keys=False)
        )
        return ablate.AblationConfig(file=tmp_path / "file.yaml", catalogue=catalogue, out=tmp_path / "out", ranks=1)

    return write


def parsed(line: list[str], world: int) -> RunConfig:
    return parse(line[line.index("harness.train") + 1 :], world)[0]


def asked(config: RunConfig) -> set[str]:
    """Prefix of the name of a final figure."""
    first, *others = [*config.evaluation.tasks, *config.evaluation.final_tasks]
    views = config.evaluation.views[1:]
    return {"", *others, *(f"{task}/{view}" for task in (first, *others) for view in views)}


@pytest.mark.parametrize("file", sorted((ROOT / "jobs/ablations").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_cell_of_every_ablation_is_a_valid_run(file: Path, catalogue: Path) -> None:
    ablation = ablate.Ablation.read(file)
    config = ablate.AblationConfig(file=file, catalogue=catalogue, out=Path("runs/ablate"))
    settings = {}
    seed = ablation.seeds[-1]
    for cell in ablation.cells:
        made = parsed(ablate.command(config, ablation, cell, seed), 2)
        assert made.seed == seed and made.run_dir == Path("runs/ablate") / ablate.run_name(cell, seed)
        if made.method != "oclear":  # it has one task
            assert {metric.rpartition("/")[0] for metric in ablation.metrics} <= asked(made)
        differing = made.to_dict()
        del differing["seed"], differing["run_dir"]
        settings[cell] = json.dumps(differing, sort_keys=True)
    assert len(set(settings.values())) == len(ablation.cells), "two cells are the same run"
    if file.stem != "item_baselines":  # its budget is time
        assert len({json.loads(text)["train"]["steps"] for text in settings.values()}) == 1, "budgets differ"


@pytest.mark.parametrize("file", sorted((ROOT / "jobs/recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_is_valid(file: Path, catalogue: Path) -> None:
    config, _ = parse(["--config", str(file), "--data.catalogue", str(catalogue)], 2)
    assert config.method == file.stem.split("_")[0]


def test_shares_cover_every_run_once(
    written: Callable[..., ablate.AblationConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """As an array of 3 tasks says them; a share's runs are there already, so that none is trained."""
    config = written(seeds=[1, 2, 3])
    runs = ablate.Ablation.read(config.file).runs()
    assert runs == [(cell, seed) for seed in (1, 2, 3) for cell in CELLS]
    config.out.mkdir()
    for number, (cell, seed) in enumerate(runs):
        figures = {"recall_at_1": number / 10, "map": 0.5, "steps": 2, "seconds": 1234.4, "slices": []}
        ablate.figures_file(config.out, cell, seed).write_text(json.dumps(figures))
    said = []
    for part in ("1/3", "2/3", "3/3"):
        words = [str(config.file), "--catalogue", str(config.catalogue), "--out", str(config.out), "--part", part]
        assert ablate.main(words) == 0
        said.append([line.split("]")[0] for line in capsys.readouterr().out.splitlines() if "is there" in line])
    assert [len(share) for share in said] == [2, 2, 2]
    assert sorted(run for share in said for run in share) == sorted(f"[{cell}, seed {seed}" for cell, seed in runs)
    assert (config.out / "table.md").read_text().splitlines()[2:] == [
        "| cell | seeds | recall_at_1 | map | steps | seconds |",
        "|---|---|---|---|---|---|",
        "| plain | 3 | 0.200 (0.000 to 0.400) | 0.500 (0.500 to 0.500) | 2 | 1,234 |",
        "| by InfoNCE | 3 | 0.300 (0.100 to 0.500) | 0.500 (0.500 to 0.500) | 2 | 1,234 |",
    ]
    table = json.loads((config.out / "table.json").read_text())["cells"]
    assert [row["recall_at_1"] for row in table["by InfoNCE"]] == [0.1, 0.3, 0.5]


def test_a_table_of_one_run_and_of_none(written: Callable[..., ablate.AblationConfig]) -> None:
    config = written()
    ablation = ablate.Ablation.read(config.file)
    figures = {"recall_at_1": 0.25, "map": 0.5, "steps": 2, "seconds": 3.0}
    lines = ablate.table(config, ablation, [("plain", [figures]), ("by InfoNCE", [])]).splitlines()
    assert lines[4:] == ["| plain | 1 | 0.250 | 0.500 | 2 | 3 |", "| by InfoNCE | 0 | - | - | - | - |"]


@pytest.mark.parametrize(
    "changed,message",
    [
        ({"metrics": "left out"}, "must have the keys cells, metrics, recipe, seeds, settings; it has"),
        ({"cell": {}}, "it has recipe, seeds, settings"),
        ({"recipe": "none.yaml"}, "names the recipe none.yaml, which does not exist there"),
        ({"cells": ["plain"]}, "'cells' must give each cell a mapping"),
        ({"cells": {"plain": None}}, "'cells' must give each cell a mapping"),
        ({"seeds": 3}, "'seeds' must be a list"),
        ({"settings": None}, "'settings' must be a mapping"),
        ({"cells": {"a b": {}, "a-b": {}}}, "two runs have one name"),
        ({"seeds": [1, 1]}, "two runs have one name"),
    ],
)
def test_mistakes_of_the_file_are_told(written: Callable[..., Any], changed: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        ablate.Ablation.read(written(**changed).file)
    assert message in str(error.value) or message.split("has ")[-1].split(", ")[0] in str(error.value)
    assert "\n" not in str(error.value)


def test_mistakes_of_the_command_are_told(
    written: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written()

    def says(*words: object, file: Path = config.file, out: Path = config.out) -> str:
        line = [str(file), "--catalogue", str(config.catalogue), "--out", str(out), *map(str, words)]
        assert ablate.main(line) == 2
        (said,) = capsys.readouterr().err.splitlines()
        return said

    (tmp_path / "torn.yaml").write_text("cells: {")
    assert "is not YAML" in says(file=tmp_path / "torn.yaml") and "No such file" in says(file=tmp_path / "no")
    assert "--part is '5/4'" in says("--part", "5/4")
    assert "ranks is 0" in says("--ranks", 0)
    (tmp_path / "taken").write_text("")
    assert "taken" in says(out=tmp_path / "taken")
    # Figures of another budget, or without a metric, are not part of a table.
    figures = {"recall_at_1": 0.1, "steps": 2, "seconds": 1.0}
    for cell, seed in ablate.Ablation.read(config.file).runs():
        ablate.figures_file(config.out, cell, seed).write_text(json.dumps(figures))
    assert "plain-seed1.json is of 2 steps, this ablation of 300" in says("--steps", 300)
    assert "has no figure 'map'. It has recall_at_1, steps, seconds" in says()


def test_a_run_is_trained_once(written: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    config = written()
    line = [str(config.file), "--catalogue", str(config.catalogue), "--out", str(config.out), "--ranks", "1"]
    assert ablate.main([*line, "--part", "2/4"]) == 0
    assert "[by InfoNCE, seed 1]\n$ " in capfd.readouterr().out
    saved = yaml.safe_load((config.out / "by-InfoNCE-seed1" / "config.yaml").read_text())
    assert (saved["seed"], saved["train"]["steps"], saved["model"]["objective"]) == (1, 2, "contrastive")
    figures = (config.out / "by-InfoNCE-seed1.json").read_text()
    assert ablate.main([*line, "--part", "2/4"]) == 0
    assert "[by InfoNCE, seed 1] is there" in capfd.readouterr().out
    assert (config.out / "by-InfoNCE-seed1.json").read_text() == figures
    assert f"| by InfoNCE | 1 | {json.loads(figures)['recall_at_1']:.3f} |" in (config.out / "table.md").read_text()


def test_the_last_table_has_what_another_task_ended_meanwhile(
    written: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = written()
    ends = iter(ablate.Ablation.read(config.file).runs())
    table, figures = ablate.table, {"recall_at_1": 0.25, "map": 0.5, "steps": 2, "seconds": 3.0}

    def slow(*args: Any) -> str:
        """Others' runs end while this task writes."""
        text = table(*args)
        for cell, seed in ends:
            ablate.figures_file(config.out, cell, seed).write_text(json.dumps(figures))
            break
        return text

    monkeypatch.setattr(ablate, "table", slow)
    monkeypatch.setattr(ablate.Ablation, "runs", lambda _: [])  # nothing is left for this task
    ablate.ablate(config)
    rows = (config.out / "table.md").read_text().splitlines()[4:]
    assert [row.split(" | ")[1] for row in rows] == ["2", "2"]
    found = json.loads((config.out / "table.json").read_text())["cells"]
    assert found == {cell: [figures, figures] for cell in CELLS}


@pytest.mark.full
def test_a_failing_cell_leaves_the_others_and_a_stopped_one_goes_on(
    written: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    config = written(cells={"broken": {"train.resume": "perhaps"}, **CELLS})
    ablation = ablate.Ablation.read(config.file)
    first = ablate.command(config, ablation, "plain", 1)
    config.out.mkdir()
    subprocess.run([*first[: first.index("--json")], "--train.stop_at", "1"], check=True, cwd=ROOT)
    line = [str(config.file), "--catalogue", str(config.catalogue), "--out", str(config.out), "--ranks", "1"]
    capfd.readouterr()
    assert ablate.main(line) == 2
    error = capfd.readouterr().err.splitlines()
    assert error[-1] == (
        "error: [broken, seed 1] ended with exit code 2; [broken, seed 2] ended with exit code 2. "
        "The reasons stand above; start again to go on"
    )
    assert sum("train.resume is perhaps" in text for text in error) == 2
    steps = [[p.name for p in sorted((config.out / f"plain-seed{seed}/checkpoints").glob("step-*"))] for seed in (1, 2)]
    assert steps == [["step-00000001", "step-00000002"], ["step-00000002"]], "the first one went on from step 1"
    rows = (config.out / "table.md").read_text().splitlines()[4:]
    assert [row.split(" | ")[1] for row in rows] == ["0", "2", "2"]
    found = json.loads((config.out / "table.json").read_text())["cells"]
    assert [figures["steps"] for figures in found["plain"]] == [2, 2]
