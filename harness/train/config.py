"""A run's configuration: one YAML recipe, dotted overrides, frozen dataclasses; checked before any process group
starts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jsonargparse

from harness.core.cli import Parser, leaves, read_recipe
from harness.core.device import PRECISIONS
from harness.core.errors import UserError
from harness.core.mesh import MeshConfig, check_layout
from harness.data.loader import DataConfig
from harness.data.preprocess import LARGEST_IMAGE
from harness.evaluate.evaluation import EvaluationConfig
from harness.train.optimizer import OptimizerConfig
from harness.train.profiler import parse_window
from models.heads.class_parallel import ClassHeadConfig
from models.method import MethodConfig
from models.presets import PRESETS, expand
from models.registry import METHODS

EXAMPLE = (
    "python jobs/torchrun.py --nproc-per-node 2 -m harness.train --config jobs/recipes/oclear_grocery.yaml "
    "--data.catalogue catalogues/grocery --run-dir runs/grocery"
)
# What may not change when a run resumes: with another value it would be another run.
IDENTITY = (
    *("method", "seed", "model", "head", "data.queries_per_step", "data.documents_per_step", "data.preprocess"),
    *("data.query_attributes", "data.masking"),
    *("optimizer.rows.state", "optimizer.rows.bf16_rows", "optimizer.frozen"),  # what there is state of
)
# Last parts of keys: numbers that must be above 0 wherever they stand.
POSITIVE = (
    "image_size patch_size hidden_size num_attention_heads num_layers max_length embedding_dim concept_slots fusion_heads "
    "temperature tensor_parallel timeout_minutes lr"
).split()
# The largest integers of a model by the last parts of their keys, before memory is taken for it; the others may be as
# large as a vocabulary.
LARGEST = {
    "num_layers": 1000,
    "image_size": LARGEST_IMAGE,
    "patch_size": LARGEST_IMAGE,
    "position_grid": 1024,
    "register_tokens": 1024,
}
LARGEST_OTHER = 10**7


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop.

    Args:
        steps: optimizer steps of the run.
        precision: fp32, tf32 (fp32 whose products a GPU rounds to TF32, 10 bits, on tensor cores), or bf16 (bf16 towers
            with fp32 master weights).
        margin_warmup: steps over which the margin grows from 0 to its value.
        log_every: steps between two lines of log.
        evaluate_every: steps between two evaluations; 0 evaluates at the end only.
        checkpoint_every: steps between two checkpoints; 0 saves at the end only.
        keep_checkpoints: newest checkpoints to keep.
        resume: auto continues the newest checkpoint in the run folder if there is one; never starts anew and refuses a
            used folder.
        new_phase: a resume on a catalogue that was governed anew goes on with its classes and order, as a new data
            phase; false refuses it.
        init_from: start from the towers and rows of this run folder's newest checkpoint, or of this step folder, with a
            fresh optimizer at step 0; rows follow their class keys. Or from a folder of `shelfmark import`. Without
            effect once the run has a checkpoint of its own.
        ema_decay: in [0, 1): an average of the towers' weights, average = ema_decay x average + (1 - ema_decay) x
            weights after each step, is what evaluation, export and runs that start from this one take; 0 keeps none.
        profile_steps: FIRST:LAST, 0-based: torch's profiler records these steps into the run's TensorBoard folder;
            empty records none.
        stop_at: stop, with a checkpoint, once this many steps are done; 0 runs all. For trying out a resume.
    """

    steps: int = 1000
    precision: str = "fp32"
    margin_warmup: int = 0
    log_every: int = 10
    evaluate_every: int = 0
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    resume: str = "auto"
    new_phase: bool = False
    init_from: Path | None = None
    ema_decay: float = 0.0
    profile_steps: str = ""
    stop_at: int = 0

    def errors(self) -> list[str]:
        """Errors for values out of range; each names its key."""
        errors = []
        if self.precision not in PRECISIONS:
            errors.append(f"train.precision is '{self.precision}'; it can be {', '.join(PRECISIONS)}")
        if self.resume not in ("auto", "never"):
            errors.append(f"train.resume is '{self.resume}'; it can be 'auto' or 'never'")
        if self.init_from is not None and not self.init_from.is_dir():
            errors.append(f"train.init_from {self.init_from} is no folder")
        if not 0 <= self.ema_decay < 1:
            errors.append(f"train.ema_decay is {self.ema_decay}; it must lie in [0, 1)")
        if self.steps < 1 or self.log_every < 1 or self.keep_checkpoints < 1:
            errors.append("train.steps, train.log_every and train.keep_checkpoints must be at least 1")
        return errors


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that makes a run. `model` is the configuration that models.registry.METHODS[method] names."""

    run_dir: Path
    method: str
    seed: int
    model: MethodConfig
    head: ClassHeadConfig
    data: DataConfig
    mesh: MeshConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    evaluation: EvaluationConfig

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, ready for YAML or JSON; keys without value are left out, as in a recipe."""
        set_values = asdict(self, dict_factory=lambda pairs: {key: value for key, value in pairs if value is not None})
        return json.loads(json.dumps(set_values, default=str))


def parser(method: str) -> Parser:
    """The parser of a run of `method`."""
    p = Parser(
        "harness.train",
        "Train a retrieval model by a recipe; every key can be overridden, as --train.steps 200.",
        EXAMPLE,
    )
    p.add_argument("--config", type=Path, help="YAML recipe")
    p.add_argument("--run_dir", type=Path, default=Path("runs/run"), help="run folder: log, TensorBoard, checkpoints")
    p.add_argument("--json", type=Path | None, default=None, help="file for the final figures")
    p.add_argument("--method", type=str, default=method, help=f"one of {', '.join(METHODS)}")
    p.add_argument("--seed", type=int, default=0, help="seed of weights, order, augmentation and dropout, below 2**63")
    for section, kind in _sections(method).items():
        p.add_class_arguments(kind, section)
    return p


def _every_key() -> set[str]:
    return {key for name in METHODS for key in parser(name).get_defaults().keys()}


def _parser_of(recipe: Mapping[str, Any]) -> Parser:
    """The parser of the method that `recipe` names."""
    method = str(recipe.get("method", next(iter(METHODS))))
    if method not in METHODS:
        raise UserError(f"method is '{method}'", f"It can be {', '.join(METHODS)}")
    return parser(method)


def _sections(method: str) -> dict[str, type]:
    return {
        "model": METHODS[method].config,
        "head": ClassHeadConfig,
        "data": DataConfig,
        "mesh": MeshConfig,
        "optimizer": OptimizerConfig,
        "train": TrainConfig,
        "evaluation": EvaluationConfig,
    }


def parse(argv: list[str], world: int | None = None) -> tuple[RunConfig, Path | None]:
    """The checked configuration of a command line for `world` ranks (by default those of the launcher), and its --json
    file.

    Raises:
        UserError: unknown keys (with the nearest one), values out of range, paths that do not exist, a layout that does
            not divide.
    """
    values = parsed(argv)
    config = build(values)
    check(config, world or int(os.environ.get("WORLD_SIZE", "1")))
    return config, values.json


def parsed(argv: list[str], more: type | None = None, prog: str = "", example: str = "") -> jsonargparse.Namespace:
    """The values of a command line, unchecked, for `build`; the fields of `more` are options too, of the command
    `prog`.

    Raises:
        UserError: unknown keys (with the nearest one), values of another type.
    """
    recipe: dict[str, Any] = {}
    if path := _given(argv, "--config"):
        recipe = read_recipe(Path(path), _every_key())
    if method := _given(argv, "--method"):
        recipe["method"] = method
    recipe = _with_presets(recipe, argv)
    p = _parser_of(recipe)
    if more is not None:
        p.prog, p.description, p.epilog = prog, str(more.__doc__).partition("\n")[0], f"example: {example}"
        p.add_class_arguments(more)
    return p.parse(argv, recipe)


def _given(argv: list[str], option: str) -> str:
    """The value of an option that must be known before there is a parser; empty if it is not there."""
    found = ""
    for i, arg in enumerate(argv):
        if arg == option and i + 1 < len(argv):
            found = argv[i + 1]
        elif arg.startswith(f"{option}="):
            found = arg.split("=", 1)[1]
    return found


def _with_presets(recipe: Mapping[str, Any], argv: list[str]) -> dict[str, Any]:
    """The recipe in dotted keys, with the fields of the towers' presets where it gives none of its own."""
    flat = dict(leaves(recipe))
    for tower in PRESETS:
        key = f"model.{tower}.preset"
        name = _given(argv, f"--{key}") or str(flat.get(key, ""))
        if not name:
            continue
        try:
            filled = expand(tower, {"preset": name})
        except ValueError as error:
            raise UserError(str(error)) from error
        flat = {**{f"model.{tower}.{field}": value for field, value in filled.items()}, **flat, key: name}
    return flat


def load(run: Path) -> RunConfig:
    """The configuration that a run folder holds.

    Raises:
        UserError: no such run, or one whose configuration this version does not read.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(
            f"{run} is no run folder: it has no config.yaml", "Name the folder that was --run-dir in training"
        )
    saved = read_recipe(file, _every_key())
    config = replace(build(_parser_of(saved).parse([], saved)), run_dir=run)
    _check_numbers(config)
    return config


def check(config: RunConfig, world: int) -> None:
    """Raises one UserError for the first thing that does not fit together."""
    _check_numbers(config)  # before the parts' own checks, which divide by these
    errors = config.model.errors(config.mesh.tensor_parallel) + config.head.errors("head")
    errors += config.data.errors() + config.train.errors() + config.evaluation.errors(config.method)
    errors += config.optimizer.errors("optimizer")
    parse_window(config.train.profile_steps)
    if config.data.preprocess.image_size != config.model.vision.image_size:
        errors.append(
            f"data.preprocess.image_size {config.data.preprocess.image_size} differs from "
            f"model.vision.image_size {config.model.vision.image_size}"
        )
    if errors:
        raise UserError(errors[0], f"(and {len(errors) - 1} more)" if len(errors) > 1 else "")
    check_layout(config.mesh, world)


def _check_numbers(config: RunConfig) -> None:
    for key, value in leaves(config.to_dict()):
        name = key.rsplit(".", 1)[-1]
        if name in POSITIVE and value <= 0 and not key.startswith("head."):  # there 0 takes the model's
            raise UserError(f"{key} is {value}", "It must be above 0")
        if isinstance(value, int | float) and value < 0:
            raise UserError(f"{key} is {value}", "It must not be negative")
        most = LARGEST.get(name, LARGEST_OTHER) if key.startswith("model.") else math.inf
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and number > most:
                raise UserError(f"{key} is {number}", f"It must be at most {most:,}")


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ: key -> (old, new)."""
    a, b = dict(leaves(old)), dict(leaves(new))
    return {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}


def identity_changes(changes: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Those keys of a difference that make it another run; a key that was unknown then had its default's meaning."""
    known = [key for key, (old, _) in changes.items() if old is not None]
    return [key for key in known if any(key == part or key.startswith(f"{part}.") for part in IDENTITY)]


def build(values: jsonargparse.Namespace) -> RunConfig:
    """The configuration that `values` are, unchecked."""
    sections = {name: getattr(values, name) for name in _sections(values.method)}
    return RunConfig(run_dir=values.run_dir, method=values.method, seed=values.seed, **sections)
