"""Shops with known classes for `harness.bench.governance`: synthetic ones, and a catalogue with a class column."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from harness.bench.catalogues import write_bare
from harness.catalogue.catalogue import Catalogue
from harness.catalogue.synth.clicks import Log, LogShape, Truth, make_truth

GROUP, DIM, SPLIT = 20, 64, "train"


@dataclass(frozen=True)
class Shop:
    """A shop to draw click logs for.

    truth: its classes. shape: its logs. folder: a catalogue without images. queries, documents: int64, the sample id of
    each query and document of `truth`. embeddings: of the samples, as `shelfmark govern` takes them.
    """

    truth: Truth
    shape: LogShape
    folder: Path
    queries: np.ndarray
    documents: np.ndarray
    embeddings: tuple[Path, ...]

    def write_log(self, log: Log) -> Path:
        """Writes a log of this shop as Parquet."""
        queries, documents = (pa.array(_names(ids)) for ids in (self.queries, self.documents))
        pq.write_table(log.table(queries, documents), self.folder / "clicks.parquet")
        return self.folder / "clicks.parquet"


def synthetic(
    folder: Path, classes: int, shape: LogShape, queries: float = 8.0, documents: float = 2.0, signal: float = 0.75
) -> Shop:
    """A shop of geometric classes, with random embeddings around the direction of their class.

    Args:
        folder: to make.
        classes: their number.
        shape: of the logs; its seed is also that of the classes and embeddings.
        queries: mean of a class.
        documents: mean of a class.
        signal: mean cosine of an embedding with its class's direction, of which classes of a group share a half.
    """
    truth = make_truth(classes, queries, documents, GROUP, shape.seed)
    labels = np.concatenate([truth.query_class, truth.document_class])
    kinds = np.repeat(["query", "document"], [len(truth.query_class), len(truth.document_class)])
    _write(folder, kinds)
    rng = np.random.default_rng([shape.seed, 0])
    group, own = (_unit(rng.normal(size=(count, DIM))) for count in (truth.group_of.max() + 1, len(truth.group_of)))
    centre = _unit(group[truth.group_of] + own)[labels]
    vectors = signal * centre + (1 - signal**2) ** 0.5 * _unit(rng.normal(size=centre.shape))
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel(), pa.float32()), DIM)
    file, numbers = folder / "embeddings.parquet", np.arange(len(labels))
    pq.write_table(pa.table({"sample_id": numbers, "embedding": column.cast(pa.list_(pa.float32()))}), file)
    return Shop(truth, shape, folder, numbers[kinds == "query"], numbers[kinds == "document"], (file,))


def real(folder: Path, path: Path, shape: LogShape, embeddings: tuple[Path, ...]) -> Shop:
    """The samples of a catalogue's split train, with its class column as truth.

    Args:
        folder: to make; the catalogue stays as it is.
        path: the catalogue.
        shape: of the logs.
        embeddings: of the catalogue's samples.
    """
    catalogue = Catalogue(path)
    truth, queries, documents = truth_of(catalogue)
    _write(folder, catalogue.table(["kind"])["kind"].to_numpy())
    return Shop(truth, shape, folder, queries, documents, embeddings)


def truth_of(catalogue: Catalogue) -> tuple[Truth, np.ndarray, np.ndarray]:
    """The class column of a catalogue's split train as truth, and the sample ids, int64, of its queries and documents.
    Products of a category look alike.
    """
    category = "category" if "category" in catalogue.attributes else "class_key"
    table = catalogue.table(["kind", *{"class_key", category}], split=SPLIT)
    ids, kinds, keys, categories = (table[name].to_numpy() for name in ("sample_id", "kind", "class_key", category))
    known = np.isin(keys, keys[kinds == "document"])  # a query whose class has no document finds nothing
    ids, kinds, keys, categories = ids[known], kinds[known], keys[known].astype(str), categories[known].astype(str)
    names, labels = np.unique(keys, return_inverse=True)
    group = np.zeros(len(names), np.int64)
    group[labels] = np.unique(categories, return_inverse=True)[1]
    is_query = kinds == "query"
    order = np.argsort(labels[~is_query], kind="stable")
    return Truth(labels[is_query], labels[~is_query][order], group), ids[is_query], ids[~is_query][order]


def _names(ids: np.ndarray) -> list[str]:
    return [f"s{number:09d}" for number in ids]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _write(folder: Path, kinds: np.ndarray) -> None:
    """A catalogue of samples of these kinds, all in split train and without classes."""
    write_bare(folder, [{"item": _names(np.arange(len(kinds))), "kind": kinds, "split": SPLIT}])
