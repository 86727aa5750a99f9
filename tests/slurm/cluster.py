"""A real SLURM of several nodes on this machine: own munge key, own ports, own folder; beside a system's SLURM, or
another test's.
"""

from __future__ import annotations

import getpass
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "sinfo", "srun", "scancel")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
SBIN = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"  # an ordinary user's PATH may lack the daemons


def missing() -> str:
    """Why no cluster can be started here; empty if one can."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=SBIN)]
    return f"no {', '.join(absent)} (on Debian and Ubuntu the packages slurm-wlm and munge)" if absent else ""


@dataclass
class Cluster:
    """A running cluster.

    folder: everything of it, logs in folder/log. environment: what makes SLURM's commands speak to it.
    """

    folder: Path
    environment: dict[str, str]

    def command(self, *words: object, cwd: Path | None = None, **variables: str) -> str:
        """Runs one of SLURM's commands, with more `variables` in its environment; returns what it prints."""
        environment = {**self.environment, **variables}
        done = subprocess.run([*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, f"{words}: {done.stderr}{self.logs()}"
        return done.stdout

    def submit(self, *words: object, cwd: Path, **variables: str) -> int:
        """sbatch with `words`; the job's id."""
        return int(self.command("sbatch", "--parsable", *words, cwd=cwd, **variables))

    def job(self, number: int | str) -> dict[str, str]:
        """SLURM's record of a job: JobState, ExitCode, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.command("scontrol", "--oneliner", "show", "job", number)))

    def wait(self, number: int | str, seconds: float = 600.0) -> dict[str, str]:
        """`job`, once it has ended and its nodes are free again."""
        end = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in ENDED:
            assert time.monotonic() < end, f"job {number} is still {job['JobState']} ({job['Reason']}){self.logs()}"
            time.sleep(0.2)
        return job

    def processes(self, number: int) -> list[Path]:
        """/proc folders of all processes that a job has left running, whoever their parent is."""
        mark = f"\0SLURM_JOB_ID={number}\0".encode()
        ours = f"\0SLURM_CONF={self.environment['SLURM_CONF']}\0".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = b"\0" + (folder / "environ").read_bytes()
            except OSError:  # ended meanwhile, or another user's
                continue
            if mark in variables and ours in variables:
                found.append(folder)
        return found

    def kill_node(self, name: str) -> None:
        """Ends the slurmd of a node as a crash does; what it has started lives on."""
        file = self.folder / "run" / f"slurmd.{name}.pid"
        os.kill(int(file.read_text()), signal.SIGKILL)
        file.unlink()

    def start_node(self, name: str) -> None:
        """Starts the slurmd of a node."""
        self.command("slurmd", "-N", name)

    def logs(self) -> str:
        """The last lines of every daemon's log."""
        files = sorted((self.folder / "log").iterdir())
        return "".join(f"\n--- {file.name}\n" + "\n".join(file.read_text().splitlines()[-15:]) for file in files)


@contextmanager
def cluster(nodes: int = 2, cpus: int = 2) -> Iterator[Cluster]:
    """Nodes node1, node2, ... of `cpus` CPUs each (SLURM believes what it is told), all idle. Everything it started has
    ended afterwards.
    """
    # /tmp, because the path of munged's socket may have no more than 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    folder.chmod(0o755)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for name in ("run", "log", "state", "munge", *(f"spool/node{i + 1}" for i in range(nodes))):
            (folder / name).mkdir(mode=0o755, parents=True)
        (folder / "munge").chmod(0o700)
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        made = Cluster(folder, {**inherited, "PATH": SBIN, "SLURM_CONF": str(folder / "slurm.conf")})
        # --force: munged takes no socket below a folder that everyone may write, such as /tmp, otherwise.
        paths = [f"--{option}-file={folder}/{path}" for option, path in MUNGE_FILES.items()]
        stack.callback(stop, folder / "run")
        made.command("munged", "--force", f"--socket={folder}/run/munge.socket", *paths)
        (folder / "slurm.conf").write_text(configuration(folder, nodes, cpus))
        (folder / "cgroup.conf").write_text(f"CgroupPlugin={_no_cgroups(made)}\n")
        made.command("slurmctld")
        for i in range(nodes):
            made.start_node(f"node{i + 1}")
        end = time.monotonic() + 60
        while len(made.command("sinfo", "--noheader", "--Node", "--states=idle").splitlines()) < nodes:
            assert time.monotonic() < end, f"the nodes do not come up{made.logs()}"
            time.sleep(0.1)
        stack.callback(_end_jobs, made)
        yield made


MUNGE_FILES = {"key": "munge/key", "pid": "run/munged.pid", "log": "log/munged.log", "seed": "munge/seed"}


def configuration(folder: Path, nodes: int, cpus: int) -> str:
    """slurm.conf: no accounting, no cgroups, processes found by their parents."""
    host, user, ports = socket.gethostname().split(".")[0], getpass.getuser(), free_ports(nodes + 1)
    settings: Mapping[str, object] = {
        "ClusterName": "test",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": ports[0],
        "SlurmUser": user,
        "SlurmdUser": user,
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/run/munge.socket",
        "CredType": "cred/munge",
        "SlurmctldPidFile": f"{folder}/run/slurmctld.pid",
        "SlurmdPidFile": f"{folder}/run/slurmd.%n.pid",
        "SlurmctldLogFile": f"{folder}/log/slurmctld.log",
        "SlurmdLogFile": f"{folder}/log/slurmd.%n.log",
        "StateSaveLocation": f"{folder}/state",
        "SlurmdSpoolDir": f"{folder}/spool/%n",
        "FirstJobId": random.randrange(1000, 60000),  # the rendezvous' port comes of it, and other clusters run beside
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/affinity",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "SchedulerParameters": "sched_interval=1,bf_interval=1,batch_sched_delay=0",
        "SwitchType": "switch/none",
        "MpiDefault": "none",
        "ReturnToService": 2,
        "SlurmdParameters": "config_overrides",
        # Long enough for a loaded machine: the tests wait for events, not for times.
        "KillWait": 120,
        "MessageTimeout": 60,
        "SlurmdTimeout": 20,  # after which a node whose slurmd has died is down
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
    }
    lines = [f"{name}={value}" for name, value in settings.items()]
    for i, port in enumerate(ports[1:], 1):
        lines.append(f"NodeName=node{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=1000")
    usual = "Nodes=ALL MaxTime=INFINITE State=UP"
    lines.append(f"PartitionName=all Default=YES GraceTime=600 PriorityTier=1 {usual}")
    return "\n".join([*lines, f"PartitionName=urgent PriorityTier=2 {usual}", ""])


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def _no_cgroups(made: Cluster) -> str:
    # The plugin is loaded even where nothing asks it; v2 fails without systemd, and 'disabled' is younger than 22.05.
    version = re.findall(r"\d+", made.command("sbatch", "--version"))
    return "disabled" if (int(version[0]), int(version[1])) >= (23, 11) else "cgroup/v1"


def _end_jobs(made: Cluster) -> None:
    """Cancels what a failed test left, so that no daemon is stopped under a running job."""
    jobs = made.command("squeue", "--noheader", "--format=%A").split()
    if jobs:
        made.command("scancel", *jobs)
    end = time.monotonic() + 30
    while made.command("squeue", "--noheader") and time.monotonic() < end:
        time.sleep(0.2)
    for folder in (folder for job in jobs for folder in made.processes(int(job))):
        os.kill(int(folder.name), signal.SIGKILL)


def stop(run: Path) -> None:
    """Ends the daemons whose pid files lie in the folder `run`, and waits for their end."""
    alive = {int(file.read_text()) for file in run.glob("*.pid")}
    for attempt in range(100):
        for pid in list(alive):
            try:
                os.kill(pid, {0: signal.SIGTERM, 99: signal.SIGKILL}.get(attempt, 0))
            except ProcessLookupError:
                alive.discard(pid)
        if not alive:
            break
        time.sleep(0.1)
