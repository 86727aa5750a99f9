"""Evaluations of a run while it trains, with its baselines beside them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from harness.core.files import write_json
from harness.core.mesh import Mesh
from harness.core.waiting import on_first_rank
from harness.data.backends import decoding_threads
from harness.data.loader import StepLoader
from harness.evaluate.baselines import Baselines
from harness.evaluate.evaluation import Evaluation, Report
from harness.train import checkpoint_files, panels, run_baselines
from harness.train.config import RunConfig
from harness.train.ema import Ema
from harness.train.run_log import RunLog
from models.method import Method


class Validation:
    """Evaluates the present weights of a run, or their average if it exists; figures go to the log and the run folder.

    Args:
        config: of the run.
        mesh: the ranks.
        loader: has the catalogue and the tokenizer.
        method: the weights.
        ema: their average.

    Attributes:
        evaluation: on the recipe's split.
        baselines: once `compare` has run.
        ended: train.early_stop has ended the run.
    """

    def __init__(self, config: RunConfig, mesh: Mesh, loader: StepLoader, method: Method, ema: Ema | None) -> None:
        self.config, self.mesh, self.method, self.ema = config, mesh, method, ema
        self.evaluation = Evaluation(
            config.evaluation,
            config.method,
            config.data,
            config.model,
            loader.catalogue,
            loader.tokenizer,
            config.data.catalogue / "classes" / "classes.parquet",
            mesh,
            method.calibration,
        )
        threads, background = decoding_threads(config.data.threads), config.data.preprocess.background
        self.projector = panels.Projector(config.run_dir / "tensorboard", loader.catalogue, threads, background)
        self.baselines: Baselines | None = None
        self.ended = False
        self._calibrated_at = -1

    def due(self, step: int) -> bool:
        """True where an evaluation belongs to a step."""
        train = self.config.train
        return (train.evaluate_every > 0 and step % train.evaluate_every == 0) or step == train.steps

    def lacking(self, step: int) -> bool:
        """True where the previous process saved this step and ended amid its evaluation; and where the run is over, for
        `Trainer.fit` returns its figures. To be called on rank 0.
        """
        over = step == self.config.train.steps or self._exhausted(step)
        return step > 0 and self.due(step) and (over or not self._file(step).exists())

    def compare(self, step: int, log: RunLog) -> None:
        """Sets the baselines: those that the run folder has, or new ones, which it keeps; collective."""
        evaluation, config = self.evaluation, self.config
        if evaluation.sample is None:
            return
        found = run_baselines.kept(config, evaluation, self.mesh)
        if found is None:
            start = self.method if step == 0 else None
            found = run_baselines.computed(config, evaluation, start, self.mesh)
            if self.mesh.rank == 0:
                run_baselines.keep(config, evaluation, found)
        self.baselines = found
        log.say(f"{'baselines':<12}{found}")
        if self.mesh.rank == 0:
            beside = run_baselines.scalars(evaluation.compared_group, {"recall_at_1": 0.0}, found)
            log.board.compare([*beside], config.evaluation.split)

    def run(self, step: int, log: RunLog) -> Report:
        """Evaluates, and logs figures, warnings and pictures; collective."""
        config, evaluation = self.config, self.evaluation
        self.calibrate(step)
        with self.averaged():
            report = evaluation.run(self.method, final=step == config.train.steps)
        named = {name if "/" in name else f"retrieval/{name}": value for name, value in report.figures.items()}
        beside = run_baselines.scalars(evaluation.compared_group, report.signs, self.baselines)
        log.scalars(step, {**named, **beside}, config.evaluation.split)
        told = run_baselines.judged(config, step, report.signs, self.baselines)
        for line in told:
            log.say(line)

        def show() -> bool:
            panels.show(report, step, log.board, self.projector, config.data.preprocess)
            if len(told) > 1:
                log.board.warn(told[1:], step)
            if metric := config.train.keep_best:
                checkpoint_files.note_best(config.run_dir / "checkpoints", step, metric, report.figures)
            # Last, for its presence tells that the evaluation is complete.
            write_json(self._file(step), {**report.figures, "slices": report.rows, "warnings": told[1:]})
            return self._exhausted(step)

        self.ended = on_first_rank(show, self.mesh, "drawing the panel")
        if self.ended:
            train = config.train
            log.say(f"ends at step {step}: {train.keep_best} did not rise in {train.early_stop} evaluations")
        return report

    def calibrate(self, step: int) -> None:
        """Fits the method's calibration, if it has one, to the weights that are evaluated; once a step; collective."""
        if self.method.calibration is None or self._calibrated_at == step:
            return
        with self.averaged():
            self.evaluation.calibrate(self.method)
        self._calibrated_at = step

    def averaged(self) -> AbstractContextManager[None]:
        """Inside the block the towers' weights are those that are evaluated: the average, if there is one."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def _exhausted(self, step: int) -> bool:
        """True after train.early_stop evaluations without a better figure, by what the run folder holds."""
        train = self.config.train
        if not train.early_stop or step == train.steps:
            return False
        since = checkpoint_files.steps_since_best(self.config.run_dir / "checkpoints", step)
        return since >= train.early_stop * train.evaluate_every

    def _file(self, step: int) -> Path:
        return self.config.run_dir / f"eval-{step:08d}.json"
