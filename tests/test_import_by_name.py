"""`shelfmark import` of published weights by name, from a cache of the hub that is made here."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from harness.commands.import_weights import ImportConfig, run
from harness.core.errors import UserError
from models.presets import PRESETS
from models.weights.hub import PUBLISHED, known_name, towers_of

SIZE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
ROOT = Path(__file__).parents[1]


def snapshot(cache: Path, repository: str, model: Any, **files: dict[str, Any]) -> Path:
    """A model in the cache as `hf download` leaves it: links of a snapshot into blobs/."""
    home = cache / f"models--{repository.replace('/', '--')}"
    made = home / "snapshots" / "0123abc"
    model.save_pretrained(made)
    for name, content in files.items():
        (made / f"{name}.json").write_text(json.dumps(content))
    (home / "blobs").mkdir()
    for number, file in enumerate(sorted(made.iterdir())):
        shutil.move(file, home / "blobs" / str(number))
        file.symlink_to(f"../../blobs/{number}")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0123abc")
    return home


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; commands run in a folder of their own."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "cache"


def siglip() -> Any:
    torch.manual_seed(0)
    vision = transformers.SiglipVisionConfig(**SIZE, image_size=32, patch_size=16)
    text = {
        "vocab_size": 100,
        "max_position_embeddings": 8,
        "projection_size": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    text |= {"pad_token_id": 1}
    return transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision.to_dict(), text_config=SIZE | text))


def test_a_name_brings_all_of_its_towers(cache: Path, capsys: Any) -> None:
    pixels = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 1], "size": {"height": 32}}
    repository = PUBLISHED["siglip_base_patch16_224"].repository
    home = snapshot(cache, repository, siglip(), preprocessor_config=pixels, tokenizer={"version": "1.0"})
    (home / "snapshots" / "newer").mkdir()  # of another branch
    found = run(ImportConfig(out=Path("siglip-base-patch16-224")))
    assert found.keys() == {"vision", "text"}
    out, said = Path("weights/siglip_base_patch16_224"), capsys.readouterr().out
    assert (out / "tokenizer" / "tokenizer.json").is_file()
    assert f"{out}: licence of {repository}: Apache-2.0" in said
    assert f"{out}: expects 32 pixels, mean [0.4, 0.5, 0.6], std [0.2, 0.25, 1.0]" in said
    assert yaml.safe_load((out / "recipe.yaml").read_text())["data"] == {
        "preprocess": {"image_size": 32, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 1.0]}
    }


def test_names_and_folders_go_together(cache: Path, capsys: Any) -> None:
    """A name for one tower, with the pixels of the table, and a folder for the other."""
    torch.manual_seed(0)
    vit = transformers.ViTModel(transformers.ViTConfig(**SIZE, image_size=32, patch_size=16), add_pooling_layer=False)
    home = snapshot(cache, PUBLISHED["vit_b16"].repository, vit)
    bert = transformers.BertConfig(**SIZE, vocab_size=100, max_position_embeddings=8)
    transformers.BertModel(bert).save_pretrained("own-bert")
    run(ImportConfig(out=Path("start"), vision=Path("vit_b16"), text=Path("own-bert")))
    recipe = yaml.safe_load(Path("start/recipe.yaml").read_text())
    assert recipe["model"].keys() == {"vision", "text"}
    assert recipe["data"]["preprocess"] == {"image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    assert "own-bert" not in "".join(line for line in capsys.readouterr().out.splitlines() if "licence" in line)

    (home / "refs" / "main").unlink()  # as a download of a commit leaves it
    run(ImportConfig(out=Path("again"), vision=Path("google/vit-base-patch16-224-in21k")))
    Path("vit_b16").mkdir()  # a folder of that name comes first
    with pytest.raises(UserError, match=r"vit_b16 has neither a config\.json"):
        run(ImportConfig(out=Path("third"), vision=Path("vit_b16")))


def refused(config: ImportConfig) -> str:
    with pytest.raises(UserError) as caught:
        run(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_missing_is_one_line_with_the_command(cache: Path) -> None:
    repository = "facebook/dinov2-base"
    line = f"hf download {repository} --include '*.json' --include '*.safetensors'"
    wanted = f"{repository} is not in the cache {cache}. Run: {line}"
    assert refused(ImportConfig(out=Path("dinov2_vitb14"))) == wanted
    assert refused(ImportConfig(out=Path("x"), vision=Path("dinov2_vitb14"))) == wanted
    partial = cache / "models--facebook--dinov2-base/snapshots/1"
    partial.mkdir(parents=True)
    assert refused(ImportConfig(out=Path("dinov2-base"))).endswith(line)
    assert refused(ImportConfig(out=Path("dinov2_vitb41"))).endswith("Did you mean 'dinov2_vitb14'?")
    assert refused(ImportConfig(out=Path("x"), text=Path("bert-bsae"))).endswith("Did you mean 'bert_base'?")
    assert "'dinov2_vitb14' has no text tower" in refused(ImportConfig(out=Path("x"), text=Path("dinov2_vitb14")))
    assert "is not a folder" in refused(ImportConfig(out=Path("x"), text=Path("no/such/folder")))
    assert not list(Path().iterdir())


def test_the_page_lists_every_name_with_its_repository_and_licence() -> None:
    text = (ROOT / "docs/weights.md").read_text(encoding="utf-8")
    listed = {}
    for line in re.findall(r"^\| (`\w+` \|.*)", text, re.M):
        name, *cells = map(str.strip, line.split("|"))
        listed[name.strip("`")] = cells[:3]
    assert listed == {
        name: [f"`{one.repository}`", ", ".join(towers_of(name)), one.licence] for name, one in PUBLISHED.items()
    }
    known = {name for presets in PRESETS.values() for name in presets}
    assert PUBLISHED.keys() <= known and all(known_name(one.repository) == name for name, one in PUBLISHED.items())
