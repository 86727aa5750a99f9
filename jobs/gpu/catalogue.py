"""Draws the two catalogues that the other programs train on, on the CPU: `drawn` (the demo's products) and `photos`
(large JPEGs to decode).

python jobs/gpu/catalogue.py OUT.json --folder FOLDER

Any machine can make them; `jobs/gpu_check.sh --catalogues FOLDER` uses them.
"""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

from harness.bench.gpu import Program, empty_folder
from harness.bench.photos import photos as made_up
from harness.commands import govern, ingest, queries, synth, tokenizer

LONG_SIDE = 500  # pixels; as ImageNet's photos, on which the published rates were taken


def drawn(folder: Path, products: int, photos: int) -> None:
    """Products with photos, texts and attributes, ready for all three methods."""
    source, catalogue = folder / "products", folder / "drawn"
    synth.run(synth.SynthConfig(out=source, products=products, photos=photos, held_out=1))
    attributes = "category,colour,pattern,brand"
    ingest.run(
        ingest.IngestConfig(
            manifest=source / "manifest.tsv", images=source, out=catalogue, attribute_columns=attributes
        )
    )
    govern.run(govern.GovernConfig(catalogue=catalogue))
    tokenizer.run(tokenizer.TokenizerConfig(catalogue=catalogue, vocab_size=100))
    queries.run(queries.QueriesConfig(catalogue=catalogue, category="category", min_count=1, max_share=1.0))
    shutil.rmtree(source)


def photos(folder: Path, classes: int, side: int) -> None:
    """`classes` documents and as many queries, each a JPEG of `side` pixels."""
    source, catalogue = folder / "files", folder / "photos"
    source.mkdir(parents=True)
    for number, data in enumerate(made_up(side, 2 * classes)):
        (source / f"{number}.jpg").write_bytes(data)
    with (source / "manifest.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "id", "kind", "class_id", "title", "split"])
        for number in range(2 * classes):
            kind, title = ("query", "") if number % 2 else ("document", f"photo of class {number // 2}")
            split = "train" if number % 2 else "all"
            table.writerow([f"{number}.jpg", f"p{number}", kind, f"c{number // 2}", title, split])
    ingest.run(ingest.IngestConfig(manifest=source / "manifest.csv", images=source, out=catalogue))
    govern.run(govern.GovernConfig(catalogue=catalogue))
    tokenizer.run(tokenizer.TokenizerConfig(catalogue=catalogue, keep_from=folder / "drawn"))
    shutil.rmtree(source)


def main() -> None:
    """Entry point."""
    program = Program("gpu catalogue", "Draws the catalogues for the check of a GPU.", {"folder": "catalogues"})
    folder = Path(program.given.folder)
    empty_folder(folder)
    for name, make in (
        ("drawn", lambda: drawn(folder, *((8, 1) if program.tiny else (64, 4)))),
        ("photos", lambda: photos(folder, *((8, 64) if program.tiny else (512, LONG_SIDE)))),
    ):
        began = program.synchronize()
        make()
        size = sum(file.stat().st_size for file in (folder / name).rglob("*") if file.is_file())
        program.add(catalogue=name, seconds=round(program.synchronize() - began, 1), megabytes=size / 1e6)


if __name__ == "__main__":
    main()
