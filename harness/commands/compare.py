"""`shelfmark compare`: Compare two artefacts before one replaces the other: results, recall, drift, latency."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from harness.artefact.artefact import Artefact, Hit, Photo
from harness.artefact.golden import lowest_cosine, read_golden
from harness.catalogue.catalogue import Catalogue
from harness.core.errors import UserError
from harness.core.evenly import evenly
from harness.core.files import files_in, printable
from harness.core.tables import format_table
from models.ranges import ClosedUnitInterval, NonNegativeFloat, PositiveInt

EXAMPLE = "shelfmark compare artefacts/monday artefacts/tuesday --min-overlap 0.8 --max-recall-drop 0.01"
TIMED = 50  # queries whose time is taken, one by one
SHARED = 1000  # documents of both whose vectors are compared
NAMED = 5  # documents that are named


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Asks both artefacts the same queries: the golden ones of both, or those named.

    Recall counts queries whose class is known (golden queries, photos of a catalogue): the share with a document of
    their class among the best.

    Args:
        before: the artefact in use.
        after: the artefact that shall replace it.
        photos: photos to search for, and folders of photos.
        catalogue: catalogue whose query photos are searched for.
        split: split of these photos.
        most: queries, spread evenly over all there are.
        top: documents to find for each query.
        min_overlap: refuse below this share of results that both find.
        max_recall_drop: refuse if recall falls by more.
        max_slowdown: refuse if the median time of a query grows by more than this factor; 0 allows any.
        max_removed: refuse if a larger share of the documents is gone.
    """

    before: Path = field(kw_only=False)
    after: Path = field(kw_only=False)
    photos: tuple[Path, ...] = ()
    catalogue: Path | None = None
    split: str = "test"
    most: PositiveInt = 1000
    top: PositiveInt = 10
    min_overlap: ClosedUnitInterval = 0.0
    max_recall_drop: ClosedUnitInterval = 1.0
    max_slowdown: NonNegativeFloat = 0.0
    max_removed: ClosedUnitInterval = 1.0


@dataclass(frozen=True)
class Query:
    """A photo or a text, and the class of its right answers; empty: unknown."""

    asked: Photo | str
    class_key: str = ""


def run(config: CompareConfig) -> dict[str, Any]:
    """Prints a table and returns its figures.

    Raises:
        UserError: an artefact or a query cannot be used, the two take different kinds of queries, or a bound is broken;
            its `figures` are the table's then.
    """
    before, after = (Artefact(path) for path in (config.before, config.after))
    if before.meta["query"] != after.meta["query"]:
        raise UserError(f"{config.before} answers {before.meta['query']}s, {config.after} {after.meta['query']}s")
    queries = _queries(config, before, after)
    asked = [_ask(artefact, queries, config.top) for artefact in (before, after)]
    (first, found_before, times_before), (second, found_after, times_after) = asked
    overlap, same_first = _overlap(found_before, found_after)
    figures: dict[str, Any] = {
        "queries": len(queries),
        f"overlap_at_{config.top}": overlap,
        "same_first": same_first,
        **_recalls(queries, found_before, found_after, (before, after), config.top),
        "milliseconds": [times_before, times_after],
        **_drift(first, second, before, after),
        **_documents(before, after),
    }
    print(format_table(_table(figures)))
    for name in ("removed", "added"):
        if figures[name]:
            named = ", ".join(printable(item, 40) for item in figures[f"{name}_first"])
            print(f"{name}: {named}{', …' * (figures[name] > NAMED)}")
    if broken := _broken(config, figures):
        raise UserError(f"{config.after} cannot replace {config.before}: {'; '.join(broken)}", figures=figures)
    return figures


def _queries(config: CompareConfig, before: Artefact, after: Artefact) -> list[Query]:
    if config.photos and config.catalogue:
        raise UserError("--photos and --catalogue are two sets of queries", "Name one of them")
    if (config.photos or config.catalogue) and before.meta["query"] != "image":
        raise UserError(f"{config.before} answers texts, not photos", "Leave the photos out: golden texts are compared")
    if config.photos:
        paths = files_in(config.photos)
        return [Query(Photo.open(paths[place])) for place in evenly(len(paths), config.most)]
    if config.catalogue:
        catalogue = Catalogue(config.catalogue)
        rows = catalogue.table(["class_key"], kind="query", split=config.split).to_pylist()
        if not rows:
            raise UserError(f"{catalogue.path} has no query photo in split '{config.split}'", "Name another (--split)")
        return [_photo_of(catalogue, rows[place]) for place in evenly(len(rows), config.most)]
    found: dict[str | bytes, Query] = {}
    for artefact in (before, after):
        for query in read_golden(artefact.path, artefact.model.embedding_dim).queries:
            key = query.text or (query.photo.read_bytes() if query.photo else b"")
            found.setdefault(key, Query(Photo.open(query.photo) if query.photo else query.text, query.class_key))
    if not found:
        raise UserError("neither artefact has golden queries", "Name queries with --photos or --catalogue")
    return [*found.values()]


def _photo_of(catalogue: Catalogue, row: dict[str, Any]) -> Query:
    entry = catalogue.index[row["sample_id"]]
    photo = Photo(catalogue.read_bytes(row["sample_id"]), (0, 0, int(entry["width"]), int(entry["height"])))
    return Query(photo, row["class_key"] or "")


def _ask(artefact: Artefact, queries: Sequence[Query], top: int) -> tuple[Tensor, list[list[Hit]], float]:
    """Vectors, hits, and the median milliseconds of a query by itself."""

    def embed(part: Sequence[Query]) -> Tensor:
        if isinstance(part[0].asked, str):
            return artefact.embed_texts([str(query.asked) for query in part])
        return artefact.embed([query.asked for query in part if isinstance(query.asked, Photo)])

    vectors = embed(queries)
    hits = artefact.search(vectors, top)
    times = []
    for query in queries[:TIMED]:
        began = time.perf_counter()
        artefact.search(embed([query]), top)
        times.append(1000 * (time.perf_counter() - began))
    return vectors, hits, float(np.median(times))


def _overlap(before: list[list[Hit]], after: list[list[Hit]]) -> tuple[float, float]:
    """Mean share of results that both find, by the ids of documents; share of queries with the same first."""
    shares, first = [], []
    for a, b in zip(before, after, strict=True):
        shares.append(len({hit.id for hit in a} & {hit.id for hit in b}) / max(len(a), len(b)))
        first.append(a[0].id == b[0].id)
    return float(np.mean(shares)), float(np.mean(first))


def _recalls(
    queries: Sequence[Query],
    before: list[list[Hit]],
    after: list[list[Hit]],
    artefacts: tuple[Artefact, Artefact],
    top: int,
) -> dict[str, Any]:
    known = [i for i, query in enumerate(queries) if query.class_key]
    if not known:
        return {}
    told: dict[str, Any] = {"queries_with_class": len(known)}
    keys = [artefact.documents.column("class_key") for artefact in artefacts]
    for k in sorted({1, top}):
        told[f"recall_at_{k}"] = [
            float(np.mean([_right(found[i][:k], column, queries[i].class_key) for i in known]))
            for found, column in zip((before, after), keys, strict=True)
        ]
    return told


def _right(hits: list[Hit], keys: Any, key: str) -> bool:
    return any(keys[hit.row].as_py() == key for hit in hits)


def _drift(first: Tensor, second: Tensor, before: Artefact, after: Artefact) -> dict[str, Any]:
    """Cosines of the same query's and the same document's vectors; of encoders of another width there are none."""
    if first.shape != second.shape:
        return {}
    told: dict[str, Any] = {"query_cosine": _cosines(first, second)}
    place = pc.index_in(_items(before), value_set=_items(after)).fill_null(-1).to_numpy()
    shared = np.flatnonzero(place >= 0)
    shared = shared[evenly(len(shared), SHARED)]
    if len(shared):
        ours = torch.cat([before.vector(int(row)) for row in shared])
        theirs = torch.cat([after.vector(int(place[row])) for row in shared])
        told["document_cosine"] = _cosines(ours, theirs)
    return told


def _items(artefact: Artefact) -> Any:
    """Ids of its documents; large strings, of which one array holds any number."""
    return artefact.documents.column("item").cast(pa.large_string()).combine_chunks()


def _cosines(a: Tensor, b: Tensor) -> dict[str, float]:
    cosines = torch.nn.functional.cosine_similarity(a.double(), b.double())
    return {"mean": float(cosines.mean()), "lowest": lowest_cosine(a.numpy(), b.numpy())}


def _documents(before: Artefact, after: Artefact) -> dict[str, Any]:
    """Documents by their ids: how many there are, are new and are gone, and the first of these."""
    old, new = (_items(artefact) for artefact in (before, after))
    if before.kept is not None:
        old = old.filter(pa.array(before.kept))
    if after.kept is not None:
        new = new.filter(pa.array(after.kept))
    told: dict[str, Any] = {"documents": [len(old), len(new)]}
    for name, these, others in (("added", new, old), ("removed", old, new)):
        gone = these.filter(pc.invert(pc.is_in(these, value_set=others)))
        told |= {name: len(gone), f"{name}_first": gone.slice(0, NAMED).to_pylist()}
    return told


def _table(figures: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, value in figures.items():
        if isinstance(value, dict):
            rows += [{"figure": f"{name} {part}", "both": number} for part, number in value.items()]
        elif isinstance(value, list) and not name.endswith("_first"):
            rows.append({"figure": name, "before": value[0], "after": value[1]})
        elif not isinstance(value, list):
            rows.append({"figure": name, "both": value})
    return [{"figure": None, "before": None, "after": None, "both": None} | row for row in rows]


def _broken(config: CompareConfig, figures: dict[str, Any]) -> list[str]:
    """Bounds that the figures break, in words."""
    found = []
    if (overlap := figures[f"overlap_at_{config.top}"]) < config.min_overlap:
        found.append(f"overlap {overlap:.3f} is below {config.min_overlap}")
    for name in (f"recall_at_{k}" for k in sorted({1, config.top})):
        old, new = figures.get(name, (0.0, 0.0))
        if old - new > config.max_recall_drop:
            found.append(f"{name} falls from {old:.3f} to {new:.3f}, by more than {config.max_recall_drop}")
    if config.max_recall_drop < 1 and "queries_with_class" not in figures:
        found.append("the class of no query is known, so recall is not")
    old, new = figures["milliseconds"]
    if config.max_slowdown and new > config.max_slowdown * old:
        found.append(f"a query takes {new:.1f} ms, more than {config.max_slowdown} x {old:.1f} ms")
    if (removed := figures["removed"] / figures["documents"][0]) > config.max_removed:
        found.append(f"{removed:.1%} of the documents are gone, more than {config.max_removed:.1%}")
    return found
