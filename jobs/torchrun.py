"""torchrun with a launcher closed to other machines (harness/core/torchrun.py), and one line with the exit code for a
failed rank in place of a traceback. Signals go to the ranks, which training answers with a checkpoint.
Takes torchrun's options.
"""

from __future__ import annotations

import os
import signal
import sys

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from harness.core.cli import USER_ERROR_CODE
from harness.core.launcher import Forward
from harness.core.torchrun import first_failure, own_log, start


def launch(argv: list[str]) -> int:
    """Runs torchrun with `argv`; the exit code of the rank that failed first on this node, as a shell counts it."""
    node, forward = os.environ.get("SLURMD_NODENAME", "this node"), Forward()
    try:
        start(argv, forward)
    except ChildFailedError as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM's, because another node failed too: keep the exit code
        rank, code, how = first_failure(error)
        if forward.caused(code):
            # SIGTERM: the lowest, for SLURM takes the highest of all nodes: that of the node which failed by itself.
            return 1 if code == 128 + signal.SIGTERM else code
        if code != USER_ERROR_CODE:  # a mistake of the user, which the rank has told
            written = own_log(error)
            where = "" if written is None else f"; its own log: {written}"
            # A progress bar may have left its line open; jobs/common.sh squeezes empty lines.
            print(f"\nrank {rank} on {node} ended with {how}{where}", file=sys.stderr)
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
