"""PostgreSQL with the extension pgvector, by pg8000.

Vectors and texts go in by COPY in its binary format; a batch is one transaction.
"""

from __future__ import annotations

import getpass
import importlib
import io
import json
import os
import socket
import ssl
import struct
from collections.abc import Sequence
from typing import Any
from urllib.parse import SplitResult, unquote

import numpy as np
import pyarrow as pa

from harness.artefact.rows import vectors_of
from harness.artefact.stores.store import BUILD_EFFORT, LINKS, Layout, option, path_parts, without_password
from harness.core.errors import UserError
from harness.core.files import printable

SECONDS = 30.0  # to wait for a connection
WIDEST = 2000  # numbers of a vector that pgvector's graph takes
LARGEST_BUILD = 4 << 30  # bytes of memory for building it; what does not fit is built far more slowly


class PostgresStore:
    """A table of PostgreSQL (see `harness.artefact.stores.store.Store`). The password can stand in the address or in
    PGPASSWORD; `?host=/folder` names a Unix socket, `?sslmode=verify-full` checks the server's certificate.
    """

    longest = 0

    def __init__(self, parts: SplitResult) -> None:
        try:
            client: Any = importlib.import_module("pg8000.native")
        except ImportError as error:
            raise UserError(f"pg8000 does not import ({error})", "Install shelfmark[publish]") from error
        self.name = without_password(parts)
        self.errors: tuple[type[Exception], ...] = (client.Error, OSError)
        database, table = path_parts(parts, ["database", "table"])
        self._identifier = client.identifier
        self._table, self._quoted = table, client.identifier(table)
        self._layout = Layout((), 0, 0, "flat")
        host, port = option(parts, "host", parts.hostname or "localhost"), parts.port or 5432
        secure: dict[str, Any] = {"disable": False, "prefer": None, "require": True}
        secure["verify-full"] = ssl.create_default_context()
        if (mode := option(parts, "sslmode", "prefer")) not in secure:
            raise UserError(f"{self.name}: sslmode is {printable(mode)}", f"It can be {', '.join(secure)}")
        try:
            self._connection: Any = client.Connection(
                unquote(parts.username or "") or os.environ.get("PGUSER") or getpass.getuser(),
                host=host,
                database=database,
                password=unquote(parts.password or "") or os.environ.get("PGPASSWORD"),
                sock=_connected(host, port),
                ssl_context=False if host.startswith("/") else secure[mode],
            )
        except self.errors as error:
            raise UserError(
                f"{self.name} does not answer ({self.said(error)})", "Start it, or correct the address"
            ) from error

    def said(self, error: Exception) -> str:
        """As the interface says; the server's message where there is one."""
        told = error.args[0] if error.args else ""
        text = told.get("M", "") if isinstance(told, dict) else str(error.__cause__ or error)
        return printable(" ".join(str(text).split()))

    def create(self, layout: Layout) -> None:
        """As the interface says."""
        self._layout = layout
        try:
            self._connection.run("CREATE EXTENSION IF NOT EXISTS vector")
        except self.errors as error:
            raise UserError(
                f"{self.name}: no pgvector ({self.said(error)})", "Install the extension vector there"
            ) from error
        if layout.index == "hnsw" and layout.width > WIDEST:
            raise UserError(
                f"{self.name}: pgvector's graph takes vectors of at most {WIDEST} numbers, not {layout.width}",
                "Give --index flat, or publish to Milvus",
            )
        wanted = {"sample_id": "bigint", "artefact": "text", **dict.fromkeys(layout.texts, "text")}
        wanted |= dict.fromkeys(layout.shares, "real")
        wanted["embedding"] = f"vector({layout.width})"
        there = self._columns()
        if there and there != wanted:
            raise UserError(
                f"{self.name} has other columns, or vectors of another width than {layout.width}",
                "Name another table, or give --replace",
            )
        columns = ", ".join(f"{self._identifier(name)} {kind}" for name, kind in wanted.items())
        self._connection.run(f"CREATE TABLE IF NOT EXISTS {self._quoted} ({columns}, PRIMARY KEY (sample_id))")
        self._connection.run(
            f"CREATE TEMP TABLE shelfmark_batch ON COMMIT DELETE ROWS AS SELECT * FROM {self._quoted} WITH NO DATA"
        )

    def _columns(self) -> dict[str, str]:
        found = self._connection.run(
            "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute "
            "WHERE attrelid = to_regclass(:name) AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
            name=self._quoted,
        )
        return dict(found)

    def upsert(self, rows: pa.Table) -> None:
        """As the interface says."""
        names = [self._identifier(name) for name in rows.column_names]
        new = ", ".join(f"{name} = EXCLUDED.{name}" for name in names[1:])
        run = self._connection.run
        run("BEGIN")
        run(f"COPY shelfmark_batch ({', '.join(names)}) FROM STDIN WITH (FORMAT BINARY)", stream=copied(rows))
        run(
            f"INSERT INTO {self._quoted} ({', '.join(names)}) SELECT {', '.join(names)} FROM shelfmark_batch "
            f"ON CONFLICT (sample_id) DO UPDATE SET {new}"
        )
        run("COMMIT")

    def finish(self) -> None:
        """As the interface says."""
        run, layout = self._connection.run, self._layout
        if layout.index == "hnsw":
            memory = min(LARGEST_BUILD, max(1 << 26, layout.rows * (4 * layout.width + 16 * LINKS + 256)))
            run(f"SET maintenance_work_mem = '{memory >> 10}kB'")
            run(
                f"CREATE INDEX IF NOT EXISTS {self._identifier(f'{self._table}_embedding')} ON {self._quoted} "
                f"USING hnsw (embedding vector_ip_ops) WITH (m = {LINKS}, ef_construction = {BUILD_EFFORT})"
            )
        run(f"ANALYZE {self._quoted}")

    def count(self, mark: str = "") -> int:
        """As the interface says."""
        if mark:
            found = self._connection.run(f"SELECT count(*) FROM {self._quoted} WHERE artefact = :mark", mark=mark)
        else:
            found = self._connection.run(f"SELECT count(*) FROM {self._quoted}")
        return int(found[0][0])

    def keep_only(self, mark: str) -> None:
        """As the interface says."""
        self._connection.run(f"DELETE FROM {self._quoted} WHERE artefact <> :mark", mark=mark)

    def fetch(self, sample_ids: Sequence[int]) -> pa.Table:
        """As the interface says."""
        layout = self._layout
        names = ["sample_id", "artefact", *layout.texts, *layout.shares]
        shown = ", ".join(map(self._identifier, names))
        found = self._connection.run(
            f"SELECT {shown}, embedding::text FROM {self._quoted} WHERE sample_id = ANY(:ids)", ids=[*sample_ids]
        )
        *columns, vectors = zip(*found, strict=True) if found else [()] * (len(names) + 1)
        read = [np.array(json.loads(vector), np.float32) for vector in vectors]
        kinds = [pa.int64(), pa.string(), *[pa.string()] * len(layout.texts), *[pa.float32()] * len(layout.shares)]
        arrays = [pa.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
        return pa.table([*arrays, pa.array(read, pa.list_(pa.float32()))], names=[*names, "embedding"])

    def search(self, vector: np.ndarray, k: int, where: tuple[str, str] | None, effort: int) -> list[int]:
        """As the interface says."""
        run = self._connection.run
        if self._layout.index == "hnsw":
            run(f"SET hnsw.ef_search = {int(effort)}")
            run("SET hnsw.iterative_scan = strict_order")  # goes on where a filter leaves too few
        condition = f"WHERE {self._identifier(where[0])} = :text" if where else ""
        values = {"text": where[1]} if where else {}
        found = run(
            f"SELECT sample_id FROM {self._quoted} {condition} "
            f"ORDER BY embedding <#> CAST(:query AS vector) LIMIT {int(k)}",
            query=json.dumps(vector.tolist()),
            **values,
        )
        return [int(row[0]) for row in found]

    def drop(self) -> None:
        """As the interface says."""
        self._connection.run(f"DROP TABLE IF EXISTS {self._quoted}")

    def close(self) -> None:
        """As the interface says."""
        self._connection.close()


def _connected(host: str, port: int) -> socket.socket:
    """A connection to a host, or to the Unix socket in a folder; only connecting has a time-out, not the work."""
    if not host.startswith("/"):
        made = socket.create_connection((host, port), SECONDS)
    else:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.settimeout(SECONDS)
        made.connect(f"{host}/.s.PGSQL.{port}")
    made.settimeout(None)
    return made


def copied(rows: pa.Table) -> io.BytesIO:
    """Rows in the binary format of COPY: big-endian, each field behind its length, -1 for NULL."""
    buffer = io.BytesIO()
    buffer.write(b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0))
    vectors = vectors_of(rows).astype(">f4")
    head = struct.pack(">ihh", 4 + 4 * vectors.shape[1], vectors.shape[1], 0)
    columns = rows.drop_columns(["sample_id", "embedding"]).to_pydict().values()
    start = struct.pack(">hi", rows.num_columns, 8)
    for sample, vector, *values in zip(rows.column("sample_id").to_pylist(), vectors, *columns, strict=True):
        buffer.write(start + struct.pack(">q", sample))
        for value in values:
            content = struct.pack(">f", value) if isinstance(value, float) else (value or "").encode()
            buffer.write(struct.pack(">i", -1) if value is None else struct.pack(">i", len(content)) + content)
        buffer.write(head + vector.tobytes())
    buffer.write(struct.pack(">h", -1))
    buffer.seek(0)
    return buffer
