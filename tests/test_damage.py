"""Two in a hundred members of a catalogue's shards are damaged, in ten ways: exactly they are lost, and nothing else
changes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.catalogue.catalogue import Catalogue
from harness.data.loader import StepLoader
from models.batch import Reads
from tests.runs import UNUSED, prepared_catalogue, tiny_config

Random = np.random.Generator
# Bytes of a member -> as many others.
WAYS: dict[str, Callable[[bytes, Random], bytes]] = {
    "cut off at the head": lambda d, r: d[100:] + bytes(100),
    "a hole in the middle": lambda d, r: d[: len(d) // 2] + bytes(60) + d[len(d) // 2 + 60 :],
    "cut off at the tail": lambda d, r: d[:-200] + bytes(200),
    "zeroed": lambda d, r: bytes(len(d)),
    "a page of HTML": lambda d, r: b"<html><body>503</body></html>".ljust(len(d)),
    "one bit flipped": lambda d, r: d[:300] + bytes([d[300] ^ 1]) + d[301:],
    "many bits flipped": lambda d, r: bytes(np.frombuffer(d, np.uint8) ^ (r.random(len(d)) < 0.01)),
    "another image": lambda d, r: b"P6 1 1 255\n\0\0\0".ljust(len(d), b"\0"),
    "noise": lambda d, r: r.bytes(len(d)),
    "shifted by a byte": lambda d, r: d[-1:] + d[:-1],
}
STEPS = 75  # of 8 + 4 samples: more than a lap over all


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_catalogue(tmp_path_factory.mktemp("whole"), classes=10, queries=52)


@pytest.fixture(scope="module")
def damaged(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[int]]:
    folder = tmp_path_factory.mktemp("damaged") / "catalogue"
    shutil.copytree(whole, folder)
    catalogue, rng = Catalogue(folder), np.random.default_rng(0)
    trained = catalogue.table([], kind="query", split="train")["sample_id"].to_numpy()
    victims = rng.choice(trained, len(WAYS), replace=False)
    assert len(victims) == round(0.02 * len(trained))
    for sample, way in zip(victims.tolist(), WAYS.values(), strict=True):
        good = catalogue.read_bytes(sample)
        shard, offset, *_ = catalogue.index[sample].item()
        with (folder / "shards" / f"shard-{shard:06d}.tar").open("r+b") as file:
            file.seek(offset)
            file.write(bad := way(good, rng))
        assert len(bad) == len(good) and bad != good
    return folder, set(victims.tolist())


def open_loader(catalogue: Path, backend: str) -> closing[StepLoader]:
    config = tiny_config(catalogue, UNUSED, **{"data.backend": backend})
    reads = Reads(text_length=config.model.text.max_length)
    return closing(StepLoader(config.data, config.seed, reads, 0, 1, torch.device("cpu")))


@pytest.mark.parametrize("backend", ["dali", "reference"])
def test_exactly_the_damaged_are_lost(whole: Path, damaged: tuple[Path, set[int]], backend: str) -> None:
    folder, victims = damaged
    met: list[int] = []
    with open_loader(whole, backend) as clean, open_loader(folder, backend) as loader:
        for step in range(STEPS):
            expected, data = clean.load(step), loader.load(step)
            a, b = expected.batches[0], data.batches[0]
            assert torch.equal(a.query_ids, b.query_ids) and expected.ledger == data.ledger and not expected.bad_ids
            lost = torch.isin(b.query_ids, torch.tensor(sorted(victims)))
            assert data.bad_ids == b.query_ids[lost].tolist()
            assert torch.equal(b.query_weights, (~lost).float()) and b.document_weights.all()
            assert torch.equal(a.query_images[~lost], b.query_images[~lost])
            assert torch.equal(a.document_images, b.document_images)
            met += data.bad_ids
    assert set(met) == victims, "every way of damage was met"
