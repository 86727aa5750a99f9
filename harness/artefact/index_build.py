"""Building of an index from vectors on disk: trained on a sample, filled by shards on all ranks, merged on disk.

No rank holds more than a shard of vectors or codes, except rank 0 with a kind without lists, whose index it holds.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from harness.artefact.flat_index import FILE, import_faiss
from harness.artefact.index_kinds import ROWS_PER_LIST, IndexKind
from harness.artefact.vectors_file import sample
from harness.core.errors import UserError
from harness.core.waiting import in_own_time, on_first_rank

if TYPE_CHECKING:
    from harness.core.mesh import Mesh

_SHARD_ROWS = 1 << 20
_BLOCK = 1 << 14  # vectors added at once
_COARSE_ROUNDS = 10
_CODE_ROWS = 1 << 16  # that train a product quantiser, 256 for each of its 256 values
_SCALE_ROWS = 1 << 14  # that train anything else: ranges of a scalar quantiser, a rotation
_CODE_ROUNDS = 25
_ROTATION_ROUNDS = 4


def build_index(
    kind: IndexKind, vectors: np.ndarray, stage: Path, threads: int, mesh: Mesh, old: Path | None = None, first: int = 0
) -> None:
    """Writes stage/index.faiss; collective.

    Args:
        kind: not flat, which `harness.artefact.flat_index` writes.
        vectors: float32 or float16 [n, d], mapped from a file that all ranks see.
        stage: a folder that all ranks see.
        threads: of this rank.
        mesh: the ranks.
        old: index of the `first` vectors, of this kind, to which the others are added without training; None: there
            is none.
        first: vectors in `old`.
    """
    trained, rows, listed, faiss = stage / "trained.faiss", len(vectors), kind.knob == "nprobe", import_faiss()

    def train() -> None:
        use_threads(threads, alone=True)
        if old is None:
            index = kind.make(vectors.shape[1], rows)
            train_index(index, vectors)
        else:
            index = faiss.read_index(str(old), faiss.IO_FLAG_MMAP if listed else 0)
        if listed:
            _empty(index)
        else:
            add(index, vectors, range(first, rows))
        faiss.write_index(index, str(trained if listed else stage / FILE))

    on_first_rank(train, mesh, "training the index" if listed else "building the index")
    if not listed:
        return
    size = shard_rows(rows - first, mesh)
    shards = [range(start, min(start + size, rows)) for start in range(first, rows, size)]
    files = [stage / f"index-{number:05d}.faiss" for number in range(len(shards))]

    def fill() -> None:
        use_threads(threads)
        for number in range(mesh.rank, len(shards), mesh.world_size):
            index = faiss.read_index(str(trained))
            add(index, vectors, shards[number], mesh.rank == 0)
            faiss.write_index(index, str(files[number]))

    def merge() -> None:
        _merge(stage / FILE, trained, [*([] if old is None else [old]), *files])
        for file in (trained, *files):
            file.unlink()

    in_own_time(fill, mesh, "filling the index")
    on_first_rank(merge, mesh, "merging the index")


def _empty(index: Any) -> None:
    """Takes all vectors out of an index with lists, which may be mapped."""
    ivf = index_lists(index)
    lists = import_faiss().ArrayInvertedLists(ivf.nlist, ivf.code_size)
    ivf.replace_invlists(lists, True)
    lists.this.disown()
    index.ntotal = ivf.ntotal = 0


def _merge(merged: Path, trained: Path, files: Sequence[Path]) -> None:
    """Writes an index list by list from those of `files`, which are mapped, not read; FAISS's merge_ondisk would write
    the lists into a second file, found by its path on this machine.
    """
    faiss = import_faiss()
    shards = [faiss.read_index(str(file), faiss.IO_FLAG_MMAP) for file in files]
    parts = [index_lists(shard).invlists for shard in shards]
    index = faiss.read_index(str(trained))
    ivf = index_lists(index)
    sizes = [[part.list_size(number) for part in parts] for number in range(ivf.nlist)]
    totals = np.array(sizes, np.int64).sum(1)
    index.ntotal = ivf.ntotal = int(totals.sum())
    head, kind = faiss.serialize_index(index).tobytes(), struct.pack("<4sqq", b"ilar", ivf.nlist, ivf.code_size)
    if head[-32:] != kind + b"sprs" + bytes(8):  # no list has a vector
        raise UserError(f"faiss {faiss.__version__} writes lists in an unknown format", "Take faiss 1.15")
    with merged.open("wb") as out:
        out.write(head[:-32] + kind + b"full" + struct.pack("<q", ivf.nlist) + totals.tobytes())
        for number in range(ivf.nlist):
            for read, width in ((_codes, ivf.code_size), (_ids, 1)):
                for part, size in zip(parts, sizes[number], strict=True):
                    if size:
                        out.write(read(part, number, size * width).tobytes())


def _codes(part: Any, number: int, size: int) -> np.ndarray:
    found: np.ndarray = import_faiss().rev_swig_ptr(part.get_codes(number), size)
    return found


def _ids(part: Any, number: int, size: int) -> np.ndarray:
    found: np.ndarray = import_faiss().rev_swig_ptr(part.get_ids(number), size)
    return found


def use_threads(threads: int, alone: bool = False) -> None:
    """Lets FAISS use so many threads; those of the other ranks of this node too, while they wait for this one."""
    others = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if alone else 1
    import_faiss().omp_set_num_threads(threads * others)


def add(index: Any, vectors: np.ndarray, rows: range, shown: bool = True) -> None:
    """Adds consecutive rows, whose numbers are their ids."""
    starts = range(rows.start, rows.stop, _BLOCK)
    for start in tqdm(starts, "adding vectors", unit=f" x {_BLOCK:,}", leave=False, delay=5, disable=not shown):
        block = np.asarray(vectors[start : min(start + _BLOCK, rows.stop)], np.float32)
        if index_lists(index) is None:
            index.add(block)
        else:
            index.add_with_ids(block, np.arange(start, start + len(block)))


def index_lists(index: Any) -> Any:
    """The part of an index with inverted lists, as what it is; None where it has none."""
    found = import_faiss().try_extract_index_ivf(index)
    return found and import_faiss().downcast_index(found)


def train_index(index: Any, vectors: np.ndarray) -> None:
    """Trains rotation, lists and codes in turn, each on a sample of its own size."""
    for _, rows, rounds, step in training(index, len(vectors)):
        step(sample(vectors, rows), rounds)


def training(index: Any, rows: int) -> list[tuple[str, int, int, Callable[[np.ndarray, int], None]]]:
    """Steps of the training of an index of so many rows: name, rows of its sample, rounds over them, and what does it,
    given a sample float32 [n, d] and rounds. Time is proportional to rows x rounds.
    """
    faiss, ivf = import_faiss(), index_lists(index)
    steps: list[tuple[str, int, int, Callable[[np.ndarray, int], None]]] = []
    rotation: Any = faiss.downcast_VectorTransform(index.chain.at(0)) if hasattr(index, "chain") else None

    def rotated(x: np.ndarray) -> np.ndarray:
        turned: np.ndarray = x if rotation is None else rotation.apply(x)
        return turned

    def rotate(x: np.ndarray, rounds: int) -> None:
        rotation.niter, rotation.niter_pq_0, rotation.niter_pq = rounds, 4, 4
        rotation.train(x)

    def cluster(x: np.ndarray, rounds: int) -> None:
        kmeans = faiss.Clustering(ivf.d, ivf.nlist)
        kmeans.niter, kmeans.spherical, kmeans.max_points_per_centroid = rounds, True, len(x)
        kmeans.min_points_per_centroid = 1  # of a calibration
        centroids = faiss.downcast_index(ivf.quantizer)
        centroids.reset()
        kmeans.train(rotated(x), on_gpus(centroids))
        if not centroids.ntotal:  # clustered on GPUs
            centroids.add(faiss.vector_to_array(kmeans.centroids).reshape(ivf.nlist, ivf.d))

    def fit_codes(x: np.ndarray, rounds: int) -> None:
        if product:
            ivf.pq.cp.niter, ivf.pq.cp.min_points_per_centroid = rounds, 1  # of a calibration
            ivf.do_polysemous_training = False  # its order of the codes is for filters by Hamming distance
        (index if ivf is None else ivf).train(rotated(x))
        index.is_trained = True

    sampled, product = min(rows, _SCALE_ROWS), hasattr(ivf, "pq")
    if rotation is not None:
        steps.append(("rotation", sampled, _ROTATION_ROUNDS, rotate))
    if ivf is not None:
        steps.append(("lists", min(rows, ROWS_PER_LIST * ivf.nlist), _COARSE_ROUNDS, cluster))
    if not index.is_trained:
        steps.append(
            ("codes", min(rows, _CODE_ROWS) if product else sampled, _CODE_ROUNDS if product else 1, fit_codes)
        )
    return steps


def on_gpus(index: Any) -> Any:
    """A copy of an index on all GPUs that FAISS sees; the index itself without one, and with faiss-cpu."""
    faiss = import_faiss()
    return faiss.index_cpu_to_all_gpus(index) if faiss.get_num_gpus() else index


def shard_rows(rows: int, mesh: Mesh) -> int:
    """Rows of a shard: an equal share of a rank, but no more than are held at once."""
    return max(1, min(_SHARD_ROWS, -(-rows // mesh.world_size)))
