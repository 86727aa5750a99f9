"""`make demo`: every stage on a synthetic catalogue, on this machine, by the commands that a user would type.

Draws products, photos of them and a click log, makes a catalogue, makes classes of the clicks, trains OCLEAR from
scratch on pairs of a class, makes the classes again by the clicks and the embeddings of that training, trains on,
measures on held-out photos, exports, and searches for eight of those photos. Writes everything to runs/demo, the
figures to summary.json.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image

from harness.artefact.artefact import Artefact
from harness.catalogue.catalogue import Catalogue
from harness.commands.search import save_sheet
from harness.core.cli import Parser, run_command
from harness.core.errors import UserError
from harness.core.files import write_json
from harness.core.lock import locked
from harness.evaluate.baselines import HISTOGRAM
from harness.evaluate.pairwise import pairwise
from models.ranges import ClosedUnitInterval

LAUNCHER = os.path.relpath(Path(__file__).parent / "torchrun.py")
RECIPE = os.path.relpath(Path(__file__).parent / "recipes" / "oclear_demo.yaml")
MARK = ".demo"  # a folder with this file is a demo's, and may be replaced
MADE = (
    *("products", "catalogue", "run", "artefact", "embeddings", "photos.parquet"),
    *("train.json", "eval.json", "search.json", "contact_sheet.png", "summary.json"),
)
PHOTOS, LOCK = 8, ".lock"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The demo.

    Args:
        out: folder for everything; an earlier demo there is replaced.
        products: products to draw.
        vocab_size: pieces of the tokenizer.
        steps: optimizer steps, in one stage, a third of them before the classes are made again; the stages of the
            recipe by default.
        ranks: processes that train; one for each GPU, two without any, by default.
        lifestyle: share of documents whose picture shows two to four products, of which the text names the one for
            sale; the evaluation tells the photos of these apart.
        seed: of the drawing.
    """

    out: Path = Path("runs/demo")
    products: int = 240
    vocab_size: int = 200
    steps: int | None = None
    ranks: int | None = None
    lifestyle: ClosedUnitInterval = 0.0
    seed: int = 0


class Stages:
    """Runs commands one after the other and keeps the seconds of each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self, name: str, *words: object) -> None:
        """Echoes and runs one command in this process's environment.

        Raises:
            UserError: it failed.
        """
        command = [str(word) for word in words]
        print(f"\n[{name}]\n$ {shlex.join(command)}", flush=True)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        started = time.perf_counter()
        code = subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ, "PATH": path}).returncode
        self.seconds[name] = round(time.perf_counter() - started, 1)
        if code:
            raise UserError(f"the demo stopped in stage '{name}': exit code {code}", "See the message above")


def demo(config: DemoConfig) -> None:
    """Runs all stages and writes out/summary.json.

    Raises:
        UserError: a stage failed, or `out` holds something else.
    """
    out = config.out
    if out.exists() and not (out / MARK).exists() and (not out.is_dir() or set(os.listdir(out)) - {LOCK}):
        raise UserError(f"{out} exists and is not a demo's", "Choose another --out, or remove it")
    with locked(out / LOCK, f"demo {out}"):
        (out / MARK).touch()
        clear(out)
        _stages(config, out)


def clear(out: Path) -> None:
    """Removes what an earlier demo made there, by its names; anything else stays."""
    for name in MADE:
        (out / name).unlink() if (out / name).is_file() else shutil.rmtree(out / name, ignore_errors=True)


def _stages(config: DemoConfig, out: Path) -> None:
    started = time.perf_counter()
    products, catalogue, run, artefact, embeddings, photo_embeddings = (out / name for name in MADE[:6])
    ranks = config.ranks or torch.cuda.device_count() or 2
    torchrun = ["python", LAUNCHER, "--nproc-per-node", str(ranks), "-m"]
    first, steps = yaml.safe_load(Path(RECIPE).read_text(encoding="utf-8"))["train"]["stages"][0]["steps"], []
    if config.steps is not None:
        first, steps = max(1, config.steps // 3), ["--train.stages", "[]", "--train.steps", str(config.steps)]
    govern = ["shelfmark", "govern", catalogue, "--clicks", products / "clicks.parquet"]
    train = [*torchrun, "harness.train", "--config", RECIPE, "--data.catalogue", catalogue, "--run-dir", run, *steps]
    stages = Stages()
    told = ",lifestyle" if config.lifestyle else ""  # a column that synth writes only then
    draw = ["--products", config.products, "--seed", config.seed, "--lifestyle", config.lifestyle]
    stages.run("synth", "shelfmark", "synth", products, *draw)
    stages.run(
        "ingest",
        *("shelfmark", "ingest", "--manifest", products / "manifest.tsv", "--images", products, "--out", catalogue),
        *("--attribute-columns", f"category,colour,pattern,brand{told}"),
    )
    stages.run("govern", *govern)
    stages.run("tokenizer", "shelfmark", "tokenizer", catalogue, "--vocab-size", config.vocab_size)
    by_clicks = class_quality(catalogue)
    stages.run("train on pairs", *train, "--train.stop_at", first)
    stages.run("embed documents", *torchrun, "harness", "export", run, "--out", embeddings, "--onnx", "false")
    stages.run("embed photos", "shelfmark", "embed", embeddings, catalogue, "--out", photo_embeddings)
    stages.run("govern again", *govern, "--embeddings", f"{embeddings / 'documents'},{photo_embeddings}")
    stages.run("train", *train, "--train.new_phase", "true", "--json", out / "train.json")
    weigh = ["--weigh-parts", "true"]
    test = ["--split", "test", "--slices", f"category{told}"]
    stages.run("eval", *torchrun, "harness", "eval", run, *test, *weigh, "--json", out / "eval.json")
    stages.run("export", *torchrun, "harness", "export", run, "--out", artefact, *weigh)
    photos = held_out_photos(products, PHOTOS)
    found = out / "search.json"
    stages.run("search", "shelfmark", "search", artefact, *(products / p for p in photos), "--top", 5, "--json", found)
    draw_sheet(out, list(photos.values()))

    summary = {**summarise(out, stages.seconds, time.perf_counter() - started), "classes_by_clicks": by_clicks}
    write_json(out / "summary.json", summary)
    print_summary(summary, out)


def held_out_photos(products: Path, number: int) -> dict[str, str]:
    """Image path -> class of test photos, from products spread evenly over the manifest."""
    lines = (products / "manifest.tsv").read_text(encoding="utf-8").splitlines()
    names = lines[0].split("\t")
    rows = [dict(zip(names, line.split("\t"), strict=True)) for line in lines[1:]]
    test = [row for row in rows if row["kind"] == "query" and row["split"] == "test"]
    return {row["image"]: row["class_id"] for row in test[:: max(1, len(test) // number)][:number]}


def draw_sheet(out: Path, classes: list[str]) -> None:
    """The contact sheet of the photos searched for, right documents framed green, others grey."""
    artefact = Artefact(out / "artefact")
    keys = artefact.documents.column("class_key").to_pylist()
    rows: list[Any] = []
    for found, truth in zip(json.loads((out / "search.json").read_text())["queries"], classes, strict=True):
        hits = [
            (artefact.thumbnail(hit["row"]), f"{hit['score']:.2f} {hit['title']}", keys[hit["row"]] == truth)
            for hit in found["found"]
        ]
        rows.append((Image.open(found["query"]).convert("RGB"), hits))
    save_sheet(rows, out / "contact_sheet.png")


def class_quality(catalogue: Path) -> dict[str, float]:
    """Pairwise precision and recall of the classes made of clicks, beside the class column, which they did not read.

    All training samples count; one without a class is a class of its own.
    """
    table = Catalogue(catalogue).table(["class_key"], split="train")
    truth = np.unique(table["class_key"].to_numpy(), return_inverse=True)[1]
    members = pq.read_table(catalogue / "classes" / "members.parquet", columns=["sample_id", "class_id"])
    found = np.full(len(truth), -1)
    found[np.searchsorted(table["sample_id"], members["sample_id"])] = members["class_id"]
    precision, recall = pairwise(found, truth)
    classes = json.loads((catalogue / "classes" / "governance.json").read_text())["num_classes"]
    return {"classes": classes, "class_precision": precision, "class_recall": recall}


def summarise(out: Path, seconds: dict[str, float], total: float) -> dict[str, Any]:
    """The content of summary.json."""
    evaluation = json.loads((out / "eval.json").read_text())
    fused = [row for row in evaluation["slices"] if "task" not in row]  # the others are of images alone
    by_class = {row["value"]: row for row in fused if row["slice"] == "class"}
    return {
        "recall_at_1": evaluation["recall_at_1"],
        "recall_at_5": evaluation["recall_at_5"],
        "recall_at_1_unseen": by_class["never trained"]["recall_at_1"],
        "recall_at_1_images_alone": evaluation["photo/image/recall_at_1"],
        "recall_at_1_histogram": evaluation["baselines"]["recall"][HISTOGRAM],
        "documents": int(evaluation["documents"]),
        "queries": int(evaluation["queries"]),
        "queries_unseen": int(by_class["never trained"]["queries"]),
        **class_quality(out / "catalogue"),
        "images_per_second": json.loads((out / "train.json").read_text())["images_per_second"],
        "seconds": {**seconds, "all": round(total, 1)},
    }


def print_summary(summary: dict[str, Any], out: Path) -> None:
    """The closing table, and where to look next."""
    seconds, before = summary["seconds"], summary["classes_by_clicks"]
    lines = [
        "",
        f"{'Recall@1 of held-out photos':<44}{summary['recall_at_1']:>8.3f}   "
        f"{summary['queries']} photos against {summary['documents']} documents",
        f"{'Recall@5':<44}{summary['recall_at_5']:>8.3f}",
        f"{'Recall@1, products never trained on':<44}{summary['recall_at_1_unseen']:>8.3f}   "
        f"{summary['queries_unseen']} photos",
        f"{'Recall@1 by images alone, to compare':<44}{summary['recall_at_1_images_alone']:>8.3f}",
        f"{'Recall@1 by colour histogram, to compare':<44}{summary['recall_at_1_histogram']:>8.3f}",
        f"{'Classes from clicks: pairwise precision':<44}{summary['class_precision']:>8.3f}   "
        f"{summary['classes']} classes, beside the class column that they did not read",
        f"{'Classes from clicks: pairwise recall':<44}{summary['class_recall']:>8.3f}   "
        f"by the clicks alone {before['class_precision']:.3f} and {before['class_recall']:.3f}",
        f"{'images per second in training':<44}{summary['images_per_second']:>8.1f}",
        "",
        "seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()),
        "",
        "Look next:",
        f"  {out}/catalogue/classes/report.html   the classes: sizes, dropped clicks, sample photos",
        f"  {out}/contact_sheet.png            eight photos and what was found, correct ones framed green",
        f"  .venv/bin/tensorboard --logdir {out}/run     curves, retrieval panel, documents in space",
        f"  .venv/bin/shelfmark search {out}/artefact PHOTO --sheet found.png",
        f"  {out}/summary.json                 these figures",
        "  docs/your-data.md                  the same commands for your own photos",
        "",
        f"Search with your own photos in a browser: .venv/bin/shelfmark serve {out}/artefact",
    ]
    print("\n".join(lines))


def main() -> int:
    """Entry point."""

    def body() -> None:
        parser = Parser("demo", "Every stage on a synthetic catalogue.", "python jobs/demo.py --out runs/demo")
        parser.add_class_arguments(DemoConfig)
        demo(DemoConfig(**parser.parse(sys.argv[1:]).as_dict()))

    return run_command(body)


if __name__ == "__main__":
    sys.exit(main())
