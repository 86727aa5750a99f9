"""The shell of jobs/preflight.sh and jobs/pipeline.sh on a real SLURM of two nodes, around a Python played by a script.
With the real one, which takes minutes: test_jobs.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, cluster, missing

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

# Does not start on a node where $BROKEN says so; preflight then names it. `govern` fails where $REFUSES is set.
PYTHON = r"""#!/bin/bash
if [[ $1 == -c ]]; then [[ $SLURMD_NODENAME != "${BROKEN:-}" ]]; exit; fi
echo "$SLURMD_NODENAME ${INSIDE:-outside}: $*"
words=" $*"
case $words in
    *" harness preflight "*)
        out=${words##* --out } && out=${out%% *}
        if [[ $words == *" --absent node1 "* ]]; then printf node1 >"$out/exclude" && exit 2; fi
        : >"$out/exclude"
        ;;
    *" harness ingest "*) mkdir -p "cat.parts/part-$SLURM_ARRAY_TASK_ID-of-$PARTS" ;;
    *" harness merge "*) mkdir -p cat && touch cat/catalogue.json ;;
    *" harness govern "*) [[ -z ${REFUSES:-} ]] || exit 2 ;;
    *" harness.train "*) mkdir -p run && touch run/config.yaml ;;
esac
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with cluster(nodes=2) as running:
        yield running


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project's folder with that Python, a recipe and a manifest."""
    for name in ("harness", "models", "kernels", "jobs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    python = tmp_path / "venv" / "bin" / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    (tmp_path / "recipe.yaml").write_text("seed: 1\n")
    (tmp_path / "products.tsv").write_text("")
    return tmp_path


SETTINGS = {"VENV": "venv", "NPROC_PER_NODE": "1", "OMP_NUM_THREADS": "1"}


def test_preflight_leaves_a_node_out_and_goes_on(slurm: Cluster, project: Path) -> None:
    options, then = ("--nodes=2", "jobs/preflight.sh", "--run-dir", "runs"), ("--then", "jobs/train.sh", "recipe.yaml")
    settings = {**SETTINGS, "CONTAINER": "env INSIDE=inside"}
    checked = slurm.submit(*options, cwd=project, **settings, BROKEN="node1")
    trained = slurm.submit(*options, *then, "--train.steps", 3, cwd=project, **settings, BROKEN="node1")
    whole = slurm.submit(*options, *then, cwd=project, **settings)
    ends = {checked: ("FAILED", "2:0"), trained: ("COMPLETED", "0:0"), whole: ("COMPLETED", "0:0")}
    for number, end in ends.items():
        job, text = slurm.wait(number), (project / f"shelfmark-preflight-{number}.log").read_text()
        assert (job["JobState"], job["ExitCode"]) == end, text
        without = number != whole
        ran = [line for line in text.splitlines() if " inside: " in line]
        assert len(ran) == (1 if number == checked else 2) * (1 if without else 2)
        assert all(line.startswith("node2 ") for line in ran) == without
        assert all((" --nnodes 1 " in line) == without and " --tee 3 " in line for line in ran), ran
        assert text.count("nodes    1 (node[1-2] without node1), ") == len(ran) * without
        assert ("--train.steps 3" in ran[-1]) == (number == trained)


def test_a_pipeline_stops_at_a_stage_that_fails_and_goes_on_there(slurm: Cluster, project: Path) -> None:
    stages = ["ingest", "merge", "govern", "tokenizer", "train", "eval", "export"]
    words = ["jobs/pipeline.sh", "--manifest", "products.tsv", "--images", ".", "--catalogue", "cat"]
    words += ["--run-dir", "run", "--artefact", "artefact", "--recipe", "recipe.yaml"]
    settings = {**SETTINGS, "INGEST_PARTS": "2", "TRAIN_SBATCH": "--nodes 2"}
    settings |= dict.fromkeys(("INGEST_SBATCH", "COMMAND_SBATCH"), "--cpus-per-task 1")

    def run(**more: str) -> dict[str, str]:
        """Stage -> its job's state, or what was said of it."""
        lines = slurm.command("bash", *words, cwd=project, **settings, **more).splitlines()
        said = {line[:16].strip(): line[16:].strip() for line in lines}
        return {
            name: slurm.wait(what[4:])["JobState"] if what.startswith("job ") else what for name, what in said.items()
        }

    cancelled = dict.fromkeys(stages[3:], "CANCELLED")
    assert run(REFUSES="1") == {"ingest": "COMPLETED", "merge": "COMPLETED", "govern": "FAILED", **cancelled}
    log = project / "run.pipeline" / "log"
    assert log.read_text().endswith("; cancelled: tokenizer train eval export\n")
    assert " stage govern failed with exit code 2 (job " in log.read_text().splitlines()[-1]
    before = dict.fromkeys(stages, "finished before")
    assert run() == {**before, **dict.fromkeys(stages[2:], "COMPLETED")}
    assert run() == before
    # Other words for a stage: it and all later ones run again.
    again = run(EVAL_ARGS="--split val")
    assert again == {**before, "eval": "COMPLETED", "export": "COMPLETED"}
    last = log.read_text().splitlines()[-7:]
    assert [line.split()[2] for line in last] == [*stages[2:], "eval", "export"]
