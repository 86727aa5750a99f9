"""Loggers beside TensorBoard: Weights & Biases and MLflow, imported only where train.loggers names them.

One that fails is left out from then on, with one warning: no run ends for its logger. Both write below the run folder,
unless their own environment variables (WANDB_MODE, MLFLOW_TRACKING_URI) name a server.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from harness.core.files import printable, write_whole


class Logger(Protocol):
    """A run of a tracking service; a resumed run goes on in it."""

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        """Adds points to the curves of the figures; `step` counts finished steps."""

    def text(self, tag: str, text: str, step: int) -> None:
        """Adds a text, in Markdown."""

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """Adds an image, uint8 [H, W, 3]."""

    def finish(self, done: bool) -> None:
        """Writes everything; `done` is False for a run that may go on."""


class _Wandb:
    """Weights & Biases, offline by default: `wandb sync RUN/wandb/offline-run-*` sends what it wrote."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb  # type: ignore[import-not-found, unused-ignore]

        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "shelfmark"),
            name=folder.name,
            id=_kept(folder / "wandb_id", lambda: uuid.uuid4().hex),
            resume="allow",
            dir=folder,
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=dict(settings),
            settings=wandb.Settings(console="off", silent=True),
        )
        # Its own count only grows, and a resumed run may repeat steps.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log({**figures, "step": step})

    def text(self, tag: str, text: str, step: int) -> None:
        self._run.log({tag: self._wandb.Html(f"<pre>{text}</pre>"), "step": step})

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        self._run.log({tag: self._wandb.Image(pixels), "step": step})

    def finish(self, done: bool) -> None:
        self._run.finish(exit_code=0 if done else 1)


class _MLflow:
    """MLflow, by default in a file store: `mlflow ui --backend-store-uri RUN/mlruns` shows it."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # from 3.13 on it is refused without
        from mlflow import MlflowClient  # type: ignore[import-not-found, unused-ignore]
        from mlflow.entities import Metric  # type: ignore[import-not-found, unused-ignore]

        self._metric = Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlruns").resolve().as_uri()
        client = self._client = MlflowClient(uri)

        def begin() -> str:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "shelfmark")
            found = client.get_experiment_by_name(name)
            number = found.experiment_id if found else client.create_experiment(name)
            run = client.create_run(number, run_name=folder.name).info.run_id
            for key, value in settings.items():
                client.log_param(run, key, value)
            return run

        self._run = _kept(folder / "mlflow_id", begin)
        client.update_run(self._run, status="RUNNING")

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(
            self._run, metrics=[self._metric(key, value, now, step) for key, value in figures.items()]
        )

    def text(self, tag: str, text: str, step: int) -> None:
        self._client.log_text(self._run, text, f"{tag}-{step:08d}.md")

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        self._client.log_image(self._run, pixels, key=tag, step=step)

    def finish(self, done: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if done else "KILLED")


LOGGERS: Mapping[str, Callable[[Path, Mapping[str, Any]], Logger]] = {"wandb": _Wandb, "mlflow": _MLflow}  # by package


def missing(names: Iterable[str]) -> list[str]:
    """An error for each logger whose package is not installed."""
    absent = [name for name in names if getattr(importlib.util.find_spec(name), "origin", None) is None]
    return [f"train.loggers names {name}, which is not installed: pip install {name}" for name in absent]


class Loggers:
    """All loggers of a run beside TensorBoard; their errors are warnings.

    Args:
        names: of LOGGERS.
        folder: the run folder.
        settings: dotted keys of the configuration -> plain values.
    """

    def __init__(self, names: Iterable[str], folder: Path, settings: Mapping[str, Any]) -> None:
        self._made: dict[str, Logger] = {}
        for name in names:
            self._guarded(name, partial(self._make, name, folder, settings))

    def each(self, call: Callable[[Logger], None]) -> None:
        """Calls every logger that has not failed so far."""
        for name, logger in [*self._made.items()]:
            self._guarded(name, partial(call, logger))

    def _make(self, name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        self._made[name] = LOGGERS[name](folder, settings)

    def _guarded(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # a service's library may raise anything
            self._made.pop(name, None)
            reason = printable(f"{type(error).__name__}: {' '.join(str(error).split())}", 300)
            print(f"warning: the logger {name} failed and is left out ({reason})", file=sys.stderr)


def _kept(file: Path, make: Callable[[], str]) -> str:
    """Content of `file`; of a new one, what make() returns."""
    if not file.exists():
        write_whole(file, make())
    return file.read_text()
