"""The convolutional image tower: imported weights, training over layouts, errors. Twin and oracle: test_towers.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from harness.commands.export_weights import ExportWeightsConfig
from harness.commands.export_weights import run as run_export
from harness.commands.import_weights import ImportConfig
from harness.commands.import_weights import run as run_import
from harness.core.cli import leaves
from harness.core.errors import UserError
from harness.train.flops import tower_flops
from harness.train.param_groups import lr_factors
from models.plain.transformer import PlainBuilder
from models.shape import shape_errors
from models.tp_state import merged_state_dict
from models.vision import VisionConfig
from models.vision_kinds import vision_tower
from models.weights.convert import Source, import_tower
from models.weights.rules import WeightsError
from tests.pool import ranks
from tests.runs import tiny_config, trainer

# Of EfficientNet-Lite0, block by block: stage, kernel, stride, channels before, between and after.
BLOCKS = [
    (0, 3, 1, 32, 32, 16),
    *((1, 3, 2, 16, 96, 24), (1, 3, 1, 24, 144, 24)),
    *((2, 5, 2, 24, 144, 40), (2, 5, 1, 40, 240, 40)),
    *((3, 3, 2, 40, 240, 80), (3, 3, 1, 80, 480, 80), (3, 3, 1, 80, 480, 80)),
    *((4, 5, 1, 80, 480, 112), (4, 5, 1, 112, 672, 112), (4, 5, 1, 112, 672, 112)),
    *((5, 5, 2, 112, 672, 192), (5, 5, 1, 192, 1152, 192), (5, 5, 1, 192, 1152, 192), (5, 5, 1, 192, 1152, 192)),
    (6, 3, 1, 192, 1152, 320),
]
SMALL: dict[str, Any] = {"kind": "efficientnet_lite", "width_factor": 0.2, "patch_size": 32, "hidden_size": 16}


class ConvNorm(nn.Module):
    """A convolution padded as in TensorFlow, and its batch norm."""

    def __init__(self, before: int, after: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(after, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        pads = []
        for size in (x.shape[3], x.shape[2]):
            missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [missing // 2, missing - missing // 2]
        return self.norm(self.conv(F.pad(x, pads)))


class Reference(nn.Module):
    """EfficientNet-Lite0 with batch norms and random statistics, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = ConvNorm(3, 32, 3, 2), ConvNorm(320, 1280)
        self.blocks = nn.ModuleList()
        for _, kernel, stride, before, between, after in BLOCKS:
            parts = [ConvNorm(before, between)] if between > before else []
            parts += [ConvNorm(between, between, kernel, stride, between), ConvNorm(between, after)]
            self.blocks.append(nn.ModuleList(parts))
        for norm in (part for part in self.modules() if isinstance(part, nn.BatchNorm2d)):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.running_var, 0.1, 0.5)
        self.double().eval()

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu6(self.first(images))
        for (_, _, stride, before, _, after), block in zip(BLOCKS, self.blocks, strict=True):
            found = x
            for part in block[:-1]:
                found = F.relu6(part(found))
            found = block[-1](found)
            x = x + found if stride == 1 and before == after else found
        return F.relu6(self.last(x))

    def tensors(self, places: list[tuple[ConvNorm, str, str]]) -> dict[str, Tensor]:
        """Under another project's names of convolutions and batch norms."""
        found = {}
        for part, conv, norm in places:
            found[f"{conv}.weight"] = part.conv.weight.float()
            found |= {f"{norm}.{name}": t.float() for name, t in part.norm.state_dict().items()}
        return found

    def package(self) -> dict[str, Tensor]:
        """As efficientnet-lite-pytorch saves it."""
        places = [(self.first, "_conv_stem", "_bn0"), (self.last, "_conv_head", "_bn1")]
        for i, block in enumerate(self.blocks):
            names = (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"))[-len(block) :]
            places += [
                (part, f"_blocks.{i}.{conv}", f"_blocks.{i}.{norm}")
                for part, (conv, norm) in zip(block, names, strict=True)
            ]
        return self.tensors(places) | {"_fc.weight": torch.ones(2, 1280), "_fc.bias": torch.ones(2)}

    def timm(self) -> dict[str, Tensor]:
        """As timm saves it."""
        places = [(self.first, "conv_stem", "bn1"), (self.last, "conv_head", "bn2")]
        stages = [stage for stage, *_ in BLOCKS]
        for i, block in enumerate(self.blocks):
            where = f"blocks.{stages[i]}.{i - stages.index(stages[i])}"
            names = ("conv_pw", "conv_dw", "conv_pwl") if len(block) == 3 else ("conv_dw", "conv_pw")
            places += [(part, f"{where}.{names[j]}", f"{where}.bn{j + 1}") for j, part in enumerate(block)]
        return self.tensors(places) | {"classifier.weight": torch.ones(2, 1280), "classifier.bias": torch.ones(2)}


LAYOUTS = {"efficientnet-lite0": Reference.package, "tf_efficientnet_lite0": Reference.timm}


def saved(folder: Path, architecture: str = "efficientnet-lite0") -> Path:
    """The reference on disk."""
    folder.mkdir()
    tensors = LAYOUTS[architecture](Reference())
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": architecture}))
    return folder


@torch.no_grad()
@pytest.mark.parametrize("architecture", LAYOUTS)
def test_imported_features_are_those_of_the_network_with_batch_norms(architecture: str, tmp_path: Path) -> None:
    found = import_tower(Source(saved(tmp_path / "theirs", architecture)), "vision")
    classifier = "classifier" if "tf" in architecture else "_fc"
    assert found.left_out == [f"{classifier}.bias", f"{classifier}.weight"]
    tower = vision_tower(found.config, PlainBuilder()).double()
    tower.load_state_dict({name.removeprefix("vision."): t for name, t in found.state.items()})
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = Reference()(images).flatten(2).transpose(1, 2)
    patches, pooled = tower(images)
    assert patches.shape == (2, 2 * 3, 1280) and 0.1 < float((wanted > 0).double().mean()) < 0.9
    torch.testing.assert_close(patches, wanted, rtol=0, atol=1e-4)  # the weights are stored in float32
    torch.testing.assert_close(pooled, wanted.mean(1), rtol=0, atol=1e-4)
    assert not [part for part in tower.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]


def test_what_is_not_such_a_network_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "theirs")
    tensors = Source(folder).tensors(Source(folder).shapes)
    del tensors["_blocks.3._bn1.running_mean"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"missing: _blocks.3._bn1.running_mean"):
        import_tower(Source(folder), "vision")
    (folder / "config.json").write_text('{"architecture": "efficientnet-lite4"}')
    with pytest.raises(WeightsError, match="missing"):
        import_tower(Source(folder), "vision")
    (folder / "config.json").write_text('{"architecture": "efficientnet_lite0"}')
    with pytest.raises(WeightsError, match="not a VisionTransformer of timm"):
        import_tower(Source(folder), "vision")


def tuned(catalogue: Path, run: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """In a pool of two tensor-parallel ranks: two steps from imported weights, and what a resumed run holds."""
    with trainer(tiny_config(catalogue, run, **settings), 2) as t:
        before = {name: x.clone() for name, x in merged_state_dict(t.method.towers, t.mesh.tp).items()}
        for data in t.loader.steps(0, 2):
            t.train_step(data)
        after = merged_state_dict(t.method.towers, t.mesh.tp)
        t.save()
    with trainer(tiny_config(catalogue, run, **settings), 2) as t:
        resumed = merged_state_dict(t.method.towers, t.mesh.tp)
    return {"before": before, "after": after, "resumed": resumed}


def test_a_run_starts_from_imported_weights_and_goes_out(catalogue: Path, tmp_path: Path) -> None:
    """Two tensor-parallel ranks keep equal copies; frozen parts stay; a resumed run holds the same."""
    start = tmp_path / "start"
    run_import(ImportConfig(out=start, vision=saved(tmp_path / "theirs")))
    recipe = dict(leaves(yaml.safe_load((start / "recipe.yaml").read_text())))
    settings = recipe | {"train.init_from": start, "model.vision.image_size": 32, "optimizer.frozen": ["vision.stem"]}
    settings |= {"optimizer.layer_decay": 0.5, "data.preprocess.image_size": 32, "model.fusion_heads": 4}
    settings |= dict.fromkeys(("model.vision.num_layers", "model.vision.num_attention_heads"), 4)
    one, other = ranks(2).run(tuned, catalogue, tmp_path / "run", settings)
    imported = import_tower(Source(tmp_path / "theirs"), "vision").state
    assert all(torch.equal(one["before"][name], value) for name, value in imported.items())
    for name in imported:
        assert torch.equal(one["after"][name], other["after"][name]), f"{name} differs between tensor-parallel ranks"
        assert torch.equal(one["after"][name], one["resumed"][name]), name
        assert torch.equal(one["after"][name], imported[name]) == name.startswith("vision.stem"), name
    with pytest.raises(UserError, match=r"vit has no place for this tower: kind is 'efficientnet_lite'"):
        run_export(ExportWeightsConfig(source=start, out=tmp_path / "no", tower="vision", layout="vit"))


def test_every_convolution_sees_channels_last() -> None:
    """Whatever layout the images come in; and the patches need no copy."""
    tower, strides = vision_tower(VisionConfig(**SMALL), PlainBuilder()), []
    convolutions = [part for part in tower.modules() if isinstance(part, nn.Conv2d)]
    for part in convolutions:
        part.register_forward_pre_hook(lambda _, given: strides.append(given[0].stride(1)))
    for images in (torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)):
        patches, _ = tower(images)
        assert patches.is_contiguous()
    assert len(strides) == 2 * len(convolutions) and set(strides) == {1}


def test_learning_rates_fall_block_by_block() -> None:
    towers = nn.ModuleDict({"vision": vision_tower(VisionConfig(**SMALL), PlainBuilder())})
    factors = lr_factors(towers, 0.5, ())
    named = {name: factors[parameter] for name, parameter in towers.named_parameters()}
    assert named["vision.last.weight"] == 1 and named["vision.block.layers.15.project.bias"] == 0.5
    assert named["vision.block.layers.0.depthwise.weight"] == 0.5**16 and named["vision.stem.weight"] == 0.5**17


def test_flops_are_those_of_its_convolutions() -> None:
    """Backward: each convolution once for its input and once for its weights; the first has only weights."""
    config, images = VisionConfig(**SMALL, image_size=64), torch.empty(3, 3, 64, 64, device="meta")
    with torch.device("meta"):
        tower = vision_tower(config, PlainBuilder())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(images)
    first = 2 * 3 * 32 * 32 * 32 * 3 * 9
    assert tower_flops(lambda: vision_tower(config, PlainBuilder()), images) == 3 * counter.get_total_flops() - first


def test_what_does_not_fit_is_named() -> None:
    def errors(**fields: Any) -> list[str]:
        config = VisionConfig(**{**SMALL, "image_size": 64, **fields})
        return config.errors("model.vision") + shape_errors(config, 8, "model.vision")

    assert errors() == []  # heads, which it has none of, need not divide over 8 ranks
    assert "image_size 48 is not a multiple" in errors(image_size=48)[0]
    assert "patch_size must be 32" in errors(patch_size=16)[0]
    assert errors(pooling="class") == ["model.vision.pooling needs model.vision.kind transformer"]
    assert "at most 8" in errors(depth_factor=1e6)[0]
    assert "need model.vision.kind efficientnet_lite" in errors(kind="transformer", patch_size=16)[0]
