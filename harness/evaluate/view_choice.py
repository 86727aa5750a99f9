"""Views of a run's documents (image and text, image alone, ...) beside each other: Recall@1, the best one, and what
export says of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.core.errors import UserError
from harness.evaluate.evaluation import EvaluationConfig

Recalls = dict[str, dict[str, float]]


def recalls_by_view(figures: Mapping[str, Any], config: EvaluationConfig, method: str) -> Recalls:
    """Recall@1 of a run's evaluation, that of its first task: view -> of all products, and of those never trained on,
    as far as every view has it.

    Args:
        figures: content of the run's eval-STEP.json; empty without an evaluation.
        config: of that evaluation; the view that it names first is the first here too.
        method: the method's name.
    """
    first, metric = config.asked(method)[0], "recall_at_1"
    beside = [key.split("/")[1] for key in figures if key.startswith(f"{first}/") and key.endswith(f"/{metric}")]
    tasks = {config.views[0]: "", **{view: f"{first}/{view}" for view in beside if view != metric}}
    rows = [row for row in figures.get("slices", []) if (row["slice"], row["value"]) == ("class", "never trained")]
    new = {row.get("task", ""): row[metric] for row in rows}
    kinds: dict[str, dict[str, Any]] = {
        "all products": {view: figures.get(f"{task}/{metric}".lstrip("/")) for view, task in tasks.items()},
        "products never trained on": {view: new.get(task) for view, task in tasks.items()},
    }
    named = [name for name, recalls in kinds.items() if None not in recalls.values()]  # None: no query has an answer
    return {view: {name: kinds[name][view] for name in named} for view in tasks}


def best_view(recalls: Recalls, checkpoint: str) -> str:
    """The view with the highest mean of its Recall@1; the first of equals.

    Raises:
        UserError: there was no evaluation, or it found no answer to any query.
    """
    if not any(recalls.values()):
        raise UserError(
            f"--view best: training did not evaluate {checkpoint}",
            "Name a view, or a --checkpoint that was evaluated (train.evaluate_every)",
        )
    return max(recalls, key=lambda view: sum(recalls[view].values()))


def remark(recalls: Recalls, asked: str, view: str, split: str) -> list[str]:
    """The line of Recall@1 by view, where the best one was looked for (`asked` is best) or another one finds more than
    image and text; none otherwise.
    """
    own = recalls.get(view, {})
    better = [other for other in recalls if any(recalls[other][name] > own[name] for name in own)]
    if asked != "best" and not (asked == "both" and better):
        return []
    told = (f"{name} {' and '.join(f'{found[name]:.3f}' for found in recalls.values())}" for name in own)
    chosen = f"exported as {view}" if asked == "best" else f"--view {better[0]} exports that"
    return [f"{split} recall@1 of documents seen as {' and as '.join(recalls)}: {', '.join(told)}. {chosen}"]
