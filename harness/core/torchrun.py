"""torchrun with a launcher closed to other machines: for `shelfmark train --ranks` and jobs/torchrun.py.

On one machine the launcher meets itself in a file, and the ranks' store listens on the loopback interface. torchrun's
own choice, a c10d store, listens on every interface and unpickles what it finds there: whoever reaches the port runs
commands as this user.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import tail_log
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.run import parse_args, parse_min_max_nnodes, run

from harness.core.cli import USER_ERROR_CODE
from harness.core.launcher import LOST, Forward

LOOPBACK = "127.0.0.1"


@record
def start(argv: Sequence[str], forward: Forward) -> None:
    """Runs torchrun with `argv`, on one machine with a file to meet in; what it logs is not shown. With --max-restarts
    ranks are started again unless they ended by a signal that `forward` handed on or by a mistake of the user. With
    --log-dir and --tee 3 what each rank writes is also kept in a folder of its own, where a rank fails.

    Raises:
        ChildFailedError: a rank failed.
        SignalException: a signal came to this process; the ranks have got it too, and have ended.
        DistError: nodes did not meet.
    """
    logging.disable(logging.ERROR)  # it also logs the text of its exceptions
    _record_collectives()
    args = parse_args(list(argv))
    chosen = args.rdzv_backend != "static" or args.rdzv_endpoint or args.master_port is not None
    if args.standalone or (not chosen and parse_min_max_nnodes(args.nnodes)[1] == 1):
        args.standalone, args.rdzv_endpoint = False, ""
        args.rdzv_backend, args.rdzv_conf, args.rdzv_id = "c10d", "store_type=file", str(uuid.uuid4())
        args.local_addr = LOOPBACK
        DynamicRendezvousHandler._create_tcp_store_server = _store_on_loopback  # type: ignore[assignment]
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # or gloo listens where the machine's name leads
    monitor, tail = LocalElasticAgent._monitor_workers, tail_log.tail_logfile
    tail_log.tail_logfile = lambda header, **rest: tail("", **rest)  # the joint log keeps its lines as they are
    folders: list[Path] = []  # of each start's logs

    def monitored(agent: LocalElasticAgent, group: WorkerGroup) -> RunResult:
        result = monitor(agent, group)
        logs: Any = agent._logs_specs
        folder = Path(logs._run_log_dir) / f"attempt_{group.spec.max_restarts - agent._remaining_restarts}"
        if logs._run_log_dir and folder not in folders:
            folders.append(folder)
        if result.failures and agent._remaining_restarts:
            rank, code, how = first_failure(ChildFailedError("", result.failures))
            told = any(failure.exitcode == USER_ERROR_CODE for failure in result.failures.values())
            if forward.caused(code) or (told and not (folder / LOST).exists()):
                agent._remaining_restarts = 0
            else:
                print(f"\nrank {rank} ended with {how}: the ranks start again", file=sys.stderr)
        return result

    LocalElasticAgent._monitor_workers = monitored  # type: ignore[method-assign]
    args.signals_to_handle = "SIGQUIT"  # the others are harness.core.launcher.Forward's
    try:
        run(args)
    except ChildFailedError as error:
        if not forward.caused(first_failure(error)[1]):
            error.logs = folders[-1] if folders else None  # type: ignore[attr-defined]
            folders.clear()
        raise
    finally:
        for run_folder in {folder.parent for folder in folders}:
            shutil.rmtree(run_folder, ignore_errors=True)
            with suppress(OSError):  # another node's are in it too
                run_folder.parent.rmdir()


def _record_collectives() -> None:
    """Has the ranks keep a list of their last collectives, which costs microseconds each: harness.core.watch writes it
    where a rank stands still, NCCL itself, beside the job's log, where a collective takes longer than its timeout.
    """
    job = f"{os.environ.get('SLURM_JOB_NAME', 'shelfmark')}-{os.environ.get('SLURM_JOB_ID', os.getpid())}"
    dump = os.environ.get("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", f"{Path.cwd() / job}.nccl-")
    size = os.environ.get("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")  # the names before torch 2.9: the newer ones win
    for name, value in {"BUFFER_SIZE": size, "DUMP_TEMP_FILE": dump}.items():
        os.environ.setdefault(f"TORCH_FR_{name}", value)
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def _store_on_loopback(*_: Any) -> TCPStore:
    """The store in which the ranks of one machine meet; torch itself cannot be told an interface."""
    listener = socket.create_server((LOOPBACK, 0))
    port = listener.getsockname()[1]
    return TCPStore(LOOPBACK, port, is_master=True, multi_tenant=True, master_listen_fd=listener.detach())


def first_failure(error: ChildFailedError) -> tuple[int, int, str]:
    """Rank that failed first, its exit code as a shell counts it, and how it ended, in words."""
    rank, failure = error.get_first_failure()
    code = failure.exitcode
    if code >= 0:
        return rank, code, f"exit code {code}"
    return rank, 128 - code, signal.Signals(-code).name


def own_log(error: ChildFailedError) -> Path | None:
    """Folder of what the rank that failed first has written, where --log-dir and --tee keep it."""
    logs: Path | None = getattr(error, "logs", None)
    if logs is None:
        return None
    folder = logs / str(error.get_first_failure()[1].local_rank)
    return folder if (folder / "stderr.log").exists() else None


def run_ranks(ranks: int, words: Sequence[str]) -> int:
    """Runs `python -m WORDS` on `ranks` ranks of this machine, which share its cores; returns the exit code of the
    first that failed, as a shell counts it.

    A rank that ends by itself with a mistake of the user has told it; any other end is named in one line.
    """
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    options = ["--nproc-per-node", str(ranks), "--max-restarts", "0"]
    forward = Forward()
    try:
        start([*options, "-m", *words], forward)
    except ChildFailedError as error:
        rank, code, how = first_failure(error)
        if code != USER_ERROR_CODE and not forward.caused(code):
            print(f"\nrank {rank} ended with {how}", file=sys.stderr)
        return code
    except SignalException as error:
        return 128 + error.sigval
    return 0
