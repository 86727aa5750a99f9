"""Long reading, and its interruption, leave nothing behind: no memory, descriptor, thread or process."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import pytest

from harness.core.errors import UserError
from harness.data.loader import StepLoader
from tests.test_loop import open_loader

SMALL: dict[str, Any] = {
    "data.queries_per_step": 2,
    "data.documents_per_step": 1,
    "data.preprocess.image_size": 16,
    "model.vision.image_size": 16,
}


def open_things() -> tuple[int, int, int]:
    """Descriptors, threads and children of this process."""
    me = psutil.Process()
    return me.num_fds(), threading.active_count(), len(me.children(recursive=True))


def no_server(_: int) -> bytes:
    raise UserError("the server is gone")


def read(catalogue: Path, backend: str, steps: int, fails: bool) -> None:
    with open_loader(catalogue, backend=backend, **SMALL) as loader:
        if fails:
            loader.images._bytes = no_server  # type: ignore[method-assign]
        for _ in loader.steps(0, steps):
            pass


@pytest.mark.parametrize("backend", ["dali", "reference"])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_after_close_or_an_error(
    catalogue: Path, backend: str, fails: bool, request: pytest.FixtureRequest
) -> None:
    counts = []
    gc.disable()  # what only its rounds would free may stay for long
    request.addfinalizer(gc.enable)
    for _ in range(6):
        if fails:
            with pytest.raises(UserError, match="gone"):
                read(catalogue, backend, 3, fails)
        else:
            read(catalogue, backend, 3, fails)
        counts.append(open_things())
    assert counts[-1] == counts[1], "the first use may load libraries that keep something, a later one may not"


SCRIPT = """
    import signal, sys
    from pathlib import Path
    from tests.test_loop import open_loader
    from tests.test_soak import SMALL
    # A shell starts background jobs deaf to it, and so are their children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open_loader(Path(sys.argv[1]), backend=sys.argv[2], **SMALL) as loader:
        for step, _ in enumerate(loader.steps(0, 10**6)):
            if step == 5:
                print("reading", flush=True)
"""


@pytest.mark.parametrize("backend", ["dali", pytest.param("reference", marks=pytest.mark.full)])
def test_ctrl_c_ends_a_reader(catalogue: Path, backend: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(catalogue), backend]
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[1],
        start_new_session=True,
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == b"reading\n"
        child.send_signal(signal.SIGINT)
        assert child.wait(60) in (-signal.SIGINT, 1, 130), "it ends by the interrupt, and it ends"
        time.sleep(0.2)
        with pytest.raises(ProcessLookupError):
            os.killpg(child.pid, 0)  # nobody is left in its session
    finally:
        child.kill()
        child.wait()


def test_an_interrupt_leaves_no_lock_held_wherever_it_comes(catalogue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C raises between any two bytecodes of the main thread; `close` must never wait for a lock left held."""
    with open_loader(catalogue, backend="reference", **SMALL) as loader:
        decoded = loader._decode(loader._plan(0))
    monkeypatch.setattr(StepLoader, "_plan", lambda *_: [])
    monkeypatch.setattr(StepLoader, "_decode", lambda *_: decoded)

    def interrupted_at(nth: int) -> bool:
        count = 0

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal count
            if not frame.f_code.co_filename.endswith(("loader.py", "read_ahead.py", "queue.py", "threading.py")):
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            count += event == "opcode"
            if event == "opcode" and count == nth:
                raise KeyboardInterrupt
            return trace

        loader = open_loader(catalogue, backend="reference", **SMALL).thing
        steps = loader.steps(0, 6)
        next(steps)
        sys.settrace(trace)
        try:
            next(steps)
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
            closing = threading.Thread(target=loader.close, daemon=True)
            closing.start()
            closing.join(30)
            assert not closing.is_alive(), f"an interrupt at bytecode {nth} leaves a lock held"
        return False

    places = 0
    while interrupted_at(places + 1):
        places += 1
    assert places > 20


@pytest.mark.full
@pytest.mark.parametrize("backend", ["dali", "reference"])
def test_memory_is_flat_over_20_000_batches(catalogue: Path, backend: str) -> None:
    me, sizes = psutil.Process(), []
    with open_loader(catalogue, backend=backend, **SMALL) as loader:
        for step, _ in enumerate(loader.steps(0, 20_000), 1):
            if step % 2_000 == 0:
                sizes.append(me.memory_info().rss)
    assert max(sizes) < 1.05 * sizes[0] and min(sizes) > 0.95 * sizes[0], [size >> 20 for size in sizes]
