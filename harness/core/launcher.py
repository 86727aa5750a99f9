"""Launcher and ranks: signals to the launcher go to the ranks, which must not outlive one that was killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

STOPPED_CODE = 75  # of a run that a signal stopped and that goes on by the same command: EX_TEMPFAIL
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # that stop a run
LOST = "lost"  # file in `start_folder`: a rank stood still, which is not a mistake of the user
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def start_folder() -> Path | None:
    """Folder that the ranks of this node share until they start again; None where torchrun did not start them."""
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(own).parent.parent if own else None


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


class Forward:
    """In a launcher, once made: hands signals to the ranks and waits. Before there are any, and at a second SIGINT, the
    launcher ends, and they with it.

    Attributes:
        number: the first signal; 0 without one.
    """

    def __init__(self) -> None:
        self.number = 0
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGUSR1:  # jobs/common.sh: until now
                signal.signal(number, self._forward)

    def caused(self, code: int) -> bool:
        """True where the exit code of a rank, as a shell counts it, follows from what was handed on."""
        return code == STOPPED_CODE or (self.number > 0 and code == 128 + self.number)

    def _forward(self, number: int, _: FrameType | None) -> None:
        import psutil  # type: ignore[import-untyped]

        ranks = psutil.Process().children()
        at_once = number == self.number == signal.SIGINT
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGKILL if at_once else number)
        if at_once or not ranks:
            os._exit(128 + number)
        self.number = self.number or number
