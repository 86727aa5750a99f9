"""The training loop. `Trainer.train_step` is the whole step on one screen; everything else attaches around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.core.build import build
from harness.core.cli import tell
from harness.core.errors import UserError
from harness.core.mesh import Mesh
from harness.core.waiting import on_first_rank
from harness.data.loader import StepLoader
from harness.data.step_data import StepData
from harness.evaluate.evaluation import Report
from harness.text.tower_check import require_texts_fit
from harness.train import checkpoint, guards, stage_start
from harness.train.boundary import Boundary
from harness.train.config import RunConfig
from harness.train.ema import Ema
from harness.train.introduction import introduction
from harness.train.ledger import Ledger
from harness.train.optimizer import TowerOptimizer, sum_of_squares
from harness.train.profiler import StepProfiler
from harness.train.resume import Resume
from harness.train.run_log import RunLog
from harness.train.saver import Saver
from harness.train.stages import stage_at, stages_of, stretches, trained_model
from harness.train.stragglers import Stragglers
from harness.train.throughput import StepClock, Throughput
from harness.train.validation import Validation
from models import comm
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
        skipped: why the step updated nothing, in words; empty where it did.
    """

    loss: Tensor
    names: list[str]
    sums: Tensor
    norm: float
    skipped: str = ""


class Trainer:
    """One run on this mesh, from its configuration and run folder; continues what the folder holds.

    Attributes:
        step: finished steps.
        notes: lines for the log about the start of the run.
        saver: writes its checkpoints.
        boundary: its `stop` tells whether a signal ended `fit`; all that it did is saved.
    """

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        self.config, self.mesh, self.stages = config, mesh, stages_of(config)
        # Data
        reads, ranks = METHODS[config.method].reads(config.model), (mesh.dp.rank(), mesh.dp.size())
        parts = stretches(self.stages)
        self.loader = StepLoader(config.data, config.seed, reads, *ranks, mesh.device, mesh.tp, parts)
        self.tokenizer = self.loader.tokenizer
        require_texts_fit(self.tokenizer.special, config.model)
        # Model
        self.method, self.model_config = build(
            config.method,
            trained_model(self.stages),
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
        stage_start.require_parts(self.stages, self.towers)
        self.ema = Ema(towers, decay) if decay else None
        self.parts = checkpoint.Trainable(towers, head, self.towers, self.rows, self.ema, self.method.memory)
        self.validation = Validation(config, mesh, self.loader, self.method, self.ema)
        # Meters and guards
        self.clock = StepClock(mesh)
        self.throughput = Throughput(self.stages[0].config, self.model_config.text, self.loader, mesh)
        self.damaged = guards.DamagedSamples(config.data, mesh)
        self.finite = guards.FiniteGate(config, mesh)
        self.stragglers = Stragglers(mesh)
        self.ledger = Ledger(mesh)
        self._data: StepData | None = None  # of the present step, once it is read
        # Start, or continuation
        self.resume = Resume(config, mesh, self.loader, self.method, self.parts, self.ledger)
        self.step = self.resume.step
        self.boundary = Boundary(mesh, config.train.checkpoint_minutes)
        self.saver = Saver(config, mesh, self.parts, self.resume, self.validation, self.boundary)
        averaged = [] if self.ema is None else [self.ema.note]
        self.notes = [*self.towers.notes, *averaged, *self.resume.notes]

    def train_step(self, data: StepData) -> StepResult:
        """One optimizer step over all its micro-batches."""
        config, head, clock, self._data = self.config, self.method.trained_head, self.clock, data
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        batches = [batch.to(self.mesh.device, dtype) for batch in data.batches]
        clock.mark("data")
        stage = stage_at(self.stages, self.step)
        lr = stage.learning_rate(self.step)
        self.mesh.seed_streams(config.seed, self.step)
        self.towers.zero_grad()
        if head is not None and self.rows is not None:
            labels, weights = torch.cat([b.labels for b in data.batches]), torch.cat([b.weights for b in data.batches])
            sizes = rank_sizes(data.batches, "query", "document")
            part = stage.margin_part(self.step)
            self.rows.catch_up(head.begin_step(labels, weights, self.step, part, sizes))

        total, sums, names = torch.zeros((), device=self.mesh.device), None, []
        for i, (loss, metrics) in enumerate(self.method.losses(batches)):
            with self.towers.accumulate(last=i == len(batches) - 1):
                clock.mark("forward")
                loss.backward()
                clock.mark("backward")
            total, names = total + loss.detach(), list(metrics)
            stacked = torch.stack(list(metrics.values()))
            sums = stacked if sums is None else sums + stacked
        assert sums is not None, "a step has at least one micro-batch"

        with clock.others():
            self.towers.reduce()
        squared = self.towers.squared_norm()
        if head is not None:
            active, row_grad = head.row_grad
            squared += sum_of_squares(row_grad)
        # The one wait of every step: what tells whether it may touch the weights, and what ranks ask for at its end.
        with clock.others():
            sums_of_ranks = self.mesh.sum(torch.stack([squared, *self.boundary.own(squared)]))
        squared_norm, *asked, loss_value = torch.cat([sums_of_ranks, total[None].to(squared.dtype)]).tolist()
        self.boundary.agree(*asked)
        norm = math.sqrt(squared_norm)
        if skipped := self._not_finite(loss_value, norm, data):
            self._end_step(data)
            return StepResult(total, names, sums, norm, skipped)
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
        self._end_step(data)
        return StepResult(total, names, sums, norm)

    def _end_step(self, data: StepData) -> None:
        if self.method.trained_head is not None:
            self.method.trained_head.end_step()
        self.clock.mark("optimizer")
        self.step += 1
        self.ledger.add(data.ledger)

    def fit(self) -> dict[str, Any]:
        """Trains to the last step (or to train.stop_at, train.early_stop or a signal); returns the final figures."""
        train, speed = self.config.train, self.throughput
        again = on_first_rank(lambda: self.validation.lacking(self.step), self.mesh, "looking for the last evaluation")
        log = self._open_log(again)
        end = min(train.steps, train.stop_at or train.steps)
        report: Report | None = None
        loss: float | None = None
        speed.start()
        profiler = StepProfiler(train.profile_steps, self.config.run_dir, self.mesh.rank)
        self.mesh.watch.at, self.mesh.watch.pace = self._place, self.clock.pace
        self.mesh.watch.folder = self.config.run_dir
        comm.waiting = self.clock.others
        self.boundary.open()
        try:
            self.validation.compare(self.step, log)
            if again:
                report = self.validation.run(self.step, log)
            self.clock.start(exact=False)
            for data in self.steps(self.step if self.validation.ended else end, log.say):
                profiler.before(self.step)
                result = self.train_step(data)
                profiler.after(self.step - 1)
                self.damaged.note(self.step, data, log)
                if result.skipped:
                    log.say(result.skipped)
                speed.add(data)
                last = self.step == end
                log.advance({"loss": "-" if loss is None else f"{loss:.3f}"})
                if self.step % train.log_every == 0 or last:
                    figures = self._figures(result, log)
                    if loss is None:
                        decoded = figures["speed/decode_images_per_second"]
                        log.say(f"step {self.step}: a rank reads and decodes {decoded:,.0f} images a second")
                    loss = figures["train/loss"] if math.isfinite(figures["train/loss"]) else loss
                    log.scalars(self.step, {name: x for name, x in figures.items() if math.isfinite(x)})
                    self.damaged.require_few(self.step, int(figures["data/bad_samples"]), speed.images)
                    speed.start_window()
                with speed.paused():
                    saves, evaluates = last or self._saves(), self.validation.due(self.step)
                    if saves or self.boundary.written:
                        self.saver.finish(log)
                    if saves:
                        # The best checkpoint has to be there before best.json names it.
                        waits = last or self.boundary.stop or (evaluates and train.keep_best != "")
                        self.saver.save(self.step, log, waits, last)
                    if evaluates and not self.boundary.stop:
                        report = self.validation.run(self.step, log)
                    if (saves or evaluates) and not last:
                        self.boundary.ask()  # a signal may have come since the step
                if self.boundary.stop or self.validation.ended:
                    break
                # The steps that end in a line of the log are timed exactly.
                self.clock.start(exact=self.step % train.log_every == train.log_every - 1)
            self.saver.finish(log)
            if self.saver.step < self.step:  # a signal came during an evaluation
                self.save()
            if self.mesh.rank == 0 and (self.validation.ended or self.step == train.steps) and not self.boundary.stop:
                log.board.finish()
        except Exception as error:
            self.boundary.close(failed=not isinstance(error, UserError))
            if self.mesh.world_size > 1:  # at once: what follows may wait for a read
                tell(error)
            raise
        finally:
            comm.waiting = nullcontext
            self.boundary.close()
            profiler.close()
            self.loader.close()
            log.close()
        evaluated = {} if report is None else {**report.figures, "slices": report.rows}
        return {"steps": self.step, "loss": loss, **speed.summary(), **evaluated}

    def steps(self, end: int, say: Callable[[str], None] = lambda line: None) -> Iterator[StepData]:
        """Data of the steps from the present one up to `end`, for `train_step`; each stage begins before its first.

        `say` takes lines for the log.
        """
        while self.step < end:
            stage = stage_at(self.stages, self.step)
            if stage.settings is not None:
                with self.throughput.paused(), self.clock.between("the beginning of a stage"):
                    parts = (self.method, self.towers, self.rows, self.loader, self.mesh)
                    stage_start.begin(stage, self.step, *parts, say)
                self.throughput.enter(stage.config, self.step)
            yield from self.loader.steps(self.step, min(end, stage.end))

    def save(self) -> Path:
        """Writes a checkpoint of the present step and waits for it; collective."""
        self.saver.save(self.step)
        return self.config.run_dir / "checkpoints" / f"step-{self.step:08d}"

    def _saves(self) -> bool:
        """True where a checkpoint belongs to the present step."""
        train, boundary = self.config.train, self.boundary
        every = (train.checkpoint_every, train.keep_every)
        due = boundary.stop or boundary.save or any(steps and self.step % steps == 0 for steps in every)
        return due or (train.keep_best != "" and self.validation.due(self.step))  # what is evaluated may be the best

    def _open_log(self, again: bool) -> RunLog:
        """Opens the log and writes the start of this process into it; `again`: see `RunLog`."""
        config, mesh = self.config, self.mesh
        log = RunLog(config.run_dir, mesh, self.step, config.train.steps, again)
        for line in introduction(config, mesh, self.loader, self.method, self.step):
            log.say(line)
        device = f"{mesh.line}, precision {config.train.precision}"
        for line in [device, mesh.accelerators.line, f"images: {self.loader.images.line}", *self.notes]:
            log.say(line)
        if mesh.rank == 0:
            classes = self.loader.order.num_classes
            log.board.introduce(self.step, config, mesh, self.loader.catalogue, self.method, classes, self.notes)
        return log

    def _figures(self, result: StepResult, log: RunLog) -> dict[str, float]:
        """Figures of a step, for the log, which also names the ranks that hold the others up; collective."""
        rate = self.throughput.rate
        local = [*self.throughput.local_sums(), [self.damaged.count, 0], *self.stragglers.own(self.clock)]
        # Over the world: tensor-parallel ranks read different samples of the same step; what they have in common
        # cancels out.
        sums = self.mesh.sum(torch.cat([result.sums.double(), result.sums.new_tensor(local, dtype=torch.float64)]))
        sums, of_ranks = sums[: -self.mesh.world_size], sums[-self.mesh.world_size :]
        self.stragglers.tell(self.step, of_ranks.tolist(), log)
        means = (sums[:-1, 0] / sums[:-1, 1].clamp_min(1e-12)).tolist()
        names = [f"train/{name}" for name in result.names]
        metrics = dict(zip(names, means, strict=False))  # the means of the speed follow those of the metrics
        seconds = {f"step_seconds/{part}": value for part, value in self.clock.seconds.items()}
        stage = stage_at(self.stages, self.step - 1)
        return {
            "train/loss": result.loss.item(),
            **metrics,
            "train/gradient_norm": result.norm,
            "train/learning_rate": stage.learning_rate(self.step - 1),
            **({} if stage.settings is None else {"train/stage": float(stage.number)}),
            **self.throughput.figures(rate, means[len(names) :], self.clock.take_share("data")),
            "data/bad_samples": sums[-1, 0].item(),
            **seconds,
        }

    def _not_finite(self, loss: float, norm: float, data: StepData) -> str:
        """Empty for a finite step; else, before it reaches the weights and the next checkpoint, why it is left out.

        Raises:
            UserError: train.nonfinite stops the run, or its budget is spent.
        """
        if math.isfinite(norm) and math.isfinite(loss):
            return ""
        head, norms = self.method.trained_head, self.towers.part_norms()
        if head is not None:
            norms["rows"] = float(head.row_grad[1].norm())
        resumed = self.resume.checkpoint is not None and self.step == self.resume.step
        try:
            return self.finite.judge(self.step, loss, norm, norms, data, resumed)
        except UserError:
            with suppress(checkpoint.NotWritten):  # what ends the run is the step
                self.saver.finish()
            raise

    def _place(self) -> str:
        """Step, part of it and samples of this rank, for the error of the others if it stands still."""
        reads = self.clock.now == "data"
        ids = (
            self.loader.sample_ids(self.step) if reads else [] if self._data is None else guards.sample_ids(self._data)
        )
        return f"step {self.step}, {self.clock.now}{f', {guards.listed(ids)}' if ids else ''}"
