"""`shelfmark import`: Bring a model's weights from the hub, timm or open_clip.

weights.safetensors   the towers' tensors, float32, under the names of a checkpoint
weights.json          configuration of the towers, origin of the weights, tensors left out
recipe.yaml           the same as the `model` part of a recipe, and the pixels that the image tower expects, where
                      they are known, as its `data.preprocess`
tokenizer/            the files of the text tower's tokenizer, as they were
manifest.json         size and SHA-256 of every other file
"""

from __future__ import annotations

import difflib
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
from models.vision import VisionConfig
from models.weights.convert import Converted, Source, import_tower, own_file, write_converted
from models.weights.hub import PUBLISHED, cache_folder, cached, download_line, expected_pixels, known_name, towers_of
from models.weights.rules import WeightsError, listed

EXAMPLE = "shelfmark import weights/start --vision dinov2_vitb14 --text hub/xlm-roberta-base"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Converts the weights of other projects into a folder that training starts from (--train.init-from).

    Args:
        out: the folder to create; it appears only when it is complete. Without --vision and --text a name, whose towers
            go to weights/NAME.
        vision: a folder with the image tower: config.json (of transformers or timm) or open_clip_config.json, and
            *.safetensors. Or a name: clip_vit_b32, siglip2_base_patch16_224, dinov2_vitb14, dinov3_vitb16, vit_b16, ...
            docs/weights.md lists all names with licence and expected pixels. Weights of a name are taken from the cache
            of `hf download`.
        text: a folder with the text tower; the same one where a model has both. Or a name: bert_base, ...
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
        UserError: nothing to import, `out` exists, a folder that is not such a model, a name that is unknown or not in
            the cache, a tower that ours cannot hold, tensors left over.
    """
    out, given = _asked(config)
    wanted = {tower: _folder(source, tower) for tower, source in given.items()}
    names = {
        tower: name for tower, source in given.items() if not source.is_dir() and (name := known_name(str(source)))
    }
    try:
        towers = {
            tower: import_tower(Source(folder), tower, config.projection, config.allow_unused)
            for tower, folder in wanted.items()
        }
    except WeightsError as error:
        again = [f"; to fetch it again: {download_line(PUBLISHED[name].repository)}" for name in names.values()]
        advice = f"See docs/weights.md for what can be imported{again[0] if again else ''}"
        raise UserError(printable(str(error), LONGEST_LINE), advice) from error
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error
    pixels = _preprocess(towers, wanted, names)
    with staged_folder(out) as stage:
        write_converted(stage, towers)
        recipe: dict[str, Any] = {"model": {tower: _chosen(converted) for tower, converted in towers.items()}}
        recipe |= {"data": {"preprocess": pixels}} if pixels else {}
        write_whole(stage / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
        copied = _copy_tokenizer(wanted["text"], stage / "tokenizer") if "text" in wanted else []
        write_manifest(stage, algorithm="sha256")
    figures: dict[str, Any] = {}
    for tower, converted in towers.items():
        numbers = sum(tensor.numel() for tensor in converted.state.values())
        figures[tower] = {"parameters": numbers, "left_out": converted.left_out}
        left = f"; left out: {listed(converted.left_out)}" if converted.left_out else ""
        what = printable(f"{wanted[tower]} ({converted.origin}), {numbers:,} parameters{left}", LONGEST_LINE)
        print(f"{out}: {tower} tower of {what}")
    if copied:
        print(f"{out}/tokenizer: {', '.join(copied)}")
    for name in dict.fromkeys(names.values()):
        print(f"{out}: licence of {PUBLISHED[name].repository}: {PUBLISHED[name].licence}; its page on the hub counts")
    if pixels:
        print(f"{out}: expects {pixels['image_size']} pixels, mean {pixels['mean']}, std {pixels['std']} (recipe.yaml)")
    print(f"{out}/{MANIFEST}: SHA-256 {fingerprint(out)}")
    return figures


def _asked(config: ImportConfig) -> tuple[Path, dict[str, Path]]:
    """(folder to create, tower -> folder or name)."""
    given = {"vision": config.vision, "text": config.text}
    wanted = {tower: source for tower, source in given.items() if source is not None}
    if wanted:
        return config.out, wanted
    if name := known_name(str(config.out)):
        return Path("weights", name), dict.fromkeys(towers_of(name), Path(name))
    advice = _nearest(config.out) or "Name a folder or known weights with --vision or --text, or both"
    raise UserError(f"nothing to import: '{config.out}' is not a name of known weights", advice)


def _folder(source: Path, tower: str) -> Path:
    """The folder of a source that is one or a name.

    Raises:
        UserError: it is neither; the weights of that name have no such tower, or are not in the cache.
    """
    if source.is_dir():
        return source
    name = known_name(str(source))
    if not name:
        advice = _nearest(source) or "Name a folder, or a name in docs/weights.md"
        raise UserError(f"--{tower} {source} is not a folder or a name of known weights", advice)
    if tower not in towers_of(name):
        raise UserError(f"'{name}' has no {tower} tower", f"Take it with --{towers_of(name)[0]}")
    repository = PUBLISHED[name].repository
    folder = cached(repository)
    if folder is None:
        raise UserError(f"{repository} is not in the cache {cache_folder()}", f"Run: {download_line(repository)}")
    return folder


def _nearest(source: Path) -> str:
    near = difflib.get_close_matches(str(source).lower().replace("-", "_"), PUBLISHED, n=1)
    return f"Did you mean '{near[0]}'?" if near else ""


def _preprocess(
    towers: Mapping[str, Converted], folders: Mapping[str, Path], names: Mapping[str, str]
) -> dict[str, Any]:
    """Size, mean and deviation of the pixels that the image tower expects; empty where they are not known."""
    if "vision" not in towers:
        return {}
    config = towers["vision"].config
    named = PUBLISHED[names["vision"]].pixels if "vision" in names else None
    found = expected_pixels(folders["vision"]) or named
    if found is None or not isinstance(config, VisionConfig):
        return {}
    return {"image_size": config.image_size, "mean": list(found[0]), "std": list(found[1])}


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
