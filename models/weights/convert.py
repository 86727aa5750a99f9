"""Folders of weights: another project's into our tensors, ours into another project's, and the converted folder between them.

A source is a folder with a config.json of transformers, one of timm, or an open_clip_config.json, and *.safetensors, in one file or several
with an index. A converted folder holds weights.safetensors under the plain twin's names, and weights.json: what the towers must be for them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.plain.transformer import PlainBuilder
from models.text import TextConfig, TextTower
from models.vision import VisionConfig, VisionTower
from models.weights.huggingface import FAMILIES, Family, family_of
from models.weights.names import text_rules, vision_rules
from models.weights.rules import Rule, WeightsError, listed, load_all, save_all, unused
from models.weights.timm import (
    OPEN_CLIP_KNOWN,
    TIMM_KNOWN,
    TIMM_NAMES,
    open_clip_text,
    open_clip_vision,
    timm_fields,
)

TowerConfig = VisionConfig | TextConfig
FORMAT = 1
# Fields that weights do not fix: a recipe may choose them, and at another resolution or with shorter texts.
FREE = ("preset", "dropout", "attention_dropout", "drop_path", "branch_init", "image_size", "max_length", "pooling")


@dataclass(frozen=True)
class Converted:
    """A tower's weights under our names, float32, its configuration, the tensors left out because they are none of it, and where it is from."""

    config: TowerConfig
    state: dict[str, Tensor]
    left_out: list[str]
    origin: str


class Source:
    """A folder of weights as another project wrote it.

    Raises:
        WeightsError: no description, no safetensors, files that the index names but that are missing, or a damaged file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config, self.kind = _description(folder)
        self._files: dict[str, Path] = {}
        self._names: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in _safetensors(folder):
            try:
                with safe_open(file, "pt") as tensors:
                    for name in tensors.keys():
                        shape = tuple(tensors.get_slice(name).get_shape())
                        if 0 in shape:  # DINOv3 without registers writes a table of none
                            continue
                        # Files from TensorFlow's days name a layer norm's two tensors so; transformers renames them too.
                        own = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
                            "LayerNorm.beta", "LayerNorm.bias"
                        )
                        self._files[own], self._names[own] = file, name
                        self.shapes[own] = shape
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{file}: {error}") from error

    def tensors(self, names: list[str]) -> dict[str, Tensor]:
        """Those of the named tensors that are there."""
        found: dict[str, Tensor] = {}
        for file in set(self._files.values()):
            with safe_open(file, "pt") as tensors:
                for name in names:
                    if self._files.get(name) == file:
                        found[name] = tensors.get_tensor(self._names[name])
        return found


def import_tower(source: Source, tower: str, projection: bool = False, allow_unused: bool = False) -> Converted:
    """The `tower` (vision or text) of a source. `projection` takes the layer onto the space that image and text share as well.

    Raises:
        WeightsError: a tower that we cannot hold, tensors that are missing, of another shape, or (unless allowed) of no use.
    """
    found = _recognised(source, tower, projection)
    own = [name for name in source.shapes if not re.fullmatch(found.sibling, name)]
    left_out, unmatched = unused(own, found.rules, found.known)
    if unmatched and not allow_unused:
        raise WeightsError(
            f"{source.folder} has {len(unmatched)} tensor(s) that the tower has no place for: {listed(unmatched)}"
        )
    state = load_all(found.rules, source.tensors([name for rule in found.rules for name in rule.theirs]))
    _check_shapes({name: tuple(t.shape) for name, t in state.items()}, tower_shapes(found.config), str(source.folder))
    return Converted(found.config, state, left_out + unmatched, found.origin)


def export_tower(
    config: TowerConfig, state: Mapping[str, Tensor], model_type: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, tensors) of a tower for transformers, as `model_type`; `state` holds our tensors, float32.

    Raises:
        WeightsError: an unknown model_type, or one that cannot describe this tower; what differs is named.
    """
    family = FAMILIES.get(model_type)
    tower = "vision" if isinstance(config, VisionConfig) else "text"
    if family is None or family.tower != tower:
        kinds = ", ".join(name for name, other in FAMILIES.items() if other.tower == tower)
        raise WeightsError(f"'{model_type}' is no layout of a {tower} tower; known are {kinds}")
    described = family.describe(config)
    again = _config(tower, family.fields({**family.defaults, **described}))
    if differences := _differences(config, again):
        raise WeightsError(f"{model_type} has no place for this tower: " + "; ".join(differences))
    rules = _family_rules(family, config, family.prefixes[0])
    architecture = family.architecture[bool(config.projection_dim)]
    heading = {"model_type": model_type, "architectures": [architecture], "dtype": "float32"}
    return heading | described, save_all(rules, state)


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes a safetensors file as transformers does; readable by others, which the library's own files are not."""
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)


def write_converted(folder: Path, towers: Mapping[str, Converted]) -> None:
    """Writes weights.safetensors and weights.json into an existing folder."""
    state = {name: tensor for converted in towers.values() for name, tensor in converted.state.items()}
    save_tensors(state, folder / "weights.safetensors")
    meta = {
        "format": FORMAT,
        "model": {tower: asdict(converted.config) for tower, converted in towers.items()},
        "origin": {tower: converted.origin for tower, converted in towers.items()},
        "left_out": {tower: converted.left_out for tower, converted in towers.items()},
    }
    (folder / "weights.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def read_converted(folder: Path) -> tuple[dict[str, TowerConfig], dict[str, Tensor]]:
    """(configuration of each tower, all tensors) of a converted folder.

    Raises:
        WeightsError: it is none, or it is damaged.
    """
    try:
        meta = json.loads((folder / "weights.json").read_text(encoding="utf-8"))
        state = load_file(folder / "weights.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise WeightsError(f"{folder} holds no converted weights ({error})") from error
    if meta.get("format") != FORMAT:
        raise WeightsError(f"{folder} has the format {meta.get('format')}; this version reads {FORMAT}")
    return {tower: _config(tower, given) for tower, given in meta["model"].items()}, state


def fitted(folder: Path, towers: nn.Module) -> dict[str, Tensor]:
    """The tensors of a converted folder for `towers` (with parts vision and text), checked against what the towers are.

    Of a longer table of text positions the first rows are taken. Load them with models.merge.load_merged.

    Raises:
        WeightsError: a tower that is another one than the weights were made with; what differs is named.
    """
    configs, state = read_converted(folder)
    for tower, config in configs.items():
        if not hasattr(towers, tower):
            raise WeightsError(f"{folder} holds a {tower} tower, which this method does not have")
        own: TowerConfig = getattr(towers, tower).config
        if differences := _differences(own, config, f"model.{tower}."):
            raise WeightsError(f"{folder} holds the weights of another tower: " + "; ".join(differences))
        if isinstance(own, TextConfig) and "text.position" in state:
            state["text.position"] = state["text.position"][: own.max_length + own.position_offset]
        mine = {name: tensor for name, tensor in state.items() if name.startswith(f"{tower}.")}
        _check_shapes({name: tuple(t.shape) for name, t in mine.items()}, tower_shapes(own), str(folder))
    return state


def tower_shapes(config: TowerConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a tower, under the plain twin's names, with its shape; allocates nothing."""
    build = PlainBuilder()
    with torch.device("meta"):
        tower = VisionTower(config, build) if isinstance(config, VisionConfig) else TextTower(config, build)
    prefix = "vision" if isinstance(config, VisionConfig) else "text"
    return {f"{prefix}.{name}": tuple(t.shape) for name, t in tower.state_dict().items()}


@dataclass(frozen=True)
class _Recognised:
    """`known`: patterns of tensors that are no part of the tower; `sibling`: pattern of another tower's."""

    config: TowerConfig
    rules: list[Rule]
    known: tuple[str, ...]
    origin: str
    sibling: str = ""


def _recognised(source: Source, tower: str, projection: bool) -> _Recognised:
    if source.kind == "transformers":
        family, said = family_of(source.config, tower)
        prefix = _prefix(family, source)
        found = family.fields(said)
        name = family.names.projection.format(prefix=prefix)
        there = f"{name}.weight" if found.get("projection_bias") else name
        config = _config(tower, found, projection and there in source.shapes)
        rules = _family_rules(family, config, prefix)
        return _Recognised(config, rules, family.known, family.model_type, family.sibling)
    if source.kind == "timm":
        if tower == "text":
            raise WeightsError(f"{source.folder} is a model of timm, which has no text tower")
        architecture = source.config["architecture"]
        image = VisionConfig(**timm_fields(source.shapes, architecture))
        return _Recognised(image, vision_rules(image, TIMM_NAMES, ""), TIMM_KNOWN, f"timm {architecture}")
    if tower == "vision":
        found, names, prefix = open_clip_vision(source.shapes, source.config)
        image = VisionConfig(**_without_projection(found, projection))
        sibling = r"(?!visual\.|logit).*"
        return _Recognised(image, vision_rules(image, names, prefix), OPEN_CLIP_KNOWN, "open_clip", sibling)
    found, text_names, prefix = open_clip_text(source.shapes, source.config)
    text = TextConfig(**_without_projection(found, projection))
    return _Recognised(text, text_rules(text, text_names, prefix), OPEN_CLIP_KNOWN, "open_clip", r"visual\..*")


def _family_rules(family: Family, config: TowerConfig, prefix: str) -> list[Rule]:
    if isinstance(config, VisionConfig):
        return vision_rules(config, family.names, prefix)
    return text_rules(config, family.names, prefix)


def _prefix(family: Family, source: Source) -> str:
    name = f"{family.names.patch}weight" if family.tower == "vision" else family.names.words
    for prefix in family.prefixes:
        if f"{prefix}{name}" in source.shapes:
            return prefix
    raise WeightsError(f"{source.folder} has no tensor {name}, so it is no {family.model_type}")


def _config(tower: str, given: Mapping[str, Any], projection: bool = True) -> TowerConfig:
    kind: type[Any] = VisionConfig if tower == "vision" else TextConfig
    known = {field.name for field in fields(kind)}
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items() if key in known}
    return kind(**_without_projection(values, projection))


def _without_projection(given: dict[str, Any], projection: bool) -> dict[str, Any]:
    return {key: value for key, value in given.items() if projection or not key.startswith("projection_")}


def _differences(mine: TowerConfig, theirs: TowerConfig, where: str = "") -> list[str]:
    """Sentences on what differs between two towers, as far as weights fix it."""
    own, other = _fixed(mine), _fixed(theirs)
    return [f"{where}{name} is {own[name]!r}, not {other[name]!r}" for name in own if own[name] != other[name]]


def _fixed(config: TowerConfig) -> dict[str, Any]:
    """The fields that weights fix, and what follows from several of them in place of those."""
    fixed = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in FREE}
    fixed |= {"ffn_hidden_size": config.mlp_size, "layer_scale": bool(config.layer_scale)}
    if isinstance(config, VisionConfig):
        own_pool = config.pooling in ("attention", "mean_max")  # these have tensors of their own
        fixed |= {"class_token": config.has_class_token, "pooling": config.pooling if own_pool else "mean or class"}
        fixed["position_grid"] = math.isqrt(config.num_positions) if config.positions == "learned" else 0
    return fixed


def _check_shapes(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], where: str) -> None:
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is too much" for name in found if name not in wanted]
    problems += [f"{n} is {list(found[n])}, not {list(s)}" for n, s in wanted.items() if n in found and found[n] != s]
    if problems:
        raise WeightsError(f"{where} does not fit the tower: {listed(problems)}")


def _description(folder: Path) -> tuple[dict[str, Any], str]:
    for name in ("open_clip_config.json", "config.json"):
        if (folder / name).is_file():
            try:
                config = json.loads((folder / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise WeightsError(f"{folder / name} is no JSON ({error})") from error
            if name == "open_clip_config.json":
                return config["model_cfg"], "open_clip"
            return config, "timm" if "architecture" in config else "transformers"
    raise WeightsError(f"{folder} has neither a config.json nor an open_clip_config.json")


def _safetensors(folder: Path) -> list[Path]:
    index = sorted(folder.glob("*.safetensors.index.json"))
    if index:
        named = sorted(set(json.loads(index[0].read_text(encoding="utf-8"))["weight_map"].values()))
        if missing := [name for name in named if not (folder / name).is_file()]:
            raise WeightsError(f"{folder} lacks {listed(missing)}, which {index[0].name} names")
        return [folder / name for name in named]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise WeightsError(f"{folder} has {len(files)} files *.safetensors and no index; one is needed")
    return files
