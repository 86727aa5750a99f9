"""A tiny catalogue of real image files, drawn the same way every time, for any test that needs one."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (50, 70, 200), "yellow": (220, 200, 50)}
SHAPES = ("disc", "box", "cross")
COLUMNS = ("id", "kind", "split", "image", "class_id", "title", "description", "colour", "shape")


def draw_image(path: Path, colour: str, shape: str, size: int, rng: np.random.Generator) -> None:
    """One shape on a noisy ground; place, scale and aspect ratio vary with `rng`. JPEG or PNG by the suffix."""
    width, height = size + int(rng.integers(0, size // 2 + 1)), size + int(rng.integers(0, size // 2 + 1))
    ground = rng.integers(90, 166, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(ground)
    draw = ImageDraw.Draw(image)
    reach = size * float(rng.uniform(0.22, 0.36))
    x, y = (float(rng.uniform(reach, side - reach)) for side in (width, height))
    fill = tuple(int(np.clip(channel + rng.integers(-15, 16), 0, 255)) for channel in COLOURS[colour])
    if shape == "disc":
        draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=fill)
    elif shape == "box":
        draw.rectangle((x - reach, y - reach, x + reach, y + reach), fill=fill)
    else:
        draw.rectangle((x - reach, y - reach / 3, x + reach, y + reach / 3), fill=fill)
        draw.rectangle((x - reach / 3, y - reach, x + reach / 3, y + reach), fill=fill)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **({"quality": 90} if path.suffix == ".jpg" else {}))


def draw_rows(folder: Path, classes: int, queries: int, size: int, seed: int) -> list[dict[str, str]]:
    """Draws the images under `folder` and gives their manifest rows: one document (split all) per class, then its query
    photos: the last is split test and the last but one val where there are at least four, the others train."""
    rows = []
    for number in range(classes):
        colour, shape = list(COLOURS)[number % len(COLOURS)], SHAPES[number // len(COLOURS) % len(SHAPES)]
        look = {"class_id": f"c{number}", "colour": colour, "shape": shape}
        for member in range(queries + 1):
            kind = "query" if member else "document"
            split = "all"
            if member:
                left = queries - member if queries >= 4 else 2
                split = ("test", "val", "train")[min(left, 2)]
            suffix = "png" if (number + member) % 2 else "jpg"
            image = f"images/{number:03d}-{member:02d}.{suffix}"
            draw_image(folder / image, colour, shape, size, np.random.default_rng([seed, number, member]))
            text = {"title": "", "description": ""}
            if kind == "document":
                text = {
                    "title": f"{colour} {shape} no {number}",
                    "description": f"A {shape} painted in {colour}, item {number} of the catalogue.",
                }
            item = f"q{number}-{member}" if member else f"d{number}"
            rows.append({"id": item, "kind": kind, "split": split, "image": image, **look, **text})
    return rows


def write_manifest(path: Path, rows: list[dict[str, str]], columns: tuple[str, ...] = COLUMNS) -> Path:
    """Writes `rows` as a manifest: TSV, CSV or Parquet by the suffix."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({name: [row[name] for row in rows] for name in columns}), path)
    elif path.suffix == ".tsv":
        lines = ["\t".join(columns), *("\t".join(row[name] for name in columns) for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    return path


def make_catalogue(
    folder: Path, classes: int = 6, queries: int = 5, size: int = 48, seed: int = 0, ingest: bool = True
) -> Path:
    """Draws a catalogue under `folder`: images/, manifest.tsv and, with `ingest`, the ingested catalogue/.

    Samples lie class by class: a document (title, description, attributes colour and shape), then its query photos.
    Up to 12 classes differ in colour or shape; the sides of an image are `size` to 1.5 x `size` pixels.

    Returns:
        folder/catalogue, or folder/manifest.tsv (its images relative to `folder`) without `ingest`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = write_manifest(folder / "manifest.tsv", draw_rows(folder, classes, queries, size, seed))
    if not ingest:
        return manifest
    from harness.commands.ingest import IngestConfig, run

    out = folder / "catalogue"
    run(IngestConfig(manifest=manifest, images=folder, out=out, attribute_columns="colour,shape", workers=2))
    return out
