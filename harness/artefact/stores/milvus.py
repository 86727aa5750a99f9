"""Milvus: in a file of this machine (milvus-lite) or a cluster, by the same calls.

milvus-lite accepts index kinds that it does not have and compares every vector instead: a publication that works on a
file shows nothing of a cluster's index.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote

import numpy as np
import pyarrow as pa

from harness.artefact.rows import vectors_of
from harness.artefact.stores.store import BUILD_EFFORT, LINKS, Layout, option, path_parts, without_password
from harness.core.errors import UserError
from harness.core.files import printable

SECONDS = 30.0  # to wait for a connection
_OWN = ("sample_id", "artefact", "embedding")


class MilvusStore:
    """A collection of Milvus (see `harness.artefact.stores.store.Store`). A user's password can stand in the address or
    in MILVUS_PASSWORD.
    """

    longest = 65_535

    def __init__(self, parts: SplitResult) -> None:
        try:
            pymilvus: Any = importlib.import_module("pymilvus")
        except ImportError as error:
            raise UserError(f"pymilvus does not import ({error})", "Install shelfmark[publish]") from error
        self.name, self._module = without_password(parts), pymilvus
        self.errors: tuple[type[Exception], ...] = (pymilvus.MilvusException,)
        self._texts: dict[str, str] = {}
        self._shares: tuple[str, ...] = ()
        if parts.scheme == "milvus+file":
            file = Path(unquote(parts.path))
            if not file.absolute().parent.is_dir():
                raise UserError(f"--to {self.name}: {file.parent} is not a folder", "Name a file in one that exists")
            self._collection, address = option(parts, "collection", "documents"), str(file)
        else:
            (self._collection,) = path_parts(parts, ["collection"])
            scheme = "https" if parts.scheme == "milvus+https" else "http"
            address = f"{scheme}://{parts.hostname}:{parts.port or 19530}"
        user, password = unquote(parts.username or ""), unquote(parts.password or os.environ.get("MILVUS_PASSWORD", ""))
        try:
            self._client: Any = pymilvus.MilvusClient(address, user=user, password=password, timeout=SECONDS)
        except (pymilvus.MilvusException, ImportError, OSError) as error:
            raise UserError(
                f"{self.name} does not answer ({self.said(error)})",
                "For a file install milvus-lite, and let one process use it at a time",
            ) from error

    def said(self, error: Exception) -> str:
        """As the interface says."""
        return printable(" ".join(str(error).split()))

    def create(self, layout: Layout) -> None:
        """As the interface says. Names of columns are written with letters, digits and _."""
        self._texts = {name: re.sub(r"^(?=\d)|\W", "_", name, flags=re.ASCII) for name in layout.texts}
        self._shares = layout.shares
        names = [*self._texts.values(), *_OWN, *self._shares]
        if len({*names}) < len(names):
            raise UserError(
                f"{self.name}: Milvus takes letters, digits and _ in names of columns, and so {layout.texts} are not "
                "different",
                "Rename them in the catalogue",
            )
        if self._client.has_collection(self._collection):
            self._require(layout)
            self._client.load_collection(self._collection)
            return
        kinds = self._module.DataType
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("sample_id", kinds.INT64, is_primary=True)
        schema.add_field("artefact", kinds.VARCHAR, max_length=64)
        for name in self._texts.values():
            schema.add_field(name, kinds.VARCHAR, max_length=self.longest, nullable=True)
        for name in self._shares:
            schema.add_field(name, kinds.FLOAT)
        schema.add_field("embedding", kinds.FLOAT_VECTOR, dim=layout.width)
        index = self._client.prepare_index_params()
        graph = {"M": LINKS, "efConstruction": BUILD_EFFORT} if layout.index == "hnsw" else {}
        index.add_index("embedding", index_type=layout.index.upper(), metric_type="IP", params=graph)
        self._client.create_collection(self._collection, schema=schema, index_params=index, consistency_level="Strong")
        self._client.load_collection(self._collection)

    def _require(self, layout: Layout) -> None:
        fields = {field["name"]: field for field in self._client.describe_collection(self._collection)["fields"]}
        width = int(fields.get("embedding", {}).get("params", {}).get("dim", 0))
        if fields.keys() != {*self._texts.values(), *self._shares, *_OWN} or width != layout.width:
            raise UserError(
                f"{self.name} has other columns, or vectors of {width} numbers, not {layout.width}",
                "Name another collection, or give --replace",
            )

    def upsert(self, rows: pa.Table) -> None:
        """As the interface says."""
        vectors = vectors_of(rows)
        named = rows.drop_columns(["embedding"]).rename_columns([self._texts.get(n, n) for n in rows.column_names[:-1]])
        written = [{**row, "embedding": vector} for row, vector in zip(named.to_pylist(), vectors, strict=True)]
        self._client.upsert(self._collection, written)

    def finish(self) -> None:
        """As the interface says."""
        self._client.flush(self._collection)
        self._client.load_collection(self._collection)

    def count(self, mark: str = "") -> int:
        """As the interface says."""
        where = _equal("artefact", mark) if mark else ""
        found = self._client.query(self._collection, where, output_fields=["count(*)"], consistency_level="Strong")
        return int(found[0]["count(*)"])

    def keep_only(self, mark: str) -> None:
        """As the interface says."""
        self._client.delete(self._collection, filter=f"artefact != {json.dumps(mark)}")

    def fetch(self, sample_ids: Sequence[int]) -> pa.Table:
        """As the interface says."""
        names = ["sample_id", "artefact", *self._texts.values(), *self._shares, "embedding"]
        found = self._client.get(self._collection, ids=[*sample_ids], output_fields=names)
        return _table(found, self._texts, self._shares)

    def search(self, vector: np.ndarray, k: int, where: tuple[str, str] | None, effort: int) -> list[int]:
        """As the interface says."""
        (found,) = self._client.search(
            self._collection,
            [vector.tolist()],
            limit=k,
            filter=_equal(self._texts[where[0]], where[1]) if where else "",
            search_params={"params": {"ef": effort}},
            consistency_level="Strong",
        )
        return [int(hit["sample_id"] if "sample_id" in hit else hit["id"]) for hit in found]

    def drop(self) -> None:
        """As the interface says."""
        self._client.drop_collection(self._collection)

    def close(self) -> None:
        """As the interface says."""
        self._client.close()


def _equal(column: str, text: str) -> str:
    return f"{column} == {json.dumps(text, ensure_ascii=False)}"


def _table(rows: Sequence[Mapping[str, Any]], texts: Mapping[str, str], shares: Sequence[str]) -> pa.Table:
    columns = {name: pa.array([row[own] for row in rows], pa.string()) for name, own in texts.items()}
    columns |= {name: pa.array([row[name] for row in rows], pa.float32()) for name in shares}
    vectors = pa.array([np.asarray(row["embedding"], np.float32) for row in rows], pa.list_(pa.float32()))
    ids, marks = (pa.array([row[name] for row in rows]) for name in ("sample_id", "artefact"))
    return pa.table({"sample_id": ids, "artefact": marks, **columns, "embedding": vectors})
