"""A run's configuration: one YAML recipe, dotted overrides, frozen dataclasses; checked before any process group
starts.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jsonargparse
from jsonargparse.typing import register_type

from harness.core.cli import Parser, leaves, read_recipe
from harness.core.errors import UserError
from harness.core.mesh import MeshConfig, check_layout
from harness.data.config import DataConfig
from harness.evaluate.evaluation import EvaluationConfig
from harness.train.loggers import missing
from harness.train.profiler import parse_window
from harness.train.schedule import OptimizerConfig
from harness.train.stages import Stages, stage_errors
from models.heads.class_parallel import ClassHeadConfig
from models.method import MethodConfig
from models.presets import PRESETS, expand
from models.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, UnitIntervalBelow1
from models.registry import METHODS

EXAMPLE = (
    "python jobs/torchrun.py --nproc-per-node 2 -m harness.train --config jobs/recipes/oclear_small.yaml "
    "--data.catalogue catalogues/products --run-dir runs/products"
)
# What may not change when a run resumes: with another value it would be another run.
IDENTITY = (
    *("method", "seed", "model", "head", "data.queries_per_step", "data.documents_per_step", "data.preprocess"),
    *("data.query_attributes", "data.masking"),
    *("optimizer.rows.state", "optimizer.rows.bf16_rows", "optimizer.frozen"),  # what there is state of
)
register_type(Stages, list, Stages.of)
PRESET_KEYS = {f"model.{tower}.preset": tower for tower in PRESETS}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop.

    Args:
        steps: optimizer steps of the run; with stages their sum, which may be left out.
        stages: stretches of the run with an objective, class rows, rates, frozen parts and image size of their own, in
            order (docs/recipes.md); by default one.
        precision: fp32, tf32 (fp32 whose products a GPU rounds to TF32, 10 bits, on tensor cores), or bf16 (bf16 towers
            with fp32 master weights).
        margin_schedule: growth of the margin from 0 to its value over the steps of margin_warmup: linear, or cosine
            (slow at both ends); constant is its value throughout.
        margin_warmup: steps over which the margin grows; 0 is its value throughout.
        log_every: steps between two lines of log.
        evaluate_every: steps between two evaluations; 0 evaluates at the end only.
        checkpoint_every: steps between two checkpoints; 0 saves none by the count of steps.
        checkpoint_minutes: minutes after a checkpoint until the next one; 0 saves none by the clock. A run also saves
            at its end, and when SIGTERM, SIGINT, SIGUSR1 or SIGHUP stops it.
        checkpoint_async: write checkpoints in the background, from a copy of each rank's tensors in the host's memory,
            while training goes on; at most one at a time. The last one of a run is waited for.
        checkpoint_full_disk: stop ends the run where a checkpoint cannot be written; go_on says so and trains on, until
            the last one.
        keep_checkpoints: newest checkpoints to keep.
        keep_every: also save at every multiple of this many steps, and keep these checkpoints; 0 keeps none of them.
        keep_best: figure of the evaluation (map, recall_at_1, photo/map, …): also save at every evaluation, and keep
            the checkpoint where it was highest, which `--checkpoint best` names; empty keeps none.
        early_stop: end the run after this many evaluations in a row that did not raise the figure of keep_best; 0
            trains to the last step. Wants evaluate_every.
        nonfinite: stop ends the run where a loss or gradient norm is not finite; skip leaves the step out, without an
            update, and names its samples in the run folder.
        skip_budget: steps that a process may leave out before it stops all the same.
        resume: auto continues the newest checkpoint in the run folder if there is one; never starts from scratch and
            refuses a used folder.
        new_phase: a resume on a catalogue that was governed again continues with its classes and order, as a new data
            phase; false refuses it.
        init_from: start from the towers and rows of this run folder's newest checkpoint, or of this step folder, with a
            fresh optimizer at step 0; rows follow their class keys. Or from a folder of `shelfmark import`. Without
            effect once the run has a checkpoint of its own.
        init_projection: layers behind the image tower of a folder of `shelfmark import`: random, or principal, at the
            principal directions of its vectors of the first steps' images, so that the run starts from what the tower
            finds.
        ema_decay: in [0, 1): an average of the towers' weights, average = ema_decay x average + (1 - ema_decay) x
            weights after each step, is what evaluation, export and runs that start from this one take; 0 keeps none.
        loggers: wandb, mlflow: Weights & Biases, MLflow beside TensorBoard, each where its package is installed.
        profile_steps: FIRST:LAST, 0-based: torch's profiler records these steps into the run's TensorBoard folder;
            empty records none.
        stop_at: stop, with a checkpoint, once this many steps are done; 0 runs all. For trying out a resume.
    """

    steps: PositiveInt = 1000
    stages: Stages = field(default_factory=Stages)
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    margin_schedule: Literal["constant", "linear", "cosine"] = "linear"
    margin_warmup: NonNegativeInt = 0
    log_every: PositiveInt = 10
    evaluate_every: NonNegativeInt = 0
    checkpoint_every: NonNegativeInt = 0
    checkpoint_minutes: NonNegativeFloat = 15.0
    checkpoint_async: bool = False
    checkpoint_full_disk: Literal["stop", "go_on"] = "stop"
    keep_checkpoints: PositiveInt = 2
    keep_every: NonNegativeInt = 0
    keep_best: str = ""
    early_stop: NonNegativeInt = 0
    nonfinite: Literal["stop", "skip"] = "stop"
    skip_budget: NonNegativeInt = 10
    resume: Literal["auto", "never"] = "auto"
    new_phase: bool = False
    init_from: Path | None = None
    init_projection: Literal["random", "principal"] = "random"
    ema_decay: UnitIntervalBelow1 = 0.0
    loggers: tuple[Literal["wandb", "mlflow"], ...] = ()
    profile_steps: str = ""
    stop_at: NonNegativeInt = 0

    def errors(self) -> list[str]:
        """Errors for folders and packages that do not exist, and for keys that need others; each names its key."""
        lost = self.init_from is not None and not self.init_from.is_dir()
        errors = [f"train.init_from {self.init_from} is not a folder"] if lost else []
        if self.early_stop and not (self.keep_best and self.evaluate_every):
            errors.append(
                f"train.early_stop {self.early_stop} wants train.keep_best, the figure, and train.evaluate_every"
            )
        return [*errors, *missing(self.loggers)]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that makes a run. `model` is the configuration that models.registry.METHODS[method] names."""

    run_dir: Path
    method: str
    seed: NonNegativeInt
    model: MethodConfig
    head: ClassHeadConfig
    data: DataConfig
    mesh: MeshConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    evaluation: EvaluationConfig

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, ready for YAML or JSON; keys without value are left out, as in a recipe."""
        unset = {"stages": ()}  # no part of a run without them
        set_values = asdict(
            self,
            dict_factory=lambda pairs: {k: value for k, value in pairs if value is not None and value != unset.get(k)},
        )
        return json.loads(json.dumps(set_values, default=str))


def parser(method: str) -> Parser:
    """The parser of a run of `method`."""
    p = Parser(
        "shelfmark train",
        "Train a retrieval model by a recipe; every key can be overridden, as --train.steps 200.",
        EXAMPLE,
    )
    p.add_argument("--config", type=Path, help="YAML recipe")
    p.add_argument("--run_dir", type=Path, default=Path("runs/run"), help="run folder: log, TensorBoard, checkpoints")
    p.add_argument("--json", type=Path | None, default=None, help="file for the final figures")
    p.add_argument("--method", type=str, default=method, help=f"one of {', '.join(METHODS)}")
    p.add_argument(
        "--seed", type=NonNegativeInt, default=0, help="seed of weights, order, augmentation and dropout, below 2**63"
    )
    for section, kind in _sections(method).items():
        p.add_class_arguments(kind, section)
    return p


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
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # what decides on the parser's keys
    for name in ("config", "method", "train.steps", "train.stages", *PRESET_KEYS):
        first.add_argument(f"--{name}", nargs="?", default="")
    given = vars(first.parse_known_args(argv)[0])
    recipe = read_recipe(Path(given["config"])) if given["config"] else {}
    if given["method"]:
        recipe["method"] = given["method"]
    recipe = _with_steps(_with_presets(recipe, given), given)
    p = _parser_of(recipe)
    if more is not None:
        p.prog, p.description, p.epilog = prog, str(more.__doc__).partition("\n")[0], f"example: {example}"
        p.add_class_arguments(more)
    return p.parse(argv, recipe, f"recipe {given['config']}")


def _with_presets(recipe: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, Any]:
    """The recipe in dotted keys, with the fields of the towers' presets where it gives none of its own; a preset that
    is `given` on the command line counts before the recipe's.
    """
    flat = dict(leaves(recipe))
    for key, tower in PRESET_KEYS.items():
        name = given[key] or str(flat.get(key, ""))
        if not name:
            continue
        try:
            filled = expand(tower, {"preset": name})
        except ValueError as error:
            raise UserError(str(error)) from error
        flat = {**{f"model.{tower}.{field}": value for field, value in filled.items()}, **flat, key: name}
    return flat


def _with_steps(flat: dict[str, Any], given: Mapping[str, str]) -> dict[str, Any]:
    """The recipe in dotted keys, with the sum of its stages as train.steps where neither it nor what is `given` on the
    command line has that.
    """
    stages = given["train.stages"] or flat.get("train.stages")
    if not stages or given["train.steps"] or "train.steps" in flat:
        return flat
    return {**flat, "train.steps": sum(stage.steps for stage in Stages.of(stages))}


def load(run: Path) -> RunConfig:
    """The configuration that a run folder holds.

    Raises:
        UserError: no such run, or one whose configuration this version does not read.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(
            f"{run} is not a run folder: it has no config.yaml", "Name the folder that was --run-dir in training"
        )
    saved = read_recipe(file)
    return replace(build(_parser_of(saved).parse([], saved, f"recipe {file}")), run_dir=run)


def check(config: RunConfig, world: int) -> None:
    """Raises one UserError for the first thing that does not fit together."""
    errors = config.model.errors(config.mesh.tensor_parallel) + config.data.errors() + config.train.errors()
    errors += config.evaluation.errors(config.method)
    errors += config.optimizer.errors("optimizer") + stage_errors(config)
    parse_window(config.train.profile_steps)
    if config.data.preprocess.image_size != config.model.vision.image_size:
        errors.append(
            f"data.preprocess.image_size {config.data.preprocess.image_size} differs from "
            f"model.vision.image_size {config.model.vision.image_size}"
        )
    if errors:
        raise UserError(errors[0], f"(and {len(errors) - 1} more)" if len(errors) > 1 else "")
    check_layout(config.mesh, world)


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
