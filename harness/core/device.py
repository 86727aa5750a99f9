"""Device of a rank: GPU or CPU, deterministic kernels, the precision of float32 products."""

from __future__ import annotations

import os
import re
import resource
import warnings
from pathlib import Path

import torch

from harness.core.errors import UserError

DEVICE_FILES = Path("/dev")  # has nvidia0, nvidia1, … where there are GPUs
DRIVER_FILE = Path("/proc/driver/nvidia/version")


def choose_device(wanted: str) -> torch.device:
    """The device of this rank for mesh.device `wanted`; all ranks of a node get the same kind, or the same error.

    Raises:
        UserError: cuda is wanted and torch sees no GPU; auto on a machine with GPUs that torch cannot use; fewer GPUs
            than ranks on this node.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not found:
        machine = any(DEVICE_FILES.glob("nvidia[0-9]*"))
        if wanted == "auto" and (gpus_hidden() or not machine):
            return torch.device("cpu")
        raise UserError(*_why_no_gpu(machine))
    here = int(os.environ.get("LOCAL_RANK", "0"))
    ranks = max(here + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if ranks > found:
        raise UserError(
            f"{ranks} ranks were started on a node where torch sees {found} GPU(s)",
            f"Start one for each (torchrun --nproc-per-node {found}), or say --mesh.device cpu",
        )
    return torch.device("cuda", here)


def gpus_hidden() -> bool:
    """True if CUDA_VISIBLE_DEVICES hides all GPUs: CUDA stops at the first entry that is not a GPU."""
    return re.match(r"GPU-|MIG-|\d", os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip()) is None


def _why_no_gpu(machine: bool) -> tuple[str, str]:
    """Error for a torch that sees no GPU, with its remedy; `machine`: True if the machine has one."""
    if gpus_hidden():
        hidden = os.environ["CUDA_VISIBLE_DEVICES"]
        return f"mesh.device is cuda, but CUDA_VISIBLE_DEVICES='{hidden}' hides all GPUs", "Unset it"
    if not machine:
        return "mesh.device is cuda, but this machine has no NVIDIA GPU", "Set mesh.device to auto or cpu"
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
    return (
        f"this machine has NVIDIA GPUs (driver {driver_version()}), "
        f"but torch {torch.__version__}, built for {built}, can use none",
        "CUDA 13 needs driver 580, CUDA 12 needs 525: install what fits (docs/clusters.md), or say --mesh.device cpu",
    )


def driver_version() -> str:
    """Version of this machine's NVIDIA driver, as the kernel reports it."""
    try:
        found = re.search(r"\b\d{3,}\.[\d.]+", DRIVER_FILE.read_text())
    except OSError:
        found = None
    return found[0] if found else "unknown"


def allow_many_files() -> None:
    """Raises the soft limit of open files, often 1,024, to the hard one: each peer is a socket, each shard a file."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def set_deterministic(wanted: bool) -> None:
    """Switches torch's deterministic kernels on or off. Call before CUDA starts: cuBLAS reads its variable once."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(wanted)


def set_precision(precision: str) -> None:
    """Sets how a GPU multiplies float32 matrices and convolutions: in TF32 for train.precision tf32, exactly for all
    others.

    torch's own default mixes them: convolutions in TF32, matrices exactly.
    """
    with warnings.catch_warnings():
        # torch recommends newer switches, but its compiler reads these and fails if only the newer ones are set.
        warnings.filterwarnings("ignore", "Please use the new API settings to control TF32")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
