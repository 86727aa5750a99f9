"""The whole line by its commands, as a user types them: photos and a table in, recall out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from harness.train import checkpoint_files
from tests.catalogues import make_catalogue
from tests.runs import RECIPE

ROOT = Path(__file__).parent.parent
GROCERY = ROOT.parent / "shared" / "data" / "grocery"


def command(line: str, **values: object) -> subprocess.CompletedProcess[str]:
    """Runs one line of a README, with `{name}` filled in, on one thread a rank and any free port."""
    argv = [word.format(**values) for word in line.split()]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PET_STANDALONE": "1"}
    return subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


def run(line: str, **values: object) -> str:
    """`command`, which must succeed in silence: no traceback, no warning."""
    done = command(line, **values)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr[-3000:]
    return done.stdout


def prepare(manifest: Path, folder: Path, attributes: str, vocab_size: int) -> Path:
    catalogue = folder / "catalogue"
    out = run(
        "shelfmark ingest --manifest {m} --images {i} --out {c} --attribute-columns {a} --json {f}/ingest.json",
        **{"m": manifest, "i": manifest.parent, "c": catalogue, "a": attributes, "f": folder},
    )
    assert "samples" in out and json.loads((folder / "ingest.json").read_text())["quarantined"] == 0
    assert "classes" in run("shelfmark govern {c} --split train", c=catalogue)
    assert "pieces learned" in run("shelfmark tokenizer {c} --vocab-size {v}", c=catalogue, v=vocab_size)
    return catalogue


@pytest.mark.full
def test_from_photos_to_recall_on_two_ranks(tmp_path: Path) -> None:
    manifest = make_catalogue(tmp_path, ingest=False)
    catalogue = prepare(manifest, tmp_path, "colour,shape", 48)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "train.checkpoint_every": 2}))
    folder = tmp_path / "runs" / "first"
    out = run(
        "torchrun --nproc-per-node 2 -m harness.train --config {r} --data.catalogue {c} --run-dir {o} "
        "--train.steps 3 --evaluation.slices colour --json {f}/train.json",
        **{"r": recipe, "c": catalogue, "o": folder, "f": tmp_path},
    )
    figures = json.loads((tmp_path / "train.json").read_text())
    assert figures["steps"] == 3 and figures["queries"] == 6
    assert out.count(f"run {folder}: steps 3") == 1, "both ranks speak"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.yaml", "versions.json", "preprocess.json", "tokenizer", "log.jsonl", "tensorboard"}
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["torch"].startswith("2.") and versions["commit"] and versions["shelfmark"] != "absent"
    newest, passed_over = checkpoint_files.newest(folder / "checkpoints")
    assert newest is not None and newest.name == "step-00000003" and not passed_over
    assert {p.name for p in newest.parent.iterdir()} == {"step-00000002", "step-00000003", "latest"}
    assert checkpoint_files.read_state(newest)["world_size"] == 2

    out = run(
        "torchrun --nproc-per-node 2 -m harness eval {o} --slices colour,shape --json {f}/two.json",
        o=folder,
        f=tmp_path,
    )
    assert out.count("step-00000003: split test") == 1 and "colour = red" in out
    run("shelfmark eval {o} --slices colour,shape --json {f}/one.json", o=folder, f=tmp_path)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert json.loads((tmp_path / "one.json").read_text())["queries"] == 6

    # The same line again finds nothing left to do; a mistake is told once, by the first rank.
    again = (
        "torchrun --nproc-per-node 2 -m harness.train --config {r} --data.catalogue {c} --run-dir {o} --train.steps 3"
    )
    refused = command(f"{again} --seed 2", r=recipe, c=catalogue, o=folder)
    assert refused.returncode != 0
    errors = [line for line in refused.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "was trained with seed = 1, not 2" in errors[0]
    assert 'File "' not in refused.stderr.split(errors[0])[0], "the traceback that follows is torchrun's own"


@pytest.mark.full
def test_real_photos(tmp_path: Path) -> None:
    if not GROCERY.is_dir():
        pytest.skip("the grocery photos are not there: ../shared/data/grocery from the project's root")
    catalogue = prepare(GROCERY / "manifest.tsv", tmp_path, "department,coarse_name", 600)
    run(
        "torchrun --nproc-per-node 2 -m harness.train --config jobs/recipes/oclear_grocery.yaml --data.catalogue {c} "
        "--run-dir {o} --train.stages {s} --train.evaluate_every 60 --train.margin_warmup 40 "
        "--optimizer.warmup_steps 10 --json {f}/train.json",
        **{"c": catalogue, "o": tmp_path / "run", "f": tmp_path, "s": '[{"steps":40,"image_size":64},{"steps":20}]'},
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    cosines = [line["train/positive_cosine"] for line in lines if "train/positive_cosine" in line]
    assert len(cosines) == 3 and cosines[-1] > cosines[0], "60 steps teach little, but not nothing"
    assert all(line["data/bad_samples"] == 0 for line in lines if "data/bad_samples" in line)
    for ranks, name in (("torchrun --nproc-per-node 2 -m harness", "two"), ("shelfmark", "one")):
        run(ranks + " eval {o} --slices department --json {f}/{n}.json", o=tmp_path / "run", f=tmp_path, n=name)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    figures = json.loads((tmp_path / "one.json").read_text())
    assert (figures["queries"], figures["documents"], figures["queries_without_relevant"]) == (2485, 81, 0)
    assert {row["value"] for row in figures["slices"] if row["slice"] == "department"} == {
        "Fruit",
        "Packages",
        "Vegetables",
    }
