"""Kills commands before each of their file operations in turn, runs them again, and compares with undisturbed ones.

`python -m tests.kills FOLDER EVERY CASE...` does so for every EVERY-th operation and prints what was wrong, one line
each. Each run is a fork of this process, which has imported everything and started nothing.
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
import signal
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.__main__ import COMMANDS, command
from harness.core import lock
from harness.core.cli import run_command
from tests.catalogues import make_catalogue

OPERATIONS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")  # audit events
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
MOST = 2000  # operations of one command


@dataclass(frozen=True)
class Case:
    """A command.

    Args:
        argv: its line, {folder} for the folder that it works in.
        prepare: lines that come before it, undisturbed.
        done: what the second run may say instead of doing it again, where the first had ended but for its clean-up.
    """

    argv: str
    prepare: tuple[str, ...] = ()
    done: str = ""


INGEST = (
    "ingest --manifest {folder}/drawn/manifest.tsv --images {folder}/drawn --attribute-columns colour,shape "
    "--workers 2 --out {folder}/cat"
)
APPEND = f"{INGEST} --append --max-pixels 5000000"
CLASSES, WORDS = "govern {folder}/cat", "tokenizer {folder}/cat --vocab-size 30"
EXISTS = "exists already"
STEPS = {"train.steps": 3, "train.checkpoint_every": 1, "train.evaluate_every": 2, "train.keep_checkpoints": 2}
VIT = {"model.vision.class_token": True, "model.vision.class_position": True}  # so that a model of the hub can hold it
TRAIN = "train {settings}"
TRAINED = (INGEST, CLASSES, WORDS, TRAIN)
HUB = "export-weights {folder}/run --tower vision --layout vit --out {folder}/hub"
CASES = {
    "synth": Case("synth {folder}/out --products 8 --photos 1 --held-out 1 --unseen 0 --workers 1", done=EXISTS),
    "ingest": Case(INGEST, done=EXISTS),
    "part": Case(f"{INGEST} --part 2/2", (f"{INGEST} --part 1/2",), done=EXISTS),
    "merge": Case("merge {folder}/cat", tuple(f"{INGEST} --part {part}/3" for part in (1, 2, 3))),
    "append": Case(APPEND, (INGEST, CLASSES)),
    "index": Case("index {folder}/cat/shards --kind document --out {folder}/indexed", (INGEST,), done=EXISTS),
    "shards": Case("shards {folder}/cat --at file://{folder}/cat/shards", (INGEST,)),
    "govern": Case(CLASSES, (INGEST,)),
    "govern-again": Case(f"{CLASSES} --query-power 1", (INGEST, CLASSES)),
    "tokenizer": Case(WORDS, (INGEST,)),
    "tokenizer-kept": Case("tokenizer {folder}/cat --keep-from {folder}/cat", (INGEST, WORDS, APPEND)),
    "queries": Case("queries {folder}/cat --min-count 1 --max-share 1", (INGEST,)),
    "pairs": Case(
        "pairs {folder}/cat --table {folder}/drawn/manifest.tsv --query-column class_id --document-column class_id",
        (f"{INGEST} --item-column class_id",),
    ),
    "train": Case(TRAIN, (INGEST, CLASSES, WORDS)),
    "export": Case("export {folder}/run --out {folder}/artefact", TRAINED, done=EXISTS),
    "export-weights": Case(HUB, TRAINED, done=EXISTS),
    "import": Case("import {folder}/start --vision {folder}/hub", (*TRAINED, HUB), done=EXISTS),
}


def main(folder: Path, every: int, names: list[str]) -> int:
    """Entry point; returns the number of faults."""
    lock.BEAT = 1e6  # no sign of life amid the operations that are counted
    faults = 0
    for name in names or CASES:
        case, template, work = CASES[name], folder / f"{name}-template", folder / "work"
        for words in (*case.prepare, case.argv):  # a fork has them then
            importlib.import_module(COMMANDS[words.split()[0]])
        template.mkdir()
        make_catalogue(template / "drawn", classes=2, queries=4, size=16, ingest=False)
        shutil.copytree(template, work)
        for words in case.prepare:
            assert _forked(work, words) == 0, (folder / "said").read_text()
        shutil.rmtree(template)
        shutil.copytree(work, template)
        assert _forked(work, case.argv) == 0, (folder / "said").read_text()
        expected, points, killed = snapshot(work), 0, True
        while killed:
            points += every
            shutil.rmtree(work)
            shutil.copytree(template, work)
            killed = _forked(work, case.argv, points) == -signal.SIGKILL
            if killed and (fault := _again(work, case, expected)):
                print(f"{name}, killed before operation {points}: {fault}", flush=True)
                faults += 1
            assert points < MOST
        print(
            f"{name}: killed before {points // every - 1} of its operations, the last before number {points - every}",
            flush=True,
        )
        shutil.rmtree(work)
    return faults


def _again(work: Path, case: Case, expected: dict[str, Any]) -> str:
    """Problems after the same command, run again."""
    code, said = _forked(work, case.argv), (work.parent / "said").read_text()
    if code and not (code == 2 and case.done and case.done in said):
        return f"exit code {code}, {said}"
    found = snapshot(work)
    wrong = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
    return f"differs: {', '.join(wrong)}" if wrong else ""


def _forked(folder: Path, words: str, killed_before: int = 0) -> int:
    """Exit code of a command in a fork of this process, -9 where it was killed before that operation; its words are in
    said.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            with (folder.parent / "said").open("w") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
            argv = shlex.split(words.format(folder=folder, settings=_settings(folder) if "{settings}" in words else ""))
            sys.argv = ["shelfmark", *argv]
            if argv[0] == "synth":  # what its processes do is counted too
                pool = "ProcessPoolExecutor"
                setattr(sys.modules["harness.commands.synth"], pool, lambda workers, *_: ThreadPoolExecutor(workers))
            if killed_before:
                _arm(folder, killed_before)
            code = run_command(lambda: command(argv[0], argv[1:]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _settings(folder: Path) -> str:
    from tests.runs import arguments  # imports torch

    return shlex.join(arguments(folder / "cat", folder / "run", **STEPS, **VIT))


def _arm(folder: Path, killed_before: int) -> None:
    count, fsync = 0, os.fsync

    def operation() -> None:
        nonlocal count
        count += 1
        if count == killed_before:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            file, _, flags = arguments
            if flags & WRITES and str(file).startswith(str(folder)):
                operation()
        elif event in OPERATIONS:
            operation()

    def counted(handle: int) -> None:
        operation()
        fsync(handle)

    sys.addaudithook(hook)
    os.fsync = counted


def snapshot(folder: Path) -> dict[str, Any]:
    """All that is there, by its name: bytes of a file, None for a folder. Left out are times, and TensorBoard's files,
    named by them.
    """
    found = {
        str(path.relative_to(folder)): _content(path) for path in folder.rglob("*") if "tensorboard" not in path.parts
    }
    return found


def _content(path: Path) -> Any:
    if path.is_dir():
        return None
    if path.name == "catalogue.json":
        timed = ("created", "checksum")
        return {name: value for name, value in json.loads(path.read_text()).items() if name not in timed}
    if path.name == "log.jsonl":  # the steps behind the last checkpoint come again, and are the same
        lines = map(json.loads, path.read_text().splitlines())
        return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    if path.name == ".metadata" or (path.name == "manifest.json" and "checkpoints" in path.parts):
        return ""  # a pickle by the libraries, which differs from run to run
    return path.read_bytes()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]) > 0)
