"""Reading of an artefact's index: a file of a stranger, whose sizes are compared with what it should be before FAISS
allocates memory, and whose links are checked before FAISS follows them.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from harness.artefact.flat_index import FILE, import_faiss, read_index
from harness.artefact.index_build import index_lists
from harness.artefact.index_kinds import FLAT, KINDS
from harness.artefact.vector_index import VectorIndex
from harness.artefact.vectors_file import open_vectors
from harness.core.errors import UserError
from harness.core.files import Record

MOST_EFFORT = 1 << 24
MOST_FACTOR = 1 << 10


def open_index(folder: Path, record: Record, width: int, count: int) -> VectorIndex:
    """The index of `count` vectors, as artefact.json describes it.

    Raises:
        UserError: a file is missing or differs from such an index, or its description is damaged.
    """
    described = Record(record.file, record.get("index", dict), record.remedy)
    name = described.get("kind", str)
    if name not in KINDS:
        described.refuse(f"index.kind is not one of {', '.join(KINDS)}")
    if name == FLAT:
        return VectorIndex(read_index(folder, width, count))
    settings, knob = Record(record.file, described.get("parameters", dict), record.remedy), KINDS[name].knob
    effort = settings.number(knob, MOST_EFFORT, 1) if knob else 0
    factor = settings.number("k_factor", MOST_FACTOR, 1)
    exact = open_vectors(folder, width, count)
    return VectorIndex(read_kind(folder / FILE, name, width, count), name, exact, effort, factor)


def read_kind(file: Path, name: str, width: int, count: int) -> Any:
    """FAISS's index of a kind but flat, checked.

    Raises:
        UserError: the file differs from such an index of `count` vectors.
    """
    faiss, kind = import_faiss(), KINDS[name]
    like = kind.make(width, count)
    fault = UserError(f"{file} is not a {name} index of {count:,} vectors of {width} numbers", "Export again")
    with file.open("rb") as opened:
        head = opened.read(16)
    if head != faiss.serialize_index(like)[:4].tobytes() + struct.pack("<iq", width, count):
        raise fault
    limit = faiss.get_deserialization_vector_byte_limit()
    empty = index_lists(like)
    # FAISS computes tables of a product quantiser when it reads one, within the same limit.
    tables = 4 * empty.nlist * empty.pq.M * empty.pq.ksub if hasattr(empty, "pq") else 0
    try:
        faiss.set_deserialization_vector_byte_limit(file.stat().st_size + tables)
        # Lists stay in the file, which is mapped.
        index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP if kind.knob == "nprobe" else 0)
    except (RuntimeError, MemoryError) as error:
        raise fault from error
    finally:
        faiss.set_deserialization_vector_byte_limit(limit)
    if not _alike(index, like, count) or (kind.knob == "efSearch" and not _sound_graph(index.hnsw, count)):
        raise fault
    return index


def _alike(index: Any, like: Any, count: int) -> bool:
    """True if an index has the type and the sizes of an empty one, and so many rows."""
    faiss, lists, empty = import_faiss(), index_lists(index), index_lists(like)
    alike = type(index) is type(like) and (index.d, index.ntotal) == (like.d, count) and index.is_trained
    alike = alike and index.metric_type == faiss.METRIC_INNER_PRODUCT
    if not alike or (lists is None) != (empty is None):
        return False
    if lists is None:
        stored, wanted = (faiss.downcast_index(getattr(part, "storage", part)) for part in (index, like))
        found = (stored.d, stored.ntotal, stored.code_size)
        return isinstance(stored, type(wanted)) and found == (like.d, count, wanted.code_size)
    centroids = faiss.downcast_index(lists.quantizer)
    sizes = (type(lists), lists.d, lists.nlist, lists.code_size, lists.ntotal)
    return (
        sizes == (type(empty), empty.d, empty.nlist, empty.code_size, count)
        and (lists.invlists.nlist, lists.invlists.code_size) == (empty.nlist, empty.code_size)
        and isinstance(centroids, faiss.IndexFlat)
        and (centroids.d, centroids.ntotal) == (empty.d, empty.nlist)
        and sum(lists.invlists.list_size(n) for n in range(lists.nlist)) == count
    )


def _sound_graph(graph: Any, count: int) -> bool:
    """True if every link leads to a node, and every node's links lie in the table."""
    faiss = import_faiss()
    levels, cumulated = faiss.vector_to_array(graph.levels), faiss.vector_to_array(graph.cum_nneighbor_per_level)
    offsets = faiss.vector_to_array(graph.offsets).astype(np.int64)
    links = faiss.rev_swig_ptr(graph.neighbors.data(), graph.neighbors.size())
    if len(levels) != count or len(offsets) != count + 1 or not 0 <= graph.entry_point < count or offsets[0]:
        return False
    if levels.min() < 1 or levels.max() >= len(cumulated) or graph.max_level != levels[graph.entry_point] - 1:
        return False
    whole = (np.diff(offsets) == cumulated[levels]).all() and offsets[-1] == len(links)
    return bool(whole and links.min() >= -1 and links.max() < count)
