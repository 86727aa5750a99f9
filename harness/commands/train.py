"""`shelfmark train`: Train a model by a recipe, on ranks of its own; `torchrun … -m harness.train` brings its own."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

from harness.core.errors import UserError
from harness.train.config import build, check, parsed
from harness.train.run import train

EXAMPLE = (
    "shelfmark train --ranks 2 --config jobs/recipes/oclear_grocery.yaml "
    "--data.catalogue catalogues/grocery --run-dir runs/grocery"
)


@dataclass(frozen=True, kw_only=True)
class RanksConfig:
    """Trains a retrieval model by a recipe; every key can be overridden, as --train.steps 200.

    Args:
        ranks: processes to start on this machine; auto: one for each GPU, one where there is none. Under torchrun or a
            job of SLURM, which start them, leave it out.
    """

    ranks: str = "auto"


def main(argv: list[str]) -> None:
    """Trains in this process, or starts ranks that do.

    Raises:
        UserError: as `harness.train.run.train`; a number of ranks that is none, or not the launcher's.
        SystemExit: with the exit code of the ranks, where there are several.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--ranks", nargs="?", const="", default=RanksConfig.ranks)
    given, words = first.parse_known_args(argv)
    asked = given.ranks
    if asked != "auto" and not (asked.isdecimal() and int(asked) > 0):
        raise UserError(f"--ranks is '{asked}'", "Give a number, or auto")
    if {"-h", "--help", "--help-all"} & set(words):
        parsed(words, RanksConfig, "shelfmark train", EXAMPLE)
    started = os.environ.get("WORLD_SIZE")
    if started is not None and asked not in ("auto", started):
        raise UserError(f"--ranks is {asked}, but a launcher has started {started} already", "Leave --ranks out")
    if started is None and (ranks := _number(asked, words)) > 1:
        check(build(parsed(words)), ranks)  # a mistake in the recipe is told before any rank starts
        from harness.core.torchrun import run_ranks

        raise SystemExit(run_ranks(ranks, ["harness", "train", *words]))
    train(words)


def _number(asked: str, words: list[str]) -> int:
    """Ranks to start."""
    import torch

    if asked != "auto":
        return int(asked)
    found = torch.cuda.device_count()
    return found if found > 1 and build(parsed(words)).mesh.device != "cpu" else 1
