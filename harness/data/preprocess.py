"""Preprocessing, from a photo to the model's input: one specification for training, evaluation and serving, and its
random draws.

Both are one operation: cut a window out of the oriented image (EXIF applied), resize it to a square, mirror it, apply
one linear colour transform, clamp, normalise. Training draws window, mirroring and colour; evaluation takes the centre.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.core.errors import UserError
from harness.core.keyed_random import Stream, keyed_uniform
from models.plain_values import from_plain
from models.ranges import Byte, ClosedUnitInterval, HalfTurn, Pixels, PositiveFloat, UnitIntervalAbove0

# anchor int32 [n, 2] and shape int32 [n, 2]: window (x, y) and (width, height) in pixels of the oriented image;
# flip int32 [n]; matrix float32 [n, 3, 3] and offset float32 [n, 3]: colour = matrix @ rgb + offset for rgb in 0..1.
Parameters = dict[str, npt.NDArray[Any]]

WHITE = (255, 255, 255)

_LUMA = np.array([0.299, 0.587, 0.114])
_YIQ = np.array([_LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
# A hue rotation by t around the grey axis is luma + cos(t) * (1 - luma) + sin(t) * quarter turn.
_TO_LUMA = np.tile(_LUMA, (3, 1))
_QUARTER_TURN = np.linalg.inv(_YIQ) @ np.array([[0.0, 0, 0], [0, 0, -1], [0, 1, 0]]) @ _YIQ


@dataclass(frozen=True, kw_only=True)
class PreprocessSpec:
    """Specification of the model's image input; travels with checkpoints and exported indexes.

    Args:
        image_size: side of the square that the model sees, in pixels.
        mean: mean of red, green and blue in 0..1, subtracted.
        std: standard deviation of red, green and blue in 0..1, divided by.
        crop_scale: training window's share of the image's area, least and most.
        crop_ratio: training window's width / height, least and most (uniform in the logarithm).
        flip: probability that a training image is mirrored left to right.
        brightness: colours are multiplied by a factor in 1 -+ this; 0 = off.
        contrast: colours move away from mid grey by a factor in 1 -+ this; 0 = off.
        saturation: colours move away from their own grey by a factor in 1 -+ this; 0 = off.
        hue: hues turn by up to this share of the colour circle, both ways; 0 = off, at most 0.5.
        eval_crop: side of evaluation's centred square window as a share of the image's short side.
        background: red, green and blue in 0..255 that show through transparent pixels.
    """

    image_size: Pixels = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)
    crop_scale: tuple[UnitIntervalAbove0, UnitIntervalAbove0] = (0.35, 1.0)
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 1.3333)
    flip: ClosedUnitInterval = 0.5
    brightness: ClosedUnitInterval = 0.2
    contrast: ClosedUnitInterval = 0.2
    saturation: ClosedUnitInterval = 0.2
    hue: HalfTurn = 0.02
    eval_crop: UnitIntervalAbove0 = 0.875
    background: tuple[Byte, Byte, Byte] = WHITE

    def errors(self, where: str) -> list[str]:
        """Errors for values that do not fit together; each names its key under `where`."""
        errors = [
            f"{where}.{name} is {value}; the least must not be above the most"
            for name, value in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio))
            if value[0] > value[1]
        ]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if min(values) < 0 or max(values) > 1:
                errors.append(f"{where}.{name} is {values}; it must lie in 0..1: divide values of 0..255 by 255")
        return errors

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PreprocessSpec:
        """The specification that `to_dict` wrote, also after a trip through JSON.

        Raises:
            UserError: a field is missing or unknown: defaults must not stand in for what a model was trained with.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        values = {"background": WHITE, **values}  # files from before it was a field have none
        if difference := names ^ values.keys():
            raise UserError(
                f"preprocess: missing or unknown: {', '.join(sorted(difference))}",
                "The file was written by another version of shelfmark, or by hand",
            )
        try:
            spec = from_plain(cls, values, "preprocess")
        except ValueError as error:
            raise UserError(str(error), "The file was written by hand") from error
        if errors := spec.errors("preprocess"):
            raise UserError(errors[0], "The file was written by hand")
        return spec


def draw_parameters(
    spec: PreprocessSpec,
    seed: int,
    epochs: npt.ArrayLike,
    sample_ids: npt.ArrayLike,
    widths: npt.ArrayLike,
    heights: npt.ArrayLike,
    train: bool,
    variant: npt.ArrayLike = 0,
) -> Parameters:
    """Window, mirroring and colour of n samples, each a pure function of (seed, epoch, sample id, variant).

    Args:
        spec: what to draw from.
        seed: any integer.
        epochs: integer, or integers [n].
        sample_ids: integers [n].
        widths: oriented widths in pixels [n], as in the catalogue's index.
        heights: oriented heights in pixels [n].
        train: draw; otherwise evaluation's centred window, unmirrored, with unchanged colours.
        variant: integer, or integers [n]: tells apart the visits of one sample in one epoch (its position, say).

    Returns:
        What `ImagePipeline.decode` takes (see `Parameters`).
    """
    ids = np.asarray(sample_ids, dtype=np.int64)
    image = np.stack([np.asarray(widths, dtype=np.int64), np.asarray(heights, dtype=np.int64)], axis=1)
    if not train:
        side = np.maximum(1, np.rint(spec.eval_crop * image.min(axis=1)).astype(np.int64))
        shape = np.stack([side, side], axis=1)
        flip = np.zeros(len(ids), dtype=bool)
        matrix, offset = np.tile(np.eye(3), (len(ids), 1, 1)), np.zeros((len(ids), 3))
        return _pack((image - shape) // 2, shape, flip, matrix, offset)
    epoch, number, visit = (np.broadcast_to(np.asarray(word), ids.shape)[:, None] for word in (epochs, ids, variant))
    uniform = keyed_uniform(seed, Stream.AUGMENT, epoch, number, visit, np.arange(9)).T
    shape = _window_shape(spec, image, uniform[0], uniform[1])
    anchor = np.floor(uniform[2:4].T * (image - shape + 1)).astype(np.int64)
    matrix, offset = _colour(spec, 2 * uniform[5:9] - 1)
    return _pack(anchor, shape, uniform[4] < spec.flip, matrix, offset)


def _window_shape(
    spec: PreprocessSpec, image: npt.NDArray[np.int64], first: npt.NDArray[Any], second: npt.NDArray[Any]
) -> npt.NDArray[np.int64]:
    """Width and height [n, 2] of random windows.

    The ratio is drawn first and the area among those that fit the image at that ratio: no rejection, so every sample
    costs the same two numbers and long images keep their ratio instead of falling back to a fixed window.
    """
    low, high = np.log(spec.crop_ratio)
    ratio = np.exp(low + first * (high - low))
    width, height = image.astype(np.float64).T
    most = np.minimum(spec.crop_scale[1] * width * height, np.minimum(width**2 / ratio, height**2 * ratio))
    least = np.minimum(spec.crop_scale[0] * width * height, most)
    area = least + second * (most - least)
    shape = np.rint(np.sqrt(np.stack([area * ratio, area / ratio], axis=1))).astype(np.int64)
    return np.clip(shape, 1, image)


def _colour(spec: PreprocessSpec, swing: npt.NDArray[np.float64]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Matrix [n, 3, 3] and offset [n, 3] of brightness, contrast, saturation and hue, in that order, from swings [4, n]
    in -1..1. Saturation and hue leave grey as it is, so contrast's shift about mid grey passes through unchanged."""
    brightness = 1 + spec.brightness * swing[0]
    contrast = 1 + spec.contrast * swing[1]
    saturation = (1 + spec.saturation * swing[2])[:, None, None]
    angle = (2 * np.pi * spec.hue * swing[3])[:, None, None]
    turn = np.cos(angle) * (np.eye(3) - _TO_LUMA) + np.sin(angle) * _QUARTER_TURN
    matrix = (brightness * contrast)[:, None, None] * (_TO_LUMA + saturation * turn)
    return matrix, np.repeat((0.5 * (1 - contrast))[:, None], 3, axis=1)


def _pack(
    anchor: npt.NDArray[Any],
    shape: npt.NDArray[Any],
    flip: npt.NDArray[Any],
    matrix: npt.NDArray[Any],
    offset: npt.NDArray[Any],
) -> Parameters:
    return {
        "anchor": anchor.astype(np.int32),
        "shape": shape.astype(np.int32),
        "flip": flip.astype(np.int32),
        "matrix": matrix.astype(np.float32),
        "offset": offset.astype(np.float32),
    }
