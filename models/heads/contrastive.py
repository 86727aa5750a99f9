"""Contrastive losses over the global batch: symmetric InfoNCE and AM-softmax with negatives from every rank and from a
memory bank.

Exact: the loss is sum(w l) / sum(w) over all ranks' pairs, and a rank's gradients are those of this global loss. Its
embeddings get their whole gradient, a shared parameter (the log scale) this rank's part: towers sum over dp and never
average.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from models.comm import gather_shards, gather_with_grad, own_slice, shard_sizes
from models.heads.mean import global_mean
from models.heads.memory_bank import MemoryBank
from models.ranges import NonNegativeFloat, PositiveFloat

Related = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """A contrastive loss: -log softmax of (cos - margin of the positive) / temperature.

    Args:
        temperature: divisor of the cosines; where the scale is learned, where it begins.
        margin: taken off the positive's cosine: 0 is InfoNCE (van den Oord et al. 2018), above 0 AM-softmax (Wang et
            al. 2018).
        symmetric: the mean of both directions, query to documents and document to queries; false is only the first.
    """

    temperature: PositiveFloat = 0.07
    margin: NonNegativeFloat = 0.0
    symmetric: bool = True


def same_product(query_labels: Tensor, document_labels: Tensor) -> Tensor:
    """bool [a, b]: whether labels [a] and [b] are equal; a label below 0 (unknown) equals none."""
    return (query_labels[:, None] == document_labels) & (document_labels >= 0)


def same_product_or_answer(query_labels: Tensor, document_labels: Tensor) -> Tensor:
    """bool [a, b]: `same_product`, or the document is one that the query names.

    Labels int64 [a or b, 2 + A]: product, id of the pair's document, ids of documents that answer the pair's query, -1
    behind the last.
    """
    found = same_product(query_labels[:, 0], document_labels[:, 0])
    for answer in query_labels[:, 2:].unbind(1):
        found = found | same_product(answer, document_labels[:, 1])
    return found


def contrastive_loss(
    queries: Tensor,
    documents: Tensor,
    labels: Tensor,
    config: ContrastiveConfig,
    group: ProcessGroup,
    *,
    weights: Tensor | None = None,
    log_scale: Tensor | None = None,
    negatives: tuple[Tensor, Tensor] | None = None,
    negative_weights: Tensor | None = None,
    document_bank: MemoryBank | None = None,
    query_bank: MemoryBank | None = None,
    related: Related = same_product,
    sizes: list[int] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss over the pairs of all ranks; row i of queries and documents is a pair. Collective: all ranks pass the same
    optional arguments.

    A query's negatives are the documents of all other pairs, the hard negatives of all pairs and the document bank, a
    document's (symmetric) the queries of all other pairs and the query bank; none of them is one that `related` names.

    Args:
        queries, documents: [n, d], any length, any n per rank (also 0); tensor-parallel ranks pass the same.
        labels: int64 [n, ...], what `related` compares; by itself [n], product or class of the pair.
        config: the loss.
        group: ranks that bring different pairs.
        weights: [n], default 1. A pair of weight 0 (a damaged image) does not count, not as a negative either.
        log_scale: [], the learned log(1 / temperature); default the config's constant.
        negatives: hard negatives of the pairs, ([n, k, d], their labels int64 [n, k, ...]).
        negative_weights: [n, k], default 1: a hard negative of weight 0 does not count, nor one of a pair of weight 0.
        document_bank, query_bank: embeddings of earlier steps, the same on every rank; push this step's afterwards.
        related: (query labels [a, ...], document labels [b, ...]) -> bool [a, b], True where the document is not a
            negative of the query.
        sizes: n of every rank of `group`, where the caller knows them; else the device is waited for.

    Returns:
        (loss, the same on every rank; metrics positive_cosine and accuracy, query to documents, as local [weighted sum,
        weight], which add up over ranks).
    """
    kind = torch.promote_types(queries.dtype, torch.float32)
    weights = torch.ones(len(labels), device=labels.device, dtype=kind) if weights is None else weights.to(kind)
    sizes = sizes or shard_sizes(len(labels), group, labels.device)
    mine = own_slice(sizes, group.rank())

    def everyone(x: Tensor, labels: Tensor, weights: Tensor, per_pair: int = 1) -> _Candidates:
        """Embeddings x [n * per_pair, d] of all ranks, with their labels and weights."""
        counts = [size * per_pair for size in sizes]
        unit = gather_with_grad(F.normalize(x.to(kind), dim=-1), group, counts)
        weight = gather_shards(weights, group, counts)
        return _Candidates(unit, gather_shards(labels, group, counts), weight > 0)

    query, document = everyone(queries, labels, weights), everyone(documents, labels, weights)
    against_queries, against_documents = [query], [document]
    if negatives is not None:
        hard, hard_labels = negatives
        of_pairs = weights[:, None].expand(hard.shape[:2])
        hard_weights = of_pairs if negative_weights is None else of_pairs * negative_weights
        flat = hard.flatten(0, 1), hard_labels.flatten(0, 1), hard_weights.flatten()
        against_documents.append(everyone(*flat, hard.shape[1]))
    for bank, candidates in ((document_bank, against_documents), (query_bank, against_queries)):
        if bank is not None:
            unit, known, counts = bank.filled()
            candidates.append(_Candidates(unit.to(kind), known, counts))

    # Each rank computes the terms of its own pairs; the gather's backward adds up all ranks' gradients of an
    # embedding.
    scale = 1 / config.temperature if log_scale is None else log_scale.to(kind).exp()
    positive = (query.unit[mine] * document.unit[mine]).sum(-1)
    logit = scale * (positive - config.margin)
    other = _join(against_documents)
    hidden = _hidden(related(query.labels[mine], other.labels), other.counts, mine)
    cosine = query.unit[mine] @ other.unit.T
    terms = _negative_log_softmax(logit, scale * cosine, hidden)
    if config.symmetric:
        other = _join(against_queries)
        hidden_queries = _hidden(related(other.labels, document.labels[mine]).T, other.counts, mine)
        logits = scale * (document.unit[mine] @ other.unit.T)
        terms = (terms + _negative_log_softmax(logit, logits, hidden_queries)) / 2

    loss = global_mean(terms, weights, group)
    right = ~((cosine >= positive[:, None]) & ~hidden).any(1)
    metrics = {"positive_cosine": positive.detach() @ weights, "accuracy": right.to(kind) @ weights}
    return loss, {name: torch.stack([value, weights.sum()]) for name, value in metrics.items()}


class _Candidates(NamedTuple):
    """Candidates that a positive competes with: unit embeddings [c, d], labels [c, ...], and bool [c] whether they
    count at all.
    """

    unit: Tensor
    labels: Tensor
    counts: Tensor


def _join(parts: list[_Candidates]) -> _Candidates:
    """All parts in one, the batch's own pairs first. Always a copy: a bank may be pushed to before the backward."""
    return _Candidates(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _hidden(related: Tensor, counts: Tensor, mine: slice) -> Tensor:
    """bool [m, c]: the candidates that are not negatives of the own pairs `mine`, their positives among them."""
    hidden = related | ~counts
    hidden[:, mine].fill_diagonal_(True)
    return hidden


def _negative_log_softmax(positive: Tensor, negatives: Tensor, hidden: Tensor) -> Tensor:
    """-log softmax of the positive logits [m] over them and the negatives [m, c] that are not hidden: [m].

    log(1 + exp(lse of negatives - positive)): exact at both ends, and 0 without negatives.
    """
    lse = negatives.masked_fill(hidden, float("-inf")).logsumexp(1)
    return torch.logaddexp(torch.zeros_like(lse), lse - positive)
