"""Work that lasts longer than a collective may: nobody's collective waits for it, and a rank that fails or falls silent
is heard by all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from harness.artefact import document_chunks, index_export
from harness.commands import export
from harness.core import manifest as checksums
from harness.core import waiting, watch
from harness.core.errors import UserError
from harness.core.manifest import shared_out, verify, write_manifest
from harness.core.mesh import Mesh, MeshConfig
from harness.evaluate.tasks import category as probe
from harness.train import checkpoint_files
from tests.pool import layout, ranks
from tests.runs import tiny_config, trainer


def hurry(rendezvous: Path, seconds: float) -> None:
    """In a pool: a world whose collectives may take so long."""
    place = dist.get_rank(), dist.get_world_size()
    dist.barrier()  # all have joined it
    dist.destroy_process_group()
    join(rendezvous, seconds, *place)


def join(rendezvous: Path, seconds: float, rank: int, world: int) -> None:
    method, timeout = f"file://{rendezvous}", timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=world, timeout=timeout)


@contextmanager
def hurried(rendezvous: Path, seconds: float) -> Iterator[Mesh]:
    hurry(rendezvous, seconds)
    mesh = Mesh(MeshConfig(timeout_minutes=seconds / 60))
    try:
        yield mesh
    finally:
        mesh.close()


def slow_first_rank(rendezvous: Path) -> list[Any]:
    with hurried(rendezvous, 2) as mesh:
        started = time.monotonic()
        made = waiting.on_first_rank(lambda: time.sleep(3) or "made", mesh, "a test")  # type: ignore[func-returns-value]
        of_all = waiting.of_all_ranks(lambda: mesh.rank * 2, mesh, "a test")
        mesh.barrier()
        return [made, of_all, time.monotonic() - started >= 3]


def test_the_others_wait_longer_than_a_collective_may(tmp_path: Path) -> None:
    assert ranks(3).run(slow_first_rank, tmp_path / "meet") == [["made", [0, 2, 4], True]] * 3


def failing(rendezvous: Path, rank: int, error: Exception) -> str:
    def work() -> None:
        if dist.get_rank() == rank:
            raise error

    with hurried(rendezvous, 60) as mesh:
        with pytest.raises(Exception) as caught:
            waiting.in_own_time(work, mesh, "the index")
        return f"{caught.type.__name__}: {caught.value}"


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_raises_is_heard_by_all(rank: int, tmp_path: Path) -> None:
    found = ranks(3).run(failing, tmp_path / "user", rank, UserError("the disk is full", "Free some"))
    assert found == ["UserError: the disk is full. Free some"] * 3
    found = ranks(3).run(failing, tmp_path / "other", rank, ValueError("odd"))
    assert found.pop(rank) == "ValueError: odd"
    assert found == [f"RuntimeError: rank {rank} failed in the index: ValueError('odd')"] * 2


def silent(rendezvous: Path, rank: int) -> str:
    def work() -> None:
        time.sleep(5 if dist.get_rank() == rank else 0)

    quiet = patch.object(watch.Watch, "_run", lambda watch: None)
    with quiet if dist.get_rank() == rank else nullcontext(), hurried(rendezvous, 1.5) as mesh:
        try:
            waiting.in_own_time(work, mesh, "the index")
        except UserError as error:
            return str(error)
    return "nothing"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_falls_silent_is_missed(rank: int, tmp_path: Path) -> None:
    found = ranks(3).run(silent, tmp_path / "meet", rank)
    found.pop(rank)
    assert all(text.startswith(f"rank {rank} was not heard of for 1.5 s") for text in found), found


FILES = {
    "a": 5,
    "towers/__0_0.distcp": 9,
    "towers/__1_0.distcp": 2,
    "head/__1_1.distcp": 1,
    "head/__7_0.distcp": 4,
    "b": 3,
}


@pytest.mark.parametrize("world", [1, 2, 3, 9])
def test_files_are_read_by_who_wrote_them_and_the_rest_by_who_has_least(world: int) -> None:
    shares = shared_out(FILES, world)
    assert len(shares) == world and sorted(name for share in shares for name in share) == sorted(FILES)
    if world == 3:
        assert shares == [
            ["towers/__0_0.distcp"],
            ["towers/__1_0.distcp", "head/__1_1.distcp", "head/__7_0.distcp"],
            ["a", "b"],
        ]
    if world == 9:
        assert shares[7] == ["head/__7_0.distcp"]


def listed(folder: Path) -> tuple[list[str], list[str]]:
    """In a pool: problem of the folder as it is, and with one file damaged; the files that this rank read."""
    read: list[str] = []
    real = checksums.checksum

    def counted(file: Path, algorithm: str) -> str:
        read.append(file.name)
        return real(file, algorithm)

    with layout() as mesh, patch.object(checksums, "checksum", counted):
        write_manifest(folder, mesh)
        wrong = [verify(folder, mesh)]
        mesh.barrier()
        if mesh.rank == 0:
            (folder / "towers/__1_0.distcp").write_bytes(b"x" * 2)
        mesh.barrier()
        wrong.append(verify(folder, mesh))
        mesh.barrier()
    return wrong, read


def test_ranks_make_and_check_one_manifest(tmp_path: Path) -> None:
    for folder in (tmp_path / "alone", tmp_path / "shared"):
        for number, (name, size) in enumerate(FILES.items()):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(bytes([number]) * size)
    write_manifest(tmp_path / "alone")
    found = ranks(3).run(listed, tmp_path / "shared")
    assert (tmp_path / "alone/manifest.json").read_text() == (tmp_path / "shared/manifest.json").read_text()
    assert [wrong for wrong, _ in found] == [["", "towers/__1_0.distcp has another checksum"]] * 3
    read = [name for _, own in found for name in own]
    assert sorted(read) == sorted(3 * [Path(name).name for name in FILES]), "each file by one rank"


SECONDS, LONGER = 6.0, 8.0


def whole_run(rendezvous: Path, catalogue: Path, run: Path) -> list[str]:
    """In a pool: trains a step, saves, evaluates, resumes and exports; each time one rank takes longer than a
    collective may.
    """
    hurry(rendezvous, SECONDS)
    slept: list[str] = []

    def slow(what: str, rank: int, real: Callable[..., Any]) -> Callable[..., Any]:
        def slower(*args: Any) -> Any:
            if dist.get_rank() == rank and what not in slept:
                slept.append(what)
                time.sleep(LONGER)
            return real(*args)

        return slower

    tasks = {"evaluation.tasks": ["photo", "category"], "evaluation.category": "shape", "evaluation.learn_split": "val"}
    settings = {"train.steps": 1, **tasks}
    with (
        patch.object(checksums, "checksum", slow("save", 1, checksums.checksum)),
        patch.object(probe, "predicted", slow("probe", 0, probe.predicted)),
        patch.object(index_export, "write_index", slow("index", 0, index_export.write_index)),
        patch.object(document_chunks, "write_documents", slow("documents", 1, document_chunks.write_documents)),
    ):
        with trainer(tiny_config(catalogue, run, **settings)) as t:
            t.fit()
            slept[:] = [what for what in slept if what != "save"]  # once more, in reading
            path, passed_over = checkpoint_files.newest(run / "checkpoints", t.mesh)
            assert path is not None and path.name == "step-00000001" and not passed_over
        join(Path(f"{rendezvous}-2"), SECONDS, t.mesh.rank, t.mesh.world_size)
        export.run(export.ExportConfig(run=run, out=run.parent / "artefact", onnx=False))
    return slept


@pytest.mark.full
def test_no_slow_rank_ends_a_run(catalogue: Path, tmp_path: Path) -> None:
    """A checksum of rank 1 in saving and in resuming, the probe, the documents of rank 1, the index."""
    found = ranks(2).run(whole_run, tmp_path / "meet", catalogue, tmp_path / "run")
    assert [sorted(slept) for slept in found] == [["index", "probe"], ["documents", "save"]]
    assert verify(tmp_path / "artefact") == ""
