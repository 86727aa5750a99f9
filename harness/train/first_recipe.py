"""First recipe of a catalogue: jobs/recipes/oclear_small.yaml with values that fit it, each with its reason.

docs/recipes.md has the rules.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from harness.core.cli import leaves, read_recipe
from harness.data.preprocess import PreprocessSpec
from models.vision import VisionConfig

BASE = Path(__file__).parents[2] / "jobs" / "recipes" / "oclear_small.yaml"
MANY_PHOTOS = 16  # train photos of a class in the middle: between the two catalogues of docs/results.md
MOST_EPOCHS, FEWEST_STEPS, LEAST_EPOCHS = 100, 100, 10
# Useful FLOPs a second: of a core with 64-pixel images, measured on two; of a GPU, a guess.
CORE_FLOPS, GPU_FLOPS = 30e9, 20e12
TRAINING_SHARE = 0.8  # of the time budget; the rest is for evaluation, checkpoints and export
SMALL = 128  # pixels of an imported convolutional tower on cores


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts that the rules look at.

    Args:
        classes: classes that are trained.
        photos: train photos.
        has_text: whether any document has a title or a description.
        gpus: GPUs of this machine; 0: it trains on its cores.
        ranks: processes that train.
        minutes: time to train.
        slices: attributes that evaluation gives figures for.
        imported: the image tower starts from imported weights.
    """

    classes: int
    photos: int
    has_text: bool
    gpus: int
    ranks: int
    minutes: float
    slices: tuple[str, ...] = ()
    imported: bool = False

    @property
    def many(self) -> bool:
        """True where classes have photos enough to learn from."""
        return self.photos / self.classes >= MANY_PHOTOS


Changes = dict[str, tuple[Any, str]]  # dotted key -> value (None: the recipe's default), reason


def shape(facts: Facts) -> Changes:
    """Values that follow from the catalogue and the machine, without the number of steps."""
    seen = f"{facts.photos / facts.classes:.1f} train photos a class"
    changes: Changes = {}
    if facts.many:
        changes["model.objective"] = "classification", f"{seen}: classes learn from {MANY_PHOTOS} on"
        changes["optimizer.rows"] = {"lr_factor": 10.0}, "a class is in few steps: its weights learn faster"
    else:
        changes["model.objective"] = "contrastive", f"{seen}: below {MANY_PHOTOS}, pairs learn faster than classes"
        changes["data.queries_per_step"] = 32, "each brings a document of its own"
    if facts.imported:
        changes["data.queries_per_step"] = 24 if facts.many else 16, "an imported tower takes longer for each"
    if facts.imported and facts.many:
        changes["model.contrast_weight"] = 2.0, "pairs beside the classes"
    if not facts.has_text:
        changes["model.fusion_kind"] = "image", "no document has a text"
    scale, margin = (16.0, 0.1) if facts.classes < 1_000 else (32.0, 0.2) if facts.classes < 100_000 else (64.0, 0.4)
    changes["head.scale"] = scale, f"{facts.classes:,} classes"
    changes["head.margin"] = [1.0, 0.0, margin], f"{facts.classes:,} classes"
    if facts.classes >= 1_000_000:
        changes["head.sample_rate"] = 0.1, f"{facts.classes:,} classes: a tenth of the negatives each step"
    if facts.gpus:
        changes["train.precision"] = "bf16", "a GPU"
    if facts.slices:
        changes["evaluation.slices"] = list(facts.slices), "columns of few values"
    return changes


def start(weights: Path, vision: VisionConfig, pixels: PreprocessSpec, gpus: int) -> Changes:
    """Values that follow from imported weights.

    Args:
        weights: folder of `shelfmark import`.
        vision: its image tower.
        pixels: that the tower expects.
        gpus: as in Facts.
    """
    size = vision.image_size if gpus or vision.is_transformer else min(SMALL, vision.image_size)
    why = "the imported tower's" if size == vision.image_size else "convolutions take any size; this one suits cores"
    tower = dict(leaves(read_recipe(weights / "recipe.yaml")["model"]["vision"]))
    return {
        "model.vision": ({**tower, "image_size": size}, f"the tower of {weights}"),
        "model.embedding_dim": (min(256, vision.pooled_size), f"of {vision.pooled_size:,} channels"),
        "data.preprocess.image_size": (size, why),
        "data.preprocess.mean": (list(pixels.mean), "the imported tower's"),
        "data.preprocess.std": (list(pixels.std), "the imported tower's"),
        "optimizer.lr": (3e-4, "an imported tower needs small steps"),
        "optimizer.layer_decay": (0.9, "imported layers change the less the nearer they are to the pixels"),
        "train.init_from": (weights, "imported by `shelfmark import`"),
        "train.init_projection": ("principal", "training starts from what the tower finds"),
    }


def length(facts: Facts, flops: float, queries: int) -> tuple[Changes, float]:
    """The number of steps and what goes with it, and the seconds that they take.

    Args:
        facts: of the catalogue and the machine.
        flops: of one step.
        queries: photos of one step.
    """
    rate = facts.gpus * GPU_FLOPS or facts.ranks * CORE_FLOPS
    epoch = facts.photos / queries
    possible = TRAINING_SHARE * facts.minutes * 60 * rate / flops
    steps = _round(max(FEWEST_STEPS, min(possible, MOST_EPOCHS * epoch)))
    why = f"{steps / epoch:.0f} epochs in {facts.minutes:g} minutes" if possible < MOST_EPOCHS * epoch else (
        f"{steps / epoch:.0f} epochs; more would learn the photos by heart"
    )  # fmt: skip
    every = max(50, _round(steps / 6))
    changes: Changes = {
        "train.steps": (steps, why),
        "train.margin_warmup": (_round(0.6 * steps), "over 60 % of the steps"),
        "train.evaluate_every": (every, "six times in all, at least 50 steps apart"),
        "train.checkpoint_every": (every, "a stopped run loses at most these steps"),
    }
    changes["optimizer.warmup_steps"] = min(100, steps // 10), "a tenth of the steps, at most 100"
    if facts.imported and facts.many:
        changes["train.stages"] = [{"steps": steps, "rows": "class_mean"}], "class weights start at their samples"
    return changes, steps * flops / rate


def written(changes: Mapping[str, tuple[Any, str]], head: str) -> str:
    """The recipe as text: that of BASE below `head`, with `changes` in place of its values, each with its reason."""
    present = {key for leaf in dict(leaves(read_recipe(BASE))) for key in (leaf, _above(leaf))}
    lines: list[str] = [f"# {line}".rstrip() for line in head.splitlines()]
    section: list[str] = []
    for line in re.sub(r"\A(#.*\n)+", "", BASE.read_text(encoding="utf-8")).splitlines():
        if found := re.match(r"( *)(\w+):( |$)", line):
            section = [*section[: len(found[1]) // 2], found[2]]
            key = ".".join(section)
            if any(_above(key) == above and isinstance(value, dict) for above, (value, _) in changes.items()):
                continue  # the section has a value as a whole
            if key not in changes:
                lines.append(line)
            elif changes[key][0] is not None:
                lines.append(_line(key, *changes[key]))
            lines += [_line(new, *changes[new]) for new in changes if new not in present and _above(new) == key]
        elif not line.lstrip().startswith("#"):  # a reason for values that may not be these
            lines.append(line)
    return "\n".join([*lines, ""])


def _above(key: str) -> str:
    return key.rpartition(".")[0]


def _line(key: str, value: Any, why: str) -> str:
    *parents, name = key.split(".")
    indent, rows = "  " * len(parents), [""]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        rows += [f"{indent}  - {_flow(row)}" for row in value]
        shown = ""
    elif isinstance(value, dict):
        shown = _flow(value)
    else:
        shown = json.dumps(value, default=str, ensure_ascii=False) if isinstance(value, list | Path) else value
    return f"{indent}{f'{name}: {shown}':<28} # {why}" + "\n".join(rows)


def _flow(values: dict[str, Any]) -> str:
    """A mapping in one line of YAML."""
    return yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=math.inf).strip()


def _round(steps: float) -> int:
    """To ten where there are a hundred or more."""
    return math.ceil(steps / 10) * 10
