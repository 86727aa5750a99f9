"""Argument parsing of every command: jsonargparse, with one clear line for each mistake."""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from harness.errors import UserError

USER_ERROR_CODE = 2


class Parser(jsonargparse.ArgumentParser):
    """jsonargparse's parser that raises UserError, and names the nearest key where one is unknown.

    Args:
        prog: the command as the user types it.
        description: what it does, one sentence.
        example: a command line that works.
    """

    def __init__(self, prog: str = "", description: str = "", example: str = "", **kwargs: Any) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"example: {example}",
            exit_on_error=False,
            **kwargs,
        )

    def parse(self, argv: list[str]) -> jsonargparse.Namespace:
        """Parses and instantiates.

        Raises:
            UserError: anything that is wrong with `argv` or with the recipe that it names.
        """
        argv = [_underscored(arg) for arg in argv]
        known = {key for key in self.get_defaults().keys() if key != "config"}
        for key in _given_keys(argv):
            if key not in known and not any(name.startswith(f"{key}.") for name in known) and key not in ("help", "config"):
                raise unknown_key(key, known, "command line")
        try:
            return self.instantiate_classes(self.parse_args(argv))
        except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
            raise UserError(_one_line(str(error)), f"See `{self.prog} --help`") from error


    def format_help(self) -> str:
        """The help text, its flags spelt with dashes (the keys of a recipe, which hold dots, keep their underscores)."""
        return re.sub(r"--[a-z_]+(?![\w.])", lambda flag: flag[0].replace("_", "-"), super().format_help())


def unknown_key(key: str, known: Iterable[str], where: str) -> UserError:
    """The error for a key that does not exist, naming the nearest that does."""
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)
    return UserError(f"{where}: unknown key '{key}'", f"Did you mean '{near[0]}'?" if near else "")


def read_recipe(path: Path, known: Iterable[str]) -> dict[str, Any]:
    """The mapping of a YAML recipe, its keys checked against `known` (dotted).

    Raises:
        UserError: no such file, no YAML mapping, or an unknown key.
    """
    try:
        recipe = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"recipe {path}: {error.strerror}", "Recipes lie in jobs/recipes") from error
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is no YAML: {_one_line(str(error))}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"recipe {path} must be a YAML mapping of keys to values")
    names = set(known)
    for key in _leaves(recipe):
        if key not in names and not any(name.startswith(f"{key}.") for name in names):
            raise unknown_key(key, names, f"recipe {path}")
    return recipe


def _leaves(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{name}.")
        else:
            yield name


def _underscored(arg: str) -> str:
    """--vocab-size and --vocab_size are the same flag."""
    flag, equals, value = arg.partition("=")
    return flag[:2] + flag[2:].replace("-", "_") + equals + value if re.match(r"--[a-z]", arg) else arg


def _given_keys(argv: list[str]) -> list[str]:
    return [match[1] for arg in argv if (match := re.match(r"--([A-Za-z][\w.-]*)", arg))]


def _one_line(message: str) -> str:
    return re.sub(r"\s+", " ", message).strip().rstrip(".")


def write_figures(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Writes what a command reports to `path` (--json), if one was given.

    Raises:
        UserError: the file cannot be written.
    """
    if path is None:
        return
    try:
        path.write_text(json.dumps(figures, indent=1, default=str) + "\n")
    except OSError as error:
        raise UserError(f"--json {path}: {error.strerror}", "Name a file in a folder that exists") from error


def run_command(body: Callable[[], Any]) -> int:
    """Runs a command's body; a UserError becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        body()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_CODE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
