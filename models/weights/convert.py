"""Folders of weights: another project's into our tensors, ours into another project's, and the converted folder between
them.

A source is a folder with a config.json of transformers, one of timm, or an open_clip_config.json, and *.safetensors, in
one file or several with an index. A converted folder holds weights.safetensors under the plain twin's names, and
weights.json: what the towers must be for them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.plain_values import from_plain, shown
from models.shape import shape_errors
from models.text import TextConfig
from models.vision import VisionConfig
from models.weights.efficientnet import ARCHITECTURE, PACKAGE_LITE, TIMM_LITE
from models.weights.huggingface import FAMILIES, family_of
from models.weights.layout import Json, Layout, TowerConfig, tower_shapes
from models.weights.rules import Rule, WeightsError, listed, load_all, save_all, unused
from models.weights.timm import OPEN_CLIP_TEXT, OPEN_CLIP_VISION, TIMM, open_clip_of, timm_said

LAYOUTS = (*FAMILIES.values(), TIMM, OPEN_CLIP_VISION, OPEN_CLIP_TEXT)
FORMAT = 1
LARGEST_JSON = 1 << 24  # bytes of a description or an index
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Fields that weights do not fix: a recipe may choose them, and at another resolution or with shorter texts.
FREE = (
    "preset",
    "dropout",
    "attention_dropout",
    "drop_path",
    "branch_init",
    "image_size",
    "max_length",
    "pooling",
    "pad_id",
)


@dataclass(frozen=True)
class Converted:
    """Weights of a tower under our names, float32; its configuration; tensors of the source that are not part of it;
    its origin.
    """

    config: TowerConfig
    state: dict[str, Tensor]
    left_out: list[str]
    origin: str


class Source:
    """A folder of weights as another project wrote it.

    Raises:
        WeightsError: no description, no safetensors, files that the index names but that are missing, or a damaged
            file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config, self.kind = _description(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._stored: dict[str, tuple[Path, str]] = {}
        for file in _safetensors(folder, self.kind):
            try:
                with safe_open(file, "pt") as tensors:
                    for name in tensors.keys():
                        shape = tuple(tensors.get_slice(name).get_shape())
                        # DINOv3 without registers writes a table of none; a batch norm counts its batches.
                        if 0 in shape or name.endswith(".num_batches_tracked"):
                            continue
                        # Files from TensorFlow's days name a layer norm's two tensors so; transformers renames them
                        # too.
                        own = name.replace("LayerNorm.gamma", "LayerNorm.weight")
                        own = own.replace("LayerNorm.beta", "LayerNorm.bias")
                        self.shapes[own], self._stored[own] = shape, (file, name)
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{file}: {error}") from error

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Those of the named tensors that exist."""
        found: dict[str, Tensor] = {}
        wanted = [name for name in names if name in self._stored]
        for file in {self._stored[name][0] for name in wanted}:
            with safe_open(file, "pt") as tensors:
                for name in wanted:
                    if self._stored[name][0] == file:
                        found[name] = tensors.get_tensor(self._stored[name][1])
        return found


def import_tower(source: Source, tower: str, projection: bool = False, allow_unused: bool = False) -> Converted:
    """The `tower` (vision or text) of a source. `projection` takes the layer onto the space that image and text share
    as well.

    Raises:
        WeightsError: a tower that we cannot hold, tensors that are missing, of another shape, or (unless allowed) of no
            use.
    """
    try:
        layout, config, rules, origin = _understood(source, tower, projection)
    except WeightsError:
        raise
    # Errors of arithmetic and look-ups on odd values of a description.
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise WeightsError(f"{source.folder} is described by odd values ({type(error).__name__}: {error})") from error
    own = [name for name in source.shapes if not re.fullmatch(layout.sibling, name)]
    left_out, unmatched = unused(own, rules, layout.known)
    if unmatched and not allow_unused:
        raise WeightsError(
            f"{source.folder} has {len(unmatched)} tensor(s) that the tower has no place for: {listed(unmatched)}"
        )
    state = load_all(rules, source.tensors(name for rule in rules for name in rule.theirs))
    _check_shapes({name: tuple(t.shape) for name, t in state.items()}, tower_shapes(config), str(source.folder))
    if odd := [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]:
        raise WeightsError(f"{source.folder} holds NaN or infinity in {len(odd)} tensor(s) of ours: {listed(odd)}")
    return Converted(config, state, left_out + unmatched, origin)


def _understood(source: Source, tower: str, projection: bool) -> tuple[Layout, TowerConfig, list[Rule], str]:
    """(layout, our configuration, the rules of its tensors, origin) of the `tower` of a source."""
    layout, said, origin = _recognised(source, tower)
    prefix = layout.prefix(source.shapes)
    if prefix is None:
        raise WeightsError(f"{source.folder} has no tensor {layout.first}, so it is not a {layout.name}")
    config = _config(tower, layout.fields(said), projection)
    if config.projection_dim:
        last = layout.rule(config, f"{tower}.projection.weight", prefix).theirs[0]
        config = config if last in source.shapes else _config(tower, layout.fields(said), projection=False)
    if config.num_layers > len(source.shapes):
        raise WeightsError(f"{source.folder} has {len(source.shapes)} tensors, too few for {config.num_layers} layers")
    return layout, config, layout.rules(config, prefix), origin


def export_tower(config: TowerConfig, state: Mapping[str, Tensor], name: str) -> tuple[Json, dict[str, Tensor]]:
    """(description, tensors) of a tower in the layout `name`, for write_exported; `state` holds our tensors, float32.

    Raises:
        WeightsError: an unknown layout, or one that cannot describe this tower; what differs is named.
    """
    tower = "vision" if isinstance(config, VisionConfig) else "text"
    layouts = {layout.name: layout for layout in LAYOUTS if layout.tower == tower}
    if name not in layouts:
        raise WeightsError(f"'{name}' is not a layout of a {tower} tower; known are {', '.join(layouts)}")
    layout = layouts[name]
    said = layout.describe(config)
    found = layout.fields(layout.defaults | said)
    if isinstance(config, VisionConfig) and config.num_positions == config.num_patches:
        found["position_resize"] = config.position_resize  # not resized at their own grid
    again = _config(tower, found, bool(config.projection_dim))
    if differences := _differences(config, again):
        raise WeightsError(f"{name} has no place for this tower: " + "; ".join(differences))
    tensors = save_all(layout.rules(config, layout.prefixes[0]), state)
    if name == "open_clip" and tower == "vision" and not config.projection_dim:
        tensors["visual.proj"] = torch.eye(config.hidden_size)  # open_clip's image tower always ends in one
    return layout.wrap(layout, said), tensors


def export_open_clip_pair(
    vision: TowerConfig, text: TowerConfig, state: Mapping[str, Tensor]
) -> tuple[Json, dict[str, Tensor]]:
    """Both towers as one model of open_clip, with the temperature that it starts from.

    Raises:
        WeightsError: a tower that open_clip cannot describe, or two that it cannot hold together; what differs is
            named.
    """
    described, tensors = export_tower(vision, state, "open_clip")
    second, more = export_tower(text, state, "open_clip")
    one, other = described["model_cfg"], second["model_cfg"]
    if differences := [f"{key} is {one[key]} and {other[key]}" for key in one.keys() & other if one[key] != other[key]]:
        raise WeightsError(f"open_clip cannot hold these towers together: {'; '.join(sorted(differences))}")
    scale = {"logit_scale": torch.tensor(math.log(1 / 0.07))}
    return described | {"model_cfg": one | other}, tensors | more | scale


def write_exported(folder: Path, described: Json, tensors: dict[str, Tensor]) -> None:
    """Writes what export_tower made into an existing folder, as the files that its library looks for."""
    kind = "open_clip_" if "model_cfg" in described else ""
    save_tensors(tensors, folder / f"{kind}model.safetensors")
    (folder / f"{kind}config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes a safetensors file as transformers does, with the permissions of any new file: safetensors' own let only
    the writer read it.
    """
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)


def write_converted(folder: Path, towers: Mapping[str, Converted]) -> None:
    """Writes weights.safetensors and weights.json into an existing folder."""
    state = {name: tensor for converted in towers.values() for name, tensor in converted.state.items()}
    save_tensors(state, folder / "weights.safetensors")
    meta: Json = {"format": FORMAT, "model": {}, "origin": {}, "left_out": {}}
    for tower, converted in towers.items():
        meta["model"][tower] = asdict(converted.config)
        meta["origin"][tower] = converted.origin
        meta["left_out"][tower] = converted.left_out
    (folder / "weights.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def read_converted(folder: Path) -> tuple[dict[str, TowerConfig], dict[str, Tensor]]:
    """(configuration of each tower, all tensors) of a converted folder; names and shapes are compared before any tensor
    is read.

    Raises:
        WeightsError: not a converted folder, or a damaged one.
    """
    meta, file = read_object(folder / "weights.json"), folder / "weights.safetensors"
    if meta.get("format") != FORMAT:
        raise WeightsError(f"{folder} has the format {shown(meta.get('format'))}; this version reads {FORMAT}")
    given = meta.get("model")
    if not isinstance(given, dict) or not given.keys() <= {"vision", "text"}:
        raise WeightsError(f"{folder / 'weights.json'} is damaged (model is {shown(given)})")
    configs = {tower: _checked(tower, values) for tower, values in given.items()}
    try:
        with safe_open(file, "pt") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}
            found = {name: tuple(part.get_shape()) for name, part in parts.items()}
            kinds = {part.get_dtype() for part in parts.values()}
        wanted = {name: shape for config in configs.values() for name, shape in tower_shapes(config).items()}
        _check_shapes(found, wanted, str(file))
        if kinds - {"F32"}:
            raise WeightsError(f"{file} holds {', '.join(sorted(kinds))}, not only F32")
        return configs, load_file(file)
    except WeightsError:
        raise
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} holds no converted weights ({error})") from error
    except (RuntimeError, ValueError, ArithmeticError) as error:  # sizes of which torch makes no layer
        raise WeightsError(f"{folder / 'weights.json'} describes no tower ({error})") from error


def fitted(folder: Path, towers: nn.Module) -> dict[str, Tensor]:
    """The tensors of a converted folder for `towers` (with parts vision and text), checked against what the towers are.

    Of a longer table of text positions the first rows are taken. Load them with models.tp_state.load_merged.

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


def _recognised(source: Source, tower: str) -> tuple[Layout, Json, str]:
    """(layout, what the description says with its defaults, origin) of the `tower` of a source."""
    if source.kind == "open_clip":
        return *open_clip_of(source.shapes, source.config, tower), "open_clip"
    if source.kind == "transformers":
        layout, said = family_of(source.config, tower)
        return layout, said, layout.name
    if tower == "text":
        raise WeightsError(f"{source.folder} is a model of timm, which has no text tower")
    architecture = source.config["architecture"]
    if ARCHITECTURE.fullmatch(architecture):
        layout = TIMM_LITE if TIMM_LITE.prefix(source.shapes) is not None else PACKAGE_LITE
        return layout, source.config, architecture
    said = timm_said(source.shapes, architecture, source.config.get("model_args") or {})
    return TIMM, said, f"timm {architecture}"


def _config(tower: str, given: Mapping[str, Any], projection: bool = True) -> TowerConfig:
    known = {field.name for field in fields(_kind(tower))}
    kept = {key: value for key, value in given.items() if projection or not key.startswith("projection_")}
    return _checked(tower, {key: value for key, value in kept.items() if key in known})


def _checked(tower: str, given: Any) -> TowerConfig:
    """A tower's configuration from plain values.

    Raises:
        WeightsError: values of another type or size, or that do not fit together.
    """
    try:
        config: TowerConfig = from_plain(_kind(tower), given, tower)
        errors = config.errors(tower) + shape_errors(config, 1, tower)
    except ValueError as error:
        errors = [str(error)]
    if errors:
        raise WeightsError(errors[0])
    return config


def _kind(tower: str) -> type[Any]:
    return VisionConfig if tower == "vision" else TextConfig


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


def read_object(file: Path) -> Json:
    """The object that a JSON file holds.

    Raises:
        WeightsError: the file does not exist, or holds something else.
    """
    try:
        with file.open("rb") as handle:
            content = handle.read(LARGEST_JSON + 1)
        found = json.loads(content) if len(content) <= LARGEST_JSON else None
    except OSError as error:
        raise WeightsError(f"{file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{file} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{file} is not a JSON object of at most {LARGEST_JSON:,} bytes")
    return found


def own_file(folder: Path, name: str) -> Path:
    """The file `name` of a folder that somebody else may have written.

    Raises:
        WeightsError: it lies elsewhere. A link may lead into the folder and, as in the cache of the Hugging Face hub,
            into blobs/ two folders above.
    """
    file, home = folder / name, folder.resolve()
    if Path(name).name != name or not {home, home.parent.parent / "blobs"} & {file.resolve().parent}:
        raise WeightsError(f"{file} leads out of its folder")
    return file


def _description(folder: Path) -> tuple[Json, str]:
    for name in ("open_clip_config.json", "config.json"):
        if (folder / name).is_file():
            config = read_object(own_file(folder, name))
            if name == "config.json":
                return config, "timm" if "architecture" in config else "transformers"
            if not isinstance(config.get("model_cfg"), dict):
                raise WeightsError(f"{folder / name} has no model_cfg")
            return config["model_cfg"], "open_clip"
    raise WeightsError(f"{folder} has neither a config.json nor an open_clip_config.json")


def _safetensors(folder: Path, kind: str) -> list[Path]:
    """The files with the tensors that the description of that kind describes."""
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    own = "open_clip_model.safetensors" if kind == "open_clip" else "model.safetensors"
    if len(files) > 1 and own in files:  # a folder of the hub may hold a model in the layouts of two libraries
        return [own_file(folder, own)]
    if index := sorted(folder.glob("*.safetensors.index.json")):
        named = read_object(own_file(folder, index[0].name)).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
            raise WeightsError(f"{index[0]} has no weight_map of names")
        files = sorted(set(named.values()))
        found = [own_file(folder, name) for name in files]
        if missing := [file.name for file in found if not file.is_file()]:
            raise WeightsError(f"{folder} lacks {listed(missing)}, which {index[0].name} names")
        return found
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
    if pickled and not files:
        raise WeightsError(
            f"{folder} has {listed(pickled)} and no *.safetensors. Pickled weights can run their author's code and are "
            "not read. If you trust them, transformers converts them: "
            "AutoModel.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    if len(files) != 1:
        raise WeightsError(
            f"{folder} has {len(files)} files *.safetensors, no index and none named {own}, as {kind} names its own"
        )
    return [own_file(folder, files[0])]
