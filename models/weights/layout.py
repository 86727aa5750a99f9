"""Layout of another project's tower as data: keys of its description, names of its tensors; read in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from models.activation import GATED
from models.plain.transformer import PlainBuilder
from models.plain_values import LARGEST, shown
from models.shape import padded_vocab
from models.text import TextConfig, TextTower
from models.vision import VisionConfig
from models.vision_kinds import vision_tower
from models.weights import rules
from models.weights.rules import Rule, WeightsError

TowerConfig = VisionConfig | TextConfig
Json = dict[str, Any]

# Short names of the tensors within a transformer layer and a pool, as the tables use them.
_SHORT = (
    {"input_layernorm.": "norm1.", "self_attn_bda.norm.": "norm1.", "self_attn_bda.scale": "scale1"}
    | {"pre_mlp_layernorm.": "norm2.", "mlp_bda.norm.": "norm2.", "mlp_bda.scale": "scale2"}
    | {"self_attention.q_layernorm.": "q_norm.", "self_attention.k_layernorm.": "k_norm."}
    | {
        "self_attention.linear_": "",
        "mlp.linear_": "",
        "pool.linear_": "pool.",
        "block.final_layernorm.": "final_norm.",
    }
)
_SQUARES = ("image_size", "img_size", "patch_size")
_LAYER = re.compile(r"(?:vision|text)\.(?:block\.layers\.(\d+)\.)?(.+)")


@dataclass(frozen=True)
class Choice:
    """A key whose values have other names here: theirs -> ours. With an empty `ours` there is no field; the key must
    have one of the values.

    Where no value fits ours, the first is written; export then finds that it means another tower, and refuses.
    """

    ours: str
    values: Mapping[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One kind of tower.

    Args:
        tower: vision or text.
        name: name of the layout for export; for transformers the model_type of a config.json of this tower only.
        keys: key of the description -> our field.
        fixed: fields of ours that are the same in all such towers.
        defaults: values of the description that may be left out.
        unfold: a description to one that `keys` can say: arithmetic on several keys at once.
        fold: back again.
        wrap: (layout, folded description) to the content of the file.
        names: tensor or layer of ours, in short (_SHORT) -> theirs. A layer ends in "." or "_", and weight or bias
            follows. (a|b): several, one part after the other. `layer`: what stands before the names within layer {i}. A
            name after "/" stands outside the prefix, one before "^T" is transposed; what begins with "gated." or
            "biased." is for a gated MLP, for a projection with bias.
        dims: dimensions of their tables of rows, of which ours all have two.
        flat_patches: the patch embedding is a matrix on pixels in the order row, column, channel.
        prefixes: what may stand before the names; the first is written.
        known: patterns of tensors that are not part of the tower (heads of its training).
        sibling: pattern of the other tower's tensors, where a folder holds a pair.
        whole: model_type of a description of both towers of a pair; this one is then under `section`.
        section: see `whole`.
        architecture: the class of transformers that reads it: (without projection, with it).
    """

    tower: str
    name: str
    keys: dict[str, Any]
    fixed: Json = field(default_factory=dict)
    defaults: Json
    unfold: Callable[[Json], Json] = dict
    fold: Callable[[Json], Json] = dict
    wrap: Callable[[Layout, Json], Json]
    names: dict[str, str]
    dims: Mapping[str, int] = field(default_factory=dict)
    flat_patches: bool = False
    prefixes: tuple[str, ...] = ("",)
    known: tuple[str, ...]
    sibling: str = ""
    whole: str = ""
    section: str = ""
    architecture: tuple[str, str] = ("", "")

    def fields(self, said: Json) -> Json:
        """Our fields of a description with its defaults.

        Raises:
            WeightsError: a value that our towers do not know.
        """
        said = {key: _side(key, value) for key, value in said.items()}
        for key, default in self.defaults.items():
            _require_like(key, said[key], default)
        said = self.unfold(said)
        found = dict(self.fixed)
        for key, how in self.keys.items():
            if isinstance(how, str):
                found[how] = said[key]
            elif not isinstance(said[key], str | int) or said[key] not in how.values:
                known = ", ".join(str(value) for value in how.values)
                raise WeightsError(f"{key} is '{said[key]}'; known for {self.name}: {known}")
            elif how.ours:
                found[how.ours] = how.values[said[key]]
        if self.tower == "vision":
            grid = found["image_size"] // found["patch_size"]  # an image of no whole number of patches loses its rest
            learned = found.get("positions", "learned") == "learned"
            found |= {"image_size": grid * found["patch_size"], "position_grid": grid if learned else 0}
        return found

    def describe(self, config: TowerConfig) -> Json:
        """The description of a tower, as far as it has words for it."""
        values = {entry.name: getattr(config, entry.name) for entry in fields(config)}
        values["ffn_hidden_size"] = config.mlp_size
        if isinstance(config, VisionConfig):
            grid = config.position_grid or config.image_size // config.patch_size
            values |= {"image_size": grid * config.patch_size, "class_token": config.has_class_token}
        said = {}
        for key, how in self.keys.items():
            if isinstance(how, str):
                said[key] = values[how]
            else:
                fitting = [theirs for theirs, ours in how.values.items() if how.ours and ours == values[how.ours]]
                said[key] = (fitting or list(how.values))[0]
        return self.fold(said)

    @property
    def first(self) -> str:
        """Their tensor that every such tower has, without what stands before its name."""
        return f"{self.names['stem.']}weight" if self.tower == "vision" else self.names["words.weight"]

    def prefix(self, names: Container[str]) -> str | None:
        """Prefix of the names in a folder with tensors of these `names`; None: it holds no such tower."""
        return next((prefix for prefix in self.prefixes if f"{prefix}{self.first}" in names), None)

    def rules(self, config: TowerConfig, prefix: str) -> list[Rule]:
        """The rules of a tower, for all of its tensors; `prefix` stands before their names."""
        shapes = tower_shapes(config)
        return [self.rule(config, name, prefix) for name in shapes if not name.endswith(".class_position")]

    def rule(self, config: TowerConfig, name: str, prefix: str) -> Rule:
        """The rule of our tensor `name`. The class token's position goes with those of the patches."""
        layer, part = _LAYER.fullmatch(name).groups()  # type: ignore[union-attr]
        for ours, short in _SHORT.items():
            part = part.replace(ours, short)
        before = prefix if layer is None else prefix + self.names["layer"].format(i=layer)
        theirs = tuple(one[1:] if one.startswith("/") else before + one for one in self._named(config, part))
        if part == "words.weight" and isinstance(config, TextConfig):
            return rules.padded_rows(name, theirs[0], config.vocab_size, padded_vocab(config.vocab_size))
        if part == "stem.weight" and isinstance(config, VisionConfig) and self.flat_patches:
            return rules.flat_patches(name, theirs[0], config.patch_size)
        if part in self.dims:
            both = part == "position" and isinstance(config, VisionConfig) and config.class_position
            return rules.rows(("vision.class_position", name) if both else (name,), theirs[0], self.dims[part])
        if part == "qkv.bias" and not config.key_bias:
            return rules.keyless_bias(name, theirs[0], theirs[2], config.num_attention_heads)
        if part.startswith("qkv."):
            return rules.interleaved(name, theirs, 3, config.num_attention_heads)
        if part.startswith("pool.qkv."):
            return rules.concatenated(name, theirs, (3,) if len(theirs) == 1 else (1, 2))
        if part.startswith("fc1.") and config.activation in GATED:
            return rules.interleaved(name, theirs, 2, config.mlp_size)
        if theirs[0].endswith("^T"):
            return rules.transposed(name, theirs[0].removesuffix("^T"))
        return Rule((name,), theirs)

    def _named(self, config: TowerConfig, part: str) -> tuple[str, ...]:
        """Their names of our `part`, without what stands before them."""
        biased = isinstance(config, TextConfig) and config.projection_bias
        kinds = [*(["gated."] if config.activation in GATED else []), *(["biased."] if biased else []), ""]
        stem, _, leaf = part.rpartition(".")
        for key, end in ((f"{kind}{own}", end) for kind in kinds for own, end in ((part, ""), (f"{stem}.", leaf))):
            if key in self.names:
                found = re.fullmatch(r"([^(]*)\(?([^)]*)\)?(.*)", self.names[key])
                assert found is not None, "names are of this form"
                before, parts, after = found.groups()
                return tuple(f"{before}{one}{after}{end}" for one in parts.split("|"))
        raise WeightsError(f"{self.name} has no place for {part}")


def _side(key: str, value: Any) -> Any:
    """The one side of a square that is given as height and width."""
    if key not in _SQUARES or not isinstance(value, list) or [type(side) for side in value] != [int, int]:
        return value
    if value[0] != value[1]:
        raise WeightsError(f"{key} is {value[0]} x {value[1]}; towers of square images and patches can be imported")
    return value[0]


def _require_like(key: str, value: Any, default: Any) -> None:
    """Refuses a value of another type than the default's, or a number out of bounds. Numbers may be whole or not; None
    stands for a missing value.
    """
    numbers = type(default) in (int, float) and type(value) in (int, float)
    if default is not None and value is not None and not numbers and type(value) is not type(default):
        raise WeightsError(f"{key} is {shown(value)}, not of type {type(default).__name__}")
    if type(value) in (int, float) and not 0 <= value <= LARGEST:
        raise WeightsError(f"{key} is {shown(value)}, not between 0 and {LARGEST:,}")


def tower_shapes(config: TowerConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a tower, under the plain twin's names, with its shape; allocates nothing."""
    build = PlainBuilder()
    with torch.device("meta"):
        tower = vision_tower(config, build) if isinstance(config, VisionConfig) else TextTower(config, build)
    prefix = "vision" if isinstance(config, VisionConfig) else "text"
    return {f"{prefix}.{name}": tuple(t.shape) for name, t in tower.state_dict().items()}
