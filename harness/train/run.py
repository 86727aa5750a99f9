"""`torchrun … -m harness.train --config RECIPE`: one run from its recipe."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import yaml

from harness.catalogue.catalogue import Catalogue
from harness.catalogue.wholeness import FOLDERS, require_whole
from harness.core.cli import check_figures, run_command, write_figures
from harness.core.errors import UserError
from harness.core.files import write_json, write_whole
from harness.core.launcher import STOPPED_CODE
from harness.core.lock import locked
from harness.core.mesh import Mesh
from harness.core.versions import versions
from harness.core.waiting import on_first_rank
from harness.text.catalogue_facts import prepared
from harness.text.tokenizer import copy_tokenizer
from harness.train.config import RunConfig, parse

LOCK = ".lock"  # in the run folder; what only reads a run does not ask for it


def train(argv: list[str]) -> None:
    """Parses, checks, trains. Raises UserError for mistakes of the user, on every rank alike; SystemExit after a
    signal that stopped the run.
    """
    config, json_file = parse(argv)
    # megatron-core takes seconds to import: a mistake in the recipe is told before
    from harness.train.introduction import closing
    from harness.train.trainer import Trainer

    model = prepared(config.method, config.model, config.data.catalogue)
    config = replace(config, model=model)
    check_figures(json_file)
    with Mesh(config.mesh) as mesh, ExitStack() as stack:
        lock = locked(config.run_dir / LOCK, f"run folder {config.run_dir}")
        on_first_rank(lambda: stack.enter_context(lock), mesh, "locking the run folder")
        require_whole(Catalogue(config.data.catalogue), mesh, tuple(FOLDERS))
        trainer = Trainer(config, mesh)
        if mesh.rank == 0:
            prepare_run_folder(config, versions())
        mesh.barrier()
        figures = trainer.fit()
        stopped = trainer.boundary.stop
        if mesh.rank == 0 and not stopped:
            write_figures(json_file, figures)
            print(closing(config.run_dir, config.evaluation.split, figures))
        elif mesh.rank == 0:  # on standard error: a terminal that was closed takes no line
            signal = trainer.boundary.noted or "a signal to another rank"
            told = f"stopped by {signal} after step {trainer.step}, saved in {config.run_dir}. To go on: {_command()}"
            print(told, file=sys.stderr, flush=True)
    if stopped:
        sys.exit(STOPPED_CODE)


def _command() -> str:
    """The command that started this run: torchrun's, where it started the ranks."""
    words, launcher = sys.orig_argv, Path(f"/proc/{os.getppid()}/cmdline")
    if "TORCHELASTIC_RUN_ID" in os.environ and launcher.exists():
        words = launcher.read_text(errors="replace").rstrip("\0").split("\0")
    return "the same job" if "SLURM_JOB_ID" in os.environ else shlex.join(words)


def prepare_run_folder(config: RunConfig, versions: dict[str, str]) -> None:
    """Writes what explains a run folder: configuration, versions, preprocessing and tokenizer. To be called on rank 0.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        write_whole(config.run_dir / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
        write_json(config.run_dir / "versions.json", versions)
        write_json(config.run_dir / "preprocess.json", config.data.preprocess.to_dict())
        copy_tokenizer(config.data.catalogue, config.run_dir)
    except OSError as error:
        raise UserError(
            f"run folder {config.run_dir}: {error.strerror or error}", "Choose another --run-dir"
        ) from error


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_command(lambda: train(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
