"""`torchrun … -m harness.train --config RECIPE`: one run from its recipe."""

from __future__ import annotations

import logging
import sys
import warnings
from contextlib import ExitStack
from dataclasses import replace

from harness.catalogue.catalogue import Catalogue
from harness.catalogue.wholeness import FOLDERS, require_whole
from harness.core.cli import check_figures, run_command, write_figures
from harness.core.lock import locked
from harness.core.mesh import Mesh
from harness.core.versions import versions
from harness.core.waiting import on_first_rank
from harness.text.catalogue_facts import prepared
from harness.train.config import parse
from harness.train.trainer import Trainer, prepare_run_folder

LOCK = ".lock"  # in the run folder; what only reads a run does not ask for it


def train(argv: list[str]) -> None:
    """Parses, checks, trains. Raises UserError for what the user can mend, on every rank alike."""
    config, json_file = parse(argv)
    model = prepared(config.method, config.model, config.data.catalogue)
    config = replace(config, model=model)
    check_figures(json_file)
    quiet_libraries()
    with Mesh(config.mesh) as mesh, ExitStack() as stack:
        lock = locked(config.run_dir / LOCK, f"run folder {config.run_dir}")
        on_first_rank(lambda: stack.enter_context(lock), mesh, "locking the run folder")
        require_whole(Catalogue(config.data.catalogue), mesh, tuple(FOLDERS))
        trainer = Trainer(config, mesh)
        if mesh.rank == 0:
            prepare_run_folder(config, versions())
        mesh.barrier()
        figures = trainer.fit()
        if mesh.rank == 0:
            write_figures(json_file, figures)
            shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
            shown = {k: v for k, v in shown.items() if v is not None and k != "slices"}
            print(f"run {config.run_dir}: " + ", ".join(f"{name} {value}" for name, value in shown.items()))


def quiet_libraries() -> None:
    """megatron-core and DCP warn about their own internals at every save; a run's log is for what a user can act on."""
    warnings.filterwarnings("ignore", module=r"megatron\..*|torch\.distributed\..*")
    logging.getLogger("megatron").setLevel(logging.ERROR)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_command(lambda: train(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
