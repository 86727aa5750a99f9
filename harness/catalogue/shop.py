"""Photos as shops have them: a table with a folder, a folder for each class, or a data set folder of the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.catalogue.catalogue import nearest_first
from harness.catalogue.images import Rejected
from harness.catalogue.paths import find_image
from harness.catalogue.samples import KINDS
from harness.catalogue.splits import usual_split
from harness.catalogue.table import SUFFIXES, Manifest
from harness.catalogue.text_table import Row
from harness.core.errors import UserError
from harness.core.files import printable

# Usual names of a column, the best first; compared in lower case, without spaces, dashes and underscores.
USUAL = {
    "image": "image imagepath imagefile filename image_name img photo photopath photofile picture file path filepath",
    "product": "classid productid productcode product sku itemid itemcode articleid articlenumber articlecode article "
    "asin gtin ean upc styleid stylecode label class id item",
    "title": "title producttitle productname productdisplayname displayname name itemname caption text",
    "description": "description productdescription longdescription details desc body",
    "split": "split partition subset fold",
    "kind": "kind",
}
NEEDED = ("image", "product")
IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".tif", ".tiff", ".bmp", ".jp2", ".ppm"}
TRIED = 20  # rows that are looked at to find what a column holds


class ImageFolders:
    """A folder for each product, with its images in it or below."""

    columns = ("image", "product")

    def __init__(self, root: Path) -> None:
        self._root = root

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """The images in the order of their paths, each with the cells of `columns`."""
        for folder, below, files in os.walk(self._root):
            below.sort()
            parts = Path(folder).relative_to(self._root).parts
            for name in sorted(files) if parts else ():
                if Path(name).suffix.lower() in IMAGES:
                    cells = {"image": "/".join([*parts, name]), "product": parts[0]}
                    yield Row([cells[column] for column in columns])


@dataclass(frozen=True)
class Part:
    """One table of a shop; `split` of all its rows where its name says one, and the folder of its images."""

    table: Manifest | ImageFolders
    split: str = ""
    folder: str = ""


class Shop:
    """All rows that a shop has, under one set of columns.

    Args:
        sources: a table and the folder of its images; or one folder: of folders of images, or a data set folder of the
            hub; or only a table, whose images lie beside it.

    Attributes:
        images: the folder that image paths are relative to.
        columns: names of the first table.

    Raises:
        UserError: nothing there is known.
    """

    def __init__(self, sources: Sequence[Path]) -> None:
        if not 1 <= len(sources) <= 2:
            raise UserError(
                f"{len(sources)} places are given", "Name a table and the folder of its images, or one folder"
            )
        for source in sources:
            if not source.exists():
                raise UserError(f"{source} does not exist")
        first, self.images = sources[0], sources[-1]
        if len(sources) == 2 and not self.images.is_dir():
            raise UserError(f"{self.images} is not a folder", "Name the folder of the images second")
        if len(sources) == 2 or not first.is_dir():
            self.images = self.images if len(sources) == 2 else first.parent
            self.parts = [Part(Manifest(first))]
        else:
            self.parts = _parts(first)
        self.columns = list(self.parts[0].table.columns)
        for part in self.parts[1:]:
            if set(part.table.columns) != set(self.columns):
                raise UserError(f"the tables in {first} have different columns", "Write all with the same columns")

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[Row, str, str]]:
        """The rows in order, each with the cells of `columns`, its split where its table's name says one, and the
        folder of its image below `images`.
        """
        for part in self.parts:
            for row in part.table.rows(columns):
                yield row, part.split, part.folder

    def choose(self, given: dict[str, str | None]) -> dict[str, str]:
        """Column of each field of USUAL that there is: the one that is `given`, else the first of a usual name.

        Raises:
            UserError: a given column is not there, or a needed one has no usual name.
        """
        plain = {_plain(name): name for name in reversed(self.columns)}
        chosen: dict[str, str] = {}
        for field, usual in USUAL.items():
            if (name := given.get(field)) is not None:
                if name not in self.columns:
                    near = ", ".join(printable(other, 40) for other in nearest_first(name, self.columns)[:20])
                    raise UserError(
                        f"no column {name!r} (--{field}-column)", f"The columns, most similar first: {near}"
                    )
                chosen[field] = name
                continue
            found = [plain[_plain(word)] for word in usual.split() if _plain(word) in plain]
            if field == "kind":
                found = [name for name in found if self._says_kinds(name)]
            if name := next((name for name in found if name not in chosen.values()), None):
                chosen[field] = name
        if "image" not in chosen and (name := self._column_of_files()):
            chosen["image"] = name
        for field in NEEDED:
            if field not in chosen:
                raise UserError(
                    f"no column is known to hold the {field} of a row (--{field}-column)",
                    f"The columns are {', '.join(printable(name, 40) for name in self.columns[:20])}",
                )
        return chosen

    def _first(self, name: str) -> list[str]:
        return [row.cells[0] for (row, _, _), _ in zip(self.rows([name]), range(TRIED), strict=False)]

    def _says_kinds(self, name: str) -> bool:
        return all(cell.strip().lower() in KINDS for cell in self._first(name))

    def _column_of_files(self) -> str | None:
        """The first column most of whose cells are names of files in the image folder."""
        for name in self.columns:
            cells = self._first(name)
            if sum(self._is_file(cell) for cell in cells) * 2 > len(cells):
                return name
        return None

    def _is_file(self, cell: str) -> bool:
        try:
            return bool(cell) and (self.images / find_image(self.images, cell)).is_file()
        except (Rejected, OSError, ValueError):
            return False


def _parts(folder: Path) -> list[Part]:
    """The tables of a data set folder of the hub, or the folder itself as folders of images.

    Raises:
        UserError: neither is there.
    """
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._")
    split_folders = [path for path in inside if usual_split(path.name)]
    for place in (folder, *split_folders):
        if tables := [file for suffix in SUFFIXES if (file := place / f"metadata{suffix}").is_file()]:
            if place == folder:
                return [Part(Manifest(tables[0]))]
            found = [(path, path / tables[0].name) for path in split_folders]
            return [
                Part(Manifest(table), usual_split(path.name), path.name) for path, table in found if table.is_file()
            ]
    for place in (folder, folder / "data"):
        if files := sorted(place.glob("*.parquet")):
            return [Part(Manifest(file), usual_split(re.split(r"[-_.]", file.name)[0])) for file in files]
    if not inside:
        raise UserError(
            f"{folder} has no table and no folders of images",
            "Name the table first: shelfmark init products.tsv photos/",
        )
    if len(split_folders) < len(inside):
        return [Part(ImageFolders(folder))]
    return [Part(ImageFolders(path), usual_split(path.name), path.name) for path in inside]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())
