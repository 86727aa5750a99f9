"""TensorBoard of a run: health first, then all else by subject, which other loggers get too. Only on rank 0."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from harness.catalogue.catalogue import Catalogue
from harness.core.cli import leaves
from harness.core.files import printable
from harness.core.mesh import Mesh
from harness.train.config import RunConfig
from harness.train.loggers import Loggers
from models.method import Method

LONGEST = 2000  # characters of a value
# TensorBoard sorts groups, and the curves in a group, by name. "health" comes before retrieval, step_seconds and train,
# and numbers order its curves, so that the first screen tells whether the run is well.
_FIRST = (
    "train/loss retrieval/recall_at_1 train/gradient_norm train/learning_rate speed/images_per_second "
    "speed/data_wait_share data/bad_samples"
).split()
# Key of log.jsonl -> tag, where the two differ besides the split: train/loss -> health/1_loss.
HEALTH = {key: f"health/{n}_{key.split('/')[1]}" for n, key in enumerate(_FIRST, 1)}
# Compared in HPARAMS beside the method's own keys, those directly under `model`; what a run lacks is left out.
HYPERPARAMETERS = (
    "method seed model.vision.image_size model.vision.num_layers model.vision.hidden_size "
    "model.text.num_layers model.text.hidden_size head.scale head.margin data.queries_per_step data.documents_per_step "
    "optimizer.lr optimizer.warmup_steps optimizer.weight_decay train.steps train.precision train.margin_warmup"
).split()


def tag(key: str, split: str = "") -> str:
    """TensorBoard's tag of a key of log.jsonl; the figures of an evaluation end in its split."""
    return f"{HEALTH.get(key, key)}{split and f'_{split}'}"


class Board:
    """Event file of one process.

    Args:
        folder: the run's tensorboard/.
        first: step at which this process starts; TensorBoard drops an earlier process's points of later steps.
    """

    def __init__(self, folder: Path, first: int) -> None:
        # Set even where nothing is to be dropped: TensorBoard obeys every such mark except a run's first.
        self._writer = SummaryWriter(str(folder), purge_step=first + 1)
        self._others = Loggers((), folder, {})
        self._done = False

    def introduce(
        self,
        step: int,
        config: RunConfig,
        mesh: Mesh,
        catalogue: Catalogue,
        method: Method,
        classes: int,
        notes: list[str],
    ) -> None:
        """Writes the run's summary (TEXT) and its hyper-parameters (HPARAMS); reads versions.json of the run folder."""
        settings = config.to_dict()
        own = [f"model.{name}" for name, value in settings["model"].items() if not isinstance(value, Mapping)]
        values = {key: value for key in [*HYPERPARAMETERS, *own] if (value := _at(settings, key)) is not None}
        known = facts(mesh, catalogue, method, classes, config.model.embedding_dim)
        versions = json.loads((config.run_dir / "versions.json").read_text())
        begun = {"from step": step, **{f"note {n}": note for n, note in enumerate(notes, 1)}}
        tables = {"Recipe": values, **known, "Start": begun, "Versions": versions}
        text = _markdown(tables, settings)
        self._writer.add_text("run/summary", text, step)
        self._others = Loggers(config.train.loggers, config.run_dir, dict(leaves(settings)))
        self._others.each(lambda logger: logger.text("run/summary", text, step))
        plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in values.items()}
        # add_hparams would make a run of its own. A list of columns is left out too: TensorBoard would use the first
        # run's for all runs. Without it TensorBoard joins the columns of all runs, those that differ first, and takes
        # the scalars' last values as metrics.
        _, start, self._end = hparams(plain, {})
        self._add(start)

    def finish(self) -> None:
        """Marks the run as finished, in HPARAMS too."""
        self._done = True
        self._add(self._end)

    def scalars(self, step: int, figures: Mapping[str, float], split: str = "") -> None:
        """Adds points to the curves of the figures, given by their keys of log.jsonl; `split`: of an evaluation's."""
        for name, value in figures.items():
            self._writer.add_scalar(tag(name, split), value, step)
        named = {f"{name}{split and f'_{split}'}": value for name, value in figures.items()}
        self._others.each(lambda logger: logger.scalars(step, named))

    def compare(self, recalls: Sequence[str], split: str) -> None:
        """Shows curves, given by their keys of log.jsonl, in one chart (CUSTOM SCALARS)."""
        tags = [tag(name, split) for name in recalls]
        chart: list[Any] = ["Multiline", [f"^{re.escape(name)}$" for name in tags]]
        self._writer.add_custom_scalars({"retrieval": {f"recall@1 on split {split}, and baselines": chart}})

    def warn(self, lines: Sequence[str], step: int) -> None:
        """Adds warnings (TEXT)."""
        text = "\n\n".join(_plain(line) for line in lines)
        self._writer.add_text("run/warnings", text, step)
        self._others.each(lambda logger: logger.text("run/warnings", text, step))

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """Adds an image, uint8 [H, W, 3]."""
        self._writer.add_image(tag, pixels, step, dataformats="HWC")
        self._others.each(lambda logger: logger.image(tag, pixels, step))

    def close(self) -> None:
        """Flushes and closes the event file, and the other loggers."""
        self._writer.close()
        self._others.each(lambda logger: logger.finish(self._done))

    def _add(self, summary: Any) -> None:
        self._writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]


def facts(mesh: Mesh, catalogue: Catalogue, method: Method, classes: int, width: int) -> dict[str, dict[str, Any]]:
    """Facts beyond the configuration: heading -> name -> value. `width` is that of a class row."""
    tp, counts = mesh.tp.size(), catalogue.meta["counts"]
    towers = sum(
        p.numel() * (tp if getattr(p, "tensor_model_parallel", False) else 1) for p in method.towers.parameters()
    )
    return {
        "Catalogue": {
            "folder": catalogue.path,
            "samples": catalogue.num_samples,
            "queries": counts["query"],
            "documents": counts["document"],
            "in splits": ", ".join(f"{name} {count}" for name, count in counts["splits"].items()),
            "classes": classes,
        },
        "Size": {
            "ranks": f"{mesh.world_size}: {mesh.dp.size()} data-parallel x {tp} tensor-parallel, {mesh.device.type}",
            "parameters of the towers": f"{towers:,}",
            "parameters of the class rows": f"{classes * width if method.head else 0:,}",
        },
    }


def _markdown(tables: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """A table for each heading, then the whole configuration as YAML, indented as code."""
    parts = []
    for heading, rows in tables.items():
        lines = [f"| {name} | {_plain(value)} |" for name, value in rows.items()]
        parts.append("\n".join([f"| **{heading}** | |", "|---|---|", *lines]))
    text = yaml.safe_dump(dict(settings), sort_keys=False)
    parts += ["**Configuration**", "".join(f"    {line}\n" for line in text.splitlines())]
    return "\n\n".join(parts)


def _plain(value: Any) -> str:
    """One line of Markdown that shows a value and is no markup: TensorBoard loads the pictures that a text links to."""
    return re.sub(r"[^\w\s.,:;/%=+()-]", lambda sign: f"&#{ord(sign[0])};", one_line(value))


def one_line(value: Any) -> str:
    """Text of a value as one line without control characters; empty for None."""
    return "" if value is None else printable(" ".join(str(value).split()), LONGEST)


def _at(settings: Mapping[str, Any], key: str) -> Any:
    """Value of a dotted key; None if it is missing."""
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
