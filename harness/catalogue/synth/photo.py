"""Photos made from clean pictures: ground, neighbours, perspective, light, occlusion, blur and noise; and documents'
pictures of several products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import cos, pi, sin

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from harness.catalogue.synth.draw import smooth

Floats = npt.NDArray[np.float32]
LONG_SIDE = (192, 256)  # pixels, least and most
SHORT_SIDE = 192
# Centres of the products in a picture of two, three and four, as shares of its side; least and most of their longer
# side. Their edges stay within the window that evaluation cuts out, or nearly.
_PLACES = {
    2: (((0.29, 0.5), (0.71, 0.5)), (0.44, 0.54)),
    3: (((0.3, 0.31), (0.7, 0.31), (0.5, 0.71)), (0.37, 0.45)),
    4: (((0.3, 0.3), (0.7, 0.3), (0.3, 0.7), (0.7, 0.7)), (0.34, 0.42)),
}


def photograph(picture: Image.Image, others: Sequence[Image.Image], rng: np.random.Generator) -> Image.Image:
    """A photo of the product in `picture`.

    Args:
        picture: the product cut out, RGBA.
        others: other products cut out, RGBA; some appear small, at the border, and never hide much.
        rng: the source of every choice.

    Returns:
        RGB, 192 pixels by 192 to 256, upright or lying.
    """
    size = [int(rng.integers(LONG_SIDE[0], LONG_SIDE[1] + 1)), SHORT_SIDE]
    width, height = size if rng.random() < 0.6 else size[::-1]
    photo = Image.fromarray(_GROUNDS[int(rng.integers(len(_GROUNDS)))](width, height, rng))
    behind = int(rng.integers(0, 3))
    for other in others[:behind]:
        _paste(photo, other, _border_place(width, height, rng), rng.uniform(0.3, 0.45) * SHORT_SIDE, rng)
    centre = (width * rng.uniform(0.43, 0.57), height * rng.uniform(0.44, 0.56))
    _paste(photo, picture, centre, rng.uniform(0.74, 1.02) * SHORT_SIDE, rng)
    cover = rng.random()
    if cover < 0.1:
        _hand(photo, rng)
    elif cover < 0.22:
        _sticker(photo, centre, rng)
    elif cover < 0.34:
        _paste(photo, others[2], _border_place(width, height, rng), rng.uniform(0.35, 0.5) * SHORT_SIDE, rng)
    return _expose(photo, rng)


def lifestyle(pictures: Sequence[Image.Image], side: int, rng: np.random.Generator) -> Image.Image:
    """A picture of several products side by side, none of them larger or more central than another by its place in the
    list.

    Args:
        pictures: two to four products cut out, RGBA.
        side: of the square result in pixels.
        rng: the source of every choice.

    Returns:
        RGB, `side` x `side` pixels.
    """
    scene = Image.fromarray(_GROUNDS[int(rng.integers(len(_GROUNDS)))](side, side, rng))
    places, (least, most) = _PLACES[len(pictures)]
    turns = int(rng.integers(4))
    for picture, place in zip(pictures, rng.permutation(len(places)), strict=True):
        x, y = np.array(places[place]) - 0.5
        for _ in range(turns):  # a quarter each
            x, y = -y, x
        x, y = side * (0.5 + np.array([x, y]) + rng.uniform(-0.03, 0.03, 2))
        _paste(scene, picture, (float(x), float(y)), side * rng.uniform(least, most), rng)
    return scene


def _border_place(width: int, height: int, rng: np.random.Generator) -> tuple[float, float]:
    along, side = rng.uniform(0, 1), int(rng.integers(4))
    x, y = ((along, 0.02), (along, 0.98), (0.02, along), (0.98, along))[side]
    return x * width, y * height


def _paste(
    photo: Image.Image, picture: Image.Image, centre: tuple[float, float], reach: float, rng: np.random.Generator
) -> None:
    """Pastes `picture`, its longer side `reach` pixels, turned and seen at an angle, with the shadow it throws."""
    turn = float(np.clip(rng.normal(0, 0.16), -0.4, 0.4))
    scale = reach / max(picture.size) / 2
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (picture.width * scale, picture.height * scale)
    corners *= 1 + rng.uniform(-0.08, 0.08, (4, 1))  # unequal distances of the corners are a perspective
    corners *= rng.uniform(0.84, 1.0, 2) if rng.random() < 0.5 else 1.0
    corners = corners @ np.array([[cos(turn), sin(turn)], [-sin(turn), cos(turn)]]) + centre
    warped = picture.transform(
        photo.size, Image.Transform.PERSPECTIVE, _homography(corners, picture.size), Image.Resampling.BILINEAR
    )
    alpha = warped.getchannel("A")
    dark = float(rng.uniform(0.25, 0.6))
    shadow = alpha.point(lambda value: int(value * dark)).filter(ImageFilter.BoxBlur(float(rng.uniform(2, 7))))
    drop = (int(rng.integers(-9, 10)), int(rng.integers(2, 10)))
    photo.paste((12, 12, 16), drop, shadow)
    photo.paste(warped, None, alpha)


def _homography(corners: npt.NDArray[np.float64], size: tuple[int, int]) -> list[float]:
    """Pillow's eight coefficients that map photo pixels back to the picture, from its corners' places in the photo."""
    width, height = size
    rows, values = [], []
    for (x, y), (u, v) in zip(corners, [(0, 0), (width, 0), (width, height), (0, height)], strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return [float(value) for value in np.linalg.solve(np.array(rows), np.array(values))]


def _hand(photo: Image.Image, rng: np.random.Generator) -> None:
    """Fingers that reach in from below over the product's lower edge."""
    width, height = photo.size
    skin = np.array([(236, 190, 160), (196, 140, 104), (120, 80, 58)])[int(rng.integers(3))] * rng.uniform(0.85, 1.1)
    x, step, lean = width * rng.uniform(0.25, 0.5), width * 0.075, rng.uniform(-0.25, 0.25)
    draw = ImageDraw.Draw(photo)
    for finger in range(4):
        top = height * (0.84 - 0.05 * (1.5 - abs(finger - 1.5)) + rng.uniform(-0.02, 0.02))
        left, half = x + finger * step, 0.46 * step
        tip = left + lean * (height - top)
        outline = [
            (left - half, height + 9),
            (tip - half, top),
            (tip, top - half),
            (tip + half, top),
            (left + half, height + 9),
        ]
        fill, edge = (tuple(map(int, colour.clip(0, 255))) for colour in (skin, skin * 0.7))
        draw.polygon(smooth(outline, 2), fill, edge)


def _sticker(photo: Image.Image, centre: tuple[float, float], rng: np.random.Generator) -> None:
    """A round price sticker somewhere on the product."""
    radius, angle = SHORT_SIDE * rng.uniform(0.07, 0.1), rng.uniform(0, 2 * pi)
    reach = SHORT_SIDE * 0.22
    x, y = centre[0] + reach * cos(angle), centre[1] + reach * sin(angle)
    paint = ((255, 226, 40), (250, 90, 60), (250, 250, 246))[int(rng.integers(3))]
    draw = ImageDraw.Draw(photo)
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), paint, (120, 110, 90))
    draw.text((x, y), f"{int(rng.integers(1, 30))}.{int(rng.integers(10)):d}9", (30, 30, 30), anchor="mm")


def _expose(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Light, colour cast, shadow, blur and noise."""
    softness = rng.uniform(0, 0.9)
    if softness > 0.3:
        photo = photo.filter(ImageFilter.GaussianBlur(softness))
    pixels = np.asarray(photo, np.float32)
    height, width, _ = pixels.shape
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle = rng.uniform(0, 2 * pi)
    across = (x / width - 0.5) * cos(angle) + (y / height - 0.5) * sin(angle)
    light = 1 + rng.uniform(0, 0.7) * across
    if rng.random() < 0.3:  # the edge of a shadow, soft
        light *= 1 - rng.uniform(0.15, 0.4) / (1 + np.exp(-(across - rng.uniform(-0.3, 0.3)) / 0.03))
    cast = np.exp(rng.normal(0, 0.12, 3))
    gain = np.exp(rng.uniform(-0.4, 0.3))
    bright = 255 * (pixels / 255) ** np.exp(rng.normal(0, 0.15)) * (light * gain)[..., None] * cast
    bright += rng.normal(0, 1, pixels.shape).astype(np.float32) * rng.uniform(1, 7)
    return Image.fromarray(bright.clip(0, 255).astype(np.uint8))


def _paint(rng: np.random.Generator, least: float = 30, most: float = 235) -> Floats:
    return rng.uniform(least, most, 3).astype(np.float32)


def _waves(width: int, height: int, cells: int, rng: np.random.Generator, stretch: int = 1) -> Floats:
    """Smooth noise in 0..1: [height, width]."""
    noise = rng.random((cells, max(2, cells // stretch))).astype(np.float32)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def _to_pixels(values: Floats) -> npt.NDArray[np.uint8]:
    return values.clip(0, 255).astype(np.uint8)


def _wood(width: int, height: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    tone = np.array([(176, 124, 76), (120, 78, 46), (214, 180, 134), (150, 146, 140)], np.float32)[int(rng.integers(4))]
    grain = _waves(width, height, 60, rng, stretch=12) + 0.5 * _waves(width, height, 140, rng, stretch=30)
    values = tone * (0.72 + 0.35 * grain[..., None])
    plank = height // int(rng.integers(3, 6))
    for row in range(plank, height, plank):
        values[row : row + 2] *= 0.5
    return _to_pixels(values)


def _shelf(width: int, height: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    values = np.empty((height, width, 3), np.float32)
    values[:] = _paint(rng, 60, 220)
    x = 0
    while x < width:  # a row of packages behind
        step = int(rng.integers(12, 40))
        values[int(height * rng.uniform(0.05, 0.35)) :, x : x + step - 2] = _paint(rng)
        x += step
    board = int(height * rng.uniform(0.76, 0.88))
    values[board:] = _paint(rng, 120, 230)
    values[board : board + 3] *= 0.5
    return _to_pixels(values)


def _tiles(width: int, height: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    side, first, second = int(rng.integers(18, 60)), _paint(rng), _paint(rng)
    y, x = np.mgrid[:height, :width]
    odd = (x // side + y // side) % 2 == 0
    values = np.where(odd[..., None], first, second if rng.random() < 0.6 else first)
    values[(x % side < 2) | (y % side < 2)] = 0.7 * (first + second) / 2
    return _to_pixels(values * (0.85 + 0.3 * _waves(width, height, 8, rng)[..., None]))


def _blotches(width: int, height: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    values = _waves(width, height, int(rng.integers(3, 30)), rng)[..., None] * _paint(rng, 80, 255)
    return _to_pixels(values + _waves(width, height, int(rng.integers(3, 12)), rng)[..., None] * _paint(rng, 0, 160))


def _gradient(width: int, height: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    slope = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    values = _paint(rng) * slope + _paint(rng) * (1 - slope)
    table = int(height * rng.uniform(0.55, 0.8))
    values = np.repeat(values, width, 1)
    values[table:] = values[table:] * 0.3 + 0.7 * _paint(rng)
    return _to_pixels(values)


def _clutter(width: int, height: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    image = Image.fromarray(_gradient(width, height, rng))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(6, 16))):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        angles = np.sort(rng.uniform(0, 2 * pi, int(rng.integers(3, 7))))
        reach = rng.uniform(12, 55)
        outline = [(x + reach * cos(angle), y + reach * sin(angle)) for angle in angles]
        paint = tuple(int(value) for value in _paint(rng))
        draw.polygon(smooth(outline, 2) if rng.random() < 0.5 else outline, paint)
    return np.asarray(image)


_GROUNDS: tuple[Callable[[int, int, np.random.Generator], npt.NDArray[np.uint8]], ...] = (
    _wood,
    _shelf,
    _tiles,
    _blotches,
    _gradient,
    _clutter,
)
