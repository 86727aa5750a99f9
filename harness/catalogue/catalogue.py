"""The catalogue folder: its files, and read access to its samples by global id."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from harness.catalogue.store import Store, open_store
from harness.core.errors import UserError
from harness.core.files import Record, printable, read_record

CATALOGUE_FORMAT = 1
MOST = 1 << 48  # samples, shards or files
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


def part_name(number: int) -> str:
    """File name of a Parquet file under samples/."""
    return f"part-{number:05d}.parquet"


def quarantine_names(meta: Mapping[str, Any]) -> list[str]:
    """File names of a catalogue's quarantines, the newest last: an append has one of its own."""
    appends = len(meta.get("appended", ()))
    return ["quarantine.parquet", *(f"quarantine-{number:05d}.parquet" for number in range(1, appends + 1))]


def open_array(file: Path, dtype: npt.DTypeLike, remedy: str, ndim: int = 1) -> np.ndarray:
    """Maps a .npy file; reads only its header.

    Raises:
        UserError: it cannot be read, or holds another type or number of dimensions; `remedy` is the second half.
    """
    try:
        array: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}", remedy) from error
    except Exception as error:  # a damaged header may be anything to numpy, which evaluates it
        raise UserError(f"{file} is damaged ({' '.join(str(error).split())[:200]})", remedy) from error
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != ndim:
        raise UserError(f"{file} is damaged (it holds no {ndim}-dimensional array of {np.dtype(dtype).name})", remedy)
    return array


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
    """Stored bytes of a sample that cannot be read or differ from the ingested ones.

    Args:
        sample_id: the global sample id.
        reason: the problem, with the shard.
    """

    def __init__(self, sample_id: int, reason: str) -> None:
        super().__init__(f"sample {sample_id}: {reason}")
        self.sample_id = sample_id
        self.reason = reason


class Catalogue:
    """Read access to an ingested catalogue; thread-safe.

    Args:
        path: the catalogue folder.
        store: its shards; by default those that its shards.json names.

    Attributes:
        meta: content of catalogue.json.
        num_samples: global sample ids are 0 .. num_samples - 1.
        index: [num_samples] memory-mapped records of INDEX_DTYPE; width and height in pixels, upright.
        attributes: names of the attribute columns.
        sample_files: Parquet files with the samples' rows, in the order of their ids.

    Raises:
        UserError: the catalogue is missing, unfinished, of another format, or lost files.
    """

    def __init__(self, path: Path, store: Store | None = None) -> None:
        self.path = Path(path)
        self.remedy = "Restore it, or ingest again"
        self.meta = self._read_meta()
        self.num_samples: int = self.meta["num_samples"]
        self.attributes: list[str] = self.meta["attributes"]
        # Only the files that catalogue.json counts: more exist while the catalogue grows (harness/catalogue/append.py).
        index = open_array(self._present("index.npy"), INDEX_DTYPE, self.remedy)
        if len(index) < self.num_samples:
            self._refuse(f"index.npy has {len(index)} entries, catalogue.json says {self.num_samples}")
        self.index: np.ndarray = index[: self.num_samples]
        self.sample_files = self._list_parts(self._present("samples"))
        with self._reading():
            from pyarrow import dataset  # brings pandas: a quarter of a second

            self._samples = dataset.dataset(self.sample_files, format="parquet")
        if self._samples.schema.names != [*SAMPLE_SCHEMA.names, *self.attributes]:
            self._refuse("samples/ holds other columns than catalogue.json says")
        self._store = store or open_store(self.path)
        self._names = self._list_shards(self._store.names())

    def _read_meta(self) -> dict[str, Any]:
        file = self.path / "catalogue.json"
        if not file.is_file():
            what = "no catalogue.json in it: unfinished, or no catalogue" if self.path.is_dir() else "no such folder"
            raise UserError(f"{self.path}: {what}", "Make one with `shelfmark ingest`")
        record = read_record(file, self.remedy)
        if record.values.get("format") != CATALOGUE_FORMAT:
            found = record.values.get("format")
            self._refuse(f"catalogue.json has format {found!r}, this version reads format {CATALOGUE_FORMAT}")
        if {"checksum", "files"} & set(record.values):  # earlier versions wrote neither
            record.require_seal()
        for name in {"num_samples", "num_shards", *({"num_parts"} & set(record.values))}:
            record.number(name, MOST)
        record.list_of("attributes", str)
        if "appended" in record.values:
            record.list_of("appended", dict)
        counts = Record(file, record.get("counts", dict), self.remedy)
        splits = Record(file, counts.get("splits", dict), self.remedy)
        for part, names in ((counts, ["query", "document"]), (splits, list(splits.values))):
            for name in names:
                part.number(name, MOST)
        return dict(record.values)

    def _list_parts(self, folder: Path) -> list[Path]:
        if "num_parts" not in self.meta:  # of an earlier version
            return sorted(folder.glob("part-*.parquet"))
        return [self._present(f"samples/{part_name(part)}") for part in range(self.meta["num_parts"])]

    def _list_shards(self, there: set[str]) -> list[str]:
        """File names of the shards: indexed tars keep theirs."""
        names = self.meta.get("shard_names")
        if names is not None:
            names = Record(self.path / "catalogue.json", self.meta, self.remedy).list_of("shard_names", str)
            if len(names) != self.meta["num_shards"]:
                self._refuse(f"catalogue.json names {len(names)} shards and counts {self.meta['num_shards']}")
        found = []
        # One by one, since the count may be absurd: no more names are made than files exist.
        for shard in range(self.meta["num_shards"]):
            found.append(names[shard] if names is not None else shard_name(shard))
            if found[-1] not in there:
                self._refuse(f"{printable(found[-1])} is missing")
        return found

    def _present(self, name: str) -> Path:
        if not (self.path / name).exists():
            self._refuse(f"{name} is missing")
        return self.path / name

    def _refuse(self, what: str) -> NoReturn:
        raise UserError(f"catalogue {self.path}: {what}", self.remedy)

    def _read(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        with self._reading():
            yield from batches

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"catalogue {self.path}: samples/ cannot be read ({reason})",
                f"{self.remedy}; `shelfmark verify` names what is damaged",
            ) from error

    def table(self, columns: list[str] | None = None, kind: str | None = None, split: str | None = None) -> pa.Table:
        """The samples' rows in the order of their ids.

        Args:
            columns: names to read besides sample_id, which always comes first; None for all.
            kind: 'query' or 'document'; None for both.
            split: rows of this split and those of split 'all'; None for every row.

        Raises:
            UserError: an unknown column.
        """
        columns = self._names_of(columns)
        with self._reading():
            return self._samples.to_table(columns=columns, filter=_which(kind, split))

    def batches(
        self,
        columns: list[str] | None = None,
        kind: str | None = None,
        split: str | None = None,
        between: tuple[int, int] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """The rows of `table` in batches, so that memory does not grow with the catalogue; `between`: only ids from the
        first to the last.
        """
        rows = _which(kind, split)
        if between is not None:
            rows &= (pc.field("sample_id") >= int(between[0])) & (pc.field("sample_id") <= int(between[1]))
        columns = self._names_of(columns)
        return self._read(
            self._samples.to_batches(columns=columns, filter=rows, batch_readahead=2, fragment_readahead=1)
        )

    def rows(self, sample_ids: Sequence[int], columns: list[str] | None = None) -> list[dict[str, Any]]:
        """The rows of a few samples in the order of their ids; reads only the row groups that hold them."""
        wanted = pc.field("sample_id").isin(pa.array(sample_ids, pa.int64()))
        columns = self._names_of(columns)
        with self._reading():
            return self._samples.to_table(columns=columns, filter=wanted).to_pylist()

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
        if shard >= len(self._names):
            raise CorruptSample(sample_id, f"the index names shard {shard} of {len(self._names)}")
        name = self._names[shard]
        data = self._store.read(name, offset, length)
        if xxhash.xxh3_64_intdigest(data) != checksum:  # the cached copy may be damaged
            data = self._store.read(name, offset, length, fresh=True)
        if len(data) != length:
            raise CorruptSample(sample_id, f"{name} ends after {len(data)} of its {length} bytes")
        if xxhash.xxh3_64_intdigest(data) != checksum:
            raise CorruptSample(sample_id, f"{name}: checksum of the {length} bytes at {offset} differs")
        return data

    def close(self) -> None:
        """Closes the shards; a later read opens them again. Must not run during a read."""
        self._store.close()
