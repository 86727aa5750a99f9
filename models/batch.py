"""Input of a method: one rank's part of a micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from models.transfer import send

WIDTH = 8  # trimmed texts are multiples of it wide: for tensor cores, attention kernels, and few shapes to compile


def _no_ids() -> Tensor:
    return torch.empty(0, 0, dtype=torch.int64)


def _no_lengths() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


def _no_masks() -> Tensor:
    return torch.empty(0, 0, dtype=torch.bool)


@dataclass(frozen=True)
class Batch:
    """Queries and documents, both of any number. Rows are samples; ids are global sample ids.

    query_images [q, 3, S, S], query_labels int64 [q] (class ids, -1 = none), query_weights [q], query_ids int64 [q];
    document_images [d, 3, S, S], document_tokens int64 [d, L], document_labels [d], document_weights [d], document_ids
    [d].

    Fields of only some methods are empty, [0, 0], if not given: query_tokens int64 [q, L]: text of the queries; MAKE's
    are only text, and its query_images [0, 3, S, S]; answers int64 [q, A]: documents of the whole step that answer the
    query by the catalogue's pairs, -1 behind the last, of one width in all parts of a step; categories int64 [d]:
    category of the documents, -1 = unknown; keywords int64 [d, K]: keywords of the documents, each once, -1 behind the
    last; query_keywords int64 [q, K]: those that the query names; masked_tokens int64 [d, L]: the titles with their
    masked words replaced, and masked_words bool [d, L]: the mask of those; masked_patches bool [d, P]: patches to be
    hidden, row-major; masked_titles bool [d]: titles that are masked as a whole; other_tokens int64 [d, L]: for each
    document its own title or that of another document; document_mosaics bool [d]: images that show other documents too.

    On the host, so that nothing waits for the device: query_lengths int64 [q], document_lengths [d],
    masked_lengths [d] (0 for a title that is masked as a whole), other_lengths [d]: tokens of the texts before padding
    (with_lengths); [0] if not given; sizes: "query" and "document" to their numbers on each rank with other samples, in
    rank order; None: to be exchanged; origin: the batch that this one was moved from.
    """

    query_images: Tensor
    query_labels: Tensor
    query_weights: Tensor
    query_ids: Tensor
    document_images: Tensor
    document_tokens: Tensor
    document_labels: Tensor
    document_weights: Tensor
    document_ids: Tensor
    query_tokens: Tensor = field(default_factory=_no_ids)
    answers: Tensor = field(default_factory=_no_ids)
    categories: Tensor = field(default_factory=_no_ids)
    keywords: Tensor = field(default_factory=_no_ids)
    query_keywords: Tensor = field(default_factory=_no_ids)
    masked_tokens: Tensor = field(default_factory=_no_ids)
    masked_words: Tensor = field(default_factory=_no_masks)
    masked_patches: Tensor = field(default_factory=_no_masks)
    masked_titles: Tensor = field(default_factory=_no_masks)
    other_tokens: Tensor = field(default_factory=_no_ids)
    document_mosaics: Tensor = field(default_factory=_no_masks)
    query_lengths: Tensor = field(default_factory=_no_lengths)
    document_lengths: Tensor = field(default_factory=_no_lengths)
    masked_lengths: Tensor = field(default_factory=_no_lengths)
    other_lengths: Tensor = field(default_factory=_no_lengths)
    sizes: Mapping[str, Sequence[int]] | None = None
    origin: Batch | None = None

    @classmethod
    def of_texts(cls, tokens: Tensor) -> Batch:
        """Only text queries: tokens int64 [q, L]."""
        none, no_images = torch.empty(0, dtype=torch.int64), torch.empty(0, 3, 1, 1)
        labels = torch.full((len(tokens),), -1)
        weights = torch.ones(len(tokens))
        return cls(
            no_images, labels, weights, labels, no_images, _no_ids(), none, none.float(), none, query_tokens=tokens
        )

    @property
    def labels(self) -> Tensor:
        """Class ids of the queries, then the documents: int64 [q + d]."""
        return torch.cat([self.query_labels, self.document_labels])

    @property
    def weights(self) -> Tensor:
        """Weights of the queries, then the documents: [q + d]."""
        return torch.cat([self.query_weights, self.document_weights])

    @property
    def host(self) -> Batch:
        """The batch as it came, whose labels and masks can be read without a wait for the device."""
        return self if self.origin is None else self.origin

    @property
    def alone_weights(self) -> Tensor:
        """Weights of the documents seen by their images alone: [d]; 0 for a mosaic, which shows several."""
        mosaics = self.document_mosaics
        return self.document_weights * ~mosaics if mosaics.numel() else self.document_weights

    def with_lengths(self, pad: int) -> Batch:
        """This batch, which is on the host, with the lengths of its texts; `pad` occurs only behind a text."""
        found = {
            name: (tokens != pad).sum(1)
            for name in ("query", "document", "masked", "other")
            if (tokens := self._tokens(name)).shape[1]
        }
        if "masked" in found:
            found["masked"] = found["masked"] * ~self.masked_titles
        known: dict[str, Any] = {f"{name}_lengths": lengths for name, lengths in found.items()}
        return replace(self, **known)

    def trimmed(self, *names: str) -> Batch:
        """The same batch without the columns that are padding in all texts of `names`, query or document; those of a
        document stay aligned.

        Widths are multiples of WIDTH, so that few shapes occur. Without lengths nothing is cut.
        """
        cut: dict[str, Any] = {}
        for name in names:
            of = [name] if name == "query" else [n for n in ("document", "masked", "other") if self._tokens(n).numel()]
            lengths = [getattr(self, f"{n}_lengths") for n in of if n != "masked"]
            if lengths and all(x.numel() for x in lengths):
                longest = max(int(x.numpy().max()) for x in lengths)
                for n in of:
                    cut[f"{n}_tokens"] = self._tokens(n)[:, : max(1, -(-longest // WIDTH)) * WIDTH]
                if "masked" in of:
                    cut["masked_words"] = self.masked_words[:, : cut["masked_tokens"].shape[1]]
        return replace(self, **cut)

    def padded(self, name: str) -> bool:
        """True if the texts of `name` (query, document, masked or other) have padding to mask, or unknown lengths."""
        lengths, width = getattr(self, f"{name}_lengths"), self._tokens(name).shape[1]
        return not lengths.numel() or bool((lengths.numpy() < width).any())

    def _tokens(self, name: str) -> Tensor:
        return getattr(self, f"{name}_tokens")

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """On `device`, images in `dtype`; lengths stay on the host."""
        moved: dict[str, Any] = {name: send(getattr(self, name), device) for name in TENSORS}
        for name in ("query_images", "document_images"):
            moved[name] = moved[name].to(dtype)
        return replace(self, **moved, origin=self.host)


TENSORS = tuple(f.name for f in fields(Batch) if not f.name.endswith(("_lengths", "sizes", "origin")))


def rank_sizes(batches: Sequence[Batch], *sides: str) -> list[int] | None:
    """Queries, documents, or both together, of all `batches` of every rank, in rank order; None where they are not
    known.
    """
    counts = [batch.sizes[side] for batch in batches if batch.sizes is not None for side in sides]
    return [sum(of_rank) for of_rank in zip(*counts, strict=True)] if len(counts) == len(batches) * len(sides) else None


@dataclass(frozen=True, kw_only=True)
class Reads:
    """Content of a method's batches.

    Args:
        kind: photos: query photos and documents, each by their own slots; pairs: query photos and a document of each
            one's class; texts: documents and a text query for each; documents: only documents, each with its own title
            or another one's.
        text_length: tokens of a document's text.
        query_length: tokens of a text query.
        num_patches: patches of a document's image, with masked words and patches; 0 masks nothing.
        keywords: with texts, keywords of a document, and those that its query names, at most.
    """

    kind: Literal["photos", "pairs", "texts", "documents"] = "photos"
    text_length: int
    query_length: int = 0
    num_patches: int = 0
    keywords: int = 0

    def samples(self, queries: int, documents: int) -> tuple[int, int]:
        """Query photos and documents of a step, of data.queries_per_step and data.documents_per_step."""
        return queries if self.kind in ("photos", "pairs") else 0, queries if self.kind == "pairs" else documents

    def rows(self, queries: int, documents: int) -> dict[str, int]:
        """Queries (photos or texts) and documents of a step by the sides of `Batch.sizes`; arguments as `samples`."""
        photos, documents = self.samples(queries, documents)
        return {"query": documents if self.kind == "texts" else photos, "document": documents}
