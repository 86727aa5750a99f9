"""Process groups of a run, built once and passed explicitly. The only importer of megatron-core's parallel_state."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.rendezvous import rendezvous

from harness.core.device import allow_many_files, choose_device, gpus_hidden, set_deterministic
from harness.core.errors import UserError
from harness.core.watch import Watch
from models import megatron_cpu
from models.accelerators import choose
from models.ranges import NonNegativeFloat, PositiveFloat, PositiveInt
from models.sequence import COMMON_STREAM
from models.shape import VOCAB_MULTIPLE

Device = Literal["auto", "cuda", "cpu"]
Compile = Literal["auto", "always", "never"]


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Layout of the ranks.

    Args:
        tensor_parallel: ranks that share one copy of the towers (inside a node), a power of two; the rest of the world
            is data-parallel.
        sequence_parallel: between the towers' linear layers each of them holds a range of the tokens instead of all:
            less memory, the same result.
        recompute: parts whose activations backward recomputes: none, selective (attention cores) or full (transformer
            layers).
        device: cuda, one GPU for each rank of a node; cpu; or auto, the GPUs unless the machine has none or
            CUDA_VISIBLE_DEVICES hides them.
        deterministic: on a GPU, only kernels whose results do not change from run to run, and an error where torch has
            none; slower.
        accelerators: auto takes fused kernels of TransformerEngine and apex on a GPU, where they work; torch takes
            none.
        compile: auto compiles the towers' blocks by torch.compile on a GPU; always on a CPU too (needs a C++ compiler);
            never.
        timeout_minutes: silence of a rank after which the run ends; so does a collective that takes a quarter longer.
        step_minutes: longest time of one part (data, forward, …) of a training step on a rank, after the first step of
            a process, after which the run ends and names the rank; 0: a tenth more than timeout_minutes, as in the
            first step.
    """

    tensor_parallel: PositiveInt = 1
    sequence_parallel: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    device: Device = "auto"
    deterministic: bool = False
    accelerators: Literal["auto", "torch"] = "auto"
    compile: Compile = "auto"
    timeout_minutes: PositiveFloat = 10.0
    step_minutes: NonNegativeFloat = 0.0


def quiet_libraries() -> None:
    """Silences what megatron-core and torch.distributed say of their own internals: a log is for what a user can act
    on.
    """
    warnings.filterwarnings("ignore", module=r"megatron\..*|torch\.distributed\..*")
    logging.getLogger("megatron").setLevel(logging.ERROR)


def _meet(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """The store in which the launcher's ranks meet, this one's number and theirs."""
    if "MASTER_ADDR" not in os.environ:
        return dist.HashStore(), 0, 1  # a run of one process needs no free port
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    # The launcher's store keeps the addresses of ranks that ended before a restart (--max-restarts).
    return dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store), rank, size


class Mesh:
    """Process groups and this rank's place in them; in a `with` block they end with it.

    tp: ranks that share the towers' weights; dp: ranks that bring different samples; row_group: dp x tp, the ranks that
    share the class rows. On GPUs every group computes over NCCL, and carries objects, barriers and CPU tensors over
    gloo.
    """

    def __init__(self, config: MeshConfig) -> None:
        """Joins the process group that torchrun describes (one process without it) and builds all groups.

        Raises:
            UserError: see check_layout and choose_device.
        """
        world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
        check_layout(config, world)
        quiet_libraries()
        megatron_cpu.install()  # megatron-core takes seconds to import; a mistake in a recipe is told before
        self.device = choose_device(config.device)
        cuda = self.device.type == "cuda"
        megatron_cpu.use_cpu(not cuda)
        allow_many_files()
        set_deterministic(config.deterministic)
        if cuda:
            torch.cuda.set_device(self.device)
        timeout = timedelta(minutes=1.25 * config.timeout_minutes)  # later than the watch, which names the rank
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            store, rank, size = _meet(timeout)
            dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
        self.config = config
        self.accelerators = choose(config.accelerators, self.device)
        self.groups = _build_groups(config.tensor_parallel, timeout)
        self.tp: ProcessGroup = self.groups.tp
        self.dp: ProcessGroup = self.groups.dp
        self.row_group: ProcessGroup = dist.group.WORLD  # type: ignore[assignment]
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.watch = Watch(60 * config.timeout_minutes)

    def __enter__(self) -> Mesh:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Ends the groups, unless an error leaves the block on one of several ranks: waiting for the others could then
        last for ever.
        """
        if error is None or self.world_size == 1:
            self.close()
        else:
            self.watch.fail()

    @property
    def line(self) -> str:
        """Device of this rank, for the log."""
        name = "cpu" if self.device.type == "cpu" else f"{self.device} ({torch.cuda.get_device_name(self.device)})"
        hidden = ", GPUs hidden by CUDA_VISIBLE_DEVICES" if self.device.type == "cpu" and gpus_hidden() else ""
        return f"device ({self.config.device}): {name}{hidden}{', deterministic' if self.config.deterministic else ''}"

    def seed_streams(self, seed: int, step: int) -> None:
        """Random streams of one step, a pure function of (seed, step, place), so that no generator state is ever saved.

        torch's generator differs over dp and agrees over tp; megatron-core's tracked stream, for dropout inside
        tensor-parallel regions, differs over both. Inside a sequence-parallel block torch's is switched to that one;
        what has to agree there draws from COMMON_STREAM.
        """
        from megatron.core import tensor_parallel

        # Modulo 2**64, all that a generator takes: odd factors keep the streams of a run apart there too.
        key = (seed * 1_000_003 + step) * 65_537 + self.dp.rank()
        torch.manual_seed(key % 2**64)
        tracker = tensor_parallel.get_cuda_rng_tracker()
        tracker.reset()
        tracker.add("model-parallel-rng", (key * 1_031 + self.tp.rank() + 1) % 2**64)
        tracker.add(COMMON_STREAM, key * 1_031 % 2**64)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """`value` summed over the world, in place."""
        dist.all_reduce(value)
        return value

    def synchronize(self) -> None:
        """Waits for the device, so that a clock read afterwards is true."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def barrier(self) -> None:
        """Waits for all ranks."""
        dist.barrier()

    def close(self) -> None:
        """Ends all groups; over NCCL this waits for the other ranks to do the same."""
        from megatron.core import parallel_state

        self.watch.close()
        dist.destroy_process_group()
        parallel_state.destroy_model_parallel()


def _build_groups(tensor_parallel: int, timeout: timedelta) -> Any:
    """megatron-core's ProcessGroupCollection, and its globals that name them; of those over the same ranks there is
    one.

    megatron-core itself makes every group on every rank: at 512 ranks 5,641 rounds through the store, and ten full
    meshes of gloo sockets a rank. Here a rank makes only its own groups, at most three, in the same order on all ranks.
    """
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    made = {tuple(range(dist.get_world_size())): dist.group.WORLD}

    def group_of(ranks: list[int], **_: Any) -> ProcessGroup | None:
        key = tuple(ranks)
        if dist.get_rank() not in key:
            return None
        if key not in made:
            made[key] = dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)
        return made[key]

    parallel_state.destroy_model_parallel()  # left by a mesh that an error ended
    theirs, parallel_state.create_group = parallel_state.create_group, group_of
    try:
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
    finally:
        parallel_state.create_group = theirs
    return ProcessGroupCollection.use_mpu_process_groups()


def check_layout(config: MeshConfig, world: int) -> None:
    """Raises UserError where `world` ranks cannot be laid out."""
    if world % config.tensor_parallel:
        raise UserError(
            f"mesh.tensor_parallel is {config.tensor_parallel}, but {world} rank(s) were started",
            "Start a multiple of it (torchrun --nproc-per-node) or change mesh.tensor_parallel.",
        )
    if VOCAB_MULTIPLE % config.tensor_parallel:
        raise UserError(
            f"mesh.tensor_parallel is {config.tensor_parallel}; "
            f"word tables, padded to a multiple of {VOCAB_MULTIPLE}, do not divide by it",
            f"It must divide {VOCAB_MULTIPLE}",
        )
    if config.sequence_parallel and config.tensor_parallel == 1:
        raise UserError(
            "mesh.sequence_parallel spreads tokens over tensor-parallel ranks, but mesh.tensor_parallel is 1",
            "Raise mesh.tensor_parallel or set mesh.sequence_parallel to false",
        )
