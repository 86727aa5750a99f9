"""`shelfmark init`: Make a catalogue and a recipe of a table and photos, and print the commands that come next.

The rules that choose the recipe: docs/recipes.md.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from harness.catalogue.catalogue import SAMPLE_SCHEMA, Catalogue
from harness.catalogue.shop import Shop
from harness.catalogue.splits import Photo, Place, place
from harness.commands import govern, ingest, pairs, tokenizer
from harness.commands.estimate import EstimateConfig, figures_of, with_sizes
from harness.core.cli import read_recipe
from harness.core.errors import UserError
from harness.core.files import printable, write_whole
from harness.core.lock import locked
from harness.text.tokenizer import FIELDS
from harness.train.config import parse
from harness.train.first_recipe import LEAST_EPOCHS, Facts, length, shape, start, written
from harness.train.frozen_eval import preprocess_of
from harness.train.imported_weights import image_tower
from models.ranges import NonNegativeInt, PositiveFloat
from models.vision import VisionConfig

EXAMPLE = "shelfmark init products.tsv photos/ --out shop"
MOST_VALUES = 20  # of a column that becomes an attribute
MOST_CORES = 8  # that train, where there is no GPU
TABLE, PAIRS, CATALOGUE, RECIPE, LOCK = "manifest.parquet", "pairs.parquet", "catalogue", "recipe.yaml", ".lock"
PROCESS_BYTES = 1.2e9  # of a process beside the step: libraries and decoder, measured
_FIELDS = ("id", "kind", "class_id", "split", "title", "description")  # of TABLE, beside the image and attributes


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Makes a catalogue with splits, classes, vocabulary and a commented recipe of what a shop has.

    The sources are a table (TSV, CSV, Parquet or JSONL) with a row for each image and the folder of the images; or one
    folder, of a folder of images for each product, or a data set folder of the hub. Without a column `kind`, the first
    image of a product is its catalogue picture, and the others are photos that search for it. A photo in several rows
    shows several products: it is stored once, and pairs.parquet names them.

    Args:
        sources: the table and the folder of its images, or one folder.
        out: folder to create: manifest.parquet, pairs.parquet where photos show several products, catalogue/ and
            recipe.yaml.
        image_column: column of the image path (default: the first of a usual name, or that holds names of files).
        product_column: column of the product that the image shows (default: the first of a usual name).
        title_column: column of the title (default: the first of a usual name).
        description_column: column of the description (default: the first of a usual name).
        split_column: column of the split (default: the first of a usual name; splits are made where it lacks val or
            test).
        kind_column: column that says query or document (default: kind).
        minutes: time to train.
        weights: folder of `shelfmark import` with an image tower, which training starts from (default: from scratch).
        seed: of the splits.
    """

    sources: tuple[Path, ...] = field(kw_only=False)
    out: Path
    image_column: str | None = None
    product_column: str | None = None
    title_column: str | None = None
    description_column: str | None = None
    split_column: str | None = None
    kind_column: str | None = None
    minutes: PositiveFloat = 20.0
    weights: Path | None = None
    seed: NonNegativeInt = 0


def run(config: InitConfig) -> dict[str, Any]:
    """Makes the folder and prints what was taken and the next commands.

    Returns:
        columns (field -> column), attributes, splits (photos of each), held_out (products), classes, vocab_size,
        steps, seconds (estimate of the training), memory (bytes of all processes, estimate).

    Raises:
        UserError: a source or a column is not there, the photos cannot be split, `weights` holds no image tower, or
            `out` holds something else.
    """
    vision = None if config.weights is None else _tower_alone(config.weights)
    shop = Shop(config.sources)
    given = {name: getattr(config, f"{name}_column") for name in ("image", "product", "title", "description", "split")}
    columns = shop.choose({**given, "kind": config.kind_column})
    out = config.out
    _require_own(out)
    with locked(out / LOCK, f"init {out}"):
        table, attributes, placed = _write_table(shop, columns, config)
        _say_columns(columns, attributes)
        catalogue = out / CATALOGUE
        shutil.rmtree(catalogue, ignore_errors=True)
        ingest.run(
            ingest.IngestConfig(
                manifest=table, images=shop.images, out=catalogue, attribute_columns=",".join(attributes)
            )
        )
        if (out / PAIRS).exists():
            pairs.run(pairs.PairsConfig(catalogue=catalogue, table=out / PAIRS))
        classes = govern.run(govern.GovernConfig(catalogue=catalogue))
        words = tokenizer.run(tokenizer.TokenizerConfig(catalogue=catalogue))
        _say_splits(placed)
        figures = _write_recipe(config, classes, tuple(attributes[:1]), vision)
    return {
        "columns": columns,
        "attributes": attributes,
        "splits": dict(Counter(split for _, kind, split in placed if kind == "query")),
        "held_out": _held_out(placed),
        "classes": classes["num_classes"],
        "vocab_size": words["vocab_size"],
        **figures,
    }


def _tower_alone(weights: Path) -> VisionConfig:
    """The image tower of a folder that holds nothing else.

    Raises:
        UserError: it holds none, or a text tower too, which would need a vocabulary of its own.
    """
    vision, _ = image_tower(weights)
    if "text" in read_recipe(weights / "recipe.yaml")["model"]:
        raise UserError(
            f"{weights} holds a text tower too; init makes a vocabulary of the shop's texts",
            "Import the image tower by itself: shelfmark import OUT --vision NAME",
        )
    return vision


def _require_own(out: Path) -> None:
    """Raises UserError unless `out` is new, or was left by an init that did not end."""
    there = set(os.listdir(out)) - {LOCK, PAIRS, f"{TABLE}.tmp"} if out.is_dir() else set()
    if (out / RECIPE).exists() or (there and TABLE not in there) or (out.exists() and not out.is_dir()):
        raise UserError(f"{out} exists already", "Choose another --out, or remove it; nothing was written")


def _write_table(
    shop: Shop, columns: dict[str, str], config: InitConfig
) -> tuple[Path, list[str], list[tuple[str, str, str]]]:
    """The shop's rows as a manifest for ingest.

    Returns:
        Its file, the attributes in it, those of fewest values first, and product, kind ('' where the photo has a row
        already) and split of each row.
    """
    others = [n for n in shop.columns if n not in columns.values() and n not in SAMPLE_SCHEMA.names and "," not in n]
    values: dict[str, set[str]] = defaultdict(set)
    photos, wrong, has_data = list[Photo](), Counter[str](), False
    for row, cells in _rows(shop, columns, others):
        if row.problem or not cells["image"]:
            wrong[row.problem or "no image path"] += 1
            continue
        has_data |= row.data is not None
        photos.append(Photo(*(cells.get(name, "") for name in ("image", "product", "split", "kind"))))
        for name in others:
            if len(values[name]) <= MOST_VALUES:
                values[name].add(cells[f"={name}"])
    if wrong:
        why, count = wrong.most_common(1)[0]
        print(f"{sum(wrong.values()):,} rows are left out: {count:,} x {printable(why)}")
    if not photos:
        raise UserError(f"{config.sources[0]}: no row names an image", "Check --image-column")
    places = place(photos, config.seed)
    several = {} if has_data else _several(photos, places)  # paths in a table with images may be all alike
    named = [n for n in others if 2 <= len(values[n]) <= MOST_VALUES and not all(map(_is_number, values[n]))]
    attributes = sorted(named, key=lambda name: (len(values[name]), name))
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if has_data else pa.string()
    text = [(name, pa.string()) for name in (*_FIELDS, *attributes)]
    schema = pa.schema([("image", image), *text])
    config.out.mkdir(parents=True, exist_ok=True)
    table, temporary = config.out / TABLE, config.out / f"{TABLE}.tmp"
    rows = ((row, cells) for row, cells in _rows(shop, columns, attributes) if not row.problem and cells["image"])
    placed, written = list[tuple[str, str, str]](), set[str]()
    with pq.ParquetWriter(temporary, schema) as writer:
        at_rows = zip(rows, places, strict=True)
        while batch := list(islice(at_rows, 256)):
            lines = []
            for (row, cells), at in batch:
                shared = at.kind == "query" and cells["image"] in several
                placed.append((cells["product"], "" if shared and cells["image"] in written else at.kind, at.split))
                if placed[-1][1]:
                    own = {**dict.fromkeys(cells, ""), "image": cells["image"]} if shared else cells
                    lines.append(_line(row, own, at, attributes, has_data))
                if shared:
                    written.add(cells["image"])
            writer.write_table(pa.Table.from_pylist(lines, schema))
    _write_pairs(config.out / PAIRS, several)
    temporary.replace(table)
    return table, attributes, placed


def _several(photos: Sequence[Photo], places: Sequence[Place]) -> dict[str, list[str]]:
    """Image of each photo that shows several products -> those of them that have a document."""
    documents = {photo.product for photo, at in zip(photos, places, strict=True) if at.kind == "document"}
    searching = {photo.image for photo, at in zip(photos, places, strict=True) if at.kind == "query"}
    shown: dict[str, dict[str, None]] = defaultdict(dict)
    for photo in photos:
        if photo.product and photo.image in searching:
            shown[photo.image][photo.product] = None
    return {image: [name for name in found if name in documents] for image, found in shown.items() if len(found) > 1}


def _write_pairs(file: Path, several: dict[str, list[str]]) -> None:
    """The table for `shelfmark pairs`; none where no photo shows several products."""
    file.unlink(missing_ok=True)
    found = [(_text(image), _text(product)) for image, products in several.items() for product in products]
    if found:
        queries, documents = zip(*found, strict=True)
        pq.write_table(pa.table({"query_id": queries, "document_id": documents}), file)
        print(f"{len(several):,} photos show several products each: stored once, their products are in {file}")


def _is_number(text: str) -> bool:
    """True for a measure, by which nobody groups; and for an empty cell."""
    return text.strip() == "" or text.strip().replace(".", "", 1).isdecimal()


def _rows(shop: Shop, columns: dict[str, str], others: Sequence[str]) -> Iterator[tuple[Any, dict[str, str]]]:
    """The rows with their cells by field, and by =name for the columns `others`."""
    names = [*columns, *(f"={name}" for name in others)]
    for row, split, folder in shop.rows([*columns.values(), *others]):
        cells = dict(zip(names, row.cells, strict=True))
        cells["product"] = cells.get("product", "").strip()
        cells["split"] = split or cells.get("split", "")
        if folder and cells["image"]:
            cells["image"] = f"{folder}/{cells['image']}"
        yield row, cells


def _line(row: Any, cells: dict[str, str], at: Place, attributes: Sequence[str], has_data: bool) -> dict[str, Any]:
    """A row of the manifest."""
    image: Any = {"bytes": row.data, "path": cells["image"]} if has_data else cells["image"]
    texts = {
        "id": cells["product"] or cells["image"],
        "class_id": cells["product"],
        "kind": at.kind,
        "split": at.split,
        "title": cells.get("title", ""),
        "description": cells.get("description", ""),
        **{name: cells[f"={name}"] for name in attributes},
    }
    return {"image": image, **{name: _text(value) for name, value in texts.items()}}


def _text(cell: str) -> str:
    """A cell as Parquet takes it: lone surrogates stand for bytes that are not text."""
    return cell.encode("utf-8", "replace").decode()


def _say_columns(columns: dict[str, str], attributes: Sequence[str]) -> None:
    taken = ", ".join(f"{name} = {printable(column, 40)!r}" for name, column in columns.items())
    more = ", ".join(printable(name, 40) for name in attributes) or "none"
    print(f"columns: {taken}; attributes: {more} (--image-column, --product-column and so on choose others)")


def _held_out(placed: Sequence[tuple[str, str, str]]) -> int:
    """Products whose photos are all in val or test."""
    splits: dict[str, set[str]] = defaultdict(set)
    for product, kind, split in placed:
        if kind != "document" and product:
            splits[product].add(split)
    return sum("train" not in found and "all" not in found for found in splits.values())


def _say_splits(placed: Sequence[tuple[str, str, str]]) -> None:
    counts = Counter(split for _, kind, split in placed if kind == "query")
    photos = ", ".join(f"{name} {counts[name]:,}" for name in sorted(counts, key=counts.__getitem__, reverse=True))
    documents = sum(kind == "document" for _, kind, _ in placed)
    print(f"photos: {photos}; documents: {documents:,}; products held out from training: {_held_out(placed):,}")


def _write_recipe(
    config: InitConfig, classes: dict[str, Any], slices: tuple[str, ...], vision: VisionConfig | None
) -> dict[str, Any]:
    """Writes the recipe and prints the next commands; its steps, and estimates of seconds and bytes."""
    out, gpus, ranks = config.out, torch.cuda.device_count(), _ranks()
    facts = Facts(
        classes=classes["num_classes"],
        photos=classes["queries"],
        gpus=gpus,
        ranks=ranks,
        minutes=config.minutes,
        slices=slices,
        has_text=has_text(Catalogue(out / CATALOGUE)),
        imported=vision is not None,
    )
    changes = {**shape(facts), "data.catalogue": (out / CATALOGUE, "made by `shelfmark init`")}
    if config.weights is not None and vision is not None:
        changes |= start(config.weights, vision, preprocess_of(config.weights, vision), gpus)
    recipe = out / RECIPE
    commands = [shlex.join(["shelfmark", *words]) for words in following(out)]
    head = (
        f"OCLEAR on {facts.classes:,} classes with {facts.photos:,} train photos, by `shelfmark init`.\n\n"
        f"Command:  {commands[0]}\n\n"
        "A reason stands behind each value that was chosen; the rules: docs/recipes.md."
    )
    draft = out / f"draft-{RECIPE}"  # its step says how many steps fit the time
    write_whole(draft, written(changes, head))
    made, _ = parse(["--config", str(draft), *([] if gpus else ["--mesh.device", "cpu"])], ranks)
    figures = figures_of(*with_sizes(made, EstimateConfig()), ranks)
    more, seconds = length(facts, figures["flops_per_step_total"], made.data.queries_per_step)
    write_whole(recipe, written({**changes, **more}, head))
    draft.unlink()
    steps = int(more["train.steps"][0])
    memory = ranks * (figures["peak_memory_per_rank"] + PROCESS_BYTES)
    if (epochs := steps * made.data.queries_per_step / facts.photos) < LEAST_EPOCHS:
        print(f"warning: {config.minutes:g} minutes are {epochs:.1f} epochs only; give more time with --minutes")
    objective = made.model.objective  # type: ignore[attr-defined]
    print(
        f"{recipe}: {objective}, {steps:,} steps, about {max(1, round(seconds / 60)):,} min on {ranks} "
        f"{'GPU' if gpus else 'core'}{'s' * (ranks > 1)} and {memory / 1e9:.1f} GB (estimates)\n\nnext:"
    )
    print(*(f"  {line}" for line in commands), sep="\n")
    return {"steps": steps, "seconds": seconds, "memory": memory}


def following(out: Path) -> list[list[str]]:
    """Words of the commands that come after init, `shelfmark` left out."""
    catalogue = Catalogue(out / CATALOGUE)
    weighs = ["--weigh-parts"] if has_text(catalogue) and _has_judges(catalogue) else []
    return [
        ["train", "--ranks", str(_ranks()), "--config", f"{out}/{RECIPE}", "--run-dir", f"{out}/run"],
        ["eval", f"{out}/run", "--split", "test", *weighs],
        ["export", f"{out}/run", "--out", f"{out}/artefact", *weighs],
        ["search", f"{out}/artefact", "photo.jpg", "--top", "5", "--sheet", "found.png"],
    ]


def _ranks() -> int:
    """Processes that train on this machine: one for each GPU, or else for each core up to MOST_CORES."""
    return torch.cuda.device_count() or min(len(os.sched_getaffinity(0)), MOST_CORES)


def has_text(catalogue: Catalogue) -> bool:
    """True where a document has a title or a description."""
    batches = catalogue.batches(["title", "description"], kind="document")
    return any(cell.strip() for batch in batches for name in FIELDS for cell in batch.column(name).to_pylist())


def _has_judges(catalogue: Catalogue) -> bool:
    """True where a photo of split val shows one product, which has a document: only such photos choose weights."""
    photos = catalogue.table(["class_key"], kind="query", split="val")["class_key"]
    wanted = pc.unique(photos.filter(pc.not_equal(photos, "")))
    batches = catalogue.batches(["class_key"], kind="document", split="val")
    return any(pc.any(pc.is_in(batch.column("class_key"), wanted)).as_py() for batch in batches)
