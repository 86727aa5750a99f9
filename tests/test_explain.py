"""Why a document was found: the same on every number of ranks, in pictures, in the artefact, in search."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from harness.artefact.artefact import Artefact
from harness.catalogue.catalogue import Catalogue
from harness.commands import export, ingest, search
from harness.core import manifest as checksums
from harness.core.errors import UserError
from harness.core.mesh import Mesh, MeshConfig
from harness.data.preprocess import PreprocessSpec
from harness.evaluate.contact_sheet import CELL
from harness.evaluate.embed import Embedder, side_of
from harness.evaluate.evaluation import Evaluation, Report
from harness.evaluate.explain import SHADE, Why, attention_picture, explain, parts_picture
from harness.evaluate.report_page import draw_report
from harness.text.tokenizer import Tokenizer
from harness.train.open_run import find_checkpoint, load_method, open_settings
from harness.train.panels import why_rows
from models.batch import Batch
from tests.catalogues import COLUMNS, draw_rows, make_catalogue, write_manifest
from tests.pool import ranks
from tests.runs import UNUSED, tiny_config, trainer

SUM = {"model.fusion_kind": "sum", "model.fusion_weights": [1.0, 0.7, 0.4], "evaluation.panel": 6}
PARTS = ("image", "steered", "text")
FULL = pytest.mark.full


def evaluated(catalogue: Path, settings: dict[str, Any], tensor_parallel: int = 1) -> tuple[Report, dict[int, Any]]:
    """The weights that the seed gives; and of each explained document what its own batch says."""
    with trainer(tiny_config(catalogue, UNUSED, **settings), tensor_parallel, ready=False) as t, torch.no_grad():
        evaluation: Evaluation = t.validation.evaluation
        report = evaluation.run(t.method, worst=3)
        t.method.towers.eval()
        documents = evaluation.documents[0]

        def said(batch: Batch) -> Tensor:
            found = t.method.explain_document(batch)
            return torch.cat([found.shares, found.weights, found.attention], 1)

        alone = {}
        for number in report.why:
            side = documents.select(documents.rows_of(np.array([number])))
            ((_, values, _),) = evaluation.embedder.stream(t.method, side, said, [range(1)])
            alone[number] = values[0].numpy()
        if t.mesh.rank == 0:
            draw_report(report, evaluation, "drawn")
        return report, alone


def shown(report: Report) -> set[int]:
    ids = {best[0] for _, best, _ in report.panel}
    for found in report.found.values():
        for miss in found.failures.worst if found.failures else ():
            ids |= {miss.answer, *(number for number, _, _ in miss.best)}  # type: ignore[arg-type]
    return ids


def require_equal(report: Report, alone: dict[int, Any]) -> None:
    assert report.why.keys() == alone.keys() and len(alone) >= 3
    for number, values in alone.items():
        why = report.why[number]
        assert [*why.shares] == [*PARTS] == [*why.weights]
        told = [*why.shares.values(), *why.weights.values(), *np.asarray(why.attention)]
        np.testing.assert_allclose(told, values, rtol=1e-5, atol=1e-6)
        assert sum(told[:3]) == pytest.approx(1) and told[3:6] == pytest.approx([1.0, 0.7, 0.4])
        assert len(told) == 6 + 16 and sum(told[6:]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("world", "tensor_parallel"),
    [(1, 1), pytest.param(2, 1, marks=FULL), pytest.param(2, 2, marks=FULL)],
)
def test_every_rank_explains_each_shown_document_as_its_own_batch_does(
    catalogue: Path, world: int, tensor_parallel: int
) -> None:
    found = ranks(world).run(evaluated, catalogue, SUM, tensor_parallel)
    first = found[0][0]
    assert first.why.keys() == shown(first)
    for report, alone in found:
        require_equal(report, alone)
        assert report.why.keys() == first.why.keys()


@FULL
def test_what_has_no_parts_or_is_seen_in_part_is_not_explained(catalogue: Path) -> None:
    for settings in ({"model.fusion_kind": "concat"}, {**SUM, "evaluation.views": ["image"]}):
        assert evaluated(catalogue, settings)[0].why == {}


def test_rows_of_the_panel_have_a_picture_of_the_attention_and_one_of_the_parts(catalogue: Path) -> None:
    report, _ = evaluated(catalogue, SUM)
    rows = why_rows(report, Catalogue(catalogue), PreprocessSpec(image_size=32))
    assert len(rows) == 6
    for (_, cells), (_, best, relevant) in zip(rows, report.panel, strict=True):
        assert [cell[2] for cell in cells] == [relevant[0], None, None]
        assert cells[1][0].size == cells[2][0].size == (CELL, CELL)
        assert cells[2][1] == str(report.why[best[0]]) and "image " in cells[2][1]


def test_the_darkest_patch_has_the_least_attention_and_the_window_is_the_towers() -> None:
    """A picture that is white where the towers look, twice as wide as high; 4 patches."""
    image = Image.new("RGB", (200, 100), "red")
    image.paste("white", (60, 10, 140, 90))  # 0.8 of the short side, centred
    spec = PreprocessSpec(image_size=32, eval_crop=0.8)
    seen = np.asarray(attention_picture(image, np.array([0.1, 0.4, 0.3, 0.2], np.float32), spec), np.float64)
    assert seen.shape == (CELL, CELL, 3) and (seen.std(2) == 0).all(), "red is outside of the window"
    half = CELL // 2
    for place, share in enumerate((0.25, 1.0, 0.75, 0.5)):
        patch = seen[place // 2 * half : place // 2 * half + half, place % 2 * half : place % 2 * half + half]
        assert np.ptp(patch) == 0 and patch.mean() == pytest.approx(255 * (1 - SHADE * (1 - share)), abs=1.5)


def test_bars_are_as_long_as_the_shares() -> None:
    why = Why({"image": 0.5, "steered": 0.75, "text": -0.25}, dict.fromkeys(PARTS, 1.0), None)
    assert str(why) == "image 50%, steered 75%, text -25%"
    drawn = np.asarray(parts_picture(why)).astype(int)
    step = CELL // 3
    lengths = [int((np.ptp(drawn[place * step + 24], axis=1) > 60).sum()) for place in range(3)]
    assert lengths == [60, 90, 0]


def exported(run: Path, out: Path, **more: Any) -> Path:
    export.run(export.ExportConfig(run=run, out=out, batch_size=4, onnx=False, golden=0, **more))
    return out


@pytest.fixture(scope="module")
def run(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explained") / "run"
    with trainer(tiny_config(catalogue, folder, **{**SUM, "train.steps": 1})) as t:
        t.fit()
    return folder


@pytest.fixture(scope="module")
def whole(run: Path) -> Path:
    return exported(run, run.parent / "whole")


def of_the_run(run: Path) -> dict[str, list[float]]:
    """Shares of each document of a run's catalogue, by its item."""
    settings = open_settings(run, 1)
    catalogue, tokenizer = Catalogue(settings.data.catalogue), Tokenizer.load(run)
    with Mesh(MeshConfig()) as mesh:
        method, model = load_method(settings, find_checkpoint(run, None, mesh), tokenizer, mesh)
        side = side_of(catalogue, "document", None, [], None, 0)
        found = explain(method, Embedder(settings.data, model, tokenizer, 4, mesh), side, side.ids)
    rows = catalogue.rows([*found], ["item"])
    return {row["item"]: [*found[row["sample_id"]].shares.values()] for row in rows}


def test_an_artefact_and_its_search_have_the_shares(run: Path, whole: Path) -> None:
    table, known = pq.read_table(whole / "documents"), of_the_run(run)
    assert table.column_names[-5:] == ["thumbnail", "part_image", "part_steered", "part_text", "embedding"]
    columns = [table.column(f"part_{name}") for name in PARTS]
    assert [column.type for column in columns] == [pa.float32()] * 3
    found, items = np.stack([column.to_numpy() for column in columns], 1), table.column("item").to_pylist()
    np.testing.assert_allclose(found, [known[item] for item in items], atol=1e-6)
    assert (found.std(0) > 0).all() and (found.std(1) > 0.01).all()
    told = search.run(search.SearchConfig(artefact=whole, item=items[0], top=3))["queries"][0]["found"]
    for hit in told:
        assert hit["parts"] == pytest.approx(dict(zip(PARTS, known[hit["id"]], strict=True)), abs=2e-6)
    assert len({hit["id"] for hit in told}) == 3


@FULL
def test_documents_are_added_with_the_columns_that_the_artefact_has(
    run: Path, whole: Path, catalogue: Path, tmp_path: Path
) -> None:
    """Also to one that an earlier version wrote, without shares."""
    few = make_catalogue(tmp_path / "few", classes=4)
    for name, older in (("new", False), ("old", True)):
        out = exported(run, tmp_path / name, catalogue=few)
        if older:
            (part,) = (out / "documents").glob("*.parquet")
            table = pq.read_table(part)
            pq.write_table(table.drop_columns([f"part_{part}" for part in PARTS]), part)
            (out / "manifest.json").unlink()
            checksums.write_manifest(out, algorithm="sha256")
            assert Artefact(out).search(Artefact(out).vector(0), 1)[0][0].parts == {}
        exported(run, out, append=True)
        opened, other = Artefact(out), Artefact(whole)
        (hits,), (wanted,) = (each.search(other.vector(5), 6) for each in (opened, other))
        assert [hit.id for hit in hits] == [hit.id for hit in wanted]
        assert [hit.parts for hit in hits] == ([{}] * 6 if older else [hit.parts for hit in wanted])


@FULL
def test_images_alone_have_no_parts(run: Path, tmp_path: Path) -> None:
    out = exported(run, tmp_path / "out", view="image")
    assert not [name for name in pq.read_schema(out / "documents/part-00000.parquet").names if "part_" in name]
    assert Artefact(out).search(Artefact(out).vector(0), 1)[0][0].parts == {}


@pytest.mark.parametrize("value", [float("nan"), *(pytest.param(value, marks=FULL) for value in (float("inf"), None))])
def test_shares_that_are_not_numbers_are_refused(whole: Path, tmp_path: Path, value: float | None) -> None:
    out = shutil.copytree(whole, tmp_path / "out")
    part = sorted((out / "documents").glob("*.parquet"))[-1]
    table = pq.read_table(part)
    place = table.column_names.index("part_steered")
    shares = [value, *table.column(place).to_pylist()[1:]]
    pq.write_table(table.set_column(place, "part_steered", pa.array(shares, pa.float32())), part)
    (out / "manifest.json").unlink()
    checksums.write_manifest(out, algorithm="sha256")
    with pytest.raises(UserError, match=rf"{part.name} has shares in part_steered that are not numbers. Export again"):
        Artefact(out)


def test_an_attribute_with_the_name_of_a_column_is_named(run: Path, tmp_path: Path) -> None:
    rows, manifest = draw_rows(tmp_path, classes=2, queries=0, size=24, seed=0), tmp_path / "manifest.tsv"
    write_manifest(manifest, [{**row, "part_text": "red"} for row in rows], (*COLUMNS, "part_text"))
    out = tmp_path / "catalogue"
    ingest.run(
        ingest.IngestConfig(manifest=manifest, images=tmp_path, out=out, attribute_columns="part_text", workers=1)
    )
    with pytest.raises(UserError, match=r"has an attribute part_text, which export writes itself. Rename it"):
        exported(run, tmp_path / "out", catalogue=out)
