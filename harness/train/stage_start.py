"""Beginning of a stage: its objective, its frozen parts, the rows of the class head."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from harness.core.mesh import Mesh
from harness.data.loader import StepLoader
from harness.train.class_rows import start_at_class_means, start_at_random
from harness.train.optimizer import TowerOptimizer
from harness.train.stages import OBJECTIVE, Stage
from models.heads.row_optimizer import RowAdamW
from models.method import Method


def require_parts(stages: Sequence[Stage], towers: TowerOptimizer) -> None:
    """Raises UserError where a stage freezes what the towers do not have, or all of them."""
    for stage in stages:
        if stage.settings is not None:
            towers.hold(stage.settings.frozen, _key(stage))
            towers.hold((), _key(stage))


def begin(
    stage: Stage,
    step: int,
    method: Method,
    towers: TowerOptimizer,
    rows: RowAdamW | None,
    loader: StepLoader,
    mesh: Mesh,
    say: Callable[[str], None],
) -> None:
    """Begins `stage`, or goes on with it where `step` is behind its first; collective.

    Rows and optimizer states change at the first step only: a checkpoint of that step holds them as they were, any
    later one as they became.

    Args:
        stage: with settings.
        step: finished steps.
        method: its objective changes.
        towers: some of their parts are held.
        rows: of the method's head, if it has one.
        loader: of the samples whose embeddings rows start from.
        mesh: the ranks.
        say: takes lines for the log.
    """
    own, first = stage.settings, step == stage.first
    assert own is not None, "a run without train.stages has nothing to begin"
    say(f"stage {stage.number} {'begins' if first else 'goes on'}: {stage}")
    method.change_objective(
        **{key: getattr(stage.config.model, key) for key in OBJECTIVE if hasattr(method.config, key)}
    )
    towers.hold(own.frozen, _key(stage))
    if first and stage.renews:
        towers.forget()
    if first and own.rows != "kept":
        assert method.head is not None and rows is not None, "train.stages was checked"
        if own.rows == "random":
            start_at_random(method.head, rows)
        else:
            found = start_at_class_means(method, rows, loader, step, stage.config.evaluation.batch_size, mesh)
            say(f"rows at the means of their classes: {found:,} of {method.head.config.num_classes:,}")


def _key(stage: Stage) -> str:
    return f"train.stages[{stage.number - 1}].frozen"
