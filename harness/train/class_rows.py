"""Rows of the class head follow their classes, by class key, when a run goes on with other classes.

Class ids are positions in an order and change with it; keys are the user's and stay. Rows of classes that the
checkpoint knows move to their new ids; rows of new classes start from the mean embedding of their samples, near the
place that training would have led them to.
"""

from __future__ import annotations

import filecmp
import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ibis
import numpy as np
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from ibis import _
from torch import Tensor
from torch.distributed import ProcessGroup
from tqdm import tqdm

from harness.catalogue.classes import KINDS
from harness.core.errors import UserError
from harness.core.mesh import Mesh
from harness.core.progress import progress
from harness.core.waiting import on_first_rank
from harness.data.images import ImageReader
from harness.data.loader import StepLoader
from harness.data.preprocess import PreprocessSpec
from models.batch import Batch
from models.comm import gather_shards, share
from models.heads.class_parallel import ClassParallelHead, rows_per_rank
from models.heads.row_optimizer import RowAdamW
from models.method import Method

NEW = -1  # in a ClassMap: the class has no previous id
AT_ONCE = 1 << 28  # bytes of rows that a rank sends at most in one round of `move_rows`
MEMBERS = 16  # samples of a class that are embedded at most
CLASSES_AT_ONCE = 1 << 14  # bounds the memory of their sums


@dataclass(frozen=True)
class ClassMap:
    """This rank's part of the map from current class ids to a checkpoint's.

    source: int64 [n], the previous id of each class of this rank's range, NEW where it has none;
    num_before, kept, new, dropped: numbers of classes over all ranks.
    """

    source: Tensor
    num_before: int
    kept: int
    new: int
    dropped: int


def class_map(before: Path, now: Path, mesh: Mesh) -> ClassMap | None:
    """Compares the classes.parquet `before` and `now` by class key; collective. None where the classes and their ids
    are the same.

    The first rank joins them and every rank gets its own range: only the first ever holds a number for every class.
    """
    ids: np.ndarray = np.empty(0, dtype=np.int64)

    def compare() -> list[int]:
        nonlocal ids
        if filecmp.cmp(before, now, shallow=False):
            return [0, 0, 0]
        ids = _ids_before(before, now)
        facts = [pq.read_metadata(before).num_rows, len(ids), int((ids != NEW).sum())]
        same = facts == [len(ids)] * 3 and (ids == np.arange(len(ids))).all()
        return [0, 0, 0] if same else facts

    num_before, num_now, kept = on_first_rank(compare, mesh, "comparing the classes")
    if not num_now:
        return None
    per_rank = rows_per_rank(num_now, mesh.row_group.size())
    source = torch.full((per_rank,), NEW, dtype=torch.int64, device=mesh.device)
    parts = None
    if mesh.rank == 0:
        padded = np.full(per_rank * mesh.row_group.size(), NEW)
        padded[:num_now] = ids
        parts = list(torch.from_numpy(padded).to(mesh.device).split(per_rank))
    dist.scatter(source, parts, group=mesh.row_group)
    start = mesh.row_group.rank() * per_rank
    own = source[: max(0, min(per_rank, num_now - start))]
    return ClassMap(own, num_before, kept, num_now - kept, num_before - kept)


def _ids_before(before: Path, now: Path) -> np.ndarray:
    """Class id in `before` of each class of `now`, NEW where it has none: int64 [classes of now]. Spills to disk."""
    ids = np.full(pq.read_metadata(now).num_rows, NEW, dtype=np.int64)
    with tempfile.TemporaryDirectory() as spill:
        engine = ibis.duckdb.connect(temp_directory=spill)
        try:
            was = engine.read_parquet(before).select("class_key", was=_.class_id)
            both = engine.read_parquet(now).select("class_key", "class_id").inner_join(was, "class_key")
            engine.to_parquet(both.select("class_id", "was"), Path(spill) / "both.parquet")
        finally:
            engine.disconnect()
        with pq.ParquetFile(Path(spill) / "both.parquet") as file:
            for batch in file.iter_batches():
                ids[batch["class_id"].to_numpy()] = batch["was"].to_numpy()
    if len(ids) and not NEW <= ids.min() <= ids.max() < pq.read_metadata(before).num_rows:
        raise UserError(f"{before} is damaged (class ids)", "Name another checkpoint")
    return ids


def move_rows(before: Tensor, into: Tensor, classes: ClassMap, group: ProcessGroup) -> None:
    """Sets into[i] to the row of class `classes.source[i]`, and leaves rows of new classes as they are; collective.

    Works in rounds. In each, every rank asks the owners for a bounded number of rows, so that none ever holds more than
    its own rows and AT_ONCE bytes.

    Args:
        before: this rank's shard, in torch.chunk's ranges, of a tensor with a row for each previous class.
        into: this rank's shard of a tensor with a row for each present class; contiguous.
        classes: the map between them.
        group: the ranks that share the rows.
    """
    size = group.size()
    per_rank = rows_per_rank(classes.num_before, size)
    own_first = group.rank() * per_rank
    width = math.prod(into.shape[1:])
    served, filled = (t.view(len(t), width).view(torch.uint8) for t in (before.contiguous(), into))
    places = (classes.source != NEW).nonzero()[:, 0]
    at_once = max(1, AT_ONCE // (max(1, filled.shape[1]) * size))  # all ranks may ask the same one
    rounds = torch.tensor(-(-len(places) // at_once), device=into.device)
    dist.all_reduce(rounds, dist.ReduceOp.MAX, group=group)
    for number in range(int(rounds)):
        place = places[number * at_once : (number + 1) * at_once]
        owner = classes.source[place] // per_rank
        order = owner.argsort()
        place = place[order]
        wanted, asked = classes.source[place], torch.bincount(owner, minlength=size)
        asking = torch.empty_like(asked)
        dist.all_to_all_single(asking, asked, group=group)
        out, back = asked.tolist(), asking.tolist()
        ids = wanted.new_empty(sum(back))
        dist.all_to_all_single(ids, wanted, back, out, group=group)
        rows = served.new_empty(len(place), served.shape[1])
        dist.all_to_all_single(rows, served[ids - own_first], out, back, group=group)
        filled[place] = rows


@torch.no_grad()
def start_new_rows(
    method: Method, optimizer: RowAdamW, classes: ClassMap, loader: StepLoader, batch_size: int, mesh: Mesh
) -> None:
    """Sets the rows that `classes` calls new; collective. To be called once the towers and the other rows are loaded.

    A new row points along the mean of the unit embeddings of its first members, queries and documents alike, and is as
    long as the other rows are on average. It owes no weight decay of earlier steps. A row whose samples are all damaged
    keeps its random start.

    Args:
        method: with a head; its towers embed, in evaluation mode.
        optimizer: of the head's rows; new rows have fresh state.
        classes: map to the previous classes.
        loader: of the catalogue, with preprocessing and tokens.
        batch_size: images embedded at once.
        mesh: samples are spread over its dp.
    """
    head = method.head
    assert head is not None, "new rows belong to a head"
    own = (classes.source == NEW).nonzero()[:, 0]
    new = gather_shards(own + head.start, head.row_group)  # ascending, as the ranges are
    length, state = _mean_length(head, classes), optimizer.row_state()
    state["paid"][own] = optimizer.log_decay
    pieces = new.split(CLASSES_AT_ONCE)
    for piece, directions, _found in _means(method, loader, loader.config.preprocess, pieces, batch_size, mesh):
        rows = (length * directions).float()
        head.rows[piece] = rows.to(head.rows.dtype)
        if "master" in state:
            state["master"][piece] = rows


@torch.no_grad()
def start_at_class_means(
    method: Method, optimizer: RowAdamW, loader: StepLoader, step: int, batch_size: int, mesh: Mesh
) -> int:
    """Sets all rows as `start_new_rows` sets new ones, as long as random rows are, with fresh state of the optimizer;
    collective. A rank holds the sums of CLASSES_AT_ONCE classes at a time.

    Args:
        method, optimizer, loader, batch_size, mesh: as `start_new_rows`.
        step: whose image size the samples have.

    Returns:
        number of classes with a sample that could be read.
    """
    head = method.head
    assert head is not None, "class means belong to a head"
    length, classes = _random_length(head), head.config.num_classes
    firsts, count = range(0, classes, CLASSES_AT_ONCE), 0
    pieces = (torch.arange(first, min(classes, first + CLASSES_AT_ONCE), device=mesh.device) for first in firsts)
    bar = progress("class means", len(firsts), 0, f" x {CLASSES_AT_ONCE:,} classes") if mesh.rank == 0 else None
    for place, directions, found in _means(method, loader, loader.spec(step), pieces, batch_size, mesh):
        head.rows[place] = (length * directions).to(head.rows.dtype)
        count += found
        if bar is not None:
            bar.update()
    if bar is not None:
        bar.close()
    optimizer.restart()
    return count


@torch.no_grad()
def start_at_random(head: ClassParallelHead, optimizer: RowAdamW) -> None:
    """Sets all rows to those that a new head has, with fresh state of the optimizer."""
    head.draw(head.rows)
    optimizer.restart()


def _means(
    method: Method,
    loader: StepLoader,
    spec: PreprocessSpec,
    pieces: Iterable[Tensor],
    batch_size: int,
    mesh: Mesh,
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Directions of the mean embeddings of class ids (`pieces`, the same on every rank), without damaged samples, by
    the towers in evaluation mode; collective.

    Yields:
        of each piece: this rank's rows int64 [n] whose class has one, the unit vectors float64 [n, d], and the number
        of classes over all ranks that have one.
    """
    head, training = method.head, method.towers.training
    assert head is not None, "rows belong to a head"
    config = loader.config
    reader = ImageReader(loader.catalogue, spec, config.backend, batch_size, config.threads, mesh.device, mesh.tp)
    method.towers.eval()
    try:
        for piece in pieces:
            sums = _summed_embeddings(method, loader, reader, piece.cpu().numpy(), batch_size, mesh)
            found = sums.abs().sum(1) > 0
            mine = found & (piece >= head.start) & (piece < head.stop)
            yield piece[mine] - head.start, torch.nn.functional.normalize(sums[mine]), int(found.sum())
    finally:
        method.towers.train(training)
        reader.close()


def first_members(folder: Path, classes: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Samples of each class with the lowest ids, at most MEMBERS: kind -> (sample ids, place of their class in
    `classes`).
    """
    kinds, ids, places = [], [], []
    for number, kind in enumerate(KINDS):
        members, offsets = (
            np.load(folder / f"{kind}.{name}.npy", mmap_mode="r") for name in ("members", "member_offsets")
        )
        begin = offsets[classes]
        place, within = _counted(np.minimum(offsets[classes + 1] - begin, MEMBERS))
        ids.append(members[begin[place] + within])
        places.append(place)
        kinds.append(np.full(len(place), number))
    sample, place, kind_of = (np.concatenate(parts) for parts in (ids, places, kinds))
    order = np.lexsort((sample, place))
    _, within = _counted(np.bincount(place, minlength=len(classes)))
    order = order[within < MEMBERS]
    sample, place, kind_of = sample[order], place[order], kind_of[order]
    return {kind: (sample[kind_of == n], place[kind_of == n]) for n, kind in enumerate(KINDS)}


def _counted(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(group, place within it) of every element of consecutive groups of these sizes."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    return group, np.arange(len(group)) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _mean_length(head: ClassParallelHead, classes: ClassMap) -> float:
    """Mean length of the kept rows; that of a random row where there are none; collective."""
    lengths = torch.linalg.vector_norm(head.rows, dim=1, dtype=torch.float64)[classes.source != NEW]
    total = torch.tensor([float(lengths.sum()), len(lengths)], dtype=torch.float64, device=head.rows.device)
    dist.all_reduce(total, group=head.row_group)
    length, count = total.tolist()
    return length / count if count else _random_length(head)


def _random_length(head: ClassParallelHead) -> float:
    """Length of a random row; 1 where these are 0."""
    return head.config.init_std * math.sqrt(head.config.embedding_dim) or 1.0


def _summed_embeddings(
    method: Method, loader: StepLoader, reader: ImageReader, classes: np.ndarray, batch_size: int, mesh: Mesh
) -> Tensor:
    """Sums of the unit embeddings of `first_members`, without damaged ones: float64 [classes, d], the same on every
    rank; collective.
    """
    assert method.head is not None, "new rows belong to a head"
    dtype = next(method.towers.parameters()).dtype
    sums = torch.zeros(len(classes), method.head.config.embedding_dim, dtype=torch.float64, device=mesh.device)
    for kind, (ids, places) in first_members(loader.config.catalogue / "classes", classes).items():
        embed = method.embed_query if kind == "query" else method.embed_document
        blocks = share(-(-len(ids) // batch_size), mesh.dp.size(), mesh.dp.rank())
        shown = tqdm(blocks, f"class means: {kind}", unit=" batches", leave=False, delay=5, disable=mesh.rank != 0)
        for block in shown:
            # Always a full block, so that a vector does not depend on the number of ranks.
            rows = np.arange(block * batch_size, (block + 1) * batch_size)
            full = np.minimum(rows, len(ids) - 1)
            batch, ok = _batch(loader, reader, ids[full])
            vectors = embed(batch.to(mesh.device, dtype)).double()
            place = torch.from_numpy(places[full]).to(mesh.device)
            counted = ok & torch.from_numpy(rows < len(ids))
            sums.index_add_(0, place, vectors * counted.to(mesh.device)[:, None])
    dist.all_reduce(sums, group=mesh.dp)
    dist.broadcast(sums, 0)  # tensor-parallel ranks have embedded the same samples, on a GPU not to the same bits
    return sums


def _batch(loader: StepLoader, reader: ImageReader, samples: np.ndarray) -> tuple[Batch, Tensor]:
    """Samples in evaluation's view, as queries and as documents; and bool [n], True for those that could be read."""
    images, ok = reader.read(samples, reader.parameters(samples))
    ids, weights = torch.from_numpy(samples), ok.float()
    text = torch.from_numpy(loader.tokens.batch(samples, loader.reads.text_length))
    return Batch(images, ids, weights, ids, images, text, ids, weights, ids), ok.cpu()


def keep_classes(catalogue: Path, order_id: str, run: Path) -> Path:
    """Copies the catalogue's classes.parquet into the run folder and returns the copy.

    Checkpoints must name the classes that the run trains on, also when the catalogue is governed again meanwhile.

    Raises:
        UserError: the catalogue was governed again since its order was opened, or the run folder cannot be written.
    """
    classes, kept = catalogue / "classes", run / "classes.parquet"
    try:
        run.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(classes / "classes.parquet", kept.with_suffix(".tmp"))
        if json.loads((classes / "governance.json").read_text())["order_id"] != order_id:
            raise UserError(f"{catalogue} was governed again just now", "Start again")
        kept.with_suffix(".tmp").replace(kept)
    except OSError as error:
        raise UserError(f"run folder {run}: {error}", "Choose another --run-dir") from error
    return kept
