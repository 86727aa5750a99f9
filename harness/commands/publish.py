"""`shelfmark publish`: Load an artefact's documents into a vector database, and prove the search there."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from harness.artefact.artefact import open_record
from harness.artefact.golden import read_golden
from harness.artefact.removed import read_kept
from harness.artefact.rows import Rows
from harness.artefact.stores.publication import Publication, prove, write
from harness.artefact.stores.store import Layout, open_store
from harness.core.errors import UserError
from harness.core.files import printable
from harness.core.manifest import fingerprint
from models.ranges import ClosedUnitInterval

EXAMPLE = "shelfmark publish artefacts/grocery --to postgresql://search@db.example/shop/products"
SMALL = 10_000  # rows that are compared one by one in a moment


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """Writes a row for each document: sample_id, item, title, class_key, the catalogue's attributes, shares of the
    vector's parts, the vector.

    The same command again writes nothing; after a stop it goes on. Rows of an earlier artefact are replaced, and
    deleted where the new one lacks them. It ends with a comparison: rows, a sample of them, recall with and without a
    filter.

    Args:
        artefact: the folder that `shelfmark export` wrote.
        to: milvus+file:///data/shop.db, milvus://host:19530/collection (milvus+https with TLS) or
            postgresql://user@host/database/table; passwords also from MILVUS_PASSWORD and PGPASSWORD.
        index: hnsw, a graph; flat, which compares every vector; auto: flat up to 10,000 documents.
        recall: share of exact search's best ten that a search there must find.
        replace: delete what is there first.
    """

    artefact: Path = field(kw_only=False)
    to: str
    index: Literal["auto", "flat", "hnsw"] = "auto"
    recall: ClosedUnitInterval = 0.95
    replace: bool = False


def run(config: PublishConfig) -> dict[str, Any]:
    """Publishes, prints what was proved, and returns it with the number of rows written and seconds.

    Raises:
        UserError: the artefact is damaged; nothing answers at the address; a package is missing; what is there has
            other columns; the comparison fails.
    """
    started = time.perf_counter()
    record = open_record(config.artefact)
    kept = read_kept(config.artefact, record, record.number("documents", 1 << 40, 1))
    rows = Rows(config.artefact, kept=kept)
    golden = read_golden(config.artefact, rows.width)
    with closing(open_store(config.to)) as store:
        publication = Publication(rows, fingerprint(config.artefact)[:16], store.longest)
        kind = config.index if config.index != "auto" else "flat" if rows.count <= SMALL else "hnsw"
        try:
            if "artefact" in publication.texts:
                raise UserError(f"{config.artefact} has an attribute 'artefact', which is taken", "Rename it")
            if config.replace:
                store.drop()
            store.create(Layout(publication.texts, rows.width, rows.count, kind, tuple(rows.shares)))
            if others := store.count() - store.count(publication.mark):
                print(
                    f"{store.name}: {others:,} rows of another artefact are replaced; until then searches find both. "
                    "For a service in use publish under another name, and switch over at the end"
                )
            written = write(store, publication)
            told = prove(store, publication, torch.from_numpy(golden.embeddings), config.recall)
        except store.errors as error:
            raise UserError(f"{store.name}: {store.said(error)}", "Give the same command again: it goes on") from error
        name = store.name
    column, text, share = told["filter"]
    print(f"{name}: {told['rows']:,} rows, {written:,} of them written now")
    print(f"{name}: {told['sample']} rows read back are the artefact's (xxh3 {told['xxh3']})")
    print(
        f"{name}: recall@10 {told['recall']:.3f} with {told['effort']} candidates; "
        f"where {printable(column)} is '{printable(text)}' ({share:.1%}) {told['filtered_recall']:.3f} "
        f"with {told['filtered_effort']}"
    )
    return {**told, "written": written, "index": kind, "seconds": round(time.perf_counter() - started, 3)}
