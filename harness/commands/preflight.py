"""`shelfmark preflight`: Check the nodes of a job before it trains, and name those to leave out."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from harness.commands.doctor import LEAST_DISK
from harness.core import probes
from harness.core.errors import UserError
from harness.core.files import write_json, write_whole
from harness.core.links import Links, rounds
from harness.core.mesh import Device, Mesh, MeshConfig
from harness.core.roll_call import NoAnswer, RollCall
from harness.core.tables import Scalar, format_table
from harness.core.verdict import leave_out, odd, slow
from harness.core.versions import versions
from models.ranges import PositiveFloat, PositiveInt, UnitIntervalAbove0

EXAMPLE = "python jobs/torchrun.py --nproc-per-node 2 -m harness preflight --run-dir /shared/runs"
GIB = 1 << 30
SMALLER = (1 << 16, 1 << 20, 1 << 24)  # bytes of messages below the largest


@dataclass(frozen=True, kw_only=True)
class PreflightConfig:
    """Measures every node, every pair of nodes and all together; prints a table. Exit code 2 where a node or pair is
    slower than a share of the median, has a wrong result or another version, or does not answer. On one node its ranks
    are compared.

    Args:
        out: folder for preflight.json, all figures, and exclude, the nodes to leave out, comma-separated.
        run_dir: folder for runs: its free space and speed.
        cache: folder for images that are kept (SHELFMARK_CACHE): its free space and speed.
        least_share: share of the median below which a figure is bad.
        size_mib: MiB of a file, of main memory and of the largest message.
        patience: seconds in which a node must answer.
        absent: nodes that did not start, comma-separated.
        device: cuda, cpu, or auto, as mesh.device of a recipe.
    """

    out: Path = Path("preflight")
    run_dir: Path = Path("runs")
    cache: Path | None = None
    least_share: UnitIntervalAbove0 = 0.7
    size_mib: PositiveInt = 64
    patience: PositiveFloat = 120.0
    absent: tuple[str, ...] = ()
    device: Device = "auto"


@dataclass
class Findings:
    """Measurements; the same on all ranks.

    Attributes:
        figures: place -> name -> number, more is better; the least of the place's ranks.
        versions: place -> package -> version.
        bad: place -> reasons.
        pairs: rows of place, with, GB/s, error.
        collectives: rows of collective, bytes, GB/s, error.
        unfinished: what had no answer; empty where everything was measured.
    """

    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    bad: dict[str, list[str]] = field(default_factory=dict)
    pairs: list[dict[str, Scalar]] = field(default_factory=list)
    collectives: list[dict[str, Scalar]] = field(default_factory=list)
    unfinished: str = ""

    def add(self, place: str, result: dict[str, Any]) -> None:
        """Adds what one rank of a place has measured, {name: number}, or its {"error": reason}."""
        row = self.figures.setdefault(place, {})
        for name, value in result.items():
            if name != "error":
                row[name] = min(value, row.get(name, value))
            elif value not in self.bad.setdefault(place, []):
                self.bad[place].append(value)


class Preflight:
    """The stages; all ranks call them alike."""

    def __init__(self, config: PreflightConfig, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.size = config.size_mib * probes.MIB
        self.found, self.links, self.roll = Findings(), Links(mesh, config.patience), RollCall(mesh, config.patience)
        self.nodes = self.places = [f"rank {rank}" for rank in range(mesh.world_size)]  # of every rank
        self.nodes = self.roll.results("its name", lambda: os.environ.get("SLURMD_NODENAME") or socket.gethostname())
        if len(set(self.nodes)) > 1:
            self.places = self.nodes
        self.names = list(dict.fromkeys(self.places))
        self.members = [[rank for rank, place in enumerate(self.places) if place == name] for name in self.names]

    def run(self) -> None:
        """Fills `found`. Raises NoAnswer on the first rank where the rest cannot be measured."""
        probed: list[tuple[str, Callable[[], dict[str, Any]]]] = [
            ("arithmetic", lambda: {"TFLOP/s": probes.arithmetic(self.mesh.device)}),
            ("memory", lambda: {"memory GB/s": probes.memory(self.mesh.device, self.size)}),
            ("the run folder", lambda: self._disk("run", self.config.run_dir)),
            ("the cache", lambda: self._disk("cache", self.config.cache)),
            ("shared memory", self._shared),
        ]
        for stage, probe in probed:
            for place, result in zip(self.places, self.roll.results(stage, probe), strict=True):
                self.found.add(place, result)
        all_versions = self.roll.results("versions", lambda: versions() if self._first_of_node else {})
        for place, found in zip(self.places, all_versions, strict=True):
            if found:
                self.found.versions[place] = found
        if len(self.names) > 1 and min(map(len, self.members)) > 1:
            self._inside()
        for pairs in rounds(len(self.names)):
            self._exchange(pairs)
        for size in [*(size for size in SMALLER if size < self.size), self.size] if self.mesh.world_size > 1 else []:
            self._collective("all_reduce", size)
            self._collective("all_gather", size)

    @property
    def _first_of_node(self) -> bool:
        return self.nodes.index(self.nodes[self.mesh.rank]) == self.mesh.rank

    def _disk(self, name: str, folder: Path | None) -> dict[str, float]:
        if folder is None or not self._first_of_node:
            return {}
        free, wrote, read = probes.disk(folder, self.size)
        if free < LEAST_DISK / GIB:
            raise UserError(f"{folder} has {free:.2f} GiB left")
        return {f"{name} GiB free": free, f"{name} write MB/s": wrote, f"{name} read MB/s": read}

    def _shared(self) -> dict[str, float]:
        if not self._first_of_node or not Path("/dev/shm").is_dir():
            return {}
        return {"shm GiB": shutil.disk_usage("/dev/shm").total / GIB}

    def _inside(self) -> None:
        """Sums over the ranks of each node."""
        own = next(ranks for ranks in self.members if self.mesh.rank in ranks)
        group = dist.new_group(own, use_local_synchronization=True)
        told = self.roll.results("sums inside nodes", lambda: {"inside GB/s": self.links.all_reduce(self.size, group)})
        for place, result in zip(self.places, told, strict=True):
            self.found.add(place, result)

    def _exchange(self, pairs: list[tuple[int, int]]) -> None:
        """Exchanges of the ranks of disjoint pairs of places, one to one."""
        peers: dict[int, int] = {}
        for a, b in pairs:
            for one, other in zip(self.members[a], self.members[b], strict=False):
                peers |= {one: other, other: one}
        peer = peers.get(self.mesh.rank)
        stage = "exchanges of " + ", ".join(f"{self.names[a]} with {self.names[b]}" for a, b in pairs)
        told = self.roll.results(stage, lambda: {} if peer is None else {"GB/s": self.links.exchange(self.size, peer)})
        for a, b in pairs:
            row = _joined([told[rank] for rank in (*self.members[a], *self.members[b])])
            self.found.pairs.append({"place": self.names[a], "with": self.names[b], **row})

    def _collective(self, name: str, size: int) -> None:
        told = self.roll.results(f"{name} of {size:,} bytes", lambda: {"GB/s": getattr(self.links, name)(size)})
        self.found.collectives.append({"collective": name, "bytes": size, **_joined(told)})


def _joined(results: list[dict[str, Any]]) -> dict[str, Scalar]:
    """The lowest rate of an exchange and its first error, of what its ranks have told."""
    rates, errors = ([result[key] for result in results if key in result] for key in ("GB/s", "error"))
    return {"GB/s": min(rates, default=None), "error": next(iter(errors), None)}


def run(config: PreflightConfig) -> dict[str, Any]:
    """Measures, prints a table, writes both files; returns what preflight.json has.

    Raises:
        UserError: on the first rank, something is bad.
    """
    with Mesh(MeshConfig(device=config.device, timeout_minutes=max(10.0, config.patience / 10))) as mesh:
        preflight = Preflight(config, mesh)
        try:
            preflight.run()
        except NoAnswer as error:
            found = preflight.found
            found.unfinished = str(error)
            for rank in error.ranks:
                found.add(preflight.places[rank], {"error": "no answer"})
            report(config, found)  # raises
    return report(config, preflight.found) if mesh.rank == 0 else {}


def report(config: PreflightConfig, found: Findings) -> dict[str, Any]:
    """Judges what was found, prints it and writes the files.

    Raises:
        UserError: something is bad.
    """
    reasons = {place: list(found.bad.get(place, [])) for place in found.figures}
    reasons |= {place: ["did not start"] for place in config.absent}
    for more in (odd(found.versions), slow(found.figures, config.least_share)):
        for place, words in more.items():
            reasons[place] += words
    rates = {f"{row['place']} - {row['with']}": {"GB/s": row["GB/s"]} for row in found.pairs if row["GB/s"] is not None}
    for pair, words in slow(rates, config.least_share).items():  # type: ignore[arg-type]
        row = next(row for row in found.pairs if f"{row['place']} - {row['with']}" == pair)
        row["error"] = row["error"] or words[0]
    bad_places = [place for place, words in reasons.items() if words]
    bad_pairs = [(str(row["place"]), str(row["with"])) for row in found.pairs if row["error"]]
    exclude = leave_out(bad_places, bad_pairs)
    rows: list[dict[str, Scalar]] = [
        {"place": place, **found.figures.get(place, {}), "verdict": "; ".join(words) or "good"}
        for place, words in reasons.items()
    ]
    print(format_table(rows))
    for table in (found.pairs, found.collectives):
        if table:
            print(f"\n{format_table(table)}")
    figures = {"good": not exclude, "exclude": exclude, "reasons": reasons, **asdict(found)}
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        write_json(config.out / "preflight.json", figures)
        write_whole(config.out / "exclude", ",".join(exclude))
    except OSError as error:
        raise UserError(f"--out {config.out}: {error.strerror}", "Choose another folder") from error
    failed = [f"{row['collective']}: {row['error']}" for row in found.collectives if row["error"]]
    failed += [found.unfinished] if found.unfinished else []
    print(f"\n--exclude={','.join(exclude)}" if exclude else "\nno node to leave out")
    if exclude or failed:
        told = [
            *(f"{place} ({'; '.join(reasons[place])})" for place in bad_places),
            *map(" - ".join, bad_pairs),
            *failed,
        ]
        raise UserError(f"not good: {', '.join(told)}", f"Leave out {','.join(exclude)}" if exclude else "")
    return figures
