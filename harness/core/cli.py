"""Argument parsing of every command: jsonargparse, with one clear line for each mistake."""

from __future__ import annotations

import argparse
import difflib
import errno
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, get_origin

import jsonargparse
from jsonargparse.typing import register_type

from harness.core.errors import UserError
from harness.core.files import printable, read_yaml, require_writable, writing
from harness.core.launcher import end_with_launcher, start_folder
from models.ranges import Range

USER_ERROR_CODE = 2
MOST_KEYS = 60  # of a recipe's that --help lists one by one
LONGEST_LINE = 2000  # characters of an error that are printed
_SAID = "said-"  # files in `start_folder`: mistakes that a rank of this node has told
OTHERS_WAIT = 1.0  # seconds; torchrun looks after its ranks ten times in one
# Errors that are the machine's, not the program's, and what to do about them.
_SYSTEM = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free space there, then start again"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "Allow more open files (ulimit -n)"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ELOOP, errno.ENAMETOOLONG), ""),
}
# C0 and C1 but for \t, \n and \r; and what changes the direction of a text.
_CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_ARROW = re.compile(r"'([^']+)'\. Detail: \[errno \d+\] (.*)")
_CLASS = re.compile(r"<class\s+'(?:\w+\.)*(\w+)'>")
# What gloo and NCCL say when a rank at the other end is gone.
_FOLLOWS = re.compile(r"by peer|[Rr]emote (process|server)|communicator was aborted")


def _register_ranges() -> None:
    """Lets jsonargparse check the types of models/ranges.py."""
    for kind in Range.__subclasses__():
        register_type(kind, kind.number, partial(_number, kind), type_check=lambda *_: False)


def _number(kind: type[Range], value: Any) -> Any:
    """`value` of the command line or a recipe, where YAML takes 1e-3 for a text, as number of that range."""
    try:
        value = kind.number(value) if isinstance(value, str) else value
    except ValueError:
        pass  # kind's own message
    return kind(value)


_register_ranges()


class Parser(jsonargparse.ArgumentParser):
    """jsonargparse's parser that raises UserError, and names the nearest key where one is unknown. Where it has many
    keys, --help lists sections and --help-all the keys.

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
        self._all = False  # of the keys are shown by the help

    def parse(
        self, argv: list[str], recipe: Mapping[str, Any] | None = None, where: str = "recipe"
    ) -> jsonargparse.Namespace:
        """Parses `argv` on top of `recipe`, which is from `where`, and instantiates.

        Raises:
            UserError: anything that is wrong with either.
        """
        self._all = "--help-all" in argv
        argv = ["--help" if arg == "--help-all" else arg for arg in argv]
        argv = self._spelt_out([_underscored(arg) for arg in argv])
        known = {key for key in self.get_defaults().keys() if key != "config"}
        _check_keys(recipe or {}, known, where)
        for key in _given_keys(argv):
            if (
                key not in known
                and not any(name.startswith(f"{key}.") for name in known)
                and key not in ("help", "config")
            ):
                raise UserError(f"command line: unknown key '{key}'", nearest(key, known))
        try:
            given = self.parse_object(dict(recipe)) if recipe else None
            values = self.parse_args(argv, namespace=given)
        except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
            raise UserError(_plain(str(error)), f"See `{self.prog} --help`") from error
        for key, value in values.items():
            for number in value if isinstance(value, tuple | list) else [value]:
                if isinstance(number, float) and not math.isfinite(number):
                    raise UserError(f"{key} is {number}", "It must be a finite number")
                if isinstance(number, int) and abs(number) >= 2**63:
                    shown = number if abs(number) < 10**99 else "far too large"
                    raise UserError(f"{key} is {shown}", f"It must be at most 2**63 - 1 = {2**63 - 1}")
        return self.instantiate(values)

    def _spelt_out(self, argv: list[str]) -> list[str]:
        """`--slices colour,shape` means `--slices [colour,shape]`, `--append` without a value `--append true`."""
        kinds = {f"--{action.dest}": getattr(action, "_typehint", None) for action in self._actions}
        result, previous = [], ""
        for arg, following in zip(argv, [*argv[1:], "--"], strict=False):
            flag, equals, value = arg.partition("=")
            if equals and get_origin(kinds.get(flag)) is tuple and value[:1] != "[":
                arg = f"{flag}=[{value}]"
            elif get_origin(kinds.get(previous)) is tuple and arg[:1] != "[":
                arg = f"[{arg}]"
            result.append(arg)
            if kinds.get(arg) is bool and following.startswith("--"):
                result.append("true")
            previous = flag if not equals else ""
        return result

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The help text, its flags spelt with dashes (a recipe's keys, which have dots, keep their underscores)."""
        keys = [action for action in self._actions if "." in action.dest]
        sections = {} if self._all or len(keys) <= MOST_KEYS else self._sections(keys)
        named = re.findall(r"--([\w.]+)", self.epilog or "")  # keys of the example
        hidden = {action: action.help for action in self._actions if action.dest.split(".")[0] in sections}
        for action in hidden:
            action.help = action.help if action.dest in named else argparse.SUPPRESS
        try:
            text = re.sub(_CLASS, r"\1", super().format_help(*args, **kwargs))
        finally:
            for action, shown in hidden.items():
                action.help = shown
        usage, _, text = text.partition("\n\n")
        usage = " ".join(re.sub(r"\[-(?:[^][]|\[[^]]*\])*\]", "", usage).split())  # without what may be left out
        text = f"{usage} [options]\n\n{text}"
        text = re.sub(r"type:\s+Literal\[[^]]*\],\s+", "", text)  # the choices stand beside the flag
        if sections:
            lines = "\n".join(sections.values())
            more = f"keys of a recipe, which --help-all lists with their defaults:\n{lines}\n\nexample:"
            text = text.replace("example:", more, 1)
        return re.sub(r"--[a-z_]+(?![\w.])", lambda flag: flag[0].replace("_", "-"), text)

    def _sections(self, keys: list[argparse.Action]) -> dict[str, str]:
        """Section of the recipe -> its line in the short help."""
        counts = Counter(action.dest.split(".")[0] for action in keys)
        titles = {
            action.dest.split(".")[0]: group.title or ""
            for group in reversed(self._action_groups)
            for action in group._group_actions
            if "." in action.dest
        }
        return {name: f"  --{name + '.…':<14}{count:>4} keys  {titles[name]}" for name, count in counts.items()}


def nearest(name: str, known: Iterable[str]) -> str:
    """The remedy for a name that is not `known`: the nearest that is."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)
    return f"Did you mean '{near[0]}'?" if near else ""


def read_recipe(path: Path) -> dict[str, Any]:
    """The mapping of a YAML recipe.

    Raises:
        UserError: no such file, or no YAML mapping.
    """
    recipe = read_yaml(path, f"recipe {path}", "Recipes lie in jobs/recipes")
    if not isinstance(recipe, dict):
        raise UserError(f"recipe {path} must be a YAML mapping of keys to values")
    return recipe


def _check_keys(recipe: Mapping[str, Any], known: set[str], where: str) -> None:
    """Raises UserError for a key of `recipe` that is not `known`, or has no value."""
    for key, value in leaves(recipe):
        section = any(name.startswith(f"{key}.") for name in known)
        if key not in known and not section:
            raise UserError(f"{where}: unknown key '{key}'", nearest(key, known))
        if section and value != {}:
            raise UserError(f"{where}: '{key}' must be a mapping of keys to values")
        if value is None:
            raise UserError(f"{where}: '{key}' has no value", "Give it one, or leave the key out")


def leaves(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in a nested mapping."""
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{name}.")
        else:
            yield name, value


def _underscored(arg: str) -> str:
    """--vocab-size and --vocab_size are the same flag."""
    flag, equals, value = arg.partition("=")
    return flag[:2] + flag[2:].replace("-", "_") + equals + value if re.match(r"--[a-z]", arg) else arg


def _given_keys(argv: list[str]) -> list[str]:
    return [match[1] for arg in argv if (match := re.match(r"--([A-Za-z][\w.-]*)", arg))]


def _one_line(message: str) -> str:
    return re.sub(r"\s+", " ", message).strip().rstrip(".")


def _plain(message: str) -> str:
    """jsonargparse's message in one line, without the names of Python's types."""
    message = re.sub(r"Parser key \"([^\"]+)\"", r"\1", _one_line(message))
    if found := re.match(r"(\S+): .*?Not of type \w+: (.*?)(?: - Expected|$)", message):  # of _number
        return f"{found[1]} is {found[2]}"
    union = r"Does not validate .* Subtypes: \[(.*)\] Errors: .* Given value: "
    message = re.sub(union, r"Expected a \1. Got value: ", message)
    message = re.sub(_CLASS, r"\1", message).replace("typing.", "").replace("NoneType", "null")
    if found := re.fullmatch(r"(\S+): Expected a (.*Literal\[.*)\. Got value: (.*)", message):
        *others, last = re.findall(r"'(.+?)'", found[2])
        return f"{found[1]} is {found[3]}. It can be {', '.join(others)} or {last}"
    return message


def check_figures(path: Path | None) -> None:
    """Raises UserError if --json `path` cannot be written; to be called before hours of work."""
    if path is not None:
        require_writable(path, "--json")


def write_figures(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Writes what a command reports to `path` (--json), if one was given.

    Raises:
        UserError: the file cannot be written.
    """
    if path is None:
        return
    with writing(f"--json {path}"):
        path.write_text(json.dumps(figures, indent=1, default=str) + "\n")


def run_command(body: Callable[[], Any]) -> int:
    """Runs a command's body; a UserError or what the system refuses becomes one line on stderr and exit code 2, Ctrl-C
    exit code 130.

    A reader of standard output that goes away, as `head` does, ends nothing: the rest is written nowhere. One of
    several ranks that meets an error leaves the process at once: the end of its groups, or of what holds them, could
    wait for the others.
    """
    try:
        end_with_launcher()
        if sys.unraisablehook is sys.__unraisablehook__:
            sys.unraisablehook = _interrupt_again
        sys.stdout = _output(sys.stdout, sys.__stdout__, "standard output")
        sys.stderr = _output(sys.stderr, sys.__stderr__, "")
        try:
            body()
        finally:
            sys.stdout.flush()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        # DuckDB takes Ctrl-C itself while it runs a query.
        if isinstance(error, KeyboardInterrupt) or str(error) == "Query interrupted":
            print("interrupted", file=sys.stderr, flush=True)
            code = 130
        elif not (code := tell(error)):
            raise
    if _has_peers():
        sys.stdout.flush()
        os._exit(code)
    return code


def _interrupt_again(dropped: Any) -> None:
    """sys.unraisablehook: Ctrl-C that fell into a finalizer, where Python drops it, comes once more a moment later."""
    if not issubclass(dropped.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(dropped)
        return
    main = threading.main_thread().ident
    again = threading.Timer(0.01, signal.pthread_kill, [main, signal.SIGINT])
    again.daemon = True
    with suppress(RuntimeError):  # no threads any more: Python is about to end anyway
        again.start()


class _Output(io.FileIO):
    """The file of a stream whose reader may go away: then what is written goes nowhere.

    Raises:
        OSError: it cannot be written for another reason; once, with the stream's name, and not where that is empty.
    """

    def __init__(self, handle: int, name: str) -> None:
        super().__init__(handle, "w", closefd=False)
        self._stream, self._ended = name, False

    def write(self, data: Any) -> int:
        """As the base class."""
        try:
            return len(data) if self._ended else super().write(data)
        except OSError as error:
            self._ended = True
            if isinstance(error, BrokenPipeError) or not self._stream:
                return len(data)
            error.filename = self._stream
            raise


class _Printed(io.TextIOWrapper):
    """Standard output: control characters are escaped (\\x1b), except tabs, line ends and returns.

    Not for standard error, where progress bars move the cursor and `printable` escapes errors.
    """

    def write(self, text: str) -> int:
        """As the base class."""
        if not text.isprintable():
            text = _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
        return super().write(text)


def _output(stream: Any, original: Any, name: str) -> Any:
    """sys.stdout or sys.stderr on an `_Output`; unchanged where another object has replaced the `original`."""
    if stream is None:  # closed by the shell
        return open(os.devnull, "w")
    if stream is not original:
        return stream
    stream.flush()
    return (_Printed if stream is sys.__stdout__ else io.TextIOWrapper)(
        io.BufferedWriter(_Output(stream.fileno(), name)),
        stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def tell(error: Exception) -> int:
    """Prints `error`, once however often it is told, and returns its exit code; 0, without a word, where the
    interpreter tells it well enough.

    A mistake that all ranks of a node have met is told by the first of them. An error that only follows from the end
    of another rank waits a moment, in which torchrun ends this rank too; where one of this node has told a mistake, it
    is not told.
    """
    mistake = _mistake(error)
    if mistake is None and not _has_peers():
        return 0
    code = 1 if mistake is None else USER_ERROR_CODE
    if getattr(error, "told", False):
        return code
    error.told = True  # type: ignore[attr-defined]
    rank = os.environ.get("RANK", "0")
    if mistake is None:
        if _FOLLOWS.search(str(error)):
            time.sleep(OTHERS_WAIT)
            if (folder := start_folder()) is not None and any(folder.glob(f"{_SAID}*")):
                return code
        lines = [f"[rank {rank}] {line}" for line in "".join(traceback.format_exception(error)).splitlines()]
    elif _first_to_say(str(mistake)):
        lines = [f"error: {mistake}" if rank == "0" else f"error: rank {rank}: {mistake}"]
    else:
        return code
    print("\n".join(printable(line, LONGEST_LINE) for line in lines), file=sys.stderr, flush=True)
    return code


def _mistake(error: Exception) -> UserError | None:
    """The UserError that `error` amounts to: itself, or one made of a system error about a file or a limit; None for
    others.
    """
    if not isinstance(error, OSError):
        return error if isinstance(error, UserError) else None
    file, reason = error.filename, error.strerror or str(error)
    if file is None and (found := _ARROW.search(reason)):
        file, reason = found.groups()
    elif file is None and isinstance(error, FileNotFoundError):  # Arrow's too, for one of several tables
        file, reason = str(error), "No such file or directory"
    if file is None and error.errno not in _SYSTEM:
        return None
    return UserError(f"{'' if file is None else f'{os.fsdecode(file)}: '}{reason}", _SYSTEM.get(error.errno or 0, ""))


def _has_peers() -> bool:
    """True in a group of ranks that a launcher has started; not for those of multiprocessing, as in tests."""
    dist: Any = sys.modules.get("torch.distributed")  # imported only by commands that make groups
    grouped = dist is not None and dist.is_initialized() and dist.get_world_size() > 1
    return grouped and multiprocessing.parent_process() is None


def _first_to_say(what: str) -> bool:
    """True for the first rank of this node to say `what`, numbers aside."""
    folder = start_folder()
    if folder is None:
        return True
    key = hashlib.sha256(re.sub(r"\d", "", what).encode()).hexdigest()[:16]
    try:
        (folder / f"{_SAID}{key}").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # better twice than never
        return True
    return True
