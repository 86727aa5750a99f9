"""Parent-death signal of a rank: ranks must not outlive a torchrun that the kernel or SIGUSR1 killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def end_with_launcher() -> None:
    """Has the kernel kill this process when its parent ends, if torchrun started it. Linux only.

    The kernel watches the thread that started the process: torchrun's main thread. Child processes of the rank do not
    inherit the signal.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended just before
        os.kill(os.getpid(), signal.SIGKILL)
