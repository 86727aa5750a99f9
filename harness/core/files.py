"""Small files: reading of untrusted JSON and YAML, atomic writing of text and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import xxhash
import yaml

from harness.core.errors import UserError

T = TypeVar("T", bound="str | bool | int | float | list[Any] | dict[str, Any]")
LARGEST_YAML = 1 << 20  # bytes
LARGEST_JSON = 1 << 28  # bytes; the largest of ours, the manifest of a checkpoint by 10,000 ranks, has 1e6
_HARMLESS = "\u00a0\u2009\u202f\u3000\u200c\u200d"  # spaces, and joiners of letters and emoji
_KINDS: dict[type, str] = {
    str: "text",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    list: "a list",
    dict: "an object",
}


def read_json(file: Path, remedy: str = "") -> Any:
    """Reads a JSON file.

    Args:
        file: UTF-8, at most 256 MiB.
        remedy: second half of the error.

    Raises:
        UserError: the file does not exist, cannot be read, is too large, or is not JSON.
    """
    try:
        if (size := file.stat().st_size) > LARGEST_JSON:
            raise UserError(f"{file} has {size:,} bytes, more than the {LARGEST_JSON:,} of any that is ours", remedy)
        return json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}", remedy) from error
    except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8
        reason = "nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise UserError(f"{file} is damaged ({reason})", remedy) from error


class _Loader(yaml.SafeLoader):
    """Reads YAML whose mappings have each key once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """As the base class, but raises ConstructorError for a key that stands twice."""
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _WithoutAliases(_Loader):
    """Takes no aliases either: a page of them can stand for more than a memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As the base class, but raises ComposerError for an alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "an alias (*) is not taken", self.peek_event().start_mark)
        return super().compose_node(parent, index)


def read_yaml(file: Path, what: str, remedy: str = "", aliases: bool = False) -> Any:
    """Reads a YAML file of at most 1 MiB.

    Args:
        file: the file.
        what: name of the file in an error.
        remedy: second half of the error for a missing or too large file.
        aliases: allow them (*name); not in untrusted files.

    Raises:
        UserError: the file does not exist, cannot be read, is too large, or is not YAML.
    """
    try:
        with file.open("rb") as opened:
            text = opened.read(LARGEST_YAML + 1)
        if len(text) > LARGEST_YAML:
            raise UserError(f"{what} has more than {LARGEST_YAML:,} bytes", remedy)
        return yaml.load(text.decode(), _Loader if aliases else _WithoutAliases)
    except OSError as error:
        raise UserError(f"{what}: {error.strerror}", remedy) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also bytes that are not UTF-8
        raise UserError(f"{what} is not YAML: {' '.join(str(error).split()).rstrip('.')}") from error


def read_record(file: Path, remedy: str = "") -> Record:
    """Reads a JSON file that holds an object.

    Raises:
        UserError: as `read_json`, or the file holds anything else.
    """
    values = read_json(file, remedy)
    if not isinstance(values, dict):
        raise UserError(f"{file} is damaged (not a JSON object)", remedy)
    return Record(file, values, remedy)


@dataclass(frozen=True)
class Record:
    """A JSON object whose values are checked when they are read.

    Args:
        file: its file, for errors.
        values: its content.
        remedy: second half of the errors.
    """

    file: Path
    values: Mapping[str, Any]
    remedy: str = ""

    def get(self, name: str, kind: type[T]) -> T:
        """The value `name`, which must be of that kind: str, bool, int, float (also an integer), list or dict.

        Raises:
            UserError: it is missing, or of another kind.
        """
        value = self.values.get(name)
        wrong = type(value) is not kind and not (kind is float and type(value) is int)
        if wrong:
            self.refuse(
                f"{name} is {_shown(value)}, not {_KINDS[kind]}" if name in self.values else f"{name} is missing"
            )
        return value  # type: ignore[return-value]

    def number(self, name: str, most: int, least: int = 0) -> int:
        """The integer `name`, from `least` to `most`; a size must be bounded before memory is allocated for it.

        Raises:
            UserError: it is missing, or out of bounds.
        """
        value = self.get(name, int)
        if not least <= value <= most:
            self.refuse(f"{name} is {value}, not between {least} and {most}")
        return value

    def list_of(self, name: str, kind: type[T]) -> list[T]:
        """The list `name`, all of whose values must be of that kind.

        Raises:
            UserError: it is missing, or one of its values is of another kind.
        """
        values = self.get(name, list)
        for value in values:
            if type(value) is not kind:
                self.refuse(f"{name} has {_shown(value)}, not {_KINDS[kind]}")
        return values

    def require_seal(self) -> None:
        """Raises UserError if the values differ from those given to `sealed`."""
        if self.get("checksum", str) != sealed(self.values)["checksum"]:
            self.refuse("its values differ from their checksum")

    def refuse(self, what: str) -> NoReturn:
        """Raises UserError for a damaged file; `what` is the damage."""
        raise UserError(f"{self.file} is damaged ({what})", self.remedy)


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with their own `checksum`, xxh3-64 over sorted JSON, by which `Record.require_seal` finds damage that
    leaves a file valid JSON.
    """
    rest = {name: value for name, value in values.items() if name != "checksum"}
    return {**rest, "checksum": xxhash.xxh3_64_hexdigest(json.dumps(rest, sort_keys=True).encode())}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def write_whole(file: Path, text: str) -> None:
    """Writes `file` atomically, and syncs it to disk."""
    temporary = file.with_name(f"{file.name}.tmp")
    with temporary.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(file)


def write_json(file: Path, content: Any) -> None:
    """Writes indented JSON atomically; NaN becomes null."""
    write_whole(file, json.dumps(_finite(content), indent=1, default=str) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and value != value else value


def printable(text: str, most: int = 200) -> str:
    """`text` for a terminal: one line of at most `most` characters, control characters escaped (\\x1b)."""
    shown = "".join(
        c if c.isprintable() or c in _HARMLESS else c.encode("unicode_escape").decode() for c in text[: most + 1]
    )
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def require_writable(file: Path, flag: str) -> None:
    """Raises UserError if `file`, given by `flag`, cannot be written; to be called before long work."""
    if file.is_dir() or not os.access(file.absolute().parent, os.W_OK):
        raise UserError(f"{flag} {file} cannot be written", "Name a file in a folder that exists")


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turns the OSError of a block that writes a file into a UserError about `what`, its flag and name."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {error.strerror or error}", "Name a file in a folder that exists") from error


def files_in(given: Iterable[Path]) -> list[Path]:
    """Files that are named, and all in folders that are, but hidden ones; in order."""
    found = []
    for path in given:
        inside = (file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        found += sorted(inside) if path.is_dir() else [path]
    return found
