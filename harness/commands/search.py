"""`shelfmark search`: Find documents by photo, text or likeness; as a table and a contact sheet."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from harness.artefact.artefact import Artefact, Hit, Photo
from harness.catalogue.images import MOST_PIXELS
from harness.core.errors import UserError
from harness.core.files import printable, writing
from harness.evaluate.contact_sheet import draw_panel, text_picture
from models.ranges import PositiveInt

EXAMPLE = "shelfmark search artefacts/grocery photo.jpg --top 5 --sheet found.png"


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Searches an artefact for photos, for a text, or for what is like one of its documents.

    Args:
        artefact: the folder that `shelfmark export` wrote.
        photos: the query photos.
        text: words to search for, where the artefact's method takes text (MAKE).
        item: id of a document of the artefact, to find others like it.
        top: documents to find for each query.
        where: only documents with these values, NAME=VALUE[,NAME=VALUE…], as colour=red; of several values of one name
            any will do. Names are those of the catalogue's attributes, class_key, item, title or description.
        box: search for this part of the photo only: x,y,width,height in pixels of the upright photo.
        max_pixels: a JPEG of up to four times as many is decoded at half its width and height; other photos of more
            are refused.
        sheet: picture to draw, a row for each query.
        backend: decoder of the photos; the one that the run was trained with by default.
    """

    artefact: Path = field(kw_only=False)
    photos: tuple[Path, ...] = field(default=(), kw_only=False)
    text: str = ""
    item: str = ""
    top: PositiveInt = 5
    where: tuple[str, ...] = ()
    box: tuple[int, ...] = ()
    max_pixels: int = MOST_PIXELS
    sheet: Path | None = None
    backend: Literal["dali", "reference"] | None = None


def run(config: SearchConfig) -> dict[str, Any]:
    """Searches, prints ids, titles and scores, draws the sheet; returns what was found for each query and seconds.

    Raises:
        UserError: no query or more than one kind of it, a kind that the artefact does not take, a photo or an artefact
            that cannot be used, an empty box, a sheet that cannot be written.
    """
    if config.sheet is not None and config.sheet.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"--sheet {config.sheet} is not a .png or .jpg", "Name a file with one of these suffixes")
    if sum(map(bool, (config.photos, config.text, config.item))) != 1:
        raise UserError("a search takes photos, --text or --item", "Name one of the three")
    if config.box and not config.photos:
        raise UserError("--box is a part of a photo, and there is none", "Leave it out")
    if config.max_pixels < 1:
        raise UserError(f"--max-pixels is {config.max_pixels}", "It must be at least 1")
    photos = [Photo.open(path, config.box, config.max_pixels) for path in config.photos]
    where = _where(config)
    artefact = Artefact(config.artefact, config.backend)
    _require_query(config, artefact)
    started = time.perf_counter()
    names, pictures, found = _search(config, artefact, photos, where)
    seconds = time.perf_counter() - started
    for name, hits in zip(names, found, strict=True):
        print(printable(name))
        if where and not hits:
            print("  no document passes --where")
        ids = [printable(hit.id, 40) for hit in hits]
        width = max(map(len, ids), default=0)
        for place, (hit, item) in enumerate(zip(hits, ids, strict=True), 1):
            print(f"  {place:>3}. {hit.score:7.4f}  {item:<{width}}  {printable(hit.title)}")
    if config.sheet is not None:
        rows = []
        for image, hits in zip(pictures, found, strict=True):
            cells: list[tuple[Image.Image, str, bool | None]] = [
                (artefact.thumbnail(hit.row), f"{hit.score:.3f} {hit.title}", None) for hit in hits
            ]
            rows.append((image, cells))
        save_sheet(rows, config.sheet)
    answers = [{"query": name, "found": [asdict(hit) for hit in hits]} for name, hits in zip(names, found, strict=True)]
    return {"queries": answers, "seconds": round(seconds, 3)}


def _require_query(config: SearchConfig, artefact: Artefact) -> None:
    takes = artefact.meta["query"]
    if config.photos and takes != "image":
        raise UserError(f"{config.artefact} answers texts, not photos", 'Search with --text "…" or --item ID')
    if config.text and takes != "text":
        raise UserError(f"{config.artefact} answers photos, not texts", "Name photos, or search with --item ID")


def _where(config: SearchConfig) -> dict[str, list[str]]:
    """Values allowed for each name."""
    where: dict[str, list[str]] = {}
    for condition in config.where:
        name, equals, value = condition.partition("=")
        if not equals or not name:
            raise UserError(f"--where has '{printable(condition)}'", "Write NAME=VALUE, as in --where colour=red")
        where.setdefault(name, []).append(value)
    return where


def _search(
    config: SearchConfig, artefact: Artefact, photos: list[Photo], where: dict[str, list[str]]
) -> tuple[list[str], list[Image.Image], list[list[Hit]]]:
    """Names and pictures of the queries, and what each finds."""
    if config.text:
        found = artefact.search(artefact.embed_texts([config.text]), config.top, where)
        return [config.text], [text_picture(config.text)], found
    if config.item:
        row = artefact.document(config.item)
        (near,) = artefact.search(artefact.vector(row), config.top + 1, where)
        title = artefact.documents.column("title")[row].as_py()
        others = [hit for hit in near if hit.row != row][: config.top]
        return [f"{config.item}  {title}"], [artefact.thumbnail(row)], [others]
    names, background = [str(path) for path in config.photos], artefact.spec.background
    found = artefact.search(artefact.embed(photos), config.top, where)
    return names, [photo.picture(background) for photo in photos], found


def save_sheet(rows: list[tuple[Image.Image, list[tuple[Image.Image, str, bool | None]]]], file: Path) -> None:
    """Draws and writes a contact sheet (see harness.evaluate.contact_sheet.draw_panel).

    Raises:
        UserError: the file cannot be written.
    """
    with writing(f"contact sheet {file}"):
        Image.fromarray(draw_panel(rows)).save(file)
    print(f"contact sheet: {file}")
