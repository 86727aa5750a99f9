"""Documents of an export, embedded and written chunk by chunk over the ranks: bounded memory, the same parts on any
number of ranks, finished parts kept for the next process when this one is killed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from harness.artefact.documents import PART
from harness.catalogue.pixels import Colour
from harness.core.errors import UserError
from harness.core.files import read_json, write_json
from harness.core.manifest import checksum
from harness.core.staged_folder import share_file, sync
from harness.core.waiting import in_own_time, of_all_ranks, on_first_rank
from harness.evaluate.contact_sheet import picture
from harness.evaluate.embed import Embedder, Side
from harness.text.tokenizer import FIELDS
from models.batch import Batch
from models.comm import share
from models.method import Method

SETTINGS = "settings.json"
_CHUNKS = 256  # of a catalogue, unless they were larger than
_MOST_ROWS = 1 << 16
_ROWS = 4096  # rows written at once


@dataclass(frozen=True)
class Columns:
    """Contents of the documents' parts besides their texts.

    Args:
        dtype: of the embeddings, float32 or float16.
        thumbnail: longest side of the small pictures in pixels; 0: none.
        background: shows through transparent pixels.
        threads: that draw them.
        parts: of the embeddings, whose shares are columns; the method's, or none.
    """

    dtype: str
    thumbnail: int
    background: Colour
    threads: int
    parts: tuple[str, ...] = ()


def chunk_rows(rows: int, batch_size: int) -> int:
    """Rows of a chunk: whole batches, whatever the number of ranks."""
    batches = -(-rows // (batch_size * _CHUNKS))
    return batch_size * max(1, min(batches, _MOST_ROWS // batch_size))


def embed_documents(
    method: Method,
    embedder: Embedder,
    side: Side,
    view: str,
    columns: Columns,
    folder: Path,
    settings: Mapping[str, Any],
) -> Side:
    """Writes folder/part-NNNNN-CHECKSUM.parquet for each chunk of a side that is not there yet; collective.

    Args:
        method: in evaluation mode.
        embedder: its mesh's ranks share the chunks.
        side: the documents.
        view: what the method sees of them.
        columns: of the parts.
        folder: all ranks see it; parts of other `settings` in it are deleted.
        settings: what the vectors depend on.

    Returns:
        The documents whose images could be decoded.

    Raises:
        UserError: more images than data.max_bad_fraction allows cannot be decoded.
    """
    mesh, size = embedder.mesh, chunk_rows(len(side.ids), embedder.batch_size)
    chunks = [range(start, min(start + size, len(side.ids))) for start in range(0, len(side.ids), size)]
    mark = json.loads(json.dumps({**settings, "documents": len(side.ids), "rows": size}, default=str))
    on_first_rank(lambda: _prepare(folder, mark), mesh, "looking for finished parts")
    looked = of_all_ranks(
        lambda: [n for n in range(mesh.rank, len(chunks), mesh.world_size) if _whole(folder, n)], mesh, "reading parts"
    )
    finished = {number for part in looked for number in part}
    if finished and mesh.rank == 0:
        print(f"{len(finished):,} of {len(chunks):,} parts of the documents are there already")
    missing = [number for number in range(len(chunks)) if number not in finished]
    mine = [missing[place] for place in share(len(missing), mesh.dp.size(), mesh.dp.rank())]
    write = partial(_write, folder, columns=columns)

    def embed() -> None:
        function = partial(_explained, method) if columns.parts else partial(method.embed_document, seen=view)
        blocks = embedder.stream(method, side, function, [chunks[number] for number in mine])
        with ThreadPoolExecutor(1, "write") as pool:
            writing: Future[None] | None = None
            for number in mine:
                rows, vectors = [np.empty(0, np.int64)], []
                while sum(map(len, rows)) < len(chunks[number]) and (block := next(blocks, None)):
                    rows.append(block[0])
                    vectors.append((block[1].float().cpu().numpy(), block[2]))
                if writing is not None:  # one chunk at a time is on its way to the disk
                    writing.result()
                if number % mesh.tp.size() == mesh.tp.rank():
                    good = np.concatenate([ok for _, ok in vectors])
                    found = np.concatenate([part for part, _ in vectors])[good]
                    writing = pool.submit(write, number, side.select(np.concatenate(rows)[good]), found)
            next(blocks, None)  # ends the reader
            if writing is not None:
                writing.result()

    in_own_time(embed, mesh, "embedding the documents")
    bad: set[int] = set()
    for number in range(mesh.dp.rank(), len(chunks), mesh.dp.size()):
        written = pq.read_table(_file(folder, number), columns=["sample_id"]).column(0).to_numpy()
        bad.update(np.setdiff1d(side.sample_ids[chunks[number].start : chunks[number].stop], written).tolist())
    embedder.note_bad(side, bad)
    return side.select(~embedder.missing(side))


def _explained(method: Method, batch: Batch) -> Tensor:
    """Unit embeddings and the shares of their parts, [n, d + parts]."""
    found = method.explain_document(batch)
    return torch.cat([found.vectors, found.shares.to(found.vectors)], 1)


def place_parts(folders: Sequence[Path], documents: Path) -> None:
    """Puts the parts of all folders, one after the other, into the folder `documents` of the same disk."""
    documents.mkdir()
    files = [file for folder in folders for file in sorted(folder.glob("part-*.parquet"))]
    for number, file in enumerate(files):
        share_file(file, documents / f"part-{number:05d}.parquet")


def _prepare(folder: Path, mark: dict[str, Any]) -> None:
    """A folder of parts made with the settings `mark`, without unfinished ones."""
    file = folder / SETTINGS
    try:
        known = read_json(file)
    except UserError:
        known = None
    folder.mkdir(exist_ok=True)
    for left in folder.iterdir():
        if left != file and (known != mark or left.suffix != ".parquet"):
            left.unlink()
    if known != mark:
        write_json(file, mark)


def _file(folder: Path, number: int) -> Path:
    """The part of a chunk; its name for a part that is not there has no checksum."""
    return next(folder.glob(f"part-{number:05d}-*.parquet"), folder / f"part-{number:05d}-.parquet")


def _whole(folder: Path, number: int) -> bool:
    """True for a part that is there; one with another checksum than its name's is deleted."""
    file = _file(folder, number)
    if not file.exists():
        return False
    if checksum(file) == file.stem.rpartition("-")[2]:
        return True
    file.unlink()
    return False


def _write(folder: Path, number: int, side: Side, vectors: np.ndarray, columns: Columns) -> None:
    unfinished = folder / f"part-{number:05d}.tmp"
    try:
        write_documents(unfinished, side, vectors, columns)
        sync(unfinished)
        unfinished.rename(folder / f"part-{number:05d}-{checksum(unfinished)}.parquet")
    finally:
        unfinished.unlink(missing_ok=True)


def write_documents(file: Path, side: Side, vectors: np.ndarray, columns: Columns) -> None:
    """Writes a Parquet file of the documents of a side and their vectors float32 [n, d + parts], the shares of their
    parts behind them.
    """
    width, catalogue = vectors.shape[1] - len(columns.parts), side.catalogue
    texts = ["class_key", "item", *FIELDS, *catalogue.attributes]
    schema = pa.schema(
        [
            ("sample_id", pa.int64()),
            *((name, pa.string()) for name in texts),
            ("thumbnail", pa.binary()),
            *((f"{PART}{name}", pa.float32()) for name in columns.parts),
            ("embedding", pa.list_(pa.from_numpy_dtype(columns.dtype), width)),
        ]
    )
    small = partial(_thumbnail, side.catalogue, size=columns.thumbnail, background=columns.background)
    with pq.ParquetWriter(file, schema) as writer, ThreadPoolExecutor(columns.threads) as pool:
        for number, table in enumerate(side.read(texts, range(len(side.ids)), _ROWS)):
            vectors_of_rows, shares = np.split(vectors[number * _ROWS :][: len(table)], [width], axis=1)
            part = vectors_of_rows.astype(columns.dtype)
            thumbnails = pa.array([*pool.map(small, table["sample_id"].to_pylist())], pa.binary())
            flat = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), width)
            made = [*table.combine_chunks().columns, thumbnails, *map(pa.array, shares.T), flat]
            writer.write_table(pa.Table.from_arrays(made, schema=schema))


def _thumbnail(catalogue: Any, sample_id: int, size: int, background: Colour) -> bytes | None:
    if not size:
        return None
    image = picture(catalogue, sample_id, background)
    image.thumbnail((size, size))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
