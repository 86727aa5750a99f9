"""Tensor-parallel ranks read and decode each a part of their samples: every rank has what it would have read alone."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from harness.catalogue.catalogue import Catalogue
from harness.data.backends import decoding_threads
from harness.data.images import ImageReader
from harness.data.loader import StepLoader
from harness.data.preprocess import PreprocessSpec
from harness.data.step_data import StepData, TextTokens
from models.batch import Batch, Reads
from tests.pool import layout, ranks
from tests.runs import UNUSED, tiny_config, trainer
from tests.test_loop import damage, log_lines

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def damaged(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A copy of the catalogue in which every third training sample is damaged, and their ids."""
    folder = tmp_path_factory.mktemp("damaged") / "catalogue"
    shutil.copytree(catalogue, folder)
    ids = Catalogue(folder).table([], split="train")["sample_id"].to_pylist()[::3]
    damage(folder, ids)
    return folder, ids


def same(found: StepData, wanted: StepData) -> None:
    assert len(found.batches) == len(wanted.batches) and found.ledger == wanted.ledger and found.texts == wanted.texts
    for a, b in zip(found.batches, wanted.batches, strict=True):
        assert a.sizes == b.sizes
        for name in (field.name for field in fields(Batch) if field.name not in ("sizes", "origin")):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def steps_are_the_same(catalogue: Path, tensor_parallel: int, settings: dict[str, Any]) -> list[tuple[int, list[int]]]:
    """On every rank: steps read alone and shared; numbers of images that this rank read, and the damaged ones."""
    config = tiny_config(catalogue, UNUSED, **settings)
    reads = Reads(text_length=config.model.text.max_length)
    found = []
    with layout(tensor_parallel) as mesh:
        place = (config.data, config.seed, reads, mesh.dp.rank(), mesh.dp.size(), CPU)
        with closing(StepLoader(*place)) as alone, closing(StepLoader(*place, mesh.tp)) as shared:
            for step, data in enumerate(shared.steps(0, 4)):
                wanted = alone.load(step)
                same(data, wanted)
                assert set(data.bad_ids) <= set(wanted.bad_ids)
                found.append((data.images, data.bad_ids, wanted.images, wanted.bad_ids))
                size = data.images * 3 * config.data.preprocess.image_size**2 * 4
                assert shared.step_bytes == size
        with closing(StepLoader(*place, mesh.tp)) as shared, closing(StepLoader(*place)) as alone:
            same(shared.load(3), alone.load(3))
    return found


@pytest.mark.parametrize(
    ("world", "tensor_parallel", "backend", "micro_batches", "sizes"),
    [
        (2, 2, "dali", 2, (8, 5)),
        (2, 2, "reference", 1, (1, 1)),
        (4, 4, "reference", 1, (8, 5)),
        (4, 4, "dali", 2, (3, 2)),
        (4, 2, "dali", 1, (3, 2)),
    ],
)
def test_ranks_that_share_the_reading_have_what_each_would_have_read(
    damaged: tuple[Path, list[int]],
    world: int,
    tensor_parallel: int,
    backend: str,
    micro_batches: int,
    sizes: tuple[int, int],
) -> None:
    """Parts of unequal size, empty ones, damaged images, mosaics of all ranks' parts; damage is told once, by the rank
    that met it.
    """
    settings = {
        "data.mosaic": 0.5,
        "data.backend": backend,
        "data.micro_batches": micro_batches,
        "data.queries_per_step": sizes[0],
        "data.documents_per_step": sizes[1],
    }
    found = ranks(world).run(steps_are_the_same, damaged[0], tensor_parallel, settings)
    told = []
    for first in range(0, world, tensor_parallel):
        for steps in zip(*found[first : first + tensor_parallel], strict=True):
            assert sum(images for images, *_ in steps) == steps[0][2], "no image is read twice"
            assert sorted(i for _, bad, *_ in steps for i in bad) == sorted(steps[0][3])
            told += steps[0][3]
    assert told or sum(sizes) < 5


def samples_are_the_same(catalogue: Path, tensor_parallel: int) -> None:
    spec = PreprocessSpec(image_size=16)
    with layout(tensor_parallel) as mesh, closing(Catalogue(catalogue)) as opened:
        place = (opened, spec, "dali", 7, 1, CPU)
        with closing(ImageReader(*place)) as alone, closing(ImageReader(*place, mesh.tp)) as shared:
            for count in (7, 4, 1, 0):
                ids = np.arange(count) * 4
                parameters = shared.parameters(ids)
                for a, b in zip(shared.read(ids, parameters), alone.read(ids, parameters), strict=True):
                    assert a.dtype == b.dtype and torch.equal(a, b)


def test_embedding_shares_the_reading_too(damaged: tuple[Path, list[int]]) -> None:
    ranks(4).run(samples_are_the_same, damaged[0], 4)


def trained(catalogue: Path, run: Path, tensor_parallel: int, settings: dict[str, Any]) -> int:
    with trainer(tiny_config(catalogue, run, **settings), tensor_parallel) as t:
        t.fit()
        return t.damaged.count


def test_damage_counts_once_whoever_reads_it(damaged: tuple[Path, list[int]], tmp_path: Path) -> None:
    settings = {
        **{"data.queries_per_step": 9, "data.documents_per_step": 4, "train.steps": 4},
        "data.max_bad_fraction": 1.0,  # evaluation meets the damage too
    }
    alone = ranks(1).run(trained, damaged[0], tmp_path / "alone", 1, settings)
    shared = ranks(2).run(trained, damaged[0], tmp_path / "shared", 2, settings)
    assert 0 < sum(shared) == sum(alone) and min(shared) > 0
    wanted, lines = (log_lines(tmp_path / name) for name in ("alone", "shared"))
    for a, b in zip(wanted, lines, strict=True):
        if "train/loss" in a:
            assert a["data/bad_samples"] == b["data/bad_samples"]
            assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-4)


class Counted(torch.Tensor):
    """A tensor that says that it lies on a GPU, and which streams read it."""

    is_cuda = True

    def record_stream(self, stream: Any) -> None:
        stream.reads.append(self)


class Stream:
    def __init__(self) -> None:
        self.reads: list[Any] = []
        self.waited: list[Any] = []

    def wait_event(self, event: Any) -> None:
        self.waited.append(event)


@pytest.mark.parametrize("tensor_parallel", [False, True])
def test_the_training_stream_waits_for_what_was_read_ahead(
    catalogue: Path, tensor_parallel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU every step comes with the event after which its images are there, and their memory is not given away
    while they are read.
    """
    config, stream = tiny_config(catalogue, UNUSED, **{"data.micro_batches": 2}), Stream()
    with closing(StepLoader(config.data, 1, Reads(text_length=8), 0, 1, CPU)) as loader:
        decode, made = loader._decode, []

        def queued(planned: Any) -> Any:
            decoded = decode(planned)
            pixels = [own._replace(images=own.images.as_subclass(Counted)) for own in decoded.pixels]
            made.append(decoded._replace(pixels=pixels, event=object()))
            return made[-1]

        monkeypatch.setattr(loader, "_decode", queued)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
        for number, _ in enumerate(loader.steps(0, 3), 1):
            assert stream.waited == [decoded.event for decoded in made[:number]]
            assert len(stream.reads) == 2 * number
            assert all(a is own.images for a, own in zip(stream.reads[-2:], made[number - 1].pixels, strict=True))


@pytest.mark.parametrize(("cores", "ranks_of_node", "threads"), [(96, 8, 10), (8, 1, 6), (16, 8, 1), (2, 4, 1)])
def test_threads_follow_from_the_nodes_cores(
    cores: int, ranks_of_node: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks_of_node))
    assert decoding_threads(0) == threads and decoding_threads(5) == 5


def test_real_tokens_are_counted_and_padding_is_not(catalogue: Path) -> None:
    config = tiny_config(catalogue, UNUSED, **{"data.micro_batches": 2})
    with closing(StepLoader(config.data, 1, Reads(text_length=60), 0, 1, CPU)) as loader:
        data = loader.load(0)
        pad = loader.tokens.special.pad
        lengths = [[*row, pad].index(pad) for b in data.batches for row in b.document_tokens.tolist()]
        assert min(lengths) > 2 and max(lengths) < 60 and len(set(lengths)) > 1
        assert data.texts == TextTokens(sum(lengths), sum(n * n for n in lengths))


def flops_of_a_run(catalogue: Path, run: Path, tensor_parallel: int) -> list[float]:
    """In a pool: the FLOPs a step that each line of log counts, and those that the steps' own texts cost."""
    logged: list[float] = []

    def utilisation(flops: float, *_: Any) -> dict[str, float]:
        logged.append(flops)
        return {}

    config = tiny_config(catalogue, run, **{"train.log_every": 2, "model.text.max_length": 60})
    with (
        mock.patch("harness.train.flops.peak_flops", return_value=1e12),  # a CPU has none, so nothing would be counted
        trainer(config, tensor_parallel) as t,
        mock.patch("harness.train.throughput.utilisation", utilisation),
    ):
        t.fit()
        reads = Reads(text_length=config.model.text.max_length)
        with closing(StepLoader(config.data, config.seed, reads, 0, 1, CPU)) as loader:
            own = [t.throughput.flops.fixed + t.throughput.flops.texts(loader.load(step).texts) for step in range(4)]
    assert logged == pytest.approx([sum(own[:2]) / 2, sum(own[2:]) / 2], rel=1e-12)
    return logged


@pytest.mark.full
def test_utilisation_counts_the_tokens_that_are_there(catalogue: Path, tmp_path: Path) -> None:
    """The same for any layout, and other lines for steps of other texts."""
    found = [ranks(n).run(flops_of_a_run, catalogue, tmp_path / f"{n}-{tp}", tp) for n, tp in ((1, 1), (2, 1), (2, 2))]
    assert len({tuple(round(x) for x in rank) for layout in found for rank in layout}) == 1
    assert len(set(found[0][0])) == 2
