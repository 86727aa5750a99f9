"""Embedding a catalogue's queries or documents over the ranks: what evaluation ranks and what export writes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from tqdm import tqdm

from harness.catalogue.catalogue import Catalogue
from harness.core.errors import UserError
from harness.core.files import printable
from harness.core.mesh import Mesh
from harness.core.waiting import gather_objects
from harness.data.config import DataConfig
from harness.data.images import ImageReader, Pixels
from harness.evaluate.coded import Coded, encoded
from harness.evaluate.ranking import Embedded
from harness.text.tokenizer import FIELDS, Tokenizer, TokenStore
from models.batch import Batch
from models.comm import share
from models.method import Method, MethodConfig


@dataclass(frozen=True)
class Side:
    """Queries or documents of an evaluation over all ranks, n rows in the order of their ids; every rank holds these
    numbers of all of them.

    ids are unique over all catalogues; sample_ids count within `catalogue`; labels number class keys, -1 = relevant to
    nothing. columns are attributes. Titles and descriptions stay in the catalogue: `read` streams them. `retitle` is
    what a title is read as.
    """

    catalogue: Catalogue
    kind: str
    ids: np.ndarray
    sample_ids: np.ndarray
    labels: np.ndarray
    columns: dict[str, Coded]
    retitle: Callable[[str | None], str] | None = None

    def select(self, rows: np.ndarray) -> Side:
        """The rows where bool [n] is true, or ascending rows int64 [m]."""
        columns = {name: column.take(rows) for name, column in self.columns.items()}
        ids, sample_ids, labels = (array[rows] for array in (self.ids, self.sample_ids, self.labels))
        return replace(self, ids=ids, sample_ids=sample_ids, labels=labels, columns=columns)

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        """The row of each id, -1 of those that it does not have; int64, the shape of `ids`."""
        place = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.where(self.ids[place] == ids, place, -1)

    def read(self, columns: Sequence[str], rows: range, at_once: int) -> Iterator[pa.Table]:
        """The catalogue's columns of consecutive rows, `at_once` rows at a time; the last time what is left."""
        wanted = self.sample_ids[rows.start : rows.stop]
        ends = (wanted[0], wanted[-1]) if len(wanted) else (0, -1)
        held: list[pa.RecordBatch] = []
        for batch in self.catalogue.batches([*columns], between=ends):
            samples = batch.column("sample_id").to_numpy()
            place = np.minimum(np.searchsorted(wanted, samples), len(wanted) - 1)
            held.append(batch.filter(pa.array(wanted[place] == samples)))
            table = pa.Table.from_batches(held)
            whole = len(table) - len(table) % at_once
            for start in range(0, whole, at_once):
                yield table.slice(start, at_once)
            held = table.slice(whole).to_batches()
        if any(len(batch) for batch in held):
            yield pa.Table.from_batches(held)

    def filled(self, name: str) -> np.ndarray:
        """bool [n]: whether a column has a text, and not an empty one."""
        if name in self.columns:
            return self.columns[name].filled()
        pieces = (
            pc.fill_null(pc.greater(pc.binary_length(table[name]), 0), False).to_numpy()
            for table in self.read([name], range(len(self.ids)), _AT_ONCE)
        )
        return np.concatenate([np.empty(0, bool), *pieces])


_AT_ONCE = 8192
NAMED = 10  # samples in a message


class ClassKeys:
    """Numbers class keys: equal ones alike on every rank, and in all sides that are read with it.

    keys: key of each number.
    """

    def __init__(self) -> None:
        self.keys = pa.array([], pa.large_string())

    def numbers(self, column: Coded) -> np.ndarray:
        """int64 [n], -1 where there is none; keys that are new get the next numbers."""
        found = pc.index_in(column.values, value_set=self.keys)
        new = pc.is_null(found).to_numpy(zero_copy_only=False)
        numbers = found.fill_null(0).to_numpy().astype(np.int64)
        numbers[new] = len(self.keys) + np.arange(int(new.sum()))
        self.keys = pa.concat_arrays([self.keys, column.values.filter(pa.array(new))])
        return np.append(numbers, -1)[column.codes]


def side_of(
    catalogue: Catalogue, kind: str, split: str | None, columns: Sequence[str], keys: ClassKeys | None, offset: int
) -> Side:
    """All samples of a kind, with attributes `columns`; class keys get their labels from `keys` (None: every label is
    -1).
    """
    names = [*(["class_key"] if keys is not None else []), *columns]
    pieces: dict[str, list[pa.DictionaryArray]] = {name: [] for name in names}
    found = [np.empty(0, np.int64)]
    for batch in catalogue.batches(names, kind=kind, split=split):
        if len(batch):
            found.append(batch.column("sample_id").to_numpy())
            for name in names:
                pieces[name].append(encoded(batch.column(name)))
    samples = np.concatenate(found)
    coded = {name: Coded.of(pieces.pop(name)) for name in names}  # pieces go as their numbers come
    labels = np.full(len(samples), -1) if keys is None else keys.numbers(coded["class_key"])
    ids = samples + offset if offset else samples
    return Side(catalogue, kind, ids, samples, labels, {name: coded[name] for name in columns})


class Embedder:
    """Embeds sides with a method.

    Args:
        data: the run's preprocessing and decoder.
        model: the method's configuration.
        tokenizer: the run's tokenizer; None for a model that reads no texts.
        batch_size: images embedded at once.
        mesh: the ranks.
    """

    def __init__(
        self, data: DataConfig, model: MethodConfig, tokenizer: Tokenizer | None, batch_size: int, mesh: Mesh
    ) -> None:
        self.data, self.model, self.tokenizer, self.batch_size, self.mesh = data, model, tokenizer, batch_size, mesh
        self._bad: dict[Path, set[int]] = {}  # samples of each catalogue that could not be decoded, of all ranks

    def missing(self, side: Side) -> np.ndarray:
        """bool [n]: rows of a side that has been embedded whose images could not be decoded."""
        return np.isin(side.sample_ids, [*self._bad.get(side.catalogue.path, ())])

    def embed(self, method: Method, side: Side, seen: str = "both") -> Embedded:
        """This rank's share of a side, consecutive rows but for those whose images cannot be decoded; `method` is used
        as it is (call eval() on its towers first). Collective.

        Args:
            method: with trained towers.
            side: queries or documents.
            seen: what the method sees of documents, one of its views.

        Raises:
            UserError: more images than data.max_bad_fraction allows cannot be decoded.
        """
        function = method.embed_query if side.kind == "query" else partial(method.embed_document, seen=seen)
        return self.embed_by(method, side, function, self.model.embedding_dim)

    def embed_by(self, method: Method, side: Side, function: Callable[[Batch], Tensor], width: int) -> Embedded:
        """As `embed`, with a `function` of the method's for the vectors, [n, width]."""
        vectors, own = self.apply(method, side, function, width)
        good = ~self.missing(side)[own.start : own.stop]
        numbers = (torch.from_numpy(a[own.start : own.stop][good]) for a in (side.ids, side.labels))
        if not good.all():
            vectors = vectors[torch.from_numpy(good).to(vectors.device)]
        return Embedded(vectors, *(number.to(self.mesh.device) for number in numbers))

    @torch.no_grad()
    def apply(
        self, method: Method, side: Side, function: Callable[[Batch], Tensor], width: int
    ) -> tuple[Tensor, range]:
        """`function` (a batch to [n, width]) of the method's for this rank's share of a side, float32, and the numbers
        of its rows; collective. Rows of images that cannot be decoded hold a number for a grey picture (see `missing`).
        """
        own = self._own(len(side.ids))
        found = torch.empty(len(own), width, device=self.mesh.device)
        bad: set[int] = set()
        for rows, vectors, ok in self.stream(method, side, function, [own]):
            found[rows[0] - own.start : rows[-1] + 1 - own.start] = vectors
            bad.update(side.sample_ids[rows[~ok]].tolist())
        self.note_bad(side, bad)
        return found, own

    @torch.no_grad()
    def stream(
        self, method: Method, side: Side, function: Callable[[Batch], Tensor], ranges: Sequence[range]
    ) -> Iterator[tuple[np.ndarray, Tensor, np.ndarray]]:
        """`function` of the method's for ranges of rows, block by block: rows int64 [b], vectors [b, width], and bool
        [b], False where an image cannot be decoded. The same on all ranks that share the towers.

        Blocks of batch_size rows, filled up at the end of a range, so that a vector does not depend on the number of
        ranks.
        """
        size = self.batch_size
        dtype = next(method.towers.parameters()).dtype

        def blocks() -> Iterator[np.ndarray]:
            for own in ranges:
                for start in range(own.start, own.stop, size):
                    yield np.minimum(np.arange(start, start + size), own.stop - 1)

        texts = itertools.chain.from_iterable(self._tokens(side, own) for own in ranges)
        total, silent = sum(-(-len(own) // size) for own in ranges), self.mesh.rank != 0
        shown = tqdm(blocks(), f"embedding {side.kind}", total, unit=" batches", leave=False, delay=5, disable=silent)
        with closing(self.reader(side.catalogue)) as reader:
            pixels = reader.stream(side.sample_ids[rows] for rows in blocks())
            for rows, images, text in zip(shown, pixels, texts, strict=True):
                batch = self._batch(side, rows, images, text[rows - rows[0]])
                vectors, count = function(batch.to(self.mesh.device, dtype)), len(text)
                yield rows[:count], vectors[:count], images.ok[:count].cpu().numpy()

    def note_bad(self, side: Side, own: set[int]) -> None:
        """Remembers and names images of all ranks that could not be decoded, `own` of this one; collective.

        Raises:
            UserError: more than one, and more than data.max_bad_fraction allows; on all ranks.
        """
        known = self._bad.setdefault(side.catalogue.path, set())
        bad, total = set().union(*gather_objects(own, self.mesh.dp)), len(side.ids)
        new = sorted(bad - known)
        known |= bad
        if not new:
            return
        named = side.catalogue.rows(new[:NAMED], ["image"])
        names = ", ".join(f"{row['sample_id']} ({printable(row['image'])})" for row in named)
        what = f"{len(bad):,} of {total:,} {side.kind} images of {side.catalogue.path} cannot be decoded"
        which = f"samples {names}{f' and {len(new) - NAMED:,} more' if len(new) > NAMED else ''}"
        if len(bad) > 1 and len(bad) > self.data.max_bad_fraction * total:
            raise UserError(
                f"{what}, more than data.max_bad_fraction = {self.data.max_bad_fraction:g} allows: {which}",
                "Name damaged shards with `shelfmark verify` and restore them, ingest without these images, or raise "
                "data.max_bad_fraction",
            )
        if self.mesh.rank == 0:
            print(f"{what} and are left out: {which}")

    @torch.no_grad()
    def embed_texts(self, method: Method, texts: Sequence[str]) -> Embedded:
        """This rank's share of text queries, which the method takes; ids and labels are their places in `texts`."""
        query = self.model.query_text
        assert query is not None and self.tokenizer is not None, "the method takes texts"
        size, own = self.batch_size, self._own(len(texts))
        vectors = torch.empty(len(own), self.model.embedding_dim, device=self.mesh.device)
        for start in range(own.start, own.stop, size):
            part = [*texts[start : min(start + size, own.stop)]]
            store = TokenStore.encode(self.tokenizer, {"query": part})
            full = np.minimum(np.arange(size), len(part) - 1)
            tokens = torch.from_numpy(store.batch(full, query.max_length, ["query"]))
            batch = Batch.of_texts(tokens).to(self.mesh.device, next(method.towers.parameters()).dtype)
            vectors[start - own.start : start - own.start + size] = method.embed_query(batch)[: len(part)]
        ids = torch.arange(own.start, own.stop, device=self.mesh.device)
        return Embedded(vectors, ids, ids)

    def reader(self, catalogue: Catalogue) -> ImageReader:
        """Reader of a catalogue's images; to be closed."""
        data, mesh = self.data, self.mesh
        return ImageReader(
            catalogue, data.preprocess, data.backend, self.batch_size, data.threads, mesh.device, mesh.tp
        )

    def _own(self, rows: int) -> range:
        """This rank's share of so many rows: whole blocks, but for the end."""
        blocks = share(-(-rows // self.batch_size), self.mesh.dp.size(), self.mesh.dp.rank())
        return range(min(blocks.start * self.batch_size, rows), min(blocks.stop * self.batch_size, rows))

    def _tokens(self, side: Side, own: range) -> Iterator[Tensor]:
        """Tokens [n, L] of the documents of each block, none of queries; those on disk where they are of the run's
        tokenizer.
        """
        length, size = self.model.text.max_length, self.batch_size
        stored = self._stored(side)
        if side.kind == "query" or stored is not None or self.tokenizer is None:
            for start in range(own.start, own.stop, size):
                samples = side.sample_ids[start : min(start + size, own.stop)]
                none = torch.zeros(len(samples), length, dtype=torch.int64)
                yield none if stored is None else torch.from_numpy(stored.batch(samples, length))
            return
        for table in side.read(FIELDS, own, size):
            texts = {field: table[field].to_pylist() for field in FIELDS}
            if side.retitle is not None:
                texts["title"] = [*map(side.retitle, texts["title"])]
            store = TokenStore.encode(self.tokenizer, texts)
            yield torch.from_numpy(store.batch(np.arange(len(table)), length))

    def _stored(self, side: Side) -> TokenStore | None:
        if side.kind == "query" or side.retitle is not None or self.tokenizer is None:
            return None
        try:
            store = TokenStore.open(side.catalogue.path)
        except UserError:  # it has none, or grew since
            return None
        return store if store.checksum == self.tokenizer.checksum else None

    def _batch(self, side: Side, rows: np.ndarray, pixels: Pixels, text: Tensor) -> Batch:
        samples, (images, ok) = side.sample_ids[rows], pixels
        labels, ids, weights = torch.from_numpy(side.labels[rows]), torch.from_numpy(samples), ok.float()
        # Without lengths texts keep their padding: cut to the longest of a batch, a vector would depend on its batch in
        # the last digits.
        return Batch(images, labels, weights, ids, images, text, labels, weights, ids)
