"""`shelfmark export-weights`: a tower, trained or imported, becomes a folder that `transformers` reads with from_pretrained."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from harness.data.staging import staged_folder
from harness.data.tokenizer import Tokenizer
from harness.errors import UserError
from harness.mesh import Mesh, MeshConfig
from harness.trained import find_checkpoint, load_method, open_settings
from models.merge import merged_state_dict
from models.weights.convert import TowerConfig, export_tower, read_converted, save_tensors
from models.weights.rules import WeightsError

EXAMPLE = "shelfmark export-weights runs/grocery --tower vision --layout dinov2 --out hub/grocery-vision"


@dataclass(frozen=True, kw_only=True)
class ExportWeightsConfig:
    """Writes the weights of one tower as config.json and model.safetensors, float32.

    Args:
        source: a run folder, or a folder that `shelfmark import` made.
        out: the folder to create; it appears only when it is complete.
        tower: vision or text.
        layout: the model_type of transformers to write, such as vit, dinov2, clip_vision_model or xlm-roberta.
        checkpoint: a step folder of the run; the newest complete one by default.
    """

    source: Path
    out: Path
    tower: Literal["vision", "text"]
    layout: str
    checkpoint: Path | None = None


def run(config: ExportWeightsConfig) -> dict[str, Any]:
    """Writes the folder, prints a line, and returns the number of parameters and the class of transformers that reads it.

    Raises:
        UserError: no such run or folder, `out` exists, an unknown layout, or one that has no place for this tower.
    """
    try:
        imported = (config.source / "weights.json").is_file()
        tower, state = _imported(config) if imported else _trained(config)
        described, tensors = export_tower(tower, state, config.layout)
    except WeightsError as error:
        raise UserError(str(error), "See docs/weights.md for the layouts") from error
    with staged_folder(config.out) as stage:
        save_tensors(tensors, stage / "model.safetensors")
        (stage / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    numbers = sum(tensor.numel() for tensor in tensors.values())
    architecture = described["architectures"][0]
    print(f"{config.out}: {config.tower} tower of {config.source}, {numbers:,} parameters, for {architecture}")
    return {"parameters": numbers, "architecture": architecture}


def _imported(config: ExportWeightsConfig) -> tuple[TowerConfig, dict[str, Tensor]]:
    towers, state = read_converted(config.source)
    if config.tower not in towers:
        raise UserError(f"{config.source} holds no {config.tower} tower")
    return towers[config.tower], state


def _trained(config: ExportWeightsConfig) -> tuple[TowerConfig, dict[str, Tensor]]:
    settings = open_settings(config.source, tensor_parallel=1, batch_size=1)
    path = find_checkpoint(config.source, config.checkpoint)
    mesh = Mesh(MeshConfig())
    try:
        method, _ = load_method(settings, path, Tokenizer.load(config.source), mesh)
        if not hasattr(method.towers, config.tower):
            raise UserError(f"{config.source} has no {config.tower} tower")
        state = {name: value.float().cpu() for name, value in merged_state_dict(method.towers, mesh.tp).items()}
        return getattr(method.towers, config.tower).config, state
    finally:
        mesh.close()
