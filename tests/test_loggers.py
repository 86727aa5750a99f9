"""Loggers beside TensorBoard: they get what it gets, and none that fails ends a run."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.core.errors import UserError
from harness.train import loggers
from tests.runs import tiny_config, trainer

SETTINGS: dict[str, Any] = {"train.steps": 4, "train.evaluate_every": 2}


def logged(run: Path, key: str) -> dict[int, float]:
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return {line["step"]: line[key] for line in lines if key in line}


class Noted:
    """A logger that notes what it gets, and fails from step 3 on."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.file = folder / "noted"
        self._note("settings", 0, f"{settings['train.steps']} {settings['optimizer.lr']}")

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        if step == 3:
            raise ConnectionError("no route\nto the server")
        self._note("scalars", step, " ".join(figures))

    def text(self, tag: str, text: str, step: int) -> None:
        self._note(tag, step, text.splitlines()[0])

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        self._note(tag, step, f"{pixels.dtype} {pixels.ndim} {pixels.shape[-1]}")

    def finish(self, done: bool) -> None:
        self._note("finish", 0, str(done))

    def _note(self, *words: object) -> None:
        with self.file.open("a") as file:
            print(*words, file=file)


def broken(folder: Path, settings: Mapping[str, Any]) -> loggers.Logger:
    raise RuntimeError("no account")


def test_a_logger_gets_everything_until_it_fails(
    catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loggers, "LOGGERS", {"wandb": Noted, "mlflow": broken})
    config = tiny_config(catalogue, tmp_path / "run", **SETTINGS)
    config = replace(config, train=replace(config.train, loggers=("wandb", "mlflow")))
    with trainer(config) as t:
        assert t.fit()["steps"] == 4
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warnings == [
        "warning: the logger mlflow failed and is left out (RuntimeError: no account)",
        "warning: the logger wandb failed and is left out (ConnectionError: no route to the server)",
    ]
    noted = (tmp_path / "run/noted").read_text().splitlines()
    assert noted[:2] == ["settings 0 4 0.001", "run/summary 0 | **Recipe** | |"]
    assert [line.split()[:2] for line in noted[2:]] == [
        ["scalars", "1"], ["scalars", "2"], ["scalars", "2"], ["retrieval/panel", "2"], ["retrieval/why", "2"]
    ]  # fmt: skip
    assert "train/loss" in noted[2] and "retrieval/map" in noted[4] and noted[5].endswith(" uint8 3 3")
    assert sorted(logged(tmp_path / "run", "train/loss")) == [1, 2, 3, 4]


def test_a_run_that_may_go_on_is_not_done(catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "LOGGERS", {"wandb": Noted})
    for stop_at in (1, 2):
        config = tiny_config(catalogue, tmp_path / "run", **{"train.steps": 2, "train.stop_at": stop_at})
        with trainer(replace(config, train=replace(config.train, loggers=("wandb",)))) as t:
            t.fit()
    done = [line for line in (tmp_path / "run/noted").read_text().splitlines() if line.startswith("finish")]
    assert done == ["finish 0 False", "finish 0 True"]


@pytest.mark.parametrize("name", loggers.LOGGERS)
def test_a_logger_without_its_package_is_refused(catalogue: Path, tmp_path: Path, name: str) -> None:
    if find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(UserError, match=f"train.loggers names {name}, which is not installed: pip install {name}"):
        tiny_config(catalogue, tmp_path, **{"train.loggers": [name]})


def trained(catalogue: Path, run: Path, name: str) -> None:
    """A run of 4 steps in two processes' worth of trainers, the second repeating step 3."""
    for stop_at in (3, 0):
        if not stop_at:  # as if killed after step 3, which no checkpoint holds
            (run / "checkpoints/step-00000003").rename(run / "lost")
        settings = {**SETTINGS, "train.checkpoint_every": 2, "train.stop_at": stop_at, "train.loggers": [name]}
        with trainer(tiny_config(catalogue, run, **settings)) as t:
            t.fit()


def test_mlflow(catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tmp_path / "run"
    trained(catalogue, run, "mlflow")
    client = mlflow.MlflowClient((run / "mlruns").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("shelfmark").experiment_id])
    assert found.info.status == "FINISHED" and found.info.run_name == "run"
    assert found.data.params["optimizer.lr"] == "0.001"
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [point.step for point in history] == [1, 2, 3, 3, 4]
    assert {point.step: point.value for point in history} == logged(run, "train/loss")
    files = {file.path for folder in ("images", "run") for file in client.list_artifacts(found.info.run_id, folder)}
    pictures = [file for file in files if "panel" in file and file.endswith(".png")]
    assert "run/summary-00000000.md" in files and len(pictures) == 2, files


def chunks(log: bytes) -> Iterator[bytes]:
    """Records of a log of LevelDB's format: blocks of 32 KiB with parts of records, whose kind is 1, or 2, 3 …, 4."""
    place, record = 7, b""  # behind the head of Weights & Biases
    while place + 7 <= len(log):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", log, place)
        record += log[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield record
            record = b""


def test_wandb(catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2  # type: ignore[import-not-found, unused-ignore]

    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = tmp_path / "run"
    trained(catalogue, run, "wandb")
    wandb.teardown()  # as at the end of a process: its service writes in one of its own
    points: list[tuple[int, float]] = []
    identities, pictures = set(), 0
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for data in chunks(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                identities.add(record.run.run_id)
            values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if "train/loss" in values:
                points.append((int(values["step"]), float(values["train/loss"])))
            pictures += any(key.startswith("retrieval/panel") for key in values)
    assert [step for step, _ in points] == [1, 2, 3, 3, 4] and dict(points) == logged(run, "train/loss")
    assert identities == {(run / "wandb_id").read_text()} and pictures == 2
