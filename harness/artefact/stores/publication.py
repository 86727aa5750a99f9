"""Publication of an artefact's documents to a vector database, and its proof.

Rows go in by sample id in the order of the artefact, a batch at a time, each marked with the artefact. So a
second call writes nothing, one after a kill goes on behind the last whole batch, and a newer artefact replaces an older
one's rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import xxhash
from torch import Tensor

from harness.artefact.rows import Rows, exact_top, vectors_of
from harness.artefact.stores.store import Store
from harness.core.errors import UserError
from harness.core.evenly import evenly
from harness.core.progress import progress

SAMPLE = 256  # rows that are compared byte by byte
EFFORTS = (64, 128, 256, 512)
TOP = 10
SHARE = 0.1  # of the rows, nearly so many of which pass the filter of the proof
_TIE = 1e-6  # scores so near are one
_LEFT_OUT = ("description",)  # long, and no filter
_UNIQUE = ("item", "title")  # of each document, and no filter


@dataclass(frozen=True)
class Publication:
    """Content of a collection.

    Args:
        rows: the documents.
        mark: of the artefact.
        longest: bytes of a text that the database takes; 0: any.
    """

    rows: Rows
    mark: str
    longest: int

    @property
    def texts(self) -> tuple[str, ...]:
        """Columns of text that are published."""
        return tuple(name for name in self.rows.texts if name not in _LEFT_OUT)

    @property
    def columns(self) -> list[str]:
        """Columns of the artefact that `prepared` reads."""
        return ["sample_id", *self.texts, *self.rows.shares, "embedding"]

    def prepared(self, table: pa.Table) -> pa.Table:
        """Rows as the database gets them."""
        texts = {name: self.cleaned(table.column(name)) for name in self.texts}
        shares = {name: table.column(name) for name in self.rows.shares}
        mark = pa.array([self.mark] * len(table))
        ids, vectors = table.column("sample_id"), table.column("embedding")
        return pa.table({"sample_id": ids, "artefact": mark, **texts, **shares, "embedding": vectors})

    def cleaned(self, column: pa.ChunkedArray) -> Any:
        """Texts without NUL, which PostgreSQL does not take, cut to the database's longest."""
        column = pc.replace_substring(column, "\0", "")
        if self.longest and (pc.max(pc.binary_length(column)).as_py() or 0) > self.longest:
            return pa.array([self._cut(text) for text in column.to_pylist()], pa.string())
        return column

    def _cut(self, text: str | None) -> str | None:
        return None if text is None else text.encode()[: self.longest].decode(errors="ignore")


def write(store: Store, publication: Publication) -> int:
    """Writes the rows that are not there yet; returns how many. `store` has been created."""
    rows = publication.rows
    there = store.count(publication.mark)
    done = there if there == rows.count else there - there % rows.at_once
    total = -(-rows.count // rows.at_once)
    if done:
        print(f"{store.name}: {done:,} of {rows.count:,} rows are there already", flush=True)
    bar = progress(store.name, total, -(-done // rows.at_once), f" x {rows.at_once:,} rows")
    for table in rows.batches(publication.columns, first=done):
        store.upsert(publication.prepared(table))
        bar.update()
    bar.close()
    store.keep_only(publication.mark)
    store.finish()
    return rows.count - done


def prove(store: Store, publication: Publication, queries: Tensor, least_recall: float) -> dict[str, Any]:
    """Compares the collection with the artefact.

    Args:
        store: after `write`.
        publication: what was written.
        queries: unit vectors of held-out queries, float32 [n, d].
        least_recall: share of exact search's best ten that must be found, with and without a filter.

    Returns:
        rows, sample (rows compared), xxh3 (of the sample), recall, effort (candidates that reach the recall), filter
        ([column, text, share of the rows]), filtered_recall, filtered_effort.

    Raises:
        UserError: rows are missing or differ, or no effort reaches the recall.
    """
    if (found := store.count()) != publication.rows.count:
        raise UserError(
            f"{store.name} has {found:,} rows, the artefact {publication.rows.count:,}",
            "Write all again with --replace",
        )
    told: dict[str, Any] = {"rows": found, **_sample(store, publication)}
    queries = torch.cat([queries, told.pop("vectors")])
    where, share = _filter(publication)
    told["recall"], told["effort"] = _recall(store, publication, queries, None, least_recall)
    told["filter"] = [*where, share]
    told["filtered_recall"], told["filtered_effort"] = _recall(store, publication, queries, where, least_recall)
    return told


def _sample(store: Store, publication: Publication) -> dict[str, Any]:
    """Compares rows spread evenly with those of the artefact; the vectors of some become queries."""
    rows, kept, first = publication.rows, [], 0
    wanted = evenly(rows.count, SAMPLE)
    for table in rows.batches(publication.columns):
        inside = wanted[(wanted >= first) & (wanted < first + len(table))] - first
        if len(inside):
            kept.append(publication.prepared(table.take(pa.array(inside))))
        first += len(table)
    ours = pa.concat_tables(kept)
    theirs = store.fetch(ours.column("sample_id").to_pylist())
    a, b = digest(ours), digest(theirs.select(ours.column_names))
    if a != b:
        raise UserError(
            f"{store.name}: {len(ours)} rows spread evenly differ from the artefact's", "Write all again with --replace"
        )
    return {"sample": len(ours), "xxh3": a, "vectors": torch.from_numpy(vectors_of(ours)[:: max(1, len(ours) // 48)])}


def digest(rows: pa.Table) -> str:
    """xxh3-64 over rows in the order of their sample ids: texts, shares, and vectors as float32."""
    rows = rows.sort_by("sample_id")
    total = xxhash.xxh3_64(vectors_of(rows).tobytes() if len(rows) else b"")
    total.update(repr(rows.drop_columns(["embedding"]).to_pylist()).encode())
    return str(total.hexdigest())


def _filter(publication: Publication) -> tuple[tuple[str, str], float]:
    """A column and a text that nearly SHARE of the first rows have, and what share it is."""
    names = [name for name in publication.texts if name not in _UNIQUE]
    table = next(iter(publication.rows.batches(names)))
    choices = []
    for name in names:
        for entry in pc.value_counts(publication.cleaned(table.column(name))).to_pylist():
            if entry["values"]:
                choices.append((abs(entry["counts"] / len(table) - SHARE), name, entry["values"], entry["counts"]))
    _, name, text, count = min(choices)
    return (name, text), count / len(table)


def _recall(
    store: Store, publication: Publication, queries: Tensor, where: tuple[str, str] | None, least: float
) -> tuple[float, int]:
    """Share of exact search's best that are found, and the least effort that reaches `least`."""
    _, scores = exact_top(publication.rows, queries, TOP, where)
    recall = 0.0
    for effort in EFFORTS:
        shares = []
        for query, exact in zip(queries, scores, strict=True):
            found = store.search(query.numpy(), len(exact), where, effort)
            shares.append(_right(store, query, found, exact, where) / len(exact))
        recall = float(np.mean(shares))
        if recall >= least:
            return recall, effort
    which = f" with {where[0]} = '{where[1]}'" if where else ""
    raise UserError(
        f"{store.name}: recall@{TOP}{which} is {recall:.3f}, below {least}",
        "Give --index flat, a lower --recall, or see docs/artefact.md on what each database does with filters",
    )


def _right(store: Store, query: Tensor, found: list[int], exact: Tensor, where: tuple[str, str] | None) -> int:
    """Found rows that pass the filter and are no worse than the last of exact search; of equal scores any is right."""
    rows = store.fetch(sorted({*found}))
    scores = torch.from_numpy(vectors_of(rows)).double() @ query.double()
    good = scores >= exact[-1] - _TIE
    if where:
        good &= torch.tensor([text == where[1] for text in rows.column(where[0]).to_pylist()])
    return int(good.sum())
