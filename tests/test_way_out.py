"""What leaves this project: the encoder in ONNX, golden inputs, the schema, comparisons of two artefacts."""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from harness.artefact import onnx_encoder
from harness.artefact.artefact import Artefact
from harness.artefact.golden import lowest_cosine, read_golden
from harness.artefact.onnx_encoder import open_onnx, write_onnx
from harness.artefact.program import make_program
from harness.artefact.rows import Rows
from harness.catalogue.catalogue import Catalogue
from harness.commands import compare, export, remove, verify
from harness.commands.queries import QueriesConfig
from harness.commands.queries import run as make_queries
from harness.core.errors import UserError
from harness.core.manifest import write_manifest
from harness.evaluate.embed import Embedder, side_of
from tests.pool import ranks
from tests.runs import tiny_config, trainer
from tests.test_two_methods import config_of
from tests.twins import documents_alone

ROOT = Path(__file__).parents[1]
BATCHES = (1, 2, 3, 7, 64)


def exported(method: str, catalogue: Path, run: Path, out: Path, **values: Any) -> np.ndarray:
    """In a pool: trains and exports; embeddings of queries by the trained towers, the graph of training, which the
    ONNX encoder must give.
    """
    values = {"train.steps": 2, **values}
    make = tiny_config if method == "oclear" else lambda *given, **more: config_of(method, *given, **more)
    with trainer(make(catalogue, run, **values)) as t:
        t.fit()
        t.method.towers.eval()
        embedder = Embedder(t.config.data, t.model_config, t.tokenizer, 8, t.mesh)
        if method == "make":
            vectors = embedder.embed_texts(t.method, TEXTS).vectors
        else:
            kind = "query" if method == "oclear" else "document"
            seen = "both" if method == "oclear" else "image"
            vectors = embedder.embed(t.method, side_of(Catalogue(catalogue), kind, None, [], None, 0), seen).vectors
    export.run(export.ExportConfig(run=run, out=out, int8=method == "oclear"))
    found: np.ndarray = vectors.cpu().numpy()
    return found


TEXTS = [" ".join(["red disc box"[: n % 13], "unheard of", "a"][: n % 4]) for n in range(64)]


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = documents_alone(tmp_path_factory.mktemp("documents"))
    make_queries(QueriesConfig(catalogue=made, min_count=2, category="shape"))
    return made


@pytest.fixture(
    scope="module", params=["oclear", *(pytest.param(name, marks=pytest.mark.full) for name in ("make", "item"))]
)
def made(
    request: Any, catalogue: Path, products: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, np.ndarray, Path]:
    """Method, artefact, embeddings of queries by the trained towers, catalogue."""
    folder, used = tmp_path_factory.mktemp(request.param), catalogue if request.param == "oclear" else products
    (vectors,) = ranks(1).run(exported, request.param, used, folder / "run", folder / "artefact")
    return request.param, folder / "artefact", vectors, used


@pytest.fixture(scope="module")
def photos(made: tuple[str, Path, np.ndarray, Path]) -> Path:
    if made[0] != "oclear":
        pytest.skip("once")
    return made[1]


def inputs_of(method: str, folder: Path, catalogue: Path) -> np.ndarray:
    """What the encoder takes of the same queries."""
    taken: list[torch.Tensor] = []
    opened: Any = Artefact(folder)
    opened._encode = lambda inputs: taken.append(inputs) or torch.zeros(len(inputs), opened.model.embedding_dim)
    if method == "make":
        opened.embed_texts(TEXTS)
    else:
        read = Catalogue(catalogue)
        samples = read.table([], kind="query" if method == "oclear" else "document").column(0).to_pylist()
        files = []
        for sample in samples:
            files.append(folder.parent / f"{sample}.photo")
            files[-1].write_bytes(read.read_bytes(sample))
        opened.embed(files)
    found: np.ndarray = torch.cat(taken).numpy()
    return found


def test_onnx_gives_the_embeddings_of_training(made: tuple[str, Path, np.ndarray, Path]) -> None:
    method, folder, vectors, catalogue = made
    encode, inputs = open_onnx(folder / "encoder.onnx"), inputs_of(method, folder, catalogue)
    assert len(inputs) == len(vectors) >= 12
    for count in BATCHES:
        rows = np.arange(count) % len(vectors)
        ours = encode(inputs[rows])
        assert ours.shape == (count, vectors.shape[1]) and ours.dtype == np.float32
        assert lowest_cosine(ours, vectors[rows]) >= 0.9999
        # ITEm's alignment, fitted to 12 documents, enlarges what rounding does where they hardly differ.
        np.testing.assert_allclose(ours, vectors[rows], rtol=0, atol=2e-5 if method == "item" else 1e-5)


def test_the_files_name_no_source_of_this_machine(made: tuple[str, Path, np.ndarray, Path]) -> None:
    """Paths, and lines of code, which torch keeps with every node; the dimension is not torch's own name."""
    _, folder, _, _ = made
    with zipfile.ZipFile(folder / "encoder.pt2") as program:
        contents = [program.read(name) for name in program.namelist()]
    for content in [*contents, (folder / "encoder.onnx").read_bytes()]:
        assert not re.search(rb"\.py\b|site-packages", content) and str(ROOT).encode() not in content
    import onnx

    graph = onnx.load(folder / "encoder.onnx").graph
    assert [value.type.tensor_type.shape.dim[0].dim_param for value in (graph.input[0], graph.output[0])] == [
        "batch"
    ] * 2
    assert [value.name for value in (*graph.input, *graph.output)] == ["queries", "embeddings"]


@pytest.mark.full
def test_onnx_bytes_do_not_depend_on_the_process(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process, another than the one that exported; large weights lie beside the graph."""
    opened: Any = Artefact(photos)
    write_onnx(make_program(opened._encode, opened.model), tmp_path)
    assert (tmp_path / "encoder.onnx").read_bytes() == (photos / "encoder.onnx").read_bytes()
    monkeypatch.setattr(onnx_encoder, "LARGEST", 1000)
    (tmp_path / "large").mkdir()
    write_onnx(make_program(opened._encode, opened.model), tmp_path / "large")
    assert (tmp_path / "large" / "encoder.onnx.data").stat().st_size > 1000
    inputs = np.zeros((2, 3, 32, 32), np.float32)
    one, other = (open_onnx(folder / "encoder.onnx")(inputs) for folder in (photos, tmp_path / "large"))
    assert (one == other).all()


@pytest.mark.full
def test_int8_is_measured_and_refused_below_its_bar(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = json.loads((photos / "artefact.json").read_text())["onnx"]
    assert (
        0.9995 <= told["int8"]["lowest_cosine"] <= told["int8"]["mean_cosine"] < 1 and told["lowest_cosine"] > 0.99999
    )
    assert (photos / "encoder.int8.onnx").stat().st_size < (photos / "encoder.onnx").stat().st_size
    monkeypatch.setattr("harness.artefact.onnx_proof.LEAST_INT8_COSINE", 0.9999999)
    run = photos.parent / "run"
    with pytest.raises(UserError, match=r"encoder\.int8\.onnx differs: a cosine of 0\.999\d+ .* Leave --int8 out"):
        export.run(export.ExportConfig(run=run, out=tmp_path / "out", int8=True))
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_told_before_the_work(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = onnx_encoder.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else find(name))
    run = photos.parent / "run"
    with pytest.raises(UserError, match=r"onnxscript is not installed\. Install shelfmark\[onnx\], or leave"):
        export.run(export.ExportConfig(run=run, out=tmp_path / "out"))
    export.run(export.ExportConfig(run=run, out=tmp_path / "out", onnx=False, golden=0))
    assert not {"encoder.onnx", "golden"} & {path.name for path in (tmp_path / "out").iterdir()}
    assert json.loads((tmp_path / "out" / "artefact.json").read_text())["onnx"] is None
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"--int8 is measured on golden inputs"):
        onnx_encoder.require_onnx(True, 0)


def test_golden_queries_are_those_of_the_catalogue(made: tuple[str, Path, np.ndarray, Path]) -> None:
    method, folder, _, catalogue = made
    opened = Artefact(folder)
    golden = read_golden(folder, opened.model.embedding_dim)
    assert 6 <= len(golden.queries) <= 16 and all(
        len(query.found) == min(10, len(opened.documents)) for query in golden.queries
    )
    read = Catalogue(catalogue)
    if method == "make":
        assert {query.text for query in golden.queries} <= {*read.table(["title"]).column(1).to_pylist()}
    else:
        stored = {read.read_bytes(sample) for sample in range(read.num_samples)}
        assert {query.photo.read_bytes() for query in golden.queries if query.photo} <= stored
    samples = opened.documents.column("sample_id")
    for query, hits in zip(golden.queries, opened.search(torch.from_numpy(golden.embeddings), 10), strict=True):
        assert [samples[hit.row].as_py() for hit in hits] == query.found


def test_verify_embeds_the_golden_inputs_again(
    made: tuple[str, Path, np.ndarray, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    method, folder, _, _ = made
    told = verify.run(verify.VerifyConfig(paths=(folder,)))
    lines = capsys.readouterr().out.splitlines()
    assert told["things"] == len(lines) and all(line.endswith("whole") for line in lines)
    first = [re.split(r"[ ,]", line)[0] for line in lines]
    int8 = ["encoder.int8.onnx"] if method == "oclear" else []
    assert first == ["artefact", "preprocessing", "encoder", "index", "encoder.onnx", *int8]


Damage = Callable[[Path], None]


def other_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "encoder.safetensors")
    save_file({name: value + 0.05 for name, value in state.items()}, folder / "encoder.safetensors")


def other_preprocessing(folder: Path) -> None:
    spec = json.loads((folder / "preprocess.json").read_text())
    (folder / "preprocess.json").write_text(json.dumps({**spec, "eval_crop": 0.4}))


def other_index(folder: Path) -> None:
    content = bytearray((folder / "index.faiss").read_bytes())
    width = json.loads((folder / "artefact.json").read_text())["embedding_dim"]
    vectors = np.frombuffer(content[-4 * width * 6 :], np.float32).reshape(6, width)
    content[-4 * width * 6 :] = np.ascontiguousarray(np.tile(vectors[:1], (6, 1))).tobytes()
    (folder / "index.faiss").write_bytes(content)


def other_golden(folder: Path) -> None:
    np.save(folder / "golden" / "embeddings.npy", np.load(folder / "golden" / "embeddings.npy")[::-1].copy())


def no_onnx(folder: Path) -> None:
    (folder / "encoder.onnx").write_bytes(b"no graph")


def no_photo(folder: Path) -> None:
    next((folder / "golden").glob("photo-00.*")).write_bytes(b"no photo")


def strange_path(folder: Path) -> None:
    told = json.loads((folder / "golden" / "golden.json").read_text())
    told["queries"][0]["photo"] = "../../../../etc/passwd"
    (folder / "golden" / "golden.json").write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (other_weights, r"^encoder, lowest cosine .*: below 0\.9999\. Export again"),
        (other_preprocessing, r"^preprocessing and encoder, .*: below 0\.999\."),
        (other_index, r"^index, recall@3 .*: below 0\.90 of exact search"),
        (other_golden, r"^encoder, lowest cosine .*: below 0\.9999"),
        (no_onnx, r"^encoder\.onnx, .*is not opened by ONNX Runtime"),
        (no_photo, r"photo-00\.\w+: not an image"),
        (strange_path, r"golden\.json is damaged \(queries\)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_verify_names_what_differs(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Damage, line: str
) -> None:
    """Under a manifest that is genuine: the sums are right, the artefact is not."""
    folder = shutil.copytree(photos, tmp_path / "artefact")
    damage(folder)
    (folder / "manifest.json").unlink()
    write_manifest(folder, algorithm="sha256")
    with pytest.raises(UserError, match=r"\d of \d are damaged"):
        verify.run(verify.VerifyConfig(paths=(folder,)))
    assert re.search(line, capsys.readouterr().out, re.MULTILINE)


def test_documents_that_were_removed_are_missed_by_no_proof(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(photos, tmp_path / "artefact")
    before, documents = Artefact(photos), Artefact(photos).documents.to_pylist()
    best = before.search(torch.from_numpy(read_golden(photos, before.model.embedding_dim).embeddings[:1]), 1)[0][0].row
    remove.run(remove.RemoveConfig(artefact=folder, items=(documents[best]["item"],)))
    verify.run(verify.VerifyConfig(paths=(folder,)))
    left = [row["sample_id"] for number, row in enumerate(documents) if number != best]
    rows = Rows(folder, at_once=2, kept=Artefact(folder).kept)
    for first in range(len(left) + 1):
        found = [table.column(0).to_pylist() for table in rows.batches(["sample_id"], first)]
        assert [*itertools.chain.from_iterable(found)] == left[first:] and rows.count == len(left)
    told = compare.run(compare.CompareConfig(before=photos, after=folder))
    assert (told["documents"], told["removed_first"]) == ([len(documents), len(left)], [documents[best]["item"]])


def test_an_artefact_of_another_version_says_what_to_do(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(photos, tmp_path / "artefact")
    meta = json.loads((folder / "artefact.json").read_text())
    (folder / "artefact.json").write_text(json.dumps({**meta, "format": 1}))
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    with pytest.raises(UserError):
        verify.run(verify.VerifyConfig(paths=(folder,)))
    assert re.search(r"has format 1, this version reads \d\. Export its run again", capsys.readouterr().out)


def test_artefact_json_fits_its_schema(made: tuple[str, Path, np.ndarray, Path]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((ROOT / "harness/artefact/artefact.schema.json").read_text())
    check = jsonschema.Draft202012Validator(schema)
    check.check_schema(schema)
    meta = json.loads((made[1] / "artefact.json").read_text())
    check.validate(meta)
    assert meta.keys() | {"removed"} == schema["properties"].keys(), "the schema names every key"
    for key in schema["required"]:
        assert not check.is_valid({name: value for name, value in meta.items() if name != key}), key
    for path, value in ((("format",), "3"), (("golden",), 65), (("onnx", "lowest_cosine"), 0.5), (("documents",), 0)):
        wrong = copy.deepcopy(meta)
        at = wrong
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        assert not check.is_valid(wrong), path


# --- compare ---


def compared(before: Path, after: Path, **values: Any) -> dict[str, Any]:
    return compare.run(compare.CompareConfig(before=before, after=after, **values))


@pytest.fixture
def changed(photos: Path, tmp_path: Path) -> Path:
    """The artefact with another encoder, and without its first document."""
    folder = shutil.copytree(photos, tmp_path / "changed")
    other_weights(folder)
    (part,) = (folder / "documents").iterdir()
    table = pq.read_table(part).slice(1)
    pq.write_table(table, part)
    from harness.artefact.flat_index import write_index

    write_index(folder, 16)
    meta = json.loads((folder / "artefact.json").read_text())
    (folder / "artefact.json").write_text(json.dumps({**meta, "documents": len(table)}))
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    return folder


def test_the_same_artefact_compares_as_equal(made: tuple[str, Path, np.ndarray, Path]) -> None:
    folder = made[1]
    told = compared(folder, folder, min_overlap=1.0, max_removed=0.0)
    assert told["overlap_at_10"] == told["same_first"] == 1.0 and told["added"] == told["removed"] == 0
    assert told["query_cosine"]["lowest"] > 1 - 1e-6 and told["document_cosine"]["lowest"] > 1 - 1e-6
    assert min(told["milliseconds"]) > 0


def test_compare_tells_what_changed(
    photos: Path, changed: Path, catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = compared(photos, changed, catalogue=catalogue, split="test")
    out = capsys.readouterr().out
    gone = Artefact(photos).documents.column("item")[0].as_py()
    assert told["removed"] == 1 and told["removed_first"] == [gone] and f"removed: {gone}" in out
    assert told["documents"] == [6, 5] and told["queries"] == told["queries_with_class"] == 6
    assert told["overlap_at_10"] == pytest.approx(5 / 6) and told["query_cosine"]["lowest"] < 0.999
    assert told["document_cosine"]["lowest"] > 1 - 1e-6, "the documents that both have are the same"
    assert told["recall_at_10"] == [1.0, pytest.approx(5 / 6)], "the class of the lost document is not found"
    for bounds, what in (
        ({"min_overlap": 0.9}, r"overlap 0\.833 is below 0\.9"),
        ({"max_recall_drop": 0.1}, r"recall_at_10 falls from 1\.000 to 0\.833"),
        ({"max_removed": 0.1}, r"16\.7% of the documents are gone"),
        ({"max_slowdown": 1e-9}, r"a query takes .* ms, more than 1e-09 x"),
    ):
        with pytest.raises(UserError, match=what) as error:
            compared(photos, changed, catalogue=catalogue, **bounds)
        assert error.value.figures and error.value.figures["removed"] == 1
    Image.new("RGB", (40, 40), "red").save(tmp_path / "photo.png")
    assert compared(photos, changed, photos=(tmp_path / "photo.png",))["queries"] == 1
    with pytest.raises(UserError, match="the class of no query is known"):
        compared(photos, changed, photos=(tmp_path / "photo.png",), max_recall_drop=0.5)


@pytest.mark.full
def test_compare_writes_its_figures_and_exits_with_2(photos: Path, changed: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, "-m", "harness", "compare", photos, changed, "--min-overlap", "1", "--json", out],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "cannot replace" in done.stderr and "overlap_at_10" in done.stdout
    assert json.loads(out.read_text())["removed"] == 1


# --- docs/artefact.md and docs/search.ipynb, as written ---


def blocks(page: str) -> list[str]:
    return re.findall(r"(?ms)^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"))


@pytest.fixture
def beside(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with artefacts/products and photo.jpg, which is the current one."""
    (tmp_path / "artefacts").mkdir()
    (tmp_path / "artefacts" / "products").symlink_to(photos)
    y, x = np.mgrid[:120, :90]
    pixels = np.stack([2 * y, 2 * x, 255 - 2 * y], axis=2).astype(np.uint8)  # smooth: decoders differ at sharp edges
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", quality=95)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_of_the_page_runs_as_written(beside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, runtime, table = blocks("docs/artefact.md")
    found: dict[str, Any] = {}
    exec(compile(ours, "docs/artefact.md", "exec"), found)
    assert len(capsys.readouterr().out.splitlines()) == 5 and found["vectors"].numpy().shape == (1, 16)
    separate = {}
    exec(compile(runtime, "docs/artefact.md", "exec"), separate)
    assert separate["embedding"].shape == (1, 16)
    assert lowest_cosine(separate["embedding"], found["vectors"].numpy()) > 0.999
    exec(compile(table, "docs/artefact.md", "exec"), separate)
    assert separate["vectors"].shape == (6, 16) and separate["vectors"].dtype == np.float32
    best = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert best == [hit.id for hit in found["artefact"].search(found["vectors"], 5)[0]]


def test_the_onnx_snippet_imports_nothing_of_this_project() -> None:
    _, runtime, table = blocks("docs/artefact.md")
    assert {*re.findall(r"^(?:from|import) (\w+)", runtime + table, re.MULTILINE)} == {
        "json", "numpy", "onnxruntime", "PIL", "pyarrow",
    }  # fmt: skip


@pytest.mark.full
def test_the_notebook_runs(beside: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "docs/search.ipynb", 4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs hold paths and pictures of a machine"
    kernel = {**os.environ, "PYTHONPATH": str(ROOT)}
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(beside)}})
    with client.setup_kernel(env=kernel):
        for number, cell in enumerate(notebook.cells):
            client.execute_cell(cell, number)
    shown = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "float32 (1, 16)" in shown, textwrap.shorten(shown, 500)
