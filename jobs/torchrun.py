"""torchrun with a launcher closed to other machines, and one line with the exit code for a failed rank in place of a
traceback. Signals go to the ranks, which training answers with a checkpoint (docs/clusters.md).

Takes torchrun's options. On one machine the launcher meets itself in a file, and the ranks' store listens on the
loopback interface. torchrun's own choice, a c10d store, listens on every interface and unpickles what it finds there:
whoever reaches the port runs commands as this user.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import uuid
from typing import Any

from torch.distributed import DistError, TCPStore
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.run import parse_args, parse_min_max_nnodes, run

from harness.core.launcher import Forward

LOOPBACK = "127.0.0.1"
# The launcher also logs the text of its exceptions.
logging.disable(logging.ERROR)


@record
def start(argv: list[str]) -> None:
    """Runs torchrun with `argv`, on one machine with a file to meet in."""
    args = parse_args(argv)
    chosen = args.rdzv_backend != "static" or args.rdzv_endpoint or args.master_port is not None
    if args.standalone or (not chosen and parse_min_max_nnodes(args.nnodes)[1] == 1):
        args.standalone, args.rdzv_endpoint = False, ""
        args.rdzv_backend, args.rdzv_conf, args.rdzv_id = "c10d", "store_type=file", str(uuid.uuid4())
        args.local_addr = LOOPBACK
        DynamicRendezvousHandler._create_tcp_store_server = _store_on_loopback  # type: ignore[assignment]
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # or gloo listens where the machine's name leads
    args.signals_to_handle = "SIGQUIT"  # torchrun itself would give the ranks 30 s
    run(args)


def _store_on_loopback(*_: Any) -> TCPStore:
    """The store in which the ranks of one machine meet; torch itself cannot be told an interface."""
    listener = socket.create_server((LOOPBACK, 0))
    port = listener.getsockname()[1]
    return TCPStore(LOOPBACK, port, is_master=True, multi_tenant=True, master_listen_fd=listener.detach())


def launch(argv: list[str]) -> int:
    """Runs torchrun with `argv`; the exit code of the rank that failed first on this node, as a shell counts it."""
    node, forward = os.environ.get("SLURMD_NODENAME", "this node"), Forward()
    try:
        start(argv)
    except ChildFailedError as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM's, because another node failed too: keep the exit code
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        code = code if code >= 0 else 128 - code
        if forward.caused(code):
            # SIGTERM: the lowest, for SLURM takes the highest of all nodes: that of the node which failed by itself.
            return 1 if code == 128 + signal.SIGTERM else code
        # A progress bar may have left its line open; jobs/common.sh squeezes empty lines.
        print(f"\nrank {rank} on {node} ended with {how}", file=sys.stderr)
        return code
    except SignalException:
        return 1
    except DistError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        print(f"error: {node} does not meet the other nodes: {reason}. See docs/clusters.md", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
