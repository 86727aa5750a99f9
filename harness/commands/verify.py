"""`shelfmark verify`: Name what is damaged in catalogues, runs, checkpoints, artefacts and folders of weights.

Checksums show that nothing has changed since a folder was written, not who wrote it. No code from a folder is run.
PyTorch is loaded only for checkpoints, whose pickles are checked too, and for artefacts, whose golden inputs are
embedded again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from harness.catalogue.catalogue import Catalogue, CorruptSample
from harness.catalogue.wholeness import FOLDERS, Finding, inspect
from harness.core.cli import LONGEST_LINE
from harness.core.errors import UserError
from harness.core.files import printable
from harness.core.manifest import MANIFEST, verify
from harness.text.tokenizer import Tokenizer
from models.ranges import PositiveInt

EXAMPLE = "shelfmark verify catalogues/products runs/products artefacts/products --images"
AT_ONCE = 64  # images of a thread's task
NAMED = 10  # damaged images that are named one by one
# File of a folder -> its kind, and the remedy for damage.
MARKS = {
    "artefact.json": ("artefact", "Copy it again, or export again"),
    "state.json": ("checkpoint", "Copy it again; training goes on from the newest one that is whole"),
    "weights.json": ("weights", "Import them again"),
    MANIFEST: ("folder", "Copy it again"),
}


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Compares every file with its checksum and prints a line for each folder; exit code 0 means that all are whole.

    Args:
        paths: folders of any of these kinds.
        images: read the images of catalogues too, which is all of their shards.
        threads: images that are read at once.
    """

    paths: tuple[Path, ...] = field(default=(), kw_only=False)
    images: bool = False
    threads: PositiveInt = 16


def run(config: VerifyConfig) -> dict[str, Any]:
    """Prints a line for each thing, and returns the number of things, all of them whole.

    Raises:
        UserError: some are damaged or have no checksums, or a folder is of none of these kinds.
    """
    if not config.paths:
        raise UserError("nothing to verify", f"Name folders, as in   {EXAMPLE}")
    things = wrong = 0
    for path in config.paths:
        for what, problem, remedy, unchecked in _findings(path, config):
            said = f"{problem}. {remedy}".rstrip() if problem else f"not checked: {unchecked}" if unchecked else "whole"
            print(f"{printable(what)}: {printable(said, LONGEST_LINE)}", flush=True)
            things += 1
            wrong += bool(problem or unchecked)
    if wrong:
        raise UserError(f"{wrong} of {things} are damaged or have no checksums", "The lines before say which")
    return {"things": things}


def _findings(path: Path, config: VerifyConfig) -> Iterator[Finding]:
    kind = next((name for name in MARKS if (path / name).exists()), None)
    if (path / "catalogue.json").exists() or (path / "index.npy").exists():
        yield from _catalogue(path, config)
    elif (path / "config.yaml").exists() or (path / "checkpoints").exists():
        yield from _run(path)
    elif kind == "artefact.json":
        yield from _artefact(path)
    elif kind is not None:
        yield _folder(path, *MARKS[kind])
    else:
        what = "no catalogue, run, checkpoint, artefact or folder of weights" if path.is_dir() else "no such folder"
        raise UserError(f"{path}: {what}")


def _folder(path: Path, kind: str, remedy: str) -> Finding:
    if not (path / MANIFEST).exists() and kind == "weights":
        return Finding(f"{kind} {path}", "", "", "of an earlier version, which wrote no checksums; import them again")
    if kind == "checkpoint":
        from harness.train.checkpoint_files import problem  # here: it loads PyTorch

        return Finding(f"{kind} {path}", problem(path), remedy)
    return Finding(f"{kind} {path}", verify(path), remedy)


def _artefact(path: Path) -> Iterator[Finding]:
    yield (sums := _folder(path, *MARKS["artefact.json"]))
    if sums.problem:
        return
    from harness.artefact.artefact import Artefact  # here: it loads PyTorch
    from harness.artefact.golden_check import check_golden

    try:
        for check in check_golden(Artefact(path)):
            if check.left_out:
                print(f"{printable(f'{check.what} of {path}')}: not compared; {check.left_out}")
            else:
                yield Finding(f"{check.what}, of {path}", check.problem, "Export again" if check.problem else "")
    except UserError as error:  # of another format, or nothing that opens
        yield Finding(f"golden inputs of {path}", str(error), "")


def _run(path: Path) -> Iterator[Finding]:
    steps = sorted((path / "checkpoints").glob("step-*"))
    for step in steps:
        if step.suffix:
            print(f"{printable(str(step))}: never finished, or set aside; no command reads it")
        else:
            yield _folder(step, *MARKS["state.json"])
    if not steps:
        yield Finding(f"run {path}", "it has no checkpoint", "")
    try:
        Tokenizer.load(path)  # compares its checksum
        yield Finding(f"tokenizer of {path}", "", "")
    except UserError as error:
        yield Finding(f"tokenizer of {path}", str(error), "")


def _catalogue(path: Path, config: VerifyConfig) -> Iterator[Finding]:
    try:
        catalogue = Catalogue(path)
    except UserError as error:
        yield Finding(f"catalogue {path}", str(error), "")
        return
    yield from inspect(catalogue, folders=tuple(FOLDERS))
    if config.images:
        yield Finding(f"images of {path}", _images(catalogue, config.threads), "Restore these shards, or ingest again")
    else:
        print(f"images of {path}: not read; --images reads them")


def _images(catalogue: Catalogue, threads: int) -> str:
    """Reads every image and compares its checksum; names those that differ."""
    damaged: list[str] = []
    total, count = int(catalogue.index["length"].sum()), 0
    lost: dict[int, str] = {}  # shards that cannot be read: one is not asked for again, each time with pauses

    def check(first: int) -> tuple[int, list[str]]:
        found = []
        last = min(first + AT_ONCE, catalogue.num_samples)
        for sample in range(first, last):
            shard = int(catalogue.index["shard"][sample])
            try:
                if shard not in lost:
                    catalogue.read_bytes(sample)
            except CorruptSample as error:
                found.append(str(error))
            except UserError as error:
                lost[shard] = str(error)
            if shard in lost:
                found.append(f"sample {sample}: {lost[shard]}")
        return int(catalogue.index["length"][first:last].sum()), found

    window: deque[Future[tuple[int, list[str]]]] = deque()
    progress = tqdm(total=total, desc=f"images of {catalogue.path}", unit="B", unit_scale=True, mininterval=0.5)
    with ThreadPoolExecutor(threads) as pool, progress:
        firsts = iter(range(0, catalogue.num_samples, AT_ONCE))
        while True:
            # The window bounds the memory at any size of the catalogue.
            while len(window) < 2 * threads and (first := next(firsts, None)) is not None:
                window.append(pool.submit(check, first))
            if not window:
                break
            size, found = window.popleft().result()
            progress.update(size)
            count += len(found)
            damaged += found[: NAMED - len(damaged)]
    more = f" and {count - len(damaged):,} more" if count > len(damaged) else ""
    return f"{count:,} of {catalogue.num_samples:,} are damaged: {'; '.join(damaged)}{more}" if count else ""
