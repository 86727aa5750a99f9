"""Images whose bytes cannot be decoded: evaluation and export count them, name them and leave them out."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from harness.artefact.artefact import Artefact
from harness.catalogue.catalogue import Catalogue
from harness.commands import export
from harness.core.errors import UserError
from harness.evaluate.evaluation import Evaluation
from tests.runs import tiny_config, trainer


def with_damage(catalogue: Path, folder: Path, samples: list[int]) -> Path:
    """A copy of a catalogue of one shard, in which the bytes of these samples' images are damaged."""
    shutil.copytree(catalogue, folder)
    index, (shard,) = np.load(folder / "index.npy"), (folder / "shards").iterdir()
    data = bytearray(shard.read_bytes())
    for entry in index[samples]:
        start = int(entry["offset"])
        data[start : start + 40] = bytes(40)
    shard.write_bytes(data)
    return folder


def test_evaluation_and_export_leave_out_what_cannot_be_decoded(
    catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = [i for batch in Catalogue(catalogue).batches([], kind="document") for i in batch[0].to_pylist()]
    queries = [i for batch in Catalogue(catalogue).batches([], kind="query", split="val") for i in batch[0].to_pylist()]
    one = with_damage(catalogue, tmp_path / "one", documents[1:2])
    three = with_damage(catalogue, tmp_path / "three", [*documents[2:4], queries[0]])
    settings = {"data.backend": "reference", "evaluation.slices": ["colour"]}
    config = tiny_config(catalogue, tmp_path / "run", **settings, **{"train.steps": 2})
    with trainer(config) as t:
        t.fit()

        def evaluated(folder: Path, most: float) -> dict[str, float]:
            data = tiny_config(folder, tmp_path / "run", **settings, **{"data.max_bad_fraction": most}).data
            classes = tmp_path / "run" / "classes.parquet"
            common = (t.config.method, data, t.config.model, Catalogue(folder), t.loader.tokenizer, classes, t.mesh)
            return Evaluation(t.config.evaluation, *common).run(t.method).figures

        capsys.readouterr()
        whole = evaluated(catalogue, 0.01)
        assert "cannot be decoded" not in capsys.readouterr().out
        assert evaluated(one, 0.01)["documents"] == whole["documents"] - 1 == len(documents) - 1
        said = capsys.readouterr().out
        assert f"1 of {len(documents)} document images of {one} cannot be decoded and are left out" in said
        assert f"samples {documents[1]} (images/" in said
        with pytest.raises(UserError, match=r"2 of 6 document images .* more than data.max_bad_fraction = 0.3 allows"):
            evaluated(three, 0.3)
        figures = evaluated(three, 0.5)
        asked, asked_whole = (f["queries"] + f["queries_without_relevant"] for f in (figures, whole))
        assert (figures["documents"], asked) == (whole["documents"] - 2, asked_whole - 1)

    capsys.readouterr()
    made = export.run(
        export.ExportConfig(run=tmp_path / "run", out=tmp_path / "one-left-out", catalogue=one, onnx=False)
    )
    assert f"1 of {len(documents)} document images" in capsys.readouterr().out
    kept = [*documents[:1], *documents[2:]]
    found = Artefact(tmp_path / "one-left-out")
    assert made["documents"] == found.meta["documents"] == len(kept)
    assert found.documents.column("sample_id").to_pylist() == kept
    whole_one = tmp_path / "whole"
    export.run(export.ExportConfig(run=tmp_path / "run", out=whole_one, onnx=False))
    vectors = Artefact(whole_one)
    for row, sample in enumerate(kept):
        assert np.array_equal(found.vector(row).numpy(), vectors.vector(documents.index(sample)).numpy())
    with pytest.raises(UserError, match="2 of 6 document images"):
        export.run(export.ExportConfig(run=tmp_path / "run", out=tmp_path / "refused", catalogue=three, onnx=False))
    assert not (tmp_path / "refused").exists()
