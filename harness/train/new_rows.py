"""Initial rows of new classes: the mean embedding of their samples, near where training would have led them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from harness.catalogue.classes import KINDS
from harness.core.mesh import Mesh
from harness.data.loader import ImageReader, StepLoader, share
from harness.train.class_map import NEW, ClassMap
from models.batch import Batch
from models.comm import gather_shards
from models.heads.class_parallel import ClassParallelHead
from models.heads.row_optimizer import RowAdamW
from models.method import Method

MEMBERS = 16  # samples of a class that are embedded at most
CLASSES_AT_ONCE = 1 << 14  # bounds the memory of their sums


@torch.no_grad()
def start_new_rows(
    method: Method, optimizer: RowAdamW, classes: ClassMap, loader: StepLoader, batch_size: int, mesh: Mesh
) -> None:
    """Sets the rows that `classes` calls new; collective. The method's towers and the other rows are loaded already.

    A new row points along the mean of the unit embeddings of its first members, queries and documents alike, and is as
    long as the other rows are on average. It owes no weight decay of the steps before. One whose samples are all
    damaged keeps its random start.

    Args:
        method: with a head; its towers embed, in evaluation mode.
        optimizer: of the head's rows; the state of new rows is a fresh one's already.
        classes: which classes are new.
        loader: its catalogue, preprocessing and tokens.
        batch_size: images embedded at once.
        mesh: samples are spread over its dp.
    """
    head = method.head
    assert head is not None, "new rows belong to a head"
    own = (classes.source == NEW).nonzero()[:, 0]
    new = gather_shards(own + head.start, head.row_group)  # ascending, as the ranges are
    length, state = _mean_length(head, classes), optimizer.row_state()
    state["paid"][own] = optimizer.log_decay
    reader = ImageReader(
        loader.catalogue,
        loader.config.preprocess,
        loader.config.backend,
        batch_size,
        loader.config.threads,
        mesh.device,
        mesh.tp,
    )
    training = method.towers.training
    method.towers.eval()
    try:
        for piece in new.split(CLASSES_AT_ONCE):
            sums = _summed_embeddings(method, loader, reader, piece.cpu().numpy(), batch_size, mesh)
            found = (piece >= head.start) & (piece < head.stop) & (sums.abs().sum(1) > 0)
            rows = (length * torch.nn.functional.normalize(sums[found])).float()
            place = piece[found] - head.start
            head.rows[place] = rows.to(head.rows.dtype)
            if "master" in state:
                state["master"][place] = rows
    finally:
        method.towers.train(training)
        reader.close()


def first_members(folder: Path, classes: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The at most MEMBERS samples of each class with the lowest ids: kind -> (sample ids, place of their class in
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
    """(group, number within it) of every element of groups of these sizes, laid one after another."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    return group, np.arange(len(group)) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _mean_length(head: ClassParallelHead, classes: ClassMap) -> float:
    """Mean length of the rows that were kept; a random row's where there are none."""
    lengths = torch.linalg.vector_norm(head.rows, dim=1, dtype=torch.float64)[classes.source != NEW]
    total = torch.tensor([float(lengths.sum()), len(lengths)], dtype=torch.float64, device=head.rows.device)
    dist.all_reduce(total, group=head.row_group)
    length, count = total.tolist()
    return length / count if count else head.config.init_std * math.sqrt(head.config.embedding_dim)


def _summed_embeddings(
    method: Method, loader: StepLoader, reader: ImageReader, classes: np.ndarray, batch_size: int, mesh: Mesh
) -> Tensor:
    """Sums of the unit embeddings of `first_members`, damaged ones left out: float64 [classes, d], the same on every
    rank.
    """
    assert method.head is not None, "new rows belong to a head"
    dtype = next(method.towers.parameters()).dtype
    sums = torch.zeros(len(classes), method.head.config.embedding_dim, dtype=torch.float64, device=mesh.device)
    for kind, (ids, places) in first_members(loader.config.catalogue / "classes", classes).items():
        embed = method.embed_query if kind == "query" else method.embed_document
        blocks = share(-(-len(ids) // batch_size), mesh.dp.size(), mesh.dp.rank())
        shown = tqdm(blocks, f"new classes: {kind}", unit=" batches", leave=False, delay=5, disable=mesh.rank != 0)
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
    """Samples as evaluation sees them, as queries and as documents; and bool [n], whether they could be read."""
    images, ok = reader.read(samples, reader.parameters(samples))
    ids, weights = torch.from_numpy(samples), ok.float()
    text = torch.from_numpy(loader.tokens.batch(samples, loader.reads.text_length))
    return Batch(images, ids, weights, ids, images, text, ids, weights, ids), ok.cpu()
