"""Mosaics of documents' pictures: one of four parts shows the document itself, the others show other documents.

Known: mosaic training (TIGER-FG, 2026, where crowded pictures gain most). Ours: all of its form. A picture of one thing
leaves the text nothing to say; in a mosaic it says which part counts. The others are documents of the same micro-batch,
class-mates and strangers alike, so nothing more is read: a step is a function of the order and of its cut. Whether,
where and which others follow from (seed, epoch, sample id, position).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.core.keyed_random import Stream, keyed_hash, keyed_uniform
from models.batch import Batch
from models.transfer import send

Ints = npt.NDArray[np.int64]
PARTS = 4
SPLIT = (0.35, 0.65)  # where the vertical and the horizontal line lie, least and most


class Mosaics(NamedTuple):
    """Documents of a micro-batch that become mosaics.

    Args:
        rows: their places, int64 [m].
        parts: places of the documents that are shown upper left, upper right, lower left and lower right, int64 [m, 4].
        split: x and y of the lines between the parts, as shares of the side, float32 [m, 2].
    """

    rows: Tensor
    parts: Tensor
    split: Tensor


def draw_mosaics(share: float, seed: int, epochs: Ints, sample_ids: Ints, positions: Ints) -> Mosaics:
    """Draws the mosaics among n documents, each with probability `share`; three others, or as many as there are, in
    turn. A document without another beside it stays as it is.
    """
    uniform = keyed_uniform(seed, Stream.MOSAIC, epochs, sample_ids, positions, np.arange(4)[:, None])
    stranger = sample_ids[:, None] != sample_ids
    rows = np.flatnonzero((uniform[0] < share) & stranger.any(1))
    visit = [x[rows, None] for x in (epochs, sample_ids, positions)]
    chance = keyed_hash(
        seed, Stream.MOSAIC, *visit, 4, sample_ids
    )  # one word more than `uniform`, so independent of it
    order = np.where(stranger[rows], chance >> np.uint64(1), np.uint64(2**64 - 1)).argsort(1, kind="stable")
    turn = np.arange(PARTS - 1) % stranger[rows].sum(1)[:, None]
    others = np.take_along_axis(order, turn, 1)
    own = (uniform[1, rows] * PARTS).astype(np.int64)
    place = (np.arange(PARTS) - own[:, None]) % PARTS  # 0 at its own part
    parts = np.take_along_axis(np.concatenate([rows[:, None], others], 1), place, 1)
    split = SPLIT[0] + uniform[2:4, rows].T * (SPLIT[1] - SPLIT[0])
    return Mosaics(*map(torch.from_numpy, (rows, parts, split.astype(np.float32))))


def with_mosaics(batch: Batch, mosaics: Mosaics) -> Batch:
    """The batch with the mosaics among its documents, in place, and marked."""
    lay(batch.document_images, mosaics)
    marks = torch.zeros(len(batch.document_ids), dtype=torch.bool)
    marks[mosaics.rows] = True
    return replace(batch, document_mosaics=marks)


def lay(images: Tensor, mosaics: Mosaics) -> None:
    """Puts the mosaics into `images` float32 [n, 3, S, S], in place: each part shows a whole picture, bilinear."""
    if not len(mosaics.rows):
        return
    rows, parts, split = (send(x, images.device) for x in mosaics)
    channels, side = images.shape[1:3]
    four = images[parts].unflatten(1, (2, 2)).permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, 2 * side, 2 * side)
    line, centres = split[..., None], (torch.arange(side, device=images.device) + 0.5) / side
    second = centres >= line  # [m, 2, S]: right of the line, or below it
    within = (centres - line * second) / torch.where(second, 1 - line, line)
    within = within.clamp(0.5 / side, 1 - 0.5 / side) + second  # nothing of the picture beside it in `four`
    x, y = (within - 1).unbind(1)
    grid = torch.stack(torch.broadcast_tensors(x[:, None], y[:, :, None]), -1)
    images[rows] = F.grid_sample(four, grid, align_corners=False)
