"""Evaluation of an imported image tower without any training: what `shelfmark eval --frozen` measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.catalogue.catalogue import Catalogue
from harness.core.build import builder
from harness.core.cli import read_recipe
from harness.core.device import set_precision
from harness.core.errors import UserError
from harness.core.files import printable
from harness.core.mesh import Mesh
from harness.data.config import DataConfig
from harness.data.preprocess import PreprocessSpec
from harness.evaluate.evaluation import Evaluation, EvaluationConfig
from harness.train.imported_weights import LONGEST_LINE, image_tower
from models.frozen import Frozen, FrozenConfig, FrozenTowers
from models.plain_values import from_plain
from models.tp_state import load_merged
from models.vision import VisionConfig
from models.weights.rules import WeightsError


def open_frozen(weights: Path, config: EvaluationConfig, catalogue: Catalogue, mesh: Mesh) -> tuple[Frozen, Evaluation]:
    """The image tower of a folder of `shelfmark import`, and an evaluation of photo search, which `config` names.

    Photos are prepared as `data.preprocess` of the folder's recipe.yaml says, with its defaults for the rest.

    Raises:
        UserError: no such folder or a damaged one, one without an image tower, or a layout that does not divide it.
    """
    vision, state = image_tower(weights)
    model = FrozenConfig(vision=vision)
    if errors := model.errors(mesh.tp.size()):
        raise UserError(errors[0])
    set_precision("fp32")
    mesh.seed_streams(0, -1)  # what builds tensor-parallel layers draws from them; nothing drawn stays
    towers = FrozenTowers(model, builder(mesh)).to(mesh.device).eval()
    try:
        load_merged(towers, state, mesh.tp)
    except WeightsError as error:
        raise UserError(printable(str(error), LONGEST_LINE), "Import the weights again") from error
    data = DataConfig(catalogue=catalogue.path, preprocess=preprocess_of(weights, vision))
    return Frozen(towers), Evaluation(config, "frozen", data, model, catalogue, None, None, mesh)


def preprocess_of(weights: Path, vision: VisionConfig) -> PreprocessSpec:
    """Preprocessing for an imported image tower, by the recipe beside it.

    Raises:
        UserError: the recipe has other keys or values than data.preprocess.
    """
    said: Any = (read_recipe(weights / "recipe.yaml").get("data") or {}).get("preprocess") or {}
    try:
        return from_plain(PreprocessSpec, {**said, "image_size": vision.image_size}, "data.preprocess")
    except ValueError as error:
        raise UserError(f"{weights}/recipe.yaml: {error}", "Import the weights again") from error
