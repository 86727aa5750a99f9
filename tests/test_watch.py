"""Ranks and their launcher: ranks end with it, and one that stands still is named."""

from __future__ import annotations

import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from harness.core import cli
from harness.core.errors import UserError
from tests.runs import arguments

LAUNCHERS = {"ours": ["jobs/torchrun.py"], "plain": ["-m", "torch.distributed.run"]}
PATIENCE = 120.0  # seconds, for what takes a few

# Trains; the rank STOPPED stops itself at the CALL-th call of its clock, some beats after it: one at the start, then
# five a step.
SCRIPT = """
import os, signal, sys, time
from harness.core import cli as arguments, watch
from harness.train import run as train, throughput

arguments.OTHERS_WAIT = 60  # in which torchrun ends the other ranks, however loaded the machine
watch._LOOKS = 100  # a silent rank is noticed at once, so that its collectives do not time out before

def stopping(name):
    call = getattr(throughput.StepClock, name)

    def stop(clock, *args, **options):
        call(clock, *args, **options)
        clock.calls = getattr(clock, "calls", 0) + 1
        if os.environ["RANK"] == os.environ["STOPPED"] and clock.calls == int(os.environ["CALL"]):
            time.sleep(2)  # some beats of 1 s, so that the last one has this place
            os.kill(os.getpid(), signal.SIGSTOP)

    setattr(throughput.StepClock, name, stop)

stopping("start")
stopping("mark")
sys.exit(train.main())
"""


def wait_for(what: Callable[[], bool], started: subprocess.Popen[str] | None = None) -> float:
    """Seconds until what() holds."""
    begin = time.monotonic()
    while not what():
        assert time.monotonic() - begin < PATIENCE and (started is None or started.poll() is None)
        time.sleep(0.1)
    return time.monotonic() - begin


def state(pid: int) -> str:
    """Of a process, as the kernel calls it: R, S, T …; Z where it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def ranks_of(launcher: int) -> list[int]:
    found = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(pid) for pid in found if b"RANK=" in Path(f"/proc/{pid}/environ").read_bytes()]


@contextmanager
def launched(
    launcher: str, world: int, program: list[str], errors: Path, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    line = [sys.executable, *LAUNCHERS[launcher], f"--nproc-per-node={world}", *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ".", **environment}
    ranks: list[int] = []
    with errors.open("w") as file:
        process = subprocess.Popen(line, env=environment, stdout=file, stderr=file, text=True)
    try:
        wait_for(lambda: len(ranks_of(process.pid)) == world, process)
        ranks = ranks_of(process.pid)
        yield process
    finally:
        process.kill()
        process.wait()
        for pid in ranks:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "launcher,end",
    [
        ("ours", signal.SIGKILL),
        pytest.param("ours", signal.SIGUSR1, marks=pytest.mark.full),
        pytest.param("plain", signal.SIGKILL, marks=pytest.mark.full),
        pytest.param("plain", signal.SIGUSR1, marks=pytest.mark.full),
    ],
)
def test_ranks_end_with_their_launcher(catalogue: Path, tmp_path: Path, launcher: str, end: signal.Signals) -> None:
    run = tmp_path / "run"
    program = ["-m", "harness.train", *arguments(catalogue, run, **{"train.steps": 100_000})]
    with launched(launcher, 2, program, tmp_path / "errors") as process:
        wait_for(lambda: (run / "log.jsonl").is_file() and len((run / "log.jsonl").read_text()) > 0, process)
        ranks = ranks_of(process.pid)
        process.send_signal(end)
        process.wait()
        took = wait_for(lambda: all(state(pid) == "Z" for pid in ranks))
    assert took < 15.0
    print(f"ranks gone after {took:.2f} s")


@pytest.mark.parametrize(
    "world,stopped,call,place",
    [
        (2, 1, 12, "step 2, forward, samples "),
        pytest.param(3, 2, 11, "step 2, data, samples ", marks=pytest.mark.full),
        pytest.param(3, 0, 13, "step 2, backward, samples ", marks=pytest.mark.full),
        pytest.param(3, 1, 14, "step 2, optimizer, samples ", marks=pytest.mark.full),
    ],
)
def test_a_rank_that_stands_still_is_named(
    catalogue: Path, tmp_path: Path, world: int, stopped: int, call: int, place: str
) -> None:
    script, errors = tmp_path / "stopping.py", tmp_path / "errors"
    script.write_text(SCRIPT)
    settings = {"train.steps": 100, "mesh.timeout_minutes": 0.6}  # the collectives' own is 9 s longer
    program = [str(script), *arguments(catalogue, tmp_path / "run", **settings)]
    environment = {"STOPPED": str(stopped), "CALL": str(call)}
    with launched("ours", world, program, errors, **environment) as process:
        ranks = ranks_of(process.pid)
        wait_for(lambda: any(state(pid) == "T" for pid in ranks), process)
        took = wait_for(lambda: "error: " in errors.read_text(), process)
        os.kill(next(pid for pid in ranks if state(pid) == "T"), signal.SIGKILL)  # the launcher gives it 30 s
        wait_for(lambda: process.poll() is not None)
    lines = [line for line in errors.read_text().splitlines() if "error: " in line]
    assert len(lines) == 1 and f"rank {stopped} was not heard of for 36 s; it was last in {place}" in lines[0], lines
    assert "Traceback" not in errors.read_text()
    assert process.returncode in (2, 137)  # the latter of the rank that stood still, ended here
    print(f"told after {took:.2f} s: {lines[0]}")


@pytest.mark.parametrize(
    "world,hanging,call,place",
    [
        pytest.param(2, 1, 12, "step 2, forward, samples ", marks=pytest.mark.full),
        pytest.param(3, 0, 11, "step 2, data, samples ", marks=pytest.mark.full),
        pytest.param(3, 2, 3, "step 0, backward, samples ", marks=pytest.mark.full),
    ],
)
def test_a_rank_that_hangs_is_named_and_shows_its_stacks(
    catalogue: Path, tmp_path: Path, world: int, hanging: int, call: int, place: str
) -> None:
    """It beats, and no other rank waits longer than it: only its place tells."""
    script, errors, run = tmp_path / "hanging.py", tmp_path / "errors", tmp_path / "run"
    script.write_text(SCRIPT.replace("os.kill(os.getpid(), signal.SIGSTOP)", "time.sleep(1e6)"))
    # In the first step, a tenth more than the silence that is allowed.
    settings = {"mesh.timeout_minutes": 0.6} if call == 3 else {"mesh.step_minutes": 0.1}
    program = [str(script), *arguments(catalogue, run, **{"train.steps": 100, **settings})]
    with launched("ours", world, program, errors, STOPPED=str(hanging), CALL=str(call)) as process:
        wait_for(lambda: process.poll() is not None)
    lines = [line for line in errors.read_text().splitlines() if "error: " in line]
    assert len(lines) == 1 and f"error: rank {hanging} stands still for " in lines[0], lines
    assert f" s in {place}" in lines[0] and f"Stacks: {run}/stacks-rank-*.txt" in lines[0]
    assert [file.name for file in run.glob("stacks-*")] == [f"stacks-rank-{hanging}.txt"]
    # What the rank at fault has not begun, the others have.
    recorded = {rank: last_collective(run / f"collectives-rank-{rank}") for rank in range(world)}
    assert recorded.pop(hanging) < min(recorded.values()), recorded
    stacks = next(run.glob("stacks-*")).read_text()
    assert re.search(r"hanging.py.* in stop\n", stacks) and "in _write_traces" in stacks and "read_ahead" in stacks
    assert process.returncode == 2


def last_collective(file: Path) -> int:
    """Number of the newest one of the world in a rank's part of the flight recorder."""
    return int(pickle.loads(file.read_bytes())["pg_status"]["0"]["last_enqueued_collective"])


FAILS = """
import sys, threading
from harness.core.cli import run_command
from harness.core.errors import UserError
from harness.core.mesh import Mesh, MeshConfig

def body():
    with Mesh(MeshConfig()) as mesh:
        mesh.barrier()
        if mesh.rank == 1:
            raise UserError("sample 5 is missing")
        threading.Event().wait()

sys.exit(run_command(body))
"""


def test_a_rank_that_fails_ends_those_that_wait_for_it() -> None:
    """Without a launcher, which would kill them, and not in a collective of gloo, which would notice."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", FAILS],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=PATIENCE)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [1, 2]
    assert said[1].endswith("error: rank 1: sample 5 is missing\n") and "Traceback" not in said[0]


FAILS_ONCE = """
import sys, time
from pathlib import Path
from harness.core.mesh import Mesh, MeshConfig

with Mesh(MeshConfig()) as mesh:
    mesh.barrier()
    if mesh.rank == 1 and Path(sys.argv[1]).exists():
        Path(sys.argv[1]).unlink()
        raise RuntimeError("once")
    time.sleep(3)  # some beats
    mesh.barrier()
"""


@pytest.mark.full
def test_ranks_that_start_again_do_not_hear_of_the_failure_before(tmp_path: Path) -> None:
    """They meet in the launcher's store, which holds what the ended ranks have written there."""
    (tmp_path / "rank.py").write_text(FAILS_ONCE)
    (tmp_path / "alive").touch()
    program = ["--max-restarts=1", str(tmp_path / "rank.py"), str(tmp_path / "alive")]
    with launched("ours", 2, program, tmp_path / "errors") as process:
        process.wait(PATIENCE)
    said = (tmp_path / "errors").read_text()
    assert process.returncode == 0 and said.count("the ranks start again") == 1, said


def test_an_error_that_follows_is_not_told_after_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the ranks of a node that torchrun has started: one that only lost its peer says nothing."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "1" / "error.json"))
    (tmp_path / "1").mkdir()
    monkeypatch.setattr(cli, "_has_peers", lambda: True)
    monkeypatch.setattr(cli, "OTHERS_WAIT", 0.0)
    assert cli.tell(RuntimeError("Connection closed by peer")) == 1
    assert "Connection closed by peer" in capsys.readouterr().err, "nobody has said why"
    assert cli.tell(UserError("rank 0 was not heard of")) == cli.USER_ERROR_CODE
    assert "rank 0 was not heard of" in capsys.readouterr().err
    assert cli.tell(RuntimeError("Connection closed by peer")) == 1
    assert capsys.readouterr().err == ""
    assert cli.tell(RuntimeError("another")) == 1
    assert "another" in capsys.readouterr().err
