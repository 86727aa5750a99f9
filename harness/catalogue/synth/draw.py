"""Drawing of a product's clean picture: shaded parts of the unit square, at twice the size, then reduced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, cached_property
from math import atan2, cos, hypot, pi, sin

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from harness.catalogue.synth.products import BRANDS, COLOURS, Product

Points = Sequence[tuple[float, float]]  # x to the right and y down, in 0..1
Colour = tuple[float, float, float]  # red, green, blue in 0..255
Floats = npt.NDArray[np.float32]

SUPERSAMPLE = 2
CREAM: Colour = (250, 246, 232)
INK: Colour = (40, 38, 44)
METAL: Colour = (190, 194, 200)
GLASS: Colour = (206, 224, 226)
STALK: Colour = (104, 70, 40)
CELLS = 7  # repeats of a pattern along the picture's side: wide enough to be told apart at 64 pixels


def darker(colour: Colour, factor: float = 0.7) -> Colour:
    """The colour with less light."""
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


def oval(x: float, y: float, rx: float, ry: float, start: float = 0, stop: float = 2 * pi) -> Points:
    """Points of an ellipse, or of its arc from `start` to `stop` (radians, clockwise from the right)."""
    return [(x + rx * cos(t), y + ry * sin(t)) for t in np.linspace(start, stop, 48)]


def box(x0: float, y0: float, x1: float, y1: float, radius: float = 0.02) -> Points:
    """A rectangle with round corners."""
    corners = ((x1, y1, -1, -1), (x0, y1, 1, -1), (x0, y0, 1, 1), (x1, y0, -1, 1))
    arcs = [
        oval(x + a * radius, y + b * radius, radius, radius, i * pi / 2, (i + 1) * pi / 2)[::6]
        for i, (x, y, a, b) in enumerate(corners)
    ]
    return [point for arc in arcs for point in arc]


def mirrored(half: Sequence[tuple[float, float]]) -> Points:
    """An outline symmetric about x = 0, from its right half, top to bottom."""
    return [*half, *[(-x, y) for x, y in reversed(half)]]


def profile(*half: tuple[float, float]) -> Points:
    """A symmetric outline from (half width, y) pairs, top to bottom."""
    return [(0.5 + x, y) for x, y in mirrored(half)]


def smooth(points: Points, rounds: int = 3) -> Points:
    """Chaikin's corner cutting of a closed outline."""
    line = np.array(points)
    for _ in range(rounds):
        after = np.roll(line, -1, 0)
        line = np.stack([0.75 * line + 0.25 * after, 0.25 * line + 0.75 * after], 1).reshape(-1, 2)
    return [(float(x), float(y)) for x, y in line]


def sign(name: str, x: float, y: float, r: float) -> Points:
    """A brand's sign of radius `r` around (x, y)."""
    turn = np.linspace(0, 2 * pi, 48, endpoint=False)
    corners: dict[str, list[tuple[float, float]]] = {  # (distance, angle clockwise from the top)
        "star": [((1, 0.42)[i % 2], i * pi / 5) for i in range(10)],
        "disc": [(0.9, t) for t in turn],
        "diamond": [((1, 0.65)[i % 2], i * pi / 2) for i in range(4)],
        "triangle": [(1, i * 2 * pi / 3) for i in range(3)],
        "bolt": [(1, 0.2), (0.25, 0.9), (0.55, 1.4), (1, pi + 0.2), (0.25, pi + 0.9), (0.55, pi + 1.4)],
        "drop": [(0.55 + 0.45 * max(0.0, cos(t)) ** 3, t) for t in turn],
        "leaf": [(hypot(cos(t), 0.6 * sin(t) ** 3), atan2(0.6 * sin(t) ** 3, cos(t)) + 0.7) for t in turn],
        "flower": [(0.78 + 0.22 * cos(6 * t), t) for t in turn],
        "hexagon": [(0.95, i * pi / 3) for i in range(6)],
        "cross": [(1, a + i * pi / 2) if a else (0.42, (i + 0.5) * pi / 2) for i in range(4) for a in (-0.3, 0.3, 0)],
    }
    if name == "heart":
        return [(x + r * sin(t) ** 3, y - r * (13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t)) / 16) for t in turn]
    if name == "moon":
        outer = oval(x, y, r, r, 0.3 * pi, 1.7 * pi)
        return [*outer, *oval(x + 0.42 * r, y, 0.82 * r, 0.82 * r, 0.3 * pi, 1.7 * pi)[::-1]]
    return [(x + r * d * sin(t), y - r * d * cos(t)) for d, t in corners[name]]


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


class Canvas:
    """A picture of one product in the making.

    Args:
        product: the product.
        size: side of the finished picture in pixels.
    """

    def __init__(self, product: Product, size: int) -> None:
        self.product = product
        self.side = SUPERSAMPLE * size
        self.base: Colour = COLOURS[product.colour]
        self.accent: Colour = COLOURS[product.accent]
        self.ink = self.base if sum(self.base) < 420 else INK  # stands out on paper
        self.emblem = (0.5, 0.6, 0.15)  # x, y and radius of the emblem pattern's sign
        self._rgb = np.zeros((self.side, self.side, 3), np.float32)
        self._alpha = np.zeros((self.side, self.side), np.float32)

    @cached_property
    def texture(self) -> Floats:
        """The product's pattern over the whole square: [side, side, 3]."""
        y, x = np.mgrid[: self.side, : self.side].astype(np.float32) / self.side * CELLS
        on = {
            "striped": y % 1 < 0.5,
            "dotted": ((x % 1 - 0.5) ** 2 + ((y + 0.5 * (x // 1 % 2)) % 1 - 0.5) ** 2) < 0.085,
            "checked": (x // 0.8 + y // 0.8) % 2 < 1,
            "zigzag": (y * 0.9 + np.abs(x % 1 - 0.5)) % 1 < 0.5,
            "two-tone": y > 0.62 * CELLS,
            "diagonal": (x + y) * 0.75 % 1 < 0.45,
        }.get(self.product.pattern)
        if self.product.pattern == "emblem":
            on = self._mask(
                lambda draw, scale: draw.polygon(scale(sign(BRANDS[self.product.brand], *self.emblem)), 255)
            )
            on = np.asarray(on) > 127
        if on is None:
            on = np.zeros((self.side, self.side), bool)
        return np.where(on[..., None], self.accent, self.base).astype(np.float32)

    def _mask(
        self, paint: Callable[[ImageDraw.ImageDraw, Callable[[Points], list[tuple[float, float]]]], None]
    ) -> Image.Image:
        image = Image.new("L", (self.side, self.side))
        paint(ImageDraw.Draw(image), lambda points: [(x * self.side, y * self.side) for x, y in points])
        return image

    def part(self, points: Points, colour: Colour | None = None, shade: str = "flat", light: float = 1.0) -> None:
        """Fills an outline with a colour, or with the product's pattern; `shade` is a key of _SHADES."""
        self._lay(self._mask(lambda draw, scale: draw.polygon(scale(points), fill=255)), colour, shade, light)

    def line(self, points: Points, width: float, colour: Colour, shade: str = "none") -> None:
        """Draws an open line; `width` as a share of the side."""
        pixels = max(1, round(width * self.side))
        self._lay(
            self._mask(lambda draw, scale: draw.line(scale(points), fill=255, width=pixels, joint="curve")),
            colour,
            shade,
        )

    def text(self, words: str, x: float, y: float, width: float, height: float, colour: Colour) -> None:
        """Prints words centred at (x, y), no wider and no higher than given."""
        size = height * self.side
        size *= min(1.0, width * self.side / _font(max(1, round(size))).getlength(words))
        font = _font(max(4, int(size)))
        self._lay(
            self._mask(lambda draw, scale: draw.text(scale([(x, y)])[0], words, 255, font, anchor="mm")), colour, "none"
        )

    def sign(self, x: float, y: float, r: float, colour: Colour) -> None:
        """Prints the brand's sign."""
        self.part(sign(BRANDS[self.product.brand], x, y, r), colour, "none")

    def label(self, x0: float, y0: float, x1: float, y1: float, shade: str = "cylinder") -> None:
        """A paper label: brand, sign and small print."""
        self.part(box(x0, y0, x1, y1, 0.015), CREAM, shade)
        x, width, height = (x0 + x1) / 2, x1 - x0, y1 - y0
        self.text(self.product.brand, x, y0 + 0.2 * height, 0.88 * width, 0.42 * height, INK)
        self.sign(x, y0 + 0.55 * height, 0.2 * min(width, height), self.ink)
        self.text(self.product.variant, x, y0 + 0.87 * height, 0.8 * width, 0.2 * height, INK)

    def _lay(self, mask: Image.Image, colour: Colour | None, shade: str, light: float = 1.0) -> None:
        bounds = mask.getbbox()
        if bounds is None:
            return
        x0, y0, x1, y1 = bounds
        at = np.s_[y0:y1, x0:x1]
        cover = np.asarray(mask.crop(bounds), np.float32) / 255
        fill = np.array(colour, np.float32) if colour else self.texture[at]
        if shade != "none":
            gain, shine = _SHADES[shade](*_grid(y1 - y0, x1 - x0))
            edge = mask.crop(bounds).filter(ImageFilter.BoxBlur(self.side / 60))
            # Darker towards the edge, as if it were turned away.
            gain = gain * light * (0.72 + 0.28 / 255 * np.asarray(edge, np.float32))
            fill = fill * gain[..., None] + shine[..., None]
        self._rgb[at] += cover[..., None] * (fill - self._rgb[at])
        self._alpha[at] = np.maximum(self._alpha[at], cover)

    def finish(self) -> Image.Image:
        """Returns the RGBA picture of the requested size, cut to its drawn part."""
        rgba = np.dstack([self._rgb, self._alpha * 255]).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(rgba).reduce(SUPERSAMPLE)
        return image.crop(image.getbbox())


def _grid(height: int, width: int) -> tuple[Floats, Floats]:
    v, u = np.mgrid[:height, :width].astype(np.float32)
    return 2 * u / max(1, width - 1) - 1, 2 * v / max(1, height - 1) - 1


def _ball(u: Floats, v: Floats) -> tuple[Floats, Floats]:
    depth = np.sqrt(np.clip(1 - u * u - v * v, 0, 1))
    facing = -0.45 * u - 0.55 * v + 0.7 * depth
    return 0.5 + 0.55 * facing, 90 * np.exp(-((u + 0.4) ** 2 + (v + 0.45) ** 2) / 0.03)


# Factor on the colour and white light added to it, from places in -1..1 across the part.
_SHADES: dict[str, Callable[[Floats, Floats], tuple[Floats, Floats]]] = {
    "flat": lambda u, v: (1.0 - 0.07 * (u + v), 0 * u),
    "cylinder": lambda u, v: (0.5 + 0.56 * np.cos(1.2 * u + 0.35), 45 * np.exp(-(((u + 0.55) / 0.13) ** 2))),
    "ball": _ball,
    "cloth": lambda u, v: (0.97 + 0.07 * np.sin(7 * u + 2 * v + np.sin(4 * v)) - 0.08 * np.abs(u), 0 * u),
}


def on_paper(picture: Image.Image, side: int) -> Image.Image:
    """A cut-out product on white paper with a soft shadow: RGB, `side` x `side` pixels."""
    paper = Image.new("RGB", (side, side), (250, 250, 249))
    scale = 0.86 * side / max(picture.size)
    picture = picture.resize([max(1, round(scale * length)) for length in picture.size], Image.Resampling.LANCZOS)
    x, y = (side - picture.width) // 2, (side - picture.height) // 2
    shadow = Image.new("L", paper.size)
    shadow.paste(picture.getchannel("A").point(lambda value: value * 0.35), (x + side // 50, y + side // 40))
    paper.paste((90, 90, 96), None, shadow.filter(ImageFilter.GaussianBlur(side / 50)))
    paper.paste(picture, (x, y), picture)
    return paper
