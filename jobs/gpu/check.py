"""Runs the parts of jobs/gpu_check.sh in sequence, each a program with its own time limit, independent of the others.

Uses only Python's standard library: a missing package costs only the parts that need it.
Exit codes: 0 all parts ok, 1 a part failed, 2 nothing was run (no GPU, a wrong flag), 3 none failed but some were
skipped, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FULL_GIB = 79.0  # of the GPU that the expectations are for, an H100 of 80 GB
TINY_SECONDS = 20
# module -> the distribution that brings it
_SAME = """
    torch triton pytest numpy jsonargparse tqdm einops psutil pyarrow xxhash sentencepiece safetensors tensorboard
    fsspec duckdb sqlglot parsy optree docstring_parser typeshed_client tokenizers gast astunparse
"""
MODULES = {
    **{name: name for name in _SAME.split()},
    "megatron.core": "megatron-core",
    "ibis": "ibis-framework",
    "public": "atpublic",
    "PIL": "pillow",
    "yaml": "PyYAML",
    "nvidia.dali": "nvidia-dali-cuda130",  # or -cuda120
}
_REPORT = ("torch", "numpy")
_HEAD = (*_REPORT, "triton", "jsonargparse", "docstring_parser", "typeshed_client", "tqdm", "yaml")
_DALI = ("nvidia.dali", "gast", "astunparse")  # it imports the last two
_HARNESS = tuple(name for name in MODULES if name not in ("triton", "pytest", "duckdb", *_DALI))


@dataclass(frozen=True)
class Part:
    """One program.

    Args:
        name: of the part; its report is OUT/<name>.json, its log OUT/<name>.log.
        shows: what it proves or measures, for the plan.
        words: script and flags; {catalogues} and {work} stand for folders.
        modules: modules that must be importable.
        seconds: expected on one H100 with 16 cores; three times that, and a minute at least, is its limit.
        gib: GPU memory that it uses; a smaller GPU costs it rows, or takes a smaller batch.
        least_gib: GPU memory below which it is left out.
        disk: GB that it writes temporarily.
        after: part that must have succeeded.
    """

    name: str
    shows: str
    words: tuple[str, ...]
    modules: tuple[str, ...]
    seconds: int
    gib: int
    least_gib: int = 0
    disk: float = 0.1
    after: str = ""


_AT = ("--catalogues", "{catalogues}")
_WORK = ("--work", "{work}")
# In order of value: --budget leaves out the last ones.
PARTS = (
    Part("tests", "kernels and head against their twins", ("device_tests.py",), (*_REPORT, "triton", "pytest"), 100, 4),
    Part(
        "catalogue",
        "draws what the others train on (CPU)",
        ("catalogue.py", "--folder", "{catalogues}"),
        (*_HARNESS, "duckdb"),
        25,
        0,
    ),
    Part(
        "training",
        "NCCL, three methods, fp32 and bf16, checkpoints both ways, export, against a CPU",
        ("training.py", *_AT, *_WORK),
        (*_HARNESS, "triton"),
        110,
        8,
        disk=1.0,
        after="catalogue",
    ),
    Part(
        "pixels",
        "DALI on the GPU against its CPU graph and Pillow; the busy device",
        ("pixels.py",),
        ("torch", "numpy", "PIL", "tqdm", *_DALI),
        35,
        4,
    ),
    Part(
        "head_1m",
        "1 M classes beside Partial FC and full softmax",
        ("head.py", "--classes", "1000000"),
        _HEAD,
        50,
        20,
        12,
    ),
    Part(
        "towers",
        "images/s and utilisation beside transformers",
        ("towers.py",),
        (*_HARNESS, "triton"),
        150,
        70,
        10,
        disk=4.0,
    ),
    Part(
        "line",
        "train, eval, export, search by their commands",
        ("line.py", *_AT, *_WORK),
        (*_HARNESS, *_DALI),
        80,
        8,
        disk=1.0,
        after="catalogue",
    ),
    Part(
        "from_jpegs",
        "ViT-B/16 training steps from JPEGs",
        ("from_jpegs.py", *_AT, *_WORK),
        (*_HARNESS, *_DALI),
        60,
        40,
        10,
        after="catalogue",
    ),
    Part(
        "head_10m",
        "10 M classes",
        ("head.py", "--classes", "10000000", "--sides", "ours_bf16_8bit", "ours", "partial_fc_fused", "--steps", "5"),
        _HEAD,
        80,
        65,
        24,
    ),
    Part("decode", "decode rate by threads", ("decode.py",), ("torch", "numpy", "PIL", "tqdm", *_DALI), 40, 4),
)


@dataclass
class Outcome:
    """State of a part (planned, ok, failed or skipped), and its reason."""

    part: Part
    state: str = "planned"
    why: str = ""
    seconds: float = 0.0
    bars: list[str] = field(default_factory=list)
    rows: int = 0


class Stop(Exception):
    """A mistake of the user or a machine that cannot run this: one line, exit code 2."""


def arguments(argv: Sequence[str], parts: Sequence[Part]) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        "jobs/gpu_check.sh", description="Every proof that needs a GPU. PYTHON names the interpreter."
    )
    parser.add_argument(
        "out",
        nargs="?",
        type=Path,
        default=Path(os.environ.get("OUT") or "gpu-check"),
        help="folder for reports and logs",
    )
    parser.add_argument("--plan", action="store_true", help="only say what would run, and what it needs")
    parser.add_argument("--parts", default="", help=f"some of {','.join(part.name for part in parts)}")
    parser.add_argument("--budget", type=float, default=0.0, help="seconds for all; what does not fit is left out")
    parser.add_argument("--catalogues", type=Path, default=None, help="folder that the part catalogue made elsewhere")
    parser.add_argument(
        "--site", type=Path, default=None, help="folder that the wheels in wheels/ are installed to (OUT/site)"
    )
    parser.add_argument("--tiny", action="store_true", help="run all small on the CPU, to try the programs")
    given = parser.parse_args(argv)
    names = [part.name for part in parts]
    given.parts = [name for name in given.parts.split(",") if name]
    if wrong := [name for name in given.parts if name not in names]:
        raise Stop(f"--parts has '{wrong[0]}'. It can have {', '.join(names)}")
    if given.catalogues is not None and not (given.catalogues / "drawn").is_dir():
        raise Stop(f"--catalogues {given.catalogues} has no folder 'drawn'. The part catalogue makes it")
    return given


def missing_modules(modules: Sequence[str], environment: dict[str, str], wheels: Sequence[Path]) -> set[str]:
    """Modules that the interpreter does not find and no wheel brings."""
    code = (
        "import importlib.util, json, sys\n"
        "def here(name):\n"
        "    try: return importlib.util.find_spec(name) is not None\n"
        "    except ImportError: return False\n"
        "print(json.dumps([name for name in sys.argv[1:] if not here(name)]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *modules], env=environment, capture_output=True, text=True)
    brought = {wheel.name.partition("-")[0].replace("_", "-").lower() for wheel in wheels}
    absent = json.loads(done.stdout or "[]")
    return {name for name in absent if MODULES.get(name, name).replace("_", "-").lower() not in brought}


def gpu_by_driver() -> tuple[str, float] | None:
    """Name and GiB of the first GPU by nvidia-smi; None without one."""
    try:
        command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = said.stdout.strip().splitlines() if said.returncode == 0 else []
    if not lines:
        return None
    name, memory, driver = (word.strip() for word in lines[0].rsplit(",", 2))
    return f"{name}, driver {driver}", float(memory) / 1024 if memory.replace(".", "").isdigit() else FULL_GIB


def require_gpu(environment: dict[str, str]) -> str:
    """torch's version and its name of the GPU; raises Stop if it sees none."""
    code = (
        "import torch; a = torch.cuda.is_available(); "
        "print(torch.__version__, torch.cuda.get_device_name() if a else '', sep='|')"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    version, _, name = done.stdout.strip().rpartition("\n")[2].partition("|")
    if done.returncode or not name:
        why = f"torch {version} sees no GPU here" if version else f"{sys.executable} does not import torch"
        listed = gpu_by_driver()
        if listed and version:
            why += f", though the driver lists one ({listed[0]}): torch for CUDA 13 needs driver 580 or later"
        raise Stop(f"{why}. --tiny runs the programs small on a CPU, --plan says what they need")
    return f"torch {version}, {name}"


def install(wheels: Sequence[Path], site: Path) -> None:
    """Puts the wheels into the folder `site`, unless these are there already."""
    mark, names = site / ".wheels", "\n".join(wheel.name for wheel in wheels)
    if mark.exists() and mark.read_text() == names:
        return
    print(f"installing {len(wheels)} wheels into {site}", flush=True)
    options = "--no-index --no-deps --no-compile --no-cache-dir --upgrade --disable-pip-version-check -q".split()
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(site), *map(str, wheels)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Stop(f"the wheels cannot be installed: {(done.stderr.strip().splitlines() or ['pip said nothing'])[-1]}")
    mark.write_text(names)


def plan(given: argparse.Namespace, parts: Sequence[Part], absent: set[str], gib: float) -> list[Outcome]:
    """The parts to run, in order, and the reasons for leaving out the others."""
    outcomes, spent = [], 0.0
    free = (
        shutil.disk_usage(next(folder for folder in (given.out, *given.out.absolute().parents) if folder.exists())).free
        / 1e9
    )
    for part in parts:
        one = Outcome(part)
        outcomes.append(one)
        lacks = sorted(MODULES.get(name, name) for name in absent if name in part.modules)
        if given.parts and part.name not in given.parts:
            one.state, one.why = "left out", "by --parts"
        elif part.name == "catalogue" and given.catalogues is not None:
            one.state, one.why = "left out", "by --catalogues"
        elif lacks:
            one.state, one.why = "skipped", f"missing: {', '.join(lacks)}"
        elif part.least_gib > gib and not given.tiny:
            one.state, one.why = "skipped", f"needs a GPU of {part.least_gib} GiB"
        elif part.disk > free:
            one.state, one.why = "skipped", f"needs {part.disk:g} GB of disk, {free:.1f} are free"
        elif given.budget and spent + expected(part, given) > given.budget:
            one.state, one.why = "skipped", "does not fit into --budget"
        else:
            spent += expected(part, given)
            if part.gib > gib and not given.tiny:
                one.why = f"made for {part.gib} GiB: a smaller batch, or fewer rows"
    return outcomes


def expected(part: Part, given: argparse.Namespace) -> float:
    """Seconds."""
    return TINY_SECONDS if given.tiny else part.seconds


def print_plan(outcomes: Sequence[Outcome], given: argparse.Namespace, where: str) -> None:
    """Prints the plan: time, GPU memory and disk of each part."""
    print(f"{where}; Python {sys.version.split()[0]}, {len(os.sched_getaffinity(0))} cores; reports in {given.out}")
    print(f"{'part':<11}{'seconds':>8}{'GPU GiB':>9}{'disk GB':>9}  shows")
    for one in outcomes:
        part = one.part
        shown = {"planned": "", "left out": "[left out] "}.get(one.state, f"[{one.state}] ")
        why = f" ({one.why})" if one.why else ""
        print(f"{part.name:<11}{expected(part, given):>8.0f}{part.gib:>9}{part.disk:>9g}  {shown}{part.shows}{why}")
    runs = [one.part for one in outcomes if one.state == "planned"]
    total = sum(expected(part, given) for part in runs)
    gib = max((part.gib for part in runs), default=0)
    disk = max((part.disk for part in runs), default=0)
    print(
        f"{len(runs)} parts, about {total:.0f} s in all, at most {gib} GiB of GPU memory and {disk:g} GB of disk at a "
        "time; no network",
        flush=True,
    )


def run_part(one: Outcome, given: argparse.Namespace, environment: dict[str, str], limit: float) -> None:
    """Runs a part to its end or its limit, with all processes that it started, and takes its report."""
    out = given.out
    catalogues = given.catalogues or out / "catalogues"
    words = [word.format(catalogues=catalogues, work=out / "work" / one.part.name) for word in one.part.words]
    script, report = str(Path("jobs", "gpu", words[0])), out / f"{one.part.name}.json"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-W", "ignore", script, str(report), *words[1:], *(["--tiny"] if given.tiny else [])]
    began, log = time.monotonic(), out / f"{one.part.name}.log"
    print(f"[{one.part.name}] {' '.join(command[3:])}", flush=True)
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
        try:
            code: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_group(process)
    one.seconds = time.monotonic() - began
    one.state = "ok" if code == 0 else "failed"
    if code is None:
        one.why = f"ran past its limit of {limit:.0f} s"
    elif code < 0:
        one.why = f"killed by {signal.Signals(-code).name}"
    take_report(one, report)
    if code and not one.why:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        one.why = f"exit code {code}: {last[0][:200] if last else 'no word'}"


def end_group(process: subprocess.Popen[Any]) -> None:
    """Ends a process and its children: by SIGTERM, then by SIGKILL."""
    for name in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, name)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            process.poll()
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)


def take_report(one: Outcome, file: Path) -> None:
    """Rows, bars and failed rows of a part's report, if it left one."""
    try:
        rows = json.loads(file.read_text())["rows"]
    except (OSError, ValueError, KeyError):
        if one.state == "ok":
            one.state, one.why = "failed", "left no report"
        return
    one.rows = len(rows)
    for row in rows:
        if "bar_of" in row:
            met = "met" if row["met"] else "missed"
            one.bars.append(f"{row['bar_of']} {row['value']:.4g}, bar {row['bar']:g} {met} (ratio {row['ratio']:.3g})")
    bad = [row for row in rows if row.get("ok") is False]
    if bad:
        first = ", ".join(f"{key} {value}" for key, value in bad[0].items() if key != "ok")
        told = f"{len(bad)} of {len(rows)} rows are not ok: {first[:300]}"
        one.why = f"{one.why}; {told}" if one.why else told


def write_summary(outcomes: Sequence[Outcome], given: argparse.Namespace, where: str) -> None:
    """OUT/summary.json, whole after each part."""
    parts = {
        one.part.name: {
            "state": one.state,
            "why": one.why,
            "seconds": round(one.seconds, 1),
            "rows": one.rows,
            "bars": one.bars,
        }
        for one in outcomes
    }
    temporary = given.out / "summary.tmp"
    temporary.write_text(json.dumps({"machine": where, "parts": parts}, indent=1) + "\n")
    temporary.replace(given.out / "summary.json")


def print_table(outcomes: Sequence[Outcome], given: argparse.Namespace) -> None:
    """Prints the state of every part."""
    print(f"\n{'part':<11}{'state':<9}{'seconds':>8}{'rows':>6}")
    for one in outcomes:
        print(f"{one.part.name:<11}{one.state:<9}{one.seconds:>8.1f}{one.rows:>6}  {one.why}".rstrip())
        for bar in () if given.tiny else one.bars:  # which are set for a GPU
            print(f"{'':<11}{bar}")
    print(f"Send back: {given.out}/*.json and *.log", flush=True)


def main(argv: Sequence[str], parts: Sequence[Part] = PARTS) -> int:
    """Entry point; returns the exit code."""
    began = time.monotonic()
    try:
        if not (3, 11) <= sys.version_info[:2] <= (3, 12):
            raise Stop(
                f"this is Python {sys.version.split()[0]}; Shelfmark needs 3.11 or 3.12. "
                "Name one: PYTHON=python3.12 jobs/gpu_check.sh"
            )
        given = arguments(argv, parts)
        given.out = given.out.absolute()
        site, wheels = (given.site or given.out / "site").absolute(), sorted((ROOT / "wheels").glob("*.whl"))
        inherited = os.environ.get("PYTHONPATH", "")
        paths = [str(ROOT), *([str(site)] if wheels or given.site else []), *([inherited] if inherited else [])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if given.tiny:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        absent = missing_modules(sorted({name for part in parts for name in part.modules}), environment, wheels)
        found = None if given.tiny else gpu_by_driver()
        where = (
            "tiny, on the CPU"
            if given.tiny
            else f"{found[0]}, {found[1]:.0f} GiB"
            if found
            else f"no GPU seen, planned for {FULL_GIB:.0f} GiB"
        )
        outcomes = plan(given, parts, absent, found[1] if found else FULL_GIB)
        if given.plan:
            print_plan(outcomes, given, where)
            return 0
        if wheels:
            given.out.mkdir(parents=True, exist_ok=True)
            install(wheels, site)
        if not given.tiny:
            where = f"{where}; {require_gpu(environment)}"
        given.out.mkdir(parents=True, exist_ok=True)
    except Stop as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_plan(outcomes, given, where)
    interrupted = False
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for one in outcomes:
        before = next((other for other in outcomes if other.part.name == one.part.after), None)
        left = given.budget - (time.monotonic() - began) if given.budget else float("inf")
        if one.state != "planned":
            pass
        elif before is not None and given.catalogues is None and before.state != "ok":
            one.state, one.why = "skipped", f"the part {before.part.name} is {before.state}"
        elif left < expected(one.part, given) / 2:
            one.state, one.why = "skipped", "the budget is spent"
        else:
            one.why = ""
            try:
                run_part(one, given, environment, min(left, 300.0 if given.tiny else max(60.0, 3 * one.part.seconds)))
            except KeyboardInterrupt:
                one.state, one.why, interrupted = "failed", "interrupted", True
            print(f"[{one.part.name}] {one.state} in {one.seconds:.1f} s{': ' if one.why else ''}{one.why}", flush=True)
        write_summary(outcomes, given, where)
        if interrupted:
            break
    for one in outcomes:
        if one.state == "planned":
            one.state, one.why = "skipped", "interrupted before it"
    write_summary(outcomes, given, where)
    print_table(outcomes, given)
    states = {one.state for one in outcomes}
    return 130 if interrupted else 1 if "failed" in states else 3 if "skipped" in states else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
