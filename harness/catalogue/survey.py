"""Facts of a catalogue for a report: relational queries over its samples and index, in DuckDB on a temporary disk file,
so that memory does not grow with the catalogue.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from harness.catalogue.catalogue import Catalogue, quarantine_names
from harness.catalogue.duplicates import fingerprint, groups, near_pairs
from harness.core.errors import UserError
from harness.core.files import read_record

AT_ONCE = 1024  # pictures decoded between two looks at the progress
TRAIN = "train"
_TEXT = ("class_key", "kind", "split", "title", "description", "image")
_INDEX = [("checksum", pa.uint64()), ("bytes", pa.int64()), ("width", pa.int32()), ("height", pa.int32())]
_SCHEMA = pa.schema([("sample_id", pa.int64()), *((name, pa.string()) for name in _TEXT), *_INDEX])
_SAMPLES = """
create table samples as select sample_id, class_key, kind, split, checksum, bytes, width, height,
    length(trim(title)) as title, length(trim(description)) as description, hash(trim(title)) as wording,
    lower(regexp_extract(image, '[.]([A-Za-z0-9]{1,5})$', 1)) as suffix,
    kind = 'query' and split in ($train, 'all') as trained, kind = 'query' and split not in ($train, 'all') as asked
from rows
"""
_PRODUCTS = """
create table products as select class_key, min(sample_id) as first, count_if(kind = 'query') as photos,
    count_if(kind = 'document') as documents, count_if(trained) as trained
from samples where class_key is not null group by class_key
"""
_EXACT = """
create table exact as select sample_id, dense_rank() over (order by checksum, bytes) as number
from (select *, count(*) over (partition by checksum, bytes) as copies from samples) where copies > 1
"""
# Of each group of copies. Photos of one product in two splits are no mistake; one photo in two splits is.
_FLAGS = """
create table {name}_groups as select number, count(*) as members,
    count(distinct split) filter (kind = 'query') > 1 as across_splits,
    count(distinct class_key) > 1 as across_products,
    count(distinct kind) > 1 as photo_is_document,
    case when bool_or(trained) then count_if(asked) else 0 end as leaked
from {name} join samples using (sample_id) group by number having {having}
"""
_HISTOGRAMS = {  # lower ends of the bars
    "photos": (0, 1, 2, 3, 4, 5, 10, 20, 50, 100),
    "pixels": (0, 32, 64, 128, 256, 512, 1024, 2048, 4096),
    "title": (0, 1, 10, 20, 40, 80, 160, 320),
    "description": (0, 1, 50, 100, 200, 400, 800, 1600),
}


class Survey:
    """Facts of a catalogue.

    Args:
        catalogue: the catalogue.
        folder: an empty folder for temporary files, of about 100 bytes a sample.
        pictures: so many pictures are decoded to find near duplicates; half of them photos that are not trained on.

    Attributes:
        split: the split that is trained on.
        governance: content of classes/governance.json, None before `shelfmark govern`.
        compared: pictures that were decoded; unreadable: those whose bytes could not be.
    """

    def __init__(self, catalogue: Catalogue, folder: Path, pictures: int) -> None:
        self.catalogue = catalogue
        governed = catalogue.path / "classes/governance.json"
        self.governance = dict(read_record(governed).values) if governed.is_file() else None
        options = (self.governance or {}).get("options", {})
        self.split = str(options.get("split", TRAIN))
        self.base = duckdb.connect(str(folder / "survey.duckdb"), config={"temp_directory": str(folder)})
        self.base.execute("set enable_progress_bar = false")
        rows = pa.RecordBatchReader.from_batches(_SCHEMA, self._rows())
        self.base.register("rows", rows)
        self.base.execute(_SAMPLES, {"train": self.split})
        self.base.unregister("rows")
        self.base.execute(_PRODUCTS)
        self.base.execute(_EXACT)
        self.base.execute(_FLAGS.format(name="exact", having="true"))
        self.compared, self.unreadable = self._compare(pictures)
        self.base.execute(_FLAGS.format(name="near", having="count(distinct checksum) > 1"))

    def close(self) -> None:
        """Closes the temporary database."""
        self.base.close()

    def ask(self, query: str, *values: Any) -> list[dict[str, Any]]:
        """Rows of an SQL query over samples, products, exact, exact_groups, near and near_groups."""
        answer = self.base.execute(query, values)
        names = [column[0] for column in answer.description or ()]
        return [dict(zip(names, row, strict=True)) for row in answer.fetchall()]

    def one(self, query: str, *values: Any) -> dict[str, Any]:
        """The only row of a query."""
        (row,) = self.ask(query, *values)
        return row

    def facts(self) -> dict[str, Any]:
        """Numbers of the whole catalogue, as plain values."""
        counts = self.catalogue.meta["counts"]
        return {
            "samples": self.catalogue.num_samples,
            "photos": counts["query"],
            "documents": counts["document"],
            "quarantined": counts["quarantined"],
            "trained_split": self.split,
            "splits": self.ask(
                "select split, count_if(kind = 'query') as photos, count_if(kind = 'document') as documents "
                "from samples group by split order by split"
            ),
            "products": self.one(
                "select count(*) as products, count_if(photos > 0 and documents > 0) as with_both, "
                "count_if(photos = 0) as without_photo, count_if(documents = 0) as without_document, "
                "count_if(photos > 0 and trained = 0) as held_out, count_if(trained = 1) as with_one_trained, "
                "coalesce(median(photos), 0)::int as median_photos, coalesce(max(photos), 0) as most_photos "
                "from products"
            ),
            "samples_without_product": self.one("select count(*) as n from samples where class_key is null")["n"],
            "photos_per_product": self._bars("photos", "photos", "products"),
            "image_sizes": {
                **self.one(
                    "select coalesce(min(least(width, height)), 0) as smallest_side, "
                    "coalesce(median(greatest(width, height)), 0)::int as median_long_side, "
                    "coalesce(max(greatest(width, height)), 0) as largest_side, coalesce(sum(bytes), 0)::bigint as "
                    "bytes, coalesce(median(bytes), 0)::bigint as median_bytes from samples"
                ),
                "long_side": self._bars("pixels", "greatest(width, height)", "samples"),
            },
            "formats": {
                row["suffix"] or "no suffix": row["n"]
                for row in self.ask("select suffix, count(*) as n from samples group by suffix order by n desc, suffix")
            },
            "texts": {name: self._texts(name) for name in ("title", "description")},
            "shared_titles": self.one(
                "select coalesce(sum(n), 0)::bigint as n from (select count(*) as n from samples where kind = "
                "'document' and title > 0 group by wording having count(distinct class_key) > 1)"
            )["n"],
            "exact_duplicates": self._duplicates("exact"),
            "near_duplicates": {
                **self._duplicates("near"),
                "compared": self.compared,
                "of": self.catalogue.num_samples,
                "unreadable": self.unreadable,
            },
            "classes": self._classes(),
            "largest_products": self.ask(
                "select class_key, photos, documents from products order by photos desc, documents desc, first limit 10"
            ),
            "quarantine": self.quarantine(),
        }

    def quarantine(self) -> dict[str, int]:
        """Rows that ingest refused, by the category of their reason, the commonest first."""
        found: dict[str, int] = {}
        for rows in self.quarantined():
            for row in rows:
                category = row["reason"].partition(": ")[0]
                found[category] = found.get(category, 0) + 1
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def quarantined(self) -> Iterator[list[dict[str, Any]]]:
        """Rows (row, image, reason) of the quarantines in batches, each with the `source` it was read from."""
        meta = self.catalogue.meta
        sources = [meta.get("source", {}), *meta.get("appended", ())]
        for name, source in zip(quarantine_names(meta), sources, strict=True):
            file = self.catalogue.path / name
            if not file.exists():
                continue
            with pq.ParquetFile(file) as opened:
                for batch in opened.iter_batches(batch_size=8192):
                    yield [{**row, "source": source} for row in batch.to_pylist()]

    def members(self, name: str, number: int, most: int) -> list[dict[str, Any]]:
        """Samples of a group of duplicates, those that differ in split, kind or product first."""
        return self.ask(
            f"select sample_id, kind, split, class_key from {name} join samples using (sample_id) where number = ? "
            "order by row_number() over (partition by split, kind, class_key order by sample_id), sample_id limit ?",
            number,
            most,
        )

    def worst_groups(self, name: str, most: int) -> list[dict[str, Any]]:
        """Groups of duplicates, those that harm an evaluation first."""
        return self.ask(
            f"select * from {name}_groups order by leaked > 0 desc, across_splits desc, across_products desc, "
            "photo_is_document desc, members desc, number limit ?",
            most,
        )

    def _rows(self) -> Iterator[pa.RecordBatch]:
        """The samples with what the index knows of their pictures."""
        with tqdm(total=self.catalogue.num_samples, desc="reading samples", unit="", delay=5, leave=False) as shown:
            for batch in self.catalogue.batches(list(_TEXT)):
                records = self.catalogue.index[batch.column("sample_id").to_numpy()]
                columns = [batch.column(name) for name in ("sample_id", *_TEXT)]
                columns += [pa.array(records[name]) for name in ("xxh3", "length", "width", "height")]
                arrays = [column.cast(kind) for column, kind in zip(columns, _SCHEMA.types, strict=True)]
                yield pa.RecordBatch.from_arrays(arrays, schema=_SCHEMA)
                shown.update(len(batch))

    def _bars(self, edges: str, value: str, table: str) -> dict[str, int]:
        """Counts of a value in the ranges of _HISTOGRAMS, without empty ranges at the ends."""
        lower = _HISTOGRAMS[edges]
        bar = " + ".join(f"({value} >= {low})::int" for low in lower)
        rows = self.ask(f"select {bar} - 1 as bar, count(*) as n from {table} group by bar")
        counts = {row["bar"]: row["n"] for row in rows}
        names = [f"{low:,}" if high == low + 1 else f"{low:,}-{high - 1:,}" for low, high in pairwise(lower)]
        names.append(f"{lower[-1]:,}+")
        shown = range(min(counts, default=0), max(counts, default=-1) + 1)
        return {names[bar]: counts.get(bar, 0) for bar in shown}

    def _texts(self, name: str) -> dict[str, Any]:
        """Lengths of the documents' texts, in characters."""
        where = "(select * from samples where kind = 'document')"
        return {
            **self.one(
                f"select count_if({name} = 0) as empty, coalesce(median({name}), 0)::int as median, "
                f"coalesce(max({name}), 0) as longest from {where}"
            ),
            "lengths": self._bars(name, name, where),
        }

    def _duplicates(self, name: str) -> dict[str, int]:
        flags = ("across_splits", "across_products", "photo_is_document")
        counted = ", ".join(f"coalesce(count_if({flag}), 0) as {flag}" for flag in flags)
        return self.one(
            f"select count(*) as groups, coalesce(sum(members), 0)::bigint as samples, {counted}, "
            f"coalesce(sum(leaked), 0)::bigint as leaked_photos from {name}_groups"
        )

    def _classes(self) -> dict[str, Any] | None:
        """Classes that govern made, and those that it left out."""
        if self.governance is None:
            return None
        names = ("num_classes", "tail_classes", "quarantined_classes", "quarantined_samples")
        return {name: self.governance.get(name) for name in names}

    def _compare(self, pictures: int) -> tuple[int, int]:
        """Fills the table near; returns how many pictures were decoded, and how many could not be."""
        chosen = self.base.execute(
            "select sample_id from samples order by row_number() over (partition by asked order by hash(sample_id)), "
            "asked limit ?",
            [pictures],
        ).fetchnumpy()["sample_id"]
        ids = np.sort(np.asarray(chosen, np.int64))
        hashes, colours = np.zeros(len(ids), np.uint64), np.zeros((len(ids), 192), np.uint8)
        good = np.zeros(len(ids), bool)

        def look(place: int) -> None:
            try:
                hashes[place], colours[place] = fingerprint(self.catalogue.read_bytes(int(ids[place])))
                good[place] = True
            except UserError:  # a shard that cannot be read
                raise
            except Exception:  # damaged bytes, on which a decoder may raise anything
                pass

        with (
            tqdm(total=len(ids), desc="comparing pictures", unit=" pictures", delay=5, leave=False) as shown,
            ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
        ):
            for start in range(0, len(ids), AT_ONCE):
                for _ in pool.map(look, range(start, min(start + AT_ONCE, len(ids)))):
                    shown.update()
        ids, hashes, colours = ids[good], hashes[good], colours[good]
        number = groups(near_pairs(hashes, colours), len(ids))
        several = np.bincount(number, minlength=1)[number] > 1 if len(ids) else np.empty(0, bool)
        found = pa.table({"sample_id": ids[several], "number": number[several]})
        self.base.register("found", found)
        self.base.execute("create table near as select * from found")
        self.base.unregister("found")
        return len(ids), int((~good).sum())
