"""docs/design.md's tree and the folders agree, and imports point one way."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = ["core", "catalogue", "text", "data", "evaluate", "train", "artefact", "serve", "commands", "bench"]
LAYERS += ["__main__"]
PACKAGES = ["kernels", "models", "harness", "jobs"]


def modules() -> list[Path]:
    """Tracked modules of the three packages."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "kernels", "models", "harness"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return [Path(line) for line in listed.stdout.split() if line.endswith(".py") and (ROOT / line).exists()]


def imports(file: Path) -> set[str]:
    """Dotted names of what a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_the_tree_names_every_module_and_no_other() -> None:
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8").split("## The tree")[1]
    folder, named = "", []
    for line in re.findall(r"^    ( {0,2}\S+)(?:  .*)?$", text, re.MULTILINE):
        if line.startswith("  "):
            named.append(f"{folder}{line.strip()}")
        else:
            folder = line
    assert sorted(named) == sorted(str(file) for file in modules() if file.name != "__init__.py")


def test_harness_has_eleven_entries_at_its_top() -> None:
    assert len({file.parts[1] for file in modules() if file.parts[0] == "harness"} - {"__init__.py"}) <= 11


def test_imports_point_one_way() -> None:
    wrong = []
    for file in modules():
        for name in imports(file):
            package, *rest = name.split(".")
            if package in PACKAGES and PACKAGES.index(package) > PACKAGES.index(file.parts[0]):
                wrong.append(f"{file} imports {name}")
            if package == file.parts[0] == "harness" and rest and rest[0] in LAYERS:
                own = file.parts[1].removesuffix(".py")
                if own in LAYERS and LAYERS.index(rest[0]) > LAYERS.index(own):
                    wrong.append(f"{file} imports {name}")
    assert not wrong


def test_the_ten_questions_name_what_exists() -> None:
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8").split("## Ten questions")[1].split("\n## ")[0]
    rows = re.findall(r"^\| [^|]+\? \| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)
    assert len(rows) >= 10
    for places, names in rows:
        sources = ""
        for place in re.findall(r"`([^`]+)`", places):
            assert (ROOT / place).exists(), place
            sources += "" if place.endswith("/") else (ROOT / place).read_text(encoding="utf-8")
        for part in re.findall(r"\w+", names) if sources else ():
            assert re.search(rf"^ *(class |def )?{part}\b", sources, re.MULTILINE), f"{places}: {part}"
