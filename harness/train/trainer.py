"""The training loop. `Trainer.train_step` is the whole step on one screen; everything else attaches around it."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.core.build import build
from harness.core.cli import tell
from harness.core.files import write_json
from harness.core.mesh import Mesh
from harness.core.waiting import on_first_rank
from harness.data.backends import decoding_threads
from harness.data.loader import StepLoader
from harness.data.step_data import StepData
from harness.evaluate.evaluation import Evaluation, Report
from harness.text.tower_check import require_texts_fit
from harness.train import checkpoint, guards, panels
from harness.train.config import RunConfig
from harness.train.ema import Ema
from harness.train.ledger import Ledger
from harness.train.optimizer import TowerOptimizer, sum_of_squares
from harness.train.profiler import StepProfiler
from harness.train.resume import Resume
from harness.train.run_log import RunLog
from harness.train.schedule import learning_rate
from harness.train.throughput import StepClock, Throughput
from models.batch import rank_sizes
from models.heads.row_optimizer import RowAdamW
from models.registry import METHODS


@dataclass
class StepResult:
    """Result of a step.

    Attributes:
        loss: over all ranks' samples.
        names: of the metrics.
        sums: [k, 2], this rank's [sum, weight] of each metric.
        norm: of the gradient before clipping.
    """

    loss: Tensor
    names: list[str]
    sums: Tensor
    norm: float


class Trainer:
    """One run on this mesh, from its configuration and run folder; continues what the folder holds.

    Attributes:
        step: finished steps.
        notes: lines for the log about the start of the run.
    """

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        # Data
        reads = METHODS[config.method].reads(config.model)
        self.loader = StepLoader(config.data, config.seed, reads, mesh.dp.rank(), mesh.dp.size(), mesh.device, mesh.tp)
        self.tokenizer = self.loader.tokenizer
        require_texts_fit(self.tokenizer.special, config.model)
        # Model
        self.method, self.model_config = build(
            config.method,
            config.model,
            config.head,
            mesh,
            num_classes=self.loader.order.num_classes,
            vocab_size=self.tokenizer.vocab_size,
            seed=config.seed,
            precision=config.train.precision,
        )
        # Optimizers
        towers, head, decay = self.method.towers, self.method.head, config.train.ema_decay
        self.towers = TowerOptimizer(towers, config.optimizer, mesh)
        self.rows = None if head is None else RowAdamW.for_head(head, config.optimizer.rows)
        self.ema = Ema(towers, decay) if decay else None
        self.parts = checkpoint.Trainable(towers, head, self.towers, self.rows, self.ema, self.method.memory)
        # Evaluation
        self.evaluation = Evaluation(
            config.evaluation,
            config.method,
            config.data,
            config.model,
            self.loader.catalogue,
            self.tokenizer,
            config.data.catalogue / "classes" / "classes.parquet",
            mesh,
            self.method.calibration,
        )
        self._calibrated_at = -1
        threads = decoding_threads(config.data.threads)
        self.projector = panels.Projector(config.run_dir / "tensorboard", self.loader.catalogue, threads)
        # Meters and guards
        self.clock = StepClock(mesh)
        self.throughput = Throughput(replace(config, model=self.model_config), self.loader, mesh)
        self.damaged = guards.DamagedSamples(config.data, mesh)
        self.ledger = Ledger(mesh)
        self._data: StepData | None = None  # of the present step, once it is read
        # Start, or continuation
        self.resume = Resume(config, mesh, self.loader, self.method, self.parts, self.ledger)
        self.step = self.resume.step
        averaged = [] if self.ema is None else [self.ema.note]
        self.notes = [*self.towers.notes, *averaged, *self.resume.notes]

    def train_step(self, data: StepData) -> StepResult:
        """One optimizer step over all its micro-batches."""
        config, head, clock, self._data = self.config, self.method.head, self.clock, data
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        batches = [batch.to(self.mesh.device, dtype) for batch in data.batches]
        clock.mark("data")
        lr = learning_rate(config.optimizer, self.step, config.train.steps)
        self.mesh.seed_streams(config.seed, self.step)
        self.towers.zero_grad()
        if head is not None and self.rows is not None:
            labels, weights = torch.cat([b.labels for b in data.batches]), torch.cat([b.weights for b in data.batches])
            margin_part = min(1.0, (self.step + 1) / max(1, config.train.margin_warmup))
            sizes = rank_sizes(data.batches, "query", "document")
            self.rows.catch_up(head.begin_step(labels, weights, self.step, margin_part, sizes))

        total, sums, names = torch.zeros((), device=self.mesh.device), None, []
        for i, (loss, metrics) in enumerate(self.method.losses(batches)):
            with self.towers.accumulate(last=i == len(batches) - 1):
                clock.mark("forward")
                loss.backward()
                clock.mark("backward")
            total, names = total + loss.detach(), list(metrics)
            stacked = torch.stack(list(metrics.values()))
            sums = stacked if sums is None else sums + stacked

        self.towers.reduce()
        squared = self.towers.squared_norm()
        if head is not None:
            active, row_grad = head.row_grad
            squared += sum_of_squares(row_grad)
        # The one wait of every step: what tells whether it may touch the weights.
        squared_norm, loss_value = torch.stack([self.mesh.sum(squared), total.to(squared.dtype)]).tolist()
        norm = math.sqrt(squared_norm)
        self._require_finite(loss_value, norm, data)
        if config.optimizer.clip_norm and norm > config.optimizer.clip_norm:
            factor = torch.full((), config.optimizer.clip_norm / (norm + 1e-6), device=self.mesh.device)
            self.towers.scale(factor)
            if head is not None:
                row_grad *= factor
        self.towers.step(lr)
        if self.ema is not None:
            self.ema.update()
        if head is not None and self.rows is not None:
            self.rows.step(active, row_grad, lr)
            head.end_step()
        clock.mark("optimizer")
        self.step += 1
        self.ledger.add(data.ledger)
        assert sums is not None, "a step has at least one micro-batch"
        return StepResult(total, names, sums, norm)

    def fit(self) -> dict[str, Any]:
        """Trains to the last step (or to train.stop_at); returns the final figures."""
        train, speed = self.config.train, self.throughput
        again = on_first_rank(self._lacks_evaluation, self.mesh, "looking for the last evaluation")
        log = self._open_log(again)
        end = min(train.steps, train.stop_at or train.steps)
        report: Report | None = None
        loss: float | None = None
        speed.start(self.step)
        profiler = StepProfiler(train.profile_steps, self.config.run_dir, self.mesh.rank)
        self.mesh.watch.at = self._place
        try:
            if again:
                report = self.evaluate(log)
            self.clock.start(exact=False)
            for data in self.loader.steps(self.step, end):
                profiler.before(self.step)
                result = self.train_step(data)
                profiler.after(self.step - 1)
                self.damaged.note(self.step, data, log)
                speed.add(data)
                last = self.step == end
                log.advance({"loss": "-" if loss is None else f"{loss:.3f}"})
                if self.step % train.log_every == 0 or last:
                    figures = self._figures(result)
                    if loss is None:
                        decoded = figures["speed/decode_images_per_second"]
                        log.say(f"step {self.step}: a rank reads and decodes {decoded:,.0f} images a second")
                    loss = figures["train/loss"]
                    log.scalars(self.step, figures)
                    self.damaged.require_few(self.step, int(figures["data/bad_samples"]), speed.images(self.step))
                    speed.start_window(self.step)
                with speed.paused():
                    if (train.checkpoint_every and self.step % train.checkpoint_every == 0) or last:
                        self.save()
                    if self._evaluates():
                        report = self.evaluate(log)
                # The steps that end in a line of the log are timed exactly.
                self.clock.start(exact=self.step % train.log_every == train.log_every - 1)
            if self.mesh.rank == 0 and self.step == train.steps:
                log.board.finish()
        except Exception as error:
            if self.mesh.world_size > 1:  # at once: what follows may wait for a read
                tell(error)
            raise
        finally:
            profiler.close()
            self.loader.close()
            log.close()
        evaluated = {} if report is None else {**report.figures, "slices": report.rows}
        return {"steps": self.step, "loss": loss, **speed.summary(self.step), **evaluated}

    def save(self) -> Path:
        """Writes a checkpoint of the present step; collective."""
        self._calibrate()
        folder, keep = self.config.run_dir / "checkpoints", self.config.train.keep_checkpoints
        state = self.resume.state(self.step)
        return checkpoint.save(folder, self.step, self.parts, state, self.resume.classes, self.mesh, keep)

    def evaluate(self, log: RunLog) -> Report:
        """Evaluates the present weights, or their average if there is one, and logs figures and pictures; collective."""
        self._calibrate()
        with self._evaluated():
            report = self.evaluation.run(self.method, final=self.step == self.config.train.steps)
        named = {name if "/" in name else f"retrieval/{name}": value for name, value in report.figures.items()}
        log.scalars(self.step, named)

        def show() -> None:
            panels.show(report, self.step, log.board, self.projector)
            # Last, for its presence tells that the evaluation is complete.
            write_json(self._figures_file(), {**report.figures, "slices": report.rows})

        on_first_rank(show, self.mesh, "drawing the panel")
        return report

    def _calibrate(self) -> None:
        """Fits the method's calibration, if it has one, to the weights that are evaluated; once a step; collective."""
        if self.method.calibration is None or self._calibrated_at == self.step:
            return
        with self._evaluated():
            self.evaluation.calibrate(self.method)
        self._calibrated_at = self.step

    def _evaluated(self) -> AbstractContextManager[None]:
        """Inside the block the towers' weights are those that are evaluated: the average, if there is one."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def _evaluates(self) -> bool:
        """True where an evaluation belongs to the present step."""
        train = self.config.train
        return (train.evaluate_every > 0 and self.step % train.evaluate_every == 0) or self.step == train.steps

    def _lacks_evaluation(self) -> bool:
        """True where the previous process saved this step and ended amid its evaluation; and at the last step, whose
        figures `fit` returns.
        """
        done = self._figures_file().exists() and self.step < self.config.train.steps
        return self.step > 0 and self._evaluates() and not done

    def _figures_file(self) -> Path:
        return self.config.run_dir / f"eval-{self.step:08d}.json"

    def _open_log(self, again: bool) -> RunLog:
        """Opens the log and writes the start of this process into it; `again`: see `RunLog`."""
        config, mesh = self.config, self.mesh
        log = RunLog(config.run_dir, mesh, self.step, config.train.steps, again)
        device = f"{mesh.line}, precision {config.train.precision}"
        for line in [device, mesh.accelerators.line, f"images: {self.loader.images.line}", *self.notes]:
            log.say(line)
        if mesh.rank == 0:
            classes = self.loader.order.num_classes
            log.board.introduce(self.step, config, mesh, self.loader.catalogue, self.method, classes, self.notes)
        return log

    def _figures(self, result: StepResult) -> dict[str, float]:
        """Figures of a step, for the log; collective."""
        rate = self.throughput.rate(self.step)
        local = [*self.throughput.local_sums(), [self.damaged.count, 0]]
        # Over the world: tensor-parallel ranks read different samples of the same step; what they have in common
        # cancels out.
        sums = self.mesh.sum(torch.cat([result.sums.double(), result.sums.new_tensor(local, dtype=torch.float64)]))
        means = (sums[:-1, 0] / sums[:-1, 1].clamp_min(1e-12)).tolist()
        names = [f"train/{name}" for name in result.names]
        metrics = dict(zip(names, means, strict=False))  # the means of the speed follow those of the metrics
        seconds = {f"step_seconds/{part}": value for part, value in self.clock.seconds.items()}
        return {
            "train/loss": result.loss.item(),
            **metrics,
            "train/gradient_norm": result.norm,
            "train/learning_rate": learning_rate(self.config.optimizer, self.step - 1, self.config.train.steps),
            **self.throughput.figures(rate, means[len(names) :], self.clock.take_share("data")),
            "data/bad_samples": sums[-1, 0].item(),
            **seconds,
        }

    def _require_finite(self, loss: float, norm: float, data: StepData) -> None:
        """Ends the run before a loss or gradient that is not finite reaches the weights and the next checkpoint."""
        if not (math.isfinite(norm) and math.isfinite(loss)):
            resumed = self.resume.checkpoint is not None and self.step == self.resume.step
            raise guards.not_finite(self.step, loss, norm, data, self.config.run_dir, self.mesh.rank, resumed)

    def _place(self) -> str:
        """Step, part of it and samples of this rank, for the error of the others if it stands still."""
        place = f"step {self.step}, {self.clock.now}"
        if self.clock.now == "data" or self._data is None:
<<<<<<< HEAD
            return place
        return f"{place}, {guards.listed(guards.sample_ids(self._data))}"
=======
            return f"step {self.step}, {self.clock.now}"
        ids = _sample_ids(self._data)
        more = f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else ""
        return f"step {self.step}, {self.clock.now}, samples {', '.join(map(str, ids[:SHOWN_IDS]))}{more}"

    def _note_bad(self, data: StepData, log: RunLog) -> None:
        if data.bad_ids:
            self.bad_samples += len(data.bad_ids)
            self._bad_ids.update(data.bad_ids)
            log.say(f"step {self.step}: samples {data.bad_ids} are damaged; they have weight 0")

    def _require_whole(self, bad: int, read: int) -> None:
        """Ends the run where too many of the samples `read` since it was started, over all ranks, were damaged; all
        ranks alike.
        """
        most = self.config.data.max_bad_fraction
        if read < LEAST_READ or bad <= most * read:
            return
        of_ranks: list[Any] = [None] * self.mesh.world_size
        dist.all_gather_object(of_ranks, self._bad_ids)
        ids = sorted(set().union(*of_ranks))
        more = f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else ""
        raise UserError(
            f"step {self.step}: {bad} of the {read} samples read since this start were damaged, more than data.max_bad_fraction = "
            f"{most:g} allows: samples {', '.join(map(str, ids[:SHOWN_IDS]))}{more}",
            f"Name damaged shards with `shelfmark verify {self.config.data.catalogue}` and restore them, ingest without "
            "what was never decodable, or raise data.max_bad_fraction; then start again: the run resumes from its last "
            "checkpoint",
        )

    def _panel_rows(self, report: Report) -> list[Any]:
        catalogue = self.loader.catalogue
        found = sorted({i for _, best, _ in report.panel for i in best if i < catalogue.num_samples})
        titles = {row["sample_id"]: row["title"] for row in catalogue.rows(found, ["title"])}
        rows = []
        for query, best, relevant in report.panel:
            shown = text_picture(query) if isinstance(query, str) else picture(catalogue, query)
            # Distractors' pictures lie in other catalogues.
            known = [(i, right) for i, right in zip(best, relevant, strict=True) if i in titles]
            rows.append((shown, [(picture(catalogue, i), titles[i], right) for i, right in known]))
        return rows

    def _resume(self) -> None:
        """Continues the newest complete checkpoint; without one starts from train.init_from, or anew. Says what it did."""
        config, order = self.config, self.loader.order
        path, passed_over = checkpoint.newest(config.run_dir / "checkpoints", self.mesh)
        self.notes = [*self._notes_on_training(), *(f"passed over checkpoint {line}" for line in passed_over)]
        if path is None:
            self.phases = [phases.first(order) if config.train.init_from is None else self._warm_start()]
            if self.ema is not None:
                self.ema.restart()
            return
        if config.train.resume == "never":
            raise UserError(
                f"{config.run_dir} holds checkpoints and train.resume is 'never'", "Choose another --run-dir"
            )
        state = checkpoint.read_state(path)
        phases.require_queries(
            path, state, self._queries_id, config.data.catalogue
        )  # before the keywords they give the model
        changes = difference(state["config"], config.to_dict())
        if forbidden := identity_changes(changes):
            key = forbidden[0]
            raise UserError(
                f"{config.run_dir} was trained with {key} = {changes[key][0]}, not {changes[key][1]}",
                "That makes another run: choose another --run-dir, or set the key back",
            )
        self.phases = phases.saved(path, state)
        moved, allowed = self.phases[-1].order_id != order.order_id, config.train.new_phase
        classes = None if moved and not allowed else class_map(path / "classes.parquet", self.classes, self.mesh)
        begins = moved or classes is not None
        if begins and not allowed:
            raise phases.another_order(config, self.phases[-1], order)
        phases.require_tokenizer(path, state, config.data.catalogue)
        self.step = self._resumed_at = state["step"]
        self.ledger = int(state["ledger"], 16)
        if begins:
            self.phases.append(phases.begin(self.step, order, classes))
        self.loader.first_step = self.phases[-1].first_step
        if not begins:
            self._check_ledger(path, state.get("ledger_before"))
        # Embeddings in a memory bank are labelled with class ids, which a new phase gives anew.
        self._load(path, replace(self.parts, memory=None) if begins else self.parts, classes)
        checkpoint.tidy(path.parent, config.train.keep_checkpoints, path, self.mesh)
        if self.ema is not None and not checkpoint.has_average(path):
            self.notes.append(f"{path.name} holds no average of the weights: it starts from its weights")
        self.notes.append(f"resumed {path.name} (saved by {state['world_size']} ranks, now {self.mesh.world_size})")
        if len(self.phases) > 1:
            self.notes.append(f"data phase {len(self.phases)} {'begins' if begins else 'goes on'}: {self.phases[-1]}")
        self.notes += [f"changed since: {key} {old} -> {new}" for key, (old, new) in changes.items()]
        if config.train.init_from is not None:
            self.notes.append("train.init_from has no effect: the run has a checkpoint of its own")

    def _warm_start(self) -> phases.Phase:
        """Takes towers and rows of train.init_from, or imported towers; optimizer and step are new."""
        imported = self.config.train.init_from
        if imported is not None and (imported / "weights.json").is_file():
            init_towers(self.method.towers, imported, self.mesh.tp)
            self.towers.optimizer.reload_model_params()
            self.notes.append(f"started from the weights in {imported}")
            return phases.first(self.loader.order)
        path, state = phases.open_start(self.config, self.mesh)
        classes = class_map(path / "classes.parquet", self.classes, self.mesh)
        self._load(path, replace(self.parts, tower_optimizer=None, row_optimizer=None, ema=None, memory=None), classes)
        self.towers.optimizer.reload_model_params()
        if self.rows is not None and self.method.head is not None and "master" in self.rows.row_state():
            self.rows.row_state()["master"].copy_(self.method.head.rows)
        phase = phases.begin(0, self.loader.order, classes)
        average = ", the average of its weights" if checkpoint.has_average(path) else ""
        self.notes.append(f"started from {path} (its step {state['step']}{average}): {phase}")
        return phase

    def _notes_on_training(self) -> list[str]:
        """Notes on frozen parameters, unequal learning rates and the average, for the log."""
        parameters, groups = list(self.method.towers.parameters()), self.towers.optimizer.param_groups
        frozen = sum(not parameter.requires_grad for parameter in parameters)
        rates = sorted({group["lr_mult"] for group in groups})
        notes = [f"frozen: {frozen} of the towers' {len(parameters)} tensors"] if self.config.optimizer.frozen else []
        if rates != [1.0]:
            notes.append(f"learning rates of the towers' parts: {rates[0]:.3g} to {rates[-1]:.3g} x optimizer.lr")
        if self.ema is not None:
            notes.append(f"evaluation takes the average of the weights (train.ema_decay {self.ema.decay})")
        return notes

    def _load(self, path: Path, parts: checkpoint.Trainable, classes: ClassMap | None) -> None:
        """Loads a checkpoint; the rows of classes that it does not know start from their samples."""
        checkpoint.load(path, parts, self.mesh, classes)
        if classes is not None and classes.new and self.rows is not None:
            start_new_rows(self.method, self.rows, classes, self.loader, self.config.evaluation.batch_size, self.mesh)

    def _check_ledger(self, path: Path, before: dict[str, Any] | None) -> None:
        """Compares the samples of the last steps with those that the order gives now; every rank all of them."""
        if before is None:
            self.notes.append(f"{path.name} was saved by an earlier version: its last samples are not compared")
            return
        ledgers = self.loader.ledgers(before["step"], self.step)
        if (int(before["ledger"], 16) + sum(ledgers)) % 2**64 != self.ledger:
            raise UserError(
                f"{path}: the samples of its steps {before['step']} to {self.step - 1} are not those that "
                f"{self.config.data.catalogue} gives now: the order is not the one that was trained on",
                "Restore classes/ and the version of shelfmark that trained, or choose another --run-dir",
            )
        self._last_ledgers.extend(ledgers if self.mesh.dp.rank() == 0 else [0] * len(ledgers))


def _sample_ids(data: StepData) -> list[int]:
    return torch.cat([torch.cat([b.query_ids, b.document_ids]) for b in data.batches]).tolist()


def prepare_run_folder(config: RunConfig, versions: dict[str, str]) -> None:
    """Makes the run folder explain itself: configuration, versions, and what is needed to embed a photo. Rank 0 only.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        (config.run_dir / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
        write_json(config.run_dir / "versions.json", versions)
        write_json(config.run_dir / "preprocess.json", config.data.preprocess.to_dict())
        copy_tokenizer(config.data.catalogue, config.run_dir)
    except OSError as error:
        raise UserError(
            f"run folder {config.run_dir}: {error.strerror or error}", "Choose another --run-dir"
        ) from error
>>>>>>> h/photos
