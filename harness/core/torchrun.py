"""torchrun with a launcher closed to other machines: for `shelfmark train --ranks` and jobs/torchrun.py.

On one machine the launcher meets itself in a file, and the ranks' store listens on the loopback interface. torchrun's
own choice, a c10d store, listens on every interface and unpickles what it finds there: whoever reaches the port runs
commands as this user.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Sequence
from typing import Any

from torch.distributed import TCPStore
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.run import parse_args, parse_min_max_nnodes, run

from harness.core.cli import USER_ERROR_CODE
from harness.core.launcher import Forward

LOOPBACK = "127.0.0.1"


@record
def start(argv: Sequence[str], forward: Forward) -> None:
    """Runs torchrun with `argv`, on one machine with a file to meet in; what it logs is not shown. With --max-restarts
    ranks are started again unless they ended by a signal that `forward` handed on.

    Raises:
        ChildFailedError: a rank failed.
        SignalException: a signal came to this process; the ranks have got it too, and have ended.
        DistError: nodes did not meet.
    """
    logging.disable(logging.ERROR)  # it also logs the text of its exceptions
    args = parse_args(list(argv))
    chosen = args.rdzv_backend != "static" or args.rdzv_endpoint or args.master_port is not None
    if args.standalone or (not chosen and parse_min_max_nnodes(args.nnodes)[1] == 1):
        args.standalone, args.rdzv_endpoint = False, ""
        args.rdzv_backend, args.rdzv_conf, args.rdzv_id = "c10d", "store_type=file", str(uuid.uuid4())
        args.local_addr = LOOPBACK
        DynamicRendezvousHandler._create_tcp_store_server = _store_on_loopback  # type: ignore[assignment]
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # or gloo listens where the machine's name leads
    monitor = LocalElasticAgent._monitor_workers

    def monitored(agent: LocalElasticAgent, group: WorkerGroup) -> RunResult:
        result = monitor(agent, group)
        if result.failures and agent._remaining_restarts:
            rank, code, how = first_failure(ChildFailedError("", result.failures))
            if forward.caused(code):
                agent._remaining_restarts = 0
            else:
                print(f"\nrank {rank} ended with {how}: the ranks start again", file=sys.stderr)
        return result

    LocalElasticAgent._monitor_workers = monitored  # type: ignore[method-assign]
    args.signals_to_handle = "SIGQUIT"  # the others are harness.core.launcher.Forward's
    run(args)


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
