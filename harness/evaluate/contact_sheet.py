"""Contact sheets: queries, photos or texts, each with the best documents found for it."""

from __future__ import annotations

import bisect
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from harness.catalogue.catalogue import Catalogue, CorruptSample
from harness.catalogue.pixels import Colour
from harness.data.decode_pillow import decode_rgb
from harness.data.preprocess import WHITE

CELL, GAP, FRAME = 128, 12, 4  # pixels
LINES, LINE = 2, 14  # of a caption
LONGEST = 200  # characters of a text that are looked at: to measure takes time, and no cell shows as many
GREEN, GREY, DARK = (40, 160, 60), (200, 200, 200), (60, 60, 60)


def draw_panel(rows: list[tuple[Image.Image, list[tuple[Image.Image, str, bool | None]]]]) -> np.ndarray:
    """uint8 [H, W, 3]: a row for each query, its documents as (picture, caption, relevant).

    A relevant document has a green frame, any other a grey one, also where relevance is unknown (None); the query has a
    dark frame.
    """
    columns = max((len(documents) for _, documents in rows), default=0) + 1
    step_x, step_y = CELL + 2 * GAP, CELL + 2 * GAP + LINES * LINE
    sheet = Image.new("RGB", (columns * step_x, max(1, len(rows)) * step_y), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for y, (query, documents) in enumerate(rows):
        cells = [(query, "query", DARK)] + [
            (image, text, GREEN if relevant else GREY) for image, text, relevant in documents
        ]
        for x, (image, caption, colour) in enumerate(cells):
            left, top = x * step_x + GAP, y * step_y + GAP
            draw.rectangle(
                (left - FRAME, top - FRAME, left + CELL + FRAME - 1, top + CELL + FRAME - 1), fill=colour, width=0
            )
            sheet.paste(ImageOps.pad(image, (CELL, CELL), color="white"), (left, top))
            for line, text in enumerate(_wrap(caption, font)):
                draw.text((left, top + CELL + FRAME + 1 + line * LINE), text, fill="black", font=font)
    return np.asarray(sheet)


def _wrap(caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """`caption` in at most LINES lines that fit a cell; what does not fit ends in '…'."""
    lines = [""]
    for word in caption[:LONGEST].split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > CELL:
            lines.append(word)
        else:
            lines[-1] = longer
    shown = lines[:LINES]
    if len(lines) > LINES:
        shown[-1] += "…"
    return [_fit(line, font) for line in shown]


def _fit(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(line) <= CELL:
        return line
    least = bisect.bisect(range(len(line)), CELL, key=lambda length: font.getlength(f"{line[:length]}…"))
    return f"{line[: least - 1]}…"


def text_picture(text: str) -> Image.Image:
    """A query's words as a picture."""
    image = Image.new("RGB", (CELL, CELL), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    lines = textwrap.wrap(text[:LONGEST], 16, max_lines=CELL // 18, placeholder="…")
    for line, words in enumerate(lines):
        top = CELL // 2 + (line - len(lines) / 2) * 18
        draw.text(((CELL - font.getlength(words)) / 2, top), words, fill="black", font=font)
    return image


def picture(catalogue: Catalogue, sample_id: int, background: Colour = WHITE) -> Image.Image:
    """A sample's upright picture, as the towers see its colours; a grey one if its bytes are damaged."""
    try:
        return decode_rgb(catalogue.read_bytes(sample_id), background)
    except (CorruptSample, ValueError):
        return Image.new("RGB", (CELL, CELL), (127, 127, 127))
