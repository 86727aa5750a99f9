"""Start of a run: from its newest checkpoint, from the weights that train.init_from names, or from scratch.

A checkpoint's state.json says which run it belongs to; `Resume.state` writes it, `Resume` compares it with the present
configuration and catalogue. A run on a catalogue that has changed goes on in a new data phase: a stretch of steps on
one order of the samples, whose positions start at 0, so that a step's samples are a function of the order and of the
steps since the phase began. Class rows follow their class keys (`harness.train.class_rows`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from harness.catalogue.classes import KINDS
from harness.core.errors import UserError
from harness.core.manifest import at_first
from harness.core.mesh import Mesh
from harness.core.waiting import on_first_rank
from harness.data.loader import StepLoader
from harness.data.order import ClassOrder
from harness.train import checkpoint, checkpoint_files
from harness.train.checkpoint_rows import DamagedRows, require_rows
from harness.train.class_rows import ClassMap, class_map, keep_classes, start_at_random, start_new_rows
from harness.train.config import RunConfig, difference, identity_changes
from harness.train.imported_weights import init_towers
from harness.train.ledger import Ledger
from harness.train.open_run import find_checkpoint
from harness.train.projection import start_at_principal
from harness.train.stages import Stages, begun
from models.fields import training_only
from models.method import Method


@dataclass(frozen=True)
class Phase:
    """Data phase of a run: the steps from first_step on, in the order `order_id` of num_classes classes.

    kept, new, dropped: classes, compared with the previous phase.
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


class Resume:
    """Loads what the run starts from, into `parts`; collective.

    Args:
        config: of the run.
        mesh: the ranks.
        loader: of the present catalogue; its first_step is set.
        method: with the towers and the head of `parts`; it embeds the samples of new classes.
        parts: freshly built.
        ledger: set to that of the checkpoint.

    Attributes:
        checkpoint: that the run continues; None where it starts at step 0.
        step: finished steps.
        phases: data phases, the present one last.
        classes: the run's copy of the catalogue's classes.parquet, for its checkpoints.
        notes: lines for the log.

    Raises:
        UserError: the checkpoint is of another run (method, seed, batch, classes, queries, tokenizer, samples), or the
            weights do not fit.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        loader: StepLoader,
        method: Method,
        parts: checkpoint.Trainable,
        ledger: Ledger,
    ) -> None:
        self.config, self.mesh, self.loader = config, mesh, loader
        self.method, self.parts, self.ledger = method, parts, ledger
        self.catalogue = config.data.catalogue
        self.tokenizer_id = json.loads((self.catalogue / "tokenizer" / "tokenizer.json").read_text("utf-8"))["xxh3"]
        self.queries_id = None if loader.products is None else loader.products.meta["id"]
        folder = config.run_dir / "checkpoints"
        try:  # the class rows, most of the bytes, are hashed while they are loaded
            self._start(*checkpoint_files.newest(folder, mesh, head=False))
        except DamagedRows:
            assert parts.head is not None and parts.row_optimizer is not None, "class rows are damaged"
            start_at_random(parts.head, parts.row_optimizer)
            self._start(*checkpoint_files.newest(folder, mesh))
        keep = partial(keep_classes, self.catalogue, loader.order.order_id, config.run_dir)
        self.classes = on_first_rank(keep, mesh, "copying the classes")

    def _start(self, newest: Path | None, passed_over: list[str]) -> None:
        """Continues the run from its checkpoint `newest`, or begins it."""
        self.checkpoint, self.step, self.loader.first_step = newest, 0, 0
        self.phases: list[Phase] = []
        self.ledger.restart()
        self.notes = [f"passed over checkpoint {line}" for line in passed_over]
        if self.method.head is not None and self.loader.order.num_classes == 1:
            self.notes.append(f"{self.catalogue} has one class only: the loss falls to 0 and teaches nothing")
        if newest is not None:
            self._continue(newest)
        else:
            self.phases = [self._begin(self.config.train.init_from)]

    def state(self, step: int) -> dict[str, Any]:
        """Content of state.json after `step` finished steps; collective over dp."""
        steps = step - self.loader.first_step
        return {
            **self.ledger.state(step),
            "order_id": self.loader.order.order_id,
            "phases": [asdict(phase) for phase in self.phases],
            "positions": {kind: steps * count for kind, count in zip(KINDS, self.loader.samples(step), strict=True)},
            "tokenizer": self.tokenizer_id,
            "queries": self.queries_id,
            "config": self.config.to_dict(),
            "world_size": self.mesh.world_size,
            "tensor_parallel": self.mesh.tp.size(),
        }

    def _continue(self, path: Path) -> None:
        """Continues the run from its checkpoint `path`."""
        config, order = self.config, self.loader.order
        if config.train.resume == "never":
            raise UserError(
                f"{config.run_dir} holds checkpoints and train.resume is 'never'", "Choose another --run-dir"
            )
        # It must be the same run.
        state = checkpoint_files.read_state(path)
        self._require_queries(path, state)  # before the identity: they give the model its number of keywords
        changes = difference(state["config"], config.to_dict())
        self._require_identity(changes)
        self._require_stages(state)
        # On other classes or another order of the samples a new data phase begins, if the recipe allows it.
        self.phases = _saved_phases(path, state)
        moved, allowed = self.phases[-1].order_id != order.order_id, config.train.new_phase
        classes = None if moved and not allowed else self._compare_classes(path)
        begins = moved or classes is not None
        if begins and not allowed:
            raise self._another_order(self.phases[-1])
        self._require_tokenizer(path, state)
        self.step = state["step"]
        self.ledger.resume(state)
        if begins:
            self.phases.append(_next_phase(self.step, order, classes))
        self.loader.first_step = self.phases[-1].first_step
        if not begins:
            self.notes += self.ledger.compare(path, state, self.loader)
        if classes is not None and self._has_rows(path):  # rows that move are read tensor by tensor
            require_rows(path, self.mesh)
        # A memory bank labels its embeddings with class ids, which have another meaning in a new phase.
        self._load(path, replace(self.parts, memory=None) if begins else self.parts, classes)
        checkpoint_files.WHOLE.add(path)
        keep = checkpoint_files.Keep(config.train.keep_checkpoints, config.train.keep_every)
        checkpoint_files.tidy(path.parent, keep, path, self.mesh)
        self._note_continued(path, state, changes, begins)

    def _note_continued(
        self, path: Path, state: dict[str, Any], changes: dict[str, tuple[Any, Any]], begins: bool
    ) -> None:
        if self.parts.ema is not None and not checkpoint.has_average(path):
            self.notes.append(f"{path.name} holds no average of the weights: it starts from its weights")
        self.notes.append(f"resumed {path.name} (saved by {state['world_size']} ranks, now {self.mesh.world_size})")
        if len(self.phases) > 1:
            self.notes.append(f"data phase {len(self.phases)} {'begins' if begins else 'goes on'}: {self.phases[-1]}")
        self.notes += [f"changed since: {key} {old} -> {new}" for key, (old, new) in changes.items()]
        if self.config.train.init_from is not None:
            self.notes.append("train.init_from has no effect: the run has a checkpoint of its own")

    def _begin(self, init_from: Path | None) -> Phase:
        """Begins a run at step 0."""
        imported = init_from is not None and (init_from / "weights.json").is_file()
        if self.config.train.init_projection == "principal" and not imported:
            raise UserError(
                "train.init_projection principal needs imported weights, and train.init_from "
                + ("is not set" if init_from is None else f"{init_from} is a run"),
                "Name a folder of `shelfmark import` as train.init_from, or set train.init_projection random",
            )
        if init_from is None:
            phase = _first_phase(self.loader.order)
        elif imported:
            phase = self._from_imported(init_from)
        else:
            phase = self._from_other_run(init_from)
        if self.parts.ema is not None:
            self.parts.ema.restart()  # from the weights just loaded
        return phase

    def _from_imported(self, folder: Path) -> Phase:
        """Takes towers from a folder of `shelfmark import`."""
        init_towers(self.method.towers, folder, self.mesh.tp)
        self.notes.append(f"started from the weights in {folder}")
        if self.config.train.init_projection == "principal":
            self.notes.append(start_at_principal(self.method, self.loader, self.mesh))
        self._reload_optimizer()
        return _first_phase(self.loader.order)

    def _from_other_run(self, named: Path) -> Phase:
        """Takes towers and class rows of another run; optimizer and step are new."""
        path, state = self._open_other_run(named)
        classes = self._compare_classes(path)
        weights = replace(self.parts, tower_optimizer=None, row_optimizer=None, ema=None, memory=None)
        self._load(path, weights, classes)
        self._reload_optimizer()
        rows, head = self.parts.row_optimizer, self.parts.head
        if rows is not None and head is not None and "master" in rows.row_state():
            rows.row_state()["master"].copy_(head.rows)
        phase = _next_phase(0, self.loader.order, classes)
        average = ", the average of its weights" if checkpoint.has_average(path) else ""
        self.notes.append(f"started from {path} (its step {state['step']}{average}): {phase}")
        return phase

    def _open_other_run(self, named: Path) -> tuple[Path, dict[str, Any]]:
        """The checkpoint `named`, or the newest of the run folder `named`, and its state.json; collective.

        Raises:
            UserError: there is none or none is complete, its towers differ, or its tokenizer does.
        """
        path = named
        if on_first_rank((named / "checkpoints").is_dir, self.mesh, "looking for checkpoints"):
            path = find_checkpoint(named, None, self.mesh, head=True)
        elif problem := checkpoint_files.problem(named, self.mesh):
            raise UserError(f"train.init_from {named}: {problem}", "Name a run folder or one of its step folders")
        state = checkpoint_files.read_state(path)
        for key, (old, new) in difference(state["config"], self.config.to_dict()).items():
            section, *fields = key.split(".")
            shapes = key == "method" or (section == "model" and not training_only(self.config.model, fields))
            # A key that the checkpoint's version did not know had the meaning of its default.
            if shapes and old is not None:
                raise UserError(
                    f"train.init_from {path} was trained with {key} = {old}, not {new}: its weights do not fit",
                    f"Set {key} to {old}, or leave out train.init_from",
                )
        self._require_tokenizer(path, state)
        return path, state

    def _compare_classes(self, path: Path) -> ClassMap | None:
        """Map from the catalogue's classes to those of checkpoint `path`; None where they are the same; collective."""
        return class_map(path / "classes.parquet", self.catalogue / "classes" / "classes.parquet", self.mesh)

    def _load(self, path: Path, parts: checkpoint.Trainable, classes: ClassMap | None) -> None:
        """Loads `parts` from a checkpoint; rows of classes that it does not know start from their samples, all rows at
        random where it has none: no stage before it had an objective on classes.
        """
        if parts.head is not None and not self._has_rows(path):
            parts, classes = replace(parts, head=None, row_optimizer=None), None
            self.notes.append(f"{path} has no class rows: they start at random")
        checkpoint.load(path, parts, self.mesh, classes)
        rows, batch_size = self.parts.row_optimizer, self.config.evaluation.batch_size
        if classes is not None and classes.new and rows is not None:
            start_new_rows(self.method, rows, classes, self.loader, batch_size, self.mesh)

    def _has_rows(self, path: Path) -> bool:
        """True where checkpoint `path` has class rows, as rank 0 sees it; collective."""
        return at_first(lambda: checkpoint.has_rows(path), self.mesh, "looking for class rows")

    def _reload_optimizer(self) -> None:
        """Copies the towers' weights, loaded without their optimizer, into its float32 copies."""
        assert self.parts.tower_optimizer is not None, "a run trains"
        self.parts.tower_optimizer.optimizer.reload_model_params()

    def _require_queries(self, path: Path, state: dict[str, Any]) -> None:
        """Raises UserError where the checkpoint was trained on other text queries; one that does not say passes."""
        if state.get("queries", self.queries_id) != self.queries_id:
            raise UserError(
                f"{path} was trained on other queries than those of {self.catalogue}: `shelfmark queries` has replaced "
                "them since",
                "Run it again with the previous options, or start another run from these weights: --train.init-from "
                "and another --run-dir",
            )

    def _require_tokenizer(self, path: Path, state: dict[str, Any]) -> None:
        """Raises UserError where the checkpoint was trained on other token ids; one that does not say passes."""
        if state.get("tokenizer", self.tokenizer_id) != self.tokenizer_id:
            raise UserError(
                f"{path} was trained with another tokenizer than that of {self.catalogue}: its text tower would read "
                "nonsense",
                f"Keep that run's tokenizer: shelfmark tokenizer {self.catalogue} --keep-from {path.parent.parent}",
            )

    def _require_identity(self, changes: dict[str, tuple[Any, Any]]) -> None:
        """Raises UserError where a changed key of the configuration makes it another run."""
        if forbidden := identity_changes(changes):
            old, new = changes[forbidden[0]]
            raise UserError(
                f"{self.config.run_dir} was trained with {forbidden[0]} = {old}, not {new}",
                "That makes another run: choose another --run-dir, or set the key back",
            )

    def _require_stages(self, state: dict[str, Any]) -> None:
        """Raises UserError where stages that the checkpoint has begun were others."""
        step = state["step"]
        before = Stages.of(state["config"]["train"].get("stages", []))
        if begun(before, step) != begun(self.config.train.stages, step):
            raise UserError(
                f"{self.config.run_dir} was trained to step {step:,} with other stages than train.stages has now",
                "Stages that begin later may change: set the others back, or choose another --run-dir",
            )

    def _another_order(self, trained: Phase) -> UserError:
        """The error for a new order of the samples that the recipe does not allow."""
        order_id = self.loader.order.order_id
        same = " with other class keys" if trained.order_id == order_id else ""
        return UserError(
            f"{self.config.run_dir} was trained on order {trained.order_id}, {self.catalogue} has {order_id}{same}: "
            "the catalogue was governed again since",
            "Add --train.new-phase true to go on with its classes (rows follow their class keys), restore its "
            "classes/, or choose another --run-dir",
        )


def _first_phase(order: ClassOrder) -> Phase:
    """That of a run without class rows to start from."""
    return Phase(0, order.order_id, order.num_classes, 0, order.num_classes, 0)


def _next_phase(step: int, order: ClassOrder, classes: ClassMap | None) -> Phase:
    """The phase that begins at `step`; `classes` is None where they are the same as before."""
    if classes is None:
        return Phase(step, order.order_id, order.num_classes, order.num_classes, 0, 0)
    return Phase(step, order.order_id, order.num_classes, classes.kept, classes.new, classes.dropped)


def _saved_phases(path: Path, state: dict[str, Any]) -> list[Phase]:
    """The phases of checkpoint `path`, whose state.json is `state`.

    Raises:
        UserError: they are damaged.
    """
    if "phases" not in state:  # saved by an earlier version, which knew only one
        classes = pq.read_metadata(path / "classes.parquet").num_rows
        return [Phase(0, state["order_id"], classes, 0, classes, 0)]
    try:
        first, *more = (Phase(**phase) for phase in state["phases"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}/state.json is damaged (phases)", "Name another checkpoint") from error
    return [first, *more]
