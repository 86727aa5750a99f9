"""Stragglers: the rank that holds the others up is named, by a clock of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from harness.train import throughput
from harness.train.config import RunConfig
from models import comm
from tests.pool import ranks
from tests.runs import tiny_config, trainer


def train(config: RunConfig, slow: int, seconds: float) -> tuple[list[str], bool]:
    """Lines of the log of a training in which a step takes 1 s of every rank's own, `seconds` more of rank `slow`, and
    waiting for others as long as rank `slow` takes; and that nothing is left where the exchanges are timed.
    """
    now, said = 0.0, []
    with trainer(config) as t:
        losses = t.method.losses
        late = seconds * (t.mesh.rank == slow)

        def timed(batches: Any) -> Iterator[Any]:
            nonlocal now
            for loss in losses(batches):
                now += 1.0 + late
                yield loss

        reduce = t.towers.reduce

        def waiting() -> None:
            nonlocal now
            now += seconds - late
            reduce()

        with (
            mock.patch.object(throughput, "time", SimpleNamespace(perf_counter=lambda: now)),
            mock.patch.object(t.method, "losses", timed),
            mock.patch.object(t.towers, "reduce", waiting),
            mock.patch("harness.train.run_log.RunLog.say", lambda _, line: said.append(line)),
        ):
            t.clock = throughput.StepClock(t.mesh)
            t.fit()
    return [line for line in said if "holds the others up" in line], comm.waiting is comm.nullcontext


@pytest.mark.parametrize("seconds,named", [(2.0, 1), (0.4, 0)])
def test_a_rank_that_is_slow_in_three_lines_is_named(
    catalogue: Path, tmp_path: Path, seconds: float, named: int
) -> None:
    """The first step of a process, which compiles, is not timed."""
    config = tiny_config(catalogue, tmp_path / "run", **{"train.steps": 5, "evaluation.panel": 0})
    for lines, clean in ranks(3).run(train, config, 2, seconds):
        assert len(lines) == named and clean
        for line in lines:
            assert line.startswith("step 4: rank 2 on ") and line.endswith(
                " holds the others up: 3.00 s of its own in a step, 0.00 s of them waiting for data; "
                "the median rank 1.00 s"
            )


def exchange() -> list[str]:
    """Whether the exchanges of a step are inside `comm.waiting`."""
    import torch
    import torch.distributed as dist

    entered: list[str] = []

    @contextmanager
    def noted() -> Iterator[None]:
        entered.append("")
        yield

    with mock.patch.object(comm, "waiting", noted):
        x = torch.ones(2, 3, requires_grad=True)
        comm.gather_with_grad(x, dist.group.WORLD, [2, 2]).sum().backward()  # type: ignore[arg-type]
    return entered


def test_the_exchanges_of_a_step_are_timed() -> None:
    assert [len(entered) for entered in ranks(2).run(exchange)] == [2, 2]
