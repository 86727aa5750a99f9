"""Size and shape of a source tree: python -m tests.house [ROOT].

ROOT is a checkout of any commit, this one by default. Counts Python files only.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from harness.core.tables import Scalar, format_table

PACKAGES = ("kernels", "models", "harness", "jobs", "tests")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
TEXT = {"STRING", "FSTRING_MIDDLE"}  # the latter since Python 3.12, which splits f-strings
LAYOUT = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER", "ENCODING"}
CLAUSE = re.compile(r"(What|How|Where|Whether|Which)\b")
WORDS = {"'is no', 'are no'": r"(?<![Tt]here )\b(is|are) no ", "'alone'": r"\balone\b", "'anew'": r"\banew\b",
         "'of before'": r"\bof before\b"}  # fmt: skip


class Source:
    """A parsed file of the tree."""

    def __init__(self, root: Path, file: Path):
        self.place = file.relative_to(root)
        self.text = file.read_text(encoding="utf-8")
        self.nodes = list(ast.walk(ast.parse(self.text)))
        self.tokens = list(tokenize.generate_tokens(io.StringIO(self.text).readline))

    @property
    def part(self) -> str:
        """The package, or `harness/FOLDER`."""
        package, *folders = self.place.parts[:-1]
        return f"{package}/{folders[0]}" if package == "harness" and folders else package

    @property
    def unit(self) -> str:
        """Name of the entry of harness/ that the file belongs to."""
        return self.place.parts[1].removesuffix(".py")

    @cached_property
    def docstrings(self) -> list[ast.Expr]:
        """The docstrings' nodes."""
        documented = [node for node in self.nodes if isinstance(node, DOCUMENTED) and ast.get_docstring(node)]
        return [node.body[0] for node in documented if isinstance(node.body[0], ast.Expr)]

    def code_lines(self) -> int:
        """Lines with code: neither blank, nor only a comment, nor a docstring."""
        lines: set[int] = set()
        for token in self.tokens:
            if tokenize.tok_name[token.type] not in LAYOUT:
                lines.update(range(token.start[0], token.end[0] + 1))
        for docstring in self.docstrings:
            lines.difference_update(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
        return len(lines)

    def imported(self) -> set[str]:
        """Entries of harness/ that the file imports, wherever in it; not its own."""
        found = set()
        for node in self.nodes:
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        return {name.split(".")[1] for name in found if name.startswith("harness.")} - {self.unit}

    def prose(self) -> Iterator[str]:
        """Strings and comments."""
        for token in self.tokens:
            if tokenize.tok_name[token.type] in TEXT | {"COMMENT"}:
                yield " ".join(token.string.split())


def comprehensions(statement: ast.stmt) -> int:
    """Comprehensions of a statement, without those of the statements within it."""
    count, left = 0, [child for child in ast.iter_child_nodes(statement) if not isinstance(child, ast.stmt)]
    while left:
        node = left.pop()
        count += isinstance(node, COMPREHENSIONS)
        left += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.stmt)]
    return count


def floors(arrows: dict[str, set[str]], unit: str, above: tuple[str, ...] = ()) -> int:
    """Units on the longest import path down from `unit`; an import that closes a circle counts nothing."""
    below = [name for name in arrows.get(unit, ()) if name not in above]
    return 1 + max((floors(arrows, name, (*above, unit)) for name in below), default=0)


def shape(sources: list[Source]) -> list[dict[str, Scalar]]:
    """Entries of harness/, imports among them."""
    harness = [source for source in sources if source.part.startswith("harness")]
    entries = {source.unit for source in harness} - {"__init__"}
    arrows: dict[str, set[str]] = {}
    for source in harness:
        arrows.setdefault(source.unit, set()).update(source.imported() & entries)
    return [
        {"harness/": "entries", "count": len(entries)},
        {"harness/": "import arrows between them", "count": sum(map(len, arrows.values()))},
        {
            "harness/": "floors: entries on the longest import path",
            "count": max(floors(arrows, unit) for unit in entries),
        },
    ]


def style(sources: list[Source]) -> dict[str, Scalar]:
    """Counts of what makes code and prose hard to read."""
    count: Counter[str] = Counter()
    for source in sources:
        count["docstrings"] += len(source.docstrings)
        count["docstrings that begin with What, How, Where, Whether, Which"] += sum(
            CLAUSE.match(ast.literal_eval(docstring.value).strip()) is not None for docstring in source.docstrings
        )
        count["lines over 120 columns"] += sum(len(line) > 120 for line in source.text.splitlines())
        count["statements with two or more comprehensions"] += sum(
            comprehensions(node) > 1 for node in source.nodes if isinstance(node, ast.stmt)
        )
        for text in source.prose():
            for word, pattern in WORDS.items():
                count[word] += len(re.findall(pattern, text))
    return dict(count)


def main(root: Path) -> None:
    """Prints three tables for the tree at `root`."""
    sources = [Source(root, file) for package in PACKAGES for file in sorted((root / package).rglob("*.py"))]
    lines: Counter[str] = Counter()
    for source in sources:
        lines[source.part] += source.code_lines()
    lines["harness, all"] = sum(count for part, count in lines.items() if part.startswith("harness"))
    counted: list[dict[str, Scalar]] = [{"code lines": part, "count": count} for part, count in lines.items()]
    tests = style([source for source in sources if source.part == "tests"])
    product = style([source for source in sources if source.part != "tests"])
    print(format_table(shape(sources)), "\n")
    print(format_table(counted), "\n")
    print(
        format_table([{"prose and layout": key, "product": product[key], "tests": tests.get(key)} for key in product])
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
