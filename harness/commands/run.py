"""`shelfmark run`: Take a shop's table and photos through every step to search: init, train, eval, export, reports."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness.catalogue.catalogue import Catalogue
from harness.commands import init
from harness.commands.init import InitConfig
from harness.core.evenly import evenly
from harness.core.launcher import Forward
from harness.core.lock import locked

EXAMPLE = "shelfmark run products.tsv photos/ --out shop --minutes 20"
LOCK = ".run-lock"
PHOTOS = 8  # of split test, for which the documents found are drawn


def run(config: InitConfig) -> dict[str, Any]:
    """Runs `shelfmark init` and what it prints, with a report before and after training. Steps that are done are not
    repeated: the same command goes on where a stopped one was.

    Returns:
        seconds of each step that ran.

    Raises:
        UserError: see `harness.commands.init.run`.
        SystemExit: with the exit code of a step that failed or was stopped.
    """
    out, seconds = config.out, {}
    if not (out / init.RECIPE).exists():
        began = time.perf_counter()
        init.run(config)
        seconds["init"] = time.perf_counter() - began
    with locked(out / LOCK, f"run {out}"):
        forward = Forward()
        for name, words, made in _steps(out):
            if made.exists():
                print(f"\n{name}: {made} is there already")
                continue
            print(f"\n$ shelfmark {name} {shlex.join(words)}", flush=True)
            began = time.perf_counter()
            # In a group of its own: a Ctrl-C reaches it once, through this process.
            code = subprocess.run([sys.executable, "-m", "harness", name, *words], process_group=0).returncode
            seconds[name] = time.perf_counter() - began
            if code or forward.number:
                print(f"{name} ended with exit code {code}. To go on, give the same command again", file=sys.stderr)
                sys.exit(128 - code if code < 0 else code or 128 + forward.number)
    print(f"\nto look at: {out}/found.png, {out}/catalogue.html, {out}/eval.html; tensorboard --logdir {out}")
    return {"seconds": seconds}


def _steps(out: Path) -> list[tuple[str, list[str], Path]]:
    """Command of each step, its words, and what tells that it is done."""
    artefact, reported, sheet = out / "artefact", out / "catalogue.html", out / "found.png"
    catalogue = Catalogue(out / init.CATALOGUE)
    commands = {name: words for name, *words in init.following(out)}
    photos = [] if sheet.exists() else _photos(catalogue, out / "photos")
    return [
        ("report", [str(out / init.CATALOGUE), "--out", str(reported)], reported),
        ("train", [*commands["train"], "--json", f"{out}/train.json"], out / "train.json"),
        ("eval", [*commands["eval"], "--report", f"{out}/eval.html", "--json", f"{out}/eval.json"], out / "eval.json"),
        ("export", commands["export"], artefact),
        ("search", [str(artefact), *photos, "--sheet", str(sheet)], sheet),
    ]


def _photos(catalogue: Catalogue, folder: Path) -> list[str]:
    """Files of some photos of split test, spread evenly, as they were ingested."""
    samples = catalogue.table(["image"], kind="query", split="test").to_pylist()
    folder.mkdir(exist_ok=True)
    files = []
    for place, row in enumerate(samples[n] for n in evenly(len(samples), PHOTOS)):
        file = folder / f"{place}{Path(row['image']).suffix}"
        file.write_bytes(catalogue.read_bytes(row["sample_id"]))
        files.append(str(file))
    return files
