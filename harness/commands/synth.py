"""`shelfmark synth`: Make a synthetic catalogue: products, photos, a click log."""

from __future__ import annotations

import csv
import io
import os
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import repeat
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from harness.catalogue.catalogue import ALL_SPLITS
from harness.catalogue.synth.clicks import click_log
from harness.catalogue.synth.draw import on_paper
from harness.catalogue.synth.photo import lifestyle, photograph
from harness.catalogue.synth.products import MAX_PRODUCTS, Product, make_products
from harness.catalogue.synth.shapes import cutout
from harness.core.errors import UserError
from harness.core.files import write_json
from harness.core.keyed_random import SynthStream
from harness.core.staged_folder import staged_folder

EXAMPLE = "shelfmark synth demo --products 240 --photos 14"
SYNTH_FORMAT = 1
COLUMNS = ("image", "kind", "id", "class_id", "title", "description", "split")
ATTRIBUTES = ("category", "colour", "pattern", "brand", "variant")
DOCUMENT_SIZE = 256  # pixels
NEIGHBOUR_SIZE = 112  # pixels; other products in a photo are small
LIFESTYLE = "lifestyle"  # column of a catalogue that has such documents: yes or no
LIFESTYLE_SIZE = 160  # pixels; of every product in a lifestyle document, that for sale included


@dataclass(frozen=True, kw_only=True)
class SynthConfig:
    """Makes a synthetic catalogue: products with title, description and clean picture, photos of them, and a click log.

    The same values give the same bytes, whatever the number of workers. The folder is ready for `shelfmark ingest
    --manifest OUT/manifest.tsv --images OUT --attribute-columns category,colour,pattern,brand`. With lifestyle
    documents there is a further column, lifestyle: yes for a product whose document is one, and for its photos; else
    no.

    Args:
        out: folder to create; it appears only when it is complete.
        products: products in the catalogue, 8 to 2,000.
        photos: training photos of each product, 1 to 1,000.
        held_out: further photos of each product in each of the splits val and test, 1 to 1,000.
        unseen: share of products that training never shows, 0 to 0.5; they get twice `held_out` test photos.
        near_duplicates: share of products in pairs that differ only in small print or colour, 0 to 0.5.
        lifestyle: share of documents whose picture shows two to four products of different kinds, 0 to 1; only the
            text says which is for sale.
        seed: of all random choices.
        workers: drawing processes; 0 = the CPU cores this process may use.
    """

    out: Path = field(kw_only=False)
    products: int = 240
    photos: int = 14
    held_out: int = 2
    unseen: float = 0.15
    near_duplicates: float = 0.10
    lifestyle: float = 0.0
    seed: int = 0
    workers: int = 0

    def catalogue(self) -> tuple[Product, ...]:
        """The products."""
        return make_products(self.products, self.near_duplicates, self.unseen, self.seed)

    def lifestyle_products(self) -> set[int]:
        """Numbers of the products whose documents show several."""
        order = np.random.default_rng([self.seed, SynthStream.LIFESTYLE]).permutation(self.products)
        return {int(number) for number in order[: round(self.lifestyle * self.products)]}

    def columns(self) -> tuple[str, ...]:
        """Columns of the manifest."""
        return COLUMNS + ATTRIBUTES + ((LIFESTYLE,) if self.lifestyle else ())


def run(config: SynthConfig) -> dict[str, Any]:
    """Makes the folder and prints a summary.

    Returns:
        products, documents, photos, unseen_products, near_duplicates (products in pairs), lifestyle_documents (where
        there are any), splits, impressions, clicks, wrong_clicks, seconds, out.

    Raises:
        UserError: a value out of range, `out` exists, or the disk is full.
    """
    start = time.perf_counter()
    _check(config)
    products = config.catalogue()
    workers = config.workers or len(os.sched_getaffinity(0))
    with staged_folder(config.out) as stage:
        (stage / "images").mkdir()
        # Not forked: the caller may have threads.
        with ProcessPoolExecutor(workers, get_context("spawn"), _end_with_parent) as pool:
            drawn = pool.map(_draw_product, repeat(config), repeat(stage), range(config.products))
            rows = [row for some in tqdm(drawn, total=config.products, desc="synth", unit=" products") for row in some]
        with (stage / "manifest.tsv").open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, config.columns(), delimiter="\t", lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        product_of = {f"c{product.number:04d}": product for product in products}
        photos = [(row["id"], product_of[row["class_id"]]) for row in rows if row["split"] == "train"]
        documents = [(row["id"], product_of[row["class_id"]]) for row in rows if row["split"] == ALL_SPLITS]
        log, wrong = click_log(photos, documents, config.seed)
        pq.write_table(log, stage / "clicks.parquet")
        clicks = int(np.sum(log["clicks"]))
        splits = Counter(row["split"] for row in rows)
        counts = {
            "products": config.products,
            "documents": config.products,
            "photos": len(rows) - config.products,
            "unseen_products": [product.unseen for product in products].count(True),
            "near_duplicates": len(products) - [product.twin for product in products].count(None),
            **({"lifestyle_documents": len(config.lifestyle_products())} if config.lifestyle else {}),
            "splits": dict(sorted(splits.items())),
            "impressions": int(np.sum(log["impressions"])),
            "clicks": clicks,
            "wrong_clicks": wrong,
        }
        # Without `out` and `workers`: equal settings give equal files. Without `lifestyle` where it is off: it gives
        # the files of a version that did not know it.
        left_out = {"out", "workers", *(() if config.lifestyle else ("lifestyle",))}
        settings = {key: value for key, value in asdict(config).items() if key not in left_out}
        meta = {"format": SYNTH_FORMAT, "config": settings, "counts": counts}
        write_json(stage / "synth.json", meta)
    seconds = round(time.perf_counter() - start, 3)
    print(
        f"{config.out}: {config.products:,} products, {counts['photos']:,} photos, {clicks:,} clicks "
        f"({wrong / clicks:.0%} wrong), {seconds:.1f} s"
    )
    return {"out": str(config.out), **counts, "seconds": seconds}


def _check(config: SynthConfig) -> None:
    ranges = {
        "products": (8, MAX_PRODUCTS),
        "photos": (1, 1000),
        "held_out": (1, 1000),
        "unseen": (0.0, 0.5),
        "near_duplicates": (0.0, 0.5),
        "lifestyle": (0.0, 1.0),
        "seed": (0, 2**63 - 1),
        "workers": (0, 1024),
    }
    for name, (least, most) in ranges.items():
        if not least <= getattr(config, name) <= most:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} is {getattr(config, name)}", f"It must be from {least} to {most}")


def _end_with_parent() -> None:
    """Ends this drawing process if the command was killed: it would wait for more work for ever."""

    def watch() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _draw_product(config: SynthConfig, folder: Path, number: int) -> list[dict[str, str]]:
    """Writes a product's document and photos under `folder`; returns their manifest rows."""
    product = config.catalogue()[number]
    shown = [other for other in config.catalogue() if not other.unseen and other.number != number]
    picture, several = cutout(product, DOCUMENT_SIZE), number in config.lifestyle_products()
    if product.unseen:
        splits = ["test"] * (2 * config.held_out)
    else:
        splits = ["train"] * config.photos + ["val"] * config.held_out + ["test"] * config.held_out
    text = {"title": product.title, "description": product.description}
    attributes = {name: str(getattr(product, name)) for name in ATTRIBUTES}
    if config.lifestyle:
        attributes[LIFESTYLE] = "yes" if several else "no"
    rows = []
    for member, split in enumerate(["test" if product.unseen else ALL_SPLITS, *splits]):
        rng = np.random.default_rng([config.seed, SynthStream.PHOTOS, number, member])
        if member:
            # Few of them for each product, so that a process seldom draws one twice.
            others = [_neighbour(shown[int(i)]) for i in rng.choice(len(shown), 3, replace=False)]
            image, quality = photograph(picture, others, rng), int(rng.integers(38, 93))
        elif several:
            choice = np.random.default_rng([config.seed, SynthStream.LIFESTYLE, number])
            pictures = [cutout(other, LIFESTYLE_SIZE) for other in _together(product, shown, choice)]
            image, quality = lifestyle(pictures, DOCUMENT_SIZE, choice), 95
        else:
            image, quality = on_paper(picture, DOCUMENT_SIZE), 95
        name = f"images/{number:04d}-{member:02d}.jpg"
        data = io.BytesIO()
        image.save(data, "JPEG", quality=quality)
        (folder / name).write_bytes(data.getvalue())
        if member:
            own = {"kind": "query", "id": f"q{number:04d}-{member:02d}", "title": "", "description": ""}
        else:
            own = {"kind": "document", "id": f"d{number:04d}", **text}
        rows.append({"image": name, "split": split, "class_id": f"c{number:04d}", **own, **attributes})
    return rows


def _together(product: Product, shown: list[Product], rng: np.random.Generator) -> list[Product]:
    """`product` and one to three of `shown`, all of different kinds, so that a text that names the kind is enough."""
    together, wanted = [product], int(rng.integers(2, 5))
    for place in rng.permutation(len(shown)):
        if len(together) < wanted and shown[place].kind not in [other.kind for other in together]:
            together.append(shown[place])
    return together


@lru_cache(512)
def _neighbour(product: Product) -> Image.Image:
    return cutout(product, NEIGHBOUR_SIZE)
