"""`shelfmark COMMAND …` (= `python -m harness`): each module of harness/commands is a command."""

# ruff: noqa: E402
from __future__ import annotations

import signal

_interrupt = signal.getsignal(signal.SIGINT)
if _interrupt is signal.default_int_handler:  # Ctrl-C while the rest is imported ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import ast
import importlib
import importlib.util
import os
import pkgutil
import sys
import textwrap
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

from docstring_parser import parse as parse_docstring

from harness import commands
from harness.core.cli import Parser, check_figures, nearest, run_command, write_figures
from harness.core.errors import UserError

RENAMED = {"evaluate": "eval", "import_weights": "import"}  # module -> command; `import` can be no module's name
COMMANDS = {
    RENAMED.get(module.name, module.name.replace("_", "-")): f"harness.commands.{module.name}"
    for module in pkgutil.iter_modules(commands.__path__)
}


def sentence(name: str) -> str:
    """The sentence behind "`shelfmark NAME`: " in the docstring of a command's module, which is not imported."""
    spec = importlib.util.find_spec(COMMANDS[name])
    assert spec is not None and spec.origin is not None
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].partition("`: ")[2]


def usage() -> str:
    """The overview that `shelfmark --help` prints."""
    lines = [
        textwrap.fill(sentence(name), 100, initial_indent=f"  {name:<16}", subsequent_indent=" " * 18)
        for name in COMMANDS
    ]
    more = (
        "`shelfmark COMMAND --help` lists options with their defaults and an example "
        "(train and estimate have many: --help-all). "
        "`shelfmark doctor` says whether this machine is ready, `shelfmark --version` its version."
    )
    return "\n".join(["usage: shelfmark COMMAND [options]", "", *lines, "", more])


def command(name: str, argv: list[str]) -> None:
    """Runs one command: `main(argv)` of its module where there is one, else `run` with its configuration, whose fields
    that are not keyword-only are given by place.

    Raises:
        UserError: an unknown command or option, or what the command itself finds.
    """
    if name not in COMMANDS:
        raise UserError(f"unknown command '{name}'", nearest(name, COMMANDS))
    module: Any = importlib.import_module(COMMANDS[name])
    if hasattr(module, "main"):
        module.main(argv)
        return
    config = get_type_hints(module.run)["config"]
    parser = Parser(f"shelfmark {name}", sentence(name), module.EXAMPLE)
    kinds, texts = (
        get_type_hints(config),
        {text.arg_name: text.description for text in parse_docstring(config.__doc__).params},
    )
    places = [field.name for field in fields(config) if not field.kw_only]
    for place in places:
        several: Any = {"nargs": "*", "default": ()} if get_origin(kinds[place]) is tuple else {}
        kind = kinds[place] if get_origin(kinds[place]) is Literal else Path
        parser.add_argument(place, type=kind, help=texts[place], **several)
    parser.add_class_arguments(config, skip=set(places))
    parser.add_argument("--json", type=Path | None, default=None, help="file for the figures that the command reports")
    values = parser.parse(argv).as_dict()
    json_file = values.pop("json")
    check_figures(json_file)
    try:
        figures = module.run(config(**values))
    except UserError as error:
        if error.figures is not None:
            write_figures(json_file, error.figures)
        raise
    if os.environ.get("RANK", "0") == "0":
        write_figures(json_file, figures)


def main() -> int:
    """Entry point of `shelfmark`."""
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        return run_command(lambda: print(usage())) or (0 if argv else 2)
    if argv[0] == "--version":
        return run_command(lambda: print(f"shelfmark {metadata.version('shelfmark')}"))
    return run_command(lambda: command(argv[0], argv[1:]))


signal.signal(signal.SIGINT, _interrupt)
if __name__ == "__main__":
    sys.exit(main())
