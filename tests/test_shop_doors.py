"""Data that people start with: catalogues of images only, one class, folders of weights as the hub has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from harness.artefact.artefact import Artefact
from harness.commands import export, govern, ingest, search, tokenizer
from harness.commands.govern import GovernConfig
from harness.commands.import_weights import ImportConfig
from harness.commands.import_weights import run as run_import
from harness.commands.ingest import IngestConfig
from harness.commands.tokenizer import TokenizerConfig
from harness.core.errors import UserError
from harness.evaluate.contact_sheet import CELL, GAP
from harness.text.tokenizer import Tokenizer, TokenStore
from harness.train.panels import panel_rows
from models.weights.convert import Source
from models.weights.rules import WeightsError
from tests.catalogues import COLUMNS, draw_rows, write_manifest
from tests.runs import tiny_config, trainer

BACKGROUND = (10, 200, 30)
IMAGES_ONLY = ("id", "kind", "split", "image", "class_id")


def catalogue_of(folder: Path, columns: tuple[str, ...] = COLUMNS, cut_out: Any = False, **changes: Any) -> Path:
    """A catalogue with some columns only; `changes` to each row; `cut_out`: all of every picture is transparent."""
    rows = [{**row, **changes} for row in draw_rows(folder / "drawn", classes=6, queries=5, size=32, seed=0)]
    for row in rows if cut_out else ():
        file = folder / "drawn" / row["image"]
        picture = Image.open(file).convert("RGBA")
        picture.putalpha(0)
        row["image"] = str(Path(row["image"]).with_suffix(".png"))
        picture.save(folder / "drawn" / row["image"])
    manifest = write_manifest(folder / "m.tsv", rows, columns)
    ingest.run(IngestConfig(manifest=manifest, images=folder / "drawn", out=folder / "c", workers=1))
    return folder / "c"


@pytest.mark.parametrize("title", [None, "\u200b"], ids=["no text", "zero-width text"])
def test_a_catalogue_without_text_gets_a_tokenizer(
    title: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = IMAGES_ONLY if title is None else (*IMAGES_ONLY, "title")
    catalogue = catalogue_of(tmp_path, columns, **({} if title is None else {"title": title}))
    figures = tokenizer.run(TokenizerConfig(catalogue=catalogue))
    assert figures["texts"] == 0 and "no sample has a title or a description" in capsys.readouterr().out
    own = Tokenizer.load(catalogue)
    ids = own.encode("Lamp 12")
    assert own.special.unk not in ids and own.decode(ids) == "Lamp 12"
    row = TokenStore.open(catalogue).batch(np.array([0, 35]), 8)
    expected = [own.special.bos, own.special.eos, own.special.eos]
    assert [[token for token in ids if token != own.special.pad] for ids in row.tolist()] == [expected] * 2


@pytest.mark.parametrize(
    ("key", "value"), [("mean", [123.7, 116.3, 103.5]), ("mean", [-0.1, 0, 0]), ("std", [58, 57, 57])]
)
def test_means_of_0_to_255_are_refused(key: str, value: list[float], tmp_path: Path) -> None:
    message = rf"data\.preprocess\.{key} is .*; it must lie in 0\.\.1: divide values of 0\.\.255 by 255"
    with pytest.raises(UserError, match=message):
        tiny_config(tmp_path, tmp_path, **{f"data.preprocess.{key}": value})


def test_text_in_another_split_is_a_mistake(tmp_path: Path) -> None:
    catalogue = catalogue_of(tmp_path, split="val", title="a lamp")
    with pytest.raises(UserError, match=r"no sample of split 'train' of .* has a title"):
        tokenizer.run(TokenizerConfig(catalogue=catalogue))


@pytest.mark.full
def test_cut_outs_without_text_are_trained_exported_and_found_on_the_background_of_the_recipe(tmp_path: Path) -> None:
    """Panel, projector, thumbnails and contact sheets show the colours that the towers see."""
    catalogue = catalogue_of(tmp_path, IMAGES_ONLY, cut_out=True)
    govern.run(GovernConfig(catalogue=catalogue))
    tokenizer.run(TokenizerConfig(catalogue=catalogue))
    settings = {"data.preprocess.background": BACKGROUND, "train.steps": 1}
    with trainer(tiny_config(catalogue, tmp_path / "run", **settings)) as run:
        assert run.fit()["steps"] == 1
        rows = panel_rows(
            run.validation.evaluation.run(run.method), run.loader.catalogue, run.validation.projector.background
        )
    shown = [rows[0][0], rows[0][1][0][0], Image.open(tmp_path / "run/tensorboard/projector/sprite.png")]
    export.run(export.ExportConfig(run=tmp_path / "run", out=tmp_path / "artefact", onnx=False))
    photo, sheet = next((tmp_path / "drawn").rglob("*.png")), tmp_path / "sheet.png"
    search.run(search.SearchConfig(artefact=tmp_path / "artefact", photos=(photo,), sheet=sheet, top=1))
    shown += [Artefact(tmp_path / "artefact").thumbnail(0)]
    # Of the sheet its cells: the query, then the best document, each in the middle of a cell.
    shown += [Image.open(sheet).crop((x, 60, x + 20, 80)) for x in (GAP + CELL // 2, 3 * GAP + CELL + CELL // 2)]
    for picture in shown:
        pixels = np.asarray(picture.convert("RGB")).astype(int)[2:5, 2:5]
        assert np.abs(pixels - np.array(BACKGROUND)).max() <= 6


def test_one_class_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalogue = catalogue_of(tmp_path, class_id="lamp")
    govern.run(GovernConfig(catalogue=catalogue))
    assert "one class only" in capsys.readouterr().out
    tokenizer.run(TokenizerConfig(catalogue=catalogue, vocab_size=48))
    with trainer(tiny_config(catalogue, tmp_path / "run"), ready=False) as run:
        assert any("one class only" in note for note in run.notes)


# --- weights ---

CONFIG: dict[str, Any] = {"model_type": "vit", "image_size": 16, "patch_size": 8, "hidden_act": "gelu"}
CONFIG |= {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
LAYER = "encoder.layer.0."
SHAPES: dict[str, tuple[int, ...]] = {
    "embeddings.cls_token": (1, 1, 32),
    "embeddings.position_embeddings": (1, 5, 32),
    "embeddings.patch_embeddings.projection.weight": (32, 3, 8, 8),
    "embeddings.patch_embeddings.projection.bias": (32,),
    **{f"{LAYER}attention.attention.{name}.weight": (32, 32) for name in ("query", "key", "value")},
    **{f"{LAYER}attention.attention.{name}.bias": (32,) for name in ("query", "key", "value")},
    f"{LAYER}attention.output.dense.weight": (32, 32),
    f"{LAYER}attention.output.dense.bias": (32,),
    f"{LAYER}intermediate.dense.weight": (64, 32),
    f"{LAYER}intermediate.dense.bias": (64,),
    f"{LAYER}output.dense.weight": (32, 64),
    f"{LAYER}output.dense.bias": (32,),
    **{f"{name}.{kind}": (32,) for name in (f"{LAYER}layernorm_before", f"{LAYER}layernorm_after", "layernorm")
       for kind in ("weight", "bias")},
}  # fmt: skip


def vit(folder: Path, change: dict[str, Any], odd: float = 0.0) -> Path:
    """A tiny ViT as transformers writes it, its description changed, and one number of one tensor `odd`."""
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    tensors["embeddings.cls_token"][0, 0, 3] = odd
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | change))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(odd: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds NaN or infinity in 1 tensor\(s\) of ours: vision\."):
        run_import(ImportConfig(out=tmp_path / "out", vision=vit(tmp_path / "odd", {}, odd)))


def test_square_images_are_said_to_be_needed(tmp_path: Path) -> None:
    wide = vit(tmp_path / "wide", {"image_size": [16, 24]})
    with pytest.raises(UserError, match="image_size is 16 x 24; towers of square images"):
        run_import(ImportConfig(out=tmp_path / "out", vision=wide))
    run_import(ImportConfig(out=tmp_path / "out", vision=vit(tmp_path / "square", {"image_size": [16, 16]})))


def test_the_file_that_the_description_means_is_taken(tmp_path: Path) -> None:
    both = vit(tmp_path / "both", {})
    save_file({"theirs": torch.zeros(2)}, both / "open_clip_model.safetensors")
    assert "theirs" not in Source(both).shapes
    (both / "open_clip_config.json").write_text('{"model_cfg": {}}')
    assert list(Source(both).shapes) == ["theirs"]
    (both / "open_clip_model.safetensors").rename(both / "other.safetensors")
    message = r"2 files \*\.safetensors, no index and none named open_clip_model\.safetensors"
    with pytest.raises(WeightsError, match=message):
        Source(both)
