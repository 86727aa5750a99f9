"""One process at a time in a folder: the second is told by whom, a dead one holds nobody up, and what is not ours
stays.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from harness.commands.ingest import IngestConfig
from harness.commands.ingest import run as ingest
from harness.core import lock
from harness.core.errors import UserError
from harness.core.lock import locked
from harness.core.staged_folder import held, staged_folder
from tests.catalogues import make_catalogue
from tests.pool import ranks
from tests.runs import arguments

ROOT = Path(__file__).parents[1]


@contextmanager
def another(code: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs `code` as far as its wait(), where it stays until a line on its input lets it go on."""
    head = "import sys\ndef wait():\n    print('there', flush=True)\n    sys.stdin.readline()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", head + code, *words],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "there\n":
                break
        else:
            raise AssertionError(process.communicate()[1])
        yield process
    finally:
        process.kill()
        process.communicate()


HOLD = """
from pathlib import Path
from harness.core.lock import locked
with locked(Path(sys.argv[1]), "it"):
    wait()
"""
# As on a disk whose locks other hosts do not see: the holder shows itself by its file alone.
HOLD_ELSEWHERE = (
    """
import fcntl, socket
from harness.core import lock
fcntl.flock = lambda *_: None
socket.gethostname = lambda: "node7"
lock.BEAT = 0.05
"""
    + HOLD
)


def test_the_second_is_told_by_whom(tmp_path: Path) -> None:
    file = tmp_path / "folder/.lock"
    with another(HOLD, str(file)) as process:
        for _ in range(2):
            with pytest.raises(UserError) as refused, locked(file, "the folder"):
                pass
        form = r"the folder is in use by `-c` \(host (\S+), process (\d+), since \d{4}-\d\d-\d\d \d\d:\d\d\)\. Wait .*"
        found = re.fullmatch(form, str(refused.value))
        assert found is not None, refused.value
        assert found.groups() == (socket.gethostname(), str(process.pid))
        process.communicate("\n")
    assert not file.exists()
    with locked(file, "the folder"), pytest.raises(UserError, match=f"process {os.getpid()}"), locked(file, "it"):
        pass
    assert not file.parent.exists(), "made only for the lock"


def test_the_lock_of_a_killed_process_holds_nobody_up(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    with another(HOLD, str(file)) as process:
        process.kill()
        process.wait()
    assert file.exists()
    with locked(file, "it"):
        pass
    assert not file.exists()


def test_a_lock_that_its_holder_removes_just_now_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking the file, its holder ends: the locked file must be the one that the next finds."""
    file, flock, ended = tmp_path / ".lock", fcntl.flock, []

    def late(handle: int, how: int) -> None:
        if not ended:
            ended.append(True)
            file.unlink()
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(file, "it"), pytest.raises(UserError, match="in use"), locked(file, "it"):
        pass


def test_a_forked_child_does_not_hold_on(tmp_path: Path) -> None:
    """It outlives its parent, and neither keeps the lock nor, when it ends, takes it from the next one."""
    file = tmp_path / ".lock"
    code = """
import os
from pathlib import Path
from harness.core.lock import locked
with locked(Path(sys.argv[1]), "it"):
    if os.fork():
        os.kill(os.getpid(), 9)
    print("there", flush=True)
    sys.stdin.readline()
print("child has left", flush=True)
"""
    with another(code, str(file)) as process:
        process.wait()
        with locked(file, "it"):
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "child has left\n"
            assert file.exists()
            with pytest.raises(UserError, match="in use"), locked(file, "it"):
                pass


def test_the_life_of_another_hosts_process_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "WATCH", 20.0)
    file = tmp_path / ".lock"
    with another(HOLD_ELSEWHERE, str(file)) as process:
        with pytest.raises(UserError, match=rf"it is in use by `-c` \(host node7, process {process.pid}, "):
            with locked(file, "it"):
                pass
        assert "node7" in file.read_text()
        process.kill()
        process.wait()
    monkeypatch.setattr(lock, "WATCH", 0.3)
    capfd.readouterr()
    with locked(file, "it"):
        assert json.loads(file.read_text())["host"] == socket.gethostname()
    assert "it: looking for 0.3 s whether `-c` (host node7, " in capfd.readouterr().err


@pytest.mark.parametrize("content", ["precious", "{}", '{"host": "x"}', "[" * 10_000])
def test_a_file_that_is_no_lock_is_not_written(tmp_path: Path, content: str) -> None:
    file, target = tmp_path / ".lock", tmp_path / "precious"
    file.write_text(content)
    with pytest.raises(UserError, match=r"\.lock is not a lock of ours"), locked(file, "it"):
        pass
    assert file.read_text() == content
    file.unlink()
    target.write_text("")
    file.symlink_to(target)
    with pytest.raises(UserError, match=r"it: cannot create \.lock"), locked(file, "it"):
        pass
    assert file.is_symlink() and target.read_text() == ""


def test_a_stage_that_is_not_ours_is_not_touched(tmp_path: Path) -> None:
    final = tmp_path / "out"
    for name in ("out.tmp/new/thesis.txt", "out.tmp/mine"):
        file = tmp_path / name
        file.parent.mkdir(parents=True)
        file.write_text("precious")
        with pytest.raises(UserError, match=r"out\.tmp is in the way"), staged_folder(final):
            pass
        assert file.read_text() == "precious" and not final.exists()
        (tmp_path / "out.tmp/lock").touch()  # empty: nobody's
        with pytest.raises(UserError, match=r"out\.tmp is in the way"), staged_folder(final):
            pass
        assert file.read_text() == "precious"
        file.rename(tmp_path / "kept")
        for path in (file.parent / "lock", tmp_path / "out.tmp/lock"):
            path.unlink(missing_ok=True)
        os.removedirs(file.parent) if file.parent != tmp_path / "out.tmp" else file.parent.rmdir()
        tmp_path.mkdir(exist_ok=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "out.tmp").symlink_to(elsewhere)
    with pytest.raises(UserError, match="in the way"), staged_folder(final):
        pass
    (tmp_path / "out.tmp").unlink()
    (tmp_path / "out.tmp").mkdir()  # empty, as after a kill at the very start
    with staged_folder(final) as stage:
        (stage / "a").touch()
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "kept", "out"]


STAGE = """
from pathlib import Path
from harness.core import staged_folder as staging
sync_tree = staging.sync_tree
def slowly(folder):  # all is written; for a large catalogue this takes minutes
    wait()
    sync_tree(folder)
staging.sync_tree = slowly
with staging.staged_folder(Path(sys.argv[1]), replace=True) as stage:
    (stage / "a").write_text("first")
"""


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_live_stage_is_left_alone_until_it_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    monkeypatch.setattr(lock, "WATCH", 20.0)
    final, host = tmp_path / "out", "node7" if elsewhere else socket.gethostname()
    with another(HOLD_ELSEWHERE.replace(HOLD, STAGE) if elsewhere else STAGE, str(final)) as process:
        for replace in (False, True):
            with pytest.raises(UserError, match=rf"out is in use by `-c` \(host {host}, process {process.pid}, "):
                with staged_folder(final, replace=replace):
                    pass
        process.communicate("\n")
        assert process.returncode == 0
    assert (final / "a").read_text() == "first" and os.listdir(tmp_path) == ["out"]


def test_a_replacement_that_was_killed_between_its_renames_gives_the_old_folder_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    final = tmp_path / "out"
    with staged_folder(final) as stage:
        (stage / "a").write_text("old")
    with another(
        STAGE.replace("slowly", "sync_tree_").replace(
            "staging.sync_tree = sync_tree_",
            """
from os import rename
import os
def kill(*names):
    rename(*names)
    print("there", flush=True)
    os.kill(os.getpid(), 9)
os.rename = kill
""",
        ),
        str(final),
    ) as process:
        assert process.wait() == -signal.SIGKILL
    assert not final.exists() and (tmp_path / "out.tmp/old/a").read_text() == "old"
    capsys.readouterr()
    with held(final):
        assert (final / "a").read_text() == "old"
    assert capsys.readouterr().out == f"{final}: cleared away leftovers of a killed process in out.tmp\n"
    assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(UserError, match="out exists already"), staged_folder(final):
        pass


def test_a_failed_publication_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "out"
    with staged_folder(final) as stage:
        (stage / "a").write_text("old")
    with pytest.raises(OSError, match="gone"), monkeypatch.context() as patch, ExitStack() as stack:
        stack.enter_context(staged_folder(final, replace=True))
        rename = Path.rename

        def fail(self: Path, to: Path) -> Path:
            if self.name == "new":
                raise OSError("gone")
            return rename(self, to)

        patch.setattr(Path, "rename", fail)
        stack.close()
    assert (final / "a").read_text() == "old" and os.listdir(tmp_path) == ["out"]


def test_of_two_ingests_one_runs(tmp_path: Path) -> None:
    """The second, from the command line, is told by whom before it works; the first is as if nothing had been."""
    manifest = make_catalogue(tmp_path / "drawn", classes=2, queries=1, ingest=False)
    code = """
from harness.__main__ import main
from harness.commands import ingest
close = ingest.ShardWriter.close
def slowly(self):
    wait()
    close(self)
ingest.ShardWriter.close = slowly
sys.exit(main())
"""
    words = ["ingest", "--manifest", str(manifest), "--images", str(manifest.parent), "--out", str(tmp_path / "cat")]
    with another(code, *words) as first:
        second = subprocess.run([sys.executable, "-m", "harness", *words], cwd=ROOT, capture_output=True, text=True)
        assert second.returncode == 2
        told = rf"error: {tmp_path}/cat is in use by `-c` \(host \S+, process {first.pid}, since .*\n"
        assert re.fullmatch(told, second.stderr), second.stderr
        assert not (tmp_path / "cat").exists()
        _, errors = first.communicate("\n")
        assert first.returncode == 0, errors
    ingest(IngestConfig(manifest=manifest, images=manifest.parent, out=tmp_path / "undisturbed"))
    shard = "shards/shard-000000.tar"
    assert (tmp_path / "cat" / shard).read_bytes() == (tmp_path / "undisturbed" / shard).read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["cat", "drawn", "undisturbed"]


def test_many_at_once_take_turns(tmp_path: Path) -> None:
    """Threads that hold, are refused, and hold again: never two at a time, and nothing is left."""
    final, inside, most, held_by = tmp_path / "out", [], [], []

    def work(number: int) -> None:
        for _ in range(40):
            try:
                with held(final):
                    inside.append(number)
                    most.append(len(inside))
                    inside.remove(number)
                    held_by.append(number)
            except UserError as error:
                assert "in use by" in str(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1} and held_by and os.listdir(tmp_path) == []


def told(command: str, run: Path, out: Path, argv: list[str]) -> str:
    """In a pool: what a training in `run`, or an export of it to `out`, is told."""
    from harness.commands import export
    from harness.train.run import train

    with pytest.raises(UserError) as refused:
        train(argv) if command == "train" else export.run(export.ExportConfig(run=run, out=out, onnx=False))
    return str(refused.value)


def test_the_second_training_or_export_ends_on_every_rank(catalogue: Path, tmp_path: Path) -> None:
    """Told by whom on all ranks, before it writes or trains anything; a run may be exported while it trains."""
    run, out = tmp_path / "run", tmp_path / "out"
    argv = arguments(catalogue, run, **{"train.steps": 1})
    me = f"(host {socket.gethostname()}, process {os.getpid()}, since "
    with locked(run / ".lock", "it"):
        for line in ranks(2).run(told, "train", run, out, argv):
            assert line.startswith(f"run folder {run} is in use by `") and me in line
        assert os.listdir(run) == [".lock"]
    ranks(2).run(trained, argv)
    assert ".lock" not in os.listdir(run)
    with locked(run / ".lock", "it"), held(out):
        for line in ranks(2).run(told, "export", run, out, argv):
            assert line.startswith(f"{out} is in use by `") and me in line
    with locked(run / ".lock", "it"):
        ranks(2).run(exported, run, out)
    assert (out / "artefact.json").exists()


def trained(argv: list[str]) -> None:
    """In a pool."""
    from harness.train.run import train

    train(argv)


def exported(run: Path, out: Path) -> None:
    """In a pool."""
    from harness.commands import export

    export.run(export.ExportConfig(run=run, out=out, onnx=False))


PAUSED = {
    "train": """
from harness.train.trainer import Trainer
step = Trainer.train_step
def slowly(self, *arguments):
    if self.step == 1:
        wait()
    return step(self, *arguments)
Trainer.train_step = slowly
""",
    "export": """
from harness.artefact import document_chunks
write = document_chunks.write_documents
def slowly(*arguments):
    wait()
    write(*arguments)
document_chunks.write_documents = slowly
""",
}
MAIN = """
from harness.__main__ import main
sys.exit(main())
"""


@pytest.mark.full
def test_of_two_trainings_and_two_exports_one_runs(catalogue: Path, tmp_path: Path) -> None:
    """As a user starts them, the second under torchrun: exit code 2 and one line; the first goes on undisturbed."""
    run, out = tmp_path / "run", tmp_path / "out"
    settings = arguments(catalogue, run, **{"train.steps": 3})
    torchrun = [sys.executable, "jobs/torchrun.py", "--standalone", "--nproc-per-node", "2", "-m", "harness"]
    for words, what in (
        (["train", *settings], f"run folder {run}"),
        (["export", str(run), "--out", str(out)], str(out)),
    ):
        with another(PAUSED[words[0]] + MAIN, *words) as first:
            second = subprocess.run([*torchrun, *words], cwd=ROOT, capture_output=True, text=True)
            assert second.returncode == 2
            lines = [line for line in second.stderr.splitlines() if "error" in line]
            told = re.sub("^error: rank 1: ", "error: ", lines[0])  # either rank may be the first to tell
            assert len(lines) == 1 and told.startswith(f"error: {what} is in use by `-c` (host "), second.stderr
            assert f"process {first.pid}, " in lines[0] and "Traceback" not in second.stderr
            _, errors = first.communicate("\n")
            assert first.returncode == 0, errors
    steps = [
        line["step"] for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "train/loss" in line
    ]
    assert steps == [1, 2, 3]
    assert sorted(os.listdir(tmp_path)) == ["out", "run"] and (out / "artefact.json").exists()
