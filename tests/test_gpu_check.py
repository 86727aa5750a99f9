"""jobs/gpu_check.sh: what becomes of parts that crash, hang or lack a package; its programs, small on a CPU; and that
they notice what is wrong.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from harness.bench.gpu import empty_folder
from harness.bench.photos import photo
from harness.data.preprocess import PreprocessSpec, draw_parameters
from tests.test_bench import check_report

ROOT = Path(__file__).resolve().parent.parent
HIDDEN = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", ROOT / "jobs" / "gpu" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


check, training, pixels = script("check"), script("training"), script("pixels")


def gpu_check(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "jobs" / "gpu_check.sh"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env={**HIDDEN, **environment})


BEGIN = """
import json, os, subprocess, sys, time
def leave(*rows): open(sys.argv[1], "w").write(json.dumps({"rows": list(rows)}))
"""
FAKES = {
    "good": "leave({'a': 1}, {'bar_of': 'speed', 'value': 3.0, 'bar': 2.0, 'ratio': 1.5, 'met': True})",
    "crashes": "leave({'a': 1}); raise ValueError('no such thing')",
    "wrong": "leave({'a': 1, 'ok': True}, {'case': 'make', 'ok': False}); sys.exit(1)",
    "killed": "leave({'a': 1}); os.kill(os.getpid(), 9)",
    "silent": "pass",
    "later": "leave({'a': 1})",
    "hangs": "leave({'a': 1}); child = subprocess.Popen(['sleep', '1000']); "
    "leave({'pid': child.pid}); time.sleep(1000)",
}


def fakes(folder: Path, **fields: dict[str, Any]) -> list[Any]:
    made = []
    for name, body in FAKES.items():
        (folder / f"{name}.py").write_text(BEGIN + body)
        settings = {"modules": (), "seconds": 1, "gib": 1, **fields.get(name, {})}
        made.append(check.Part(name, f"fake {name}", (str(folder / f"{name}.py"),), **settings))
    return made


def states(out: Path) -> dict[str, str]:
    return {name: part["state"] for name, part in json.loads((out / "summary.json").read_text())["parts"].items()}


def test_a_part_that_fails_costs_itself_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = fakes(tmp_path, later={"after": "crashes"}, silent={"modules": ("no_such_module",)})
    out = tmp_path / "out"
    assert check.main([str(out), "--tiny"], parts[:-1]) == 1
    assert states(out) == {
        "good": "ok",
        "crashes": "failed",
        "wrong": "failed",
        "killed": "failed",
        "silent": "skipped",
        "later": "skipped",
    }
    for name in ("good", "crashes", "wrong", "killed"):
        assert json.loads((out / f"{name}.json").read_text())["rows"][0]["a"] == 1
    why = {name: part["why"] for name, part in json.loads((out / "summary.json").read_text())["parts"].items()}
    assert why["crashes"] == "exit code 1: ValueError: no such thing" and why["killed"] == "killed by SIGKILL"
    assert "1 of 2 rows are not ok: case make" in why["wrong"]
    assert why["silent"] == "missing: no_such_module" and why["later"] == "the part crashes is failed"
    assert json.loads((out / "summary.json").read_text())["parts"]["good"]["bars"] == ["speed 3, bar 2 met (ratio 1.5)"]
    table = capsys.readouterr().out.split("state")[-1]
    assert all(name in table for name in FAKES if name != "hangs")


def test_a_part_that_hangs_ends_at_its_limit_with_all_that_it_started(tmp_path: Path) -> None:
    parts = [part for part in fakes(tmp_path) if part.name in ("hangs", "silent")]
    check.TINY_SECONDS, before = 1, check.TINY_SECONDS
    try:
        assert check.main([str(tmp_path / "out"), "--tiny", "--budget", "4"], parts[::-1]) == 1
    finally:
        check.TINY_SECONDS = before
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["parts"]
    assert summary["hangs"]["state"] == "failed" and "ran past its limit" in summary["hangs"]["why"]
    pid = json.loads((tmp_path / "out" / "hangs.json").read_text())["rows"][0]["pid"]
    time.sleep(0.1)
    stat = Path(f"/proc/{pid}/stat")
    assert (
        not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
    )  # dead, if nobody has asked for it yet
    assert summary["silent"]["state"] in ("failed", "skipped")  # by what was left of the budget


def test_exit_codes_without_failures(tmp_path: Path) -> None:
    good, *_, silent, later, _ = fakes(tmp_path, later={"disk": 1e9})
    assert check.main([str(tmp_path / "a"), "--tiny"], [good]) == 0
    assert check.main([str(tmp_path / "b"), "--tiny"], [good, later]) == 3
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["parts"]["later"]["why"].startswith(
        "needs 1e+09 GB"
    )
    assert check.main([str(tmp_path / "c"), "--tiny"], [silent]) == 1  # ends well but leaves no report
    assert check.main([str(tmp_path / "d"), "--tiny", "--parts", "good"], [good, silent]) == 0
    assert check.main([str(tmp_path / "e"), "--parts", "nothing"], [good]) == 2


def test_plan_says_what_is_needed_and_starts_nothing(tmp_path: Path) -> None:
    done = gpu_check(tmp_path / "out", "--plan", "--budget", "300", PATH=f"{os.environ['PATH']}")
    assert done.returncode == 0 and not done.stderr and not (tmp_path / "out").exists()
    planned = {line.split()[0]: line for line in done.stdout.splitlines()[2:-1]}
    assert list(planned) == [part.name for part in check.PARTS]
    assert "does not fit into --budget" in planned["towers"] and "[" not in planned["tests"]
    assert "at most" in done.stdout.splitlines()[-1] and "no network" in done.stdout
    lean = (
        "import sys; sys.path.insert(0, 'jobs/gpu'); import check; "
        "check.main(['x', '--plan']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", lean], cwd=ROOT, capture_output=True).returncode == 0


def test_a_smaller_gpu_is_told_what_it_costs(tmp_path: Path) -> None:
    given = check.arguments([str(tmp_path)], check.PARTS)
    planned = {one.part.name: one for one in check.plan(given, check.PARTS, {"nvidia.dali"}, 16.0)}
    assert planned["head_10m"].state == "skipped" and planned["head_10m"].why == "needs a GPU of 24 GiB"
    assert planned["towers"].state == "planned" and "smaller batch" in planned["towers"].why
    assert planned["tests"].state == "planned" and not planned["tests"].why
    lacking = {name for name, one in planned.items() if one.why == "missing: nvidia-dali-cuda130"}
    assert lacking == {"pixels", "line", "from_jpegs", "decode"}


def test_only_parts_that_decode_with_dali_need_it() -> None:
    others = {part.words[0] for part in check.PARTS if "nvidia.dali" not in part.modules}
    code = (
        "import runpy, sys; sys.modules['nvidia.dali'] = None; "
        "[runpy.run_path(file) for file in sys.argv[1:]]; import harness.train.trainer"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, *(f"jobs/gpu/{name}" for name in sorted(others))]
    done = subprocess.run(command, cwd=ROOT, env={**HIDDEN, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which the child could see")
def test_a_missing_gpu_and_wrong_flags_are_one_line(tmp_path: Path) -> None:
    for words, said in (
        ([tmp_path], "sees no GPU here. --tiny runs the programs small on a CPU"),
        (["--parts", "kernel"], "--parts has 'kernel'. It can have tests, catalogue"),
        (["--catalogues", tmp_path], "has no folder 'drawn'"),
    ):
        done = gpu_check(*words)
        assert done.returncode == 2 and not done.stdout
        assert done.stderr.count("\n") == 1 and said in done.stderr
    done = gpu_check(PYTHON="no-such-python")
    assert done.returncode == 2 and "there is no no-such-python" in done.stderr
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "jobs/gpu/head.py", str(tmp_path / "a.json")],
        cwd=ROOT,
        env={**HIDDEN, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr == "error: torch sees no GPU here. --tiny runs small on the CPU\n"


RIGHT: dict[str, Any] = {
    "losses": [4.0, 3.9, 3.7, 3.6, 3.5, 3.4],
    "norms": [2.0, 2.1, 1.9, 1.8, 1.7, 1.6],
    "resumed": [3.5, 3.4],
    "crossed": [3.5, 3.4],
}


def test_compare_takes_right_figures_and_no_wrong_ones() -> None:
    def shifted(name: str, place: int, by: float) -> dict[str, Any]:
        values = [*RIGHT[name]]
        values[place] *= 1 + by
        return RIGHT | {name: values}

    twin = RIGHT | {"export": 1e-6}
    assert training.compare(RIGHT, twin, "fp32")["ok"]
    assert training.compare(shifted("losses", 2, 5e-4), twin, "fp32")["ok"]
    assert training.compare(shifted("losses", 2, 1e-2), twin, "bf16")["ok"]
    for here, there, precision, said in (
        (shifted("losses", 2, 2e-3), twin, "fp32", "losses differ"),
        (shifted("losses", 2, 3e-2), twin, "bf16", "losses differ"),
        (shifted("losses", 0, math.nan), twin, "bf16", "losses differ"),
        (shifted("norms", 5, 0.01), twin, "fp32", "norms differ"),
        (shifted("resumed", 1, 2e-3), twin, "fp32", "resumed differ"),
        (shifted("crossed", 0, 2e-3), twin, "fp32", "from the CPU's checkpoint differ"),
        (RIGHT, shifted("crossed", 0, 2e-3) | {"export": 0.0}, "fp32", "on the CPU from this one's differ"),
        (RIGHT, RIGHT | {"export": 0.01}, "fp32", "exported encoder differs"),
        (RIGHT, RIGHT | {"export": math.nan}, "fp32", "exported encoder differs"),
        ({"error": "ValueError: no"}, twin, "fp32", "here: ValueError: no"),
        (RIGHT, {"error": "killed"}, "fp32", "twin: killed"),
    ):
        row = training.compare(here, there, precision)
        assert not row["ok"] and said in row["why"]


class Collected:
    """Stands for harness.bench.gpu.Program where only its rows matter."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.tiny, self.device = True, torch.device("cpu")

    def add(self, **row: Any) -> None:
        self.rows.append(row)

    def synchronize(self) -> float:
        return 0.0


def test_pixels_notice_a_mirrored_image_and_a_buffer_that_is_used_again() -> None:
    spec, photos = PreprocessSpec(image_size=32), [photo(64, number) for number in range(4)]
    params = draw_parameters(spec, 0, 0, np.arange(4), *_sizes(photos), train=True)

    class Mirrored(pixels.ReferencePipeline):
        def decode(self, encoded: list[bytes], params: Any) -> Any:
            return super().decode(encoded, {**params, "flip": 1 - params["flip"]})

    class Reused(pixels.ReferencePipeline):
        buffer = torch.zeros(4, 3, 32, 32)

        def decode(self, encoded: list[bytes], params: Any) -> Any:
            found, ok = super().decode(encoded, params)
            self.buffer[: len(found)] = found
            return self.buffer[: len(found)], ok

    right = pixels.ReferencePipeline(spec, 4)
    for pipeline, fine in ((right, True), (Mirrored(spec, 4), False)):
        program = Collected()
        pixels.compare_pixels(
            program, {"device": pipeline, "dali cpu": right, "pillow": right}, {"photo": photos}, spec
        )
        assert [row["ok"] for row in program.rows] == [fine] * 4
    for pipeline, fine in ((right, True), (Reused(spec, 4), False)):
        program = Collected()
        pixels.busy(program, pipeline, photos, params)
        assert program.rows[0]["ok"] == fine


def _sizes(photos: list[bytes]) -> Any:
    return np.array([Image.open(io.BytesIO(data)).size for data in photos]).T


def test_outcomes_of_tests_are_written_down(tmp_path: Path) -> None:
    (tmp_path / "test_made_up.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n@pytest.mark.skip\ndef test_c(): pass\n"
    )
    report = tmp_path / "tests.json"
    command = [
        sys.executable,
        "jobs/gpu/device_tests.py",
        str(report),
        "--tiny",
        "--tests",
        str(tmp_path / "test_made_up.py"),
    ]
    done = subprocess.run(command, cwd=ROOT, env={**HIDDEN, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    rows = {row["test"].rpartition("::")[2]: row for row in json.loads(report.read_text())["rows"]}
    assert {name: row["state"] for name, row in rows.items()} == {
        "test_a": "passed",
        "test_b": "failed",
        "test_c": "skipped",
    }
    assert rows["test_b"]["ok"] is False and "ok" not in rows["test_a"]


def whole(out: Path, *parts: str) -> None:
    done = gpu_check(out, "--tiny", *(["--parts", ",".join(parts)] if parts else []))
    assert done.returncode == 0, done.stdout + done.stderr
    for name in parts or [part.name for part in check.PARTS]:
        report = json.loads((out / f"{name}.json").read_text())
        assert report["rows"] and not [row for row in report["rows"] if row.get("ok") is False]
        check_report({**report, "headline": report["headline"] or {"none": 0.0}})
        assert states(out)[name] == "ok"


def test_the_programs_run_small_on_a_cpu(tmp_path: Path) -> None:
    """Those that prove or measure most; all of them take two minutes."""
    whole(tmp_path, "catalogue", "training", "pixels", "head_1m", "towers")


@pytest.mark.full
def test_the_whole_check_runs_small_on_a_cpu(tmp_path: Path) -> None:
    """And every case of training, of which the small check takes one."""
    whole(tmp_path)
    report = tmp_path / "cases.json"
    words = [
        report,
        "--tiny",
        "--catalogues",
        tmp_path / "catalogues",
        "--work",
        tmp_path / "work",
        "--cases",
        *training.CASES,
    ]
    command = [sys.executable, "jobs/gpu/training.py", *map(str, words)]
    subprocess.run(command, cwd=ROOT, env={**HIDDEN, "PYTHONPATH": str(ROOT)}, check=True, timeout=500)
    rows = json.loads(report.read_text())["rows"]
    assert len({(row["case"], row["precision"]) for row in rows}) == 2 * len(training.CASES)
    assert all(row["ok"] for row in rows)


def test_a_folder_that_no_check_made_is_not_emptied(tmp_path: Path) -> None:
    """The default of one program is catalogues/, where a user's own may lie."""
    precious = tmp_path / "catalogues/products/catalogue.json"
    precious.parent.mkdir(parents=True)
    precious.write_text("{}")
    with pytest.raises(SystemExit) as ended:
        empty_folder(tmp_path / "catalogues")
    assert ended.value.code == 2 and precious.exists()
    for _ in range(2):
        empty_folder(tmp_path / "work/part")
        (tmp_path / "work/part/left").touch()
    empty_folder(tmp_path / "work/part")
    assert [path.name for path in (tmp_path / "work/part").iterdir()] == [".gpu-check"]
