"""`shelfmark import`: Bring a model's weights from the hub, timm or open_clip.

weights.safetensors   the towers' tensors, float32, under the names of a checkpoint
weights.json          configuration of the towers, origin of the weights, tensors left out
recipe.yaml           the same as the `model` part of a recipe
tokenizer/            the files of the text tower's tokenizer, as they were
manifest.json         size and SHA-256 of every other file
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from harness.core.errors import UserError
from harness.core.files import printable, write_whole
from harness.core.manifest import MANIFEST, fingerprint, write_manifest
from harness.core.staged_folder import staged_folder
from harness.train.imported_weights import LONGEST_LINE
from models.weights.convert import Converted, Source, import_tower, own_file, write_converted
from models.weights.rules import WeightsError, listed

EXAMPLE = "shelfmark import weights/start --vision hub/dinov2-base --text hub/xlm-roberta-base"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Converts the weights of other projects into a folder that training starts from (--train.init-from).

    Args:
        out: the folder to create; it appears only when it is complete.
        vision: a folder with the image tower: config.json (of transformers or timm) or open_clip_config.json, and
            *.safetensors.
        text: a folder with the text tower; the same one where a model has both.
        projection: include the layer onto the space that image and text share (CLIP, SigLIP's text).
        allow_unused: leave out tensors that the tower has no place for, instead of an error.
    """

    out: Path = field(kw_only=False)
    vision: Path | None = None
    text: Path | None = None
    projection: bool = False
    allow_unused: bool = False


def run(config: ImportConfig) -> dict[str, Any]:
    """Converts, prints a line for each tower, and returns parameters and left_out of each.

    Raises:
        UserError: nothing to import, `out` exists, a folder that is not such a model, a tower that ours cannot hold,
            tensors left over.
    """
    folders = {"vision": config.vision, "text": config.text}
    wanted = {tower: folder for tower, folder in folders.items() if folder is not None}
    if not wanted:
        raise UserError("nothing to import", "Name a folder with --vision or --text, or both")
    try:
        towers = {
            tower: import_tower(Source(folder), tower, config.projection, config.allow_unused)
            for tower, folder in wanted.items()
        }
    except WeightsError as error:
        raise UserError(printable(str(error), LONGEST_LINE), "See docs/weights.md for what can be imported") from error
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error
    with staged_folder(config.out) as stage:
        write_converted(stage, towers)
        recipe = {"model": {tower: _chosen(converted) for tower, converted in towers.items()}}
        write_whole(stage / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
        copied = [] if config.text is None else _copy_tokenizer(config.text, stage / "tokenizer")
        write_manifest(stage, algorithm="sha256")
    figures: dict[str, Any] = {}
    for tower, converted in towers.items():
        numbers = sum(tensor.numel() for tensor in converted.state.values())
        figures[tower] = {"parameters": numbers, "left_out": converted.left_out}
        left = f"; left out: {listed(converted.left_out)}" if converted.left_out else ""
        what = printable(f"{wanted[tower]} ({converted.origin}), {numbers:,} parameters{left}", LONGEST_LINE)
        print(f"{config.out}: {tower} tower of {what}")
    if copied:
        print(f"{config.out}/tokenizer: {', '.join(copied)}")
    print(f"{config.out}/{MANIFEST}: SHA-256 {fingerprint(config.out)}")
    return figures


def _chosen(converted: Converted) -> Mapping[str, Any]:
    """The fields that are not at their default, as plain values."""
    config = converted.config
    pairs = ((field, getattr(config, field.name)) for field in fields(config))
    return {field.name: value for field, value in pairs if field.default is MISSING or value != field.default}


def _copy_tokenizer(folder: Path, into: Path) -> list[str]:
    names = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    for name in names:
        into.mkdir(exist_ok=True)
        try:
            shutil.copyfile(own_file(folder, name), into / name)
        except (WeightsError, OSError) as error:
            raise UserError(f"{folder / name} cannot be copied: {error}", "Remove it, or correct it") from error
    return names
