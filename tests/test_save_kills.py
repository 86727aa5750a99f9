"""Ranks that are killed amid a save, one of them or all, before any operation on its files: the newest checkpoint
loads, the run goes on as an undisturbed one, and nothing is left over.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from harness.train import checkpoint_files, checkpoint_writer
from harness.train.config import RunConfig
from tests.kills import OPERATIONS, WRITES
from tests.pool import Ranks, ranks
from tests.runs import tiny_config, trainer
from tests.test_signals import losses

EVERY = 2
SETTINGS: dict[str, Any] = {"train.steps": 4, "train.checkpoint_every": EVERY, "train.keep_checkpoints": 1}
Hashed = checkpoint_writer._Hashed


@dataclass(frozen=True)
class Kill:
    """The moment before operation `before` of rank `killer`, which then kills all ranks or only itself."""

    killer: int
    before: int
    everyone: bool


def train(config: RunConfig, kill: Kill | None = None, victims: Iterable[int] = ()) -> list[str]:
    """In a pool: trains; at the moment of `kill` its rank writes its step beside the run and kills the processes
    `victims`. Returns this rank's operations on the files of checkpoints.
    """
    folder, done = str(config.run_dir / "checkpoints"), []
    real = Hashed.write

    with trainer(config) as t:

        def operation(name: str) -> None:
            if kill is not None and t.mesh.rank == kill.killer and len(done) >= kill.before:
                config.run_dir.with_suffix(".step").write_text(str(t.step))
                for pid in victims:
                    os.kill(pid, signal.SIGKILL)
            done.append(name)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            writes = event == "open" and bool(arguments[2] & WRITES)
            if (writes or event in OPERATIONS) and str(arguments[0]).startswith(folder):
                operation(f"{event} {Path(str(arguments[0])).name}")

        def write(self: Any, data: Any) -> int:
            operation(f"write {Path(self.file.name).parent.name}")
            return real(self, data)

        sys.addaudithook(hook)
        with patch.object(Hashed, "write", write):
            t.fit()
    for thread in threading.enumerate():
        if thread.name == checkpoint_files._DELETING:
            thread.join()
    return done


def killed(config: RunConfig, kill: Kill) -> int:
    """Trains in two fresh ranks until `kill`; steps that are lost."""
    pool = Ranks(2)
    own = pool.processes[kill.killer]
    others = [process.pid for process in pool.processes if kill.everyone and process is not own]
    for pipe in pool.pipes:
        pipe.send((f"{pool.folder.name}/1", train, (config, kill, (*others, own.pid))))
    try:
        ended = pool.pipes[kill.killer].recv()
    except (EOFError, ConnectionResetError):
        ended = None
    pool.stop()  # the others, as a launcher does
    own.join()
    assert own.exitcode == -signal.SIGKILL, ended
    path, _ = checkpoint_files.newest(config.run_dir / "checkpoints")
    return int(config.run_dir.with_suffix(".step").read_text()) - (0 if path is None else int(path.name[5:]))


def check(catalogue: Path, folder: Path, asynchronous: bool, draw: random.Random | None = None) -> None:
    """Kills two ranks at two moments, or with `draw` before every rename and at moments that are drawn, 25 in all."""
    settings = {**SETTINGS, "train.checkpoint_async": asynchronous}
    operations = ranks(2, "kills").run(train, tiny_config(catalogue, folder / "whole", **settings))
    undisturbed, whole = losses(folder / "whole"), ["latest", "step-00000004"]
    assert sorted(path.name for path in (folder / "whole/checkpoints").iterdir()) == whole
    renames = [place for place, name in enumerate(operations[0]) if name.startswith("os.rename")]
    if draw is None:
        rows = [place for place, name in enumerate(operations[1]) if name == "write head"]
        kills = [Kill(0, operations[0].index("os.rename step-00000004.tmp") + 1, True), Kill(1, rows[-2], False)]
    else:
        kills = [Kill(0, place, draw.random() < 0.5) for place in renames]
        while len(kills) < 25:  # each kind of operation as often as the others: most are writes
            rank = draw.randrange(2)
            kind = draw.choice(sorted(set(operations[rank])))
            places = [place for place, name in enumerate(operations[rank]) if name == kind]
            kills.append(Kill(rank, draw.choice(places), draw.random() < 0.5))
    for number, kill in enumerate(kills):
        moment = f"{kill}: {operations[kill.killer][kill.before]}"
        config = tiny_config(catalogue, folder / f"run-{number}", **settings)
        # In the background a save may be on its way until the next one begins.
        assert killed(config, kill) <= EVERY * (1 + asynchronous), moment
        ranks(2, "kills").run(train, config)
        assert losses(config.run_dir) == undisturbed, moment
        assert sorted(path.name for path in (config.run_dir / "checkpoints").iterdir()) == whole, moment
        assert checkpoint_files.newest(config.run_dir / "checkpoints")[1] == [], moment


def test_two_moments_of_a_save(catalogue: Path, tmp_path: Path) -> None:
    """All ranks between the rename of a checkpoint and the note that it is the newest; one amid its class rows."""
    check(catalogue, tmp_path, False)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_25_random_moments_of_a_save(catalogue: Path, tmp_path: Path, asynchronous: bool) -> None:
    check(catalogue, tmp_path, asynchronous, random.Random(int(asynchronous)))
