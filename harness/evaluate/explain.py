"""Explanations of documents: parts of their vectors and attention over their patches, as numbers and as pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from harness.core.waiting import gather_objects
from harness.data.preprocess import PreprocessSpec, draw_parameters
from harness.evaluate.contact_sheet import CELL
from harness.evaluate.embed import Embedder, Side
from models.batch import Batch
from models.comm import share
from models.method import Method

SHADE = 0.7  # opacity of the black over a patch without attention
COLOURS = ("#3f6fb5", "#d98a1c", "#28a03c", "#8a5fb0")  # of the parts, in their order


@dataclass(frozen=True)
class Why:
    """Explanation of a document: each part's share in its vector and the weight that it was added with, by name;
    attention over its patches, float32 [P], row by row, or None (see models/explanation.py).
    """

    shares: dict[str, float]
    weights: dict[str, float]
    attention: np.ndarray | None

    def __str__(self) -> str:
        return ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items())

    @property
    def told(self) -> str:
        """Shares, and the weights behind them."""
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in self.weights.items())
        return f"{self}; weights {weights}"


def explain(method: Method, embedder: Embedder, side: Side, ids: Iterable[int]) -> dict[int, Why]:
    """Explanations of a few documents of a side, by id; those of other sides, and all of a method without parts, are
    left out. The same on every rank; collective.
    """
    rows, mesh, count = side.rows_of(np.unique([*ids]).astype(np.int64)), embedder.mesh, len(method.parts)
    rows = rows[rows >= 0]
    if not (count and len(rows)):
        return {}
    few, own = side.select(rows), share(len(rows), mesh.dp.size(), mesh.dp.rank())
    size = min(embedder.batch_size, -(-len(rows) // mesh.dp.size()))  # blocks are always full
    small = Embedder(embedder.data, embedder.model, embedder.tokenizer, size, mesh)

    def numbers(batch: Batch) -> Tensor:
        found = method.explain_document(batch)
        looks = [] if found.attention is None else [found.attention]
        return torch.cat([column.float() for column in (found.shares, found.weights, *looks)], 1)

    made = []
    for block, values, _ in small.stream(method, few, numbers, [own]):
        made += [(int(few.ids[row]), value) for row, value in zip(block, values.cpu().numpy(), strict=True)]
    known = [pair for part in gather_objects(made, mesh.dp) for pair in part]
    return {number: _why(method.parts, values) for number, values in known}


def _why(parts: tuple[str, ...], values: np.ndarray) -> Why:
    count = len(parts)
    shares, weights = (dict(zip(parts, part.tolist(), strict=True)) for part in values[: 2 * count].reshape(2, count))
    return Why(shares, weights, values[2 * count :] if len(values) > 2 * count else None)


def attention_picture(image: Image.Image, attention: np.ndarray, spec: PreprocessSpec) -> Image.Image:
    """The window of an upright document that the towers see; the less attention a patch has, the darker it is."""
    window = draw_parameters(spec, 0, 0, [0], [image.width], [image.height], train=False)
    (x, y), (width, height) = window["anchor"][0].tolist(), window["shape"][0].tolist()
    seen = image.convert("RGB").crop((x, y, x + width, y + height)).resize((CELL, CELL))
    side = math.isqrt(len(attention))
    dark = 255 * SHADE * (1 - attention.reshape(side, side) / attention.max())
    mask = Image.fromarray(dark.astype(np.uint8)).resize((CELL, CELL), Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", seen.size), seen, mask)


def parts_picture(why: Why) -> Image.Image:
    """A bar for each part of a document's vector."""
    picture = Image.new("RGB", (CELL, CELL), "white")
    draw, font, step = ImageDraw.Draw(picture), ImageFont.load_default(size=12), CELL // max(3, len(why.shares))
    for place, (name, part) in enumerate(why.shares.items()):
        top, width = place * step, round((CELL - 8) * min(1.0, max(0.0, part)))
        draw.text((4, top + 2), f"{name} {part:.0%}", fill="black", font=font)
        draw.rectangle((4, top + 19, CELL - 5, top + 29), fill="#eef0f4")
        if width:
            draw.rectangle((4, top + 19, 3 + width, top + 29), fill=COLOURS[place % len(COLOURS)])
    return picture
