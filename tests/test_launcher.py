"""The launcher on one machine: nobody who reaches its ports runs a command through it."""

from __future__ import annotations

import base64
import os
import pickle
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import psutil
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
LAUNCHERS = {"ours": ["jobs/torchrun.py"], "plain": ["-m", "torch.distributed.run"]}
RANK = (
    "import os, time, torch.distributed as dist; dist.init_process_group('gloo'); os.write(1, b'up\\n'); time.sleep(60)"
)


class Intruder:
    """A pickle that makes a file where it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


def open_ports(pid: int) -> list[int]:
    """Ports of a process that other machines reach."""
    listening = [c.laddr for c in psutil.Process(pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    return sorted({address.port for address in listening if address.ip not in ("127.0.0.1", "::1")})


def intrude(port: int, intruder: Intruder) -> None:
    """Puts the intruder where torchrun's c10d rendezvous keeps its state, if the store at `port` has such a place."""
    with suppress(dist.DistError):
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)
        for key in store.list_keys():
            if "torch.rendezvous." in key:
                store.set(key.removeprefix("/"), base64.b64encode(pickle.dumps(intruder)))


def test_a_neighbour_on_the_network_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    started = {
        name: subprocess.Popen(
            [sys.executable, *launcher, "--nproc-per-node", "2", str(tmp_path / "rank.py")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for name, launcher in LAUNCHERS.items()
    }
    try:
        for process in started.values():
            assert process.stdout is not None
            assert [process.stdout.readline().strip() for _ in range(2)] == ["up", "up"]
        ports = {name: open_ports(process.pid) for name, process in started.items()}
        for name in LAUNCHERS:
            for port in ports[name]:
                intrude(port, Intruder(tmp_path / name))
        # torchrun reads its store at each heartbeat, every 5 s.
        deadline = time.monotonic() + 60
        while not (tmp_path / "plain").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert (tmp_path / "plain").exists(), "torchrun itself has the hole that the probe is made for"
        assert ports["ours"] == [] and not (tmp_path / "ours").exists()
    finally:
        for process in started.values():
            process.terminate()
            process.wait(30)


STARTS = """
folder=$(dirname "$(dirname "$TORCHELASTIC_ERROR_FILE")")
echo "start $TORCHELASTIC_RESTART_COUNT" | tee -a "$STARTS"
case $TORCHELASTIC_RESTART_COUNT in
    0) exit 1 ;;
    1) touch "$folder/lost"; exit 2 ;;  # a rank stood still
    *) echo "error: no such recipe" >&2; exit 2 ;;
esac
"""


def test_ranks_start_again_after_a_failure_but_not_after_a_mistake(tmp_path: Path) -> None:
    options = ["--nproc-per-node=1", "--max-restarts=5", f"--log-dir={tmp_path}/logs", "--tee=3", "--no-python"]
    done = subprocess.run(
        [sys.executable, *LAUNCHERS["ours"], *options, "bash", "-c", STARTS],
        cwd=ROOT, env={**os.environ, "STARTS": str(tmp_path / "starts")}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 2 and (tmp_path / "starts").read_text().split() == "start 0 start 1 start 2".split()
    again = "rank 0 ended with exit code {}: the ranks start again"
    said = [line for line in done.stderr.splitlines() if line]
    assert said == [again.format(1), again.format(2), "error: no such recipe"]
    assert done.stdout.split() == "start 0 start 1 start 2".split()
    logs = {file.parent.parent.name: file.read_text() for file in (tmp_path / "logs").rglob("stderr.log")}
    assert logs == {"attempt_0": "", "attempt_1": "", "attempt_2": "error: no such recipe\n"}


def test_logs_of_ranks_that_end_well_are_removed(tmp_path: Path) -> None:
    options = ["--nproc-per-node=1", f"--log-dir={tmp_path}/logs", "--tee=3", "--no-python"]
    line = [sys.executable, *LAUNCHERS["ours"], *options, "echo", "done"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "") and not (tmp_path / "logs").exists()
