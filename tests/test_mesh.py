"""Groups of every rank, its device, its random streams, and what becomes of the others where one fails."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from harness.core import device
from harness.core.errors import UserError
from harness.core.mesh import Mesh, MeshConfig, check_layout
from models import megatron_cpu
from tests import pool
from tests.pool import layout, ranks
from tests.runs import UNUSED, tiny_config, trainer

megatron_cpu.install()

from megatron.core import parallel_state  # noqa: E402


def streams(step: int) -> tuple[int, int, tuple[float, ...], tuple[float, ...]]:
    from megatron.core import tensor_parallel

    with layout(2) as mesh:
        mesh.seed_streams(seed=5, step=step)
        plain = torch.rand(3)
        with tensor_parallel.get_cuda_rng_tracker().fork():
            tracked = torch.rand(3)
        return mesh.dp.rank(), mesh.tp.rank(), tuple(plain.tolist()), tuple(tracked.tolist())


def test_streams_of_a_step() -> None:
    first, again, other = (ranks(4).run(streams, step) for step in (3, 3, 4))
    assert first == again, "a stream depends on something else than seed, step and place"
    plain = {(dp, tp): values for dp, tp, values, _ in first}
    assert plain[0, 0] == plain[0, 1] and plain[1, 0] == plain[1, 1] and plain[0, 0] != plain[1, 0]
    tracked = [values for _, _, _, values in first]
    assert len(set(tracked)) == 4, "two ranks drop the same activations inside a tensor-parallel region"
    everything = [values for found in (first, other) for _, _, *pair in found for values in pair]
    assert len(set(everything)) == 2 * (2 + 4), "two steps, or two streams, draw the same"


def test_a_layout_that_does_not_divide() -> None:
    with pytest.raises(UserError, match=r"tensor_parallel is 3, but 4 rank"):
        check_layout(MeshConfig(tensor_parallel=3), 4)


# --- groups ---


@pytest.fixture
def pretend_world(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], list[int]]]:
    """pretend_world(rank, size): this process is that rank of a world in which nothing is sent; the list gets the size
    of every group it asks for.
    """

    def join(rank: int, size: int) -> list[int]:
        asked: list[int] = []
        make = dist.new_group

        def counted(ranks: list[int], *_: Any, backend: str | None = None, **options: Any) -> Any:
            asked.append(len(ranks))
            return make(ranks, **options)  # without a gloo of its own: there is nobody to connect to

        monkeypatch.setattr(dist, "new_group", counted)
        monkeypatch.setenv("WORLD_SIZE", str(size))
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
        return asked

    yield join
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("tensor_parallel", [1, 8])
def test_groups_and_sockets_of_a_rank_at_512(
    pretend_world: Callable[[int, int], list[int]], tensor_parallel: int
) -> None:
    asked = pretend_world(77, 512)
    mesh = Mesh(MeshConfig(tensor_parallel=tensor_parallel))
    sockets = sum(size - 1 for size in [512, *asked])  # gloo connects each rank of a group with every other
    assert len(asked) <= 3 and sockets <= {1: 511, 8: 581}[tensor_parallel]
    assert (mesh.tp.size(), mesh.dp.size()) == (tensor_parallel, 512 // tensor_parallel)
    assert tensor_parallel > 1 or mesh.dp is mesh.groups.dp_cp is dist.group.WORLD, "more communicators than one"


def named_groups() -> dict[str, Any]:
    """Every group that megatron-core knows by a name, as its ranks, and its lists of ranks."""
    found = {name: value for name, value in vars(parallel_state).items() if not name.startswith("__")}
    groups = {n: dist.get_process_group_ranks(v) for n, v in found.items() if isinstance(v, dist.ProcessGroup)}
    return groups | {n: v for n, v in found.items() if n.endswith("_RANKS") or "_RANKS_" in n}


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
@pytest.mark.parametrize("rank", [0, 3])
def test_groups_are_those_that_megatron_core_makes(
    pretend_world: Callable[[int, int], list[int]], tensor_parallel: int, rank: int
) -> None:
    asked = pretend_world(rank, 4)
    mesh = Mesh(MeshConfig(tensor_parallel=tensor_parallel))
    ours, few = named_groups(), len(asked)
    mesh.close()
    theirs = pretend_world(rank, 4)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
    assert len(named_groups()) > 20 and ours == named_groups()
    assert len(theirs) > 40 > few


def over_gloo(tensor_parallel: int) -> tuple[list[Any], list[Any], int]:
    """Groups as on a machine with GPUs, but NCCL's part sends nothing."""
    dist.destroy_process_group()
    pool._join("cpu:gloo,cuda:fake")
    with Mesh(MeshConfig(tensor_parallel=tensor_parallel)) as mesh:
        shared = [mesh.rank]
        dist.broadcast_object_list(shared, 3)
        parts: list[Any] = [None] * mesh.dp.size()
        dist.all_gather_object(parts, mesh.rank, group=mesh.dp)
        mesh.barrier()
        assert {str(device) for device in mesh.tp._device_types} == {"cpu", "cuda"}
        return shared, parts, int(mesh.sum(torch.tensor(mesh.rank)))


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_objects_go_over_gloo_where_tensors_go_over_nccl(tensor_parallel: int) -> None:
    parts = [[0, 1, 2, 3]] * 4 if tensor_parallel == 1 else [[0, 2], [1, 3]] * 2
    assert ranks(4).run(over_gloo, tensor_parallel) == [([3], own, 6) for own in parts]


def test_the_limit_of_open_files_is_raised() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard // 2, hard))
        with Mesh(MeshConfig()):
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- device ---


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """machine(wanted, …): the device that a rank there takes, or the error."""

    def there(wanted: str = "auto", gpus: int = 0, seen: int = 0, **environment: Any) -> str:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        for number in range(gpus):
            (tmp_path / f"nvidia{number}").touch()
        (tmp_path / "version").write_text(
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"
            "GCC version: 12.2.0\n"
        )
        monkeypatch.setattr(device, "DEVICE_FILES", tmp_path)
        monkeypatch.setattr(device, "DRIVER_FILE", tmp_path / "version")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        try:
            return str(device.choose_device(wanted))
        except UserError as error:
            assert "\n" not in str(error)
            return str(error)

    return there


def test_a_rank_takes_its_own_gpu_or_the_cpu(machine: Callable[..., str]) -> None:
    assert machine() == machine("cpu", gpus=8, seen=8) == "cpu"
    assert machine(gpus=8, seen=8, LOCAL_RANK=7, LOCAL_WORLD_SIZE=8) == "cuda:7"
    assert machine("cuda", gpus=8, seen=2, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2, CUDA_VISIBLE_DEVICES="6,7") == "cuda:1"
    for hidden in ("", "-1", "NoDevFiles"):
        assert machine(gpus=8, CUDA_VISIBLE_DEVICES=hidden) == "cpu"


def test_never_the_cpu_in_silence_nor_a_gpu_that_is_not_there(machine: Callable[..., str]) -> None:
    def says(answer: str, *pieces: str) -> None:
        assert all(piece in answer for piece in pieces), answer

    says(machine("cuda"), "this machine has no NVIDIA GPU")
    for rank in (0, 1):  # the one that could have a GPU too, or it would wait for the other
        says(machine(gpus=1, seen=1, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=2), "2 ranks", "1 GPU(s)", "--mesh.device cpu")
    says(machine("cuda", gpus=1, seen=1, LOCAL_RANK=1), "2 ranks", "--nproc-per-node 1")
    for wanted in ("auto", "cuda"):
        says(machine(wanted, gpus=1), "driver 550.54.15", "CUDA 13.0", "driver 580", "--mesh.device cpu")
    says(machine("cuda", gpus=1, CUDA_VISIBLE_DEVICES=""), "CUDA_VISIBLE_DEVICES='' hides")


def test_deterministic_kernels_and_precision_are_switched_on_and_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    for wanted in (True, False):
        with Mesh(MeshConfig(deterministic=wanted)) as mesh:
            assert torch.are_deterministic_algorithms_enabled() is wanted and ("deterministic" in mesh.line) is wanted
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    for precision in ("tf32", "bf16", "fp32"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            device.set_precision(precision)
        switches = torch.backends.cuda.matmul, torch.backends.cudnn
        assert [switch.allow_tf32 for switch in switches] == [precision == "tf32"] * 2
        torch.get_float32_matmul_precision()  # what torch's compiler reads, and which fails where switches disagree


# --- errors ---

RAISES = """
import atexit, sys, time, torch, torch.distributed as dist
from harness.core import cli as arguments
from harness.core.cli import run_command
from harness.core.errors import UserError
from harness.core.mesh import Mesh, MeshConfig

# As the end of NCCL's groups, asked for or at the interpreter's end, which waits for ranks that sit in a collective.
dist.destroy_process_group = lambda *_: time.sleep(3600)
atexit.register(time.sleep, 3600)
arguments.OTHERS_WAIT = 60  # in which torchrun ends the other rank, however loaded the machine
errors = {"mistake": UserError("sample 5 is missing", "Restore it"), "crash": torch.OutOfMemoryError("no memory")}

def body():
    with Mesh(MeshConfig()) as mesh:
        mesh.barrier()
        if mesh.rank == 1:
            raise errors[sys.argv[1]]
        mesh.sum(torch.ones(1))

sys.exit(run_command(body))
"""


@pytest.mark.parametrize(
    ("kind", "heard"), [("mistake", "error: rank 1: sample 5 is missing. Restore it"), ("crash", "[rank 1] torch.Out")]
)
def test_an_error_of_one_rank_is_heard_and_ends_the_job(kind: str, heard: str, tmp_path: Path) -> None:
    script = tmp_path / "raises.py"
    script.write_text(RAISES)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), kind]
    job = subprocess.run(
        [sys.executable, *words], env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True, timeout=150
    )
    assert job.returncode != 0
    lines = job.stderr.splitlines()
    assert any(line.startswith(heard) for line in lines), job.stderr
    assert not [line for line in lines if line.startswith(("error: ", "[rank 0]"))][1:], "one that followed is told too"


def test_a_run_of_one_process_can_start_again_after_an_error() -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="on purpose"), Mesh(MeshConfig()):
            raise ValueError("on purpose")
        assert not dist.is_initialized()


# --- seeds ---


@pytest.mark.parametrize("seed", [3, 200_000, 2**31, 20261128, 2**63 - 1])
def test_any_seed_below_two_to_the_63_runs(seed: int, catalogue: Path) -> None:
    seeds = {"seed": seed, "head.seed": seed, "head.sample_rate": 0.5, "model.vision.dropout": 0.1}
    with trainer(tiny_config(catalogue, UNUSED, **seeds)) as t:
        t.train_step(next(t.loader.steps(0, 1)))
        t.mesh.seed_streams(seed, 1)
        key = (seed * 1_000_003 + 1) * 65_537
        assert torch.initial_seed() == key % 2**64
        assert key < 2**64 or seed > 200_000, "small seeds have the streams that they always had"


@pytest.mark.parametrize("key", ["seed", "head.seed"])
def test_a_seed_that_is_negative_or_too_large_is_refused(key: str, catalogue: Path) -> None:
    with pytest.raises(UserError, match=rf"^{key} is -1. It must be an int, at least 0"):
        tiny_config(catalogue, UNUSED, **{key: -1})
    with pytest.raises(UserError, match=rf"^{key} is 9223372036854775808. It must be at most 2\*\*63 - 1"):
        tiny_config(catalogue, UNUSED, **{key: 2**63})
