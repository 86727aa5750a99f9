"""The commands of README and docs/your-data.md, run in order and unchanged on a made-up shop; links of all pages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.catalogue.catalogue import Catalogue
from tests.shops import draw_shop

ROOT = Path(__file__).parent.parent
# TensorBoard and the service do not end by themselves.
SHELL = """set -eu
limited() { timeout 30 "$@" || [ $? = 124 ]; }
tensorboard() { limited tensorboard "$@"; }
shelfmark() { if [ "$1" = serve ]; then limited shelfmark "$@"; else command shelfmark "$@"; fi; }
"""


def blocks(page: str, *sections: str) -> str:
    """The indented blocks of some sections of a page, up to a section's first subsection, without fenced blocks."""
    text = re.sub(r"(?ms)^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"))
    found = []
    for section in sections:
        assert f"\n## {section}\n" in text, f"{page} has no section {section}"
        body = re.split(r"\n##+ ", text.split(f"\n## {section}\n")[1])[0]
        found += re.findall(r"(?m)^    (.*)$", body)
    return "\n".join(found) + "\n"


def run(commands: str, folder: Path) -> str:
    """Runs a block as a user would, in a folder with the shop, the project's jobs/ and its environment."""
    draw_shop(folder)
    shutil.copy(folder / "photos" / "03" / "2.jpg", folder / "photo.jpg")
    (folder / "jobs").symlink_to(ROOT / "jobs")
    (folder / ".venv").symlink_to(Path(sys.executable).parents[1])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", SHELL + commands], cwd=folder, env=environment, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr
    return done.stdout


def test_the_first_command_prints_the_others(tmp_path: Path) -> None:
    """The short way's first line; what it prints next is what the page says."""
    first, *others = blocks("docs/your-data.md", "The short way").splitlines()
    assert first.startswith("shelfmark init ")
    told = run(first, tmp_path)
    printed = [line.strip() for line in told.split("next:")[1].splitlines() if line.strip()]
    ranks = min(len(os.sched_getaffinity(0)), 8)
    assert printed == [line.replace("--ranks 2", f"--ranks {ranks}") for line in others]
    assert "product = 'sku'" in told and "the text fills" in told
    assert {"train", "val", "test", "all"} == set(Catalogue(tmp_path / "shop/catalogue").meta["counts"]["splits"])


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_between_pages_lead_somewhere() -> None:
    """Files and headings, from every Markdown page at the root and in docs/."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    links = [
        (page, link) for page in pages for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    ]
    assert len(links) > 100
    for page, link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not link.startswith("https://"):
            assert target.exists() and (not anchor or anchor in anchors(target)), f"{page}: {link}"


@pytest.mark.full  # trains, exports and searches
@pytest.mark.parametrize(
    "page,sections",
    [
        ("README.md", ("Train on your photos",)),
        ("docs/your-data.md", ("The short way", "1. The table", "2. Classes and text")),
    ],
)
def test_the_commands_of_a_page_run_unchanged(page: str, sections: tuple[str, ...], tmp_path: Path) -> None:
    told = run(blocks(page, *sections), tmp_path)
    assert "recall_at_1" in told and "found" in told
    assert (tmp_path / "found.png").stat().st_size > 1000
    assert page != "README.md" or "http://127.0.0.1:8080/" in told
