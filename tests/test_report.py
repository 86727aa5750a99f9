"""Pages about a catalogue and about an evaluation: right numbers, right pictures, escaped texts, no overflow."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from harness.__main__ import command
from harness.catalogue.duplicates import fingerprint, groups, near_pairs
from harness.commands import evaluate, govern, ingest
from harness.commands.report import ReportConfig, run
from harness.core.errors import UserError
from harness.evaluate.failures import Failures
from harness.evaluate.slice_rows import largest
from tests.browser import measured
from tests.catalogues import draw_rows, write_manifest
from tests.pool import ranks
from tests.runs import UNUSED, tiny_config, trainer

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalogue of 6 products with 5 photos each and 2 without, with one photo of each kind of mistake."""
    folder = tmp_path_factory.mktemp("shop")
    rows = draw_rows(folder, classes=6, queries=5, size=64, seed=0)
    photos = {(row["class_id"], row["split"]): row for row in rows if row["kind"] == "query"}
    shutil.copy(folder / photos["c0", "train"]["image"], folder / "copy.jpg")  # trained on, and asked in the test
    photos["c0", "test"]["image"] = "copy.jpg"
    picture = Image.open(folder / photos["c1", "train"]["image"]).convert("RGB")
    picture.save(folder / "again.jpg", quality=75)  # saved again, and asked in validation
    photos["c1", "val"]["image"] = "again.jpg"
    shutil.copy(folder / photos["c2", "train"]["image"], folder / "other.jpg")  # of two products
    photos["c3", "train"]["image"] = "other.jpg"
    shutil.copy(folder / rows[24]["image"], folder / "same.jpg")  # the document as a photo
    photos["c4", "val"]["image"] = "same.jpg"
    rows[0]["title"] = f"red disc {EVIL}"
    for number, size in enumerate((70, 90)):
        Image.effect_noise((size, size), 90).save(folder / f"lonely{number}.png")
        rows.append({**rows[0], "id": f"x{number}", "class_id": f"lonely{number}", "image": f"lonely{number}.png"})
    (folder / "broken.jpg").write_bytes((folder / "copy.jpg").read_bytes()[:400])
    Image.new("RGB", (80, 80), (1, 2, 250)).save(folder / "blue.png")
    rows += [
        {**rows[1], "id": "gone", "image": f"{EVIL}.jpg"},
        {**rows[1], "id": "broken", "image": "broken.jpg"},
        {**rows[1], "id": "kind", "kind": "photo", "image": "blue.png"},
    ]
    write_manifest(folder / "manifest.tsv", rows)
    ingest.run(ingest.IngestConfig(manifest=folder / "manifest.tsv", images=folder, out=folder / "catalogue"))
    return folder


@pytest.fixture(scope="module")
def page(shop: Path) -> tuple[dict[str, Any], str]:
    """Figures and page before govern, by the command."""
    args = [str(shop / "catalogue"), "--out", str(shop / "report.html"), "--json", str(shop / "report.json")]
    command("report", args)
    return json.loads((shop / "report.json").read_text()), (shop / "report.html").read_text()


def pictures_of(page: str, heading: str) -> list[Image.Image]:
    """Pictures below a heading."""
    section = page.split(f"<h2>{heading}</h2>")[1].split("</section>")[0]
    found = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)"', section)
    return [Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB") for data in found]


def alike(a: Image.Image, b: Path) -> bool:
    pair = (a, Image.open(b).convert("RGB"))
    small = [np.asarray(image.resize((6, 6), Image.Resampling.BOX), np.int16) for image in pair]
    return float(np.abs(small[0] - small[1]).mean()) < 4


def test_the_figures_are_those_of_the_catalogue(page: tuple[dict[str, Any], str]) -> None:
    facts, _ = page
    assert (facts["samples"], facts["photos"], facts["documents"], facts["quarantined"]) == (38, 30, 8, 3)
    splits = {row["split"]: (row["photos"], row["documents"]) for row in facts["splits"]}
    assert splits == {"all": (0, 8), "test": (6, 0), "train": (18, 0), "val": (6, 0)}
    products = facts["products"]
    assert (products["products"], products["with_both"], products["without_photo"]) == (8, 6, 2)
    assert facts["photos_per_product"] == {"0": 2, "1": 0, "2": 0, "3": 0, "4": 0, "5-9": 6}
    assert (
        sum(facts["image_sizes"]["long_side"].values()) == 38
        and facts["formats"]["jpg"] + facts["formats"]["png"] == 38
    )
    assert facts["shared_titles"] == 3 and facts["texts"]["title"]["longest"] == len(f"red disc {EVIL}")
    assert facts["quarantine"] == {"missing file": 1, "truncated or damaged": 1, "unknown kind": 1}
    assert facts["classes"] is None


def test_copies_are_counted_by_what_they_harm(page: tuple[dict[str, Any], str]) -> None:
    facts, _ = page
    assert facts["exact_duplicates"] == {
        "groups": 3, "samples": 6, "across_splits": 1, "across_products": 1, "photo_is_document": 1, "leaked_photos": 1,
    }  # fmt: skip
    near = facts["near_duplicates"]
    assert (near["groups"], near["samples"], near["across_splits"], near["leaked_photos"]) == (1, 2, 1, 1)
    assert (near["compared"], near["of"], near["unreadable"]) == (38, 38, 0)


def test_the_page_shows_the_right_pictures(page: tuple[dict[str, Any], str], shop: Path) -> None:
    _, text = page
    copies = pictures_of(text, "Exact duplicates")
    assert len(copies) == 6 and all(alike(image, shop / "copy.jpg") for image in copies[:2])
    near = pictures_of(text, "Near duplicates")
    assert len(near) == 2 and all(alike(image, shop / "again.jpg") for image in near)
    (refused,) = pictures_of(text, "Refused rows")  # the other two have none
    assert alike(refused, shop / "blue.png")
    assert len(pictures_of(text, "Products without a photo")) == 2
    assert len(pictures_of(text, "Sample products")) == 36
    assert "Classes are missing" in text and "The file ends early" in text


def test_texts_of_strangers_are_escaped_and_nothing_is_fetched(page: tuple[dict[str, Any], str]) -> None:
    _, text = page
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "http:" not in text and "https:" not in text


def test_no_picture_is_decoded_where_none_is_asked_for(shop: Path, page: Any, tmp_path: Path) -> None:
    found = run(ReportConfig(catalogue=shop / "catalogue", out=tmp_path / "page.html", pictures=0))
    assert found["near_duplicates"]["compared"] == found["near_duplicates"]["groups"] == 0
    assert found["exact_duplicates"]["groups"] == 3
    some = run(ReportConfig(catalogue=shop / "catalogue", out=tmp_path / "page.html", pictures=10))
    assert some["near_duplicates"]["compared"] == 10
    with pytest.raises(UserError, match=r"--out .* cannot be written"):
        run(ReportConfig(catalogue=shop / "catalogue", out=tmp_path / "no/page.html"))


def test_classes_are_explained_after_govern(shop: Path, page: Any, tmp_path: Path) -> None:
    catalogue = tmp_path / "catalogue"
    shutil.copytree(shop / "catalogue", catalogue)
    govern.run(govern.GovernConfig(catalogue=catalogue))
    found = run(ReportConfig(catalogue=catalogue, out=tmp_path / "page.html", pictures=0))
    assert (found["classes"]["num_classes"], found["classes"]["quarantined_classes"]) == (6, 2)
    assert "Classes are missing" not in (tmp_path / "page.html").read_text()


def test_near_pairs_of_many_like_pictures_stay_few() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 1 << 63, 3000).astype(np.uint64)
    colours = rng.integers(0, 256, (3000, 192)).astype(np.uint8)
    hashes[:1000], colours[:1000] = hashes[0], colours[0]  # a placeholder, a thousand times
    hashes[2000], colours[2000] = hashes[1999] ^ np.uint64(0b101), colours[1999]
    hashes[2500] = hashes[2499]  # one shape in another colour
    pairs = near_pairs(hashes, colours)
    number = groups(pairs, 3000)
    assert len(pairs) < 4 * 32 * 1000 and len(set(number[:1000])) == 1
    assert number[2000] == number[1999] and number[2500] != number[2499]
    assert np.unique(number).size == 3000 - 999 - 1


def test_a_fingerprint_survives_another_size_and_quality(shop: Path, page: Any) -> None:
    picture = Image.open(shop / "blue.png").convert("RGB")
    Image.Image.paste(picture, (250, 240, 0), (10, 20, 50, 60))
    files = []
    for size, quality in ((80, 95), (160, 60)):
        file = io.BytesIO()
        picture.resize((size, size)).save(file, "JPEG", quality=quality)
        files.append(fingerprint(file.getvalue()))
    hashes, colours = zip(*files, strict=True)
    assert len(near_pairs(np.array(hashes, np.uint64), np.stack(colours))) == 1


def test_large_slices_come_first_and_not_too_many() -> None:
    rows = [{"slice": "type", "value": str(n), "queries": n} for n in range(30)]
    ((name, shown, left_out),) = largest(rows, 12)
    assert name == "type" and left_out == 18 and [row["queries"] for row in shown] == [*range(29, 17, -1)]


def failures_of(catalogue: Path, tasks: list[str], settings: dict[str, Any]) -> Failures | None:
    config = tiny_config(catalogue, UNUSED, **{"evaluation.tasks": tasks, **settings})
    with trainer(config, ready=False) as t:
        return t.validation.evaluation.run(t.method, worst=4).found[tasks[0]].failures


def test_failures_do_not_depend_on_the_ranks(catalogue: Path) -> None:
    settings = {"evaluation.batch_size": 4, "evaluation.split": "train"}
    (wanted,) = ranks(1).run(failures_of, catalogue, ["photo"], settings)
    assert wanted is not None and wanted.answered == 18 and 0 < wanted.wrong <= 18
    assert sum(wanted.right_scores) == 18 - wanted.wrong and sum(wanted.wrong_scores) == wanted.wrong
    assert sum(pair.queries for pair in wanted.confused) == wanted.wrong
    places = [miss.rank for miss in wanted.worst]
    assert len(places) == min(4, wanted.wrong) and places == sorted(places, reverse=True) and places[-1] > 0
    for miss in wanted.worst:
        assert miss.answer == miss.query // 6 * 6 and len(miss.best) == 5  # samples lie class by class, document first
        assert [right for *_, right in miss.best] == [i == miss.answer for i, *_ in miss.best]
        assert [score for _, score, _ in miss.best] == sorted((score for _, score, _ in miss.best), reverse=True)
        assert not miss.best[0][2]
    found = ranks(2).run(failures_of, catalogue, ["photo"], settings)
    assert found == [wanted, None]


@pytest.fixture(scope="module")
def evaluated(shop: Path, page: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run of one step on `shop`."""
    from harness.commands import tokenizer

    folder = tmp_path_factory.mktemp("evaluated")
    catalogue = folder / "catalogue"
    shutil.copytree(shop / "catalogue", catalogue)
    govern.run(govern.GovernConfig(catalogue=catalogue))
    tokenizer.run(tokenizer.TokenizerConfig(catalogue=catalogue, vocab_size=56))
    with trainer(tiny_config(catalogue, folder / "run", **{"train.steps": 1})) as t:
        t.fit()
    config = evaluate.EvalConfig(run=folder / "run", split="train", report=folder / "page.html")
    assert evaluate.run(config)["queries"] == 18
    return folder / "page.html"


def test_an_evaluation_shows_its_worst_queries(evaluated: Path) -> None:
    text = evaluated.read_text()
    rows = re.findall(r"first right document at place (\d+)", text)
    assert rows and [*map(int, rows)] == sorted(map(int, rows), reverse=True) and int(rows[-1]) > 1
    worst = pictures_of(text, "Worst queries")
    assert len(worst) == len(rows) * 13  # the query, its document and the five found, then why these six
    frames = re.findall(r'<figure class="(\w+)">', text.split("<h2>Worst queries</h2>")[1])
    assert frames[:3] == ["asked", "right", "wrong"] and set(frames) == {"asked", "right", "wrong"}
    assert "Products most confused" in text and "<h2>Score of the first document</h2>" in text
    assert "Recall by class" in text and "<script" not in text
    assert len(pictures_of(text, "Why documents are found")) == 3 * 3
    assert text.count("<summary>Why these documents</summary>") == len(rows)


def test_a_phone_shows_the_pages_without_overflow(shop: Path, page: Any, evaluated: Path, tmp_path: Path) -> None:
    for file in (shop / "report.html", evaluated):
        pictures = file.read_text().count("<img ")
        for width, (taken, there, shown) in zip((390, 1280), measured(file, (390, 1280), tmp_path), strict=True):
            assert taken <= width and there == shown == pictures > 30, file
