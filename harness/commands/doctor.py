"""`shelfmark doctor`: Say what this machine has, what is missing, and whether a training could start."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from harness.core.errors import UserError
from harness.core.files import printable

# Packages are imported where they are looked at: one that is missing or broken must not end the command.
EXAMPLE = "shelfmark doctor --run-dir /scratch/runs"
GIB = 1 << 30
# Instruction sets that decide on the speed of a CPU, as Linux names them.
CPU_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
PROBE = 64 << 20  # bytes written to the disk for its speed
LEAST_DISK = 1 * GIB  # a small run with its checkpoints
LEAST_SHARED = 1 * GIB  # NCCL's and gloo's buffers between the ranks of a node
LEAST_FILES = 4096  # a socket for each peer, a file for each shard


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Prints a line for each part of the machine; exit code 0 means that a training could start.

    Args:
        run_dir: folder for runs, whose disk is measured; need not exist yet.
        device: cuda, cpu, or auto, as mesh.device of a recipe.
    """

    run_dir: Path = Path("runs")
    device: Literal["auto", "cuda", "cpu"] = "auto"


def run(config: DoctorConfig) -> dict[str, Any]:
    """Prints the table and returns it, name -> text.

    Raises:
        UserError: a part is missing without which no training starts.
    """
    found: dict[str, Any] = {}
    missing = []
    for name, needed, look in LOOKS:
        try:
            text = look(config)
        except (UserError, ImportError, OSError) as error:  # OSError: also a shared library that is not there
            text = f"{'MISSING' if needed else 'warning'}: {error}"
            missing += [name] if needed else []
        found[name] = text
        print(f"{name:<14}{printable(text, 1000)}", flush=True)
    if missing:
        raise UserError(f"a training cannot start here: {', '.join(missing)}", "Each line above with MISSING has a fix")
    print("a training can start here")
    return found


def _shelfmark(_: DoctorConfig) -> str:
    from harness.core.versions import commit

    python = f"Python {platform.python_version()} ({sys.executable})"
    return f"{metadata.version('shelfmark')}, commit {commit()}, {python}"


def _cpu(_: DoctorConfig) -> str:
    """Model, cores that this process may use, instruction sets."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    model = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.+)$", text, re.MULTILINE)
    has = set(flags[1].split()) if flags else set()
    cores = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores"
    sets = " ".join(name for name in CPU_SETS if name in has) or "no vector instructions known"
    return f"{model[1] if model else platform.machine()}, {cores}, {sets}"


def _memory(_: DoctorConfig) -> str:
    kib = dict(re.findall(r"^(\w+): +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE))
    return f"{int(kib['MemAvailable']) / 2**20:.1f} of {int(kib['MemTotal']) / 2**20:.1f} GiB available"


def _gpus(config: DoctorConfig) -> str:
    """Every GPU that torch sees."""
    import torch

    from harness.core.device import choose_device, driver_version, gpus_hidden

    if choose_device(config.device).type == "cpu":
        return "hidden by CUDA_VISIBLE_DEVICES" if gpus_hidden() else "none used"
    cards = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    names = [f"{card.name} {card.total_memory / GIB:.0f} GiB (sm_{card.major}{card.minor})" for card in cards]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return f"{', '.join(names)}, driver {driver_version()}, NCCL {nccl}"


def _torch(_: DoctorConfig) -> str:
    import torch

    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs only"
    return f"{torch.__version__}, {built}, uses {torch.backends.cpu.get_cpu_capability()} on the CPU"


def unmet(requirements: Iterable[str]) -> tuple[list[str], list[str]]:
    """Installed packages ("numpy 2.1") of those that `requirements` ask for on this machine, and requirements that
    are not met.
    """
    from packaging.requirements import Requirement

    there, lacking = [], []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            lacking.append(f"{requirement.name}{requirement.specifier}")
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        there.append(f"{requirement.name} {version}")
        lacking += [] if fits else [f"{requirement.name}{requirement.specifier}"]
    return there, lacking


def _packages(_: DoctorConfig) -> str:
    there, lacking = unmet(metadata.requires("shelfmark") or [])
    if lacking:
        wanted = " ".join(f"'{name}'" for name in lacking)
        raise UserError(f"{', '.join(lacking)} not installed", f"{sys.executable} -m pip install {wanted}")
    return ", ".join(there)


def _decoder(config: DoctorConfig) -> str:
    from harness.core.device import choose_device
    from harness.data.backends import open_pipeline
    from harness.data.config import DataConfig
    from harness.data.preprocess import PreprocessSpec

    pipeline = open_pipeline(PreprocessSpec(), DataConfig().backend, 1, 1, choose_device(config.device))
    pipeline.close()
    return pipeline.line


def _trainer(config: DoctorConfig) -> str:
    """Imports the trainer and builds the process groups of one rank."""
    import harness.train.trainer  # noqa: F401
    from harness.core.mesh import Mesh, MeshConfig

    with Mesh(MeshConfig(device=config.device)) as mesh:
        return f"one rank starts, {mesh.accelerators.line}"


def _faiss(_: DoctorConfig) -> str:
    from harness.artefact.flat_index import import_faiss

    return f"faiss {import_faiss().__version__}, for export and search"


def _disk(config: DoctorConfig) -> str:
    """Free space below the run folder, and the speed of a file that is written there."""
    folder = next(path for path in (config.run_dir.absolute(), *config.run_dir.absolute().parents) if path.exists())
    data = os.urandom(1 << 20)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            started = time.perf_counter()
            for _ in range(PROBE >> 20):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
            speed = PROBE / (time.perf_counter() - started) / 1e6
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}", "Choose another --run-dir") from error
    free = shutil.disk_usage(folder).free
    if free < LEAST_DISK:
        raise UserError(f"{folder} has {free / GIB:.2f} GiB left", "Free space there, or choose another --run-dir")
    return f"{folder}: {free / GIB:,.0f} GiB free, writes {speed:,.0f} MB/s"


def _shared(_: DoctorConfig) -> str:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return "no /dev/shm"
    if usage.free < LEAST_SHARED:
        raise UserError(f"/dev/shm has {usage.free / GIB:.2f} GiB left", "In a container: docker run --shm-size=8g")
    return f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"


def _files(_: DoctorConfig) -> str:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < LEAST_FILES:
        raise UserError(f"a process may open {hard:,} files", "Raise the hard limit (ulimit -Hn)")
    return "unlimited" if hard == resource.RLIM_INFINITY else f"a process may open {hard:,}"


def _slurm(_: DoctorConfig) -> str:
    return shutil.which("sbatch") or "sbatch not found; only the scripts in jobs/ need it"


# Name, True if a training needs it, what to look at.
LOOKS: tuple[tuple[str, bool, Callable[[DoctorConfig], str]], ...] = (
    ("shelfmark", True, _shelfmark),
    ("packages", True, _packages),
    ("cpu", True, _cpu),
    ("memory", True, _memory),
    ("gpus", True, _gpus),
    ("torch", True, _torch),
    ("decoder", True, _decoder),
    ("trainer", True, _trainer),
    ("run folder", True, _disk),
    ("shared memory", False, _shared),
    ("open files", False, _files),
    ("index", False, _faiss),
    ("slurm", False, _slurm),
)
