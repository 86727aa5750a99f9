"""Stages of a run: stretches of steps, each with an objective, rates, frozen parts and an image size of its own.

The stage of a step is a function of the step, so that a resume needs nothing beside the step. What a stage does not set
is the run's own: its objective and image size, and its schedules, which go on over all steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import yaml

from harness.core.cli import nearest
from harness.core.errors import UserError
from harness.data.loader import Stretch
from harness.train.schedule import learning_rate, margin_part
from models.method import MethodConfig
from models.plain_values import from_plain, shown
from models.ranges import NonNegativeFloat, NonNegativeInt, Pixels, PositiveFloat, PositiveInt
from models.registry import METHODS

if TYPE_CHECKING:
    from harness.train.config import RunConfig

OBJECTIVE = ("objective", "contrast_weight")  # fields of the model's configuration that a stage may change
Rows = Literal["kept", "random", "class_mean"]


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A stage of train.stages.

    Args:
        steps: of the stage.
        objective: as model.objective.
        contrast_weight: as model.contrast_weight.
        rows: of the class head at the stage's beginning: kept, random (again), or class_mean (the direction of the
            mean embedding of the class's first samples). Other than kept, their optimizer state is fresh.
        margin_warmup: as train.margin_warmup, from the stage's first step on.
        lr: peak of the stage's own schedule: linear warm-up, then cosine to lr x optimizer.min_lr_factor at its end.
        warmup_steps: of the stage's own schedule.
        frozen: parts of the towers that are not trained in this stage, as in optimizer.frozen. Where they differ from
            those of the stage before, the towers' optimizer state is fresh.
        image_size: side of the images in training in pixels; evaluation has data.preprocess.image_size.
    """

    steps: PositiveInt
    objective: Literal["classification", "contrastive"] | None = None
    contrast_weight: NonNegativeFloat | None = None
    rows: Rows = "kept"
    margin_warmup: NonNegativeInt | None = None
    lr: PositiveFloat | None = None
    warmup_steps: NonNegativeInt | None = None
    frozen: tuple[str, ...] = ()
    image_size: Pixels | None = None

    @property
    def objective_changes(self) -> dict[str, Any]:
        """Those fields of the model's configuration that the stage sets."""
        return {name: value for name in OBJECTIVE if (value := getattr(self, name)) is not None}


class Stages(tuple[StageConfig, ...]):
    """The value of train.stages."""

    @classmethod
    def of(cls, given: Any) -> Stages:
        """The stages that a recipe or the command line gives.

        Raises:
            UserError: no such list; the message names the stage, its key and the value.
        """
        try:
            values = yaml.safe_load(given) if isinstance(given, str) else given
        except yaml.YAMLError as error:
            raise UserError(f"train.stages is {shown(given)}, not a list of stages") from error
        if not isinstance(values, list | tuple):
            raise UserError(f"train.stages is {shown(values)}, not a list of stages", "As [{steps: 100}, {steps: 200}]")
        return cls(_stage(value, f"train.stages[{number}]") for number, value in enumerate(values))


def _stage(value: Any, where: str) -> StageConfig:
    """The stage that is `value` in a recipe."""
    if isinstance(value, StageConfig):
        return value
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is {shown(value)}, not a mapping of keys to values")
    known = [field.name for field in fields(StageConfig)]
    if unknown := [str(key) for key in value if key not in known]:
        raise UserError(f"{where}: unknown key '{unknown[0]}'", nearest(unknown[0], known))
    if "steps" not in value:
        raise UserError(f"{where} has no steps")
    # YAML takes 1e-3 for a text
    plain = {key: _number(x) if key in ("lr", "contrast_weight") else x for key, x in value.items()}
    try:
        return from_plain(StageConfig, plain, where)
    except ValueError as error:
        raise UserError(str(error)) from error


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


@dataclass(frozen=True)
class Stage:
    """A stage in its place: steps first .. end - 1 of a run. A run without train.stages has one.

    Args:
        number: from 1.
        first: its first step.
        end: step behind its last.
        settings: None without train.stages.
        config: the run's, with the objective and data.preprocess of this stage.
        renews: whether other parts are frozen than in the stage before.
    """

    number: int
    first: int
    end: int
    settings: StageConfig | None
    config: RunConfig
    renews: bool = False

    def learning_rate(self, step: int) -> float:
        """Learning rate of update `step` (0-based) of the run."""
        own, optimizer = self.settings, self.config.optimizer
        if own is None or (own.lr, own.warmup_steps) == (None, None):
            return learning_rate(optimizer, step, self.config.train.steps)
        warmup = optimizer.warmup_steps if own.warmup_steps is None else own.warmup_steps
        changed = replace(optimizer, lr=own.lr or optimizer.lr, warmup_steps=warmup)
        return learning_rate(changed, step - self.first, own.steps)

    def margin_part(self, step: int) -> float:
        """Share of the margin at update `step` (0-based) of the run."""
        own, train = self.settings, self.config.train
        if own is None or own.margin_warmup is None:
            return margin_part(train.margin_schedule, train.margin_warmup, step)
        return margin_part(train.margin_schedule, own.margin_warmup, step - self.first)

    @property
    def margin_until(self) -> int:
        """Step from which on the margin has its value."""
        own = self.settings
        warmup = None if own is None else own.margin_warmup
        return self.config.train.margin_warmup if warmup is None else self.first + warmup

    @property
    def classifies(self) -> bool:
        """True where it trains the class rows."""
        return METHODS[self.config.method].classifies(self.config.model)

    def __str__(self) -> str:
        """Its steps, and what it sets, in one line."""
        values = {f.name: getattr(self.settings, f.name) for f in fields(StageConfig) if f.name != "steps"}
        unset = {"rows": "kept", "frozen": ()}
        told = [f"{key} {value}" for key, value in values.items() if value is not None and value != unset.get(key)]
        return f"steps {self.first:,} to {self.end:,}{''.join(f', {text}' for text in told)}"


def stages_of(config: RunConfig) -> list[Stage]:
    """The stages of a run, in order."""
    if not config.train.stages:
        return [Stage(1, 0, config.train.steps, None, config)]
    found: list[Stage] = []
    first = 0
    frozen: tuple[str, ...] = ()
    for number, settings in enumerate(config.train.stages, 1):
        stage = Stage(
            number, first, first + settings.steps, settings, _as_in(config, settings), settings.frozen != frozen
        )
        found.append(stage)
        first, frozen = stage.end, settings.frozen
    return found


def _as_in(config: RunConfig, settings: StageConfig) -> RunConfig:
    """The run's configuration with what `settings` change of it, as far as the method has such fields."""
    known = {field.name for field in fields(config.model)}
    changes = {name: value for name, value in settings.objective_changes.items() if name in known}
    size = settings.image_size or config.data.preprocess.image_size
    data = replace(config.data, preprocess=replace(config.data.preprocess, image_size=size))
    return replace(config, model=replace(config.model, **changes), data=data)


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage of update `step` (0-based); behind the last step the last one."""
    return next(stage for stage in reversed(stages) if stage.first <= step)


def begun(settings: Sequence[StageConfig], step: int) -> list[tuple[int, StageConfig]]:
    """Stages of train.stages that the run has begun in its first `step` steps: (first step, settings but for steps).

    A run without stages has one that sets nothing.
    """
    found, first = [], 0
    for stage in settings or [StageConfig(steps=max(1, step))]:
        if first < step:
            found.append((first, replace(stage, steps=1)))
        first += stage.steps
    return found


def stretches(stages: Sequence[Stage]) -> list[Stretch]:
    """Content and image size of each stage, for the loader."""
    return [
        Stretch(s.first, METHODS[s.config.method].reads(s.config.model), s.config.data.preprocess.image_size)
        for s in stages
    ]


def trained_model(stages: Sequence[Stage]) -> MethodConfig:
    """The model's configuration by which a run is built: one with class rows, if any stage has them."""
    return next((stage for stage in stages if stage.classifies), stages[0]).config.model


def stage_errors(config: RunConfig) -> list[str]:
    """Errors of train.stages that need the rest of the recipe; each names its key."""
    errors: list[str] = []
    if not config.train.stages:
        return errors
    total = sum(stage.steps for stage in config.train.stages)
    if total != config.train.steps:
        errors.append(f"train.steps is {config.train.steps}, but the steps of train.stages add up to {total}")
    spec, known = METHODS[config.method], {field.name for field in fields(config.model)}
    for stage in stages_of(config):
        own, where = stage.settings, f"train.stages[{stage.number - 1}]"
        assert own is not None, "train.stages is set"
        for name in own.objective_changes:
            if name not in known:
                errors.append(f"{where}.{name} is set, but the method {config.method} has no model.{name}")
        for name, unset in (("rows", "kept"), ("margin_warmup", None)):
            if getattr(own, name) != unset and not stage.classifies:
                errors.append(f"{where}.{name} is {getattr(own, name)}, but this stage trains no class rows")
        if own.image_size is not None:
            patch = config.model.vision.patch_size
            if own.image_size % patch:
                errors.append(
                    f"{where}.image_size {own.image_size} is not a multiple of model.vision.patch_size {patch}"
                )
            if spec.reads(config.model).num_patches:
                errors.append(f"{where}.image_size is set, but masked patches want model.vision.image_size throughout")
    return errors
