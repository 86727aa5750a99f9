"""Towers with other projects' weights: the same numbers as `transformers` at TP 1, 2 and 4, and weights in and out
without loss.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import struct
import warnings
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harness.commands.export_weights import ExportWeightsConfig
from harness.commands.export_weights import run as run_export
from harness.commands.import_weights import ImportConfig
from harness.commands.import_weights import run as run_import
from harness.core.errors import UserError
from harness.core.manifest import verify, write_manifest
from harness.train.imported_weights import init_towers
from models.oclear import OclearConfig, OclearTowers
from models.plain.transformer import PlainBuilder
from models.presets import PRESETS, expand
from models.shape import shape_errors
from models.text import TextConfig, TextTower
from models.tp_state import load_merged, merge_shards, merged_state_dict
from models.vision import VisionConfig, VisionTower
from models.weights.convert import Converted, Source, _differences, export_tower, import_tower, write_exported
from models.weights.huggingface import FAMILIES, family_of
from models.weights.rules import WeightsError
from tests.damages import damages
from tests.pool import layout, ranks
from tests.runs import tiny_config, trainer

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
PIXELS = {"image_size": 28, "patch_size": 7}
WORDS = {"vocab_size": 100, "max_position_embeddings": 12}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DINOV2 = {key: value for key, value in SMALL.items() if key != "intermediate_size"} | PIXELS
CLIP_TEXT = SMALL | WORDS | {"bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 99, "projection_dim": 24}
SIGLIP_TEXT = SMALL | WORDS | {"bos_token_id": 98, "eos_token_id": 99, "projection_size": 32}
ROBERTA = SMALL | WORDS | NO_DROPOUT | {"max_position_embeddings": 14, "type_vocab_size": 1}
# name -> (class of transformers, its configuration's class and values, side of the images or None: a text)
MODELS: dict[str, tuple[str, str, dict[str, Any], int | None]] = {
    "vit": ("ViTModel", "ViTConfig", SMALL | PIXELS, 28),
    "vit without qkv bias": ("ViTModel", "ViTConfig", SMALL | PIXELS | {"qkv_bias": False}, 28),
    "vit, larger image": ("ViTModel", "ViTConfig", SMALL | PIXELS, 42),
    "dinov2": ("Dinov2Model", "Dinov2Config", DINOV2 | {"layerscale_value": 0.3}, 42),
    "dinov2 giant": ("Dinov2Model", "Dinov2Config", DINOV2 | {"use_swiglu_ffn": True}, 28),
    "dinov2 registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", DINOV2, 21),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", SMALL | PIXELS | {"num_register_tokens": 3}, 35),
    "dinov3 gated": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        SMALL | PIXELS | {"use_gated_mlp": True, "hidden_act": "silu"},
        28,
    ),
    "clip vision": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", SMALL | PIXELS | {"projection_dim": 24}, 28),
    "clip text": ("CLIPTextModelWithProjection", "CLIPTextConfig", CLIP_TEXT, None),
    "siglip vision": ("SiglipVisionModel", "SiglipVisionConfig", SMALL | PIXELS, 28),
    "siglip text": ("SiglipTextModel", "SiglipTextConfig", SIGLIP_TEXT, None),
    "siglip2 vision": ("Siglip2VisionModel", "Siglip2VisionConfig", SMALL | {"patch_size": 7, "num_patches": 16}, 21),
    "bert": ("BertModel", "BertConfig", SMALL | WORDS | NO_DROPOUT, None),
    "roberta": ("RobertaModel", "RobertaConfig", ROBERTA, None),
    "xlm-roberta": ("XLMRobertaModel", "XLMRobertaConfig", ROBERTA, None),
}
BASE = {"hidden_size": 768, "num_hidden_layers": 1, "num_attention_heads": 12, "intermediate_size": 3072}
BASE_DINOV2 = {key: value for key, value in BASE.items() if key != "intermediate_size"}
# The real widths, at one layer; vocabularies are cut, because they cost memory and nothing else.
WIDE: dict[str, tuple[str, str, dict[str, Any], int | None]] = {
    "vit b16": ("ViTModel", "ViTConfig", BASE, 224),
    "dinov2 b14 reg": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        BASE_DINOV2 | {"image_size": 518, "patch_size": 14},
        224,
    ),
    "clip b16 vision": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", BASE | {"patch_size": 16}, 224),
    "clip b16 text": (
        "CLIPTextModelWithProjection",
        "CLIPTextConfig",
        {"num_hidden_layers": 1, "vocab_size": 1000, "bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 99},
        None,
    ),
    "siglip base": ("SiglipVisionModel", "SiglipVisionConfig", BASE, 224),
    "bert base": ("BertModel", "BertConfig", BASE | NO_DROPOUT | {"vocab_size": 1000}, None),
    "xlm-roberta base": (
        "XLMRobertaModel",
        "XLMRobertaConfig",
        BASE | NO_DROPOUT | {"vocab_size": 1000, "max_position_embeddings": 514, "type_vocab_size": 1},
        None,
    ),
}


@dataclass(frozen=True)
class Case:
    """Outputs of a model of transformers for `x`, and its gradients under our names (without the tower's)."""

    folder: Path
    x: Tensor
    outputs: list[Tensor]
    grads: dict[str, Tensor]


def reference(name: str) -> tuple[nn.Module, Tensor]:
    """The model of transformers with random weights, none of them at a special value, and an input."""
    model, config, values, side = (MODELS | WIDE)[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = getattr(transformers, model)(getattr(transformers, config)(**values)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    if side is not None:
        return theirs, torch.randn(2 if name in WIDE else 3, 3, side, side)
    length = min(theirs.config.max_position_embeddings - 2 * ("oberta" in model.lower()), 77)
    tokens = torch.randint(5, 98, (3, length))
    end, pad = (99, 99) if "CLIP" in model else (2, theirs.config.pad_token_id)
    for row, count in enumerate((length, length - 4, 3)):
        tokens[row, count - 1] = end
        tokens[row, count:] = pad
    return theirs, tokens


def outputs_of_theirs(name: str, theirs: nn.Module, x: Tensor) -> list[Tensor]:
    """[token vectors, pooled vector], as our towers give them."""
    if x.dim() == 2:
        plain = "CLIP" in type(theirs).__name__ or "Siglip" in type(theirs).__name__
        out = theirs(x) if plain else theirs(x, attention_mask=(x != theirs.config.pad_token_id).long())
        words = out.last_hidden_state
        seen = torch.ones_like(words[:, :, :1]) if plain else (x != theirs.config.pad_token_id)[:, :, None]
        pooled = out.text_embeds if "CLIP" in name.upper() else out.pooler_output if plain else words[:, 0]
        return [words * seen, pooled]
    if name.startswith("siglip2"):
        rows = x.shape[2] // 7
        patches = (
            x.unflatten(2, (rows, 7)).unflatten(4, (rows, 7)).permute(0, 2, 4, 3, 5, 1).reshape(len(x), rows**2, -1)
        )
        shapes = torch.tensor([[rows, rows]] * len(x))
        out = theirs(patches, torch.ones(len(x), rows**2), shapes)
        return [out.last_hidden_state, out.pooler_output]
    out = theirs(x, interpolate_pos_encoding=True) if name.startswith(("vit", "clip", "siglip")) else theirs(x)
    tokens = out.last_hidden_state
    if name.startswith("siglip"):
        return [tokens, out.pooler_output]
    patches = tokens[:, 1 + getattr(theirs.config, "num_register_tokens", 0) :]
    if name.startswith("clip"):
        return [theirs.vision_model.post_layernorm(patches), out.image_embeds]
    return [patches, tokens[:, 0]]


def outputs_of_ours(tower: VisionTower | TextTower, x: Tensor) -> list[Tensor]:
    if isinstance(tower, VisionTower):
        return list(tower(x))
    words = tower(x)
    seen = torch.ones_like(x) if not tower.config.mask_padding else x != tower.config.pad_id
    return [words * seen[:, :, None], tower.pool(x, words)]


def weighted(outputs: list[Tensor]) -> Tensor:
    """A loss to which every output number contributes its own share."""
    g = torch.Generator().manual_seed(1)
    return sum((out * torch.randn(out.shape, generator=g).to(out)).sum() for out in outputs)  # type: ignore[return-value]


def tower_of(config: VisionConfig | TextConfig, build: Any) -> VisionTower | TextTower:
    return VisionTower(config, build) if isinstance(config, VisionConfig) else TextTower(config, build)


def check_parity(folders: dict[str, Path], size: int) -> None:
    """In a pool: every tensor-parallel tower has the weights of its folder, and gives its outputs and gradients."""
    from models.transformer import MegatronBuilder

    with layout(size) as mesh:
        for name, folder in folders.items():
            case = torch.load(folder / "case.pt", weights_only=False)
            converted, state = imported(case)
            tower = tower_of(converted.config, MegatronBuilder(mesh.groups))
            load_merged(tower, state, mesh.tp)
            merged = merged_state_dict(tower, mesh.tp)
            assert merged.keys() == state.keys() and all(torch.equal(merged[k], state[k]) for k in state), name
            compare(tower, case, name, mesh.tp)


def compare(tower: Any, case: Case, model: str, group: Any = None) -> None:
    found = outputs_of_ours(tower, case.x)
    for what, mine, other in zip(("tokens", "pooled"), found, case.outputs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5, msg=lambda m, what=what: f"{model}, {what}: {m}")
    weighted(found).backward()
    largest = max(float(grad.abs().max()) for grad in case.grads.values())
    for name, parameter in tower.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        grad = grad if group is None else merge_shards(grad, parameter, group)
        other = case.grads[name]
        error, size = (grad - other).abs().max(), float(other.abs().max())
        assert error <= 1e-4 * max(1e-3 * largest, size), f"{model}, {name}: {error:.2e} of {size:.2e}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every model of transformers on disk, in several files, and what it gives as case.pt.

    The gradients take the weights' way to our names: it only moves numbers.
    """
    found = {name: tmp_path_factory.mktemp("model") for name in MODELS | WIDE}
    for name, folder in found.items():
        theirs, x = reference(name)
        theirs.save_pretrained(folder, max_shard_size="20kB" if name in MODELS else "8MB")
        outputs = outputs_of_theirs(name, theirs, x)
        weighted(outputs).backward()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        theirs.save_pretrained(folder / "gradients")
        case = Case(folder, x, [output.detach() for output in outputs], {})
        case = replace(case, grads=imported(replace(case, folder=folder / "gradients"))[1])
        torch.save(case, folder / "case.pt")
    return found


def imported(case: Case) -> tuple[Converted, dict[str, Tensor]]:
    kind = "vision" if case.x.dim() == 4 else "text"
    converted = import_tower(Source(case.folder), kind, projection=True)
    return converted, {key.removeprefix(f"{kind}."): value for key, value in converted.state.items()}


@pytest.mark.parametrize("name", MODELS | WIDE)
def test_plain_tower_equals_transformers(name: str, folders: dict[str, Path]) -> None:
    case = torch.load(folders[name] / "case.pt", weights_only=False)
    converted, state = imported(case)
    tower = tower_of(converted.config, PlainBuilder())
    tower.load_state_dict(state)
    compare(tower, case, name)


@pytest.mark.parametrize("size", [2, *(pytest.param(size, marks=pytest.mark.full) for size in (1, 4))])
def test_tensor_parallel_towers_equal_transformers(size: int, folders: dict[str, Path]) -> None:
    ranks(size).run(check_parity, folders, size)


def written(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], name: str = "config.json") -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / name).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_bit_equal_and_transformers_reads_it(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    source = Source(folders[name])
    case = torch.load(folders[name] / "case.pt", weights_only=False)
    converted, _ = imported(case)
    described, tensors = export_tower(converted.config, converted.state, converted.origin)
    theirs = source.tensors(list(source.shapes))
    renamed = {key: key.removeprefix("text_model.").removeprefix("vision_model.") for key in tensors}
    assert all(torch.equal(tensors[key], theirs.get(key, theirs.get(renamed[key]))) for key in tensors)

    written(tmp_path, described, tensors)
    again = import_tower(Source(tmp_path), "vision" if case.x.dim() == 4 else "text", projection=True)
    assert again.config == converted.config and again.state.keys() == converted.state.keys()
    assert all(torch.equal(again.state[key], value) for key, value in converted.state.items())

    model, loading = getattr(transformers, MODELS[name][0]).from_pretrained(tmp_path, output_loading_info=True)
    spare = {
        key for key in loading["missing_keys"] if not any(part in key for part in ("mask_token", "pooler", "register"))
    }
    assert not spare and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    with torch.no_grad():
        for mine, other in zip(outputs_of_theirs(name, model.eval(), case.x), case.outputs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_a_pair_gives_both_towers_and_its_projections_when_asked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    both = {"vision_config": SMALL | PIXELS, "text_config": CLIP_TEXT | {"eos_token_id": 2}, "projection_dim": 24}
    theirs = transformers.CLIPModel(transformers.CLIPConfig(**both)).eval()
    theirs.save_pretrained(tmp_path)
    x, tokens = torch.randn(2, 3, 28, 28), torch.tensor([[5, 7, 99, 0, 0], [1, 2, 3, 4, 99]])
    with torch.no_grad():
        wanted = theirs.get_image_features(x).pooler_output, theirs.get_text_features(tokens).pooler_output
    found = []
    for kind in ("vision", "text"):
        assert import_tower(Source(tmp_path), kind).config.projection_dim == 0
        converted = import_tower(Source(tmp_path), kind, projection=True)
        assert converted.left_out == ["logit_scale"]
        tower = tower_of(converted.config, PlainBuilder())
        tower.load_state_dict({key.removeprefix(f"{kind}."): value for key, value in converted.state.items()})
        with torch.no_grad():
            found.append(outputs_of_ours(tower, x if kind == "vision" else tokens)[1])
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_every_tensor_is_accounted_for(folders: dict[str, Path], tmp_path: Path) -> None:
    source = Source(folders["bert"])
    tensors, config = source.tensors(list(source.shapes)), source.config
    assert import_tower(source, "text").left_out == ["pooler.dense.bias", "pooler.dense.weight"]

    more = written(tmp_path / "more", config, tensors | {"adapter.weight": torch.ones(2)})
    with pytest.raises(WeightsError, match=r"1 tensor\(s\) that the tower has no place for: adapter.weight"):
        import_tower(Source(more), "text")
    assert "adapter.weight" in import_tower(Source(more), "text", allow_unused=True).left_out

    gone = "encoder.layer.1.attention.self.key.weight"
    less = written(tmp_path / "less", config, {key: value for key, value in tensors.items() if key != gone})
    with pytest.raises(WeightsError, match=rf"1 tensor\(s\) are missing: {gone}"):
        import_tower(Source(less), "text")

    shorter = written(tmp_path / "shorter", config | {"max_position_embeddings": 9}, tensors)
    with pytest.raises(WeightsError, match=r"text.position is \[12, 32\], not \[9, 32\]"):
        import_tower(Source(shorter), "text")

    deeper = written(tmp_path / "deeper", config | {"num_hidden_layers": 1}, tensors)
    with pytest.raises(WeightsError, match=r"16 tensor\(s\) that the tower has no place for: encoder.layer.1"):
        import_tower(Source(deeper), "text")
    with pytest.raises(WeightsError, match="model_type is 'bert'; a vision tower comes from clip"):
        import_tower(source, "vision")


def test_what_a_layout_cannot_say_is_refused(folders: dict[str, Path]) -> None:
    converted = import_tower(Source(folders["dinov2"]), "vision")
    with pytest.raises(WeightsError, match="vit has no place for this tower: layer_scale is True, not False"):
        export_tower(converted.config, converted.state, "vit")
    with pytest.raises(WeightsError, match="'bert' is not a layout of a vision tower"):
        export_tower(converted.config, converted.state, "bert")
    rotary = import_tower(Source(folders["dinov3"]), "vision")
    rotary.state["vision.block.layers.0.self_attention.linear_qkv.bias"][8] = 1.0  # the first head's first key
    with pytest.raises(WeightsError, match="bias for keys"):
        export_tower(rotary.config, rotary.state, "dinov3_vit")


def test_old_names_of_layer_norms_are_known(folders: dict[str, Path], tmp_path: Path) -> None:
    source = Source(folders["bert"])
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in source.tensors(list(source.shapes)).items()
    }
    found = import_tower(Source(written(tmp_path / "old", source.config, old)), "text").state
    assert all(torch.equal(found[key], value) for key, value in import_tower(source, "text").state.items())


OTHERS = json.loads((Path(__file__).parent / "other_layouts.json").read_text())


def fill(name: str, shape: list[int]) -> Tensor:
    """The weights that the recorded outputs of timm and open_clip were made with: every number from its place."""
    values = 0.2 * torch.sin(
        1.7 * torch.arange(math.prod(shape), dtype=torch.float64) + zlib.crc32(name.encode()) % 100
    )
    return (values + 1 if len(shape) == 1 and not name.endswith("bias") else values).float().reshape(shape)


RECORDED = [name for name in OTHERS if name not in ("source", "arguments")]


def recorded(name: str, folder: Path) -> Path:
    """A folder with the model of timm or open_clip whose names, shapes and outputs were recorded; neither is installed
    here.
    """
    tensors = {key: fill(key, shape) for key, shape in OTHERS[name]["shapes"].items()}
    config = OTHERS[name]["config"]
    if name.startswith("timm"):
        return written(folder, config, tensors)
    return written(folder, {"model_cfg": config}, tensors, "open_clip_config.json")


@pytest.mark.parametrize("name", RECORDED)
def test_timm_and_open_clip_give_what_they_gave(name: str, tmp_path: Path) -> None:
    folder = recorded(name, tmp_path / "model")
    images = torch.sin(torch.arange(2 * 3 * 32 * 32, dtype=torch.float64) * 1.3).float().reshape(2, 3, 32, 32)
    tokens = torch.tensor([[5, 7, 9, 60, 63, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 63]])
    for kind, wanted in OTHERS[name]["outputs"].items():
        converted = import_tower(Source(folder), kind, projection=True)
        tower = tower_of(converted.config, PlainBuilder())
        tower.load_state_dict({key.removeprefix(f"{kind}."): value for key, value in converted.state.items()})
        with torch.no_grad():
            pooled = outputs_of_ours(tower, images if kind == "vision" else tokens)[1]
        torch.testing.assert_close(pooled[:, :6], torch.tensor(wanted), rtol=1e-5, atol=1e-5)


def through_towers(models: dict[str, Path]) -> dict[str, dict[str, tuple[Any, dict[str, Tensor]]]]:
    """In a pool of two tensor-parallel ranks: each recorded tower in two shards, merged, and exported in its layout."""
    from models.transformer import MegatronBuilder

    found: dict[str, dict[str, tuple[Any, dict[str, Tensor]]]] = {name: {} for name in models}
    for name, folder in models.items():
        with layout(1 if "giant" in name else 2) as mesh:  # a gated width of 341 does not halve
            for kind in OTHERS[name]["outputs"]:
                converted = import_tower(Source(folder), kind, projection=True)
                tower = tower_of(converted.config, MegatronBuilder(mesh.groups))
                load_merged(tower, {key.removeprefix(f"{kind}."): v for key, v in converted.state.items()}, mesh.tp)
                state = {f"{kind}.{key}": value for key, value in merged_state_dict(tower, mesh.tp).items()}
                found[name][kind] = export_tower(converted.config, state, "timm" if "timm" in name else "open_clip")
    return found


def test_timm_and_open_clip_there_and_back_is_bit_equal_at_tensor_parallel_2(tmp_path: Path) -> None:
    """And what the descriptions say are arguments that timm and open_clip know (recorded as `arguments`)."""
    models = {name: recorded(name, tmp_path / name) for name in RECORDED}
    for name, towers in ranks(2).run(through_towers, models)[0].items():
        source = Source(models[name])
        theirs = source.tensors(list(source.shapes))
        for kind, (described, tensors) in towers.items():
            before = import_tower(source, kind, projection=True)
            plain = {key if key in theirs else key.removeprefix("text."): value for key, value in tensors.items()}
            own = [key for key in theirs if kind == "text" or name.startswith("timm") or key.startswith("visual.")]
            own = [key for key in own if kind == "vision" or not key.startswith("visual.")]
            assert plain.keys() == set(own) - set(before.left_out), name
            assert all(torch.equal(value, theirs[key]) for key, value in plain.items()), name

            (tmp_path / f"{name} {kind}").mkdir()
            write_exported(tmp_path / f"{name} {kind}", described, tensors)
            again = import_tower(Source(tmp_path / f"{name} {kind}"), kind, projection=True)
            assert again.config == before.config and again.state.keys() == before.state.keys()
            assert all(torch.equal(again.state[key], value) for key, value in before.state.items())
            for part in ("model_args", "model_cfg"):
                for key, value in described.get(part, {}).items():
                    assert key in OTHERS["arguments"][part]
                    assert not isinstance(value, dict) or value.keys() <= set(OTHERS["arguments"][key])


def test_timm_and_open_clip_refuse_what_they_cannot_say(folders: dict[str, Path]) -> None:
    for name, kind, layout_name, what in (
        ("dinov2 registers", "vision", "timm", "class_position is True, not False"),
        ("dinov3", "vision", "timm", "positions is 'rotary', not 'learned'"),
        ("vit", "vision", "timm", "layernorm_eps is 1e-12, not 1e-06"),
        ("siglip vision", "vision", "open_clip", "pooling is 'attention', not 'mean or class'"),
        ("bert", "text", "open_clip", "post_norm is True, not False"),
    ):
        converted = import_tower(Source(folders[name]), kind)
        with pytest.raises(WeightsError, match=rf"{layout_name} has no place for this tower: .*{what}"):
            export_tower(converted.config, converted.state, layout_name)
    converted = import_tower(Source(folders["dinov2"]), "vision")
    assert export_tower(converted.config, converted.state, "timm")[0]["model_args"]["img_size"] == 28
    with pytest.raises(WeightsError, match="position_resize is 'bicubic', not 'bicubic_antialias'"):
        export_tower(replace(converted.config, image_size=42), converted.state, "timm")
    gated = replace(converted.config, activation="swiglu", layernorm_eps=1e-5)
    with pytest.raises(WeightsError, match="layernorm_eps is 1e-05, not 1e-06"):
        export_tower(gated, converted.state, "timm")


def test_a_pair_goes_out_for_open_clip(tmp_path: Path) -> None:
    folder = recorded("open_clip", tmp_path / "model")
    run_import(ImportConfig(out=tmp_path / "start", vision=folder, text=folder, projection=True))
    out = tmp_path / "out"
    run_export(ExportWeightsConfig(source=tmp_path / "start", out=out, tower="both", layout="open_clip"))
    cfg = json.loads((out / "open_clip_config.json").read_text())["model_cfg"]
    assert cfg["embed_dim"] == 24 and cfg["quick_gelu"] and cfg["vision_cfg"]["width"] == 128
    tensors = Source(out).tensors(list(Source(out).shapes))
    theirs = Source(folder).tensors(list(Source(folder).shapes))
    assert tensors.pop("logit_scale").shape == () and len(tensors) == len(theirs) - 1
    assert all(torch.equal(value, theirs[key.removeprefix("text.")]) for key, value in tensors.items())

    run_import(ImportConfig(out=tmp_path / "apart", vision=folder, text=folder))  # widths 128 and 64, no projection
    with pytest.raises(UserError, match="cannot hold these towers together: embed_dim is 128 and 64"):
        run_export(
            ExportWeightsConfig(source=tmp_path / "apart", out=tmp_path / "no", tower="both", layout="open_clip")
        )
    with pytest.raises(UserError, match="'timm' holds one tower"):
        run_export(ExportWeightsConfig(source=tmp_path / "start", out=tmp_path / "no", tower="both", layout="timm"))
    only = tmp_path / "image"
    run_export(ExportWeightsConfig(source=tmp_path / "apart", out=only, tower="vision", layout="open_clip"))
    assert torch.equal(Source(only).tensors(["visual.proj"])["visual.proj"], torch.eye(128))
    assert import_tower(Source(only), "vision").config.projection_dim == 0


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    theirs = transformers.AutoConfig.for_model(model_type).to_dict()
    family = FAMILIES[model_type]
    assert {key: theirs.get(key, value) for key, value in family.defaults.items()} == family.defaults
    transformers_class = getattr(transformers, family.architecture[0])
    assert transformers_class.config_class.model_type == model_type


PRESET_SOURCES = {
    "vit_b16": ("vit", {"layer_norm_eps": 1e-6}),
    "dinov2_vitb14": ("dinov2", {"image_size": 518}),
    "dinov2_vits14_reg4": (
        "dinov2_with_registers",
        {"image_size": 518, "patch_size": 14, "hidden_size": 384, "num_attention_heads": 6},
    ),
    "dinov2_vitg14": (
        "dinov2",
        {
            "image_size": 518,
            "hidden_size": 1536,
            "num_attention_heads": 24,
            "num_hidden_layers": 40,
            "use_swiglu_ffn": True,
        },
    ),
    "dinov3_vits16": ("dinov3_vit", {"num_register_tokens": 4}),
    "clip_vit_b32": ("clip_vision_model", {}),
    "siglip_base_patch16_224": ("siglip_vision_model", {}),
    "bert_base": ("bert", {}),
    "roberta_base": ("roberta", {"layer_norm_eps": 1e-5, "max_position_embeddings": 514, "type_vocab_size": 1}),
}


@pytest.mark.parametrize("preset", PRESET_SOURCES)
def test_presets_are_the_models_of_that_name(preset: str) -> None:
    model_type, values = PRESET_SOURCES[preset]
    family, said = family_of({"model_type": model_type, **values}, FAMILIES[model_type].tower)
    wanted = family.fields(said) | {"projection_dim": 0}
    kind: Any = VisionConfig if family.tower == "vision" else TextConfig
    assert not _differences(kind(**PRESETS[family.tower][preset]), kind(**wanted))


@pytest.mark.parametrize(("tower", "preset"), [(tower, name) for tower in PRESETS for name in PRESETS[tower]])
def test_presets_fit_together(tower: str, preset: str) -> None:
    kind: Any = VisionConfig if tower == "vision" else TextConfig
    config = kind(**PRESETS[tower][preset])
    assert config.errors("model") + shape_errors(config, 2, "model") == []


def test_a_recipe_wins_over_its_preset() -> None:
    given = {"preset": "dinov2_vitb14", "image_size": 448, "drop_path": 0.1}
    found = expand("vision", given)
    assert found["image_size"] == 448 and found["drop_path"] == 0.1 and found["position_grid"] == 37
    assert expand("text", {"max_length": 9}) == {"max_length": 9}
    with pytest.raises(ValueError, match=r"model.text.preset is 'dinov2_vitb14'; it can be clip_vit_b32"):
        expand("text", given)


def towers_from(folder: Path, config: OclearConfig) -> dict[str, Tensor]:
    """In a pool of two tensor-parallel ranks: OCLEAR's towers after they took the weights of `folder`, merged."""
    from models.transformer import MegatronBuilder

    with layout(2) as mesh:
        torch.manual_seed(0)
        towers = OclearTowers(config, MegatronBuilder(mesh.groups))
        init_towers(towers, folder, mesh.tp)
        return merged_state_dict(towers, mesh.tp)


def test_import_starts_a_run_and_export_ends_it(folders: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "xlmr").mkdir()
    for file in folders["xlm-roberta"].glob("*.*"):
        shutil.copyfile(file, tmp_path / "xlmr" / file.name)
    (tmp_path / "xlmr" / "sentencepiece.bpe.model").write_bytes(b"pieces")
    out = tmp_path / "start"
    figures = run_import(ImportConfig(out=out, vision=folders["dinov2"], text=tmp_path / "xlmr"))
    assert figures["text"]["left_out"] == ["pooler.dense.bias", "pooler.dense.weight"]
    assert (out / "tokenizer" / "sentencepiece.bpe.model").read_bytes() == b"pieces"
    assert "left out: pooler.dense.bias, pooler.dense.weight" in capsys.readouterr().out

    recipe = yaml.safe_load((out / "recipe.yaml").read_text())["model"]
    vision, text = VisionConfig(**recipe["vision"]), TextConfig(**recipe["text"])
    towers = OclearConfig(vision=replace(vision, drop_path=0.1), text=replace(text, max_length=7), embedding_dim=16)
    state = ranks(2).run(towers_from, out, towers)[0]
    wanted = (
        import_tower(Source(folders["dinov2"]), "vision").state | import_tower(Source(tmp_path / "xlmr"), "text").state
    )
    wanted["text.position"] = wanted["text.position"][: 7 + 2]
    assert all(torch.equal(state[key], value) for key, value in wanted.items()) and len(state) > len(wanted)

    with pytest.raises(UserError, match=r"model.vision.activation is 'gelu_tanh', not 'gelu'.*recipe.yaml"):
        init_towers(
            OclearTowers(replace(towers, vision=replace(vision, activation="gelu_tanh")), PlainBuilder()), out, None
        )
    back = tmp_path / "back"
    exported = run_export(ExportWeightsConfig(source=out, out=back, tower="text", layout="xlm-roberta"))
    assert exported["architecture"] == "XLMRobertaModel"
    again = import_tower(Source(back), "text").state
    assert all(torch.equal(again[key], wanted[key]) for key in again if key != "text.position")


def train(run: Path, catalogue: Path, overrides: dict[str, Any]) -> dict[str, Tensor]:
    """In a pool of two tensor-parallel ranks: trains a run and returns its towers, merged."""
    config = tiny_config(catalogue, run, **overrides)
    with trainer(config, tensor_parallel=2) as made:
        made.fit()
        return merged_state_dict(made.method.towers, made.mesh.tp)


def export_here(run: Path, out: Path, layout_name: str) -> None:
    run_export(ExportWeightsConfig(source=run, out=out, tower="vision", layout=layout_name))


def test_a_trained_tower_goes_out(catalogue: Path, tmp_path: Path) -> None:
    vision = {"model.vision.pooling": "class", "model.vision.class_position": True, "train.steps": 2}
    state = ranks(2).run(train, tmp_path / "run", catalogue, vision)[0]
    for name in ("vit", "timm"):
        ranks(1).run(export_here, tmp_path / "run", tmp_path / name, name)
        found = import_tower(Source(tmp_path / name), "vision").state
        assert len(found) == sum(key.startswith("vision.") for key in state)
        assert all(torch.equal(state[key], value) for key, value in found.items())
    assert transformers.ViTModel.from_pretrained(tmp_path / "vit").config.image_size == 32


ODD = [None, True, -1, 0, 7, 10**8, 2**62, 1e300, float("nan"), "x", "\x1b[2J", [], ["gelu"], {}, {"x": 1}]


@pytest.mark.parametrize(
    "name", ["bert", "dinov2 giant", "dinov3", "clip vision", "siglip text", "siglip2 vision", "roberta", *RECORDED]
)
def test_odd_descriptions_are_one_line(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Every value of a description, replaced by odd ones: refused in a line, or of no consequence; never a traceback,
    never long.
    """
    source = Source(folders[name] if name in folders else recorded(name, tmp_path / "model"))
    tower = "text" if name in ("bert", "siglip text", "roberta") else "vision"
    config, section = source.config, source.config.get("vision_cfg")
    known = family_of(config, tower)[0].defaults if name in folders else config
    told = 0

    def tried(changed: dict[str, Any]) -> None:
        nonlocal told
        source.config = changed
        try:
            import_tower(source, tower)
        except WeightsError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, str(error)
            told += 1

    for number, key in enumerate(["model_type", *known]):
        for value in ODD[number % 3 :: 3]:
            tried({**config, key: value})
    for number, key in enumerate(section or ()):
        for value in ODD[number % 3 :: 3]:
            tried({**config, "vision_cfg": {**section, key: value}})
    assert told > 3


def test_what_a_folder_claims_is_compared_before_memory_is_taken(folders: dict[str, Path], tmp_path: Path) -> None:
    bert = Source(folders["bert"])
    tensors = bert.tensors(list(bert.shapes))
    for change, message in (
        ({"num_hidden_layers": 10**8}, "text.num_layers is 100000000. It must be an int from 1 to 1,000"),
        ({"num_hidden_layers": 999}, "has 39 tensors, too few for 999 layers"),
        ({"vocab_size": 2**31}, "text.vocab_size is 2147483648. It must be an int from 0 to 10,000,000"),
        ({"vocab_size": 10**7}, "word_embeddings.weight has 100 rows, but the description says 10000000"),
        ({"max_position_embeddings": 10**7}, r"text.position is \[12, 32\]"),
        ({"hidden_size": 10**7}, "does not fit|odd values"),
        ({"hidden_size": "32"}, "hidden_size is '32', not of type int"),
        ({"num_attention_heads": 0}, "text.num_attention_heads is 0. It must be an int from 1"),
        ({"hidden_act": ["gelu"]}, "hidden_act is .* not of type str"),
    ):
        with pytest.raises(WeightsError, match=message):
            import_tower(Source(written(tmp_path / "claims", bert.config | change, tensors)), "text")
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    for content in (struct.pack("<Q", len(header)) + header, struct.pack("<Q", 1 << 62) + header, b"", b"{"):
        (tmp_path / "claims" / "model.safetensors").write_bytes(content)
        with pytest.raises(WeightsError, match=r"model\.safetensors: "):
            Source(tmp_path / "claims")


def test_files_outside_the_folder_are_not_read(folders: dict[str, Path], tmp_path: Path) -> None:
    bert = Source(folders["bert"])
    tensors = bert.tensors(list(bert.shapes))
    secret = written(tmp_path / "secret", bert.config, tensors) / "model.safetensors"
    theirs = written(tmp_path / "theirs", bert.config, {})
    (theirs / "model.safetensors").unlink()
    index = theirs / "model.safetensors.index.json"
    for name in ("../secret/model.safetensors", str(secret), "sub/../../secret/model.safetensors"):
        index.write_text(json.dumps({"weight_map": {"x": name}}))
        with pytest.raises(WeightsError, match="leads out of its folder"):
            Source(theirs)
    for content in ('{"weight_map": {"x": 3}}', '{"weight_map": [1]}', "[]", "{", "[" * 100_000, "{}"):
        index.write_text(content)
        with pytest.raises(WeightsError, match=r"index\.json"):
            Source(theirs)
    index.unlink()
    (theirs / "model.safetensors").symlink_to(secret)
    with pytest.raises(WeightsError, match="leads out of its folder"):
        Source(theirs)
    # The hub's cache: models--x/snapshots/1234/model.safetensors leads to models--x/blobs/abcd.
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "1234", tmp_path / "models--x" / "blobs"
    shutil.copytree(tmp_path / "secret", snapshot)
    blobs.mkdir()
    for file in list(snapshot.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(Path("../../blobs") / file.name)
    assert len(Source(snapshot).shapes) == len(tensors)
    (theirs / "model.safetensors").unlink()
    written(theirs, bert.config, tensors)
    (theirs / "tokenizer.json").symlink_to(secret)
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be copied: .* leads out"):
        run_import(ImportConfig(out=tmp_path / "out", text=theirs))
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_refused_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(folders["bert"] / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(1))
    with pytest.raises(UserError, match=r"has pytorch_model\.bin and no .*safetensors.*save_pretrained"):
        run_import(ImportConfig(out=tmp_path / "out", text=tmp_path))


def test_every_damaged_file_of_imported_weights_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(folders["bert"], tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    out = tmp_path / "start"
    run_import(ImportConfig(out=out, text=source))
    files = sorted(file for file in out.rglob("*") if file.is_file())
    names = {"manifest.json", "recipe.yaml", "tokenizer.json", "weights.json", "weights.safetensors"}
    assert {file.name for file in files} == names

    def refused(name: str) -> None:
        with pytest.raises(UserError, match=name) as error:
            init_towers(nn.Module(), out, None)
        assert "\n" not in str(error.value)

    for file in files:
        content = file.read_bytes()
        for damaged in damages(content):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            refused("." if file.name == "manifest.json" else file.name)
        file.write_bytes(content)
    (out / "more").touch()
    refused("more")
    with pytest.raises(UserError, match="more is not listed"):
        run_export(ExportWeightsConfig(source=out, out=tmp_path / "back", tower="text", layout="bert"))
    (out / "more").unlink()
    run_export(ExportWeightsConfig(source=out, out=tmp_path / "back", tower="text", layout="bert"))
    assert not verify(tmp_path / "back") and '"sha256"' in (tmp_path / "back" / "manifest.json").read_text()


def test_odd_imported_weights_are_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    """Their manifest genuine."""
    out, told = tmp_path / "start", 0
    run_import(ImportConfig(out=out, text=folders["bert"]))
    meta = json.loads((out / "weights.json").read_text())
    towers = nn.ModuleDict({"text": TextTower(TextConfig(**meta["model"]["text"]), PlainBuilder())})
    fields = [("text", key) for key in meta["model"]["text"]]
    for number, at in enumerate([("format",), ("model",), ("text",), *fields]):
        for value in ODD[number % 4 :: 4]:
            changed = json.loads(json.dumps(meta))
            place = changed if at[0] in meta else changed["model"]
            for key in at[:-1]:
                place = place[key]
            place[at[-1]] = value
            (out / "weights.json").write_text(json.dumps(changed))
            write_manifest(out, algorithm="sha256")
            try:
                init_towers(towers, out, dist.group.WORLD)
            except UserError as error:
                assert str(error).isprintable() and len(str(error)) < 1500
                told += 1
            except ValueError as error:  # weights that fit, which this process has no ranks to share with
                assert "process group" in str(error)
    assert told > 40
    (out / "weights.json").write_text(json.dumps(meta))
    state = load_file(out / "weights.safetensors")
    for message, damaged in (
        ("text.position is missing", {name: t for name, t in state.items() if name != "text.position"}),
        ("more is too much", state | {"\x1b[2Jmore": torch.ones(1)}),
        ("holds F16, F32", state | {"text.position": state["text.position"].half()}),
    ):
        save_file(damaged, out / "weights.safetensors")
        write_manifest(out, algorithm="sha256")
        with pytest.raises(UserError, match=message) as shown:
            run_export(ExportWeightsConfig(source=out, out=tmp_path / "back", tower="text", layout="bert"))
        assert str(shown.value).isprintable()
    for content in (b"", b"[" * 9999, (out / "weights.safetensors").read_bytes()[:999]):
        (out / "weights.safetensors").write_bytes(content)
        write_manifest(out, algorithm="sha256")
        with pytest.raises(UserError, match=r"weights\.safetensors"):
            init_towers(towers, out, None)


def test_written_weights_respect_the_umask(folders: dict[str, Path], tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        run_import(ImportConfig(out=tmp_path / "own", text=folders["bert"]))
        os.umask(0o022)
        run_import(ImportConfig(out=tmp_path / "shared", text=folders["bert"]))
    finally:
        os.umask(before)
    modes = [(tmp_path / name / "weights.safetensors").stat().st_mode & 0o777 for name in ("own", "shared")]
    assert modes == [0o600, 0o644]


def test_mistakes_of_import_are_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="nothing to import"):
        run_import(ImportConfig(out=out))
    with pytest.raises(UserError, match=r"has neither a config.json nor an open_clip_config.json"):
        run_import(ImportConfig(out=out, vision=tmp_path))
    broken = written(tmp_path / "broken", {"model_type": "vit"}, {"x": torch.ones(2)})
    (broken / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"model.safetensors: "):
        run_import(ImportConfig(out=out, vision=broken))
    with pytest.raises(UserError, match="holds no text tower"):
        run_import(ImportConfig(out=out, vision=folders["vit"]))
        run_export(ExportWeightsConfig(source=out, out=tmp_path / "text", tower="text", layout="bert"))
