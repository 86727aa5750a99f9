"""Guards of a run: it ends where too many samples are damaged or a loss is not finite, and names the samples."""

from __future__ import annotations

import torch

from harness.core.errors import UserError
from harness.core.files import write_json
from harness.core.mesh import Mesh
from harness.core.waiting import gather_objects
from harness.data.config import DataConfig
from harness.data.step_data import StepData
from harness.train.config import RunConfig
from harness.train.run_log import RunLog

# Samples that must have been read before damage can end a run: a few at its start say nothing about the rest.
LEAST_READ = 1000
SHOWN_IDS = 20


def sample_ids(data: StepData) -> list[int]:
    """Ids of this rank's samples in a step."""
    return torch.cat([torch.cat([b.query_ids, b.document_ids]) for b in data.batches]).tolist()


def listed(ids: list[int]) -> str:
    """The first SHOWN_IDS ids in words."""
    more = f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else ""
    return f"samples {', '.join(map(str, ids[:SHOWN_IDS]))}{more}"


class DamagedSamples:
    """Counts the damaged samples that this rank reads, and ends the run where all ranks have read too many.

    Attributes:
        count: damaged samples that this rank has read since the start, a sample as often as it was read.
    """

    def __init__(self, config: DataConfig, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.count = 0
        self._ids: set[int] = set()

    def note(self, step: int, data: StepData, log: RunLog) -> None:
        """Counts those of a step and names them in the log."""
        if data.bad_ids:
            self.count += len(data.bad_ids)
            self._ids.update(data.bad_ids)
            log.say(f"step {step}: samples {data.bad_ids} are damaged; they have weight 0")

    def require_few(self, step: int, bad: int, read: int) -> None:
        """Ends the run where too many of the samples read since its start were damaged, on all ranks alike.

        Args:
            step: finished steps.
            bad: sum of `count` over all ranks.
            read: samples read over all ranks.

        Raises:
            UserError: `bad` is more than data.max_bad_fraction of `read`; collective only then.
        """
        most = self.config.max_bad_fraction
        if read < LEAST_READ or bad <= most * read:
            return
        ids = sorted(set().union(*gather_objects(self._ids)))
        raise UserError(
            f"step {step}: {bad} of the {read} samples read since this start were damaged, more than "
            f"data.max_bad_fraction = {most:g} allows: {listed(ids)}",
            f"Name damaged shards with `shelfmark verify {self.config.catalogue}` and restore them, ingest without "
            "what was never decodable, or raise data.max_bad_fraction; then start again: the run resumes from its last "
            "checkpoint",
        )


class FiniteGate:
    """Ends the run at a loss or gradient norm that is not finite, or leaves the step out (train.nonfinite).

    Attributes:
        skipped: steps that this process has left out.
    """

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.skipped = 0

    def judge(
        self, step: int, loss: float, norm: float, norms: dict[str, float], data: StepData, just_resumed: bool
    ) -> str:
        """Writes the step's samples and norms into the run folder, a file for each rank; alike on every rank.

        Args:
            step: finished steps.
            loss: of the step.
            norm: of its gradient.
            norms: of this rank's share of the gradient, by part of the model.
            data: this rank's part of the step.
            just_resumed: the step is the first one after a resume, so that the checkpoint may be the cause.

        Returns:
            Why the step is left out, in words.

        Raises:
            UserError: it ends the run.
        """
        file = self.config.run_dir / f"nonfinite-step-{step}-rank-{self.mesh.rank}.json"
        found = {"step": step, "loss": str(loss), "gradient_norm": str(norm), "sample_ids": sample_ids(data)}
        write_json(file, {**found, "norms": {part: str(value) for part, value in norms.items()}})
        what = f"step {step}: loss {loss} or gradient norm {norm} is not finite; nothing was updated"
        train = self.config.train
        if train.nonfinite == "skip" and self.skipped < train.skip_budget:
            self.skipped += 1
            return f"{what} ({self.skipped} of train.skip_budget = {train.skip_budget}); the samples are in {file}"
        spent = f" and train.skip_budget = {train.skip_budget} is spent" if train.nonfinite == "skip" else ""
        again = "the run resumes"
        if just_resumed:
            again += f", or move step-{step:08d} elsewhere, if it is ruined itself, to resume the checkpoint before it"
        raise UserError(
            f"{what}{spent}",
            f"The samples are in {file}. Lower optimizer.lr or the margin, then start again: {again}",
        )
