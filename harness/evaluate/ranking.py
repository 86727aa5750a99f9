"""Exact retrieval over sharded vectors: the ranks of all relevant documents, and the best k.

Queries and documents lie sharded, in any uneven way, over the ranks of a process group. Blocks of queries travel to
every rank and meet its documents tile by tile; no n x n matrix exists anywhere. One process and many give the same
numbers, to the last bit: vectors are put on a grid of 2**-26 first. For vectors of unit length every product and every
partial sum is then a whole number of 2**-52 below 2**53, which float64 holds exactly, so that neither the shape of a
tile nor the order of a summation can change a score or break a tie in another way. Rounding a finished dot product
would not be enough: two orders of summation can fall on either side of a rounding boundary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from harness.core.errors import UserError
from harness.evaluate.relevance import ID_BITS, Relevance
from models.comm import gather_shards, shard_sizes

VECTOR_BITS = 26  # vectors are whole multiples of 2**-26
SCORE_BITS = 24  # scores are whole multiples of 2**-24
# |score| < 2**25 steps and an id of ID_BITS share one int64.
MAX_NORM = 1.01  # lets unit vectors that were rounded to bfloat16 pass; exactness needs norm * norm < 2
_ID_MASK = 2**ID_BITS - 1
_LAST = torch.iinfo(torch.int64).max  # the key that sorts behind every document


@dataclass(frozen=True)
class Embedded:
    """The queries, or the documents, that one rank holds.

    Args:
        vectors: [n, d], floating point, of unit length (or zero); n may be 0 and may differ between ranks, d not.
        ids: [n] int64, 0 <= id < 2**38, unique over the whole group: do not pad shards to equal length.
        labels: [n] int64 class ids; a query and a document are relevant to each other if their labels are equal
            and not -1.
    """

    vectors: Tensor
    ids: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        n = self.vectors.shape[0]
        if self.vectors.ndim != 2 or self.ids.shape != (n,) or self.labels.shape != (n,):
            shapes = [tuple(t.shape) for t in (self.vectors, self.ids, self.labels)]
            raise ValueError(f"expected vectors [n, d], ids [n] and labels [n], got {shapes}")


@dataclass(frozen=True)
class RelevantRanks:
    """Ranks of the relevant documents of every query of the group; equal on all ranks.

    Args:
        query_ids: [n] int64, ascending.
        ranks: int64, 0-based and ascending within a query: those of query i are `ranks[offsets[i]:offsets[i + 1]]`.
        offsets: [n + 1] int64.
        grades: float64, of the document at each of `ranks`; None where no relevance was given.
    """

    query_ids: np.ndarray
    ranks: np.ndarray
    offsets: np.ndarray
    grades: np.ndarray | None = None

    @property
    def first(self) -> np.ndarray:
        """int64 [n]: 0-based rank of each query's first right document, -1 where there is none."""
        answered = np.diff(self.offsets) > 0
        first = np.full(len(answered), -1)
        first[answered] = self.ranks[self.offsets[:-1][answered]]
        return first


@dataclass(frozen=True)
class _Block:
    vectors: Tensor  # [b, d] float64 on the grid
    ids: Tensor  # [b]
    labels: Tensor  # [b]
    counts: list[
        int
    ]  # rows that each rank of the group has in this block, which is in rank order; empty in a part of one


@torch.no_grad()
def relevant_ranks(
    queries: Embedded,
    documents: Embedded,
    group: dist.ProcessGroup | None = None,
    *,
    query_block: int = 1024,
    document_tile: int = 8192,
    without_self: bool = False,
    relevance: Relevance | None = None,
) -> RelevantRanks:
    """Find the exact rank of every relevant document of every query in the whole gallery.

    Documents are ordered by descending score (dot product in steps of 2**-24), those of equal score by ascending id.
    A collective call: every rank of `group` takes part, also one that holds nothing.

    Args:
        queries: this rank's queries.
        documents: this rank's documents.
        group: the ranks that share queries and gallery; None for a single process.
        query_block: queries that are scored at once, over all ranks together (at least one for each rank).
        document_tile: documents of this rank that are scored at once. Scratch memory is some 32 bytes x query_block x
            document_tile: queries with more relevant documents than that are scored fewer at once.
        without_self: the document that has the query's own id is in no gallery of that query.
        relevance: right answers of the queries that it names, in place of those of equal label; the same on every rank.

    Returns:
        The ranks of all queries of the group, in query-id order, equal on every rank.

    Raises:
        UserError: a vector is not finite or longer than 1, on any rank; raised on all of them.
        ValueError: an id is out of range or was given twice (a twice given document is seen if relevant to a query).
    """
    relevant = _Relevant(documents, relevance)
    ids, counts, ranks, grades = [], [], [], []
    for block in _relevance_blocks(queries, documents, relevant, group, query_block, document_tile):
        rivals, held = _relevant_keys(block, documents, relevant, group, document_tile, without_self)
        size, width = rivals.shape
        row = torch.arange(size, device=rivals.device)[:, None] * (width + 1)
        beaten = torch.zeros(size * (width + 1), dtype=torch.int64, device=rivals.device)
        for keys in _key_tiles(block, documents, document_tile):
            if without_self:
                keys = keys.where(keys & _ID_MASK != block.ids[:, None], _LAST)
            # A document beats the relevant ones from its own place among them on: count places, sum up afterwards.
            place = torch.searchsorted(rivals, keys, right=True).add_(row)
            beaten += torch.bincount(place.flatten(), minlength=beaten.numel())
        if group is not None:
            dist.all_reduce(beaten, group=group)
        real = torch.arange(width, device=rivals.device) < held[:, None]
        ranks.append(beaten.view(size, width + 1).cumsum(1)[:, :width][real].cpu().numpy())
        ids.append(block.ids.cpu().numpy())
        counts.append(held.cpu().numpy())
        if relevance is not None:
            grades.append(relevant.grades(block.ids[:, None], rivals & _ID_MASK)[real].cpu().numpy())
    return _in_id_order(ids, counts, ranks, None if relevance is None else grades)


@torch.no_grad()
def top_k(
    queries: Embedded,
    documents: Embedded,
    k: int,
    group: dist.ProcessGroup | None = None,
    *,
    query_block: int = 1024,
    document_tile: int = 8192,
) -> tuple[Tensor, Tensor]:
    """Find the exact best documents of the whole gallery for this rank's queries; order as in `relevant_ranks`.

    A collective call: every rank of `group` takes part, also one that holds nothing. Labels are not looked at.

    Args:
        queries: this rank's queries, n of them.
        documents: this rank's documents.
        k: documents wanted for each query.
        group: the ranks that share queries and gallery; None for a single process.
        query_block: queries that are scored at once, over all ranks together (at least one for each rank).
        document_tile: documents of this rank that are scored at once.

    Returns:
        Document ids [n, min(k, gallery)] int64 and their scores, float64 and exact multiples of 2**-24, best first.

    Raises:
        UserError: a vector is not finite or longer than 1, on any rank; raised on all of them.
        ValueError: an id is out of range.
    """
    found = []
    gallery = sum(shard_sizes(len(documents.ids), group, queries.ids.device))
    k, rank = min(k, gallery), dist.get_rank(group) if group is not None else 0
    for block in _query_blocks(queries, documents, group, query_block):
        best = torch.full((len(block.ids), k), _LAST, device=block.ids.device)
        for keys in _key_tiles(block, documents, document_tile):
            best = torch.topk(torch.cat([best, keys], dim=1), k, largest=False).values
        if group is not None:  # every rank receives what all ranks found for its own queries
            own = block.counts[rank]
            merged = best.new_empty(len(block.counts) * own, k)
            dist.all_to_all_single(merged, best, [own] * len(block.counts), block.counts, group=group)
            best = merged.view(len(block.counts), own, k).transpose(0, 1).reshape(own, len(block.counts) * k)
        found.append(torch.topk(best, k, largest=False).values)
    keys = torch.cat(found) if found else queries.ids.new_empty(0, k)
    return keys & _ID_MASK, (-(keys >> ID_BITS)).double() / 2**SCORE_BITS


@torch.no_grad()
def best_candidates(dots: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best of each query's own candidates; order and scores as in `top_k`.

    Args:
        dots: float64 [n, c], products of vectors in steps of 2**-VECTOR_BITS, counted in steps of their square;
            overwritten.
        ids: [n, c] int64, unique for a query; below 0: there is none.
        k: documents wanted, at most c.

    Returns:
        Ids [n, k] int64, -1 where there are fewer, and their scores, float64.
    """
    best = torch.topk(_keys(dots, ids).where(ids >= 0, _LAST), k, largest=False).values
    return (best & _ID_MASK).where(best != _LAST, -1), (-(best >> ID_BITS)).double() / 2**SCORE_BITS


def bad_vectors(rank: int) -> UserError:
    """The error of vectors that are not finite or longer than MAX_NORM."""
    return UserError(
        f"Rank {rank} has embeddings that are not finite or longer than 1",
        "Normalise them; if the encoder gives NaN, training has diverged: evaluate an earlier checkpoint",
    )


def _query_blocks(
    queries: Embedded, documents: Embedded, group: dist.ProcessGroup | None, query_block: int
) -> Iterator[_Block]:
    """Gather the queries of all ranks block by block, after a check of the input that all ranks share."""
    device = queries.ids.device
    facts = torch.tensor([[len(queries.ids), _fault(queries) or _fault(documents)]], device=device)
    sizes, faults = gather_shards(facts, group, [1] * _world(group)).T.tolist()
    for rank, fault in enumerate(faults):
        if fault == 1:
            raise bad_vectors(rank)
        if fault == 2:
            raise ValueError(f"rank {rank} has query or document ids outside of 0 .. 2**{ID_BITS} - 1")
    step = max(1, query_block // len(sizes))
    silent = group is not None and dist.get_rank(group) != 0
    with tqdm(total=sum(sizes), desc="ranking", unit=" queries", delay=5, leave=False, disable=silent) as progress:
        for start in range(0, max(sizes), step):
            counts = [min(max(size - start, 0), step) for size in sizes]
            words = torch.stack([queries.ids, queries.labels], dim=1)[start : start + step]
            ids, labels = gather_shards(words, group, counts).unbind(1)
            vectors = gather_shards(queries.vectors[start : start + step], group, counts)
            yield _Block(_on_grid(vectors), ids.contiguous(), labels.contiguous(), counts)
            progress.update(sum(counts))


class _Relevant:
    """Relevant documents of this rank for a query: those of its label, or those that `relevance` names."""

    def __init__(self, documents: Embedded, relevance: Relevance | None) -> None:
        labelled = torch.nonzero(documents.labels >= 0).flatten()
        self._labels, order = torch.sort(documents.labels[labelled])
        self._by_label = labelled[order]
        self._relevance = None if relevance is None else relevance.to(documents.ids.device)
        if relevance is not None:
            self._ids, self._by_id = torch.sort(documents.ids)

    def at_most(self, block: _Block, group: dist.ProcessGroup | None) -> int:
        """Most relevant documents of a query of the block, over all ranks, or more."""
        count = _range_of(self._labels_of(block), self._labels)[1]
        if group is not None:
            dist.all_reduce(count, group=group)
        if self._relevance is not None:
            count = count + self._relevance.counts(block.ids)
        return int(count.max())

    def rows(self, block: _Block) -> tuple[Tensor, Tensor]:
        """Places in the block, ascending, and rows of documents relevant to them, both [k]."""
        slots, rows = _matches(self._labels_of(block), self._labels, self._by_label)
        if self._relevance is None:
            return slots, rows
        named, answers = self._relevance.answers(block.ids)
        places, named_rows = _matches(answers, self._ids, self._by_id)
        slots, order = torch.cat([slots, named[places]]).sort(stable=True)
        return slots, torch.cat([rows, named_rows])[order]

    def grades(self, ids: Tensor, documents: Tensor) -> Tensor:
        """Grades of relevant documents, float64; 1 where the label says so."""
        assert self._relevance is not None
        return torch.where(self._relevance.names(ids), self._relevance.grades_of(ids, documents), 1.0)

    def _labels_of(self, block: _Block) -> Tensor:
        return block.labels if self._relevance is None else block.labels.where(~self._relevance.names(block.ids), -1)


def _relevance_blocks(
    queries: Embedded,
    documents: Embedded,
    relevant: _Relevant,
    group: dist.ProcessGroup | None,
    query_block: int,
    document_tile: int,
) -> Iterator[_Block]:
    """`_query_blocks`, cut smaller where queries have many relevant documents, so that (queries x the most of them)
    stays bounded.
    """
    for block in _query_blocks(queries, documents, group, query_block):
        step = max(1, query_block * document_tile // max(1, relevant.at_most(block, group)))
        for start in range(0, len(block.ids), step):
            part = slice(start, start + step)
            yield _Block(block.vectors[part], block.ids[part], block.labels[part], [])


def _world(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def _fault(part: Embedded) -> int:
    """Return 0 for good input, 1 for vectors and 2 for ids out of range: a number that the ranks can exchange."""
    if not _sound(part.vectors):
        return 1
    return 2 * int(bool(((part.ids < 0) | (part.ids >= 2**ID_BITS)).any()))


def _sound(vectors: Tensor) -> bool:
    """True if no vector is longer than 1; not for a NaN, for which no comparison holds."""
    return bool((torch.linalg.vector_norm(vectors.float(), dim=-1) <= MAX_NORM).all())


def _on_grid(vectors: Tensor) -> Tensor:
    # A power of two and a rounding are exact in float32 too, at half the memory traffic of float64.
    wide = vectors if vectors.dtype == torch.float64 else vectors.float()
    return (wide * 2**VECTOR_BITS).round_().double()


def _keys(dots: Tensor, ids: Tensor) -> Tensor:
    """Pack (score descending, document id ascending) into one int64 each: a smaller key is a better document."""
    steps = dots.mul_(2.0 ** (SCORE_BITS - 2 * VECTOR_BITS)).round_().to(torch.int64)
    return steps.mul_(-(2**ID_BITS)).add_(ids)


def _key_tiles(block: _Block, documents: Embedded, document_tile: int) -> Iterator[Tensor]:
    """Yield the keys [b, tile] of the block's queries and this rank's documents."""
    for start in range(0, len(documents.ids), document_tile):
        tile = slice(start, start + document_tile)
        yield _keys(block.vectors @ _on_grid(documents.vectors[tile]).T, documents.ids[tile])


def _relevant_keys(
    block: _Block,
    documents: Embedded,
    relevant: _Relevant,
    group: dist.ProcessGroup | None,
    document_tile: int,
    without_self: bool,
) -> tuple[Tensor, Tensor]:
    """Return the ascending keys [b, most] of each query's relevant documents of the group, padded, and how many [b]."""
    device, size = block.ids.device, len(block.ids)
    slots, rows = relevant.rows(block)
    if without_self:
        other = documents.ids[rows] != block.ids[slots]
        slots, rows = slots[other], rows[other]
    found = torch.bincount(slots, minlength=size)
    by_rank = gather_shards(found[None], group, [1] * _world(group))
    held, before = by_rank.sum(0), by_rank[: 0 if group is None else dist.get_rank(group)].sum(0)
    # Every rank puts its own keys behind those of the ranks before it; where it has none it adds 0.
    rivals = torch.zeros(size, int(held.max()), dtype=torch.int64, device=device)
    place = before[slots] + _within(slots, found)
    for start in range(0, len(rows), document_tile):
        part = slice(start, start + document_tile)
        dots = (block.vectors[slots[part]] * _on_grid(documents.vectors[rows[part]])).sum(1)
        rivals[slots[part], place[part]] = _keys(dots, documents.ids[rows[part]])
    if group is not None:
        dist.all_reduce(rivals, group=group)
    rivals[torch.arange(rivals.shape[1], device=device) >= held[:, None]] = _LAST
    rivals = rivals.sort(1).values
    if bool(
        ((rivals[:, 1:] == rivals[:, :-1]) & (rivals[:, 1:] != _LAST)).any()
    ):  # the same on all ranks: all of them raise
        raise ValueError("a document id was given twice: shards must be disjoint, without padding")
    return rivals, held


def _range_of(values: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """First place of each of `values` [b] in the ascending `held` [m], and its number of places."""
    first = torch.searchsorted(held, values)
    return first, torch.searchsorted(held, values, right=True) - first


def _matches(values: Tensor, held: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Places in `values` [b], ascending, and those of `rows` [m] whose `held` [m] (ascending) equal them, both [k]."""
    first, found = _range_of(values, held)
    slots = torch.repeat_interleave(torch.arange(len(values), device=values.device), found)
    return slots, rows[first[slots] + _within(slots, found)]


def _within(slots: Tensor, sizes: Tensor) -> Tensor:
    """The number of each element within its slot; `slots` ascend, each as often as `sizes` says."""
    return torch.arange(len(slots), device=slots.device) - (sizes.cumsum(0) - sizes)[slots]


def _in_id_order(
    ids: list[np.ndarray], counts: list[np.ndarray], ranks: list[np.ndarray], grades: list[np.ndarray] | None
) -> RelevantRanks:
    """Bring the ragged ranks of the blocks into query-id order."""
    empty = np.empty(0, np.int64)
    all_ids, sizes, flat = (np.concatenate([empty, *parts]) for parts in (ids, counts, ranks))
    order = np.argsort(all_ids, kind="stable")
    query_ids, starts, sizes = all_ids[order], (np.cumsum(sizes) - sizes)[order], sizes[order]
    if (query_ids[1:] == query_ids[:-1]).any():
        raise ValueError("a query id was given twice: shards must be disjoint, without padding")
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    take = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], sizes)
    graded = None if grades is None else np.concatenate([np.empty(0), *grades])[take]
    return RelevantRanks(query_ids, flat[take], offsets, graded)
