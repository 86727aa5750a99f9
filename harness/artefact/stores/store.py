"""Interface of a vector database: what publishing asks of it, and nothing else.

A collection has a row for each document: sample_id (key), artefact (mark of the one that wrote it), columns of text,
shares of the embedding's parts (float32), embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

import numpy as np
import pyarrow as pa

from harness.core.errors import UserError
from harness.core.files import printable

IndexKind = Literal["flat", "hnsw"]
LINKS, BUILD_EFFORT = 32, 128  # of HNSW: neighbours of a node, candidates while it is built
FORMS = "milvus+file:///data/shop.db, milvus://host:19530/collection, postgresql://host/database/table"


@dataclass(frozen=True)
class Layout:
    """Columns of a collection.

    Args:
        texts: names of the columns of text, which filters can use.
        width: numbers of a vector.
        rows: documents that will be there.
        index: compare every vector (flat), or a graph (hnsw).
        shares: names of the columns of float32.
    """

    texts: tuple[str, ...]
    width: int
    rows: int
    index: IndexKind
    shares: tuple[str, ...] = ()


class Store(Protocol):
    """A collection of a vector database, connected.

    Attributes:
        name: the address without its password, for messages.
        longest: bytes of a text that it takes; 0: any.
        errors: exceptions of its client.
    """

    name: str
    longest: int
    errors: tuple[type[Exception], ...]

    def said(self, error: Exception) -> str:
        """One of `errors` in one line."""
        ...

    def create(self, layout: Layout) -> None:
        """Creates the collection where there is none.

        Raises:
            UserError: one of other columns is there, or the database takes no such collection.
        """
        ...

    def upsert(self, rows: pa.Table) -> None:
        """Writes rows (sample_id, artefact, texts, shares, embedding), and replaces those of equal sample_id. What it
        returns from is kept, also if the process is killed then.
        """
        ...

    def finish(self) -> None:
        """Builds what searches need."""
        ...

    def count(self, mark: str = "") -> int:
        """Rows that are there; with `mark` those that this artefact wrote."""
        ...

    def keep_only(self, mark: str) -> None:
        """Deletes the rows of other artefacts."""
        ...

    def fetch(self, sample_ids: Sequence[int]) -> pa.Table:
        """Rows of these documents that are there, as given to `upsert`, in any order."""
        ...

    def search(self, vector: np.ndarray, k: int, where: tuple[str, str] | None, effort: int) -> list[int]:
        """Sample ids of the best rows by inner product, best first.

        Args:
            vector: float32 [d].
            k: rows wanted.
            where: a column and the text that it must have.
            effort: candidates that a graph looks at.
        """
        ...

    def drop(self) -> None:
        """Deletes the collection, if there is one."""
        ...

    def close(self) -> None:
        """Ends the connection."""
        ...


def open_store(uri: str) -> Store:
    """Connects to the collection that an address names; FORMS are examples. Packages of a database are loaded only for
    it.

    Raises:
        UserError: the address is none of these, its package is missing, or nothing answers there.
    """
    parts = urlsplit(uri)
    if parts.scheme in ("milvus", "milvus+https", "milvus+file"):
        from harness.artefact.stores.milvus import MilvusStore

        return MilvusStore(parts)
    if parts.scheme in ("postgresql", "postgres"):
        from harness.artefact.stores.postgres import PostgresStore

        return PostgresStore(parts)
    raise UserError(f"--to {printable(uri)} is no address of a vector database", f"Write {FORMS}")


def path_parts(parts: SplitResult, names: Sequence[str]) -> list[str]:
    """The parts of an address's path, one for each of `names`.

    Raises:
        UserError: there are more or fewer.
    """
    found = [unquote(part) for part in parts.path.split("/") if part]
    if len(found) != len(names):
        raise UserError(f"--to {without_password(parts)} names no {' and '.join(names)}", f"Write {FORMS}")
    return found


def option(parts: SplitResult, name: str, default: str = "") -> str:
    """The option `name` of an address, behind its '?'."""
    return parse_qs(parts.query).get(name, [default])[0]


def without_password(parts: SplitResult) -> str:
    """The address without its password."""
    user, at, host = parts.netloc.rpartition("@")
    return printable(parts._replace(netloc=f"{user.partition(':')[0]}{at}{host}").geturl())
