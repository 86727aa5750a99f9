"""`shelfmark COMMAND …` (= `python -m harness`): every command of a user at one place."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from harness.core.cli import Parser, check_figures, run_command, write_figures
from harness.core.errors import UserError

# command -> (module, its configuration class, the fields given by place, one sentence). Modules load only when asked
# for.
COMMANDS = {
    "synth": ("harness.commands.synth", "SynthConfig", "out", "Draw a demo catalogue: products, photos, a click log."),
    "ingest": ("harness.commands.ingest", "IngestConfig", "", "Make a catalogue of a manifest and an image folder."),
    "merge": ("harness.commands.merge", "MergeConfig", "catalogue", "Join the parts of an ingest in parts."),
    "index": ("harness.commands.index", "IndexConfig", "tars", "Make a catalogue of webdataset tars where they lie."),
    "shards": (
        "harness.commands.shards",
        "ShardsConfig",
        "catalogue",
        "Say where a catalogue's images lie: s3, http, …",
    ),
    "govern": (
        "harness.commands.govern",
        "GovernConfig",
        "catalogue",
        "Turn a catalogue's samples into training classes.",
    ),
    "tokenizer": (
        "harness.commands.tokenizer",
        "TokenizerConfig",
        "catalogue",
        "Train or take a tokenizer and encode a catalogue's text.",
    ),
    "queries": ("harness.commands.queries", "QueriesConfig", "catalogue", "Collect what text queries are made of."),
    "import": (
        "harness.commands.import_weights",
        "ImportConfig",
        "out",
        "Bring a model's weights from the hub, timm or open_clip.",
    ),
    "eval": ("harness.commands.evaluate", "EvalConfig", "run", "Evaluate a run's checkpoint; also under torchrun."),
    "export": (
        "harness.commands.export",
        "ExportConfig",
        "run",
        "Make a run's search artefact: encoder, index, id map.",
    ),
    "export-weights": (
        "harness.commands.export_weights",
        "ExportWeightsConfig",
        "source",
        "Write towers for transformers, timm or open_clip.",
    ),
    "search": (
        "harness.commands.search",
        "SearchConfig",
        "artefact photos",
        "Find documents by photo, text or likeness.",
    ),
    "verify": (
        "harness.commands.verify",
        "VerifyConfig",
        "paths",
        "Name what is damaged in catalogues, runs and artefacts.",
    ),
}
SEVERAL = {
    "photos": "query photos",
    "paths": "folders to read through",
}  # fields given by place that take one or more files
ESTIMATE = "Say what a recipe needs: parameters, memory, FLOPs, bytes; without running it."
TRAIN = "Train a model by a recipe; also as `torchrun … -m harness.train`."


def usage() -> str:
    """The overview that `shelfmark --help` prints."""
    lines = [f"  {name:<15}{sentence}" for name, (_, _, _, sentence) in COMMANDS.items()]
    lines.insert(8, f"  {'estimate':<15}{ESTIMATE}")
    lines.insert(9, f"  {'train':<15}{TRAIN}")
    return "\n".join(
        [
            "usage: shelfmark COMMAND [options]",
            "",
            *lines,
            "",
            "`shelfmark COMMAND --help` lists options with their defaults and an example.",
        ]
    )


def command(name: str, argv: list[str]) -> None:
    """Runs one command.

    Raises:
        UserError: an unknown command or option, or what the command itself finds.
    """
    if name == "train":
        from harness.train.run import train

        return train(argv)
    if name == "estimate":
        from harness.commands.estimate import estimate

        estimate(argv)
        return None
    if name not in COMMANDS:
        raise UserError(f"unknown command '{name}'", f"Commands are {', '.join([*COMMANDS, 'estimate', 'train'])}")
    module_name, config_name, positional, sentence = COMMANDS[name]
    module: Any = importlib.import_module(module_name)
    parser = Parser(f"shelfmark {name}", sentence, module.EXAMPLE)
    for place in positional.split():
        if place in SEVERAL:
            parser.add_argument(place, type=Path, nargs="*", default=(), help=SEVERAL[place])
        else:
            parser.add_argument(place, type=Path, help=f"the {place} folder")
    parser.add_class_arguments(getattr(module, config_name), skip=set(positional.split()))
    parser.add_argument("--json", type=Path | None, default=None, help="file for the figures that the command reports")
    values = parser.parse(argv).as_dict()
    json_file = values.pop("json")
    check_figures(json_file)
    figures = module.run(getattr(module, config_name)(**values))
    if os.environ.get("RANK", "0") == "0":
        write_figures(json_file, figures)
    return None


def main() -> int:
    """Entry point of `shelfmark`."""
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        return run_command(lambda: print(usage())) or (0 if argv else 2)
    return run_command(lambda: command(argv[0], argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
