"""Embedding a catalogue's queries or documents over the ranks: what evaluation ranks and what export writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
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

    @torch.no_grad()
    def embed(self, method: Method, side: Side) -> Embedded:
        """This rank's share of a side, consecutive rows; `method` is used as it is (call eval() on its towers first).

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
        )
        tokens = None
        if side.kind == "document":
            tokens = TokenStore.encode(self.tokenizer, {field: side.columns[field] for field in FIELDS})
        width, dtype = self.model.embedding_dim, next(method.towers.parameters()).dtype
        vectors, kept = [torch.empty(0, width, device=self.mesh.device)], [np.empty(0, dtype=np.int64)]
        silent = self.mesh.rank != 0
        for block in tqdm(blocks, desc=f"embedding {side.kind}", unit=" batches", leave=False, delay=5, disable=silent):
            rows = np.arange(block * size, (block + 1) * size)
            full = np.minimum(rows, len(side.ids) - 1)
            batch = self._batch(reader, side, full, tokens).to(self.mesh.device, dtype)
            embed = method.embed_query if side.kind == "query" else method.embed_document
            count = int((rows < len(side.ids)).sum())
            vectors.append(embed(batch)[:count])
            kept.append(rows[:count])
        reader.close()
        own = np.concatenate(kept)
        device = self.mesh.device
        return Embedded(
            torch.cat(vectors),
            torch.from_numpy(side.ids[own]).to(device),
            torch.from_numpy(side.labels[own]).to(device),
        )

    def _batch(self, reader: ImageReader, side: Side, rows: np.ndarray, tokens: TokenStore | None) -> Batch:
        samples = side.sample_ids[rows]
        images, ok = reader.read(samples, reader.parameters(samples))
        labels, ids, weights = torch.from_numpy(side.labels[rows]), torch.from_numpy(samples), ok.float()
        length = self.model.text.max_length
        text = torch.zeros(len(rows), length, dtype=torch.int64)
        if tokens is not None:
            text = torch.from_numpy(tokens.batch(rows, length))
        return Batch(images, labels, weights, ids, images, text, labels, weights, ids)
