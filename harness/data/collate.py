"""Contents of a batch: the samples that it shows and its tensors, one class for each `Reads.kind`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from harness.catalogue import pairs
from harness.data.config import DataConfig
from harness.data.images import Pixels
from harness.data.masking import draw_masks, other_titles
from harness.data.order import ClassOrder, Draw
from harness.text.product_queries import ProductQueries
from harness.text.tokenizer import Tokenizer, TokenStore
from models.batch import Batch, Reads

Ints = npt.NDArray[np.int64]
_NONE = np.empty(0, np.int64)
NO_DRAW = Draw(_NONE, _NONE, _NONE)


@dataclass(frozen=True)
class Sources:
    """Sources of a batch beside its images.

    Args:
        config: text queries and masks.
        seed: seed of every draw.
        reads: content of the method's batches.
        order: order of queries and documents.
        tokens: tokens of the documents.
        tokenizer: tokenizer of text queries.
        products: text queries of the documents; None where the method reads none.
        judged: right answers of the queries; None where the catalogue has none, or the method reads none.
    """

    config: DataConfig
    seed: int
    reads: Reads
    order: ClassOrder
    tokens: TokenStore
    tokenizer: Tokenizer
    products: ProductQueries | None
    judged: pairs.Pairs | None = None


class Photos:
    """Content `photos`: query photos and documents, each by their own slots; also the base of the other contents.

    A batch is made in three steps: `draw`, `batch` once its samples are being read, `with_pixels` once they are
    decoded.
    """

    def __init__(self, sources: Sources) -> None:
        self.sources = sources

    def draw(self, queries: Ints, documents: Ints) -> tuple[Draw, Draw]:
        """Draws query photos and documents at these positions, int64 [q] and [d]."""
        order = self.sources.order
        return order.draw("query", queries), order.draw("document", documents)

    def answers(self, positions: Ints) -> Ints:
        """`Batch.answers` of the queries at all positions of a step: int64 [n, A]."""
        return np.empty((len(positions), 0), np.int64)

    def batch(self, q: Draw, d: Draw, answers: Ints, sizes: Mapping[str, Sequence[int]]) -> Batch:
        """Makes the batch, on the host, without images and their weights; `answers` and `sizes` as in `Batch`."""
        tokens = torch.from_numpy(self.sources.tokens.batch(d.sample_ids, self.sources.reads.text_length))
        none = torch.empty(0)
        batch = Batch(
            query_images=none,
            query_labels=torch.from_numpy(q.class_ids),
            query_weights=none,
            query_ids=torch.from_numpy(q.sample_ids),
            document_images=none,
            document_tokens=tokens,
            document_labels=torch.from_numpy(d.class_ids),
            document_weights=none,
            document_ids=torch.from_numpy(d.sample_ids),
            answers=torch.from_numpy(answers),
            sizes=sizes,
        )
        return replace(batch, **self.fields(d, tokens)).with_lengths(self.sources.tokens.special.pad)

    def with_pixels(self, batch: Batch, pixels: Pixels) -> Batch:
        """Adds images and weights: those of the queries, then those of the documents."""
        n, (images, ok) = len(batch.query_ids), pixels
        queries: dict[str, Any] = {"query_images": images[:n], "query_weights": ok[:n].float()}
        return replace(batch, **queries, document_images=images[n:], document_weights=ok[n:].float())

    def fields(self, d: Draw, tokens: Tensor) -> dict[str, Any]:
        """Further fields of the batch of documents `d` with `tokens` [d, L]: masks, if the method reads any."""
        s = self.sources
        if not s.reads.num_patches:
            return {}
        masks = draw_masks(
            s.config.masking, tokens.numpy(), s.reads.num_patches, s.tokens.special, s.seed, d.epochs, d.sample_ids
        )
        return {f"masked_{name}": torch.from_numpy(array) for name, array in masks._asdict().items()}


class Pairs(Photos):
    """Content `pairs`: query photos, and for each a document of its class."""

    def draw(self, queries: Ints, documents: Ints) -> tuple[Draw, Draw]:
        """Draws a pair at each position; both arguments are the same."""
        order = self.sources.order
        q = order.draw("query", queries)
        return q, Draw(order.paired(q.class_ids, documents, "document"), q.class_ids, q.epochs)

    def answers(self, positions: Ints) -> Ints:
        """See Photos. From the order only, so that every rank makes the same without asking the others."""
        judged = self.sources.judged
        if judged is None:
            return super().answers(positions)
        q, d = self.draw(positions, positions)
        places, rows = judged.of(q.sample_ids)
        documents = judged.document[rows]
        right = (judged.grade[rows] > 0) & np.isin(documents, d.sample_ids)
        places, documents = places[right], documents[right]
        count = np.bincount(places, minlength=len(positions))
        found = np.full((len(positions), count.max(initial=0)), -1)
        found[places, np.arange(len(places)) - (np.cumsum(count) - count)[places]] = documents
        return found


class Documents(Photos):
    """Content `documents`: documents only, each also with its own title or another one's."""

    def draw(self, queries: Ints, documents: Ints) -> tuple[Draw, Draw]:
        """Draws documents; `queries` is empty."""
        return NO_DRAW, self.sources.order.draw("document", documents)

    def fields(self, d: Draw, tokens: Tensor) -> dict[str, Any]:
        """Masks and other titles, if the method masks."""
        s, masks = self.sources, super().fields(d, tokens)
        if not masks:
            return {}
        others = other_titles(s.config.masking.mismatched, s.order, s.seed, d.epochs, d.sample_ids)
        return {**masks, "other_tokens": torch.from_numpy(s.tokens.batch(others, s.reads.text_length))}


class Texts(Photos):
    """Content `texts`: documents, and for each a text query and the facts that are known of the document."""

    def draw(self, queries: Ints, documents: Ints) -> tuple[Draw, Draw]:
        """Draws documents; `queries` is empty."""
        return NO_DRAW, self.sources.order.draw("document", documents)

    def with_pixels(self, batch: Batch, pixels: Pixels) -> Batch:
        """Adds images and weights of the documents; a text query has no image."""
        images, ok = pixels
        return replace(batch, query_images=images[:0], document_images=images, document_weights=ok.float())

    def fields(self, d: Draw, tokens: Tensor) -> dict[str, Any]:
        """Text queries, facts and masks."""
        s, ids = self.sources, d.sample_ids
        assert s.products is not None
        texts = s.products.draw(ids, d.epochs, s.seed, *s.config.query_attributes)
        store = TokenStore.encode(s.tokenizer, {"query": texts})
        return {
            "query_tokens": torch.from_numpy(store.batch(np.arange(len(ids)), s.reads.query_length, ["query"])),
            "query_labels": torch.from_numpy(d.class_ids),
            "query_weights": torch.tensor([float(bool(text)) for text in texts]),
            "query_ids": torch.from_numpy(ids),
            "categories": torch.from_numpy(s.products.categories[ids].astype(np.int64)),
            "keywords": torch.from_numpy(s.products.keywords[ids].astype(np.int64)),
            "query_keywords": torch.from_numpy(s.products.keywords_of(texts)),
            **super().fields(d, tokens),
        }


CONTENTS: dict[str, type[Photos]] = {"photos": Photos, "pairs": Pairs, "documents": Documents, "texts": Texts}
