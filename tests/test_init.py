"""`shelfmark init`: what it reads, how it splits, which recipe it writes."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from harness.catalogue.catalogue import Catalogue
from harness.catalogue.pairs import Pairs
from harness.catalogue.shop import Shop
from harness.catalogue.splits import Photo, place
from harness.commands import import_weights
from harness.commands.init import InitConfig, following, run
from harness.core.errors import UserError
from harness.core.manifest import write_manifest
from harness.train.config import parse
from harness.train.first_recipe import Facts, length, shape, start, written
from harness.train.frozen_eval import preprocess_of
from harness.train.imported_weights import image_tower
from models.oclear import OclearConfig, OclearTowers
from models.plain.transformer import PlainBuilder
from models.weights.convert import fitted
from tests.catalogues import draw_image
from tests.shops import draw_shop
from tests.test_mbconv import saved


def photos_of(products: int, each: int, **more: str) -> list[Photo]:
    return [Photo(f"{p}/{n}.jpg", f"p{p}", **more) for p in range(products) for n in range(each)]


def splits_by_product(photos: list[Photo], seed: int = 0) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for photo, at in zip(photos, place(photos, seed), strict=True):
        if at.kind == "query":
            found[photo.product].add(at.split)
    return found


def test_splits_hold_products_out_and_leave_each_other_a_train_photo() -> None:
    photos = photos_of(200, 6)
    places = place(photos, 0)
    found = splits_by_product(photos)
    held = {product for product, splits in found.items() if "train" not in splits}
    assert 10 <= sum(found[product] == {"test"} for product in held) <= 30
    assert 4 <= sum(found[product] == {"val"} for product in held) <= 20
    assert all(len(found[product]) == 1 for product in held)
    for photo, at in zip(photos, places, strict=True):
        assert (at.kind == "document") == photo.image.endswith("/0.jpg")
        whole = at.split in ("test", "val") and {at.split} == found[photo.product]
        assert at.kind == "query" or (whole if photo.product in held else at.split == "all")
    count = {name: sum(at == ("query", name) for at in places) for name in ("train", "val", "test")}
    assert sum(count.values()) == 1000 and 70 <= count["val"] <= 250 and 100 <= count["test"] <= 300


def test_splits_are_keyed_by_names_and_seed() -> None:
    photos = photos_of(60, 5)
    by_image = dict(zip(photos, place(photos, 0), strict=True))
    order = np.random.default_rng(0).permutation(len(photos))
    order = np.concatenate([np.arange(len(photos))[::5], [n for n in order if n % 5]])  # documents stay first
    mixed = [photos[n] for n in order]
    assert dict(zip(mixed, place(mixed, 0), strict=True)) == by_image
    assert dict(zip(photos, place(photos, 1), strict=True)) != by_image
    grown = photos + [Photo(f"new{n}/{m}.jpg", f"new{n}") for n in range(30) for m in range(5)]
    assert {photo: at for photo, at in zip(grown, place(grown, 0), strict=True) if photo in by_image} == by_image


@pytest.mark.parametrize("products,each", [(5, 2), (12, 2), (200, 2), (5, 3), (40, 4)])
def test_val_and_test_are_never_empty(products: int, each: int) -> None:
    for seed in range(5):
        photos = photos_of(products, each)
        splits = [at.split for at in place(photos, seed) if at.kind == "query"]
        assert {"train", "val", "test"} == set(splits), seed


def test_an_image_of_several_products_is_in_one_split() -> None:
    photos = photos_of(80, 4)
    photos += [Photo(f"{p}/2.jpg", f"p{p + 1}") for p in range(0, 60, 3)]  # a photo that shows the next product too
    photos += [Photo("room.jpg", f"p{p}") for p in range(60, 80)]
    for seed in range(5):
        found: dict[str, set[str]] = defaultdict(set)
        for photo, at in zip(photos, place(photos, seed), strict=True):
            if at.kind == "query":
                found[photo.image].add(at.split)
        assert all(len(splits) == 1 for splits in found.values()), seed
        held = {product for product, splits in splits_by_product(photos, seed).items() if "train" not in splits}
        assert held, seed


def test_splits_of_the_shop_are_kept() -> None:
    photos = [*photos_of(20, 4, split="training"), *(Photo(f"t{p}.jpg", f"p{p}", "test") for p in range(20))]
    places = dict(zip(photos, place(photos, 0), strict=True))
    assert all(places[photo].split == "test" for photo in photos[80:])
    rest = [places[photo] for photo in photos[:80] if places[photo].kind == "query"]
    assert {at.split for at in rest} == {"train", "val"}, "only val was missing"
    assert all("train" in splits for splits in splits_by_product(photos).values()), "no product is held out then"
    both = [*photos, *(Photo(f"v{p}.jpg", f"p{p}", "valid") for p in range(20))]
    splits = [at.split for at in place(both, 0)]
    assert splits[-20:] == ["val"] * 20 and set(splits[:80]) == {"all", "train"}


def test_what_cannot_be_split_is_said() -> None:
    with pytest.raises(UserError, match=r"no product has two images.*--product-column"):
        place(photos_of(30, 1), 0)
    with pytest.raises(UserError, match="2 products with 2 photos are too few to keep some for val"):
        place(photos_of(2, 2), 0)


def written_as(kind: str, folder: Path) -> list[Path]:
    """The shop in another form; the sources for init."""
    rows = draw_shop(folder, products=6, photos=4, size=24)
    table = [dict(zip(("sku", "photo", "name"), row, strict=True)) for row in rows]
    photos = folder / "photos"
    if kind == "tsv":
        return [folder / "products.tsv", photos]
    if kind == "jsonl":
        (folder / "p.jsonl").write_text("\n".join(json.dumps(row) for row in table) + "\n[1]\n", encoding="utf-8")
        return [folder / "p.jsonl", photos]
    if kind == "folders":
        return [photos]
    if kind == "hub images":
        lines = ["file_name,sku", *(f"{row['photo']},{row['sku']}" for row in table)]
        (photos / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return [photos]
    (folder / "hub" / "data").mkdir(parents=True)
    for name, part in (("train", table[:12]), ("test", table[12:])):
        images = [{"bytes": (photos / row["photo"]).read_bytes(), "path": None} for row in part]
        columns: dict[str, Any] = {"image": images, "label": [int(row["sku"][1:]) for row in part]}
        columns |= {"height": [24, 25] * 6, "colour": ["red", "blue", ""] * 4, "note": [row["photo"] for row in part]}
        pq.write_table(pa.table(columns), folder / "hub" / "data" / f"{name}-00000-of-00001.parquet")
    return [folder / "hub"]


FULL = [pytest.param(kind, marks=pytest.mark.full) for kind in ("jsonl", "folders", "hub images")]


@pytest.mark.parametrize("kind", ["tsv", "hub parquet", *FULL])
def test_every_form_becomes_a_catalogue(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = written_as(kind, tmp_path)
    out = tmp_path / "shop"
    found = run(InitConfig(sources=tuple(sources), out=out))
    catalogue = Catalogue(out / "catalogue")
    counts = catalogue.meta["counts"]
    assert (counts["document"], counts["query"], counts["quarantined"]) == (6, 18, 0)
    assert set(found["splits"]) == {"train", "val", "test"}
    assert len(set(catalogue.table(["class_key"])["class_key"].to_pylist())) == 6
    assert found["attributes"] == (["colour"] if kind == "hub parquet" else [])  # not measures, nor texts of one row
    if kind == "hub parquet":  # the names of its files say the splits
        rows = catalogue.table(["class_key", "split"]).to_pylist()
        assert {row["split"] for row in rows if row["class_key"] in "345"} == {"test"}
        assert "test" not in {row["split"] for row in rows if row["class_key"] in "012"}
    told = capsys.readouterr().out
    assert "1 rows are left out: 1 x malformed: line 25" in told if kind == "jsonl" else "left out" not in told
    assert f"product = '{found['columns']['product']}'" in told
    config, _ = parse(["--config", str(out / "recipe.yaml")], 1)
    assert config.data.catalogue == out / "catalogue" and config.train.steps == found["steps"]
    with pytest.raises(UserError, match="exists already"):
        run(InitConfig(sources=tuple(sources), out=out))


@pytest.mark.parametrize("name", ["upc", "style_code", "Article Number", "productcode"])
def test_the_product_column_has_many_usual_names(name: str, tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_text(f"photo\t{name}\tcolour\n1.jpg\t0042\tred\n", encoding="utf-8")
    assert Shop((tmp_path / "p.tsv",)).choose({}) == {"image": "photo", "product": name}


def test_a_photo_of_several_products_is_stored_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = draw_shop(tmp_path, products=8, photos=3, size=24)
    for number in range(6):
        name = f"rooms/{number}.jpg"
        draw_image(tmp_path / "photos" / name, "red", "box", 24, np.random.default_rng([9, number]))
        rows += [(f"s{(number + k) % 8}", name, f"room {number}") for k in range(3)]
    rows.append(
        ("unseen", "rooms/0.jpg", "sold out")
    )  # of a product without a picture of its own: that is its document
    lines = ["sku\tphoto\tname\tmaterial", *("\t".join((*row, f"m{len(row[2])}")) for row in rows)]
    (tmp_path / "products.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    out = tmp_path / "shop"
    found = run(InitConfig(sources=(tmp_path / "products.tsv", tmp_path / "photos"), out=out))
    assert "6 photos show several products each: stored once" in capsys.readouterr().out
    catalogue = Catalogue(out / "catalogue")
    samples = catalogue.table(["item", "kind", "class_key", "image", "title", "material"]).to_pylist()
    shared = [row for row in samples if row["kind"] == "query" and row["image"].startswith("rooms/")]
    assert [row["item"] for row in shared] == [f"rooms/{number}.jpg" for number in range(6)]
    assert {(row["class_key"], row["title"], row["material"]) for row in shared} == {(None, "", "")}
    assert (len(samples), sum(found["splits"].values())) == (8 * 3 + 6 + 1, 8 * 2 + 6)
    pairs, product = Pairs.open(catalogue.path), {row["sample_id"]: row["class_key"] for row in samples}
    assert pairs is not None
    named: dict[int, set[str | None]] = defaultdict(set)
    for query, document in zip(pairs.query.tolist(), pairs.document.tolist(), strict=True):
        named[query].add(product[document])
    wanted = [{f"s{(number + k) % 8}" for k in range(3)} for number in range(6)]
    wanted[0].add("unseen")
    assert [named[row["sample_id"]] for row in shared] == wanted


@pytest.mark.parametrize("alone", [False, True])
def test_weights_of_parts_are_chosen_where_a_photo_can_choose(alone: bool, tmp_path: Path) -> None:
    """Not where every photo of val shows several products: no class tells its document then."""
    rows = [(*row, "train" if number % 3 else "test") for number, row in enumerate(draw_shop(tmp_path, 8, 3, 24))]
    for number in range(3):
        name = f"rooms/{number}.jpg"
        draw_image(tmp_path / "photos" / name, "red", "box", 24, np.random.default_rng([9, number]))
        rows += [(f"s{number + k}", name, "room", "val") for k in range(1 if alone and not number else 3)]
    lines = ["sku\tphoto\tname\tsplit", *("\t".join(row) for row in rows)]
    (tmp_path / "products.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "manifest.parquet.tmp").touch()  # of an init that was killed while it wrote the table
    run(InitConfig(sources=(tmp_path / "products.tsv", tmp_path / "photos"), out=tmp_path / "shop"))
    weighed = [name for name, *words in following(tmp_path / "shop") if "--weigh-parts" in words]
    assert weighed == (["eval", "export"] if alone else [])


FEW = {"classes": 900, "photos": 2700, "has_text": True}
MANY = {"classes": 80, "photos": 2600, "has_text": True}
HERE = {"gpus": 0, "ranks": 2, "minutes": 20.0}


@pytest.mark.parametrize(
    "facts,expected",
    [
        (
            FEW,
            {"model.objective": "contrastive", "model.fusion_kind": "sum", "head.scale": 16.0},
        ),
        (MANY, {"model.objective": "classification", "model.text_dropout": 0.5, "data.queries_per_step": 48}),
        ({**FEW, "has_text": False}, {"model.fusion_kind": "image", "model.text_dropout": 0.5}),
        ({**MANY, "classes": 2_000_000, "photos": 10**9}, {"head.scale": 64.0, "head.sample_rate": 0.1}),
        ({**MANY, "slices": ("brand", "size of it")}, {"evaluation.slices": ("brand", "size of it")}),
    ],
)
def test_the_rules_of_the_recipe(facts: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    known = Facts(**{**HERE, **facts})
    changes = {**shape(known), "data.catalogue": (tmp_path / "a: b", "its place")}
    draft = tmp_path / "r.yaml"
    draft.write_text(written(changes, "two\n\nlines"), encoding="utf-8")
    config, _ = parse(["--config", str(draft)], 2)
    assert config.data.catalogue == tmp_path / "a: b"
    for key, value in expected.items():
        found: Any = config
        for name in key.split("."):
            found = getattr(found, name)
        assert found == value, key
    more, seconds = length(known, 2e10, config.data.queries_per_step)
    draft.write_text(written({**changes, **more}, ""), encoding="utf-8")
    train = parse(["--config", str(draft)], 2)[0].train
    assert train.steps == more["train.steps"][0] and train.margin_warmup < train.steps
    assert train.steps * config.data.queries_per_step <= 101 * known.photos and seconds <= 20 * 60
    # Half the time is half the steps where time is what bounds them.
    if seconds > 900:
        half, _ = length(Facts(**{**HERE, **facts, "minutes": 10.0}), 2e10, config.data.queries_per_step)
        assert abs(half["train.steps"][0] * 2 - train.steps) <= 20


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EfficientNet-Lite0, imported."""
    folder = tmp_path_factory.mktemp("imported")
    import_weights.run(import_weights.ImportConfig(out=folder / "lite0", vision=saved(folder / "theirs")))
    return folder / "lite0"


def test_a_recipe_that_starts_from_imported_weights(weights: Path, tmp_path: Path) -> None:
    draw_shop(tmp_path, products=6, photos=4, size=24)
    out = tmp_path / "shop"
    found = run(InitConfig(sources=(tmp_path / "products.tsv", tmp_path / "photos"), out=out, weights=weights))
    config, _ = parse(["--config", str(out / "recipe.yaml")], 1)
    assert isinstance(config.model, OclearConfig) and config.train.init_from == weights
    towers = OclearTowers(config.model, PlainBuilder())
    assert fitted(weights, towers).keys() == {name for name in towers.state_dict() if name.startswith("vision.")}
    assert config.model.vision.image_size == config.data.preprocess.image_size == 128
    assert config.data.preprocess.mean == (0.485, 0.456, 0.406)
    assert (config.train.init_projection, config.train.stages, config.optimizer.lr) == ("principal", (), 3e-4)
    assert config.train.steps == found["steps"] and config.model.objective == "contrastive"


def test_with_many_photos_pairs_stand_beside_the_classes_of_an_imported_tower(weights: Path, tmp_path: Path) -> None:
    draw_shop(tmp_path, products=2, photos=30, size=24)
    out = tmp_path / "shop"
    run(InitConfig(sources=(tmp_path / "products.tsv", tmp_path / "photos"), out=out, weights=weights))
    config, _ = parse(["--config", str(out / "recipe.yaml")], 1)
    assert isinstance(config.model, OclearConfig) and config.model.objective == "classification"
    assert (config.model.contrast_weight, config.optimizer.rows.lr_factor) == (2.0, 10.0)
    (stage,) = config.train.stages
    assert (stage.rows, stage.steps) == ("class_mean", config.train.steps)


def test_a_gpu_takes_the_pixels_that_the_tower_expects(weights: Path) -> None:
    vision, _ = image_tower(weights)
    assert start(weights, vision, preprocess_of(weights, vision), gpus=1)["data.preprocess.image_size"][0] == 224


def test_weights_without_a_usable_tower_are_refused_before_anything_is_written(weights: Path, tmp_path: Path) -> None:
    draw_shop(tmp_path, products=6, photos=4, size=24)
    sources, out = (tmp_path / "products.tsv", tmp_path / "photos"), tmp_path / "shop"
    with pytest.raises(UserError, match=r"imported weights .*nowhere"):
        run(InitConfig(sources=sources, out=out, weights=tmp_path / "nowhere"))
    both = tmp_path / "both"
    shutil.copytree(weights, both)
    recipe = yaml.safe_load((both / "recipe.yaml").read_text())
    (both / "recipe.yaml").write_text(yaml.safe_dump({"model": recipe["model"] | {"text": {"num_layers": 2}}}))
    write_manifest(both, algorithm="sha256")
    with pytest.raises(UserError, match="holds a text tower too"):
        run(InitConfig(sources=sources, out=out, weights=both))
    assert not out.exists()
