"""Checkpoints of a run in training: one at a time, waited for or written in the background."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from harness.core.mesh import Mesh
from harness.train import checkpoint
from harness.train.boundary import Boundary
from harness.train.checkpoint_files import Keep
from harness.train.config import RunConfig
from harness.train.resume import Resume
from harness.train.run_log import RunLog
from harness.train.validation import Validation


class Saver:
    """Writes the checkpoints of a run.

    Args:
        config: of the run.
        mesh: the ranks.
        parts: what is saved.
        resume: gives state.json and the classes.
        validation: calibrates the method before it is saved.
        boundary: tells when all ranks have written a checkpoint in the background.

    Attributes:
        step: of the newest checkpoint, which may still be on its way to the disk.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        parts: checkpoint.Trainable,
        resume: Resume,
        validation: Validation,
        boundary: Boundary,
    ) -> None:
        self.config, self.mesh, self.parts, self.resume = config, mesh, parts, resume
        self.validation, self.boundary = validation, boundary
        self.step = resume.step
        self._pending: checkpoint.Save | None = None
        self._told = False

    def save(self, step: int, log: RunLog | None = None, waits: bool = True, last: bool = True) -> None:
        """Writes a checkpoint of `step`, once the previous one is on the disk; collective.

        Args:
            step: finished steps.
            log: of the run.
            waits: until it is on the disk; else, with train.checkpoint_async, `finish` ends it.
            last: raise where the disk does not take it, whatever train.checkpoint_full_disk says.
        """
        self.finish(log)
        self.validation.calibrate(step)
        train, state = self.config.train, self.resume.state(step)
        folder, keep = self.config.run_dir / "checkpoints", Keep(train.keep_checkpoints, train.keep_every)
        background = train.checkpoint_async and not waits
        with self._going_on(log, last):
            save = checkpoint.Save(
                folder, step, self.parts, state, self.resume.classes, self.mesh, keep, background=background
            )
            if background:
                self._pending, self.boundary.own_written = save, lambda: save.written
                self._tell(save.bytes, log)
            else:
                save.finish()
        self.step = step
        self.boundary.saved()

    def finish(self, log: RunLog | None = None) -> None:
        """Waits for the checkpoint that is written in the background, if there is one, and publishes it; collective."""
        save, self._pending = self._pending, None
        self.boundary.own_written, self.boundary.written = (lambda: False), False
        if save is not None:
            with self._going_on(log, last=False):
                save.finish()

    def _tell(self, own: int, log: RunLog | None) -> None:
        """Says, once, how much memory the copies take; collective."""
        if log is not None and not self._told:
            self._told = True
            copies = torch.zeros(self.mesh.world_size, dtype=torch.int64, device=self.mesh.device)
            copies[self.mesh.rank] = own
            largest, total = int(self.mesh.sum(copies).max()), int(copies.sum())
            log.say(
                f"checkpoints are written in the background from copies in the host's memory: at most "
                f"{largest / 2**20:,.1f} MiB a rank, {total / 2**20:,.1f} MiB in all, until each is on the disk"
            )

    @contextmanager
    def _going_on(self, log: RunLog | None, last: bool) -> Iterator[None]:
        """Context in which train.checkpoint_full_disk decides whether a checkpoint that is not written ends the run."""
        try:
            yield
        except checkpoint.NotWritten as error:
            if last or log is None or self.config.train.checkpoint_full_disk == "stop":
                raise
            log.say(f"{error}; the run goes on")
