"""The commands of a run on the GPU, as a user types them: train with DALI and bf16, stop and resume, evaluate, export;
then its results on a CPU.

python jobs/gpu/line.py OUT.json --catalogues FOLDER --work FOLDER

One row for each command, with its exit code; then what must agree: recall of one checkpoint on GPU and CPU, and of
search on the CPU among the catalogue vectors that the GPU made.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from harness.bench.gpu import Program, empty_folder
from harness.catalogue.catalogue import Catalogue

RECIPE = Path(__file__).parents[1] / "recipes" / "oclear_demo.yaml"
LIMIT = 150.0  # seconds of one command
RECALL = 0.05  # bf16 and other decoders may turn near ties


class Line:
    """Runs commands and makes a row of each."""

    def __init__(self, program: Program, logs: Path) -> None:
        self.program, self.logs = program, logs

    def run(self, name: str, *words: object, cpu: bool = False) -> bool:
        """Runs `python -m WORDS`; True if it succeeded. With `cpu` the GPU is hidden."""
        environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if cpu else {})}
        command, began = [sys.executable, "-W", "ignore", "-m", *map(str, words)], time.perf_counter()
        log = self.logs / f"{self.program.out.stem}-{name}.log"
        with log.open("w") as file:
            try:
                code = subprocess.run(command, env=environment, stdout=file, stderr=file, timeout=LIMIT).returncode
            except subprocess.TimeoutExpired:
                code = 124
        row: dict[str, Any] = {"command": name, "code": code, "seconds": time.perf_counter() - began, "ok": code == 0}
        if code:
            row["why"] = (log.read_text(errors="replace").strip().splitlines() or ["no word"])[-1][:300]
        self.program.add(**row)
        return code == 0


def losses(run: Path) -> list[float]:
    """Of the lines of a run's log."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


def recall(file: Path) -> float:
    """The figures of an evaluation."""
    return json.loads(file.read_text())["recall_at_5"]


def main() -> None:
    """Entry point."""
    program = Program("gpu line", "The commands of a run.", {"catalogues": "catalogues", "work": "work"})
    work, catalogue = Path(program.given.work), Path(program.given.catalogues) / "drawn"
    empty_folder(work)
    line, run, half, steps = (
        Line(program, program.out.parent),
        work / "run",
        3 if program.tiny else 30,
        6 if program.tiny else 60,
    )
    train = [
        "harness.train",
        "--config",
        RECIPE,
        "--data.catalogue",
        catalogue,
        "--run-dir",
        run,
        "--train.precision",
        "bf16",
    ]
    train += [
        "--data.micro_batches",
        2,
        "--train.ema_decay",
        0.9,
        "--train.steps",
        steps,
        "--train.stages",  # one loss over all steps
        "[]",
        "--train.log_every",
        1,
        "--data.threads",
        1 if program.tiny else 8,
    ]
    if line.run("train", *train, "--train.stop_at", half) and line.run("go-on", *train):
        found = losses(run)
        program.add(
            what="loss",
            first=found[0],
            last=found[-1],
            steps=len(found),
            ok=len(found) == steps and found[-1] < found[0],
        )
    evaluate = ["harness", "eval", run, "--split", "test", "--json"]
    gpu = recall(work / "gpu.json") if line.run("eval", *evaluate, work / "gpu.json") else math.nan
    if line.run("eval-on-cpu", *evaluate, work / "cpu.json", cpu=True):
        cpu = recall(work / "cpu.json")
        program.add(what="recall_at_5", gpu=gpu, cpu=cpu, ok=abs(gpu - cpu) <= RECALL)
    artefact = work / "artefact"
    if importlib.util.find_spec("faiss") is None:
        program.add(command="export", skipped="faiss is not installed")
    elif line.run("export", "harness", "export", run, "--out", artefact):
        photos, right = pictures(catalogue, work)
        words = ["harness", "search", artefact, *photos, "--top", 5, "--json", work / "search.json"]
        if line.run("search-on-cpu", *words, cpu=True):
            classes = pq.read_table(artefact / "documents").column("class_key").to_pylist()
            queries = json.loads((work / "search.json").read_text())["queries"]
            hits = 0
            for truth, query in zip(right, queries, strict=True):
                hits += truth in [classes[hit["row"]] for hit in query["found"]]
            cpu = hits / len(right)
            program.add(what="recall_at_5 of search", gpu=gpu, cpu=cpu, ok=abs(gpu - cpu) <= RECALL)
    shutil.rmtree(work, ignore_errors=True)
    program.exit()


def pictures(catalogue: Path, work: Path) -> tuple[list[Path], list[str]]:
    """Files of the test photos, and their classes."""
    opened = Catalogue(catalogue)
    table = opened.table(["class_key"], kind="query", split="test").to_pydict()
    files = []
    for number in table["sample_id"]:
        files.append(work / f"photo-{number}.jpg")
        files[-1].write_bytes(opened.read_bytes(number))
    opened.close()
    return files, table["class_key"]


if __name__ == "__main__":
    main()
