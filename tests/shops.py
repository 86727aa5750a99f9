"""A made-up shop: a table with column names of its own and equal short titles, and a folder of photos."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.catalogues import COLOURS, SHAPES, draw_image

COLUMNS = ("sku", "photo", "name")
TITLE = "office chair"


def draw_shop(folder: Path, products: int = 12, photos: int = 4, size: int = 48) -> list[tuple[str, ...]]:
    """Draws folder/photos and writes folder/products.tsv; returns its rows. There is no attribute, kind or split."""
    rows = []
    for number in range(products):
        colour, shape = list(COLOURS)[number % len(COLOURS)], SHAPES[number // len(COLOURS) % len(SHAPES)]
        for member in range(photos):
            name = f"{number:02d}/{member}.jpg"
            draw_image(folder / "photos" / name, colour, shape, size, np.random.default_rng([number, member]))
            rows.append((f"s{number}", name, TITLE))
    lines = ["\t".join(row) for row in (COLUMNS, *rows)]
    (folder / "products.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return rows
