"""Start and end of a run in words: what is trained, on what, for how long, where it is saved; and what came out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.core.mesh import Mesh
from harness.core.tables import format_table
from harness.data.loader import StepLoader
from harness.train.config import RunConfig, TrainConfig
from harness.train.stages import stages_of
from harness.train.tensorboard import facts
from models.method import Method

KINDS = {"query": "photos", "document": "documents"}
SPEED = ("steps", "loss", "seconds", "images_per_second")  # of the final figures; all others are the evaluation's


def introduction(config: RunConfig, mesh: Mesh, loader: StepLoader, method: Method, step: int) -> list[str]:
    """Lines for the log of a run that starts, or goes on, at `step`."""
    train, order = config.train, loader.order
    known = facts(mesh, loader.catalogue, method, order.num_classes, config.model.embedding_dim)
    data, size = known["Catalogue"], known["Size"]
    stages, per_step = stages_of(config), {}
    totals = dict.fromkeys(KINDS, 0)
    for stage in stages:
        counts = dict(zip(KINDS, loader.samples(stage.first), strict=True))
        per_step[stage.number] = " and ".join(f"{count:,} {KINDS[kind]}" for kind, count in counts.items() if count)
        totals = {kind: total + counts[kind] * (stage.end - stage.first) for kind, total in totals.items()}
    if len(set(per_step.values())) > 1:
        per_step = {number: f"{text} in stage {number}" for number, text in per_step.items()}
    epochs = [
        f"{total / slots:,.1f} of {slots:,} {KINDS[kind]}"
        for kind, total in totals.items()
        if total and (slots := order.slots(kind))
    ]
    size_of_data = f"{data['queries']:,} photos, {data['documents']:,} documents, {data['classes']:,} classes"
    lines = {
        "run": f"{config.run_dir}, {config.method}, step {step:,} to {train.steps:,}",
        "catalogue": f"{data['folder']}: {size_of_data}; splits {data['in splits']}",
        "model": f"{size['parameters of the towers']} parameters in the towers, "
        f"{size['parameters of the class rows']} in the class rows",
        "layout": size["ranks"],
        "a step": ", ".join(dict.fromkeys(per_step.values())),
        "epochs": ", ".join(epochs),
        "checkpoints": _checkpoints(train, config.run_dir, step),
        "evaluation": f"on split {config.evaluation.split}, {_every(train.evaluate_every, step, train.steps)}",
    }
    if train.stages:
        lines |= {f"stage {stage.number}": str(stage) for stage in stages}
    for stage in stages:
        if stage.classifies and step < (until := stage.margin_until) and train.margin_schedule != "constant":
            lines["margin"] = (
                f"grows to {list(config.head.margin)} until step {until:,}; until then the loss may rise, "
                "because the same embeddings are judged more strictly"
            )
    return [f"{name:<12}{text}" for name, text in lines.items()]


def _checkpoints(train: TrainConfig, run_dir: Path, step: int) -> str:
    clock = f"every {train.checkpoint_minutes:g} minutes, and " if train.checkpoint_minutes else ""
    kept = [f"the newest {train.keep_checkpoints}"]
    if train.keep_every:
        kept.append(f"one in {train.keep_every:,} steps")
    if train.keep_best:
        kept.append(f"the best by {train.keep_best}")
    when = _every(train.checkpoint_every or train.keep_every, step, train.steps)
    return f"in {run_dir}/checkpoints, {clock}{when}; kept are {', '.join(kept)}"


def _every(every: int, step: int, last: int) -> str:
    """Steps of something that is done every so many, and at the last."""
    if not every:
        return f"at step {last:,}, the last"
    return f"every {every:,} steps, next at step {min(last, step - step % every + every):,}"


def closing(run_dir: Path, split: str, figures: Mapping[str, Any]) -> str:
    """The final figures of a run: a line on the training, and a table of those of its evaluation on `split`."""
    shown = {name: value for name, value in figures.items() if value is not None and name != "slices"}
    plain = {name: round(shown[name], 4) for name in SPEED if name in shown}
    lines = [f"run {run_dir}: " + ", ".join(f"{name} {value}" for name, value in plain.items())]
    if found := [{f"on split {split}": name, "": value} for name, value in shown.items() if name not in SPEED]:
        more = [f"next: shelfmark eval {run_dir} --split test", f"      shelfmark export {run_dir} --out ARTEFACT"]
        lines += ["", format_table(found), "", *more]
    return "\n".join(lines)
