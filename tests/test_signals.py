"""Signals during training: saved at the next boundary of a step, by all ranks; the same run goes on to the digit."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from harness.core.errors import UserError
from harness.core.launcher import STOPPED_CODE
from harness.train import checkpoint_files
from harness.train.config import RunConfig
from harness.train.open_run import find_checkpoint
from tests.pool import ranks
from tests.runs import arguments, tiny_config, trainer
from tests.test_watch import launched, wait_for

STEPS = 6
SETTINGS: dict[str, Any] = {
    "train.steps": STEPS,
    "train.evaluate_every": 4,
    "train.checkpoint_every": 3,
    "train.keep_checkpoints": 9,
    "model.vision.dropout": 0.1,
    "head.sample_rate": 0.5,
}


def losses(run: Path) -> dict[int, float]:
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def evaluations(run: Path) -> list[int]:
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "retrieval/map" in line]


def steps_saved(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def train(config: RunConfig, name: str = "", place: str = "", on: int = 0) -> tuple[int, bool]:
    """Trains; signal `name` comes to rank `on` at `place`. Finished steps, and whether the signal ended it."""
    with trainer(config) as t:

        def fire() -> None:
            if t.mesh.rank == on and name and not t.boundary.noted:
                os.kill(os.getpid(), signal.Signals[name])

        def first(call: Callable[..., Any], when: Callable[[], bool]) -> Callable[..., Any]:
            def fired(*given: Any, **named: Any) -> Any:
                if when():
                    fire()
                return call(*given, **named)

            return fired

        if place == "step":
            t.method.losses = first(t.method.losses, lambda: t.step == 1)
        elif place == "evaluation":
            t.validation.evaluation.run = first(t.validation.evaluation.run, lambda: t.step == 4)
        elif place == "save":
            t.resume.state = first(t.resume.state, lambda: t.step == 3)
        elif place == "data":
            decode, count = t.loader._decode, 0

            def late(planned: Any) -> Any:  # the third step comes once the rank that waits for it has noted the signal
                nonlocal count
                count += 1
                if count == 3 and t.mesh.rank == on:
                    wait_for(lambda: t.step == 2)
                    threading.Timer(0.3, fire).start()
                    wait_for(lambda: bool(t.boundary.noted))
                return decode(planned)

            t.loader._decode = late
        t.fit()
        return t.step, t.boundary.stop


@pytest.fixture(scope="module")
def undisturbed(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    ranks(2).run(train, tiny_config(catalogue, run, **SETTINGS))
    return losses(run)


@pytest.mark.parametrize(
    ("name", "place", "on", "end", "saved"),
    [
        ("SIGUSR1", "step", 1, 2, [2]),
        pytest.param("SIGTERM", "step", 0, 2, [2], marks=pytest.mark.full),
        ("SIGINT", "data", 1, 3, [3]),
        ("SIGHUP", "save", 1, 3, [3]),
        ("SIGTERM", "evaluation", 1, 4, [3, 4]),
    ],
)
def test_a_signal_to_one_rank_saves_and_stops_all(
    catalogue: Path, tmp_path: Path, undisturbed: dict[int, float], name: str, place: str, on: int, end: int,
    saved: list[int],
) -> None:  # fmt: skip
    config = tiny_config(catalogue, tmp_path / "run", **SETTINGS)
    assert ranks(2).run(train, config, name, place, on) == [(end, True)] * 2
    assert steps_saved(tmp_path / "run") == saved
    assert ranks(2).run(train, config) == [(STEPS, False)] * 2
    assert losses(tmp_path / "run") == undisturbed
    assert evaluations(tmp_path / "run") == [4, 6], "what was evaluated is not evaluated again"


def test_a_signal_before_an_evaluation_leaves_it_to_the_next_start(
    catalogue: Path, tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    config = tiny_config(catalogue, tmp_path / "run", **{**SETTINGS, "train.evaluate_every": 2})
    assert ranks(2).run(train, config, "SIGTERM", "step", 1) == [(2, True)] * 2
    assert steps_saved(tmp_path / "run") == [2] and evaluations(tmp_path / "run") == []
    assert ranks(2).run(train, config) == [(STEPS, False)] * 2
    assert losses(tmp_path / "run") == undisturbed and evaluations(tmp_path / "run") == [2, 4, 6]


def train_by_the_clock_of(config: RunConfig, rank: int) -> list[int]:
    with trainer(config) as t:
        t.boundary.minutes = 1e-9 if t.mesh.rank == rank else 0.0
        t.fit()
    return steps_saved(config.run_dir)


@pytest.mark.parametrize(("rank", "saved"), [(0, [1, 2, 3]), (1, [3])])
def test_the_clock_of_the_first_rank_saves(catalogue: Path, tmp_path: Path, rank: int, saved: list[int]) -> None:
    config = tiny_config(catalogue, tmp_path / "run", **{"train.steps": 3, "train.keep_checkpoints": 9})
    assert ranks(2).run(train_by_the_clock_of, config, rank) == [saved] * 2


def test_the_best_and_every_third_checkpoint_are_kept(catalogue: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings: dict[str, Any] = {"train.steps": 8, "train.keep_checkpoints": 1, "train.evaluate_every": 2}
    settings |= {"train.keep_best": "map", "train.keep_every": 3}

    def go(stop_at: int) -> list[int]:
        with trainer(tiny_config(catalogue, run, **settings, **{"train.stop_at": stop_at})) as t:
            t.fit()
        return steps_saved(run)

    assert go(2) == [2]
    best = json.loads((run / "checkpoints/best.json").read_text())
    assert (best["checkpoint"], best["metric"]) == ("step-00000002", "map")
    assert best["value"] == json.loads((run / "eval-00000002.json").read_text())["map"]
    checkpoint_files.note_best(run / "checkpoints", 2, "map", {"map": 2.0})
    assert go(7) == [2, 3, 6, 7], "no later one is better"
    assert find_checkpoint(run, Path("best")).name == "step-00000002"
    checkpoint_files.note_best(run / "checkpoints", 6, "map", {"map": 2.0})
    assert find_checkpoint(run, Path("best")).name == "step-00000002", "of equal ones the first"
    checkpoint_files.note_best(run / "checkpoints", 6, "map", {"map": 3.0})
    assert find_checkpoint(run, Path("best")).name == "step-00000006"
    assert go(8) == [3, 6, 8]
    with pytest.raises(UserError, match=r"keep_best is 'mpa', which is not a figure here. Did you mean 'map'"):
        checkpoint_files.note_best(run / "checkpoints", 6, "mpa", {"map": 3.0, "mrr": 0.1})
    (run / "checkpoints/best.json").write_text('{"checkpoint": "../other", "metric": "map", "value": 1.0}')
    with pytest.raises(UserError, match=r"best.json is damaged"):
        find_checkpoint(run, Path("best"))
    (run / "checkpoints/best.json").unlink()
    with pytest.raises(UserError, match=r"has no best checkpoint. It keeps one where train.keep_best names a figure"):
        find_checkpoint(run, Path("best"))


@pytest.mark.full
def test_a_run_ends_early_where_evaluations_do_not_improve(catalogue: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train.steps": 9, "train.evaluate_every": 2, "train.keep_best": "map"}
    settings |= {"train.early_stop": 2, "optimizer.lr": 1e-12}  # too small to change a figure

    def go(name: str, **more: Any) -> tuple[int, dict[str, Any]]:
        with trainer(tiny_config(catalogue, tmp_path / name, **settings, **more)) as t:
            figures = t.fit()
            return t.step, {key: figures[key] for key in ("steps", "map")}

    step, whole = go("whole")
    assert step == 6 and evaluations(tmp_path / "whole") == [2, 4, 6], "the first of equal figures is the best"
    assert find_checkpoint(tmp_path / "whole", Path("best")).name == "step-00000002"
    assert go("parts", **{"train.stop_at": 5})[0] == 5
    assert go("parts") == (6, whole) and losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert go("parts") == (6, whole) and steps_saved(tmp_path / "parts") == [2, 5, 6], "it is over"
    (tmp_path / "parts/eval-00000006.json").unlink()  # as if killed amid the last evaluation
    assert go("parts") == (6, whole)
    go("better", **{"train.stop_at": 5})
    checkpoint_files.note_best(tmp_path / "better/checkpoints", 4, "map", {"map": 2.0})
    assert go("better")[0] == 8, "it counts from the best one"


def test_early_stop_wants_a_figure_and_evaluations(catalogue: Path, tmp_path: Path) -> None:
    for settings in ({"train.keep_best": "map"}, {"train.evaluate_every": 2}):
        with pytest.raises(UserError, match=r"train.early_stop 2 wants train.keep_best, the figure, and train.eval"):
            tiny_config(catalogue, tmp_path, **{"train.early_stop": 2}, **settings)


# Trains step by step, as long as a file says; a shell starts background jobs deaf to SIGINT, and so are their children.
SCRIPT = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
from harness.train import run as train
from harness.train.trainer import Trainer

step, slow = Trainer.train_step, Path(sys.argv.pop(1))

def slowly(self, data):
    while slow.exists() and self.step == 2 and not self.boundary.noted:
        time.sleep(0.01)
    return step(self, data)

Trainer.train_step = slowly
sys.exit(train.main())
"""


@pytest.mark.parametrize(
    ("launcher", "name"),
    [
        ("ours", "SIGTERM"),
        *(pytest.param("ours", name, marks=pytest.mark.full) for name in ("SIGUSR1", "SIGINT", "SIGHUP")),
        pytest.param("plain", "SIGTERM", marks=pytest.mark.full),
    ],
)
def test_a_launcher_hands_a_signal_on_and_the_same_command_goes_on(
    catalogue: Path, tmp_path: Path, undisturbed: dict[int, float], launcher: str, name: str
) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "slow").touch()
    run, errors = tmp_path / "run", tmp_path / "errors"
    program = [str(tmp_path / "train.py"), str(tmp_path / "slow"), *arguments(catalogue, run, **SETTINGS)]
    with launched(launcher, 2, program, errors) as process:
        wait_for(lambda: run.is_dir() and (run / "log.jsonl").exists() and len(losses(run)) == 2, process)
        process.send_signal(signal.Signals[name])
        process.wait(100)
    said = errors.read_text()
    assert process.returncode == (STOPPED_CODE if launcher == "ours" else 1), said
    assert steps_saved(run) == [3] and f"stopped by {name} after step 3, saved in {run}. To go on: " in said
    assert launcher == "plain" or ("Traceback" not in said and "ended with" not in said), said
    (tmp_path / "slow").unlink()
    command = said.partition("To go on: ")[2].splitlines()[0]
    subprocess.run(
        command, shell=True, check=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    )
    assert losses(run) == undisturbed


@pytest.mark.full
def test_a_closed_terminal_saves(catalogue: Path, tmp_path: Path, undisturbed: dict[int, float]) -> None:
    """The kernel sends SIGHUP to launcher and ranks, and every line that they write from then on fails."""
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "slow").touch()
    run = tmp_path / "run"
    program = [str(tmp_path / "train.py"), str(tmp_path / "slow"), *arguments(catalogue, run, **SETTINGS)]
    line = [sys.executable, "jobs/torchrun.py", "--nproc-per-node=2", *program]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        line,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."},
    )
    os.close(theirs)
    try:

        def trained() -> bool:
            while select.select([ours], [], [], 0)[0]:  # or a full terminal would hold the ranks up
                os.read(ours, 1 << 16)
            return run.is_dir() and (run / "log.jsonl").exists() and len(losses(run)) == 2

        wait_for(trained)
        os.close(ours)
        assert process.wait(100) == STOPPED_CODE
    finally:
        process.kill()
    assert steps_saved(run) == [3]
    ranks(2).run(train, tiny_config(catalogue, run, **SETTINGS))
    assert losses(run) == undisturbed


DIES_ONCE = """
import os, signal, sys
from pathlib import Path
from harness.train import run as train
from harness.train.trainer import Trainer

step, alive = Trainer.train_step, Path(sys.argv.pop(1))

def dying(self, data):
    if self.step == 4 and self.mesh.rank == 1 and alive.exists():
        alive.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, data)

Trainer.train_step = dying
sys.exit(train.main())
"""


@pytest.mark.full
def test_ranks_start_again_after_one_has_died(catalogue: Path, tmp_path: Path, undisturbed: dict[int, float]) -> None:
    (tmp_path / "train.py").write_text(DIES_ONCE)
    (tmp_path / "alive").touch()
    run, errors = tmp_path / "run", tmp_path / "errors"
    program = [str(tmp_path / "train.py"), str(tmp_path / "alive"), *arguments(catalogue, run, **SETTINGS)]
    with launched("ours", 2, ["--max-restarts=1", *program], errors) as process:
        process.wait(200)
    said = errors.read_text()
    assert process.returncode == 0 and "rank 1 ended with SIGKILL: the ranks start again" in said, said
    assert "resumed step-00000003" in said and losses(run) == undisturbed


@pytest.mark.full
def test_ranks_that_a_signal_stopped_do_not_start_again(catalogue: Path, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "slow").touch()
    run, errors = tmp_path / "run", tmp_path / "errors"
    program = [str(tmp_path / "train.py"), str(tmp_path / "slow"), *arguments(catalogue, run, **SETTINGS)]
    with launched("ours", 2, ["--max-restarts=1", *program], errors) as process:
        wait_for(lambda: run.is_dir() and (run / "log.jsonl").exists() and len(losses(run)) == 2, process)
        process.send_signal(signal.SIGTERM)
        process.wait(100)
    assert process.returncode == STOPPED_CODE and steps_saved(run) == [3], errors.read_text()
    assert "start again" not in errors.read_text()


@pytest.mark.full
def test_a_second_ctrl_c_ends_at_once(catalogue: Path, tmp_path: Path) -> None:
    script = SCRIPT.replace("and not self.boundary.noted", "")
    (tmp_path / "train.py").write_text(script)
    (tmp_path / "slow").touch()
    run, errors = tmp_path / "run", tmp_path / "errors"
    program = [str(tmp_path / "train.py"), str(tmp_path / "slow"), *arguments(catalogue, run, **SETTINGS)]
    for line in ([sys.executable, *program], [sys.executable, "jobs/torchrun.py", "--nproc-per-node=1", *program]):
        with errors.open("w") as file:
            hears = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
            environment = {**os.environ, "PYTHONPATH": "."}
            process = subprocess.Popen(line, stdout=file, stderr=file, env=environment, preexec_fn=hears)
        try:
            wait_for(lambda: run.is_dir() and (run / "log.jsonl").exists() and len(losses(run)) == 2)
            for _ in range(2):
                process.send_signal(signal.SIGINT)
                time.sleep(1.5)
            assert process.wait(60) == 130
        finally:
            process.kill()
        assert "a second Ctrl-C ends it at once" in errors.read_text() and steps_saved(run) == []
        (run / "log.jsonl").unlink()
