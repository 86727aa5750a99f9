"""`shelfmark pairs`: Name several right answers of a query photo.

The rules are relational queries, as those of `shelfmark govern`: memory does not grow with the table.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import ibis
import pyarrow as pa
import pyarrow.parquet as pq
from ibis import _
from tqdm import tqdm

from harness.catalogue.catalogue import Catalogue
from harness.catalogue.pairs import ARRAYS, PAIRS_FORMAT
from harness.catalogue.samples import commonest, stored
from harness.catalogue.table import Manifest
from harness.catalogue.text_table import Row
from harness.catalogue.wholeness import require_whole
from harness.catalogue.writers import NpyWriter, ParquetWriter
from harness.core.errors import UserError
from harness.core.files import write_json
from harness.core.manifest import write_manifest
from harness.core.staged_folder import staged_folder

EXAMPLE = "shelfmark pairs catalogues/rooms --table pairs.tsv"
GRADE = "grade"
MOST_GRADE = 1e6
_TEXTS = [(name, pa.string()) for name in ("query_id", "document_id", "reason")]
_ROWS = pa.schema([("row", pa.int64()), *_TEXTS[:2], ("grade", pa.float32()), _TEXTS[2]])


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Reads a table of right answers, a row for each pair of query and document, and writes pairs/.

    Evaluation takes the right answers of a query from the table where the table names the query, and from the classes
    elsewhere. `shelfmark govern` counts a photo as one of each class that it answers. Rows that cannot be used
    are listed with their reason in pairs/quarantine.parquet. After an append or a merge, run it again.

    Args:
        catalogue: the catalogue folder; an existing pairs/ in it is replaced.
        table: TSV, CSV, Parquet or JSONL file with a header, or a folder of such files.
        query_column: column of the query's id, as in the id column of the manifest: all query photos of that id.
        document_column: column of the document's id: all documents of that id.
        grade_column: column of the grade (default: grade, 1 where that is absent): a number, the gain of nDCG; 0 is a
            document that was judged and is wrong.
    """

    catalogue: Path = field(kw_only=False)
    table: Path
    query_column: str = "query_id"
    document_column: str = "document_id"
    grade_column: str | None = None


def run(config: PairsConfig) -> dict[str, Any]:
    """Writes pairs/ and prints a summary.

    Returns:
        pairs (of samples), queries, documents (samples in them), graded (whether there is a grade column), quarantined
        (rows), reasons (category: rows).

    Raises:
        UserError: the table or a column of it is not there, or no row can be used.
    """
    catalogue = Catalogue(config.catalogue)
    require_whole(catalogue)
    table = Manifest(config.table)
    for note in table.said:
        print(f"{config.table}: {note}")
    columns = {"query": config.query_column, "document": config.document_column}
    if config.grade_column is not None or GRADE in table.columns:
        columns["grade"] = config.grade_column or GRADE
    for name, column in columns.items():
        table.require(column, f"--{name}-column")
    try:
        with staged_folder(catalogue.path / "pairs", replace=True) as stage:
            figures = _write(stage, catalogue, table, list(columns.values()))
            write_json(stage / "pairs.json", {"format": PAIRS_FORMAT, **figures, "table": str(config.table)})
            write_manifest(stage)
    except duckdb.Error as error:  # a file that it cannot read or write, or too little memory
        reason = str(error).partition("\n")[0]
        what = f"the pairs of {catalogue.path} cannot be written: {reason}"
        raise UserError(what, "Its previous ones are kept") from error
    print(
        f"{config.catalogue}/pairs: {figures['pairs']:,} pairs of {figures['queries']:,} queries and "
        f"{figures['documents']:,} documents"
    )
    if figures["reasons"]:
        print(f"{figures['quarantined']:,} rows in pairs/quarantine.parquet: {commonest(Counter(figures['reasons']))}")
    return figures


def _write(stage: Path, catalogue: Catalogue, table: Manifest, columns: list[str]) -> dict[str, Any]:
    """Writes the arrays and the quarantine into `stage`; returns the figures."""
    spill = stage / "spill"
    spill.mkdir()
    with ParquetWriter(lambda _: spill / "rows.parquet", _ROWS, rows_per_part=None) as writer:
        for row in _rows(table, columns):
            writer.append(row)
    engine = ibis.duckdb.connect(temp_directory=str(spill))
    try:
        samples = engine.read_parquet([str(file) for file in catalogue.sample_files]).select(
            "sample_id", "kind", "item"
        )
        rows = engine.read_parquet(spill / "rows.parquet")
        engine.to_parquet(judged(rows, samples), spill / "judged.parquet")
        rows = engine.read_parquet(spill / "judged.parquet")
        engine.to_parquet(rows.filter(_.reason != "").drop("grade").order_by("row"), stage / "quarantine.parquet")
        engine.to_parquet(pairs(rows, samples), spill / "pairs.parquet")
        found = engine.read_parquet(spill / "pairs.parquet")
        (figures,) = (
            found.agg(pairs=_.count(), queries=_["query"].nunique(), documents=_.document.nunique())
            .to_pyarrow()
            .to_pylist()
        )
    finally:
        engine.disconnect()
    reasons = Counter[str]()
    for batch in pq.ParquetFile(stage / "quarantine.parquet").iter_batches(columns=["reason"]):
        reasons.update(reason.partition(": ")[0] for reason in batch.column(0).to_pylist())
    if not figures["pairs"]:
        raise UserError(
            f"{table.path}: none of its {sum(reasons.values()):,} rows can be used ({commonest(reasons) or 'no rows'})",
            "Its ids are those of the manifest's id column: that of a query photo, and that of a document",
        )
    with pq.ParquetFile(spill / "pairs.parquet") as file:
        for name, dtype in ARRAYS.items():
            with NpyWriter(stage / f"{name}.npy", dtype) as array:
                for batch in file.iter_batches(columns=[name]):
                    array.append(batch.column(0).to_numpy())
    shutil.rmtree(spill)
    return {
        **figures,
        "graded": len(columns) > 2,
        "quarantined": sum(reasons.values()),
        "reasons": dict(reasons.most_common()),
    }


def judged(rows: ibis.Table, samples: ibis.Table) -> ibis.Table:
    """`rows` (of _ROWS) with a reason for those that name no query or document of the catalogue, or a pair twice."""

    def known(kind: str) -> ibis.Table:
        return samples.filter(samples.kind == kind).select(**{f"{kind}_item": samples.item}).distinct()

    found = rows.left_join(known("query"), [("query_id", "query_item")])
    found = found.left_join(known("document"), [("document_id", "document_item")])
    window = ibis.window(group_by=["query_id", "document_id", _.reason == ""], order_by="row")
    found = found.mutate(nth=ibis.row_number().over(window))
    reason = ibis.cases(
        (_.reason != "", _.reason),
        (_.query_item.isnull(), "no query of that id"),
        (_.document_item.isnull(), "no document of that id"),
        (_.nth > 0, "named before"),
        else_="",
    )
    return found.mutate(reason=reason).select(*_ROWS.names)


def pairs(rows: ibis.Table, samples: ibis.Table) -> ibis.Table:
    """query, document (sample ids) and grade of the rows without a reason, in order: every sample of the ids."""

    def of(kind: str) -> ibis.Table:
        return samples.filter(samples.kind == kind).select(**{kind: samples.sample_id, f"{kind}_id": samples.item})

    found = rows.filter(_.reason == "").inner_join(of("query"), "query_id").inner_join(of("document"), "document_id")
    return found.select("query", "document", "grade").order_by("query", "document")


def _rows(table: Manifest, columns: list[str]) -> Iterator[tuple[int, str, str, float, str]]:
    """The table's rows as _ROWS has them."""
    with tqdm(total=table.num_rows, desc="pairs", unit=" rows", delay=5, leave=False) as progress:
        for number, row in enumerate(table.rows(columns)):
            yield _row(number, row)
            progress.update()


def _row(number: int, row: Row) -> tuple[int, str, str, float, str]:
    query, document, *grades = (cell.strip() for cell in row.cells)
    grade, reason = 1.0, row.problem
    for text in grades:
        try:
            grade = float(text)
        except ValueError:
            grade = math.nan
        if not 0 <= grade <= MOST_GRADE:  # nor NaN
            reason = reason or f"grade is not a number from 0 to {MOST_GRADE:g}: {text!r}"
    for text in (query, document):
        if stored(text) != text:
            reason = reason or "not UTF-8, or too long"
    return number, stored(query), stored(document), 0.0 if reason else grade, stored(reason)
