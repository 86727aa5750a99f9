"""Embedding a catalogue's queries or documents over the ranks: what evaluation ranks and what export writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from harness.data.catalogue import Catalogue
from harness.data.loader import DataConfig, ImageReader, share
from harness.data.tokenizer import FIELDS, Tokenizer, TokenStore
from harness.mesh import Mesh
from harness.methods import Method
from harness.retrieval import Embedded
from models.batch import Batch


@dataclass(frozen=True)
class Side:
    """Queries or documents of an evaluation over all ranks: table columns as arrays of n rows, in the order of their ids.

    ids are unique over all catalogues; sample_ids count within `catalogue`; labels index class keys, -1 = relevant to nothing.
    """

    catalogue: Catalogue
    kind: str
    ids: np.ndarray
    sample_ids: np.ndarray
    labels: np.ndarray
    columns: dict[str, list[Any]]

    def select(self, rows: np.ndarray) -> Side:
        """The rows where bool [n] is true."""
        columns = {name: list(compress(values, rows)) for name, values in self.columns.items()}
        return Side(self.catalogue, self.kind, self.ids[rows], self.sample_ids[rows], self.labels[rows], columns)


def side_of(
    catalogue: Catalogue, kind: str, split: str | None, columns: list[str], keys: dict[str, int] | None, offset: int
) -> Side:
    """All samples of a kind; class keys get their labels in `keys` (None: every label is -1)."""
    table = catalogue.table(["class_key", *columns], kind=kind, split=split).to_pydict()
    labels = [-1] * len(table["sample_id"])
    if keys is not None:
        labels = [-1 if key is None else keys.setdefault(key, len(keys)) for key in table["class_key"]]
    samples = np.array(table["sample_id"], dtype=np.int64)
    return Side(catalogue, kind, samples + offset, samples, np.array(labels, dtype=np.int64), table)


class Embedder:
    """Embeds sides with a method.

    Args:
        data: the run's preprocessing and decoder.
        model: the method's configuration: embedding_dim and text.max_length.
        tokenizer: the run's tokenizer.
        batch_size: images embedded at once.
        mesh: the ranks.
    """

    def __init__(self, data: DataConfig, model: Any, tokenizer: Tokenizer, batch_size: int, mesh: Mesh) -> None:
        self.data, self.model, self.tokenizer, self.batch_size, self.mesh = data, model, tokenizer, batch_size, mesh

    def embed(self, method: Method, side: Side, seen: str = "both") -> Embedded:
        """This rank's share of a side, consecutive rows; `method` is used as it is (call eval() on its towers first).

        Args:
            method: with trained towers.
            side: queries or documents.
            seen: what the method sees of documents, one of its views.
        """
        embed = method.embed_query if side.kind == "query" else partial(method.embed_document, seen=seen)
        vectors, own = self.apply(method, side, embed, self.model.embedding_dim)
        return Embedded(vectors, *(torch.from_numpy(a[own]).to(self.mesh.device) for a in (side.ids, side.labels)))

    @torch.no_grad()
    def apply(
        self, method: Method, side: Side, function: Callable[[Batch], Tensor], width: int
    ) -> tuple[Tensor, np.ndarray]:
        """`function` (a batch to [n, width]) of the method's, for this rank's share of a side, and the numbers of its rows.

        Blocks of batch_size rows, always full, so that a vector does not depend on the number of ranks.
        """
        size, dp = self.batch_size, self.mesh.dp
        blocks = share(-(-len(side.ids) // size), dp.size(), dp.rank())
        reader = ImageReader(
            side.catalogue,
            self.data.preprocess,
            self.data.backend,
            size,
            self.data.threads,
            self.mesh.device,
            self.mesh.tp,
        )
        tokens = None
        if side.kind == "document":
            tokens = TokenStore.encode(self.tokenizer, {field: side.columns[field] for field in FIELDS})
        dtype = next(method.towers.parameters()).dtype
        found, kept = [torch.empty(0, width, device=self.mesh.device)], [np.empty(0, dtype=np.int64)]
        silent = self.mesh.rank != 0
        for block in tqdm(blocks, desc=f"embedding {side.kind}", unit=" batches", leave=False, delay=5, disable=silent):
            rows = np.arange(block * size, (block + 1) * size)
            full = np.minimum(rows, len(side.ids) - 1)
            count = int((rows < len(side.ids)).sum())
            found.append(function(self._batch(reader, side, full, tokens).to(self.mesh.device, dtype))[:count])
            kept.append(rows[:count])
        reader.close()
        return torch.cat(found), np.concatenate(kept)

    @torch.no_grad()
    def embed_texts(self, method: Method, texts: Sequence[str]) -> Embedded:
        """This rank's share of text queries; ids and labels are their places in `texts`."""
        size, dp = self.batch_size, self.mesh.dp
        blocks = share(-(-len(texts) // size), dp.size(), dp.rank())
        vectors, own = [torch.empty(0, self.model.embedding_dim, device=self.mesh.device)], [np.empty(0, np.int64)]
        store = TokenStore.encode(self.tokenizer, {"query": list(texts)})
        for block in blocks:
            rows = np.arange(block * size, min((block + 1) * size, len(texts)))
            full = np.minimum(np.arange(block * size, (block + 1) * size), len(texts) - 1)
            tokens = torch.from_numpy(store.batch(full, self.model.query.max_length, ["query"]))
            batch = Batch.of_texts(tokens).to(self.mesh.device, next(method.towers.parameters()).dtype)
            vectors.append(method.embed_query(batch)[: len(rows)])
            own.append(rows)
        ids = torch.from_numpy(np.concatenate(own)).to(self.mesh.device)
        return Embedded(torch.cat(vectors), ids, ids)

    def _batch(self, reader: ImageReader, side: Side, rows: np.ndarray, tokens: TokenStore | None) -> Batch:
        samples = side.sample_ids[rows]
        images, ok = reader.read(samples, reader.parameters(samples))
        labels, ids, weights = torch.from_numpy(side.labels[rows]), torch.from_numpy(samples), ok.float()
        length = self.model.text.max_length
        text = torch.zeros(len(rows), length, dtype=torch.int64)
        if tokens is not None:
            text = torch.from_numpy(tokens.batch(rows, length))
        return Batch(images, labels, weights, ids, images, text, labels, weights, ids)
