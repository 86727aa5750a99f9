"""A real Chromium, for tests of pages."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --virtual-time-budget=10000"
)
OUTER = """<body><script>
addEventListener("load", () => { for (const frame of document.querySelectorAll("iframe")) {
  const page = frame.contentDocument;
  const pictures = [...page.images];
  document.title += frame.width + ":" + page.documentElement.scrollWidth + ":" + pictures.length + ":"
    + pictures.filter((image) => image.naturalWidth > 0).length + ";";
} });
</script>"""


def dump_dom(url: str, folder: Path) -> str:
    """The page as the browser has it after its scripts ran; skips the test where there is no Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    command = [chromium, *FLAGS.split(), f"--user-data-dir={folder}", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def measured(page: Path, widths: tuple[int, ...], folder: Path) -> list[tuple[int, int, int]]:
    """Width that a page without scripts takes, its pictures and those that are shown, in frames of these widths."""
    text = page.read_text(encoding="utf-8").replace(' loading="lazy"', "")
    frames = "".join(f'<iframe width="{w}" height="900" srcdoc="{html.escape(text)}"></iframe>' for w in widths)
    outer = folder / "outer.html"
    outer.write_text(f"{OUTER}{frames}", encoding="utf-8")
    title = re.search(r"<title>([^<]*)</title>", dump_dom(outer.as_uri(), folder / "profile"))
    assert title is not None
    found = [tuple(map(int, part.split(":"))) for part in title.group(1).strip(";").split(";")]
    assert [width for width, *_ in found] == [*widths]
    return [(taken, pictures, shown) for _, taken, pictures, shown in found]
