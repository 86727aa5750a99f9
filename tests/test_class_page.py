"""The page of classes made of clicks: right figures and pictures, escaped texts, bounded, no overflow on a phone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.catalogue.catalogue import Catalogue
from harness.commands import govern, ingest
from harness.evaluate import class_page
from harness.evaluate.class_page import write_report
from harness.evaluate.pairwise import pairwise
from tests.browser import measured
from tests.catalogues import draw_rows, write_manifest
from tests.test_report import EVIL, alike, pictures_of


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 products with 4 trained photos each; one photo clicks another product's document, weakly; one photo has no
    click.
    """
    folder = tmp_path_factory.mktemp("clicked")
    rows = draw_rows(folder, classes=6, queries=6, size=64, seed=0)
    rows[0]["title"] = f"red disc {EVIL}"
    write_manifest(folder / "manifest.tsv", rows)
    ingest.run(ingest.IngestConfig(manifest=folder / "manifest.tsv", images=folder, out=folder / "catalogue"))
    trained = [row["id"] for row in rows if row["kind"] == "query" and row["split"] == "train"]
    log = [(query, f"d{query[1]}", 3, 4) for query in trained if query != "q5-4"] + [("q0-1", "d1", 2, 50)]
    names = ("query", "document", "clicks", "impressions")
    pq.write_table(
        pa.table(dict(zip(names, map(list, zip(*log, strict=True)), strict=True))), folder / "clicks.parquet"
    )
    govern.run(govern.GovernConfig(catalogue=folder / "catalogue", clicks=folder / "clicks.parquet"))
    return folder


@pytest.fixture(scope="module")
def page(shop: Path) -> tuple[dict[str, Any], str]:
    """Figures and page."""
    classes = shop / "catalogue" / "classes"
    return json.loads((classes / "report.json").read_text()), (classes / "report.html").read_text()


def test_the_figures_are_those_of_the_classes(page: tuple[dict[str, Any], str], shop: Path) -> None:
    facts, text = page
    assert (facts["num_classes"], facts["queries"], facts["documents"]) == (6, 23, 6)
    assert facts["class_sizes"] == {"3-4": 1, "5-8": 5}
    assert facts["edges"] == {"kept": 23, "support": 1} and facts["quarantined"] == {"no clicks": 1}
    assert [strip["size"] for strip in facts["largest_classes"]] == [5, 5, 5, 5, 5, 4]
    (edge,) = facts["suspected_noise"]
    assert (edge["clicks"], edge["impressions"], edge["reason"]) == (2, 50, "support")
    least = facts["most_doubtful_classes"][0]
    assert least["purity"] == min(strip["purity"] for strip in facts["largest_classes"]) < 1
    assert "clicks 2 of impressions 50" in text and "no clicks" in text
    meta = json.loads((shop / "catalogue/classes/governance.json").read_text())
    assert {name: facts[name] for name in meta} == meta


def test_the_page_shows_the_right_pictures(page: tuple[dict[str, Any], str], shop: Path) -> None:
    facts, text = page
    catalogue = Catalogue(shop / "catalogue")
    images = catalogue.table(["image"]).to_pydict()["image"]
    shown = pictures_of(text, "Largest classes")
    wanted = [sample for strip in facts["largest_classes"] for sample in strip["samples"]]
    assert len(shown) == len(wanted) == 29
    assert all(alike(picture, shop / images[sample]) for picture, sample in zip(shown, wanted, strict=True))
    noise = pictures_of(text, "Suspected noise")
    edge = facts["suspected_noise"][0]
    assert len(noise) == 2
    assert all(
        alike(picture, shop / images[edge[kind]]) for picture, kind in zip(noise, ("query", "document"), strict=True)
    )


def test_texts_are_escaped_and_a_phone_shows_the_page_without_overflow(
    page: tuple[dict[str, Any], str], shop: Path, tmp_path: Path
) -> None:
    _, text = page
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "http:" not in text and "https:" not in text
    file = shop / "catalogue" / "classes" / "report.html"
    for width, (taken, there, shown) in zip((390, 1280), measured(file, (390, 1280), tmp_path), strict=True):
        assert taken <= width and there == shown == text.count("<img ") > 60


def test_pictures_do_not_grow_with_the_catalogue(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_page, "STRIPS", 2)
    monkeypatch.setattr(class_page, "PHOTOS", 1)
    classes = shop / "catalogue" / "classes"
    for name in class_page.VIEWS:
        (tmp_path / f"{name}.parquet").symlink_to(classes / f"{name}.parquet")
    write_report(Catalogue(shop / "catalogue"), tmp_path, json.loads((classes / "governance.json").read_text()))
    facts = json.loads((tmp_path / "report.json").read_text())
    names = ("sample_classes", "largest_classes", "purest_classes", "most_doubtful_classes")
    assert [len(facts[name]) for name in names] == [2] * 4
    assert (tmp_path / "report.html").read_text().count("<img ") == 4 * 2 * 2 + 2
    assert [strip["size"] for strip in facts["sample_classes"]] == [5, 4], "from the largest to the smallest"


def test_pairwise_counts_pairs() -> None:
    truth = np.array([0, 0, 0, 1, 1, 2])
    assert pairwise(truth, truth) == (1.0, 1.0)
    assert pairwise(np.zeros(6, np.int64), truth) == (4 / 15, 1.0)
    assert pairwise(np.array([0, 0, -1, 1, -1, 1]), truth) == (1 / 2, 1 / 4)
    assert pairwise(np.full(6, -1), truth) == (1.0, 0.0)
