"""jobs/*.sh on a real SLURM of two nodes: a job writes the same as plain torchrun, and a failing one ends at once."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from harness.bench import click_log
from harness.catalogue.catalogue import Catalogue
from harness.train.tensorboard import tag
from tests.catalogues import make_catalogue
from tests.runs import RECIPE
from tests.slurm.cluster import Cluster, cluster, missing

ROOT = Path(__file__).parents[2]
# What cluster.env would say of these nodes; it also keeps a GPU of this machine out.
SETTINGS = {"VENV": sys.prefix, "NPROC_PER_NODE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
LONG = 300  # steps: half a minute
TIMING = ("seconds/", "speed/")

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with cluster(nodes=2) as running:
        yield running


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as a clone has it, with a commit of its own and without anybody's runs."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("harness", "models", "kernels", "jobs"):
        (folder / name).symlink_to(ROOT / name)
    git("init", "-q", folder=folder)
    git("commit", "-q", "--allow-empty", "-m", "start", folder=folder)
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, catalogue: Path) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    file.write_text(yaml.safe_dump({**RECIPE, "train.checkpoint_every": 2, "data.catalogue": str(catalogue)}))
    return file


@pytest.fixture(scope="module")
def trained(slurm: Cluster, project: Path, recipe: Path) -> tuple[int, str]:
    """A training job on both nodes that must have succeeded: its id and its log."""
    job = slurm.submit("--nodes=2", "jobs/train.sh", recipe, "--train.steps", 3, cwd=project, **SETTINGS)
    return job, log(slurm, project, "train", job, "COMPLETED")


def git(*words: str, folder: Path) -> str:
    who = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    return subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def log(slurm: Cluster, project: Path, name: str, number: int, state: str, *codes: int) -> str:
    """The log of a job, which must end in `state` with one of `codes` (0 where none is named) and leave no process
    behind.
    """
    job = slurm.wait(number)
    text = (project / f"shelfmark-{name}-{number}.log").read_bytes().decode()
    assert job["JobState"] == state and job["ExitCode"] in [f"{code}:0" for code in codes or (0,)], text
    assert slurm.processes(number) == []
    return text


def plain(project: Path, *words: object) -> None:
    """A command without SLURM, in the project's folder."""
    environment = {**os.environ, **SETTINGS, "PET_STANDALONE": "1"}
    subprocess.run([sys.executable, "-m", *map(str, words)], cwd=project, env=environment, check=True, timeout=300)


def figures(run: Path) -> list[dict[str, Any]]:
    """The steps of log.jsonl, without the figures that depend on the machine's speed."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not any(part in k for part in TIMING)} for line in lines]


def files(run: Path) -> dict[str, Path]:
    """All files of a run by their names; TensorBoard's holds the time and the machine."""
    found = (file for file in run.rglob("*") if file.is_file())
    return {re.sub(r"tfevents\..*", "tfevents", str(file.relative_to(run))): file for file in found}


def test_a_job_on_two_nodes_trains_what_plain_torchrun_trains(
    trained: tuple[int, str], project: Path, recipe: Path
) -> None:
    number, _ = trained
    run = project / "runs" / f"tiny-{number}"
    plain(project, "torch.distributed.run", "--nproc-per-node", 2, "-m", "harness.train", "--config", recipe,
          "--train.steps", 3, "--run-dir", "runs/plain")  # fmt: skip
    expected = figures(project / "runs" / "plain")
    assert figures(run) == expected
    assert [line["step"] for line in expected if "train/loss" in line] == [1, 2, 3]
    ours, theirs = files(run), files(project / "runs" / "plain")
    assert ours.keys() == theirs.keys() and "checkpoints/step-00000003/towers/__0_0.distcp" in ours
    for name in ours:
        if name.endswith((".distcp", ".parquet", ".model", "preprocess.json")):
            assert ours[name].read_bytes() == theirs[name].read_bytes(), name


def test_a_job_writes_one_readable_log(trained: tuple[int, str], project: Path, recipe: Path) -> None:
    number, text = trained
    lines = text.splitlines()
    assert lines[0].startswith(f"job      {number} shelfmark-train, restart 0, ")
    assert lines[1].startswith("nodes    2 (node[1-2]), processes on each 1, threads 1, meeting at 127.0.0.1:2")
    assert lines[2] == f"commit   {git('describe', '--always', '--abbrev=12', folder=project)}"
    assert lines[3].startswith(f"command  -m 'harness.train' '--config' '{recipe}' '--train.steps' '3'")
    assert "\r" not in text and any(line.startswith("training: 3 of 3 steps (100%), ") for line in lines)
    assert text.count(f"run runs/tiny-{number}: steps 3, ") == 1
    assert re.fullmatch(rf"exit code 0 after \d\d:\d\d:\d\d, run folder runs/tiny-{number}", lines[-1])
    # No warning and nothing of the launcher's.
    assert not re.search(r"Traceback|[Ww]arn|[Ee]rror|srun|\[[WE]\d{4}", text), text
    assert not (project / f"shelfmark-train-{number}.ranks").exists()  # no rank failed


@pytest.mark.full
def test_eval_and_export_jobs(trained: tuple[int, str], slurm: Cluster, project: Path, tmp_path: Path) -> None:
    run = f"runs/tiny-{trained[0]}"
    options = ("--slices", "colour", "--json")
    evaluation = slurm.submit("-N2", "jobs/eval.sh", run, *options, tmp_path / "job.json", cwd=project, **SETTINGS)
    export = slurm.submit("-N2", "jobs/export.sh", run, "--out", tmp_path / "artefact", cwd=project, **SETTINGS)
    plain(project, "harness", "eval", run, *options, tmp_path / "plain.json")
    text = log(slurm, project, "eval", evaluation, "COMPLETED")
    assert text.count("step-00000003: split test") == 1 and "colour = red" in text
    assert (tmp_path / "job.json").read_bytes() == (tmp_path / "plain.json").read_bytes()
    text = log(slurm, project, "export", export, "COMPLETED")
    assert any((tmp_path / "artefact").iterdir()) and "exit code 0" in text


def test_an_array_of_ingest_jobs_and_a_merge_give_what_one_ingest_gives(
    slurm: Cluster, project: Path, tmp_path: Path
) -> None:
    manifest = make_catalogue(tmp_path, ingest=False)
    options = ("--manifest", manifest, "--images", tmp_path, "--attribute-columns", "colour,shape", "--workers", 1)
    array = slurm.submit(
        *("--array=1-3", "--cpus-per-task=1", "jobs/ingest.sh", *options, "--out", tmp_path / "parts"),
        cwd=project,
        **SETTINGS,
    )
    for task in (1, 2, 3):
        assert slurm.wait(f"{array}_{task}")["JobState"] == "COMPLETED", slurm.logs()
    plain(project, "harness", "merge", tmp_path / "parts")
    plain(project, "harness", "ingest", *options, "--out", tmp_path / "whole")
    with closing(Catalogue(tmp_path / "parts")) as parts, closing(Catalogue(tmp_path / "whole")) as whole:
        columns = ["kind", "split", "item", "class_key", "title"]
        assert parts.table(columns).equals(whole.table(columns))
        for sample in range(whole.num_samples):
            assert parts.read_bytes(sample) == whole.read_bytes(sample)


@pytest.mark.full
def test_an_array_shares_the_cells_of_an_ablation(
    slurm: Cluster, project: Path, recipe: Path, catalogue: Path, tmp_path: Path
) -> None:
    file = tmp_path / "ablation.yaml"
    cells = {"one": {}, "two": {"optimizer.lr": 5e-3}, "three": {"optimizer.lr": 1e-4}}
    content = {"recipe": str(recipe), "seeds": [1], "settings": {"train.steps": 1}, "cells": cells, "metrics": ["map"]}
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    options = (file, "--catalogue", catalogue, "--out", tmp_path / "out", "--ranks", 1)
    array = slurm.submit(*("--array=1-2", "--cpus-per-task=1", "jobs/ablate.sh", *options), cwd=project, **SETTINGS)
    for task in (1, 2):
        assert slurm.wait(f"{array}_{task}")["JobState"] == "COMPLETED", slurm.logs()
    logs = [(project / f"shelfmark-ablate-{array}_{task}.log").read_text() for task in (1, 2)]
    trained = [re.findall(r"^\[(\w+), seed 1\]$", log, re.MULTILINE) for log in logs]
    assert trained == [["one", "three"], ["two"]]
    again = subprocess.run(
        ["bash", "jobs/ablate.sh", *map(str, options)],
        **{"cwd": project, "env": {**os.environ, **SETTINGS}, "capture_output": True, "text": True, "timeout": 100},
    )
    assert again.returncode == 0 and again.stdout.count("is there") == 3, again.stderr
    table = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert [line.split(" | ")[:2] for line in table[4:]] == [["| one", "1"], ["| two", "1"], ["| three", "1"]]


@pytest.mark.full
def test_a_rank_that_is_killed_ends_the_job(slurm: Cluster, project: Path, recipe: Path) -> None:
    settings = {**SETTINGS, "NPROC_PER_NODE": "auto"}
    options = ("--train.steps", 100000, "--train.checkpoint_every", 0, "--run-dir", "runs/killed")
    number = slurm.submit("--nodes=2", "jobs/train.sh", recipe, *options, cwd=project, **settings)
    progress = project / "runs" / "killed" / "log.jsonl"
    until(lambda: progress.exists() and progress.read_text() != "", slurm.logs)
    (victim,) = [p for p in slurm.processes(number) if b"\0RANK=1\0" in (p / "environ").read_bytes()]
    os.kill(int(victim.name), signal.SIGKILL)
    # srun's code is the highest of its tasks': 143 where SLURM ends the other rank before that has ended by itself.
    text = log(slurm, project, "train", number, "FAILED", 137, 143)
    assert text.splitlines()[-1].startswith(("exit code 137 after", "exit code 143 after"))
    (line,) = [line for line in text.splitlines() if "ended with SIGKILL; its own log: " in line]
    written = project / line.partition("its own log: ")[2]
    assert written.parts[-4] == f"shelfmark-train-{number}.ranks" and (written / "stderr.log").is_file()


def until(what: Callable[[], bool], said: Callable[[], str]) -> None:
    """Returns once what() holds; what is said() explains why it does not for ten minutes."""
    end = time.monotonic() + 600
    while not what():
        assert time.monotonic() < end, said()
        time.sleep(0.2)


def started(slurm: Cluster, project: Path, recipe: Path, name: str, save_every: int = 0) -> tuple[int, Path]:
    """A long training job on both nodes that has trained, and saved, a few steps: its id and its run folder."""
    run = project / "runs" / name
    options = ("--train.steps", LONG, "--train.checkpoint_every", save_every, "--run-dir", f"runs/{name}")
    number = slurm.submit("--nodes=2", "jobs/train.sh", recipe, *options, cwd=project, **SETTINGS)
    sign = run / "checkpoints" / "latest" if save_every else run / "log.jsonl"
    until(lambda: sign.exists() and sign.read_text() != "", slurm.logs)
    return number, run


def goes_on(slurm: Cluster, project: Path, number: int) -> str:
    """The log of a job that is back in the queue, once it has ended well."""

    def queued() -> bool:
        job = slurm.job(number)
        return job["Restarts"] != "0" and job["JobState"] == "PENDING"

    until(queued, lambda: f"{slurm.job(number)} {slurm.logs()}")
    # SLURM itself would wait two minutes. Not at once: a node refuses a job's new credential within the second in which
    # it has revoked the old one, and the job has then failed.
    slurm.command("scontrol", "update", f"JobId={number}", "StartTime=now+2")
    return log(slurm, project, "train", number, "COMPLETED")


def curve(run: Path) -> list[tuple[int, float]]:
    """Steps and losses that TensorBoard shows of a run, whatever number of processes wrote them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag("train/loss"))]


@pytest.fixture(scope="module")
def undisturbed(project: Path, recipe: Path) -> Path:
    plain(project, "torch.distributed.run", "--nproc-per-node", 2, "-m", "harness.train", "--config", recipe,
          "--train.steps", LONG, "--train.checkpoint_every", 0, "--run-dir", "runs/undisturbed")  # fmt: skip
    return project / "runs" / "undisturbed"


def is_as_undisturbed(run: Path, undisturbed: Path) -> None:
    assert figures(run) == figures(undisturbed)
    assert curve(run) == curve(undisturbed) and [step for step, _ in curve(run)] == list(range(1, LONG + 1))


@pytest.mark.full
@pytest.mark.parametrize("why", ["time", "steps", "preemption"])
def test_a_job_that_is_stopped_goes_on_in_the_queue(
    slurm: Cluster, project: Path, recipe: Path, undisturbed: Path, why: str
) -> None:
    number, run = started(slurm, project, recipe, why)
    if why == "time":
        slurm.command("scancel", "--batch", "--signal=USR1", number)  # what #SBATCH --signal asks for
    elif why == "steps":
        slurm.command("scancel", "--signal=USR1", number)  # to launchers and ranks, not to the job's shell
    else:
        slurm.submit("--partition=urgent", "--nodes=2", "--exclusive", "--wrap", "true", cwd=project)
    text = goes_on(slurm, project, number)
    name = "SIGTERM" if why == "preemption" else "SIGUSR1"
    (stopped,) = re.findall(rf"stopped by {name} after step (\d+), saved", text)
    assert f"requeued at step-{int(stopped):08d}" in text and f"resumed step-{int(stopped):08d}" in text
    assert text.count("exit code 75 after") == 1 and text.splitlines()[-1].startswith("exit code 0 after")
    assert 0 < int(stopped) < LONG
    is_as_undisturbed(run, undisturbed)


@pytest.mark.full
def test_a_job_goes_on_when_a_node_has_died(slurm: Cluster, project: Path, recipe: Path, undisturbed: Path) -> None:
    """SLURM takes the node for down, and has the job back in the queue until the node is up again."""
    number, run = started(slurm, project, recipe, "node", save_every=5)
    slurm.kill_node("node2")
    for folder in slurm.processes(number):  # a dead machine answers nobody, and does not close its connections
        with suppress(ProcessLookupError, FileNotFoundError):
            if b"\0SLURMD_NODENAME=node2\0" in (folder / "environ").read_bytes():
                os.kill(int(folder.name), signal.SIGSTOP)
    try:
        until(lambda: slurm.job(number)["Restarts"] == "1", lambda: f"{slurm.job(number)} {slurm.logs()}")

        def ended() -> bool:
            for folder in slurm.processes(number):  # a dead machine has none
                with suppress(ProcessLookupError):
                    os.kill(int(folder.name), signal.SIGKILL)
            return not slurm.processes(number) and slurm.job(number)["JobState"] == "PENDING"

        until(ended, lambda: f"{slurm.job(number)} {slurm.logs()}")
    finally:
        slurm.start_node("node2")
    until(lambda: "node2" in slurm.command("sinfo", "--noheader", "--Node", "--states=idle"), slurm.logs)
    text = goes_on(slurm, project, number)
    (resumed,) = re.findall(r"resumed step-(\d+)", text)
    assert 0 < int(resumed) < LONG and "restart 1, " in text
    is_as_undisturbed(run, undisturbed)


@pytest.mark.full
def test_a_job_that_is_cancelled_saves_and_stays_so(slurm: Cluster, project: Path, recipe: Path) -> None:
    number, run = started(slurm, project, recipe, "cancelled")
    slurm.command("scancel", number)
    assert slurm.wait(number)["JobState"] == "CANCELLED"
    until(lambda: slurm.processes(number) == [], slurm.logs)
    assert (run / "checkpoints" / "latest").exists() and slurm.job(number)["Restarts"] == "0"
    assert "requeued" not in (project / f"shelfmark-train-{number}.log").read_text()


def test_a_job_without_progress_is_requeued_so_many_times(tmp_path: Path) -> None:
    """Without SLURM, whose part is played by a function: each round would take a minute."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "latest").write_text("step-00000007")
    (run / "requeues").write_text("2 step-00000007\n")
    text = (ROOT / "jobs" / "train.sh").read_text()
    script = (
        "finish() { exit $1; }\n" + text[text.index("ended() {") : text.index("\n}\n", text.index("ended() {")) + 3]
    )
    tools = 'scontrol() { echo "scontrol $1" >&2; echo JobState=RUNNING; }; sleep() { :; }\n'
    for expected in ("requeued at step-00000007", "not requeued: stopped 4 times at step-00000007"):
        environment = {**os.environ, "SLURM_JOB_ID": "7", "MAX_REQUEUES": "3"}
        command = ["bash", "-euc", f"{tools}{script}\nended 75 {run}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 75 and expected in done.stdout, done
        assert ("scontrol requeue" in done.stderr) == expected.startswith("requeued")


@pytest.mark.parametrize("script,code,how", [("kill -9 $BASHPID", 137, "SIGKILL"), ("exit 3", 3, "exit code 3")])
def test_the_launcher_says_how_a_rank_ended(script: str, code: int, how: str) -> None:
    """Without SLURM: which launcher SLURM's own signals reach first is a race."""
    command = [sys.executable, "jobs/torchrun.py", "--standalone", "--nproc-per-node", "1", "--no-python"]
    environment = {**os.environ, "SLURMD_NODENAME": "node7"}
    done = subprocess.run(
        [*command, "bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == code
    assert done.stderr.strip() == f"rank 0 on node7 ended with {how}"


@pytest.fixture
def venv_without_node2(tmp_path: Path) -> Path:
    """A virtual environment whose Python does not start on node2."""
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    python = folder / "python"
    python.write_text(f'#!/bin/bash\n[[ $SLURMD_NODENAME != node2 ]] || exit 127\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return folder.parent


@pytest.mark.full
def test_preflight_goes_on_without_a_bad_node(
    slurm: Cluster, project: Path, recipe: Path, venv_without_node2: Path
) -> None:
    options = ("--least-share", 0.01, "--size-mib", 2)
    good = slurm.submit("--nodes=2", "jobs/preflight.sh", *options, cwd=project, **SETTINGS)
    text = log(slurm, project, "preflight", good, "COMPLETED")
    assert "no node to leave out" in text and re.search(r"^node1 +node2 +[\d.]+", text, re.MULTILINE), text
    found = json.loads((project / f"shelfmark-preflight-{good}" / "preflight.json").read_text())
    assert found["good"] and [*found["figures"]] == ["node1", "node2"]
    assert [row["error"] for row in (*found["pairs"], *found["collectives"])] == [None] * 7

    settings = {**SETTINGS, "VENV": str(venv_without_node2)}
    bad = slurm.submit("--nodes=2", "jobs/preflight.sh", *options, cwd=project, **settings)
    text = log(slurm, project, "preflight", bad, "FAILED", 2)
    assert "\n--exclude=node2\n" in text and "error: not good: node2 (did not start). Leave out node2" in text
    then = ("--then", "jobs/train.sh", recipe, "--train.steps", 2, "--run-dir", "runs/after-preflight")
    bad = slurm.submit("--nodes=2", "jobs/preflight.sh", *options, *then, cwd=project, **settings)
    text = log(slurm, project, "preflight", bad, "COMPLETED")
    assert text.count("nodes    1 (node[1-2] without node2)") == 2 and "run runs/after-preflight: steps 2, " in text


@pytest.mark.full
def test_a_pipeline_runs_its_stages_and_leaves_out_what_is_finished(
    slurm: Cluster, project: Path, recipe: Path, tmp_path: Path
) -> None:
    manifest = make_catalogue(tmp_path, ingest=False)
    settings = {
        **SETTINGS, "INGEST_PARTS": "2", "INGEST_ARGS": "--attribute-columns colour,shape --workers 1",
        "TOKENIZER_ARGS": "--vocab-size 48", "TRAIN_ARGS": "--train.steps 2", "TRAIN_SBATCH": "--nodes 2",
        "INGEST_SBATCH": "--cpus-per-task 1", "COMMAND_SBATCH": "--cpus-per-task 1",
    }  # fmt: skip
    out = {name: tmp_path / name for name in ("catalogue", "run", "artefact")}
    words = [
        *("jobs/pipeline.sh", "--manifest", manifest, "--images", tmp_path, "--recipe", recipe),
        *("--catalogue", out["catalogue"], "--run-dir", out["run"], "--artefact", out["artefact"]),
    ]

    def submit(**more: str) -> dict[str, str]:
        lines = slurm.command("bash", *words, cwd=project, **settings, **more).splitlines()
        return {line[:16].strip(): line[16:].strip() for line in lines}

    stages = ["ingest", "merge", "govern", "tokenizer", "train", "eval", "export"]
    state = tmp_path / "run.pipeline"
    jobs = submit(GOVERN_ARGS="--min-queries 1000")
    assert [*jobs] == stages
    numbers = {name: int(said.removeprefix("job ")) for name, said in jobs.items()}
    for name in stages:
        expected = {"govern": "FAILED"}.get(name, "COMPLETED" if name in ("ingest", "merge") else "CANCELLED")
        assert slurm.wait(numbers[name])["JobState"] == expected, (name, slurm.logs())
    failed = f"stage govern failed with exit code 2 (job {numbers['govern']}); cancelled: tokenizer train eval export"
    assert (state / "log").read_text().splitlines()[-1].endswith(failed)
    assert failed in (project / f"shelfmark-govern-{numbers['govern']}.log").read_text()

    jobs = submit()
    assert [name for name in stages if jobs[name] == "finished before"] == ["ingest", "merge"]
    assert slurm.wait(int(jobs["export"].removeprefix("job ")))["JobState"] == "COMPLETED", slurm.logs()
    assert (out["artefact"] / "index.faiss").is_file() and (out["run"] / "checkpoints" / "latest").is_file()
    said = [line.split(" ", 2)[2] for line in (state / "log").read_text().splitlines()]
    assert [line.split()[0] for line in said[-5:]] == ["govern", "tokenizer", "train", "eval", "export"]
    assert set(submit().values()) == {"finished before"}


@pytest.mark.full
def test_a_pipeline_governs_clicks_again_by_what_it_has_trained(
    slurm: Cluster, project: Path, recipe: Path, tmp_path: Path
) -> None:
    """--refine: the first run's embeddings of documents and photos filter the clicks, and a second run starts from the
    first.
    """
    shop, clicks = make_catalogue(tmp_path / "shop", classes=12, queries=8), tmp_path / "clicks.parquet"
    with redirect_stdout(io.StringIO()):
        click_log.run(click_log.ClickLogConfig(catalogue=shop, out=clicks))
    settings = {
        **SETTINGS, "INGEST_PARTS": "1", "INGEST_ARGS": "--workers 1", "TOKENIZER_ARGS": "--vocab-size 48",
        "TRAIN_ARGS": "--train.steps 2", "GOVERN_ARGS": "--min-queries 1", "REFINE_ARGS": "--min-similarity 0",
        "INGEST_SBATCH": "--cpus-per-task 1", "COMMAND_SBATCH": "--cpus-per-task 1",
    }  # fmt: skip
    out = {name: tmp_path / name for name in ("catalogue", "run", "artefact")}
    words = [
        *("jobs/pipeline.sh", "--manifest", shop.parent / "manifest.tsv", "--images", shop.parent, "--recipe", recipe),
        *("--catalogue", out["catalogue"], "--run-dir", out["run"], "--artefact", out["artefact"]),
        *("--clicks", clicks, "--refine"),
    ]

    def submit() -> dict[str, str]:
        lines = slurm.command("bash", *words, cwd=project, **settings).splitlines()
        return {line[:16].strip(): line[16:].strip() for line in lines}

    refining = ["refine-export", "refine-embed", "refine-govern", "refine-train"]
    jobs = submit()
    assert [*jobs] == ["ingest", "merge", "govern", "tokenizer", "train", *refining, "eval", "export"]
    for said in jobs.values():
        assert slurm.wait(said.removeprefix("job "))["JobState"] == "COMPLETED", slurm.logs()
    report = json.loads((out["catalogue"] / "classes" / "report.json").read_text())
    made = Catalogue(out["catalogue"])
    trained = len(made.table(["kind"], kind="document")) + len(made.table(["kind"], kind="query", split="train"))
    assert report["embeddings"]["samples"] == trained, "documents and photos"
    history = pq.read_table(out["catalogue"] / "classes" / "history.parquet")
    assert set(history["event"].to_pylist()) & {"kept", "merged", "split", "moved"}, "compared with the first classes"
    text = (project / f"shelfmark-train-{jobs['refine-train'].removeprefix('job ')}.log").read_text()
    assert f"started from {out['run']}/checkpoints/step-00000002 (its step 2" in text, text
    described = json.loads((out["artefact"] / "artefact.json").read_text())
    assert described["run"] == "run-refined", described
    assert set(submit().values()) == {"finished before"}


def test_mistakes_end_a_job_in_one_line(slurm: Cluster, project: Path, recipe: Path, tmp_path: Path) -> None:
    def says(*words: object, name: str = "train", folder: Path = project, **settings: str) -> str:
        number = slurm.submit(f"{ROOT}/jobs/{name}.sh", *words, cwd=folder, **{**SETTINGS, **settings})
        (line,) = log(slurm, folder, name, number, "FAILED", 2).splitlines()
        return line

    # Without an argument it is the recipe of cluster.env, which the environment overrides.
    assert says(RECIPE="absent.yaml").startswith("error: there is no recipe absent.yaml. ")
    assert "no recipe typo.yaml" in says("typo.yaml", "--train.steps", 3)
    assert "no virtual environment at nowhere" in says(recipe, VENV="nowhere")
    assert f"{tmp_path} is not Shelfmark's folder" in says(recipe, folder=tmp_path)
    assert "'runs/none' is not a run folder" in says("runs/none", name="eval")


def test_cluster_env_names_what_exists() -> None:
    script = 'source jobs/cluster.env; echo "$RECIPE|$VENV|$RDZV_PORT"'
    clean = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "70001234", "SLURM_RESTART_COUNT": "1"}
    out = subprocess.run(["bash", "-euc", script], cwd=ROOT, env=clean, check=True, capture_output=True, text=True)
    recipe, venv, port = out.stdout.strip().split("|")
    assert (ROOT / recipe).is_file() and venv == ".venv" and port == "22341"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_shellcheck() -> None:
    scripts = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "jobs").glob("*.sh"))
    assert len(scripts) == 10
    subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, check=True)
