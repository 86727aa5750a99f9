"""Pictures of an evaluation in TensorBoard: queries with their best documents, and the projector. Only on rank 0."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from tensorboard.plugins import projector as plugin  # type: ignore[import-untyped]

from harness.catalogue.catalogue import Catalogue
from harness.catalogue.pixels import Colour
from harness.data.preprocess import WHITE, PreprocessSpec
from harness.evaluate.contact_sheet import LONGEST, draw_panel, picture, text_picture
from harness.evaluate.evaluation import Report
from harness.evaluate.explain import attention_picture, parts_picture
from harness.evaluate.ranking import Embedded
from harness.train.tensorboard import Board, one_line

THUMBNAIL = 64  # pixels
_ANGLES = str.maketrans("<>", "\u2039\u203a")  # a title is no markup, wherever it is shown
LARGEST_SPRITE = 8192  # pixels; what WebGL takes as one texture


class Projector:
    """Document embeddings of the newest evaluation, with thumbnails, in TensorBoard's PROJECTOR.

    SummaryWriter.add_embedding would list every evaluation and draw the same thumbnails each time. TensorBoard reads
    these files once: to show new ones it must be started again.

    Args:
        folder: the run's tensorboard/.
        catalogue: of the documents.
        threads: number of threads that decode pictures.
        background: colour behind transparent pixels.
    """

    def __init__(self, folder: Path, catalogue: Catalogue, threads: int, background: Colour) -> None:
        self.folder, self.catalogue, self.threads, self.background = folder, catalogue, threads, background
        self._drawn: list[int] = []
        self._edge = THUMBNAIL

    def write(self, step: int, documents: Embedded) -> None:
        """Replaces the shown documents; their ids are sample ids of the catalogue, ascending."""
        ids = documents.ids.tolist()
        (self.folder / "projector").mkdir(exist_ok=True)
        if ids != self._drawn:
            self._draw(ids)
            self._drawn = ids
        new = self.folder / "projector" / "vectors.new"
        np.savetxt(new, documents.vectors.numpy(), fmt="%.9g", delimiter="\t")  # 9 digits give float32 back exactly
        new.replace(new.with_suffix(".tsv"))  # TensorBoard may be reading
        info = plugin.EmbeddingInfo(
            tensor_name=f"documents at step {step}",
            tensor_path="projector/vectors.tsv",
            metadata_path="projector/metadata.tsv",
        )
        info.sprite.image_path = "projector/sprite.png"
        info.sprite.single_image_dim.extend([self._edge, self._edge])
        plugin.visualize_embeddings(str(self.folder), plugin.ProjectorConfig(embeddings=[info]))

    def _draw(self, ids: list[int]) -> None:
        """Writes thumbnails, row by row in a square, and a table of the documents' texts and attributes."""
        columns = ["title", "class_key", "item", *self.catalogue.attributes]
        rows = self.catalogue.rows(ids, columns)
        names = ["sample_id", *columns]
        lines = ["\t".join(names)]
        for row in rows:
            lines.append("\t".join(one_line(row[name])[:LONGEST].translate(_ANGLES) for name in names))
        (self.folder / "projector" / "metadata.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")

        side = math.ceil(math.sqrt(len(ids)))
        edge = self._edge = min(THUMBNAIL, LARGEST_SPRITE // side)
        sprite = Image.new("RGB", (side * edge, side * edge), "white")
        with ThreadPoolExecutor(self.threads) as pool:
            small = pool.map(lambda i: ImageOps.fit(picture(self.catalogue, i, self.background), (edge, edge)), ids)
            for place, image in enumerate(small):
                sprite.paste(image, (place % side * edge, place // side * edge))
        sprite.save(self.folder / "projector" / "sprite.png")


def show(report: Report, step: int, board: Board, projector: Projector, spec: PreprocessSpec) -> None:
    """Shows an evaluation after `step` finished steps; `spec` is the run's."""
    board.image("retrieval/panel", draw_panel(panel_rows(report, projector.catalogue, spec.background)), step)
    if report.why:
        board.image("retrieval/why", draw_panel(why_rows(report, projector.catalogue, spec)), step)
    if report.sample is not None and len(report.sample.ids):
        projector.write(step, report.sample)


def panel_rows(report: Report, catalogue: Catalogue, background: Colour = WHITE) -> list[Any]:
    """The report's panel for `draw_panel`: a row for each query, its documents as (picture, title, relevant)."""
    found = sorted({i for _, best, _ in report.panel for i in best if i < catalogue.num_samples})
    titles = {row["sample_id"]: row["title"] for row in catalogue.rows(found, ["title"])}
    rows = []
    for query, best, relevant in report.panel:
        shown = _asked(query, catalogue, background)
        # Distractors are left out: their pictures lie in other catalogues.
        known = [(i, right) for i, right in zip(best, relevant, strict=True) if i in titles]
        rows.append((shown, [(picture(catalogue, i, background), titles[i], right) for i, right in known]))
    return rows


def why_rows(report: Report, catalogue: Catalogue, spec: PreprocessSpec) -> list[Any]:
    """Rows for `draw_panel`: a query, its first document, the patches that the document's text looked at, where the
    method has such, and the parts of the document's vector.
    """
    rows = []
    for query, best, relevant in report.panel:
        if not best or (why := report.why.get(best[0])) is None:
            continue
        image = picture(catalogue, best[0], spec.background)
        (row,) = catalogue.rows([best[0]], ["title"])
        cells: list[Any] = [(image, row["title"], relevant[0])]
        if why.attention is not None:
            cells.append((attention_picture(image, why.attention, spec), "patches its text looked at", None))
        rows.append((_asked(query, catalogue, spec.background), [*cells, (parts_picture(why), str(why), None)]))
    return rows


def _asked(query: int | str, catalogue: Catalogue, background: Colour) -> Image.Image:
    return text_picture(query) if isinstance(query, str) else picture(catalogue, query, background)
