"""Recall of a plain PyTorch script on a catalogue: a small residual network, trained from scratch on pairs of a photo
and a picture of the same class by the in-batch contrastive loss, on one process. The peer of a recipe at equal images.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from harness.bench.report import bench_main, finish
from harness.catalogue.catalogue import Catalogue
from harness.core.errors import UserError
from harness.evaluate.contact_sheet import picture
from harness.evaluate.embed import ClassKeys, Side, side_of
from harness.evaluate.metrics import summarise
from harness.evaluate.ranking import Embedded, relevant_ranks
from models.ranges import NonNegativeInt, PositiveInt

MODULE = "harness.bench.plain"
EXAMPLE = "python -m harness.bench.plain --catalogue catalogues/products --images 44000"
CHANNELS = (32, 64, 128, 256)  # of the stages, each at half the size of the one before
TEMPERATURE = 0.07  # CLIP's first one
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class PlainConfig:
    """Trains on so many images, then measures.

    Args:
        catalogue: the catalogue folder.
        split: queries that are measured, against every document; trained is the split train.
        images: images of the training, photos and documents together.
        image_size: side of the square that the network sees, in pixels.
        threads: of PyTorch; 0 takes its default.
        seed: of weights, order and augmentation.
    """

    catalogue: Path
    split: str = "test"
    images: PositiveInt = 100_000
    image_size: PositiveInt = 64
    threads: NonNegativeInt = 0
    seed: NonNegativeInt = 0


class Block(nn.Module):
    """A residual block of two convolutions that halves the size."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, out, 3, stride=2, padding=1, bias=False)
        self.second = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.short = nn.Conv2d(width, out, 1, stride=2, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(out) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """[n, width, s, s] -> [n, out, s / 2, s / 2]."""
        inner = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(inner)) + self.norms[2](self.short(x)))


class Network(nn.Module):
    """Pictures float [n, 3, s, s] -> unit embeddings [n, 128]."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in zip((3, *CHANNELS), CHANNELS, strict=False)))
        self.head = nn.Linear(CHANNELS[-1], 128)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the embeddings."""
        return F.normalize(self.head(self.blocks(images).mean((2, 3))))


def run(config: PlainConfig) -> dict[str, Any]:
    """Trains, measures, prints a table and returns the report.

    Raises:
        UserError: a split without photos, or no class with both a photo and a document.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    catalogue, keys = Catalogue(config.catalogue), ClassKeys()
    photos = side_of(catalogue, "query", "train", [], keys, 0)
    queries = side_of(catalogue, "query", config.split, [], keys, 0)
    documents = side_of(catalogue, "document", None, [], keys, 0)
    shown = side_of(catalogue, "document", "train", [], keys, 0)
    usable = np.isin(photos.labels, shown.labels[shown.labels >= 0])
    if not usable.any() or not len(queries.ids):
        raise UserError(f"{config.catalogue} has no photos to train on, or none in split {config.split}", "See --split")
    network = Network()
    pictures = [_pictures(side, config.image_size) for side in (photos.select(usable), shown)]
    started = time.perf_counter()
    _train(network, pictures, photos.labels[usable], shown.labels, config)
    seconds = time.perf_counter() - started
    network.eval()
    asked, gallery = (_embedded(network, side, config.image_size) for side in (queries, documents))
    ranks = relevant_ranks(asked, gallery)
    figures = summarise(ranks.ranks, ranks.offsets, (1, 5))
    row_of_new = np.isin(queries.labels, documents.labels) & ~np.isin(queries.labels, photos.labels[usable])
    new = relevant_ranks(_part(asked, row_of_new), gallery)
    of_new = summarise(new.ranks, new.offsets, (1,))["recall_at_1"] if row_of_new.any() else None
    row: dict[str, Any] = {
        "split": config.split,
        "queries": int(figures["queries"]),
        "documents": len(documents.ids),
        "images": config.images,
        "train_s": round(seconds, 1),
        "recall_at_1": figures["recall_at_1"],
        "recall_at_5": figures["recall_at_5"],
        "recall_at_1_never_trained": of_new,
    }
    headline = {name: value for name, value in row.items() if name.startswith("recall") and value is not None}
    return finish(MODULE, config, headline, [row])


def _train(
    network: Network, pictures: list[Tensor], labels: np.ndarray, of_documents: np.ndarray, config: PlainConfig
) -> None:
    """Trains the network; the learning rate falls to 0 (half a cosine)."""
    rng = np.random.default_rng(config.seed)
    order = np.argsort(of_documents, kind="stable")
    first, last = (np.searchsorted(of_documents[order], labels, side) for side in ("left", "right"))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    batch = min(BATCH, len(labels))
    steps = max(1, config.images // (2 * batch))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), "training", unit=" steps", delay=5, leave=False):
        rows = rng.choice(len(labels), batch, replace=False)
        answers = order[rng.integers(first[rows], last[rows])]
        views = [network(_augmented(pictures[i][chosen])) for i, chosen in enumerate((rows, answers))]
        logits = views[0] @ views[1].T / TEMPERATURE
        label = torch.from_numpy(labels[rows])
        same = (label[:, None] == label) & ~torch.eye(batch, dtype=torch.bool)
        logits = logits.masked_fill(same, -torch.inf)
        target = torch.arange(batch)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _augmented(images: Tensor) -> Tensor:
    """uint8 [n, 3, s, s] -> float: one random crop of at least half of the area, mirrored or not, and for each picture
    its brightness and colour.
    """
    size = images.shape[-1]
    side = int(size * (0.7 + 0.3 * torch.rand(()).item()))
    top, left = torch.randint(0, size - side + 1, (2,)).tolist()
    cut = images[:, :, top : top + side, left : left + side].float() / 127.5 - 1
    cut = cut.flip(-1) if torch.rand(()) < 0.5 else cut
    cut = cut * torch.empty(len(cut), 3, 1, 1).uniform_(0.7, 1.3) + torch.empty(len(cut), 1, 1, 1).uniform_(-0.2, 0.2)
    return F.interpolate(cut, (size, size), mode="bilinear", align_corners=False)


def _pictures(side: Side, size: int) -> Tensor:
    """uint8 [n, 3, size, size]."""
    table = np.empty((len(side.ids), size, size, 3), np.uint8)
    for row, sample in enumerate(tqdm(side.sample_ids.tolist(), f"reading of {side.kind}", delay=5, leave=False)):
        table[row] = picture(side.catalogue, sample).resize((size, size))
    return torch.from_numpy(table).permute(0, 3, 1, 2)


@torch.no_grad()
def _embedded(network: Network, side: Side, size: int) -> Embedded:
    images = _pictures(side, size)
    vectors = [network(part.float() / 127.5 - 1) for part in images.split(256)]
    return Embedded(torch.cat(vectors), torch.from_numpy(side.ids), torch.from_numpy(side.labels))


def _part(side: Embedded, rows: np.ndarray) -> Embedded:
    mask = torch.from_numpy(rows)
    return Embedded(side.vectors[mask], side.ids[mask], side.labels[mask])


if __name__ == "__main__":
    sys.exit(bench_main(MODULE, PlainConfig, run, "Recall of a plain PyTorch script.", EXAMPLE))
