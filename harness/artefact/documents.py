"""Reading of an artefact's id map: untrusted Parquet."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from harness.core.errors import UserError
from harness.core.files import printable

PART = "part_"  # begins the name of a column of shares: of a part of the document's embedding
_TEXTS = ("class_key", "item", "title", "description")
_BATCH = 256  # rows read before their size can be checked
_MOST = 64  # bytes in memory for one in the file; each row has its embedding there, so no real one comes near


def read_documents(folder: Path, count: int) -> pa.Table:
    """All `count` rows of folder/documents/part-*.parquet, without the embeddings.

    Raises:
        UserError: another number of rows, missing columns or columns of another type, text that is not UTF-8, or a
            damaged file; it is named.
    """
    parts = sorted((folder / "documents").glob("part-*.parquet"))
    tables = []
    for part in parts:
        try:
            tables.append(_read(part, count))
            tables[-1].validate(full=True)  # UTF-8 too
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            what = printable(str(getattr(error, "strerror", None) or error))
            raise UserError(f"{part} cannot be read ({what})", "Export again") from error
        if tables[-1].schema != tables[0].schema:
            raise UserError(f"{part} has other columns than {parts[0].name}", "Export again")
    if sum(map(len, tables)) != count:
        raise UserError(f"{folder}/documents has {sum(map(len, tables)):,} rows, not {count:,}", "Export again")
    return pa.concat_tables(tables)


def parts_of(schema: pa.Schema) -> dict[str, str]:
    """Names of the parts of an embedding whose shares are columns -> their columns."""
    return {f.name.removeprefix(PART): f.name for f in schema if f.name.startswith(PART) and f.type == pa.float32()}


def _read(part: Path, most_rows: int) -> pa.Table:
    with pq.ParquetFile(part) as file:
        schema = file.schema_arrow.remove_metadata()
        wanted = {"sample_id": pa.int64(), "thumbnail": pa.binary(), **dict.fromkeys(_TEXTS, pa.string())}
        for name, kind in wanted.items():
            if schema.get_all_field_indices(name) == [] or schema.field(name).type != kind:
                raise UserError(f"{part} has no column {name} of type {kind}", "Export again")
        names = [name for name in schema.names if name != "embedding"]
        codecs = {
            file.metadata.row_group(group).column(column).compression
            for group in range(file.metadata.num_row_groups)
            for column in range(file.metadata.num_columns)
        }
        # Snappy makes at most 22 bytes of one, others thousands.
        if file.metadata.num_rows > most_rows or codecs - {"SNAPPY", "UNCOMPRESSED"}:
            raise UserError(f"{part} was not written by `shelfmark export` (rows or codec)", "Export again")
        batches, room = [], _MOST * part.stat().st_size
        for batch in file.iter_batches(_BATCH, columns=names):
            batches.append(batch)
            room -= batch.nbytes
            if room < 0:
                raise UserError(f"{part} holds far more than its size in bytes; it is not read", "Export again")
        table = pa.Table.from_batches(batches, pa.schema([schema.field(name) for name in names]))
    if any(table.column(name).null_count for name in ("sample_id", *_TEXTS)):
        raise UserError(f"{part} has rows without {', '.join(('sample_id', *_TEXTS))}", "Export again")
    for name in parts_of(table.schema).values():
        if not pc.all(pc.fill_null(pc.is_finite(table.column(name)), False)).as_py():
            raise UserError(f"{part} has shares in {name} that are not numbers", "Export again")
    return table
