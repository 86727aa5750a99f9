"""Kinds of index: FAISS factory strings, memory, and the setting that trades time for recall.

Every kind finds candidates that exact vectors order afterwards (`harness/artefact/vector_index.py`), so that a lossy
one has a refinement stage outside of main memory.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from harness.artefact.flat_index import import_faiss
from harness.core.errors import UserError

FLAT = "flat"
ROWS_PER_LIST = 40  # training rows for each list; FAISS warns below 39
MOST_LISTS = 1 << 16
FLAT_ROWS = 50_000  # documents up to which comparing all of them is fast enough
_GRAPH = 32  # links of a node; twice as many on the lowest level
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class IndexKind:
    """A kind of index.

    Args:
        factory: string of FAISS's index_factory; {lists} and {parts} (sub-vectors of a product quantiser) are filled.
        knob: nprobe (lists searched), efSearch (nodes kept in a search of the graph), or empty.
        least_rows: training rows that the codes need.
    """

    factory: str
    knob: str = ""
    least_rows: int = 1

    def make(self, width: int, rows: int) -> Any:
        """FAISS's empty index.

        Raises:
            UserError: too few rows for its codes.
        """
        if rows < self.least_rows:
            raise UserError(
                f"an index of this kind ({self.factory}) is trained on {self.least_rows:,} documents or more, there "
                f"are {rows:,}",
                "Take --index.kind flat",
            )
        faiss = import_faiss()
        described = self.factory.format(lists=lists(rows), parts=parts(width))
        return faiss.index_factory(width, described, faiss.METRIC_INNER_PRODUCT)

    def ram_bytes(self, width: int, rows: int) -> int:
        """Bytes of the index in memory, which are those of its files: codes, ids, links, centroids."""
        faiss, index = import_faiss(), self.make(width, max(rows, self.least_rows))
        if self.knob == "efSearch":
            links = 4 * _GRAPH * (2 + 1 / (_GRAPH - 1))  # int32; each level has 1 / _GRAPH of the nodes below it
            return int(rows * (faiss.downcast_index(index.storage).code_size + links + 8 + 4))  # offset and level
        if self.knob == "nprobe":
            ivf = faiss.extract_index_ivf(index)
            books = 4 * 256 * width + 4 * width * width if "OPQ" in self.factory else 0
            return int(rows * (ivf.code_size + 8) + 4 * ivf.nlist * width + books)
        return int(rows * index.code_size)

    def parameters(self, effort: int, selector: Any = None, transformed: bool = False) -> Any:
        """FAISS's parameters of a search.

        Args:
            effort: value of the knob.
            selector: rows that may be found; None: all.
            transformed: the index has a transform before its lists (OPQ).
        """
        faiss = import_faiss()
        chosen = {} if selector is None else {"sel": selector}
        if self.knob == "efSearch":
            return faiss.SearchParametersHNSW(efSearch=effort, **chosen)
        if self.knob == "nprobe":
            inner = faiss.SearchParametersIVF(nprobe=effort, **chosen)
            return faiss.SearchParametersPreTransform(index_params=inner) if transformed else inner
        return faiss.SearchParameters(**chosen)


# Best recall for its time first. Sizes are for width d.
KINDS = {
    FLAT: IndexKind("Flat"),  # 4 d bytes a document; exact
    "hnsw": IndexKind("HNSW32,Flat", "efSearch"),  # 4 d + 272
    "hnsw_bf16": IndexKind("HNSW32,SQbf16", "efSearch"),  # 2 d + 272
    "ivf_flat": IndexKind("IVF{lists},Flat", "nprobe"),  # 4 d + 8
    "sq_fp16": IndexKind("SQfp16"),  # 2 d
    "sq_bf16": IndexKind("SQbf16"),  # 2 d
    "ivf_sq8": IndexKind("IVF{lists},SQ8", "nprobe"),  # d + 8
    "sq8": IndexKind("SQ8"),  # d
    "ivf_rabitq": IndexKind("IVF{lists},RaBitQ4", "nprobe"),  # d / 2 + 28
    "ivf_pq": IndexKind("OPQ{parts},IVF{lists},PQ{parts}", "nprobe", 39 * 256),  # d / 4 + 8
}
_PROPOSED = ("hnsw", "hnsw_bf16", "ivf_sq8", "ivf_rabitq", "ivf_pq")


def lists(rows: int) -> int:
    """Inverted lists of an index: a power of two near 4 sqrt(rows), each with ROWS_PER_LIST rows to train it."""
    wanted = 1 << round(math.log2(4 * math.sqrt(max(rows, 1))))
    return max(1, min(wanted, rows // ROWS_PER_LIST, MOST_LISTS))


def parts(width: int) -> int:
    """Sub-vectors of a product quantiser: as many as divide the width into at least 4 numbers each."""
    return max(part for part in range(1, max(1, width // 4) + 1) if width % part == 0)


def choose_kind(kind: str, ram: str, width: int, rows: int) -> str:
    """The kind to build: `kind`, or for 'auto' flat, within `ram` the first proposal that fits.

    Raises:
        UserError: `ram` is not an amount, or too little.
    """
    if kind == "auto" and not ram:
        return FLAT
    sizes = {name: KINDS[name].ram_bytes(width, rows) for name in (FLAT, *_PROPOSED)}
    if not ram:
        return kind
    room = amount(ram)
    order = (FLAT, *_PROPOSED) if rows <= FLAT_ROWS else (*_PROPOSED, FLAT)
    proposal = next((name for name in order if sizes[name] <= room), "")
    told = f"{rows:,} vectors of {width} numbers"
    if kind == "auto":
        if not proposal:
            least = min(sizes, key=sizes.__getitem__)
            raise UserError(
                f"--index.ram {ram} is too little for {told}",
                f"The smallest kind, {least}, takes {shown(sizes[least])}",
            )
        return proposal
    if (needed := KINDS[kind].ram_bytes(width, rows)) > room:
        remedy = f"Take --index.kind {proposal}" if proposal else "Allow more"
        raise UserError(f"--index.kind {kind} takes {shown(needed)} for {told}, more than --index.ram {ram}", remedy)
    return kind


def amount(text: str) -> int:
    """Bytes of an amount like 500MB or 2 GB.

    Raises:
        UserError: it is not one.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text.upper())
    if not found:
        raise UserError(f"--index.ram is '{text}'", "Write an amount of memory, as 500MB or 2GB")
    return int(float(found[1]) * _UNITS[found[2]])


def shown(size: float) -> str:
    """Bytes in words."""
    unit, factor = next(((u, f) for u, f in reversed(_UNITS.items()) if size >= f), ("", 1))
    return f"{size / factor:.3g} {unit}B"
