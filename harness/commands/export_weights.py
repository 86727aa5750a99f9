"""`shelfmark export-weights`: Write towers for transformers, timm or open_clip."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from harness.core.errors import UserError
from harness.core.files import printable
from harness.core.manifest import MANIFEST, fingerprint, write_manifest
from harness.core.mesh import Mesh, MeshConfig
from harness.core.staged_folder import staged_folder
from harness.text.tokenizer import Tokenizer
from harness.train.imported_weights import require_whole
from harness.train.open_run import find_checkpoint, load_method, open_settings
from models.tp_state import merged_state_dict
from models.weights.convert import export_open_clip_pair, export_tower, read_converted, write_exported
from models.weights.layout import TowerConfig
from models.weights.rules import WeightsError

EXAMPLE = "shelfmark export-weights runs/grocery --tower vision --layout dinov2 --out hub/grocery-vision"


@dataclass(frozen=True, kw_only=True)
class ExportWeightsConfig:
    """Writes the weights of one tower, or of both for open_clip: a description, float32 safetensors, their SHA-256.

    Args:
        source: a run folder, or a folder that `shelfmark import` made.
        out: the folder to create; it appears only when it is complete.
        tower: vision, text, or both (only open_clip, whose models are pairs).
        layout: timm, open_clip, or the model_type of transformers to write, such as vit, dinov2, clip_vision_model or
            xlm-roberta.
        checkpoint: a step folder of the run, or best (train.keep_best); the newest complete one by default.
    """

    source: Path = field(kw_only=False)
    out: Path
    tower: Literal["vision", "text", "both"]
    layout: str
    checkpoint: Path | None = None


def run(config: ExportWeightsConfig) -> dict[str, Any]:
    """Writes the folder, prints a line, and returns the number of parameters and the reader: a class of transformers,
    timm or open_clip.

    Raises:
        UserError: no such run or folder, `out` exists, an unknown layout, or one that cannot hold this tower.
    """
    wanted = ["vision", "text"] if config.tower == "both" else [config.tower]
    try:
        imported = (config.source / "weights.json").is_file()
        if imported:
            require_whole(config.source)
        towers, state = read_converted(config.source) if imported else _trained(config)
        if missing := [tower for tower in wanted if tower not in towers]:
            raise UserError(f"{config.source} holds no {missing[0]} tower")
        if config.tower != "both":
            described, tensors = export_tower(towers[config.tower], state, config.layout)
        elif config.layout == "open_clip":
            described, tensors = export_open_clip_pair(towers["vision"], towers["text"], state)
        else:
            raise UserError(f"'{config.layout}' holds one tower", "Name --tower vision or text, or --layout open_clip")
    except WeightsError as error:
        raise UserError(printable(str(error), 1000), "See docs/weights.md for the layouts") from error
    with staged_folder(config.out) as stage:
        write_exported(stage, described, tensors)
        write_manifest(stage, algorithm="sha256")
    numbers = sum(tensor.numel() for tensor in tensors.values())
    architecture = described.get("architectures", [config.layout])[0]
    named = "both towers" if config.tower == "both" else f"{config.tower} tower"
    print(f"{config.out}: {named} of {config.source}, {numbers:,} parameters, for {architecture}")
    print(f"{config.out}/{MANIFEST}: SHA-256 {fingerprint(config.out)}")
    return {"parameters": numbers, "architecture": architecture}


def _trained(config: ExportWeightsConfig) -> tuple[dict[str, TowerConfig], dict[str, Tensor]]:
    settings = open_settings(config.source, tensor_parallel=1)
    path = find_checkpoint(config.source, config.checkpoint)
    with Mesh(MeshConfig(device="cpu")) as mesh:  # nothing is computed
        method, _ = load_method(settings, path, Tokenizer.load(config.source), mesh)
        state = {name: value.float().cpu() for name, value in merged_state_dict(method.towers, mesh.tp).items()}
        parts = {tower: getattr(method.towers, tower, None) for tower in ("vision", "text")}
        return {tower: part.config for tower, part in parts.items() if part is not None}, state
