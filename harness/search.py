"""`shelfmark search ARTEFACT PHOTO …`: the documents that look like a photo, as a table and as a contact sheet."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from harness.artefact import Artefact, Photo
from harness.errors import UserError
from harness.panel import draw_panel

EXAMPLE = "shelfmark search artefacts/grocery photo.jpg --top 5 --sheet found.png"


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Searches an artefact for photos.

    Args:
        artefact: the folder that `shelfmark export` wrote.
        photos: the query photos.
        top: documents to find for each photo.
        box: search for this part of the photo only: x,y,width,height in pixels of the upright photo.
        sheet: picture to draw, a row for each photo.
        backend: decoder of the photos; the one that the run was trained with by default.
    """

    artefact: Path
    photos: tuple[Path, ...]
    top: int = 5
    box: tuple[int, ...] = ()
    sheet: Path | None = None
    backend: Literal["dali", "reference"] | None = None


def run(config: SearchConfig) -> dict[str, Any]:
    """Searches, prints ids, titles and scores, draws the sheet; returns what was found for each photo and seconds.

    Raises:
        UserError: a photo or the artefact cannot be used, an empty box, a sheet that cannot be written.
    """
    if config.top < 1:
        raise UserError(f"--top is {config.top}", "It must be at least 1")
    if config.sheet is not None and config.sheet.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"--sheet {config.sheet} is no .png or .jpg", "Name a file with one of these suffixes")
    photos = [Photo.open(path, config.box) for path in config.photos]
    artefact = Artefact(config.artefact, config.backend)
    started = time.perf_counter()
    found = artefact.search(artefact.embed(photos), config.top)
    seconds = time.perf_counter() - started
    for path, hits in zip(config.photos, found, strict=True):
        print(path)
        width = max(len(hit.id) for hit in hits)
        for place, hit in enumerate(hits, 1):
            print(f"  {place:>3}. {hit.score:7.4f}  {hit.id:<{width}}  {hit.title}")
    if config.sheet is not None:
        rows = []
        for photo, hits in zip(photos, found, strict=True):
            cells: list[tuple[Image.Image, str, bool | None]] = [
                (artefact.thumbnail(hit.row), f"{hit.score:.3f} {hit.title}", None) for hit in hits
            ]
            rows.append((photo.picture(), cells))
        save_sheet(rows, config.sheet)
    return {
        "photos": [
            {"photo": str(path), "found": [asdict(hit) for hit in hits]}
            for path, hits in zip(config.photos, found, strict=True)
        ],
        "seconds": round(seconds, 3),
    }


def save_sheet(rows: list[tuple[Image.Image, list[tuple[Image.Image, str, bool | None]]]], file: Path) -> None:
    """Draws and writes a contact sheet (see harness.panel.draw_panel).

    Raises:
        UserError: the file cannot be written.
    """
    try:
        Image.fromarray(draw_panel(rows)).save(file)
    except OSError as error:
        raise UserError(
            f"contact sheet {file}: {error.strerror or error}", "Name a file in a folder that exists"
        ) from error
    print(f"contact sheet: {file}")
