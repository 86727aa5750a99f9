"""Parts of an export: kept when it ends in the middle, checked and used again, the same on any number of ranks."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from harness.artefact import document_chunks, index_tune
from harness.artefact.artefact import Artefact
from harness.commands import export, remove
from harness.core.errors import UserError
from harness.core.manifest import write_manifest
from tests.catalogues import make_catalogue
from tests.pool import ranks
from tests.runs import tiny_config, trainer

ROOT = Path(__file__).parents[1]


def export_to(run: Path, out: Path, **more: str) -> None:
    """In a pool, too: with 2 documents in a part."""
    export.run(export.ExportConfig(run=run, out=out, batch_size=2, onnx=False, **more))  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def run(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts") / "run"
    with trainer(tiny_config(catalogue, folder, **{"train.steps": 2})) as t:
        t.fit()
    return folder


@pytest.fixture(scope="module")
def whole(run: Path) -> Path:
    out = run.parent / "whole"
    export_to(run, out)
    assert sorted(file.name for file in (out / "documents").iterdir()) == [f"part-0000{n}.parquet" for n in range(3)]
    return out


def test_an_export_that_failed_goes_on_with_its_finished_parts(
    run: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, real = tmp_path / "out", document_chunks.write_documents
    kept = tmp_path / "out.tmp" / "kept"
    calls: list[str] = []

    def fails(file: Path, *args: object) -> None:
        calls.append(file.name)
        if len(calls) == 3:
            raise RuntimeError("the machine goes down")
        real(file, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(document_chunks, "write_documents", fails)
    with pytest.raises(RuntimeError, match="goes down"):
        export_to(run, out)
    first, second = sorted(kept.glob("part-*"))
    assert not out.exists() and first.name.startswith("part-00000-") and len(calls) == 3
    content = bytearray(second.read_bytes())
    content[100] ^= 1
    second.write_bytes(content)
    monkeypatch.setattr(document_chunks, "write_documents", real)
    capsys.readouterr()
    export_to(run, out)
    assert "1 of 3 parts of the documents are there already" in capsys.readouterr().out
    assert files(out) == files(whole) and sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_parts_of_another_export_are_not_used(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def fails(*args: object) -> None:
        raise RuntimeError("the encoder is not written")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="not written"):
        patched.setattr(export, "write_query_encoder", fails)
        export_to(run, out)
    export_to(run, out, vectors="float16")
    assert "there already" not in capsys.readouterr().out
    half = Artefact(out)
    assert half.meta["vectors"] == "float16" and str(
        pq.read_schema(out / "documents/part-00000.parquet").field("embedding").type
    ).startswith("fixed_size_list<element: halffloat>")
    export_to(run, tmp_path / "single")
    single = Artefact(tmp_path / "single")
    for row in range(6):
        torch.testing.assert_close(half.vector(row), single.vector(row), rtol=0, atol=6e-4)
        assert torch.equal(half.vector(row), single.vector(row).half().float())


@pytest.mark.parametrize("world", [2, 3])
def test_parts_are_the_same_on_any_number_of_ranks(run: Path, whole: Path, tmp_path: Path, world: int) -> None:
    ranks(world).run(export_to, run, tmp_path / "out")
    found, wanted = files(tmp_path / "out"), files(whole)
    assert found.keys() == wanted.keys()
    for name in found:
        if name.startswith("documents/") or name == "index.faiss":
            assert found[name] == wanted[name], name


KILLED = """
import os, signal, sys
from harness.artefact import document_chunks, index_tune
from harness.__main__ import main
real, calls = document_chunks._write, []
def killed(*args, **columns):
    real(*args, **columns)
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
document_chunks._write = killed
sys.exit(main())
"""


@pytest.mark.full
def test_an_export_that_is_killed_goes_on_with_its_finished_parts(run: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["export", str(run), "--out", str(out), "--batch-size", "2", "--onnx", "false"]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((tmp_path / "out.tmp" / "kept").glob("part-*.parquet"))) == 2
    done = subprocess.run([sys.executable, "-m", "harness", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "2 of 3 parts of the documents are there already" in done.stdout, done.stderr
    assert files(out) == files(whole) and sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_index_of_another_kind_answers_with_exact_scores(run: Path, whole: Path, tmp_path: Path) -> None:
    kind, out = "sq8", tmp_path / "out"
    index = export.IndexConfig(kind=kind, recall=0.5)
    export.run(export.ExportConfig(run=run, out=out, batch_size=2, onnx=False, index=index))
    opened, exact = Artefact(out), Artefact(whole)
    described = json.loads((out / "artefact.json").read_text())["index"]
    assert described["kind"] == kind and described["parameters"] == {"k_factor": 1} and described["queries"] > 0
    assert described["recall_at_10"] >= 0.5 and described["ram_bytes"] == (out / "index.faiss").stat().st_size
    queries = torch.cat([exact.vector(row) for row in range(6)])
    assert opened.search(queries, 6) == exact.search(queries, 6)
    assert np.array_equal(np.load(out / "vectors.npy"), queries.numpy())


def test_a_recall_out_of_reach_ends_the_export_and_keeps_its_parts(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many, out = make_catalogue(tmp_path / "many", classes=40), tmp_path / "out"
    monkeypatch.setattr(index_tune, "FACTORS", (1,))  # its codes have the last word
    index = export.IndexConfig(kind="ivf_rabitq", recall=1.0)
    with pytest.raises(UserError, match=r"an index of kind ivf_rabitq finds 0\..* less than --index\.recall 1") as told:
        export.run(export.ExportConfig(run=run, out=out, catalogue=many, onnx=False, index=index))
    assert "flat, which keep more of each vector, or --index.recall 0." in str(told.value) and not out.exists()
    assert len(list((tmp_path / "out.tmp" / "kept").glob("part-00000-*.parquet"))) == 1


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf_sq8"])
def test_documents_are_added_and_removed_without_a_new_index(
    run: Path, whole: Path, catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """Four documents, one of them taken out, then the other two: what is found is what a whole export finds."""
    few, out = make_catalogue(tmp_path / "few", classes=4), tmp_path / "out"
    index = export.IndexConfig(kind=kind, recall=0.5)
    export.run(export.ExportConfig(run=run, out=out, batch_size=2, catalogue=few, index=index))
    assert remove.run(remove.RemoveConfig(artefact=out, items=("d1",))) == {"removed": 1, "documents": 3}
    export.run(export.ExportConfig(run=run, out=out, batch_size=2, append=True))
    opened, exact = Artefact(out), Artefact(whole)
    assert opened.documents.column("item").to_pylist() == exact.documents.column("item").to_pylist()
    queries = torch.cat([exact.vector(row) for row in range(6)])
    found = [[hit.id for hit in hits] for hits in opened.search(queries, 6)]
    assert found == [[hit.id for hit in hits if hit.id != "d1"] for hits in exact.search(queries, 6)]
    assert [hit.id for hit in opened.search(queries, 6, {"item": ["d0", "d1", "d5"]})[1]] == [
        name for name in found[1] if name in ("d0", "d5")
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few", "out"]
    with pytest.raises(UserError, match="has no document with the id 'd1'"):
        opened.document("d1")
    for more, message in (
        ({}, "has all documents of .* Nothing was added"),
        ({"view": "image"}, "was exported with view both, not image. Export all documents into another folder"),
        ({"vectors": "float16"}, "was exported with vectors float32, not float16"),
    ):
        with pytest.raises(UserError, match=message):
            export.run(export.ExportConfig(run=run, out=out, batch_size=2, append=True, **more))  # type: ignore[arg-type]
    for items, message in (
        (("d1",), "has no document with the id d1. Nothing was removed"),
        (("d0", "d2", "d3", "d4", "d5"), "would have no document left"),
        ((), "no document to remove"),
    ):
        with pytest.raises(UserError, match=message):
            remove.run(remove.RemoveConfig(artefact=out, items=items))
    Artefact(out)


@pytest.mark.parametrize("rows", [[-1], [6], [2, 2], [3, 1], [0.5], [1, 2]])
def test_removed_rows_of_a_stranger_are_checked(run: Path, whole: Path, tmp_path: Path, rows: list[int]) -> None:
    out = shutil.copytree(whole, tmp_path / "out")
    np.save(out / "removed.npy", np.array(rows))
    meta = json.loads((out / "artefact.json").read_text())
    (out / "artefact.json").write_text(json.dumps({**meta, "removed": 2 if rows in ([2, 2], [3, 1]) else 1}))
    (out / "manifest.json").unlink()
    write_manifest(out)
    with pytest.raises(UserError, match=r"removed.npy (does not hold|holds rows)"):
        Artefact(out)
