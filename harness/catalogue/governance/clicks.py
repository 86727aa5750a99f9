"""Rows of a click log: their columns, whatever their types, and the checks that each row passes or fails."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ibis import _
from tqdm import tqdm

from harness.catalogue.catalogue import ALL_SPLITS
from harness.catalogue.samples import stored
from harness.catalogue.table import Manifest
from harness.catalogue.writers import ParquetWriter
from harness.core.errors import UserError

LARGEST = 10**9  # clicks or impressions of a row: sums of a billion such rows fit int64
NEEDED = ("document", "clicks", "impressions")
OPTIONAL = ("time", "position")
_REJECTED = ("query", "document", "clicks", "impressions", "time")


@dataclass(frozen=True)
class Table:
    """A table that a user hands in, as Parquet files: its own, or a copy of its text cells.

    files: the files; columns: those that were asked for and exist.
    """

    files: list[Path]
    columns: list[str]


def open_table(path: Path, flag: str, needed: tuple[str, ...], optional: tuple[str, ...], copy: Path) -> Table:
    """Opens a Parquet, TSV, CSV or JSONL table. Text becomes the Parquet file `copy`, with a column `problem`.

    Raises:
        UserError: it cannot be read, or lacks a needed column, which is named with `flag`.
    """
    if not path.exists():
        raise UserError(f"{flag} {path}: no such file or folder")
    manifest = Manifest(path)
    for note in manifest.said:
        print(f"{path}: {note}")
    for column in needed:
        manifest.require(column, flag)
    columns = [*needed, *(name for name in optional if manifest.columns.count(name) == 1)]
    if all(file.suffix.lower() == ".parquet" for file in manifest.files):
        return Table(manifest.files, columns)
    schema = pa.schema([(name, pa.int64() if name == "time" else pa.string()) for name in (*columns, "problem")])
    with (
        ParquetWriter(lambda _: copy, schema, rows_per_part=None) as writer,
        tqdm(total=manifest.num_rows, desc=path.name, unit=" rows", delay=5, leave=False) as progress,
    ):
        for row in manifest.rows(columns):
            writer.append(_text_row(columns, row.cells, row.problem))
            progress.update()
    return Table([copy], [*columns, "problem"])


def _text_row(columns: list[str], texts: list[str], problem: str) -> list[Any]:
    cells: list[Any] = []
    for name, text in zip(columns, texts, strict=True):
        value = stored(text.strip())
        if name == "time" and value:
            seconds = seconds_of(value)
            problem = problem or ("" if seconds is not None else "time is not a date")
            cells.append(seconds)
        else:
            cells.append(value or None)
    return [*cells, problem]


def seconds_of(text: str) -> int | None:
    """Seconds since 1970 of whole seconds or an ISO 8601 date, in UTC where it names no zone; None for other texts."""
    if re.fullmatch(r"[+-]?\d{1,15}", text):
        return int(text)
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return int((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() // 1)


def open_log(path: Path, copy: Path) -> Table:
    """Opens a click log.

    Raises:
        UserError: it cannot be read, lacks a column, or a column is of an unusable type.
    """
    query = "query"
    if path.exists() and "query" not in (found := Manifest(path).columns) and "query_sample_id" in found:
        query = "query_sample_id"
    log = open_table(path, "--clicks", (query, *NEEDED), OPTIONAL, copy)
    if log.files != [copy]:
        schema = pq.read_schema(log.files[0])
        for name in log.columns:
            _check_type(log.files[0], schema.field(name))
    return log


def _check_type(file: Path, field: pa.Field) -> None:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    number = pa.types.is_integer(kind)
    if field.name == "time":
        right, wanted = number or pa.types.is_timestamp(kind) or pa.types.is_date(kind), "a timestamp or an integer"
    elif field.name.startswith(("query", "document")):
        right, wanted = text or number, "text or an integer"
    else:
        right, wanted = text or number or pa.types.is_floating(kind) or pa.types.is_boolean(kind), "a number"
    if not right and not pa.types.is_null(kind):
        raise UserError(f"{file}: column {field.name!r} is {field.type}, not {wanted}", "Write it again")


def rows_backwards(log: Table) -> int:
    """Rows whose time is before that of the row above: no rule minds them, but a log that has many may be two."""
    if "time" not in log.columns:
        return 0
    found, last = 0, np.empty(0, np.int64)
    for batch in _times(log.files):
        times = np.concatenate([last, batch])
        found += int((np.diff(times) < 0).sum())
        last = times[-1:]
    return found


def _times(files: list[Path]) -> Iterator[np.ndarray]:
    for path in files:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1 << 20, columns=["time"]):
                times = batch.column(0).drop_null()
                if pa.types.is_date(times.type):
                    times = times.cast(pa.timestamp("s"))
                yield times.cast(pa.int64()).to_numpy(zero_copy_only=False)


def nodes(samples: ibis.Table, log: Table, split: str) -> ibis.Table:
    """sample_id, kind, node of the split's samples: the lowest sample id of the samples that the log names alike."""
    own = samples.filter(_in_split(split))
    shared = _.sample_id.min().over(ibis.window(group_by=["kind", "item"]))
    if "query_sample_id" in log.columns:
        shared = ibis.ifelse(_.kind == "query", _.sample_id, shared)
    return own.select("sample_id", "kind", node=shared)


def checked(rows: ibis.Table, samples: ibis.Table, log: Table, split: str, until: int | None) -> ibis.Table:
    """The log's rows with query, document (nodes), clicks, impressions, time (seconds), position, and the reason of a
    row that cannot be used, '' otherwise; such a row keeps its texts in raw_query … raw_time.
    """
    query = log.columns[0]
    kinds = rows.schema()
    time: Any = ibis.null("int64")
    if "time" in log.columns:
        time = rows.time.cast("int64") if kinds["time"].is_integer() else _seconds(rows.time, kinds["time"])
    texts = {"raw_query": rows[query].cast("string").strip(), "raw_document": rows.document.cast("string").strip()}
    counts = {f"raw_{name}": rows[name].cast("string") for name in ("clicks", "impressions")}
    numbers = {name: _whole(rows[name], kinds[name]) for name in ("clicks", "impressions")}
    position = rows.position.cast("string") if "position" in log.columns else ibis.null("string")
    problem = rows.problem if "problem" in log.columns else ibis.literal("")
    table = rows.select(**texts, **counts, **numbers, time=time, position=position, problem=problem)
    table = table.left_join(_known(samples, "query", query, split), [("raw_query", "query_name")])
    table = table.left_join(_known(samples, "document", "document", split), [("raw_document", "document_name")])
    late = (_.time >= until) if until is not None else ibis.literal(False)
    missing = _.time.isnull() if until is not None else ibis.literal(False)
    reason = ibis.cases(
        (_.problem != "", "damaged row"),
        *((_[f"raw_{name}"].isnull() | (_[f"raw_{name}"] == ""), f"no {name}") for name in _REJECTED[:4]),
        *((_[name].isnull(), f"{name} is not a whole number") for name in numbers),
        *((_[name] < 0, f"negative {name}") for name in numbers),
        *((_[name] > LARGEST, f"more than {LARGEST:,} {name}") for name in numbers),
        (_.clicks > _.impressions, "more clicks than impressions"),
        (_.time < 0, "time before 1970"),
        (missing, "no time"),
        *((_[f"{name}_name"].isnull(), f"unknown {name}") for name in ("query", "document")),
        *((_[name].isnull(), f"{name} of another split") for name in ("query", "document")),
        (late, "after --until"),
        else_="",
    )
    bad = _.reason != ""
    raw = {f"raw_{name}": ibis.ifelse(bad, _[f"raw_{name}"], ibis.null("string")) for name in _REJECTED[:4]}
    kept = ("query", "document", "clicks", "impressions", "time", "position", "reason")
    return table.mutate(reason=reason).select(*kept, **raw)


def _known(samples: ibis.Table, kind: str, column: str, split: str) -> ibis.Table:
    """{kind}_name, as the log has it, and its node {kind}, null where it is of another split only."""
    own = samples.filter(samples.kind == kind)
    if column == "query_sample_id":
        node = ibis.ifelse(_in_split(split), _.sample_id, ibis.null("int64"))
        return own.select(query_name=_.sample_id.cast("string"), query=node)
    return own.group_by(**{f"{kind}_name": own.item}).agg(**{kind: _.sample_id.min(where=_in_split(split))})


def _in_split(split: str) -> Any:
    return _.split.isin([split, ALL_SPLITS])


def _seconds(column: Any, kind: Any) -> Any:
    stamp = column if kind.is_timestamp() else column.cast("timestamp")
    return stamp.truncate("s").epoch_seconds().cast("int64")


def _whole(column: Any, kind: Any) -> Any:
    """The column as int64, null where it is not a whole number."""
    if kind.is_integer() or kind.is_boolean():
        return column.try_cast("int64")
    if kind.is_floating():
        safe = ibis.ifelse(column.between(-1e15, 1e15), column, ibis.null("float64"))  # NaN is above all numbers
        return ibis.ifelse(safe.cast("int64").cast("float64") == safe, safe.cast("int64"), ibis.null("int64"))
    text = column.cast("string").strip()
    return ibis.ifelse(text.re_search("^[+-]?[0-9]{1,15}$"), text, ibis.null("string")).cast("int64")


def rejected(rows: ibis.Table) -> ibis.Table:
    """query, document, clicks, impressions, time, reason and rows: equal rows of `checked` with a reason, counted."""
    bad = rows.filter(_.reason != "")
    texts = {name: bad[f"raw_{name}"] for name in _REJECTED[:4]}
    return bad.group_by(**texts, time=bad.time, reason=bad.reason).agg(rows=_.count())


def by_result(rows: ibis.Table) -> dict[str, int]:
    """Rows of `checked` by their reason, '' for those that can be used."""
    found = rows.group_by("reason").agg(n=_.count()).to_pyarrow().to_pylist()
    return {entry["reason"]: entry["n"] for entry in sorted(found, key=lambda entry: (-entry["n"], entry["reason"]))}
