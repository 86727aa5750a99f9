"""Cosines of edges by embeddings from Parquet, on disk and mapped: memory grows with the number of samples only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from harness.catalogue.governance.engine import Engine
from harness.catalogue.governance.rules import MILLION
from harness.core.errors import UserError

AT_ONCE = 1 << 16  # edges, or embeddings, in memory
_COLUMNS = ["sample_id", "embedding"]


class Similarities:
    """Unit embeddings of some samples of a catalogue.

    Args:
        paths: Parquet files, or folders of them, with the columns sample_id and embedding, lists of floats of one
            length. Of a sample that is named twice the last embedding counts.
        num_samples: of the catalogue.
        file: where the vectors are laid down.

    Attributes:
        known: samples with an embedding; embeddings of length 0, and those that are not finite, count as none.

    Raises:
        UserError: a file cannot be read or has other columns, lengths differ, or no row fits the catalogue.
    """

    def __init__(self, paths: tuple[Path, ...], num_samples: int, file: Path) -> None:
        files = [found for path in paths for found in _files(path)]
        widths = {found: _width(found) for found in files}
        if len(set(widths.values())) != 1:
            said = ", ".join(f"{found} {width}" for found, width in list(widths.items())[:5])
            raise UserError(f"embeddings of several lengths ({said})", "Name those of one model (--embeddings)")
        width, rows = widths[files[0]], sum(pq.read_metadata(found).num_rows for found in files)
        self._row_of = np.full(num_samples, -1, np.int64)
        self._vectors = np.lib.format.open_memmap(file, "w+", np.float32, (max(rows, 1), width))
        place = 0
        for ids, vectors in tqdm(_read(files, width), "embeddings", unit=f" x {AT_ONCE}", leave=False, delay=5):
            lengths = np.sqrt((vectors * vectors).sum(1))
            good = (ids >= 0) & (ids < num_samples) & np.isfinite(lengths) & (lengths > 0)
            unit = vectors[good] / lengths[good, None]
            self._vectors[place : place + len(unit)] = unit
            self._row_of[ids[good]] = place + np.arange(len(unit))
            place += len(unit)
        self.known = int((self._row_of >= 0).sum())
        if not self.known:
            raise UserError(
                f"--embeddings {paths[0]}: no row has the sample_id of a sample of the catalogue and a vector",
                "Name embeddings of this catalogue's samples",
            )

    def add(self, engine: Engine, name: str, result: str) -> list[Path]:
        """Copies the rows of `name`, which has the columns query and document, with their `similarity`: the cosine in
        millionths, null where one has no embedding.
        """
        file = engine.spill / f"{result}.parquet"
        columns = pq.read_schema(engine.parts(name)[0]).names
        schema: pa.Schema | None = None
        writer: pq.ParquetWriter | None = None
        batches = engine.batches(name, columns, AT_ONCE)
        for batch in tqdm(batches, "cosines", unit=f" x {AT_ONCE} edges", leave=False, delay=5):
            found = pa.Table.from_batches([batch])
            found = found.append_column("similarity", self._cosines(batch["query"], batch["document"]))
            if writer is None:
                schema = found.schema
                writer = pq.ParquetWriter(file, schema)
            writer.write_table(found.cast(schema))
        if writer is None:  # no edges
            empty = pq.read_table(engine.parts(name)[0])
            pq.write_table(empty.append_column("similarity", pa.array([], pa.int64())), file)
        else:
            writer.close()
        return [file]

    def _cosines(self, query: pa.Array, document: pa.Array) -> pa.Array:
        left, right = (self._row_of[ids.to_numpy(zero_copy_only=False)] for ids in (query, document))
        known = (left >= 0) & (right >= 0)
        millionths = np.zeros(len(left), np.int64)
        one, other = (self._vectors[rows[known]].astype(np.float64) for rows in (left, right))
        millionths[known] = np.rint((one * other).sum(1) * MILLION)
        return pa.array(millionths, mask=~known)


def _files(path: Path) -> list[Path]:
    found = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not found or not all(file.is_file() for file in found):
        raise UserError(f"--embeddings {path}: no such file, and no folder of Parquet files")
    return found


def _width(file: Path) -> int:
    """Length of a file's embeddings, by its type or its first row.

    Raises:
        UserError: unreadable, or other columns.
    """
    try:
        schema = pq.read_schema(file)
        named, kind = (schema.field(name).type if name in schema.names else pa.null() for name in _COLUMNS)
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not lists or not pa.types.is_floating(kind.value_type) or not pa.types.is_integer(named):
            raise UserError(
                f"--embeddings {file} lacks an integer column sample_id or a column embedding of lists of floats"
            )
        if pa.types.is_fixed_size_list(kind):
            return int(kind.list_size)
        with pq.ParquetFile(file) as opened:
            first = next(opened.iter_batches(1, columns=["embedding"]), None)
        return 0 if first is None or first.column(0)[0].as_py() is None else len(first.column(0)[0])
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"--embeddings {file} cannot be read: {' '.join(str(error).split())[:200]}") from error


def _read(files: list[Path], width: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Sample ids int64 [n] and vectors float64 [n, width] of the rows that have both."""
    for file in files:
        try:
            with pq.ParquetFile(file) as opened:
                for batch in opened.iter_batches(AT_ONCE, columns=_COLUMNS):
                    whole = pa.table(batch.columns, names=_COLUMNS).drop_null().combine_chunks()
                    if not len(whole):
                        continue
                    ids = whole["sample_id"].to_numpy().astype(np.int64)
                    values = whole["embedding"].combine_chunks().flatten()
                    if len(values) != width * len(ids):
                        raise UserError(f"--embeddings {file}: not every embedding has {width} numbers")
                    numbers = values.to_numpy(zero_copy_only=False).astype(np.float64)
                    yield ids, numbers.reshape(len(ids), width)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"--embeddings {file} cannot be read: {' '.join(str(error).split())[:200]}") from error
