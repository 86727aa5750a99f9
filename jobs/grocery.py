"""The Grocery Store data set (Klasson et al., WACV 2019; MIT) as a table and small photos, for docs/results.md."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from harness.core.cli import Parser, run_command
from harness.core.errors import UserError

SHORT_SIDE, QUALITY = 160, 90
COLUMNS = (
    *("id", "kind", "split", "image", "class_id", "class_name", "coarse_name", "department", "title", "description"),
    "source",
)
Row = dict[str, str]


@dataclass(frozen=True)
class GroceryConfig:
    """Writes manifest.tsv and images/ from a clone of github.com/marcusklasson/GroceryStoreDataset.

    Args:
        clone: folder of the clone.
        out: folder to create.
    """

    clone: Path
    out: Path


def grocery(config: GroceryConfig) -> None:
    """81 documents (icon, title, description) in every split, and the photos in the data set's own splits.

    Raises:
        UserError: `clone` is not the data set, or `out` exists.
    """
    source = config.clone / "dataset"
    if not (source / "classes.csv").is_file():
        remedy = "git clone https://github.com/marcusklasson/GroceryStoreDataset"
        raise UserError(f"{config.clone} has no dataset/classes.csv", remedy)
    if config.out.exists():
        raise UserError(f"{config.out} exists", "Name a new folder")
    rows = list(rows_of(source))
    for row in rows:
        target = config.out / row["image"]
        target.parent.mkdir(parents=True, exist_ok=True)
        shrink(source / row["source"], target)
    with (config.out / "manifest.tsv").open("w", encoding="utf-8") as file:
        file.writelines("\t".join(cells) + "\n" for cells in (COLUMNS, *(row.values() for row in rows)))
    print(f"{config.out}: {len(rows):,} images")


def rows_of(source: Path) -> Iterator[Row]:
    """A row for each document, then for each photo of train, val and test; its keys are COLUMNS, in this order."""
    shared: dict[str, Row] = {}
    with (source / "classes.csv").open(encoding="utf-8", newline="") as file:
        for name, number, coarse, _, icon, description in list(csv.reader(file))[1:]:
            icon, text = icon.strip().lstrip("/"), (source / description.strip().lstrip("/")).read_text("utf-8")
            shared[number] = {"class_id": number, "class_name": name, "coarse_name": coarse}
            shared[number]["department"] = icon.split("/")[1]
            words = {"title": name.replace("-", " "), "description": " ".join(text.split())}
            place = {"id": f"d{int(number):02d}", "kind": "document", "split": "all"}
            yield place | {"image": f"images/docs/{int(number):02d}.jpg"} | shared[number] | words | {"source": icon}
    for split in ("train", "val", "test"):
        for line in (source / f"{split}.txt").read_text("utf-8").splitlines():
            path, number, _ = (cell.strip() for cell in line.split(","))
            member = Path(path).stem.rpartition("_")[2]
            place = {"id": f"q-{split}-{int(number):02d}-{member}", "kind": "query", "split": split}
            image = {"image": f"images/{split}/{int(number):02d}/{member}.jpg"}
            yield place | image | shared[number] | {"title": "", "description": "", "source": path}


def shrink(source: Path, target: Path) -> None:
    """Writes a JPEG whose short side is at most SHORT_SIDE pixels."""
    with Image.open(source) as image:
        picture = image.convert("RGB")
    scale = SHORT_SIDE / min(picture.size)
    if scale < 1:
        size = tuple(max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    picture.save(target, quality=QUALITY, optimize=True)


def main() -> int:
    """Entry point."""

    def body() -> None:
        parser = Parser(
            "grocery",
            GroceryConfig.__doc__ or "",
            "python jobs/grocery.py --clone GroceryStoreDataset --out data/grocery",
        )
        parser.add_class_arguments(GroceryConfig)
        grocery(GroceryConfig(**parser.parse(sys.argv[1:]).as_dict()))

    return run_command(body)


if __name__ == "__main__":
    sys.exit(main())
