"""Every process group of a run, built once and handed on explicitly. The only importer of megatron-core's parallel_state."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from harness.errors import UserError
from models import megatron_cpu
from models.accelerators import CHOICES, choose
from models.recompute import RECOMPUTE
from models.sequence import COMMON_STREAM
from models.shape import VOCAB_MULTIPLE

megatron_cpu.install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Layout of the ranks.

    Args:
        tensor_parallel: ranks that share one copy of the towers (inside a node), a power of two; the rest of the world is data-parallel.
        sequence_parallel: between the towers' linear layers each of them holds a range of the tokens instead of all: less memory, the same result.
        recompute: what backward computes again instead of keeping it: none, selective (attention cores) or full (transformer layers).
        device: cuda, one GPU for each rank of a node; cpu; or auto, the GPUs unless the machine has none or CUDA_VISIBLE_DEVICES hides them.
        accelerators: auto takes fused kernels of TransformerEngine and apex on a GPU, where they are whole; torch takes none.
        timeout_minutes: a collective that takes longer ends the run.
    """

    tensor_parallel: int = 1
    sequence_parallel: bool = False
    recompute: str = "none"
    device: str = "auto"
    accelerators: str = "auto"
    timeout_minutes: float = 10.0


class Mesh:
    """Process groups and this rank's place in them.

    tp: ranks that share the towers' weights; dp: ranks that bring different samples; row_group: dp x tp, the ranks that share the class rows.
    """

    def __init__(self, config: MeshConfig) -> None:
        """Joins the process group that torchrun describes (one process without it) and builds all groups.

        Raises:
            UserError: see check_layout.
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))
        check_layout(config, world)
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            # A run of one process needs no rendezvous, hence no free port.
            store = {} if "MASTER_ADDR" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
            timeout = timedelta(minutes=config.timeout_minutes)
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout, **store)  # type: ignore[arg-type]
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor_parallel,
            distributed_timeout_minutes=int(config.timeout_minutes) or 1,
        )
        self.config = config
        self.accelerators = choose(config.accelerators, self.device)
        self.groups = ProcessGroupCollection.use_mpu_process_groups()
        self.tp: ProcessGroup = self.groups.tp
        self.dp: ProcessGroup = self.groups.dp
        self.row_group: ProcessGroup = dist.group.WORLD  # type: ignore[assignment]
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def seed_streams(self, seed: int, step: int) -> None:
        """Random streams of one step, a pure function of (seed, step, place), so that no generator state is ever saved.

        torch's generator differs over dp and agrees over tp; megatron-core's tracked stream, for dropout inside tensor-parallel regions,
        differs over both. Inside a sequence-parallel block torch's is switched to that one; what has to agree there draws from COMMON_STREAM.
        """
        key = (seed * 1_000_003 + step) * 65_537 + self.dp.rank()
        torch.manual_seed(key)
        tracker = tensor_parallel.get_cuda_rng_tracker()
        tracker.reset()
        tracker.add("model-parallel-rng", key * 1_031 + self.tp.rank() + 1)
        tracker.add(COMMON_STREAM, key * 1_031)

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
        """Ends all groups."""
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def check_layout(config: MeshConfig, world: int) -> None:
    """Raises UserError where `world` ranks cannot be laid out."""
    if config.tensor_parallel < 1 or world % config.tensor_parallel:
        raise UserError(
            f"mesh.tensor_parallel is {config.tensor_parallel}, but {world} rank(s) were started",
            "Start a multiple of it (torchrun --nproc-per-node) or change mesh.tensor_parallel.",
        )
    if VOCAB_MULTIPLE % config.tensor_parallel:
        raise UserError(
            f"mesh.tensor_parallel is {config.tensor_parallel}; word tables, padded to a multiple of {VOCAB_MULTIPLE}, do not divide by it",
            f"It must divide {VOCAB_MULTIPLE}",
        )
    if config.sequence_parallel and config.tensor_parallel == 1:
        raise UserError(
            "mesh.sequence_parallel spreads tokens over tensor-parallel ranks, but mesh.tensor_parallel is 1",
            "Raise mesh.tensor_parallel or set mesh.sequence_parallel to false",
        )
    for key, choices in (("recompute", RECOMPUTE), ("accelerators", CHOICES)):
        if (value := getattr(config, key)) not in choices:
            raise UserError(f"mesh.{key} is '{value}'", f"It can be {', '.join(choices)}")
