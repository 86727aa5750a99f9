"""`make demo` at toy size: every stage, the summary, the sheet; the figures are those of the stages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from harness.catalogue.catalogue import Catalogue
from harness.core.lock import locked

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "jobs"))

import demo  # noqa: E402  (a script of jobs/, no package)


def run_demo(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "demo.py"), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)


def test_demo_runs_to_its_table(tmp_path: Path) -> None:
    out = tmp_path / "my demo's"  # a blank and a quote
    small = ("--products", "14", "--vocab-size", "80", "--steps", "6")
    done = run_demo("--out", str(out), *small, "--lifestyle", "0.5")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    summary = json.loads((out / "summary.json").read_text())
    evaluation = json.loads((out / "eval.json").read_text())
    assert summary["recall_at_1"] == evaluation["recall_at_1"] and summary["recall_at_5"] == evaluation["recall_at_5"]
    assert summary["documents"] == 14 and summary["queries"] == evaluation["queries"] > 0
    unseen = [row for row in evaluation["slices"] if row["value"] == "never trained"]
    assert summary["recall_at_1_unseen"] == unseen[0]["recall_at_1"]
    assert 0 < summary["queries_unseen"] == unseen[0]["queries"] < summary["queries"]
    assert {row["value"] for row in evaluation["slices"] if row["slice"] == "lifestyle"} == {"yes", "no"}
    assert summary["recall_at_1_images_alone"] == evaluation["photo/image/recall_at_1"]
    assert summary["images_per_second"] > 0 and 0 <= summary["recall_at_1_histogram"] <= 1
    stages = (
        *("synth", "ingest", "govern", "tokenizer", "train on pairs", "embed documents", "embed photos"),
        *("govern again", "train", "eval", "export", "search", "all"),
    )
    assert tuple(summary["seconds"]) == stages and all(f"[{stage}]" in done.stdout for stage in stages[:-1])
    sheet = Image.open(out / "contact_sheet.png")
    assert sheet.width == 6 * 152 and sheet.height == demo.PHOTOS * 180
    assert "Recall@1 of held-out photos" in done.stdout and "Look next" in done.stdout
    # The classes come from the clicks.
    classes = pq.read_table(out / "catalogue" / "classes" / "classes.parquet")
    assert summary["classes"] == len(classes) and "catalogue_keys" in classes.column_names
    assert 0.5 < summary["class_precision"] <= 1 and 0.5 < summary["class_recall"] <= 1
    # And again from the embeddings of documents and photos, with which the same run goes on.
    report = json.loads((out / "catalogue" / "classes" / "report.json").read_text())
    photos = len(Catalogue(out / "catalogue").table(["kind"], kind="query", split="train"))
    assert report["embeddings"] == {"samples": 14 + photos}
    log = [json.loads(line) for line in (out / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "train/loss" in line][-1] == 6
    assert "resumed step-00000002" in done.stdout
    assert (out / "catalogue" / "classes" / "report.html").exists() and "classes/report.html" in done.stdout

    # The photos searched for were held out of training, and a stage that fails stops the demo and is named.
    searched = {Path(row["query"]).name for row in json.loads((out / "search.json").read_text())["queries"]}
    table = Catalogue(out / "catalogue").table(["image", "split"], kind="query").to_pydict()
    split = {Path(image).name: s for image, s in zip(table["image"], table["split"], strict=True)}
    assert len(searched) == demo.PHOTOS and {split[name] for name in searched} == {"test"}
    failed = run_demo("--out", str(out), "--products", "14", "--vocab-size", "5")
    assert failed.returncode == 2 and "stopped in stage 'tokenizer'" in failed.stderr
    assert not (out / "summary.json").exists(), "the table of an earlier demo must not stand for this one"


def test_demo_replaces_nothing_but_a_demo(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    refused = run_demo("--out", str(tmp_path))
    assert refused.returncode == 2 and "is not a demo's" in refused.stderr
    assert (tmp_path / "mine.txt").read_text() == "precious"
    # In a demo's folder too, what somebody put there stays; and two demos do not meet.
    (tmp_path / demo.MARK).touch()
    (tmp_path / "run").mkdir()
    demo.clear(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [demo.MARK, "mine.txt"]
    with locked(tmp_path / demo.LOCK, "it"):
        refused = run_demo("--out", str(tmp_path))
    assert refused.returncode == 2 and f"demo {tmp_path} is in use by `" in refused.stderr
