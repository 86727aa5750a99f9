"""The search service under many clients: answers per second and latency, with a new artefact taken into use in the
middle. Every answer is compared with Artefact.search.

Clients and service share the machine: the service's own processor time is reported beside the rate.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil  # type: ignore[import-untyped]

from harness.artefact.artefact import Artefact, Hit, Photo
from harness.bench.photos import photos
from harness.bench.report import bench_main, finish
from harness.core.errors import UserError
from harness.core.files import write_json
from harness.core.manifest import MANIFEST, write_manifest

MODULE = "harness.bench.service"
EXAMPLE = f"python -m {MODULE} --artefact artefacts/grocery --clients 200 --seconds 60 --json service.json"
NAMES = ("before", "swap", "after")  # thirds of the time; the swap begins with the second
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """Starts `shelfmark serve` on this machine's loopback and sends it photos from clients that wait for each answer.

    Args:
        artefact: the artefact folder; a copy of it with another identity is swapped in.
        clients: connections, each with one request at a time.
        seconds: of load.
        photos: number of different JPEG files.
        source_size: long side of the files, in pixels.
        k: documents asked for.
        batch: queries that the service embeds together at most.
        threads: the service's, for decoding and for embedding.
    """

    artefact: Path
    clients: int = 200
    seconds: int = 60
    photos: int = 64
    source_size: int = 400
    k: int = 10
    batch: int = 32
    threads: int = 1


@dataclass
class Seen:
    """Answers of all clients: when each ended, how long it took, by which artefact; and what went wrong."""

    ended: list[float] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    artefact: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def run(config: ServiceConfig) -> dict[str, Any]:
    """Measures, prints and returns the report (see `harness/bench/report.py`).

    Headline: answers per second, percentiles of the latency in ms, the service's processor time for each answer, its
    memory at the end, errors, seconds from the swapped link to the first answer of the new artefact.

    Raises:
        UserError: the artefact does not answer photos, or the service did not start.
        RuntimeError: an answer was an error, or differs from that of Artefact.search: such a rate is worth nothing.
    """
    encoded = photos(config.source_size, config.photos)
    opened = Artefact(config.artefact)
    if opened.meta["query"] != "image":
        raise UserError(f"{config.artefact} answers texts", "Name an artefact that answers photos")
    found = opened.search(opened.embed([Photo.read(data) for data in encoded], config.batch), config.k)
    wanted = [_rows(hits) for hits in found]
    with tempfile.TemporaryDirectory() as folder:
        link, other = Path(folder) / "artefact", _copy(config.artefact, Path(folder) / "copy")
        link.symlink_to(config.artefact.resolve())
        with _service(link, config) as (url, process):
            seen, figures = asyncio.run(_load(config, url, process, encoded, wanted, (link, other)))
    if seen.errors or len({*seen.artefact}) != 2:
        raise RuntimeError(f"{len(seen.errors)} errors: {seen.errors[:3]}, artefacts {sorted({*seen.artefact})}")
    rows = [_row(name, seen, config, third) for third, name in enumerate(NAMES)]
    whole = _row("all", seen, config, None)
    headline = {name: value for name, value in whole.items() if name != "part"}
    return finish(MODULE, config, {**headline, **figures, "errors": len(seen.errors)}, [*rows, whole])


def _rows(hits: Sequence[Hit]) -> list[int]:
    return [hit.row for hit in hits]


def _copy(artefact: Path, copy: Path) -> Path:
    """The same artefact under another identity, which tells the answers apart."""
    shutil.copytree(artefact, copy)
    meta = json.loads((copy / "artefact.json").read_text(encoding="utf-8"))
    write_json(copy / "artefact.json", {**meta, "run": f"{meta['run']} (copy)"})
    (copy / MANIFEST).unlink()
    write_manifest(copy, algorithm="sha256")
    return copy


@contextmanager
def _service(artefact: Path, config: ServiceConfig) -> Iterator[tuple[str, psutil.Process]]:
    """URL and process of a service that runs until the end."""
    command = [sys.executable, "-m", "harness", "serve", str(artefact), "--port", "0"]
    command += ["--batch", str(config.batch), "--threads", str(config.threads), "--queue", str(2 * config.clients)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert started.stdout is not None
        lines = [started.stdout.readline(), started.stdout.readline()]
        if not lines[1].startswith("page: "):
            raise UserError("the service did not start", "Its own message is above")
        yield lines[1].split()[1], psutil.Process(started.pid)
    finally:
        started.terminate()
        started.wait()


async def _load(
    config: ServiceConfig,
    url: str,
    process: psutil.Process,
    encoded: Sequence[bytes],
    wanted: Sequence[list[int]],
    swap: tuple[Path, Path],
) -> tuple[Seen, dict[str, float]]:
    seen, numbers = Seen(), itertools.count()
    connector = aiohttp.TCPConnector(limit=config.clients)
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def ask(number: int) -> None:
            asked = time.perf_counter()
            try:
                headers = {"Content-Type": "image/jpeg"}
                at = f"{url}search?k={config.k}"
                async with session.post(at, data=encoded[number], headers=headers) as answer:
                    content = await answer.json()
                    if answer.status != 200 or [hit["row"] for hit in content["found"]] != wanted[number]:
                        seen.errors.append(f"{answer.status} {str(content)[:200]}")
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                seen.errors.append(repr(error))
                return
            now = time.perf_counter()
            seen.ended.append(now - started)
            seen.took.append(now - asked)
            seen.artefact.append(content.get("artefact", ""))

        async def client() -> None:
            while time.perf_counter() - started < config.seconds:
                await ask(next(numbers) % len(encoded))

        async def swapped() -> float:
            await asyncio.sleep(config.seconds / 3)
            link, other = swap
            (link.parent / "next").symlink_to(other)
            os.replace(link.parent / "next", link)
            pointed = time.perf_counter()
            while len({*seen.artefact}) < 2 and time.perf_counter() - started < config.seconds:
                await asyncio.sleep(0.02)
            return time.perf_counter() - pointed

        started = 0.0
        for number in range(len(encoded)):  # nobody's first request is measured
            await ask(number)
        seen = Seen(errors=seen.errors)
        used, started = sum(process.cpu_times()[:2]), time.perf_counter()
        seconds, *_ = await asyncio.gather(swapped(), *(client() for _ in range(config.clients)))
        used = sum(process.cpu_times()[:2]) - used
    return seen, {
        "service_cpu_ms_per_answer": 1000 * used / max(1, len(seen.took)),
        "service_memory_mb": process.memory_info().rss / 1e6,
        "swap_s": seconds,
    }


def _row(part: str, seen: Seen, config: ServiceConfig, third: int | None) -> dict[str, Any]:
    """Figures of the answers that ended in one third of the time, or of all."""
    ended, took = np.array(seen.ended), 1000 * np.array(seen.took)
    length = config.seconds if third is None else config.seconds / len(NAMES)
    if third is not None:
        took = took[(ended >= third * length) & (ended < (third + 1) * length)]
    percentiles = {f"p{share}_ms": float(np.percentile(took, share)) for share in PERCENTILES}
    return {
        "part": part,
        "answers": len(took),
        "answers_per_s": len(took) / length,
        **percentiles,
        "most_ms": float(took.max()),
    }


def main() -> int:
    """Entry point of `python -m harness.bench.service`."""
    return bench_main(MODULE, ServiceConfig, run, "The search service under many clients.", EXAMPLE)


if __name__ == "__main__":
    sys.exit(main())
