"""Training from the weights of another project: `import`, then --train.init-from; presets in a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from harness.commands.export_weights import ExportWeightsConfig
from harness.commands.export_weights import run as export_weights
from harness.commands.import_weights import ImportConfig
from harness.commands.import_weights import run as import_weights
from harness.core.cli import leaves
from harness.core.errors import UserError
from harness.train.config import parse
from harness.train.projection import start_at_principal
from models.principal import start_at_principal as start_layer
from models.tp_state import merged_state_dict
from tests.pool import ranks
from tests.runs import arguments, tiny_config, trainer
from tests.test_two_methods import config_of


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ViT as the hub would have it."""
    folder = tmp_path_factory.mktemp("hub") / "vit"
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    transformers.ViTModel(transformers.ViTConfig(**size, image_size=32, patch_size=8)).save_pretrained(folder)
    return folder


def start(hub: Path, folder: Path) -> dict[str, Any]:
    """Imports the ViT; what a recipe needs for it."""
    import_weights(ImportConfig(out=folder, vision=hub))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    return {**dict(leaves(recipe)), "train.init_from": folder}


def trained_from(catalogue: Path, run: Path, settings: dict[str, Any], tensor_parallel: int) -> dict[str, Any]:
    with trainer(tiny_config(catalogue, run, **settings), tensor_parallel) as t:
        before = {name: x.clone() for name, x in merged_state_dict(t.method.towers, t.mesh.tp).items()}
        losses = [t.train_step(data).loss.item() for data in t.loader.steps(0, 2)]
        t.save()
        return {"before": before, "losses": losses, "notes": t.notes}


def test_training_starts_from_imported_weights_at_any_layout(hub: Path, catalogue: Path, tmp_path: Path) -> None:
    settings = start(hub, tmp_path / "start")
    found = [
        ranks(world).run(trained_from, catalogue, tmp_path / f"run-{world}", settings, tp)[0]
        for world, tp in ((1, 1), (2, 2))
    ]
    state = transformers.ViTModel.from_pretrained(hub).state_dict()
    for one in found:
        tower = {name: value for name, value in one["before"].items() if name.startswith("vision.")}
        assert sum(x.numel() for x in tower.values()) == sum(
            x.numel() for name, x in state.items() if not name.startswith("pooler")
        )
        assert torch.equal(tower["vision.block.layers.1.mlp.linear_fc1.weight"], state_of(state, "intermediate", 1))
        assert any("started from the weights in" in note for note in one["notes"])
    assert found[0]["losses"] == pytest.approx(found[1]["losses"], rel=1e-4)
    # and out again, after two steps: another tower, of the same kind
    out = tmp_path / "hub-again"
    export_weights(ExportWeightsConfig(source=tmp_path / "run-1", out=out, tower="vision", layout="vit"))
    again = transformers.ViTModel.from_pretrained(out).state_dict()
    moved = (state_of(again, "intermediate", 1) - state_of(state, "intermediate", 1)).abs().max()
    assert 0 < moved < 0.1


def state_of(state: dict[str, torch.Tensor], part: str, layer: int) -> torch.Tensor:
    (name,) = [key for key in state if f".{layer}." in key and key.endswith("weight") and (part in key or "fc1" in key)]
    return state[name]


def starting(catalogue: Path, run: Path, settings: dict[str, Any], tensor_parallel: int) -> dict[str, Any]:
    """A run's photos as its imported tower sees them, and what its first embeddings are."""
    with trainer(tiny_config(catalogue, run, **settings), tensor_parallel) as t, torch.no_grad():
        towers, batch = t.method.towers, t.loader.load(20).batches[0]
        assert towers.training
        towers.eval()
        seen = []
        for step in range(t.loader.first_step, 11):  # 4 x 32 channels, 12 images a step
            first = t.loader.load(step).batches[0]
            seen.append(towers.vision(torch.cat([first.query_images, first.document_images]))[1])
        project = towers.query_transform.project
        return {
            "seen": torch.cat(seen).double(),
            "photos": towers.vision(batch.query_images)[1].double(),
            "embedded": t.method.embed_query(batch).double(),
            "documents": t.method.embed_document(batch, "image").double(),
            "pictures": towers.vision(batch.document_images)[1].double(),
            "norm": project.weight.norm().item(),
            "weight": project.weight.clone(),
            "notes": t.notes,
        }


@pytest.mark.parametrize(("world", "tensor_parallel"), [(1, 1), (3, 1), (2, 2)])
def test_a_projection_starts_at_the_principal_directions(
    hub: Path, catalogue: Path, tmp_path: Path, world: int, tensor_parallel: int
) -> None:
    """Embeddings before the first step against the singular vectors, in float64, of what one rank sees."""
    settings = start(hub, tmp_path / "start")
    random = ranks(1).run(starting, catalogue, tmp_path / "random", settings, 1)[0]
    settings["train.init_projection"] = "principal"
    pool = ranks(world).run(starting, catalogue, tmp_path / "run", settings, tensor_parallel)
    assert all(torch.equal(one["weight"], pool[0]["weight"]) for one in pool)
    assert any("16 principal directions of the images of 11 steps" in note for note in pool[0]["notes"])
    assert pool[0]["norm"] == pytest.approx(random["norm"], rel=1e-5)

    seen = random["seen"]
    centre = seen.mean(0)
    variance = torch.linalg.svdvals(seen - centre) ** 2 / len(seen)
    ridge = 1e-3 * variance.sum() / 32
    directions = torch.linalg.svd(seen - centre).Vh[:16] / (variance[:16, None] + ridge) ** 0.25

    def off(one: dict[str, Any], vectors: str, found: str) -> float:
        """Largest difference of a cosine between two images from what it should be."""
        expected = torch.nn.functional.normalize((one[vectors] - centre) @ directions.T)
        return float((one[found] @ one[found].T - expected @ expected.T).abs().max())

    for sides in (("photos", "embedded"), ("pictures", "documents")):
        assert all(off(one, *sides) < 1e-3 for one in pool)
        assert off(random, *sides) > 0.1  # it is not so by itself


@pytest.mark.parametrize(
    "vectors", [torch.zeros(0, 6), torch.ones(5, 6), torch.eye(6)[:2]], ids=["none", "equal", "few"]
)
def test_vectors_that_tell_few_directions_leave_finite_weights(vectors: torch.Tensor) -> None:
    layer, vectors = torch.nn.Linear(6, 4), vectors.double()
    size = float(layer.weight.detach().norm())
    start_layer(layer, torch.tensor(len(vectors)).double(), vectors.sum(0), vectors.T @ vectors)
    assert layer.bias.isfinite().all() and float(layer.weight.detach().norm()) == pytest.approx(size)


def test_the_optimizer_goes_on_from_a_projection_that_was_set(hub: Path, catalogue: Path, tmp_path: Path) -> None:
    """Its float32 copies of bf16 weights are those of the projection: a step of next to no rate leaves it in place."""
    settings = {**start(hub, tmp_path / "start"), "train.init_projection": "principal", "train.precision": "bf16"}
    config = tiny_config(catalogue, tmp_path / "run", **settings, **{"optimizer.lr": 1e-12})
    with trainer(config) as t:
        weight = t.method.towers.query_transform.project.weight
        before = weight.clone()
        t.train_step(t.loader.load(0))
        assert torch.equal(weight, before)


def test_a_projection_that_cannot_start_so_is_refused(hub: Path, catalogue: Path, tmp_path: Path) -> None:
    principal = {"train.init_projection": "principal"}
    with (
        pytest.raises(UserError, match=r"needs imported weights, and train\.init_from is not set"),
        trainer(tiny_config(catalogue, tmp_path / "run", **principal)),
    ):
        pass
    wide = {**start(hub, tmp_path / "start"), **principal, "model.embedding_dim": 33}
    with (
        pytest.raises(UserError, match=r"at most 32 directions.*embedding_dim is 33"),
        trainer(tiny_config(catalogue, tmp_path / "run", **wide)),
    ):
        pass
    with trainer(config_of("item", catalogue, tmp_path / "item")) as t, pytest.raises(UserError, match="no layers"):
        start_at_principal(t.method, t.loader, t.mesh)


def test_towers_that_do_not_fit_are_named(hub: Path, catalogue: Path, tmp_path: Path) -> None:
    settings = {**start(hub, tmp_path / "start"), "model.vision.num_layers": 1}
    with (
        pytest.raises(UserError, match=r"num_layers.*recipe\.yaml"),
        trainer(tiny_config(catalogue, tmp_path / "run", **settings)),
    ):
        pass


def test_presets_fill_in_what_a_recipe_leaves_out(catalogue: Path, tmp_path: Path) -> None:
    line = [arg for arg in arguments(catalogue, tmp_path) if "model." not in arg or "max_length" in arg]
    size = ["--data.preprocess.image_size", "224", "--model.vision.num_layers", "3"]
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({"model": {"vision": {"preset": "dinov2_vitb14", "hidden_size": 384}}}))
    config, _ = parse([*line, *size, "--config", str(file), "--model.text.preset=bert_small"])
    vision, text = config.model.vision, config.model.text
    assert (vision.patch_size, vision.num_attention_heads, vision.position_grid) == (14, 12, 37)
    assert (vision.hidden_size, vision.num_layers) == (384, 3), "the recipe's and the command line's own keys win"
    assert (text.hidden_size, text.post_norm, text.max_length) == (512, True, 16)
    assert parse(["--config", str(write(tmp_path, config))])[0].model == config.model
    with pytest.raises(UserError, match=r"model.vision.preset is 'vit_b17'; it can be vit_s16, "):
        parse([*line, "--model.vision.preset", "vit_b17"])


def write(folder: Path, config: Any) -> Path:
    """The configuration as a run folder keeps it."""
    values = config.to_dict()
    values.pop("run_dir")
    file = folder / "saved.yaml"
    file.write_text(yaml.safe_dump(values))
    return file
