"""Habits of a shell, with the commands as real processes: one line or silence, and the exit code that belongs to it."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from harness.commands.export import ExportConfig
from harness.commands.export import run as run_export
from tests.catalogues import draw_rows, write_manifest
from tests.runs import tiny_config, trainer

ROOT = Path(__file__).parents[1]
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b\u202eevil <img src=x onerror=alert(1)> ![x](http://x/y)"
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]")
ODD = unicodedata.normalize("NFD", "a [1] it's \u00fc *")  # of a folder
# One after another; each makes what the next ones need.
COMMANDS = {
    "ingest": "ingest --manifest manifest.tsv --images drawn --out catalogue --attribute-columns colour,shape",
    "govern": "govern catalogue",
    "tokenizer": "tokenizer catalogue --vocab-size 56",
    "queries": "queries catalogue --min-count 1",
    "index": "index tars --out indexed --kind document",
    "verify": "verify catalogue --images",
}
OF_A_RUN = {
    "eval": "eval run --split val --slices colour --json eval.json",
    "export": "export run --out exported",
    "search": "search artefact --item d0 --sheet sheet.png --json found.json",
}


class Answer(NamedTuple):
    """Result of a process."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last line of standard error; progress ends in returns."""
        return (re.split(r"[\r\n]+", self.err.strip()) or [""])[-1]


def without_rights() -> None:
    """In a child: its files' modes hold for root too."""
    if os.geteuid() == 0:
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def process(
    command: str, cwd: Path, before: Callable[[], Any] | None = None, **environment: str
) -> subprocess.Popen[str]:
    """`shelfmark COMMAND` in the folder `cwd`, in a poor environment: no HOME, locale C."""
    kept = {name: os.environ[name] for name in ("PATH", "TMPDIR", "OMP_NUM_THREADS") if name in os.environ}
    env = {**kept, "LC_ALL": "C", "PYTHONPATH": str(ROOT), **environment}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    argv = [sys.executable, "-m", "harness", *command.split()]
    return subprocess.Popen(argv, cwd=cwd, env=env, preexec_fn=before, **pipe)  # type: ignore[call-overload,no-any-return]


def shelfmark(command: str, cwd: Path, before: Callable[[], Any] | None = None) -> Answer:
    """As `process`, to its end."""
    started = process(command, cwd, before)
    out, err = started.communicate(timeout=300)
    return Answer(started.returncode, out, err)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of an odd name with a manifest whose texts are hostile; all that COMMANDS need."""
    folder = tmp_path_factory.mktemp("shop") / ODD
    rows = draw_rows(folder / "drawn", classes=6, queries=5, size=24, seed=0)
    for row in rows:
        row["title"] = row["title"] and f"{row['title']} {EVIL}"
        row["colour"] = f"{row['colour']} {EVIL}"
    rows[0]["class_id"] = rows[1]["class_id"] = f"c0 {EVIL}"
    (folder / "tars").mkdir()
    write_manifest(folder / "manifest.tsv", rows)
    return folder


@pytest.fixture(scope="module")
def made(shop: Path) -> Iterator[dict[str, Answer]]:
    """The answers of COMMANDS."""
    answers = {}
    for name, command in COMMANDS.items():
        if name == "index":
            for shard in (shop / "catalogue/shards").iterdir():
                (shop / "tars" / shard.name).symlink_to(shard)
        answers[name] = shelfmark(command, shop)
    yield answers


@pytest.mark.parametrize("name", COMMANDS)
def test_odd_places_and_a_poor_environment_are_no_matter(name: str, made: dict[str, Answer]) -> None:
    assert made[name].code == 0, made[name].err


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_in_a_title_controls_the_terminal(name: str, made: dict[str, Answer]) -> None:
    assert not CONTROL.search(made[name].out + made[name].err)


CLOSED = {
    "ingest": ("drawn", 0o000, "--images drawn: Permission denied"),
    "ingest, its manifest": ("manifest.tsv", 0o000, "manifest manifest.tsv: Permission denied"),
    "ingest, its place": (".", 0o555, "catalogue: cannot create lock: Permission denied"),
    "govern": ("catalogue/samples", 0o000, "catalogue/samples/part-00000.parquet: Permission denied"),
    "govern, its place": ("catalogue", 0o555, "catalogue/classes: cannot create lock: Permission denied"),
    "tokenizer": ("catalogue/index.npy", 0o000, "catalogue/index.npy: Permission denied"),
    "queries": ("catalogue", 0o000, "catalogue/catalogue.json: Permission denied"),
    "index": ("tars", 0o000, "tars: Permission denied"),
}


@pytest.mark.parametrize("case", CLOSED)
def test_what_may_not_be_read_or_written_is_one_line(case: str, made: dict[str, Answer], shop: Path) -> None:
    place, mode, message = CLOSED[case]
    command = COMMANDS[case.partition(",")[0]].replace("--out catalogue", "--out new").replace("indexed", "new")
    before = (shop / place).stat().st_mode
    (shop / place).chmod(mode)
    try:
        answer = shelfmark(command, shop, without_rights)
    finally:
        (shop / place).chmod(before)
    assert answer.code == 2 and "Traceback" not in answer.err
    assert answer.last.startswith("error: ") and message.replace("catalogue: ", "new: ") in answer.last, answer.err
    assert not (shop / "new").exists()


def head(command: str, cwd: Path) -> tuple[Answer, str]:
    """As `shelfmark`, where the reader goes away before the first line."""
    started = process(command, cwd)
    assert started.stdout is not None and started.stderr is not None
    started.stdout.close()
    err = started.stderr.read()
    return Answer(started.wait(timeout=300), "", err), err


@pytest.mark.parametrize("name", ["govern", "queries", "verify"])
def test_a_reader_that_goes_away_is_no_mistake(name: str, made: dict[str, Answer], shop: Path) -> None:
    answer, err = head(f"{COMMANDS[name]} --json {name}.json", shop)
    assert answer.code == 0 and "Error" not in err and (shop / f"{name}.json").stat().st_size


def interrupted(command: str, cwd: Path, after: float) -> str | None:
    """What a process said that was interrupted `after` seconds; None where it was done before.

    Python itself says what it says before it runs a line of ours.
    """
    begun = process(command, cwd, lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    time.sleep(after)
    begun.send_signal(signal.SIGINT)
    _, err = begun.communicate(timeout=300)
    if "<frozen site>" in err or "_get_module_details" in err:
        return None
    assert begun.returncode in (0, 130, -signal.SIGINT), err
    return err


def stages(command: str, cwd: Path, count: int) -> None:
    """Interrupts a command at many moments of its run, from its start to its end; it says one word at most."""
    began = time.monotonic()
    assert shelfmark(command, cwd).code == 0
    took = time.monotonic() - began
    for number in range(count):
        said = interrupted(command, cwd, took * (number + 0.5) / count)
        assert said is None or "Traceback" not in said, (number, said)


@pytest.mark.full
@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_ends_every_stage_quietly(name: str, made: dict[str, Answer], shop: Path) -> None:
    command = COMMANDS[name].replace("--out catalogue", "--out again").replace("--out indexed", "--out again")
    if command == COMMANDS[name]:
        stages(command, shop, 12)
        return
    for number in range(12):  # these refuse a folder that is there
        said = interrupted(command.replace("again", f"{name}-again-{number}"), shop, 0.1 + 0.15 * number)
        assert said is None or "Traceback" not in said, said
        assert not list(shop.glob("*again-*.tmp"))


FINALIZER = """
import signal, sys, time
from harness.core.cli import run_command

class Interrupted:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        [None for _ in range(1000)]

def body():
    Interrupted()
    time.sleep(60)

sys.exit(run_command(body))
"""


def test_ctrl_c_in_a_finalizer_is_not_lost() -> None:
    """Python drops what a finalizer raises."""
    done = subprocess.run([sys.executable, "-c", FINALIZER], capture_output=True, encoding="utf-8", cwd=ROOT)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_ctrl_c_while_python_imports_says_nothing(shop: Path) -> None:
    """The first half second of every command, also of one that only prints its help."""
    for number in range(5):
        said = interrupted("--help", shop, 0.05 + 0.05 * number)
        assert said is None or said in ("", "interrupted\n"), said


@pytest.fixture(scope="module")
def trained(made: dict[str, Answer], shop: Path) -> Path:
    """`shop` with a run and its artefact."""
    with trainer(tiny_config(shop / "catalogue", shop / "run", **{"train.steps": 1})) as run:
        run.fit()
    run_export(ExportConfig(run=shop / "run", out=shop / "artefact", onnx=False))
    return shop


@pytest.mark.full
@pytest.mark.parametrize("name", OF_A_RUN)
def test_commands_of_a_run_have_the_same_habits(name: str, trained: Path) -> None:
    command = OF_A_RUN[name]
    answer = shelfmark(command, trained)
    assert answer.code == 0 and not CONTROL.search(answer.out + answer.err), answer
    if "--json" in command:
        answer, err = head(command.replace("--json ", "--json piped-"), trained)
        assert answer.code == 0 and "Error" not in err and list(trained.glob("piped-*.json"))
    for number in range(8):
        said = interrupted(command.replace("exported", f"exported-{number}"), trained, 0.1 + 0.8 * number)
        assert said is None or "Traceback" not in said, said
    folder = trained / command.split()[1]
    folder.chmod(0)
    try:
        answer = shelfmark(command.replace("exported", "refused"), trained, without_rights)
    finally:
        folder.chmod(0o755)
    assert answer.code == 2 and answer.last.startswith("error: ") and "Permission denied" in answer.last, answer.err
