"""The demo catalogue: equal bytes from any number of processes, honest splits, near-duplicates, skewed click log."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from harness.catalogue.synth.clicks import LogShape, draw_log, make_truth
from harness.catalogue.synth.photo import lifestyle
from harness.catalogue.synth.products import KINDS, make_products
from harness.catalogue.synth.shapes import cutout
from harness.commands import ingest
from harness.commands.synth import SynthConfig, _together, run
from harness.core.errors import UserError

ROOT = Path(__file__).parents[1]
SMALL = SynthConfig(out=Path(), products=12, photos=4, held_out=1, unseen=0.25, near_duplicates=0.34, seed=3, workers=1)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """12 products: 3 of them never trained on, 4 in near-duplicate pairs."""
    folder = tmp_path_factory.mktemp("synth") / "demo"
    run(replace(SMALL, out=folder))
    return folder


def manifest(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.tsv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_bytes_from_any_number_of_workers(demo: Path, tmp_path: Path) -> None:
    figures = run(replace(SMALL, out=tmp_path / "again", workers=2))
    assert tree(tmp_path / "again") == tree(demo)
    assert figures["photos"] == 9 * 6 + 3 * 2


def test_another_seed_draws_other_pictures(demo: Path, tmp_path: Path) -> None:
    run(replace(SMALL, out=tmp_path / "other", seed=4))
    one, other = tree(demo), tree(tmp_path / "other")
    assert not {data for name, data in one.items() if name.endswith(".jpg")} & set(other.values())


def test_ingests_as_it_is(demo: Path, tmp_path: Path) -> None:
    figures = ingest.run(
        ingest.IngestConfig(
            manifest=demo / "manifest.tsv",
            images=demo,
            out=tmp_path / "catalogue",
            attribute_columns="category,colour,pattern,brand",
        )
    )
    assert (figures["quarantined"], figures["document"], figures["query"]) == (0, 12, 60)
    assert figures["splits"] == {"all": 9, "test": 9 + 3 * 3, "train": 36, "val": 9}


def test_never_trained_products_are_in_the_test_split_alone(demo: Path) -> None:
    products = make_products(12, 0.34, 0.25, 3)
    unseen = {f"c{product.number:04d}" for product in products if product.unseen}
    assert len(unseen) == 3
    rows = manifest(demo)
    splits = defaultdict(Counter)
    for row in rows:
        splits[row["class_id"]][row["kind"], row["split"]] += 1
        assert bool(row["title"]) == bool(row["description"]) == (row["kind"] == "document")
    for key, counts in splits.items():
        if key in unseen:
            assert counts == {("document", "test"): 1, ("query", "test"): 2}
        else:
            trained = {("document", "all"): 1, ("query", "train"): 4, ("query", "val"): 1, ("query", "test"): 1}
            assert counts == trained
    class_of = {row["id"]: row["class_id"] for row in rows}
    log = pq.read_table(demo / "clicks.parquet").to_pydict()
    assert not {class_of[item] for item in [*log["query"], *log["document"]]} & unseen
    assert {row["split"] for row in rows if row["id"] in set(log["query"])} == {"train"}


def test_never_trained_products_are_new_combinations_of_known_values() -> None:
    products = make_products(60, 0.10, 0.3, 0)  # few enough that holding out blindly would hide a kind
    unseen = [product for product in products if product.unseen]
    seen = [product for product in products if not product.unseen]
    assert len(unseen) == 18
    for field in ("kind", "colour", "pattern", "brand"):
        assert {getattr(p, field) for p in unseen} <= {getattr(p, field) for p in seen}
    assert {(p.kind, p.colour, p.pattern) for p in unseen} - {(p.kind, p.colour, p.pattern) for p in seen}


def test_pairs_differ_in_one_thing_and_all_others_in_two() -> None:
    products = make_products(240, 0.10, 0.15, 0)
    paired = [product for product in products if product.twin is not None]
    assert len(paired) == 24
    different = Counter()
    for product in paired:
        twin = products[product.twin]
        assert twin.twin == product.number
        fields = ("kind", "colour", "accent", "pattern", "brand", "variant")
        changed = [field for field in fields if getattr(product, field) != getattr(twin, field)]
        assert changed in (["colour"], ["variant"])
        different[changed[0]] += 1
    assert len(different) == 2
    looks = [(p.kind, p.colour, p.pattern, p.brand) for p in products if p.twin is None]
    for number, look in enumerate(looks):
        for other in looks[:number]:
            assert look[0] != other[0] or sum(a != b for a, b in zip(look, other, strict=True)) >= 2


def test_click_log_is_skewed_and_partly_wrong(demo: Path) -> None:
    class_of = {row["id"]: row["class_id"] for row in manifest(demo)}
    log = pq.read_table(demo / "clicks.parquet").to_pydict()
    queries, documents = ([class_of[item] for item in log[side]] for side in ("query", "document"))
    clicks, impressions = (np.array(log[name]) for name in ("clicks", "impressions"))
    right = np.array(queries) == np.array(documents)
    assert {row["id"] for row in manifest(demo) if (row["kind"], row["split"]) == ("query", "train")} == {
        query for query, good, count in zip(log["query"], right, clicks, strict=True) if good and count
    }
    assert (clicks <= impressions).all() and (impressions > 0).all()
    assert 0 < clicks[~right].sum() < clicks[right].sum()


def test_the_log_has_the_numbers_that_it_was_asked_for() -> None:
    truth = make_truth(400, 8.0, 2.0, 20, seed=1)
    of_query, of_document = truth.query_class, truth.document_class
    assert set(of_query) == set(of_document) == set(range(400)) and (np.diff(of_document) >= 0).all()
    for noise in (0.0, 0.3):
        log = draw_log(truth, LogShape(noise=noise, hot_rate=0.0, seed=2))
        pairs, first, copies = np.unique(
            np.stack([log.query, log.document, log.clicks, log.impressions, log.time]),
            axis=1, return_index=True, return_counts=True,
        )  # fmt: skip
        assert len(np.unique(pairs[:2], axis=1).T) == pairs.shape[1], "copies are equal in all columns"
        assert (copies <= 2).all() and abs((copies == 2).mean() - 0.05) < 0.01
        clicks, right = log.clicks[first], log.right[first]
        assert (right == (of_query[log.query[first]] == of_document[log.document[first]])).all()
        assert abs(clicks[~right].sum() / clicks.sum() - noise) < 0.02
        assert (log.clicks <= log.impressions).all() and (log.impressions > 0).all()
        assert set(log.query[log.right & (log.clicks > 0)]) == set(range(len(of_query)))
        clicked = right & (clicks > 0)
        assert (clicks[clicked] <= 2).mean() > 0.5 and clicks.max() > 100
    hot = draw_log(truth, LogShape(noise=0.0, seed=2))
    wrong = hot.document[~hot.right & (hot.clicks > 0)]
    assert 0 < len(set(wrong)) <= round(0.05 * len(of_document)) and np.bincount(wrong).max() > 10


def test_every_kind_has_a_shape_of_its_own() -> None:
    template = make_products(12, 0, 0, 0)[0]
    outlines = {}
    for kind, facts in KINDS.items():
        picture = cutout(replace(template, kind=kind, pattern=facts.patterns[0], colour=facts.colours[0]), 96)
        outlines[kind] = np.asarray(picture.getchannel("A").resize((32, 32), Image.Resampling.BOX), float) / 255
        assert outlines[kind].mean() > 0.2
    for kind, outline in outlines.items():
        nearest = min(np.abs(outline - other).mean() for name, other in outlines.items() if name != kind)
        assert nearest > 0.01, kind


def test_lifestyle_documents_are_the_only_change(demo: Path, tmp_path: Path) -> None:
    """Of their share, named in a column of their products' rows; all else keeps its bytes."""
    config = replace(SMALL, out=tmp_path / "mixed", lifestyle=0.5)
    assert run(config)["lifestyle_documents"] == 6
    plain, mixed = tree(demo), tree(config.out)
    changed = {name for name in plain if name.endswith(".jpg") and plain[name] != mixed[name]}
    rows = manifest(config.out)
    several = {row["image"] for row in rows if (row["kind"], row["lifestyle"]) == ("document", "yes")}
    assert changed == several and len(several) == 6 and plain["clicks.parquet"] == mixed["clicks.parquet"]
    assert [{**row, "lifestyle": "no"} for row in manifest(demo)] == [{**row, "lifestyle": "no"} for row in rows]
    assert len({(row["class_id"], row["lifestyle"]) for row in rows}) == 12, "a product's photos go with its document"
    assert "lifestyle" not in manifest(demo)[0] and b"lifestyle" not in plain["synth.json"]


def test_a_lifestyle_document_shows_two_to_four_kinds() -> None:
    products, rng = make_products(60, 0.10, 0.15, 0), np.random.default_rng(0)
    numbers = Counter()
    for product in products:
        together = _together(product, [other for other in products if other is not product], rng)
        assert together[0] is product and len({other.kind for other in together}) == len(together)
        numbers[len(together)] += 1
    assert numbers.keys() == {2, 3, 4}


@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_product_of_a_lifestyle_document_is_seen(count: int) -> None:
    """None by its place in the list more than another: the picture does not say which is for sale."""
    colours = [(255, 0, 255, 255), (0, 255, 255, 255), (255, 255, 0, 255), (255, 0, 0, 255)]
    pictures = [Image.new("RGBA", (60, 80), colour) for colour in colours[:count]]
    areas = []
    for seed in range(24):
        scene = np.asarray(lifestyle(pictures, 128, np.random.default_rng(seed)), int)[8:120, 8:120]
        areas.append([(np.abs(scene - colour[:3]).max(-1) < 40).mean() for colour in colours[:count]])
    areas = np.array(areas)
    assert areas.min() > 0.03
    assert np.abs(areas.mean(0) / areas.mean() - 1).max() < 0.15


@pytest.mark.parametrize(
    "change",
    [
        {"products": 7},
        {"products": 2001},
        {"photos": 0},
        {"held_out": 0},
        {"unseen": 0.6},
        {"lifestyle": 1.1},
        {"seed": -1},
    ],
)
def test_values_out_of_range_are_refused(tmp_path: Path, change: dict) -> None:
    with pytest.raises(UserError, match="It must be from"):
        run(replace(SMALL, out=tmp_path / "demo", **change))
    assert not (tmp_path / "demo").exists()


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        run(replace(SMALL, out=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_drawing_processes_end_with_a_killed_command(tmp_path: Path) -> None:
    """They would wait for more work for ever; here they are killed amid theirs, and the next command clears away what
    they drew.
    """
    out = tmp_path / "out"
    words = ["synth", str(out), *"--products 8 --photos 12 --held-out 1 --unseen 0 --workers 1".split()]
    command = [sys.executable, "-m", "harness", *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not list(out.with_name("out.tmp").glob("new/images/*")):
            assert process.poll() is None
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
    assert len(children) >= 1
    for _ in range(600):
        if not any(Path("/proc", child).exists() for child in children):
            break
        time.sleep(0.1)
    else:
        raise AssertionError(f"{children} live on")
    run(replace(SMALL, out=out, products=8, photos=1, near_duplicates=0.0, unseen=0.0))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
