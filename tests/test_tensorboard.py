"""TensorBoard's view of two runs in one folder: read through its HTTP interface, and once in a browser."""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from harness.catalogue.catalogue import Catalogue
from harness.core.errors import UserError
from harness.evaluate.contact_sheet import draw_panel, picture
from harness.evaluate.evaluation import Report
from harness.train.panels import panel_rows
from models.plain.transformer import PlainBuilder
from tests.pool import ranks
from tests.runs import UNUSED, tiny_config, trainer

# 4 of the 6 documents, which are samples 0, 6, .. 30.
SETTINGS = {
    "train.steps": 6,
    "train.log_every": 2,
    "train.evaluate_every": 3,
    "evaluation.projector": 4,
    "evaluation.baselines": 9,
}
SHOWN = [0, 6, 18, 24]
FIRST, SECOND = "first/tensorboard", "second/tensorboard"


@dataclass
class Board:
    """A running TensorBoard, and what it should show of the first run."""

    url: str
    log: list[dict[str, Any]]
    vectors: np.ndarray  # of all documents
    panel: np.ndarray
    folder: Path

    def read(self, route: str, **query: Any) -> bytes:
        with urllib.request.urlopen(f"{self.url}data/plugin/{route}?{urlencode(query)}", timeout=20) as answer:
            return answer.read()

    def ask(self, route: str, body: dict[str, Any] | None = None, **query: Any) -> Any:
        if body is None:
            return json.loads(self.read(route, **query))
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}data/plugin/{route}", json.dumps(body).encode(), head)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.loads(answer.read())

    def scalar(self, tag: str) -> dict[int, float]:
        return {int(step): value for _, step, value in self.ask("scalars/scalars", run=FIRST, tag=tag)}

    def logged(self, key: str) -> dict[int, float]:
        return {line["step"]: line[key] for line in self.log if key in line}


@contextmanager
def tensorboard(logdir: Path, output: Path) -> Iterator[str]:
    """The address of a TensorBoard that has read `logdir`."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", "0", "--load_fast=false"]
    with output.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        url, end = "", time.monotonic() + 60
        while time.monotonic() < end and process.poll() is None:
            if found := re.search(r"http://\S+", output.read_text()):
                url = found.group()
                with urllib.request.urlopen(f"{url}data/runs", timeout=20) as answer:
                    if set(json.loads(answer.read())) == {FIRST, SECOND}:
                        break
            time.sleep(0.2)
        else:
            pytest.fail(f"TensorBoard did not show both runs:\n{output.read_text()}")
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def board(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    """The first run stops after 4 of 6 steps and is resumed; the second has another learning rate and 2 steps."""
    folder = tmp_path_factory.mktemp("tensorboard")
    with trainer(tiny_config(catalogue, folder / "runs/first", **SETTINGS, **{"train.stop_at": 4})) as t:
        t.fit()
    with closing(SummaryWriter(str(folder / "runs/first/tensorboard"))) as late:
        late.add_scalar("health/1_loss", 9.0, 5)  # of a step after the checkpoint: it will be done again
    with trainer(tiny_config(catalogue, folder / "runs/first", **SETTINGS)) as t:
        t.fit()
        t.method.towers.eval()
        vectors = t.validation.evaluation.embedder.embed(t.method, t.validation.evaluation.documents[0]).vectors.numpy()
        panel = draw_panel(panel_rows(t.validation.evaluation.run(t.method), t.loader.catalogue))
    other = {**SETTINGS, "train.steps": 2, "optimizer.lr": 2e-3}
    with trainer(tiny_config(catalogue, folder / "runs/second", **other)) as t:
        t.fit()
    log = [json.loads(line) for line in (folder / "runs/first/log.jsonl").read_text().splitlines()]
    with tensorboard(folder / "runs", folder / "output.txt") as url:
        yield Board(url, log, vectors, panel, folder)


def test_health_comes_first_and_every_figure_of_the_log_is_shown_once(board: Board) -> None:
    tags = board.ask("scalars/tags")[FIRST]
    keys = {key for line in board.log for key in line} - {"step"}
    health = {
        "train/loss": "health/1_loss",
        "retrieval/recall_at_1": "health/2_recall_at_1_val",
        "train/gradient_norm": "health/3_gradient_norm",
        "train/learning_rate": "health/4_learning_rate",
        "speed/images_per_second": "health/5_images_per_second",
        "speed/data_wait_share": "health/6_data_wait_share",
        "data/bad_samples": "health/7_bad_samples",
    }
    evaluated = ("retrieval/", "photo/image/")
    shown_as = {key: f"{key}_val" for key in keys if key.startswith(evaluated)} | health
    assert health.keys() <= keys and set(tags) == {shown_as.get(key, key) for key in keys}
    assert {"retrieval/recall_at_1_colour_histogram_val", "retrieval/recall_at_1_untrained_val"} <= set(tags)
    assert sorted(tags)[:7] == list(health.values())
    for key in sorted(keys):
        # Steps 4 to 6 belong to the second process: what is shown is one curve.
        shown, logged = board.scalar(shown_as.get(key, key)), board.logged(key)
        assert list(shown) == list(logged) == ([3, 6] if key.startswith(evaluated) else [2, 4, 6]), key
        assert list(shown.values()) == pytest.approx(list(logged.values()), rel=1e-6), key
    assert all(0 < share < 1 for share in board.logged("speed/data_wait_share").values())


def test_one_chart_shows_recall_beside_the_baselines(board: Board) -> None:
    layout = board.ask("custom_scalars/layout")
    (chart,) = layout["category"][0]["chart"]
    assert chart["title"] == "recall@1 on split val, and baselines"
    named = ["health/2_recall_at_1", "retrieval/recall_at_1_colour_histogram", "retrieval/recall_at_1_untrained"]
    tags = board.ask("scalars/tags")[FIRST]
    for pattern, name in zip(chart["multiline"]["tag"], named, strict=True):
        assert [tag for tag in tags if re.search(pattern, tag)] == [f"{name}_val"]


def test_the_panel_is_the_picture_that_was_drawn(board: Board) -> None:
    found = board.ask("images/images", run=FIRST, tag="retrieval/panel", sample=0)
    assert [image["step"] for image in found] == [3, 6]
    picture = Image.open(io.BytesIO(board.read(f"images/individualImage?{found[-1]['query']}")))
    assert np.array_equal(np.asarray(picture), board.panel)


def test_the_text_describes_the_run(board: Board) -> None:
    parts = board.ask("text/text", run=FIRST, tag="run/summary/text_summary")
    assert [part["step"] for part in parts] == [0, 4]  # once for each process
    text = re.sub(r"\s*<[^>]+>\s*", " ", parts[-1]["text"])
    text = re.sub(r"\s+", " ", text)
    for fact in (
        "method oclear",
        "optimizer.lr 0.001",
        "queries 30 documents 6",
        "in splits all 6, test 6, train 18, val 6",
        "classes 6",
        "ranks 1: 1 data-parallel x 1 tensor-parallel, cpu",
        "parameters of the class rows 96",  # 6 classes of 16
        "from step 4",
        "resumed step-00000004",
        "read_ahead: 2",
    ):
        assert fact in text, fact


def towers_said(catalogue: Path, run: Path, tensor_parallel: int) -> int:
    """The towers' parameters as the summary of a run on this layout counts them."""
    from harness.train.tensorboard import facts

    config = tiny_config(catalogue, run)
    with trainer(config, tensor_parallel, ready=False) as t:
        said = facts(t.mesh, t.loader.catalogue, t.method, 6, 16)
    return int(said["Size"]["parameters of the towers"].replace(",", ""))


def test_towers_that_are_cut_are_counted_whole(catalogue: Path, tmp_path: Path) -> None:
    with trainer(tiny_config(catalogue, tmp_path), ready=False) as t:
        twin = type(t.method.towers)(t.model_config, PlainBuilder())
        whole = sum(p.numel() for p in twin.parameters())
    assert ranks(2).run(towers_said, catalogue, tmp_path, 2) == [whole, whole]


def test_runs_stand_side_by_side_in_hparams(board: Board) -> None:
    statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
    body = {"experimentName": "", "allowedStatuses": statuses, "colParams": [], "startIndex": 0, "sliceSize": 9}
    groups = board.ask("hparams/session_groups", body)["sessionGroups"]
    assert {group["name"] for group in groups} == {FIRST, SECOND}
    first, second = sorted(groups, key=lambda group: group["name"])
    assert (first["hparams"]["optimizer.lr"], second["hparams"]["optimizer.lr"]) == (1e-3, 2e-3)
    assert first["hparams"]["head.margin"] == "[1.0, 0.0, 0.1]" and first["hparams"]["method"] == "oclear"
    assert first["sessions"][0]["status"] == "STATUS_SUCCESS"
    values = {metric["name"]["tag"]: metric["value"] for metric in first["metricValues"]}
    assert values["health/2_recall_at_1_val"] == pytest.approx(board.logged("retrieval/recall_at_1")[6])
    assert values["retrieval/map_val"] == pytest.approx(board.logged("retrieval/map")[6])
    columns = board.ask("hparams/experiment", {"experimentName": "", "includeMetrics": True})
    assert {column["name"] for column in columns["hparamInfos"][:2]} == {"optimizer.lr", "train.steps"}, "what differs"


def test_the_projector_holds_the_last_evaluations_documents(board: Board, catalogue: Path) -> None:
    (embedding,) = board.ask("projector/info", run=FIRST)["embeddings"]
    query = {"run": FIRST, "name": embedding["tensorName"]}
    assert embedding["tensorName"] == "documents at step 6" and embedding["tensorShape"] == [4, 16]
    vectors = np.frombuffer(board.read("projector/tensor", **query), dtype=np.float32).reshape(4, 16)
    assert np.array_equal(vectors, board.vectors[[i // 6 for i in SHOWN]])
    rows = [line.split("\t") for line in board.read("projector/metadata", **query).decode().splitlines()]
    assert rows[0] == ["sample_id", "title", "class_key", "item", "colour", "shape"]
    assert rows[1:4:2] == [
        ["0", "red disc no 0", "c0", "d0", "red", "disc"],
        ["18", "yellow disc no 3", "c3", "d3", "yellow", "disc"],
    ]
    assert [int(row[0]) for row in rows[1:]] == SHOWN
    sprite = Image.open(io.BytesIO(board.read("projector/sprite_image", **query))).convert("RGB")
    edge, side = embedding["sprite"]["singleImageDim"][0], math.isqrt(len(SHOWN))
    assert sprite.size == (side * edge, side * edge)
    for place, sample in enumerate(SHOWN):
        left, top = place % side * edge, place // side * edge
        drawn = np.asarray(sprite.crop((left, top, left + edge, top + edge))).mean((0, 1))
        assert drawn == pytest.approx(np.asarray(picture(Catalogue(catalogue), sample)).mean((0, 1)), abs=25), sample


@pytest.mark.parametrize("wanted", [0, 1, 99])
def test_any_number_of_projected_documents(catalogue: Path, tmp_path: Path, wanted: int) -> None:
    with trainer(tiny_config(catalogue, tmp_path, **{"evaluation.projector": wanted}), ready=False) as t:
        sample = t.validation.evaluation.run(t.method).sample
        if wanted:
            (tmp_path / "tensorboard").mkdir()
            t.validation.projector.write(1, sample)
    assert sample.ids.tolist() == [0, 6, 12, 18, 24, 30][:wanted]
    assert (tmp_path / "tensorboard").exists() == bool(wanted)


def sample_of(catalogue: Path, tensor_parallel: int) -> Any:
    settings = {"evaluation.projector": 4, "evaluation.batch_size": 4}
    with trainer(tiny_config(catalogue, UNUSED, **settings), tensor_parallel, ready=False) as t:
        report: Report = t.validation.evaluation.run(t.method)
        return None if report.sample is None else (report.sample.ids.tolist(), report.sample.vectors)


@pytest.mark.full
def test_the_projected_vectors_do_not_depend_on_the_ranks(catalogue: Path) -> None:
    ((ids, vectors),) = ranks(1).run(sample_of, catalogue, 1)
    assert ids == SHOWN
    found = ranks(3).run(sample_of, catalogue, 1)
    assert found[1:] == [None, None]
    assert found[0][0] == ids and torch.equal(found[0][1], vectors)


def test_a_browser_shows_health_first(board: Board, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --virtual-time-budget=10000"
    )
    command = [chromium, *flags.split(), f"--user-data-dir={tmp_path}"]
    page = subprocess.run(
        [*command, "--dump-dom", f"{board.url}#timeseries"], capture_output=True, text=True, timeout=60
    )
    titles = re.findall(r'class="group-title" title="([^"]+)"', page.stdout)
    assert titles[0] == "health" and {"photo", "retrieval"} <= {*titles}, page.stdout[-500:] + page.stderr[-500:]
    assert re.findall(r'title="(health/[^"]+)"', page.stdout)[:2] == ["health/1_loss", "health/2_recall_at_1_val"]


def test_a_profile_of_the_steps_asked_for(catalogue: Path, tmp_path: Path) -> None:
    settings = {"train.steps": 4, "train.profile_steps": "1:3"}
    with trainer(tiny_config(catalogue, tmp_path / "run", **settings)) as t:
        t.fit()
    (trace,) = (tmp_path / "run/tensorboard/profile").iterdir()
    assert trace.name == "steps-1-3.rank-0.pt.trace.json.gz"
    names = {
        event["name"] for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"] if "name" in event
    }
    assert any("scaled_dot_product" in name for name in names) and any("MarginSoftmax" in name for name in names)
    with pytest.raises(UserError, match=r"train.profile_steps is '3:1'. Give FIRST:LAST"):
        tiny_config(catalogue, tmp_path / "run", **{"train.profile_steps": "3:1"})
