"""The service's page in a real Chromium: by mouse, by keyboard, on a phone; empty, slow, refused."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from harness.artefact.artefact import Artefact, Photo
from tests.service import Running, exported, running

pytestmark = pytest.mark.full
FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
CONTRAST = """() => {
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const solid = (node) => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (!/, 0\\)$|transparent/.test(colour)) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const bad = [];
  for (const node of document.querySelectorAll("h1, h2, h3, p, b, span, label, button, legend, a, dt, dd")) {
    const words = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!words || !node.checkVisibility()) continue;
    const [a, b] = [light(getComputedStyle(node).color), light(solid(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) bad.push(`${node.textContent.trim().slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return bad;
}"""

KEY = "0123456789abcdef-first"


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory, catalogue: Path) -> Path:
    return exported(tmp_path_factory.mktemp("served"), catalogue)


@pytest.fixture(scope="module")
def service(artefact: Path) -> Iterator[Running]:
    with running(artefact) as started:
        yield started


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A query photo, large enough to draw on."""
    file = tmp_path / "photo.png"
    Image.effect_noise((640, 480), 90).convert("RGB").save(file)
    return file


@contextmanager
def opened(chromium: Any, url: str, complaints: int = 0, **options: Any) -> Iterator[Any]:
    """The page in a fresh context. Fails on an error of the page, and on a request to another host; the console tells
    `complaints` refused requests.
    """
    context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    page, told, elsewhere = context.new_page(), [], []
    page.on("console", lambda line: told.append(line.text) if line.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: told.append(f"page: {error}"))
    own = (url, "blob:", "data:")
    page.on("request", lambda asked: None if asked.url.startswith(own) else elsewhere.append(asked.url))
    page.set_default_timeout(20_000)
    page.goto(url)
    yield page
    context.close()
    assert not elsewhere and len(told) == complaints, (elsewhere, told)


def rows(page: Any) -> list[int]:
    """Rows of the documents shown."""
    return [int(image.get_attribute("src").split("/")[1]) for image in page.locator(".card img").all()]


def boxed(page: Any) -> tuple[int, ...]:
    """x, y, width, height of the part that is marked, as the page tells them."""
    words = page.locator("#box").get_attribute("aria-label").split()
    return int(words[5].strip(",")), int(words[6].strip(".")), int(words[0]), int(words[2])


def wanted(artefact: Path, photo: Path, box: tuple[int, ...] = (), k: int = 12, where: Any = None) -> list[int]:
    found = Artefact(artefact)
    return [hit.row for hit in found.search(found.embed([Photo.open(photo, box)]), k, where)[0]]


def test_a_photo_a_part_of_it_and_filters(chromium: Any, service: Running, artefact: Path, photo: Path) -> None:
    with opened(chromium, service.url) as page:
        page.wait_for_selector(".samples img")
        assert page.locator(".card").count() == 0 and "Products appear here" in page.inner_text("#notice")
        page.set_input_files("#file", photo)
        page.wait_for_selector(".card")
        assert rows(page) == wanted(artefact, photo)
        frame = page.locator("#frame").bounding_box()
        scale = 640 / frame["width"]
        with page.expect_response("**/search?*") as answer:
            page.mouse.move(frame["x"] + 10, frame["y"] + 15)
            page.mouse.down()
            page.mouse.move(frame["x"] + 210, frame["y"] + 165, steps=4)
            page.mouse.up()
        box = boxed(page)
        assert box == pytest.approx((10 * scale, 15 * scale, 200 * scale, 150 * scale), abs=2)
        assert f"box={','.join(map(str, box))}" in answer.value.url.replace("%2C", ",")
        page.wait_for_selector("#results[aria-busy=false]")
        assert rows(page) == wanted(artefact, photo, box)
        with page.expect_response("**/search?*"):
            page.mouse.move(frame["x"] + 100, frame["y"] + 90)  # inside: the part moves
            page.mouse.down()
            page.mouse.move(frame["x"] + 130, frame["y"] + 100, steps=3)
            page.mouse.up()
        moved = boxed(page)
        assert moved[2:] == box[2:] and moved[0] - box[0] == pytest.approx(30 * scale, abs=2)
        page.wait_for_selector("#results[aria-busy=false]")
        colour = page.locator("fieldset").first.locator("label").first
        with page.expect_response("**/search?*"):
            colour.click()
        page.wait_for_selector("#results[aria-busy=false]")
        name = page.locator("fieldset legend").first.inner_text().lower()
        value = colour.inner_text().strip()
        assert rows(page) == wanted(artefact, photo, moved, where={name: [value]})
        assert page.inner_text("#chosen") == "1" and page.inner_text("#status").startswith(f"{len(rows(page))} product")
        page.locator(".card").first.click()
        title = page.locator(".card b").first.inner_text()
        assert page.inner_text("#detail-title") == title and page.locator("#detail").is_visible()
        assert page.evaluate("document.querySelector('#detail-photo').naturalWidth") > 0
        shares = Artefact(artefact).documents.slice(rows(page)[0], 1).to_pylist()[0]
        image, concepts = (round(100 * shares[f"part_{name}"]) for name in ("image", "concepts"))
        assert page.locator("#made-parts li").all_inner_texts() == [f"Image {image} %", f"Concepts {concepts} %"]
        widths = [page.locator("#made-bar i").nth(n).bounding_box()["width"] for n in range(2)]
        assert widths[0] / sum(widths) == pytest.approx(shares["part_image"], abs=0.02)
        page.locator("#why").wait_for()
        assert page.locator("#why-photo").get_attribute("aria-label").startswith("Most like it: row ")
        page.keyboard.press("Escape")
        assert not page.locator("#detail").is_visible()
        assert page.evaluate("document.activeElement.className") == "card"


def test_nothing_passes_the_filters(chromium: Any, service: Running, artefact: Path, photo: Path) -> None:
    colours, shapes = (Artefact(artefact).documents.column(name).to_pylist() for name in ("colour", "shape"))
    there = {*zip(colours, shapes, strict=True)}
    colour, shape = next(pair for pair in itertools.product(colours, shapes) if pair not in there)
    with opened(chromium, service.url) as page:
        page.wait_for_selector(".samples img")
        page.set_input_files("#file", photo)
        page.wait_for_selector(".card")
        before = rows(page)
        for value in (colour, shape):
            with page.expect_response("**/search?*"):
                page.locator(".pill", has_text=value).click()
        page.get_by_text("No product matches these filters").wait_for()
        assert page.locator(".card").count() == 0 and page.inner_text("#chosen") == "2"
        page.locator("#notice button").click()
        page.wait_for_selector(".card")
        assert rows(page) == before and page.locator("#notice").is_hidden() and page.locator("#chosen").is_hidden()


def test_an_error_is_told_and_left_behind(chromium: Any, service: Running, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"not a photo")
    (tmp_path / "notes.txt").write_bytes(b"words")
    with opened(chromium, service.url, complaints=2) as page:
        page.wait_for_selector(".samples img")
        page.set_input_files("#file", tmp_path / "notes.txt")
        assert "notes.txt is not a photo" in page.locator("[role=alert]").inner_text()
        page.set_input_files("#file", tmp_path / "broken.jpg")
        page.get_by_text("not an image").wait_for()
        assert page.locator(".card, .ghost").count() == 0
        page.context.set_offline(True)
        page.locator("#notice button").click()
        page.get_by_text("cannot be reached").wait_for()
        page.context.set_offline(False)
        page.set_input_files("#another", photo)
        page.wait_for_selector(".card")
        assert page.locator("#notice").is_hidden()


def test_without_a_mouse(chromium: Any, service: Running, artefact: Path, photo: Path) -> None:
    """Tab reaches everything in order; arrow keys move and resize the part; the status is told."""
    with opened(chromium, service.url) as page:
        page.wait_for_selector(".samples img")
        reached = []
        for _ in range(3):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
        assert reached == ["skip", "brand", "file"]
        page.set_input_files("#file", photo)
        page.wait_for_selector(".card")
        page.locator("#part").focus()
        with page.expect_response("**/search?*"):
            page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "box" and boxed(page) == (128, 96, 384, 288)
        with page.expect_response("**/search?*"):
            page.keyboard.press("ArrowRight")
            page.keyboard.press("Shift+ArrowDown")
        assert boxed(page) == (144, 96, 384, 304)
        page.wait_for_selector("#results[aria-busy=false]")
        assert rows(page) == wanted(artefact, photo, boxed(page))
        with page.expect_response("**/search?*"):
            page.keyboard.press("Delete")
        assert page.locator("#box").is_hidden() and page.evaluate("document.activeElement.id") == "part"
        page.locator("fieldset input").first.focus()
        with page.expect_response("**/search?*"):
            page.keyboard.press("Space")
        page.wait_for_selector("#results[aria-busy=false]")
        page.locator(".card").first.focus()
        page.keyboard.press("Enter")
        assert page.locator("#detail").is_visible()
        named = page.evaluate(
            "[...document.querySelectorAll(`input, button, [tabindex='0']`)].filter((node) => !(node.labels?.length"
            " || node.getAttribute('aria-label') || node.textContent.trim())).map((node) => node.id)"
        )
        assert named == [], "controls without a name"
        assert page.locator("#status").get_attribute("role") == "status"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(chromium: Any, service: Running, photo: Path, scheme: str) -> None:
    """Nothing is wider than 360 pixels, words are legible, buttons are large; a part is marked by touch."""
    screen = {"width": 360, "height": 740}
    with opened(chromium, service.url, viewport=screen, is_mobile=True, has_touch=True, color_scheme=scheme) as page:
        page.wait_for_selector(".samples img")
        assert page.evaluate(CONTRAST) == []
        assert page.locator("#camera").get_attribute("capture") == "environment" and page.locator(".touch").is_visible()
        page.set_input_files("#camera", photo)
        page.wait_for_selector(".card")
        with page.expect_response("**/search?*"):
            page.locator("#part").tap()
        page.locator("#filters summary").tap()
        page.wait_for_selector("#results[aria-busy=false]")
        assert page.evaluate("document.documentElement.scrollWidth") == 360 and page.evaluate(CONTRAST) == []
        small = page.evaluate(
            "[...document.querySelectorAll('button, .button, .pill')].filter((node) => node.checkVisibility()"
            " && node.getBoundingClientRect().height < 34).map((node) => node.textContent)"
        )
        assert small == []
        page.locator(".card").first.tap()
        assert page.evaluate("document.querySelector('#detail').getBoundingClientRect().right") <= 360
        assert page.evaluate(CONTRAST) == []


def test_a_sample_of_the_catalogue_starts_a_search(chromium: Any, service: Running) -> None:
    with opened(chromium, service.url) as page:
        page.locator(".samples button").first.click()
        page.wait_for_selector(".card")
        assert page.locator("#stage").is_visible()


def test_the_page_asks_for_the_key(chromium: Any, artefact: Path, photo: Path, tmp_path: Path) -> None:
    """A wrong key is asked for again; with the right one pictures are shown too."""
    (tmp_path / "keys").write_text(KEY)
    with (
        running(artefact, api_key_file=tmp_path / "keys") as locked,
        opened(chromium, locked.url, complaints=2) as page,
    ):
        for key in ("wrong-wrong-wrong-wrong", KEY):
            page.wait_for_selector("#ask[open]")
            page.fill("#key", key)
            page.keyboard.press("Enter")
        page.wait_for_selector(".samples img")
        page.set_input_files("#file", photo)
        page.wait_for_selector(".card")
        page.locator(".card img[src^='blob:']").first.wait_for()


def test_a_large_photo_is_made_smaller_in_the_browser(chromium: Any, artefact: Path, tmp_path: Path) -> None:
    Image.effect_noise((1600, 1200), 90).save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size > 300_000
    with running(artefact, max_bytes=300_000) as narrow, opened(chromium, narrow.url) as page:
        page.wait_for_selector(".samples img")
        page.set_input_files("#file", tmp_path / "large.png")
        page.wait_for_selector(".card")
        assert page.evaluate("document.querySelector('#photo').naturalWidth") < 1600
