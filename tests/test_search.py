"""Export and search: what a service loads finds what evaluation finds, and says clearly what it cannot use."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from harness.artefact.artefact import Artefact, Photo
from harness.catalogue.catalogue import Catalogue
from harness.commands import embed, export, search
from harness.commands.queries import QueriesConfig
from harness.commands.queries import run as make_queries
from harness.core.errors import UserError
from harness.core.manifest import fingerprint, write_manifest
from harness.evaluate.contact_sheet import DARK, GAP, GREEN, GREY, draw_panel
from harness.evaluate.embed import Embedder, side_of
from harness.evaluate.ranking import top_k
from tests.damages import damages
from tests.pool import ranks
from tests.runs import tiny_config, trainer
from tests.test_two_methods import config_of
from tests.twins import documents_alone


def train(run: Path, catalogue: Path, **overrides: Any) -> None:
    """In a pool: a short run with a checkpoint."""
    with trainer(tiny_config(catalogue, run, **{"train.steps": 3, **overrides})) as t:
        t.fit()


def export_here(run: Path, out: Path, batch_size: int = 128, tensor_parallel: int = 1) -> None:
    """In a pool."""
    export.run(
        export.ExportConfig(run=run, out=out, batch_size=batch_size, tensor_parallel=tensor_parallel, onnx=False)
    )


def found_by_evaluation(run: Path, catalogue: Path, top: int) -> tuple[list[Any], torch.Tensor, torch.Tensor]:
    """In a pool: (query id, its best document ids) of every query, vectors of queries and of documents, by the trained
    towers.
    """
    config = tiny_config(catalogue, run, **{"train.steps": 3, "evaluation.panel": 10_000, "evaluation.split": "test"})
    with trainer(config) as t:
        report = t.validation.evaluation.run(t.method)
        t.method.towers.eval()
        queries = t.validation.evaluation.embedder.embed(t.method, t.validation.evaluation.tasks[0].queries)
        documents = t.validation.evaluation.embedder.embed(t.method, t.validation.evaluation.documents[0])
    return [(query, best[:top]) for query, best, _ in report.panel], queries.vectors, documents.vectors


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, catalogue: Path) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    ranks(2).run(train, run, catalogue)
    return run


@pytest.fixture(scope="module")
def artefact(trained: Path) -> Iterator[Path]:
    out = trained.parent / "artefact"
    ranks(1).run(export_here, trained, out)
    yield out


def test_search_agrees_with_evaluation_on_every_query(trained: Path, artefact: Path, catalogue: Path) -> None:
    """Other towers (plain, exported), other batches, another index, another process: the same documents in the same
    order.
    """
    expected, vectors, _ = ranks(1).run(found_by_evaluation, trained, catalogue, 5)[0]
    queries = side_of(Catalogue(catalogue), "query", "test", ["item"], None, 0)
    assert [query for query, _ in expected] == queries.ids.tolist() and len(expected) == 6
    opened = Artefact(artefact)
    photos = []
    for sample in queries.sample_ids:
        data = Catalogue(catalogue).read_bytes(int(sample))
        entry = Catalogue(catalogue).index[sample]
        photos.append(Photo(data, (0, 0, int(entry["width"]), int(entry["height"]))))
    for batch_size in (1, 4):
        ours = opened.embed(photos, batch_size)
        torch.testing.assert_close(ours, vectors, rtol=0, atol=1e-6)
        hits = opened.search(ours, 5)
        samples = opened.documents.column("sample_id").to_pylist()
        assert [[samples[hit.row] for hit in found] for found in hits] == [best for _, best in expected]
        scores = np.array([[hit.score for hit in found] for found in hits])
        assert (np.diff(scores) <= 0).all()


def test_the_lines_of_python_in_the_documentation_run_as_written(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[1] / "docs/your-data.md").read_text(encoding="utf-8")
    block = page.split("### In Python\n\n")[1].split("\n\n`vectors`")[0]
    (tmp_path / "artefacts").mkdir()
    (tmp_path / "artefacts" / "products").symlink_to(artefact)
    Image.new("RGB", (48, 40), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(textwrap.dedent(block), found)
    assert found["vectors"].numpy().shape == (1, 16) and found["vectors"].dtype == torch.float32
    documents = found["artefact"].documents
    ids = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert len(ids) == 5 and set(ids) <= set(documents.column("item").to_pylist())


def test_embed_writes_the_vectors_of_photos_and_their_paths(
    artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    (folder / "inside").mkdir(parents=True)
    for name, colour in (("b.png", "red"), ("a.jpg", "blue"), ("inside/c.jpg", "green"), (".hidden.jpg", "red")):
        Image.new("RGB", (48, 40), colour).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    alone, out = folder / "inside" / "c.jpg", tmp_path / "e.npy"
    figures = embed.run(embed.EmbedConfig(artefact=artefact, photos=(alone, folder), out=out, batch_size=2))
    names = [alone, folder / "a.jpg", folder / "b.png", alone]
    assert (tmp_path / "e.txt").read_text().splitlines() == [str(name) for name in names]
    vectors = np.load(out)
    assert vectors.dtype == np.float32 and figures == {"photos": 4, "left_out": 1, "embedding_dim": 16}
    np.testing.assert_allclose(vectors, Artefact(artefact).embed(names).numpy(), rtol=0, atol=1e-6)
    assert "left out: photo" in capsys.readouterr().err
    for photos, to, piece in (
        ((folder / "notes.txt",), out, "none of 1 photos can be read"),
        ((folder,), tmp_path / "e.csv", "is not a .npy"),
        ((folder,), tmp_path / "none" / "e.npy", "a folder that exists"),
    ):
        with pytest.raises(UserError, match=piece):
            embed.run(embed.EmbedConfig(artefact=artefact, photos=photos, out=to))


def test_embed_writes_the_vectors_of_a_catalogues_query_photos(artefact: Path, catalogue: Path, tmp_path: Path) -> None:
    """As `shelfmark govern --embeddings` reads them; files of the same bytes have the same vectors."""
    out = tmp_path / "photos.parquet"
    config = embed.EmbedConfig(artefact=artefact, photos=(catalogue,), out=out, split="test")
    figures = embed.run(config)
    whole, rows = Catalogue(catalogue), pq.read_table(out)
    ids = whole.table(["kind"], kind="query", split="test")["sample_id"].to_pylist()
    assert rows["sample_id"].to_pylist() == ids and figures["photos"] == len(ids)
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(whole.read_bytes(ids[-1]))
    vectors = np.array(rows["embedding"].to_pylist(), np.float32)
    np.testing.assert_allclose(vectors[-1:], Artefact(artefact).embed([photo]).numpy(), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="no query photo in split 'none'"):
        embed.run(replace(config, split="none"))
    with pytest.raises(UserError, match=r"is not a \.parquet"):
        embed.run(replace(config, out=tmp_path / "photos.npy"))


def test_artefact_holds_the_trained_embeddings(trained: Path, artefact: Path, catalogue: Path) -> None:
    """Row i of the id map, of the embeddings and of the index are one document; the vectors are evaluation's."""
    _, _, expected = ranks(1).run(found_by_evaluation, trained, catalogue, 1)[0]
    rows = ds.dataset(artefact / "documents").to_table()
    vectors = np.array(rows.column("embedding").to_pylist(), dtype=np.float32)
    torch.testing.assert_close(torch.from_numpy(vectors), expected, rtol=0, atol=1e-6)  # batches of other sizes
    index = faiss.read_index(str(artefact / "index.faiss"))
    assert (index.reconstruct_n(0, index.ntotal) == vectors).all()
    documents = Catalogue(catalogue).table(["item", "title", "colour", "class_key"], kind="document")
    for name in documents.column_names:
        assert rows.column(name).to_pylist() == documents.column(name).to_pylist(), name
    assert Artefact(artefact).thumbnail(0).size[0] <= 160
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    program = torch.export.load(artefact / "encoder.pt2").module()
    torch.testing.assert_close(program(images), Artefact(artefact)._encode(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("world,tensor_parallel", [(2, 1), (2, 2), (3, 1)])
def test_export_does_not_depend_on_the_layout(
    trained: Path, artefact: Path, tmp_path: Path, world: int, tensor_parallel: int
) -> None:
    """Also with more ranks than blocks of documents: some write no row. Batches of 4 make 2 blocks of 6 documents."""
    out = tmp_path / "artefact"
    ranks(world).run(export_here, trained, out, 4, tensor_parallel)
    one, other = (ds.dataset(folder / "documents").to_table() for folder in (artefact, out))
    rounded = ["embedding", "part_image", "part_concepts"]
    assert one.drop(rounded).equals(other.drop(rounded))
    for name in rounded:
        a, b = (np.array(table.column(name).to_pylist()) for table in (one, other))
        assert np.abs(a - b).max() < 1e-6
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for make in (
        lambda folder: torch.export.load(folder / "encoder.pt2").module(),
        lambda folder: Artefact(folder)._encode,
    ):
        a, b = (make(folder)(images) for folder in (artefact, out))
        torch.testing.assert_close(a, b, rtol=0, atol=0)  # the merged weights are the same weights


def documents_seen(run: Path, catalogue: Path, seen: str) -> torch.Tensor:
    """In a pool: vectors of the documents."""
    with trainer(tiny_config(catalogue, run, **{"train.steps": 3})) as t:
        t.method.towers.eval()
        evaluation = t.validation.evaluation
        return evaluation.embedder.embed(t.method, evaluation.documents[0], seen).vectors


def test_another_view_of_the_documents_is_exported_and_told(
    trained: Path, artefact: Path, catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    figures = run / "eval-00000003.json"
    known = json.loads(figures.read_text())
    rows = [{"slice": "class", "value": "never trained", "recall_at_1": 0.2}]
    rows.append({"task": "photo/image", **rows[0], "recall_at_1": 0.7})
    figures.write_text(json.dumps({"recall_at_1": None, "photo/image/recall_at_1": None, "slices": []}))
    export.run(export.ExportConfig(run=run, out=tmp_path / "nothing asked", onnx=False))
    assert "--view" not in capsys.readouterr().out
    for n, (image, slices, told) in enumerate(((0.4, [], False), (0.6, [], True), (0.4, rows, True))):
        warned = ["warning: val recall@1 0.500 is below imported towers"] * bool(slices)
        views = {"recall_at_1": 0.5, "photo/image/recall_at_1": image, "slices": slices, "warnings": warned}
        figures.write_text(json.dumps({**known, **views}))
        export.run(export.ExportConfig(run=run, out=tmp_path / f"both-{n}", onnx=False))
        said = capsys.readouterr().out
        assert (f"seen as both and as image: all products 0.500 and {image:.3f}" in said) == told, said
        assert ("products never trained on 0.200 and 0.700. --view image" in said) == bool(slices)
        assert ("is below imported towers" in said) == bool(slices)
    export.run(export.ExportConfig(run=run, out=tmp_path / "image", view="best", onnx=False))
    said = capsys.readouterr().out
    assert "products never trained on 0.200 and 0.700. exported as image" in said and "--view" not in said
    assert json.loads((tmp_path / "image" / "artefact.json").read_text())["view"] == "image"
    figures.unlink()
    with pytest.raises(UserError, match="training did not evaluate step-00000003"):
        export.run(export.ExportConfig(run=run, out=tmp_path / "best", view="best"))
    both, image = (
        np.array(ds.dataset(path / "documents").to_table(["embedding"])["embedding"].to_pylist(), np.float32)
        for path in (artefact, tmp_path / "image")
    )
    (wanted,) = ranks(1).run(documents_seen, trained, catalogue, "image")
    assert np.allclose(image, wanted.numpy(), atol=1e-6) and not np.allclose(image, both, atol=1e-3)
    with pytest.raises(UserError, match=r"--view is title\. The views of oclear are both, image, best"):
        export.run(export.ExportConfig(run=run, out=tmp_path / "title", view="title"))


def test_box_searches_for_a_part(artefact: Path, tmp_path: Path) -> None:
    """A box gives what the cut-out picture gives, and another answer than the whole photo."""
    rng = np.random.default_rng(0)
    whole = Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8))
    whole.save(tmp_path / "whole.png")
    whole.crop((20, 10, 70, 50)).save(tmp_path / "part.png")
    opened = Artefact(artefact)
    for backend in ("dali", "reference"):
        opened.backend = backend
        box, part, all_of_it = opened.embed(
            [
                Photo.open(tmp_path / "whole.png", (20, 10, 50, 40)),
                Photo.open(tmp_path / "part.png"),
                Photo.open(tmp_path / "whole.png"),
            ]
        )
        torch.testing.assert_close(box, part, rtol=0, atol=1e-6)
        assert (box - all_of_it).abs().max() > 1e-3


def test_box_counts_upright_pixels(tmp_path: Path) -> None:
    """A photo that is stored lying down has its box where a person sees it."""
    picture = Image.new("RGB", (90, 60), "white")
    picture.paste((255, 0, 0), (0, 0, 30, 60))  # left third as stored, top third when turned by orientation 6
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "lying.jpg", exif=exif, quality=95)
    red = Photo.open(tmp_path / "lying.jpg", (0, 0, 60, 28))
    assert np.asarray(red.picture()).reshape(-1, 3).mean(0) == pytest.approx([254, 0, 0], abs=4)
    with pytest.raises(UserError, match="60 x 90 pixels"):
        Photo.open(tmp_path / "lying.jpg", (0, 0, 61, 10))


def test_search_prints_and_draws(artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = tmp_path / "photo.png"
    Image.new("RGB", (64, 48), (200, 40, 40)).save(photo)
    sheet = tmp_path / "sheet.png"
    figures = search.run(search.SearchConfig(artefact=artefact, photos=(photo, photo), top=3, sheet=sheet))
    out = capsys.readouterr().out
    first = figures["queries"][0]["found"]
    assert len(first) == 3 and figures["queries"][1]["found"] == first
    assert all(f"{hit['score']:7.4f}  {hit['id']}" in out and hit["title"] in out for hit in first)
    drawn = Image.open(sheet)
    assert drawn.width == 4 * 152 and len(drawn.convert("RGB").getcolors(1 << 20) or []) > 50


def test_a_search_can_be_limited_to_documents_with_some_values(
    artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "photo.png"
    Image.new("RGB", (64, 48), (200, 40, 40)).save(photo)
    colours = Artefact(artefact).documents.column("colour").to_pylist()

    def found(*where: str) -> list[int]:
        made = search.run(search.SearchConfig(artefact=artefact, photos=(photo,), top=50, where=where))
        return [hit["row"] for hit in made["queries"][0]["found"]]

    everything = found()
    assert len(everything) == len(colours) and len(set(colours)) > 1
    one = f"colour={colours[0]}"
    assert found(one) == [row for row in everything if colours[row] == colours[0]]
    assert found(one, *(f"colour={colour}" for colour in colours)) == everything
    assert found(one, "title=none has it") == []
    assert "no document passes --where" in capsys.readouterr().out
    for where, piece in (
        ("color=red", "no column 'color' of texts. It has colour"),
        ("thumbnail=x", "no column 'thumbnail' of texts"),
        ("colour", "--where has 'colour'. Write NAME=VALUE"),
    ):
        with pytest.raises(UserError, match=piece):
            found(where)


def test_only_right_documents_are_framed_green() -> None:
    """From left: the query in a dark frame, then a right, a wrong and an unknown document."""
    white = Image.new("RGB", (16, 16), "white")
    sheet = draw_panel([(white, [(white, "", relevant) for relevant in (True, False, None)])])
    frames = [tuple(sheet[GAP - 2, x * 152 + GAP + 9].tolist()) for x in range(4)]
    assert frames == [DARK, GREEN, GREY, GREY]


def test_the_python_of_the_readme(artefact: Path, tmp_path: Path) -> None:
    """It runs as written beside an artefact and a photo, and prints five documents."""
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"(?ms)^```python\n(.*?)^```", readme)
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "artefact").symlink_to(artefact)
    Image.new("RGB", (64, 48), (200, 40, 40)).save(tmp_path / "photo.jpg")
    printed = io.StringIO()
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    scores = [float(line.split()[0]) for line in printed.getvalue().splitlines()]
    assert len(scores) == 5 and scores == sorted(scores, reverse=True)


def test_titles_and_ids_cannot_steer_a_terminal(
    artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three hits are three lines, whatever their titles hold, and a long id does not push the others aside."""
    copy, photo = tmp_path / "copy", tmp_path / "photo.png"
    shutil.copytree(artefact, copy)
    Image.new("RGB", (64, 48), (200, 40, 40)).save(photo)
    (part,) = (copy / "documents").iterdir()
    rows = pq.read_table(part)
    evil = "\x1b]0;owned\x07\x1b[2J\r\n  1.  0.9999  forged\n" + "x" * 5000
    for name in ("title", "item"):
        place = rows.column_names.index(name)
        rows = rows.set_column(place, name, pa.array([f"{n}{evil}" for n in range(len(rows))]))
    pq.write_table(rows, part)
    (copy / "manifest.json").unlink()
    write_manifest(copy)
    search.run(search.SearchConfig(artefact=copy, photos=(photo,), top=3, sheet=tmp_path / "sheet.png"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 3 + 1 and all(line.isprintable() and len(line) < 300 for line in lines)
    assert [line[:6] for line in lines[1:4]] == ["    1.", "    2.", "    3."]


def test_every_damaged_file_of_an_artefact_is_named(artefact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artefact, copy)
    files = sorted(file for file in copy.rglob("*") if file.is_file())
    assert {"encoder.safetensors", "encoder.pt2", "artefact.json", "spm.model"} < {file.name for file in files}

    def refused(name: str) -> None:
        with pytest.raises(UserError, match=name) as error:
            Artefact(copy)
        assert "\n" not in str(error.value)

    for file in files:
        content = file.read_bytes()
        for damaged in damages(content):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            # A manifest with another checksum in it accuses the file that has the listed one.
            refused("." if file.name == "manifest.json" else file.name)
        file.write_bytes(content)
    for more in ("more.txt", ".hidden", "documents/part-00009.parquet"):
        (copy / more).touch()
        refused(more)
        (copy / more).unlink()
    Artefact(copy)
    done = subprocess.run(["sha256sum", copy / "manifest.json"], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == fingerprint(copy) and '"sha256"' in (copy / "manifest.json").read_text()


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = documents_alone(tmp_path_factory.mktemp("documents"))
    make_queries(QueriesConfig(catalogue=made, min_count=2, category="shape"))
    return made


def exported(kind: str, catalogue: Path, run: Path) -> tuple[list[str], torch.Tensor, torch.Tensor, list[list[int]]]:
    """In a pool: trains and exports; (queries: texts, or photos' ids), their vectors, the documents' and the best 4
    ids, by trained towers.
    """
    config = config_of(kind, catalogue, run, **{"train.steps": 2})
    with trainer(config) as t:
        t.fit()
        t.method.towers.eval()
        embedder = Embedder(config.data, t.model_config, t.tokenizer, 5, t.mesh)
        documents = side_of(t.loader.catalogue, "document", None, ["title", "description"], None, 0)
        gallery = embedder.embed(t.method, documents)
        names = ["red disc", "a box", "", "unheard of"] if kind == "make" else [str(i) for i in documents.ids]
        photos = embedder.embed(t.method, documents, "image") if kind == "item" else None
        queries = embedder.embed_texts(t.method, names) if photos is None else photos
        best, _ = top_k(queries, gallery, 4)
    export.run(export.ExportConfig(run=run, out=run.parent / kind, onnx=False))
    return names, queries.vectors, gallery.vectors, best.tolist()


@pytest.fixture(scope="module", params=["make", "item"])
def other(request: Any, products: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """Kind, artefact, and what `exported` gives."""
    folder = tmp_path_factory.mktemp(request.param)
    (known,) = ranks(1).run(exported, request.param, products, folder / "run")
    return request.param, folder / request.param, known


def test_other_methods_search_as_they_were_trained(
    other: tuple[str, Path, Any], products: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """MAKE by text, ITEm by photo: the exported encoder gives the trained towers' vectors, the index their order."""
    kind, folder, (names, vectors, gallery, best) = other
    opened = Artefact(folder)
    if kind == "make":
        ours = opened.embed_texts(names)
    else:
        index = Catalogue(products).index
        sizes = [(int(index[int(i)]["width"]), int(index[int(i)]["height"])) for i in names]
        photos = [Photo(Catalogue(products).read_bytes(int(i)), (0, 0, *s)) for i, s in zip(names, sizes, strict=True)]
        ours = opened.embed(photos, 5)
    # An alignment fitted to 12 documents enlarges what rounding does to directions in which they hardly differ.
    torch.testing.assert_close(ours, vectors, rtol=0, atol=1e-6 if kind == "make" else 2e-5)
    rows = torch.cat([opened.vector(row) for row in range(12)])
    torch.testing.assert_close(rows, gallery, rtol=0, atol=1e-6)
    assert [[hit.row for hit in found] for found in opened.search(vectors, 4)] == best
    if kind == "make":
        query: dict[str, Any] = {"text": names[0]}
    else:
        (tmp_path / "photo").write_bytes(Catalogue(products).read_bytes(0))
        query = {"photos": (tmp_path / "photo",)}
    figures = search.run(search.SearchConfig(artefact=folder, top=4, sheet=tmp_path / "sheet.png", **query))
    assert [hit["row"] for hit in figures["queries"][0]["found"]] == best[0]
    assert Image.open(tmp_path / "sheet.png").width == 5 * 152
    assert "1. " in capsys.readouterr().out


@pytest.mark.parametrize("top", [3, 50])
def test_what_is_like_a_document_is_not_itself(other: tuple[str, Path, Any], top: int) -> None:
    _, folder, (_, _, gallery, _) = other
    rows = search.run(search.SearchConfig(artefact=folder, item="d4", top=top))["queries"][0]["found"]
    order = [row for row in (gallery @ gallery[4]).argsort(descending=True, stable=True).tolist() if row != 4]
    assert [hit["row"] for hit in rows] == order[:top] and rows[0]["id"] == f"d{order[0]}"


def test_a_query_that_an_artefact_does_not_take_is_told(other: tuple[str, Path, Any], tmp_path: Path) -> None:
    kind, folder, _ = other
    photo = tmp_path / "photo.png"
    Image.new("RGB", (40, 40)).save(photo)

    def message(**values: Any) -> str:
        with pytest.raises(UserError) as error:
            search.run(search.SearchConfig(artefact=folder, **values))
        return str(error.value)

    if kind == "make":
        assert "answers texts, not photos" in message(photos=(photo,))
    else:
        assert "answers photos, not texts" in message(text="red disc")
    assert "has no document with the id 'd99'" in message(item="d99")
    for two in ({}, {"photos": (photo,), "item": "d1"}, {"text": "red", "item": "d1"}):
        assert "photos, --text or --item" in message(**two)
    assert "--box" in message(item="d1", box=(0, 0, 1, 1)), "a box without a photo"


@pytest.mark.parametrize("part,kib", [("documents", 8), ("encoder.pt2", 100)])
def test_a_full_disk_leaves_nothing(
    trained: Path, artefact: Path, small_disk: Callable[[int], Path], part: str, kib: int
) -> None:
    size = {p.name: sum(f.stat().st_size for f in [p, *p.rglob("*")] if f.is_file()) for p in artefact.iterdir()}
    assert size[part] > kib * 1024 and (part == "documents" or size["documents"] + size["index.faiss"] < kib * 1024)
    disk = small_disk(kib)
    with pytest.raises(AssertionError, match="no space left on the disk"):
        ranks(1).run(export_here, trained, disk / "artefact")
    assert list(disk.iterdir()) == []


def test_an_artefact_of_another_format_is_refused(artefact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artefact, copy)
    (copy / "encoder.safetensors").unlink()
    meta = json.loads((copy / "artefact.json").read_text())
    meta["format"] = 2
    del meta["model"]  # as it was
    (copy / "artefact.json").write_text(json.dumps(meta))
    write_manifest(copy)
    with pytest.raises(UserError, match=r"has format 2, this version reads 4\. Export its run again"):
        Artefact(copy)


def test_mistakes_are_told(artefact: Path, trained: Path, tmp_path: Path) -> None:
    good, text, cut = tmp_path / "good.jpg", tmp_path / "text.jpg", tmp_path / "cut.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)).save(good)
    text.write_text("no picture")
    cut.write_bytes(good.read_bytes()[:900])

    def message(**values: Any) -> str:
        with pytest.raises(UserError) as error:
            search.run(search.SearchConfig(**{"artefact": artefact, "photos": (good,), **values}))
        return str(error.value)

    assert "missing file" in message(photos=(tmp_path / "none.jpg",))
    assert "not an image" in message(photos=(text,))
    assert "truncated or damaged" in message(photos=(cut,))
    assert "no such folder" in message(artefact=tmp_path / "nowhere")
    assert "no artefact" in message(artefact=trained)
    assert "is empty" in message(box=(5, 5, 0, 9))
    assert "leaves the photo" in message(box=(40, 5, 9, 9))
    assert "Give four" in message(box=(1, 2, 3))
    assert "not a .png or .jpg" in message(sheet=tmp_path / "sheet.txt")
    assert "contact sheet" in message(sheet=tmp_path / "no" / "sheet.png")
    with pytest.raises(UserError, match="exists already"):
        export.run(export.ExportConfig(run=trained, out=artefact))
    with pytest.raises(UserError, match="no document in split 'nosuch'"):
        export.run(export.ExportConfig(run=trained, out=tmp_path / "out", split="nosuch"))
    assert json.loads((artefact / "artefact.json").read_text())["checkpoint"] == "step-00000003"
