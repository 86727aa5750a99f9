"""Preflight: a node with a wrong result, another version or no answer is named, with what to leave out."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from harness.commands import preflight
from harness.commands.preflight import Findings, Preflight, PreflightConfig, report
from harness.core.errors import UserError
from harness.core.links import rounds
from harness.core.verdict import leave_out, odd, slow
from tests.pool import layout, ranks
from tests.test_watch import launched, ranks_of, state, wait_for


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7])
def test_rounds_hold_every_pair_once_and_no_place_twice_in_a_round(count: int) -> None:
    found = rounds(count)
    assert len(found) <= count
    pairs = [pair for pairs in found for pair in pairs]
    assert sorted(pairs) == [(a, b) for a in range(count) for b in range(a + 1, count)]
    for pairs in found:
        places = [place for pair in pairs for place in pair]
        assert len(places) == len(set(places))


def test_what_is_slow_is_so_beside_the_median() -> None:
    figures = {"a": {"disk": 100.0, "sum": 10.0}, "b": {"disk": 71.0, "sum": 9.0}, "c": {"disk": 69.0}}
    assert slow(figures, 0.7) == {}  # the median of the disks is b's
    figures["d"] = {"disk": 110.0}
    assert slow(figures, 0.9) == {
        "b": ["disk 71, the median is 85.5"],
        "c": ["disk 69, the median is 85.5"],
    }


def test_what_is_odd_is_so_beside_most_places() -> None:
    versions = {name: {"torch": "2.13", "commit": "abc"} for name in "abc"}
    versions["b"] = {"torch": "2.12"}
    assert odd(versions) == {"b": ["torch 2.12, elsewhere 2.13", "commit absent, elsewhere abc"]}
    assert odd({"a": {"torch": "1"}, "b": {"torch": "2"}}) == {"b": ["torch 2, elsewhere 1"]}


def test_left_out_is_what_is_in_most_bad_pairs() -> None:
    assert leave_out(["a"], [("a", "b"), ("c", "d"), ("d", "e")]) == ["a", "d"]
    assert leave_out([], [("a", "b")]) == ["b"] and leave_out([], []) == []


def test_a_slow_pair_is_named(tmp_path: Path) -> None:
    found = Findings(figures={name: {"TFLOP/s": 1.0} for name in "abcd"})
    rates = {("a", "b"): 10.0, ("a", "c"): 11.0, ("a", "d"): 10.5, ("b", "c"): 10.0, ("b", "d"): 2.0, ("c", "d"): 3.0}
    found.pairs = [{"place": a, "with": b, "GB/s": rate, "error": None} for (a, b), rate in rates.items()]
    with pytest.raises(UserError, match=r"^not good: b - d, c - d\. Leave out d$"):
        report(PreflightConfig(out=tmp_path), found)
    assert (tmp_path / "exclude").read_text() == "d"
    assert json.loads((tmp_path / "preflight.json").read_text())["pairs"][4]["error"] == "GB/s 2, the median is 10"


def check(config: PreflightConfig) -> dict[str, Any] | str:
    """Preflight of three nodes of one rank each. On the middle one a product is wrong and a package is another."""
    rank = int(os.environ["RANK"])
    product, own_versions = torch.Tensor.__matmul__, preflight.versions

    def wrong(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        found = product(a, b)
        if found.dtype == torch.float32:
            found[3, 4] += 1
        return found

    other = {**own_versions(), "numpy": "0.1"}
    with mock.patch.dict(os.environ, SLURMD_NODENAME=f"node{rank + 1}"), layout() as mesh:
        if rank == 1:
            with (
                mock.patch.object(torch.Tensor, "__matmul__", wrong),
                mock.patch.object(preflight, "versions", lambda: other),
            ):
                made = Preflight(config, mesh)
                made.run()
        else:
            made = Preflight(config, mesh)
            made.run()
        if rank:
            return {}
        try:
            return report(config, made.found)
        except UserError as error:
            return str(error)


def test_a_node_with_a_wrong_product_and_another_version_is_named(tmp_path: Path) -> None:
    config = PreflightConfig(out=tmp_path, run_dir=tmp_path, cache=tmp_path, least_share=1e-6, size_mib=1)
    said, *_ = ranks(3).run(check, config)
    assert said.startswith("not good: node2 (1 of 589,824 numbers of a matrix product are wrong; numpy 0.1, elsewhere ")
    assert said.endswith("). Leave out node2") and (tmp_path / "exclude").read_text() == "node2"
    found = json.loads((tmp_path / "preflight.json").read_text())
    assert found["reasons"]["node1"] == found["reasons"]["node3"] == [] and not found["good"]
    measured = {"memory GB/s", "shm GiB"} | {
        f"{folder} {what}" for folder in ("run", "cache") for what in ("GiB free", "write MB/s", "read MB/s")
    }
    assert set(found["figures"]["node2"]) == measured and set(found["figures"]["node3"]) == measured | {"TFLOP/s"}
    pairs = sorted((row["place"], row["with"]) for row in found["pairs"])
    assert pairs == [("node1", "node2"), ("node1", "node3"), ("node2", "node3")]
    assert [(row["collective"], row["bytes"]) for row in found["collectives"]] == [
        (name, size) for size in (1 << 16, 1 << 20) for name in ("all_reduce", "all_gather")
    ]
    assert all(row["GB/s"] > 0 and row["error"] is None for row in (*found["pairs"], *found["collectives"]))


STOPS = """
import os, signal, sys
from harness.core import links
from harness.core.links import Links

exchange = Links.exchange

def stopping(self, size, peer):
    if self.mesh.rank == 2 and peer == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return exchange(self, size, peer)

Links.exchange = stopping
from harness.__main__ import main
sys.exit(main())
"""


@pytest.mark.full
@pytest.mark.parametrize("stops", [False, True])
def test_ranks_of_one_machine_and_one_that_does_not_answer(tmp_path: Path, stops: bool) -> None:
    (tmp_path / "stops.py").write_text(STOPS)
    out = tmp_path / "out"
    options = ["--out", str(out), "--run-dir", str(tmp_path), "--least-share", "1e-6"]
    options += ["--size-mib", "1", "--patience", "5"]
    program = [str(tmp_path / "stops.py")] if stops else ["-m", "harness"]
    with launched("ours", 3, [*program, "preflight", *options], tmp_path / "errors") as process:
        if stops:
            pids = ranks_of(process.pid)
            wait_for(lambda: any(state(pid) == "T" for pid in pids), process)
            wait_for((out / "exclude").exists, process)
            for pid in pids:
                if state(pid) == "T":  # the launcher gives it 30 s
                    os.kill(pid, signal.SIGKILL)
        process.wait(200)
    said = (tmp_path / "errors").read_text()
    if not stops:
        assert process.returncode == 0 and "no node to leave out" in said and "rank 0  rank 2" in said, said
        return
    assert process.returncode == 2 and (out / "exclude").read_text() == "rank 2", said
    told = "error: not good: rank 2 (no answer), exchanges of rank 1 with rank 2: no answer of rank 2. Leave out rank 2"
    assert "--exclude=rank 2" in said and told in said, said
