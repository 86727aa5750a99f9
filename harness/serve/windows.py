"""Parts of a query photo that are like a document: the photo is embedded window by window, which any image encoder can
do. Ours; the idea is that of sliding occlusion (Zeiler and Fergus, arXiv 1311.2901) with windows kept, not hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from harness.artefact.artefact import Box, Photo

COLUMNS = 4  # cells in a row; as many rows
SPAN = 2  # cells that a window spans, in both directions
_PLACES = [(x, y) for y in range(COLUMNS - SPAN + 1) for x in range(COLUMNS - SPAN + 1)]


def windows(photo: Photo) -> list[Photo]:
    """The photo through 9 overlapping windows of half its width and height, row by row."""
    x, y, width, height = photo.window
    size = max(1, width * SPAN // COLUMNS), max(1, height * SPAN // COLUMNS)
    boxes: list[Box] = [(x + width * i // COLUMNS, y + height * j // COLUMNS, *size) for i, j in _PLACES]
    return [Photo(photo.data, box) for box in boxes]


def cells(cosines: Sequence[float]) -> list[float]:
    """Mean cosine of the windows that cover each cell, row by row, from those of `windows`."""
    total, count = np.zeros((2, COLUMNS, COLUMNS))
    for (x, y), cosine in zip(_PLACES, cosines, strict=True):
        total[y : y + SPAN, x : x + SPAN] += cosine
        count[y : y + SPAN, x : x + SPAN] += 1
    return [round(value, 6) for value in (total / count).ravel().tolist()]
