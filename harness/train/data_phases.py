"""Data phases of a run: resuming on a grown catalogue, starting from another run's weights, and checks of what must
stay equal.

A phase is a stretch of steps on one order of the samples. Its positions start at 0, so that a step's samples are a
function of the order and of the steps since the phase began.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from harness.core.errors import UserError
from harness.core.mesh import Mesh
from harness.core.waiting import on_first_rank
from harness.data.order import ClassOrder
from harness.train import checkpoint
from harness.train.class_map import ClassMap
from harness.train.config import RunConfig, difference
from harness.train.open_run import find_checkpoint
from models.fields import training_only


@dataclass(frozen=True)
class Phase:
    """Steps from first_step on, in the order `order_id` of num_classes classes: kept from before, new, and dropped ones
    of before.
    """

    first_step: int
    order_id: str
    num_classes: int
    kept: int
    new: int
    dropped: int

    def __str__(self) -> str:
        """One line for the log."""
        change = f"{self.kept:,} kept, {self.new:,} new, {self.dropped:,} dropped"
        return f"from step {self.first_step} on in order {self.order_id} of {self.num_classes:,} classes ({change})"


def begin(step: int, order: ClassOrder, classes: ClassMap | None) -> Phase:
    """The phase that begins at `step`; `classes` is None where the classes are those of before."""
    if classes is None:
        return Phase(step, order.order_id, order.num_classes, order.num_classes, 0, 0)
    return Phase(step, order.order_id, order.num_classes, classes.kept, classes.new, classes.dropped)


def first(order: ClassOrder) -> Phase:
    """That of a run that starts from nothing."""
    return Phase(0, order.order_id, order.num_classes, 0, order.num_classes, 0)


def saved(path: Path, state: dict[str, Any]) -> list[Phase]:
    """The phases of checkpoint `path`, whose state.json is `state`; one saved before there were phases has one.

    Raises:
        UserError: they are none.
    """
    if "phases" in state:
        try:
            first, *more = (Phase(**phase) for phase in state["phases"])
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}/state.json is damaged (phases)", "Name another checkpoint") from error
        return [first, *more]
    classes = pq.read_metadata(path / "classes.parquet").num_rows
    return [Phase(0, state["order_id"], classes, 0, classes, 0)]


def as_state(phases: list[Phase]) -> list[dict[str, Any]]:
    """Phases for state.json, as `saved` reads them."""
    return [asdict(phase) for phase in phases]


def another_order(config: RunConfig, trained: Phase, order: ClassOrder) -> UserError:
    """The error where a run would go on in another order without having been told so."""
    same = " with other class keys" if trained.order_id == order.order_id else ""
    return UserError(
        f"{config.run_dir} was trained on order {trained.order_id}, {config.data.catalogue} has {order.order_id}{same}: "
        "the catalogue was governed anew since",
        "Add --train.new-phase true to go on with its classes (rows follow their class keys), restore its classes/, or choose "
        "another --run-dir",
    )


def tokenizer_id(catalogue: Path) -> str:
    """Checksum of a catalogue's tokenizer model: token ids mean the same only under the same."""
    return json.loads((catalogue / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["xxh3"]


def require_tokenizer(path: Path, state: dict[str, Any], catalogue: Path) -> None:
    """Raises UserError where checkpoint `path` was trained on other token ids; one that does not tell passes."""
    if state.get("tokenizer", tokenizer_id(catalogue)) != tokenizer_id(catalogue):
        raise UserError(
            f"{path} was trained with another tokenizer than that of {catalogue}: its text tower would read nonsense",
            f"Keep that run's tokenizer: shelfmark tokenizer {catalogue} --keep-from {path.parent.parent}",
        )


def require_queries(path: Path, state: dict[str, Any], queries: str | None, catalogue: Path) -> None:
    """Raises UserError where checkpoint `path` was trained on other text queries than those of id `queries`; one that
    does not tell passes.
    """
    if state.get("queries", queries) != queries:
        raise UserError(
            f"{path} was trained on other queries than those of {catalogue}: `shelfmark queries` made them anew since",
            "Run it again with the options of before, or start another run from these weights: --train.init-from and another --run-dir",
        )


def open_start(config: RunConfig, mesh: Mesh) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that train.init_from names, a step folder or the newest of a run folder, and its state;
    collective.

    Raises:
        UserError: none there or none complete, towers that differ, or another tokenizer.
    """
    named = config.train.init_from
    assert named is not None, "the caller asks"

    path = named
    if on_first_rank((named / "checkpoints").is_dir, mesh, "looking for checkpoints"):
        path = find_checkpoint(named, None, mesh)
    elif problem := checkpoint.problem(named, mesh):
        raise UserError(f"train.init_from {named}: {problem}", "Name a run folder or one of its step folders")
    state = checkpoint.read_state(path)
    changes = difference(*({k: c[k] for k in ("method", "model")} for c in (state["config"], config.to_dict())))
    for key, (there, here) in changes.items():
        free = training_only(config.model, key.split(".")[1:])
        if there is not None and not free:  # a key unknown then had its default's meaning
            raise UserError(
                f"train.init_from {path} was trained with {key} = {there}, not {here}: its weights do not fit",
                f"Set {key} to {there}, or leave out train.init_from",
            )
    require_tokenizer(path, state, config.data.catalogue)
    return path, state
