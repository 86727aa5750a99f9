"""Build time of an index, planned with clocks that count work."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harness.artefact.index_build import training
from harness.artefact.index_kinds import KINDS
from harness.artefact.index_plan import _graph_rows, _graph_seconds, _training_seconds


def test_a_graph_is_planned_by_a_cost_that_grows_as_the_logarithm_of_its_rows() -> None:
    """Of 4,096 rows, for 100,000; the first rows take ten times as long."""
    part = np.random.default_rng(0).standard_normal((4096, 4)).astype(np.float32)
    index = KINDS["hnsw"].make(4, len(part))

    def cost(rows: float) -> float:
        return 3e-5 * rows + 1e-5 * (rows * math.log(rows) - rows)

    def clock() -> float:
        return cost(index.ntotal) + 9 * cost(min(index.ntotal, 500)) if index.ntotal else 0.0

    assert _graph_seconds(index, part, 100_000, clock) == pytest.approx(cost(100_000), rel=0.01)


@pytest.mark.parametrize(
    ("rows", "part"),
    [(40_000, 16_384), (90_000, 30_000), (300_000, 100_000), (1_000_000, 171_196), (9_000_000, 281_250)],
)
def test_a_graph_is_calibrated_on_more_than_caches_hold_or_a_third_of_it(rows: int, part: int) -> None:
    """784 bytes a row: 128 MiB are 171,196 rows; from 5.5 million rows on a 32nd is more."""
    kind = KINDS["hnsw_bf16"]
    assert _graph_rows(kind, 256, rows) == pytest.approx(part, rel=0.01)


def test_a_graph_whose_rows_take_less_and_less_time_is_planned_without_growth() -> None:
    part = np.random.default_rng(0).standard_normal((4096, 4)).astype(np.float32)
    index = KINDS["hnsw"].make(4, len(part))
    planned = _graph_seconds(index, part, 100_000, lambda: float(math.sqrt(index.ntotal)))
    assert planned == pytest.approx(100_000 / 3072 * (64 - 32))


@pytest.mark.parametrize(("name", "rounds"), [("lists", 10), ("codes", 25), ("codes", 1), ("rotation", 4)])
def test_work_that_rounds_do_not_repeat_is_planned_once(name: str, rounds: int) -> None:
    """7 units of work a row once (none in a rotation) and 2 in a round; all the first time takes ten times as long."""
    vectors, done = np.zeros((30_000, 4), np.float32), [0.0]
    index, fixed = KINDS["ivf_flat"].make(4, len(vectors)), 0 if name == "rotation" else 7

    def step(x: np.ndarray, rounds: int) -> None:
        first = 10 if not done[0] and name != "rotation" else 1
        done[0] += first * len(x) * (fixed + 2 * rounds)

    planned = _training_seconds(index, vectors, name, 20_000, rounds, step, lambda: done[0])
    assert planned == pytest.approx(20_000 * (fixed + 2 * rounds))


def test_product_codes_are_trained_on_a_larger_sample_than_scales() -> None:
    """Name, rows and rounds of each step."""

    def steps(kind: str) -> list[tuple[str, int, int]]:
        return [step[:3] for step in training(KINDS[kind].make(16, 10**6), 10**6)]

    lists = ("lists", 40 * 4096, 10)
    assert steps("ivf_pq") == [("rotation", 1 << 14, 4), lists, ("codes", 1 << 16, 25)]
    assert steps("ivf_sq8") == [lists, ("codes", 1 << 14, 1)]
