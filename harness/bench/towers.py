"""Forward and backward passes of the towers per second, beside `transformers` and the plain twins."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.bench.gpu import matrix_rate
from harness.bench.report import bench_main, finish, spread
from harness.core.build import builder
from harness.core.errors import UserError
from harness.core.mesh import Compile, Mesh, MeshConfig
from harness.train.flops import peak_flops, tower_flops
from models.plain.transformer import PlainBuilder
from models.presets import PRESETS, TEXT, VISION
from models.ranges import NonNegativeInt, PositiveInt
from models.shape import TransformerBuilder
from models.text import TextConfig, TextTower
from models.tp_state import load_merged
from models.vision import VisionConfig, VisionTower
from models.weights.convert import export_tower, save_tensors

MODULE = "harness.bench.towers"
EXAMPLE = f"python -m {MODULE} --model vit_s16,bert_small --json towers.json"
# Prefix of a preset's name -> layout of models.weights that transformers reads it in.
LAYOUTS = {
    "vision": {"vit_": "vit", "dinov2_": "dinov2", "siglip_": "siglip_vision_model", "siglip2_": "siglip_vision_model"},
    "text": {"bert_": "bert", "roberta_": "roberta", "xlm_roberta_": "xlm-roberta"},
}
HEADLINE = {"vit_s16": "vit_s"}  # preset -> another name in the headline
SIDES = ("ours", "transformers", "plain")
AGREE = 1e-4  # largest difference of outputs in fp32, relative to their largest


@dataclass(frozen=True, kw_only=True)
class TowersConfig:
    """Times forward and backward of one tower at a time; the sides take turns within a round.

    Ours is the tower that a run trains at tensor parallel 1. All sides have the same random weights, no dropout, and
    torch's scaled_dot_product_attention; their outputs must agree in fp32 before the first timing. The loss is a
    weighted sum of all token vectors. Texts have no padding.

    Args:
        model: presets to measure (models/presets.py): vit_…, dinov2_… without registers and siglip_… for images;
            bert_…, roberta_… and xlm_roberta_… for texts.
        batch: images or texts; 0: 8 images, 16 texts.
        tokens: length of a text.
        dtype: fp32 or bf16.
        compile: mesh.compile of ours: auto, always or never. The others are never compiled.
        pairs: timed rounds, after one warm-up round.
    """

    model: tuple[str, ...] = ("vit_s16", "bert_small")
    batch: NonNegativeInt = 0
    tokens: PositiveInt = 64
    dtype: Literal["fp32", "bf16"] = "fp32"
    compile: Compile = "auto"
    pairs: PositiveInt = 21

    def __post_init__(self) -> None:
        for name in self.model:
            _layout(name)
        if not self.model:
            raise UserError("--model is empty", "Name one or more")


@dataclass(frozen=True)
class Sides:
    """Modules of one tower: inputs -> token vectors [b, s, h].

    Args:
        modules: module of each of SIDES.
        inputs: batch for all of them.
        items: images or tokens of the batch.
        unit: images or tokens.
        flops: FLOPs of forward and backward.
    """

    modules: dict[str, nn.Module]
    inputs: Tensor
    items: int
    unit: str
    flops: float


def run(config: TowersConfig) -> dict[str, Any]:
    """Measures, prints and returns the report (see `harness/bench/report.py`).

    Headline:
        X_vs_transformers, X_vs_plain: medians over the rounds of the other's time divided by ours (above 1: ours is
            faster), with least and largest.
        X_images_per_s or X_tokens_per_s: our rate.
        matrix_tflops: rate of one large matrix product in the same dtype.
        X_of_matrix_rate: our model FLOPs per second divided by it.
        X_model_flops_utilisation: the same divided by the data sheet's peak, on a GPU that harness/train/flops.py
            knows.
    """
    with Mesh(MeshConfig(compile=config.compile)) as mesh:
        dtype = torch.float32 if config.dtype == "fp32" else torch.bfloat16
        ceiling = matrix_rate(mesh.device, dtype)
        headline, rows = {"matrix_tflops": ceiling / 1e12}, []
        for name in config.model:
            sides = make_sides(name, config, mesh)
            require_agreement(name, sides)
            seconds = measure(sides, dtype, config.pairs, mesh)
            key = HEADLINE.get(name, name)
            for other in SIDES[1:]:
                ratios = [theirs / own for theirs, own in zip(seconds[other], seconds["ours"], strict=True)]
                headline |= spread(f"{key}_vs_{other}", ratios)
            own = statistics.median(seconds["ours"])
            headline |= {
                f"{key}_{sides.unit}_per_s": sides.items / own,
                f"{key}_of_matrix_rate": sides.flops / own / ceiling,
            }
            if peak := peak_flops(mesh.device, config.dtype):
                headline[f"{key}_model_flops_utilisation"] = sides.flops / own / peak
            rows += [_row(name, side, sides, statistics.median(seconds[side]), ceiling) for side in SIDES]
    return finish(MODULE, config, headline, rows)


def make_sides(name: str, config: TowersConfig, mesh: Mesh) -> Sides:
    """Builds the modules of the preset `name`, in fp32 with the same random weights, and their inputs."""
    kind, _ = _layout(name)
    preset = PRESETS[kind][name]
    torch.manual_seed(0)
    tower: VisionConfig | TextConfig
    if kind == "vision":
        tower = VisionConfig(**preset)
        batch = config.batch or 8
        inputs = torch.randn(batch, 3, tower.image_size, tower.image_size)
        items, unit = batch, "images"
    else:
        tower = TextConfig(**preset)
        batch = config.batch or 16
        inputs = torch.randint(5, tower.vocab_size, (batch, config.tokens))
        items, unit = batch * config.tokens, "tokens"
    state = _tower(tower, PlainBuilder()).state_dict()
    modules = {side: build_side(side, name, tower, state, mesh).eval().to(mesh.device) for side in SIDES}
    flops = tower_flops(lambda: _tower(tower, PlainBuilder()), inputs)
    return Sides(modules, inputs.to(mesh.device), items, unit, flops)


def build_side(
    side: str, name: str, config: VisionConfig | TextConfig, state: dict[str, Tensor], mesh: Mesh
) -> nn.Module:
    """Builds one of SIDES of the preset `name` on the CPU, with the weights `state` of its plain twin: inputs -> token
    vectors [b, s, h].
    """
    kind, layout = _layout(name)
    if side == "transformers":
        return _Tokens(_transformers(config, {f"{kind}.{key}": value for key, value in state.items()}, layout))
    tower = _tower(config, builder(mesh) if side == "ours" else PlainBuilder())
    load_merged(tower, state, mesh.tp)
    return _Tokens(tower)


def require_agreement(name: str, sides: Sides) -> None:
    """Raises RuntimeError if the sides' outputs differ: their times would not be comparable."""
    with torch.no_grad():
        found = {side: module(sides.inputs) for side, module in sides.modules.items()}
    largest = found["plain"].abs().max()
    for side, output in found.items():
        difference = float((output - found["plain"]).detach().abs().max() / largest)
        if not difference <= AGREE:
            raise RuntimeError(f"{name}: {side} differs from plain by {difference:.2g} of the largest output")


def measure(sides: Sides, dtype: torch.dtype, pairs: int, mesh: Mesh) -> dict[str, list[float]]:
    """Seconds of each side in each round."""
    inputs = sides.inputs.to(dtype) if sides.inputs.is_floating_point() else sides.inputs
    for module in sides.modules.values():
        module.to(dtype)
    with torch.no_grad():
        weights = torch.randn_like(sides.modules["plain"](inputs))
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(pairs + 1):
        # The first side rotates, so that a machine that slows down favours none.
        for side in [*SIDES[number % 3 :], *SIDES[: number % 3]]:
            module = sides.modules[side]
            module.zero_grad()
            mesh.synchronize()
            start = time.perf_counter()
            (module(inputs) * weights).sum().backward()
            mesh.synchronize()
            if number:
                seconds[side].append(time.perf_counter() - start)
    return seconds


class _Tokens(nn.Module):
    """A tower of ours or of transformers: inputs -> token vectors [b, s, h] without prefix tokens."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, inputs: Tensor) -> Tensor:
        if isinstance(self.tower, VisionTower):
            return self.tower(inputs)[0]
        if isinstance(self.tower, TextTower):
            return self.tower(inputs)
        if inputs.is_floating_point():
            tokens = self.tower(inputs).last_hidden_state
            return tokens if "Siglip" in type(self.tower).__name__ else tokens[:, 1:]
        config: Any = self.tower.config
        return self.tower(inputs, attention_mask=(inputs != config.pad_token_id).long()).last_hidden_state


def _tower(config: VisionConfig | TextConfig, build: TransformerBuilder) -> nn.Module:
    return VisionTower(config, build) if isinstance(config, VisionConfig) else TextTower(config, build)


def _transformers(config: VisionConfig | TextConfig, state: dict[str, Tensor], layout: str) -> nn.Module:
    """Loads `state` into the model of transformers, with SDPA attention and without the pooling layer, which our towers
    lack.
    """
    import transformers  # here: only this benchmark needs it

    described, tensors = export_tower(config, state, layout)
    with tempfile.TemporaryDirectory() as folder:
        save_tensors(tensors, Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text(json.dumps(described))
        options = {"add_pooling_layer": False} if layout in ("vit", "bert", "roberta", "xlm-roberta") else {}
        kind = getattr(transformers, described["architectures"][0])
        made, loading = kind.from_pretrained(folder, attn_implementation="sdpa", output_loading_info=True, **options)
    if loading["missing_keys"]:
        raise RuntimeError(f"transformers lacks {sorted(loading['missing_keys'])[:3]}")
    return made


def _layout(name: str) -> tuple[str, str]:
    """Returns vision or text, and the layout that transformers reads the preset `name` in.

    Raises:
        UserError: there is no such layout.
    """
    for kind, presets in (("vision", VISION), ("text", TEXT)):
        for beginning, layout in LAYOUTS[kind].items():
            if name in presets and name.startswith(beginning) and "_reg" not in name:
                return kind, layout
    known = [n for presets in (VISION, TEXT) for n in presets if _is_known(n)]
    raise UserError(f"--model has '{name}'", f"It can have {', '.join(known)}")


def _is_known(name: str) -> bool:
    return any(name.startswith(b) for layouts in LAYOUTS.values() for b in layouts) and "_reg" not in name


def _row(name: str, side: str, sides: Sides, seconds: float, ceiling: float) -> dict[str, Any]:
    rate = sides.flops / seconds
    return {
        "model": name,
        "side": side,
        "ms": 1000 * seconds,
        f"{sides.unit}_per_s": sides.items / seconds,
        "model_tflops": rate / 1e12,
        "of_matrix_rate": rate / ceiling,
    }


def main() -> int:
    """Entry point of `python -m harness.bench.towers`."""
    return bench_main(MODULE, TowersConfig, run, "Forward and backward of the towers beside transformers.", EXAMPLE)


if __name__ == "__main__":
    sys.exit(main())
