"""torchrun for jobs: where a rank fails, one line and the rank's exit code instead of the launcher's own traceback."""

from __future__ import annotations

import logging
import os
import signal
import sys

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

# The launcher logs what its exceptions say again.
logging.disable(logging.ERROR)


def launch(argv: list[str]) -> int:
    """Runs torchrun with `argv`; the exit code of the rank that failed first on this node, as a shell counts it."""
    node = os.environ.get("SLURMD_NODENAME", "this node")
    try:
        main(argv)
    except ChildFailedError as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM's, because another node failed too: keep the exit code
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        # A progress bar may have left its line open; jobs/common.sh squeezes empty lines.
        print(f"\nrank {rank} on {node} ended with {how}", file=sys.stderr)
        return code if code >= 0 else 128 - code
    except SignalException:
        return 1  # the lowest, for SLURM takes the highest of all nodes: that of the node which failed by itself
    except DistError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        print(f"error: {node} does not meet the other nodes: {reason}. See docs/clusters.md", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
