"""The catalogue folder: what ingest writes, and how its samples are read by their global id."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import xxhash

from harness.data.store import RemoteStore, Store, open_store
from harness.errors import UserError

CATALOGUE_FORMAT = 1
ALL_SPLITS = "all"
INDEX_DTYPE = np.dtype(
    [("shard", "<u4"), ("offset", "<u8"), ("length", "<u8"), ("xxh3", "<u8"), ("width", "<u4"), ("height", "<u4")]
)
SAMPLE_SCHEMA = pa.schema(
    [("sample_id", pa.int64())]
    + [(name, pa.string()) for name in ("item", "kind", "class_key", "split", "title", "description", "image")]
)


def shard_name(shard: int) -> str:
    """File name of a shard under shards/."""
    return f"shard-{shard:06d}.tar"


def nearest_first(name: str, names: Iterable[str]) -> list[str]:
    """`names` with those most like `name` first, for an error message."""
    return sorted(names, key=lambda other: -difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio())


def _which(kind: str | None, split: str | None) -> pc.Expression:
    rows = pc.scalar(True)
    if kind is not None:
        rows &= pc.field("kind") == kind
    if split is not None:
        rows &= pc.field("split").isin([split, ALL_SPLITS])
    return rows


class CorruptSample(Exception):
    """The stored bytes of one sample cannot be read or are not those that were ingested.

    Args:
        sample_id: the global sample id.
        reason: what is wrong, with the shard.
    """

    def __init__(self, sample_id: int, reason: str) -> None:
        super().__init__(f"sample {sample_id}: {reason}")
        self.sample_id = sample_id
        self.reason = reason


class Catalogue:
    """Read access to an ingested catalogue; threads may share one.

    Args:
        path: the catalogue folder.
        store: its shards; by default where its shards.json says.

    Attributes:
        meta: content of catalogue.json.
        num_samples: global sample ids are 0 .. num_samples - 1.
        index: [num_samples] memory-mapped records of INDEX_DTYPE; width and height in pixels, upright.
        attributes: names of the attribute columns.
        remote: whether its shards lie on a server, where a read waits for an answer.
        sample_files: Parquet files with the samples' rows, in the order of their ids.

    Raises:
        UserError: no catalogue there, an unfinished one, one of another format, or one that lost files.
    """

    def __init__(self, path: Path, store: Store | None = None) -> None:
        self.path = Path(path)
        self.meta = self._read_meta()
        self.num_samples: int = self.meta["num_samples"]
        self.attributes: list[str] = self.meta["attributes"]
        # Only what catalogue.json counts: more may lie there while the catalogue grows (harness/data/growth.py).
        index = np.load(self._present("index.npy"), mmap_mode="r")
        if len(index) < self.num_samples:
            self._refuse(f"index.npy has {len(index)} entries, catalogue.json says {self.num_samples}")
        self.index: np.ndarray = index[: self.num_samples]
        parts = sorted(self._present("samples").glob("part-*.parquet"))
        self.sample_files: list[Path] = parts[: self.meta.get("num_parts")]
        self._samples = ds.dataset(self.sample_files, format="parquet")
        self._store = store or open_store(self.path)
        self.remote = isinstance(self._store, RemoteStore)
        # Tars that were indexed where they lie keep their names.
        self._names: list[str] = self.meta.get("shard_names") or [shard_name(i) for i in range(self.meta["num_shards"])]
        for shard in sorted(set(self._names) - self._store.names()):
            self._refuse(f"{shard} is missing")

    def _read_meta(self) -> dict[str, Any]:
        file = self.path / "catalogue.json"
        if not file.is_file():
            what = "no catalogue.json in it: unfinished, or no catalogue" if self.path.is_dir() else "no such folder"
            raise UserError(f"{self.path}: {what}", "Make one with `shelfmark ingest`")
        try:
            meta: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            self._refuse(f"catalogue.json does not parse ({error})")
        if meta.get("format") != CATALOGUE_FORMAT:
            self._refuse(f"format {meta.get('format')!r}, this version reads format {CATALOGUE_FORMAT}")
        return meta

    def _present(self, name: str) -> Path:
        if not (self.path / name).exists():
            self._refuse(f"{name} is missing")
        return self.path / name

    def _refuse(self, what: str) -> NoReturn:
        raise UserError(f"catalogue {self.path}: {what}", "Restore it, or ingest again")

    def table(self, columns: list[str] | None = None, kind: str | None = None, split: str | None = None) -> pa.Table:
        """The samples' rows in the order of their ids.

        Args:
            columns: names to read besides sample_id, which always comes first; None for all.
            kind: 'query' or 'document'; None for both.
            split: rows of this split and those of split 'all'; None for every row.

        Raises:
            UserError: an unknown column.
        """
        return self._samples.to_table(columns=self._names_of(columns), filter=_which(kind, split))

    def batches(
        self,
        columns: list[str] | None = None,
        kind: str | None = None,
        split: str | None = None,
        between: tuple[int, int] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """The rows of `table` piece by piece, for what must not grow with the catalogue; `between`: with ids from the first to the last alone."""
        rows = _which(kind, split)
        if between is not None:
            rows &= (pc.field("sample_id") >= int(between[0])) & (pc.field("sample_id") <= int(between[1]))
        return self._samples.to_batches(
            columns=self._names_of(columns), filter=rows, batch_readahead=2, fragment_readahead=1
        )

    def rows(self, sample_ids: Sequence[int], columns: list[str] | None = None) -> list[dict[str, Any]]:
        """The rows of a few samples in the order of their ids; only their neighbours are read besides."""
        wanted = pc.field("sample_id").isin(pa.array(sample_ids, pa.int64()))
        return self._samples.to_table(columns=self._names_of(columns), filter=wanted).to_pylist()

    def _names_of(self, columns: list[str] | None) -> list[str]:
        known = self._samples.schema.names
        for name in columns or ():
            if name not in known:
                raise UserError(
                    f"catalogue {self.path} has no column {name!r}", f"It has {', '.join(nearest_first(name, known))}"
                )
        return ["sample_id", *(name for name in (known if columns is None else columns) if name != "sample_id")]

    def read_bytes(self, sample_id: int) -> bytes:
        """The image file of a sample as it was ingested, its length and checksum verified.

        Raises:
            CorruptSample: the shard ends early there or holds other bytes.
            UserError: the shard cannot be read, in several tries.
            IndexError: no such sample.
        """
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample {sample_id} of a catalogue of {self.num_samples}")
        shard, offset, length, checksum, _, _ = self.index[sample_id].item()
        name = self._names[shard]
        data = self._store.read(name, offset, length)
        if xxhash.xxh3_64_intdigest(data) != checksum:  # a cache may have been damaged since
            data = self._store.read(name, offset, length, fresh=True)
        if len(data) != length:
            raise CorruptSample(sample_id, f"{name} ends after {len(data)} of its {length} bytes")
        if xxhash.xxh3_64_intdigest(data) != checksum:
            raise CorruptSample(sample_id, f"{name}: checksum of the {length} bytes at {offset} differs")
        return data

    def close(self) -> None:
        """Closes the shards; a later read opens them again. No read may be under way."""
        self._store.close()
