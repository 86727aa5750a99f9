"""TensorBoard of a run: health first, then the rest by subject. Only on rank 0."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageOps
from tensorboard.plugins import projector  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from harness.catalogue.catalogue import Catalogue
from harness.core.mesh import Mesh
from harness.evaluate.contact_sheet import LONGEST, picture
from harness.evaluate.ranking import Embedded
from harness.train.config import RunConfig
from models.method import Method

# TensorBoard sorts groups, and the curves in a group, by name; "health" comes before retrieval, step_seconds and train,
# and the numbers put first what is asked first. So the first screen tells whether the run is well.
_FIRST = (
    "train/loss retrieval/recall_at_1 train/gradient_norm train/learning_rate speed/images_per_second speed/data_wait_share "
    "data/bad_samples"
).split()
# Key of log.jsonl -> tag, where the two differ: train/loss -> health/1_loss.
HEALTH = {key: f"health/{n}_{key.split('/')[1]}" for n, key in enumerate(_FIRST, 1)}
# Compared in HPARAMS beside the method's own keys, those directly under `model`; what a run lacks is left out.
HYPERPARAMETERS = (
    "method seed model.vision.image_size model.vision.num_layers model.vision.hidden_size "
    "model.text.num_layers model.text.hidden_size head.scale head.margin data.queries_per_step data.documents_per_step "
    "optimizer.lr optimizer.warmup_steps optimizer.weight_decay train.steps train.precision train.margin_warmup"
).split()
THUMBNAIL = 64
LARGEST_SPRITE = 8192  # pixels; what WebGL takes as one texture


class Board:
    """The event file of one process.

    Args:
        folder: the run's tensorboard/.
        first: step at which this process starts; TensorBoard drops what an earlier process wrote of later ones.
    """

    def __init__(self, folder: Path, first: int) -> None:
        # Also where nothing is to be dropped: TensorBoard obeys every such mark but a run's first.
        self._writer = SummaryWriter(str(folder), purge_step=first + 1)

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
        """The run in words (TEXT) and its hyper-parameters (HPARAMS); the run folder explains itself already."""
        settings = config.to_dict()
        own = [f"model.{name}" for name, value in settings["model"].items() if not isinstance(value, Mapping)]
        values = {key: value for key in [*HYPERPARAMETERS, *own] if (value := _at(settings, key)) is not None}
        facts = _facts(mesh, catalogue, method, classes, config.model.embedding_dim)
        versions = json.loads((config.run_dir / "versions.json").read_text())
        begun = {"from step": step, **{f"note {n}": note for n, note in enumerate(notes, 1)}}
        tables = {"Recipe": values, **facts, "Start": begun, "Versions": versions}
        self._writer.add_text("run/summary", _markdown(tables, settings), step)
        plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in values.items()}
        # Not add_hparams, which makes a run of its own. Nor the list of columns: TensorBoard would take the first run's
        # for all runs; without it TensorBoard joins those of all runs, those that differ first, and takes the scalars'
        # last values as metrics.
        _, start, self._end = hparams(plain, {})
        self._add(start)

    def finish(self) -> None:
        """Marks the run as finished in HPARAMS."""
        self._add(self._end)

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures under their keys of log.jsonl."""
        for name, value in figures.items():
            self._writer.add_scalar(HEALTH.get(name, name), value, step)

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """uint8 [H, W, 3]."""
        self._writer.add_image(tag, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()

    def _add(self, summary: Any) -> None:
        self._writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]


class Projector:
    """Document embeddings with thumbnails in TensorBoard's PROJECTOR: those of the newest evaluation alone.

    SummaryWriter.add_embedding would list every evaluation and draw the same thumbnails each time. TensorBoard reads
    these files once: one that was started before has to be started again to show them.

    Args:
        folder: the run's tensorboard/.
        catalogue: of the documents.
        threads: that decode pictures.
    """

    def __init__(self, folder: Path, catalogue: Catalogue, threads: int) -> None:
        self.folder, self.catalogue, self.threads = folder, catalogue, threads
        self._drawn: list[int] = []
        self._edge = THUMBNAIL

    def write(self, step: int, documents: Embedded) -> None:
        """Replaces what is shown; ids are sample ids of the catalogue, ascending."""
        ids = documents.ids.tolist()
        (self.folder / "projector").mkdir(exist_ok=True)
        if ids != self._drawn:
            self._draw(ids)
            self._drawn = ids
        new = self.folder / "projector" / "vectors.new"
        np.savetxt(new, documents.vectors.numpy(), fmt="%.9g", delimiter="\t")  # 9 digits give float32 back exactly
        new.replace(new.with_suffix(".tsv"))  # TensorBoard may be reading
        info = projector.EmbeddingInfo(
            tensor_name=f"documents at step {step}",
            tensor_path="projector/vectors.tsv",
            metadata_path="projector/metadata.tsv",
        )
        info.sprite.image_path = "projector/sprite.png"
        info.sprite.single_image_dim.extend([self._edge, self._edge])
        projector.visualize_embeddings(str(self.folder), projector.ProjectorConfig(embeddings=[info]))

    def _draw(self, ids: list[int]) -> None:
        """Thumbnails, row by row in a square, and a table of what is known of each document."""
        columns = ["title", "class_key", "item", *self.catalogue.attributes]
        rows = self.catalogue.rows(ids, columns)
        lines = ["\t".join(["sample_id", *columns])]
        lines += ["\t".join(_one_line(row[name])[:LONGEST] for name in ["sample_id", *columns]) for row in rows]
        (self.folder / "projector" / "metadata.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")

        side = math.ceil(math.sqrt(len(ids)))
        edge = self._edge = min(THUMBNAIL, LARGEST_SPRITE // side)
        sprite = Image.new("RGB", (side * edge, side * edge), "white")
        with ThreadPoolExecutor(self.threads) as pool:
            small = pool.map(lambda i: ImageOps.fit(picture(self.catalogue, i), (edge, edge)), ids)
            for place, image in enumerate(small):
                sprite.paste(image, (place % side * edge, place // side * edge))
        sprite.save(self.folder / "projector" / "sprite.png")


def _facts(mesh: Mesh, catalogue: Catalogue, method: Method, classes: int, width: int) -> dict[str, dict[str, Any]]:
    """Heading -> name -> value, of what no configuration says; `width` is that of a class row."""
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
        lines = [f"| {name} | {_one_line(value).replace('|', '&#124;')} |" for name, value in rows.items()]
        parts.append("\n".join([f"| **{heading}** | |", "|---|---|", *lines]))
    text = yaml.safe_dump(dict(settings), sort_keys=False)
    parts += ["**Configuration**", "".join(f"    {line}\n" for line in text.splitlines())]
    return "\n\n".join(parts)


def _one_line(value: Any) -> str:
    return "" if value is None else " ".join(str(value).split())


def _at(settings: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
