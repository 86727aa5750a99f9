"""Imported weights (`shelfmark import`) as the start of a training run."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from harness.core.errors import UserError
from harness.core.files import printable
from harness.core.manifest import verify
from models.tp_state import load_merged
from models.vision import VisionConfig
from models.weights.convert import fitted, read_converted
from models.weights.rules import WeightsError

LONGEST_LINE = 1000  # characters of a message that names tensors


def init_towers(towers: nn.Module, folder: Path, group: ProcessGroup) -> None:
    """Loads an imported folder into tensor-parallel towers. Towers that the folder lacks stay as they are.

    Args:
        towers: the model.
        folder: written by `shelfmark import`.
        group: the ranks that share the towers' weights.

    Raises:
        UserError: the folder holds no weights, or they do not fit these towers; the differences are named.
    """
    require_whole(folder)
    try:
        load_merged(towers, fitted(folder, towers), group)
    except WeightsError as error:
        advice = f"Take the model part of {folder}/recipe.yaml into the recipe"
        raise UserError(printable(str(error), LONGEST_LINE), advice) from error


def require_whole(folder: Path) -> None:
    """Raises UserError where a file of an imported folder is damaged, missing or unknown."""
    if problem := verify(folder):
        raise UserError(f"imported weights {folder}: {problem}", "Copy them again, or run `shelfmark import` again")


def image_tower(folder: Path) -> tuple[VisionConfig, dict[str, Tensor]]:
    """The image tower of an imported folder: its configuration and its tensors.

    Raises:
        UserError: no such folder or a damaged one, or one without an image tower.
    """
    require_whole(folder)
    try:
        configs, state = read_converted(folder)
    except WeightsError as error:
        raise UserError(printable(str(error), LONGEST_LINE), "Import the weights again") from error
    vision = configs.get("vision")
    if not isinstance(vision, VisionConfig):
        raise UserError(f"{folder} holds no image tower", "Import one with --vision")
    return vision, {name: value for name, value in state.items() if name.startswith("vision.")}
