"""Mosaics of documents: which there are, what each part shows, and that they change nothing else of a step."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from harness.data.mosaic import SPLIT, Mosaics, draw_mosaics, lay
from models.batch import Batch
from tests.test_loop import open_loader

N = 400


def drawn(ids: np.ndarray, share: float = 1.0, epoch: int = 0, first: int = 0, seed: int = 7) -> Mosaics:
    return draw_mosaics(share, seed, np.full(len(ids), epoch), ids, first + np.arange(len(ids)))


def test_a_share_of_the_documents_becomes_mosaics_of_four() -> None:
    """Each part is the own one in turn; the three others are three documents, never the document itself."""
    rows, parts, split = (x.numpy() for x in drawn(np.arange(N), 0.5))
    assert abs(len(rows) / N - 0.5) < 0.1 and (np.diff(rows) > 0).all()
    own = parts == rows[:, None]
    assert (own.sum(1) == 1).all() and (own.mean(0) > 0.15).all()
    assert all(len({*row}) == 4 for row in parts.tolist())
    assert len(np.unique(parts)) > N / 2, "from all over the micro-batch"
    low, high = SPLIT
    assert split.min() >= low and split.max() <= high and split.std(0).min() > (high - low) / 5


def test_mosaics_are_a_function_of_seed_epoch_id_and_position() -> None:
    ids = np.random.default_rng(0).permutation(N)
    base = drawn(ids)
    assert all(torch.equal(a, b) for a, b in zip(base, drawn(ids), strict=True))
    for other in (drawn(ids, epoch=1), drawn(ids, first=N), drawn(ids, seed=8), drawn(ids[::-1].copy())):
        assert not torch.equal(base.split, other.split) and not torch.equal(base.parts, other.parts)
    some = drawn(ids[:50])  # a smaller micro-batch: other neighbours, equal lines
    assert torch.equal(base.split[:50], some.split) and (some.parts < 50).all()


@pytest.mark.parametrize(
    ("ids", "rows"),
    [([], []), ([5], []), ([5, 5], []), ([5, 9], [0, 1]), ([5, 5, 9], [0, 1, 2]), ([5, 8, 9], [0, 1, 2])],
)
def test_few_documents(ids: list[int], rows: list[int]) -> None:
    """A part never shows a further visit of the document; where there are too few others, one shows twice."""
    found = drawn(np.array(ids, np.int64))
    assert found.rows.tolist() == rows and found.parts.shape == (len(rows), 4)
    for row, parts in zip(rows, found.parts.tolist(), strict=True):
        others = [part for part in parts if part != row]
        assert len(others) == 3 and {ids[other] for other in others} == {*ids} - {ids[row]}


def test_each_part_shows_its_whole_picture() -> None:
    """Against each part resized by torch on its own, where the lines lie between pixels."""
    g = torch.Generator().manual_seed(0)
    images = F.avg_pool2d(torch.randn(5, 3, 20, 20, generator=g), 3, 1, 1)
    given, split = images.clone(), torch.tensor([[0.4, 0.5], [0.65, 0.35]])
    mosaics = Mosaics(torch.tensor([3, 1]), torch.tensor([[0, 3, 4, 2], [2, 0, 3, 1]]), split)
    lay(images, mosaics)
    assert torch.equal(images[[0, 2, 4]], given[[0, 2, 4]])
    for row, parts, (x, y) in zip((3, 1), mosaics.parts.tolist(), (split * 20).round().int().tolist(), strict=True):
        places = ((0, y, 0, x), (0, y, x, 20), (y, 20, 0, x), (y, 20, x, 20))
        for part, (top, bottom, left, right) in zip(parts, places, strict=True):
            size = (bottom - top, right - left)
            wanted = F.interpolate(given[part, None], size, mode="bilinear", align_corners=False)[0]
            torch.testing.assert_close(images[row, :, top:bottom, left:right], wanted, rtol=0, atol=1e-5)


def test_parts_do_not_blend_wherever_the_lines_lie() -> None:
    """Pictures of one colour each; the area of every part is what its lines cut off, to a row of pixels."""
    images = torch.arange(60.0)[:, None, None, None].expand(60, 3, 16, 16).clone()
    mosaics = drawn(np.arange(60))
    lay(images, mosaics)
    for image, parts, (x, y) in zip(images, mosaics.parts, mosaics.split.tolist(), strict=True):
        colours = image.round()
        assert (image - colours).abs().max() < 1e-3 and {*colours.unique().tolist()} == {*parts.tolist()}
        for part, area in zip(parts, (x * y, (1 - x) * y, x * (1 - y), (1 - x) * (1 - y)), strict=True):
            assert abs(float((colours[0] == part).float().mean()) - area) < 1 / 16


def test_no_mosaic_leaves_the_images() -> None:
    images = torch.randn(2, 3, 8, 8)
    given = images.clone()
    lay(images, drawn(np.arange(2), share=0.0))
    lay(images[:0], drawn(np.empty(0, np.int64)))
    assert torch.equal(images, given)


@pytest.mark.parametrize("options", [{}, {"paired": True, "backend": "reference", "micro_batches": 2}])
def test_a_step_changes_in_its_documents_images_and_their_marks_only(catalogue: Path, options: dict) -> None:
    """The same when it is read again or ahead; twice as many mosaics are the same ones and others."""
    with open_loader(catalogue, **options) as loader:
        plain = loader.load(1)
    found = {}
    for share in (0.5, 1.0):
        with open_loader(catalogue, **options, **{"data.mosaic": share}) as loader:
            found[share] = loader.load(1)
            again = list(loader.steps(0, 2))[1]
        assert found[share].ledger == plain.ledger
        for a, b, c in zip(found[share].batches, again.batches, plain.batches, strict=True):
            for name in (field.name for field in fields(Batch) if field.name not in ("sizes", "origin")):
                assert torch.equal(getattr(a, name), getattr(b, name)), name
                if name not in ("document_images", "document_mosaics"):
                    assert torch.equal(getattr(a, name), getattr(c, name)), name
    images = [torch.cat([b.document_images for b in step.batches]) for step in (plain, found[0.5], found[1.0])]
    some, every = ((images[0] != x).flatten(1).any(1) for x in images[1:])
    assert every.all() and 0 < some.sum() < len(some) and torch.equal(images[1][some], images[2][some])
    marks = torch.cat([b.document_mosaics for b in found[0.5].batches])
    assert torch.equal(marks, some) and not plain.batches[0].document_mosaics.numel()
