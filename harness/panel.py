"""The retrieval panel: query photos, each with the best documents found for it."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from harness.data.catalogue import Catalogue, CorruptSample

CELL = 112
GREEN, RED, GREY = (40, 160, 60), (200, 50, 50), (90, 90, 90)


def draw_panel(rows: list[tuple[Image.Image, list[tuple[Image.Image, str, bool]]]]) -> np.ndarray:
    """uint8 [H, W, 3]: a row for each query; a document is (picture, caption, relevant), framed green if relevant, red if not."""
    width = max((len(documents) for _, documents in rows), default=0) + 1
    sheet = Image.new("RGB", (width * (CELL + 12), max(1, len(rows)) * (CELL + 26)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (query, documents) in enumerate(rows):
        cells = [(query, "query", GREY)] + [(image, name, GREEN if hit else RED) for image, name, hit in documents]
        for x, (image, caption, colour) in enumerate(cells):
            left, top = x * (CELL + 12) + 6, y * (CELL + 26) + 6
            draw.rectangle((left - 3, top - 3, left + CELL + 2, top + CELL + 2), fill=colour)
            sheet.paste(ImageOps.fit(image, (CELL, CELL)), (left, top))
            draw.text((left, top + CELL + 3), caption[:18], fill="black")
    return np.asarray(sheet)


def picture(catalogue: Catalogue, sample_id: int) -> Image.Image:
    """A sample's upright picture; a grey one if its bytes are damaged."""
    try:
        image = Image.open(io.BytesIO(catalogue.read_bytes(sample_id)))
        return ImageOps.exif_transpose(image).convert("RGB")
    except (CorruptSample, OSError):
        return Image.new("RGB", (CELL, CELL), (127, 127, 127))
