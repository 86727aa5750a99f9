"""Images per second and share of the peak of image towers in bf16: as in a run, on megatron-core, plain, plain
compiled, and transformers.

python jobs/gpu/towers.py OUT.json [--models vit_s16 vit_l14 ...] [--batch 256]

Forward and backward, one side in memory at a time, all with the same random weights: outputs of two images must agree
with the plain twin's in fp32 first. `a step` is the tower as a run trains it with megatron-core's gradient buffers and
AdamW. What fails or is missing costs its own row.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from harness.bench.gpu import Program, matrix_rate
from harness.bench.towers import AGREE, build_side
from harness.core.build import build as make_method
from harness.core.mesh import Mesh, MeshConfig
from harness.train.config import parse
from harness.train.flops import peak_flops, tower_flops
from harness.train.optimizer import TowerOptimizer
from harness.train.schedule import OptimizerConfig
from models.heads.class_parallel import ClassHeadConfig
from models.plain.transformer import PlainBuilder, PlainLayer
from models.presets import VISION
from models.tp_state import load_merged
from models.vision import VisionConfig, VisionTower

MODELS = ["vit_s16", "vit_b16", "vit_l14", "siglip2_so400m_patch14_224"]
SIDES = ("plain", "as trained", "a step", "megatron-core", "plain, compiled", "transformers")
OURS = {"megatron-core": "ours", "plain, compiled": "plain"}  # under which name harness.bench.towers builds it
FULL_GIB = 79.0  # memory of the GPU that --batch is meant for; half of it takes half the batch
H100_BF16 = 989e12
BARS = {"vit_s16": ("images_per_s", 8003.0), "vit_l14": ("model_flops_utilisation", 0.45)}


class Failed(Exception):
    """Outputs of a side that differ from its plain twin's."""


def tokens_of(found: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The token vectors of a side's outputs; our towers return the pooled vector too."""
    return found[0] if isinstance(found, tuple) else found


def seconds_of(step: Callable[[], None], program: Program, rounds: int) -> tuple[float, float]:
    """Seconds of the first call, and the median of `rounds` after two more."""
    times = []
    for _ in range(3 + rounds):
        began = program.synchronize()
        step()
        times.append(program.synchronize() - began)
    return times[0], statistics.median(times[3:])


def stepper(tower: nn.Module, images: Tensor, mesh: Mesh | None) -> Callable[[], None]:
    """Forward and backward; with `mesh` a whole training step."""
    if mesh is None:

        def step() -> None:
            tower.zero_grad()
            tokens_of(tower(images)).float().mean().backward()

        return step
    optimizer = TowerOptimizer(tower, OptimizerConfig(), mesh)

    def train() -> None:
        optimizer.zero_grad()
        with optimizer.accumulate(last=True):
            tokens, pooled = tower(images)
            (tokens.float().mean() + pooled.float().mean()).backward()
        optimizer.reduce()
        optimizer.squared_norm()
        optimizer.step(1e-4)

    return train


def build(side: str, name: str, state: dict[str, Tensor], mesh: Mesh) -> nn.Module:
    """The side's module on the device in fp32, with the weights `state`: images -> token vectors, and of `a step` the
    pooled vectors too.
    """
    if side in ("as trained", "a step"):
        small = [
            f"--model.text.{key}={value}"
            for key, value in (("hidden_size", 64), ("num_attention_heads", 1), ("num_layers", 1))
        ]
        size = VISION[name]["image_size"]
        flags = [
            f"--model.vision.preset={name}",
            f"--data.preprocess.image_size={size}",
            "--model.fusion_heads=1",
            *small,
        ]
        model = parse(flags, 1)[0].model
        method, _ = make_method(
            "oclear", model, ClassHeadConfig(), mesh, num_classes=0, vocab_size=512, seed=0, precision="fp32"
        )
        tower: Any = method.towers.vision
        load_merged(tower, state, mesh.tp)
        return tower
    module = build_side(OURS.get(side, side), name, VisionConfig(**VISION[name]), state, mesh).to(mesh.device)
    if side == "plain, compiled":
        for part in module.modules():
            if isinstance(part, PlainLayer):
                part.compile(
                    fullgraph=True, dynamic=False, backend="inductor" if mesh.device.type == "cuda" else "aot_eager"
                )
    return module


def measure(
    program: Program,
    side: str,
    name: str,
    batch: int,
    state: dict[str, Tensor],
    expected: list[Tensor],
    ceiling: float,
    mesh: Mesh,
) -> None:
    """Adds one row; the plain twin's outputs go into the empty list `expected`, the others are compared with them."""
    config = VisionConfig(**VISION[name])
    cuda = program.device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    module = build(side, name, state, mesh)
    size = config.image_size
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(program.device)
    with torch.no_grad():
        found = tokens_of(module(images[:2])).float()
    if not expected:
        expected.append(found)
    largest = expected[0].abs().max()
    difference = float((found - expected[0]).abs().max() / largest)
    # a convolution may run in TF32: ten bits
    if not difference <= (5e-3 if cuda else AGREE):
        raise Failed(f"outputs differ from the plain twin's by {difference:.2g} of the largest")
    module, images = module.to(dtype), images.to(dtype)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    step = stepper(module, images, mesh if side == "a step" else None)
    first, middle = seconds_of(step, program, 2 if program.tiny else 8)
    rate = tower_flops(lambda: VisionTower(config, PlainBuilder()), images) / middle
    row: dict[str, Any] = {
        "model": name,
        "side": side,
        "batch": batch,
        "ms": 1e3 * middle,
        "images_per_s": batch / middle,
    }
    row |= {"model_tflops": rate / 1e12, "of_matrix_rate": rate / ceiling, "difference": difference, "first_s": first}
    if cuda:
        row["model_flops_utilisation"] = rate / (peak_flops(program.device, "bf16") or H100_BF16)
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    program.add(**row)


def main() -> None:
    """Entry point."""
    program = Program("gpu towers", "Image towers beside transformers.", {"models": MODELS, "batch": 256})
    cuda, mesh = program.device.type == "cuda", Mesh(MeshConfig())
    torch._dynamo.config.disable = False  # which models.megatron_cpu switches off for a CPU
    ceiling = matrix_rate(program.device, torch.bfloat16 if cuda else torch.float32)
    program.add(side="device", matrix_tflops=ceiling / 1e12)
    if program.tiny:
        VISION["vit_tiny"] = {
            **VISION["vit_s16"],
            "image_size": 32,
            "num_layers": 1,
            "hidden_size": 64,
            "num_attention_heads": 1,
            "ffn_hidden_size": 64,
        }
    batch = 2 if program.tiny else program.given.batch
    if cuda:
        total = torch.cuda.get_device_properties(program.device).total_memory / 2**30
        while batch > 8 and batch * FULL_GIB > 1.05 * program.given.batch * total:
            batch //= 2
    for name in ["vit_tiny"] if program.tiny else program.given.models:
        torch.manual_seed(0)
        with torch.device(program.device):
            drawn = VisionTower(VisionConfig(**VISION[name]), PlainBuilder()).state_dict()
        state = {key: value.cpu() for key, value in drawn.items()}
        del drawn
        expected: list[Tensor] = []
        for side in SIDES:  # the first one's outputs are the measure of the others
            if side == "transformers" and importlib.util.find_spec("transformers") is None:
                program.add(model=name, side=side, skipped="transformers is not installed")
                continue
            try:
                measure(program, side, name, batch, state, expected, ceiling, mesh)
            except torch.OutOfMemoryError as error:
                program.add(model=name, side=side, skipped=f"out of memory: {str(error)[:150]}")
            except Failed as error:
                program.add(model=name, side=side, ok=False, why=str(error))
            except Exception as error:
                program.add(
                    model=name, side=side, ok=False, why=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                )
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
        rows = {row["side"]: row for row in program.rows if row.get("model") == name and "ms" in row}
        if name in BARS and "a step" in rows:
            what, bar = BARS[name]
            program.bar(f"{name}_{what}", float(rows["a step"][what] or 0), bar)
        for other in set(rows) - {"as trained", "a step"} if "as trained" in rows else ():
            key = str(other).replace(", ", "_").replace("-", "_")
            program.cite(**{f"{name}_vs_{key}": float(rows[other]["ms"] or 0) / float(rows["as trained"]["ms"] or 1)})
    mesh.close()
    program.exit()


if __name__ == "__main__":
    main()
