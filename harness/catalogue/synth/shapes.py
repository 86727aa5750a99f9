"""The products' shapes: for each kind a function that draws its parts from back to front."""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi, sin

from PIL import Image

from harness.catalogue.synth.draw import (
    CREAM,
    GLASS,
    INK,
    METAL,
    STALK,
    Canvas,
    box,
    darker,
    mirrored,
    oval,
    profile,
    smooth,
)
from harness.catalogue.synth.products import Product


def cutout(product: Product, size: int) -> Image.Image:
    """Draws the product without a ground: RGBA, within `size` x `size` pixels and cut to its bounds."""
    canvas = Canvas(product, size)
    SHAPES[product.kind](canvas)
    return canvas.finish()


# fmt: off
# One part a line, so that a shape can be read from back to front.

def _cereal_box(c: Canvas) -> None:
    c.emblem = (0.46, 0.56, 0.17)
    c.part([(0.2, 0.14), (0.34, 0.06), (0.86, 0.06), (0.72, 0.14)], light=1.12)
    c.part([(0.72, 0.14), (0.86, 0.06), (0.86, 0.84), (0.72, 0.94)], light=0.6)
    c.part([(0.2, 0.14), (0.72, 0.14), (0.72, 0.94), (0.2, 0.94)])
    c.part(box(0.23, 0.19, 0.69, 0.34), CREAM)
    c.text(c.product.brand, 0.46, 0.265, 0.42, 0.15, INK)
    if c.product.pattern != "emblem":
        c.part(oval(0.46, 0.55, 0.14, 0.14), CREAM)
        c.sign(0.46, 0.55, 0.1, c.ink)
    c.part(box(0.27, 0.8, 0.65, 0.89), CREAM)
    c.text(c.product.variant, 0.46, 0.845, 0.34, 0.075, INK)

def _milk_carton(c: Canvas) -> None:
    c.emblem = (0.43, 0.72, 0.13)
    c.part([(0.62, 0.34), (0.8, 0.28), (0.8, 0.88), (0.62, 0.95)], light=0.62)
    c.part([(0.62, 0.34), (0.7, 0.12), (0.8, 0.28)], c.base, light=0.7)
    c.part([(0.24, 0.34), (0.34, 0.12), (0.7, 0.12), (0.62, 0.34)], c.base, light=1.1)
    c.part([(0.34, 0.05), (0.7, 0.05), (0.7, 0.13), (0.34, 0.13)], c.accent)
    c.part([(0.24, 0.34), (0.62, 0.34), (0.62, 0.95), (0.24, 0.95)])
    c.part(oval(0.46, 0.23, 0.065, 0.055), c.accent, "ball")
    c.label(0.27, 0.38, 0.59, 0.58, "flat")

def _tin(c: Canvas) -> None:
    c.emblem = (0.5, 0.7, 0.12)
    c.part([(0.22, 0.18), (0.78, 0.18), *oval(0.5, 0.85, 0.28, 0.08, 0, pi)], METAL, "cylinder")
    c.part([(0.22, 0.25), *oval(0.5, 0.25, 0.28, 0.06, 0, pi)[::-1], (0.78, 0.25), *oval(0.5, 0.81, 0.28, 0.08,
           0, pi)], None, "cylinder")
    c.part(oval(0.5, 0.18, 0.28, 0.075), METAL)
    c.part(oval(0.5, 0.18, 0.23, 0.055), (150, 154, 160))
    c.line(oval(0.5, 0.17, 0.07, 0.02), 0.012, METAL)
    c.label(0.3, 0.35, 0.7, 0.57)

def _jam_jar(c: Canvas) -> None:
    c.part(smooth(profile((0.2, 0.22), (0.24, 0.26), (0.27, 0.34), (0.27, 0.85), (0.24, 0.95)), 2), GLASS, "cylinder")
    c.part(smooth(profile((0.2, 0.29), (0.25, 0.35), (0.25, 0.85), (0.22, 0.93)), 2), c.base, "cylinder")
    c.emblem = (0.5, 0.15, 0.08)
    c.part(box(0.25, 0.07, 0.75, 0.24, 0.03), None, "cylinder")
    c.line([(0.26, 0.21), (0.74, 0.21)], 0.012, c.accent)
    c.label(0.29, 0.43, 0.71, 0.8)

def _juice_bottle(c: Canvas) -> None:
    c.emblem = (0.5, 0.78, 0.1)
    c.part(smooth(profile((0.07, 0.1), (0.07, 0.22), (0.17, 0.36), (0.18, 0.5), (0.16, 0.6), (0.18, 0.7), (0.18,
           0.94), (0.15, 0.97)), 2), c.base, "cylinder")
    c.part(box(0.32, 0.48, 0.68, 0.9, 0.01), None, "cylinder")
    c.part(box(0.42, 0.03, 0.58, 0.13, 0.015), c.accent, "cylinder")
    c.line([(0.42, 0.15), (0.58, 0.15)], 0.012, c.accent)
    c.label(0.35, 0.51, 0.65, 0.68)

def _wine_bottle(c: Canvas) -> None:
    c.emblem = (0.5, 0.83, 0.08)
    c.part(smooth(profile((0.055, 0.03), (0.055, 0.3), (0.07, 0.36), (0.15, 0.45), (0.155, 0.6), (0.155, 0.93),
           (0.13, 0.98)), 2), darker(c.base, 0.4), "cylinder")
    c.part(box(0.44, 0.02, 0.56, 0.2, 0.012), c.base, "cylinder")
    c.line([(0.44, 0.19), (0.56, 0.19)], 0.014, c.accent)
    c.part(box(0.345, 0.5, 0.655, 0.92, 0.005), None, "cylinder")
    c.label(0.37, 0.54, 0.63, 0.73)

def _shampoo_bottle(c: Canvas) -> None:
    c.emblem = (0.5, 0.78, 0.11)
    c.part(smooth(profile((0.16, 0.24), (0.22, 0.3), (0.22, 0.6), (0.19, 0.9), (0.17, 0.96)), 2), None, "cylinder")
    c.part(smooth(profile((0.1, 0.06), (0.13, 0.08), (0.16, 0.24), (0.14, 0.26)), 2), c.accent, "cylinder")
    c.label(0.34, 0.38, 0.66, 0.62)

def _spray_bottle(c: Canvas) -> None:
    c.emblem = (0.5, 0.82, 0.1)
    c.part(smooth(profile((0.06, 0.3), (0.08, 0.38), (0.2, 0.52), (0.21, 0.65), (0.21, 0.92), (0.18, 0.97)), 2),
           None, "cylinder")
    c.part(box(0.44, 0.2, 0.57, 0.36, 0.01), c.accent, "cylinder")
    c.part(smooth([(0.36, 0.18), (0.42, 0.18), (0.4, 0.3), (0.32, 0.4), (0.29, 0.38), (0.36, 0.28)], 2), c.accent)
    c.part(smooth([(0.22, 0.08), (0.64, 0.05), (0.7, 0.2), (0.42, 0.24), (0.4, 0.18), (0.22, 0.17)], 2), c.accent)
    c.part(box(0.17, 0.09, 0.23, 0.16, 0.01), INK)
    c.label(0.34, 0.55, 0.66, 0.75)

def _print_on_chest(c: Canvas, y: float, width: float) -> None:
    """Brand and size on cloth; the emblem pattern shows the sign large already."""
    c.part(box(0.5 - width / 2, y - 0.045, 0.5 + width / 2, y + 0.045, 0.02), CREAM)
    c.text(c.product.brand, 0.5, y, 0.85 * width, 0.08, INK)

def _t_shirt(c: Canvas) -> None:
    c.emblem = (0.5, 0.63, 0.15)
    c.part(smooth([(0.3, 0.12), (0.22, 0.14), (0.02, 0.34), (0.13, 0.46), (0.28, 0.35), (0.3, 0.5)], 1),
           light=0.9, shade="cloth")
    c.part(smooth([(0.7, 0.12), (0.78, 0.14), (0.98, 0.34), (0.87, 0.46), (0.72, 0.35), (0.7, 0.5)], 1),
           light=0.9, shade="cloth")
    c.part(smooth(profile((0.11, 0.1), (0.24, 0.13), (0.25, 0.3), (0.25, 0.9), (0.25, 0.94), (0.2, 0.94)), 1),
           shade="cloth")
    c.line([(0.05, 0.36), (0.14, 0.44)], 0.022, c.accent)
    c.line([(0.95, 0.36), (0.86, 0.44)], 0.022, c.accent)
    c.part(oval(0.5, 0.11, 0.115, 0.08), (120, 116, 112))
    c.line(oval(0.5, 0.11, 0.12, 0.1, 0, pi), 0.03, c.accent)
    c.text(c.product.variant, 0.5, 0.15, 0.08, 0.05, CREAM)
    _print_on_chest(c, 0.38, 0.36)

def _dress(c: Canvas) -> None:
    c.emblem = (0.5, 0.68, 0.14)
    c.line([(0.4, 0.04), (0.39, 0.2)], 0.035, c.base)
    c.line([(0.6, 0.04), (0.61, 0.2)], 0.035, c.base)
    c.part([(0.37, 0.16), (0.5, 0.22), (0.63, 0.16), (0.66, 0.24), (0.61, 0.42), (0.39, 0.42), (0.34, 0.24)],
           shade="cloth")
    c.part([(0.39, 0.42), (0.61, 0.42), (0.84, 0.93), *oval(0.5, 0.92, 0.34, 0.05, 0, pi), (0.16, 0.93)],
           shade="cloth")
    c.part(box(0.375, 0.4, 0.625, 0.46, 0.01), c.accent)
    c.line([(0.44, 0.5), (0.36, 0.9)], 0.005, darker(c.base, 0.7))
    c.line([(0.57, 0.5), (0.66, 0.9)], 0.005, darker(c.base, 0.7))
    c.text(c.product.brand, 0.5, 0.3, 0.22, 0.06, c.accent)
    c.text(c.product.variant, 0.5, 0.36, 0.1, 0.05, c.accent)

def _trousers(c: Canvas) -> None:
    c.emblem = (0.37, 0.55, 0.09)
    c.part([(0.3, 0.06), (0.7, 0.06), (0.75, 0.3), (0.77, 0.95), (0.57, 0.95), (0.5, 0.38), (0.43, 0.95), (0.23,
           0.95), (0.25, 0.3)], shade="cloth")
    c.part(box(0.295, 0.05, 0.705, 0.11, 0.01), c.accent)
    for x in (0.34, 0.5, 0.66):
        c.line([(x, 0.04), (x, 0.12)], 0.018, c.base)
    c.line([(0.5, 0.11), (0.5, 0.38)], 0.008, INK)
    c.line([(0.31, 0.14), (0.37, 0.2), (0.38, 0.26)], 0.008, INK)
    c.line([(0.69, 0.14), (0.63, 0.2), (0.62, 0.26)], 0.008, INK)
    c.line([(0.235, 0.92), (0.425, 0.92)], 0.025, c.accent)
    c.line([(0.575, 0.92), (0.765, 0.92)], 0.025, c.accent)
    c.part(box(0.53, 0.15, 0.62, 0.2, 0.005), CREAM)
    c.text(c.product.brand, 0.575, 0.175, 0.085, 0.05, INK)
    c.text(c.product.variant, 0.43, 0.175, 0.08, 0.05, CREAM)

def _sock(c: Canvas) -> None:
    c.emblem = (0.52, 0.42, 0.11)
    c.part(smooth([(0.36, 0.06), (0.66, 0.06), (0.66, 0.55), (0.7, 0.72), (0.62, 0.84), (0.3, 0.95), (0.14,
           0.92), (0.12, 0.78), (0.3, 0.68), (0.37, 0.55)], 2), shade="cloth")
    c.part(smooth([(0.64, 0.58), (0.68, 0.62), (0.7, 0.74), (0.62, 0.84), (0.53, 0.87), (0.56, 0.7)], 2),
           c.accent, "cloth")
    c.part(smooth([(0.24, 0.73), (0.28, 0.96), (0.14, 0.92), (0.12, 0.8)], 2), c.accent, "cloth")
    c.part(box(0.35, 0.05, 0.67, 0.16, 0.02), c.accent, "cloth")
    for step in range(9):
        c.line([(0.38 + 0.033 * step, 0.06), (0.38 + 0.033 * step, 0.15)], 0.004, c.base)
    c.part(box(0.4, 0.2, 0.63, 0.28, 0.01), CREAM)
    c.text(f"{c.product.brand} {c.product.variant}", 0.515, 0.24, 0.21, 0.07, INK)

def _cap(c: Canvas) -> None:
    c.emblem = (0.55, 0.44, 0.12)
    c.part(smooth([(0.04, 0.72), (0.22, 0.6), (0.5, 0.58), (0.62, 0.68), (0.3, 0.74), (0.08, 0.8)], 2), c.accent)
    c.part([(0.22, 0.64), *oval(0.56, 0.6, 0.36, 0.36, pi, 2 * pi), (0.92, 0.68), (0.55, 0.7)], None, "cloth")
    c.line(oval(0.62, 0.62, 0.2, 0.37, pi, 1.5 * pi), 0.006, INK)
    c.line(oval(0.5, 0.62, 0.2, 0.37, 1.5 * pi, 2 * pi), 0.006, INK)
    c.part(oval(0.56, 0.245, 0.035, 0.02), c.accent)
    c.part(box(0.38, 0.57, 0.72, 0.66, 0.01), CREAM)
    c.text(f"{c.product.brand} {c.product.variant}", 0.55, 0.615, 0.31, 0.075, INK)

def _sneaker(c: Canvas) -> None:
    c.emblem = (0.66, 0.58, 0.1)
    c.part(smooth([(0.08, 0.7), (0.1, 0.58), (0.34, 0.5), (0.52, 0.3), (0.62, 0.36), (0.8, 0.36), (0.92, 0.3),
           (0.95, 0.76), (0.1, 0.78)], 2), None, "cloth")
    c.part(smooth([(0.06, 0.7), (0.1, 0.6), (0.26, 0.58), (0.28, 0.76), (0.08, 0.78)], 2), c.accent)
    c.part(smooth([(0.86, 0.36), (0.93, 0.32), (0.95, 0.62), (0.86, 0.6)], 1), c.accent)
    c.part(smooth([(0.04, 0.73), (0.97, 0.72), (0.96, 0.84), (0.06, 0.84)], 2), CREAM)
    c.line([(0.06, 0.81), (0.95, 0.81)], 0.012, c.accent)
    for step in range(4):
        x, y = (0.33 + 0.055 * step, 0.52 - 0.055 * step)
        c.line([(x, y), (x + 0.09, y + 0.07)], 0.018, CREAM)
    c.text(c.product.brand, 0.66, 0.68, 0.34, 0.08, c.accent)
    c.text(c.product.variant, 0.9, 0.56, 0.08, 0.05, CREAM)

def _boot(c: Canvas) -> None:
    c.emblem = (0.6, 0.3, 0.11)
    c.part(smooth([(0.42, 0.06), (0.8, 0.06), (0.78, 0.5), (0.82, 0.82), (0.82, 0.9), (0.1, 0.88), (0.08, 0.72),
           (0.2, 0.62), (0.4, 0.54)], 2), None, "cloth")
    c.part(smooth([(0.08, 0.84), (0.84, 0.83), (0.85, 0.95), (0.62, 0.95), (0.58, 0.9), (0.08, 0.92)], 1), INK)
    c.part(box(0.42, 0.05, 0.8, 0.13, 0.02), c.accent)
    c.line(oval(0.82, 0.1, 0.04, 0.06), 0.012, c.accent)
    c.part(smooth([(0.08, 0.74), (0.18, 0.66), (0.26, 0.86), (0.09, 0.87)], 2), c.accent)
    c.part(box(0.42, 0.48, 0.76, 0.56, 0.01), c.accent)
    c.part(box(0.55, 0.46, 0.63, 0.58, 0.01), METAL)
    c.part(box(0.46, 0.64, 0.76, 0.74, 0.02), CREAM)
    c.text(f"{c.product.brand} {c.product.variant}", 0.61, 0.69, 0.27, 0.08, INK)

def _handbag(c: Canvas) -> None:
    c.emblem = (0.5, 0.68, 0.14)
    c.line(oval(0.5, 0.4, 0.2, 0.32, pi, 2 * pi), 0.05, darker(c.accent, 0.7), "flat")
    c.part(smooth([(0.14, 0.36), (0.86, 0.36), (0.94, 0.92), (0.06, 0.92)], 1), shade="cloth")
    c.part(smooth([(0.13, 0.34), (0.87, 0.34), (0.84, 0.5), (0.5, 0.58), (0.16, 0.5)], 1), c.accent)
    c.part(oval(0.5, 0.54, 0.045, 0.045), (222, 186, 84), "ball")
    c.line([(0.15, 0.88), (0.85, 0.88)], 0.008, c.accent)
    c.text(c.product.brand, 0.5, 0.42, 0.4, 0.1, c.base)
    c.part(box(0.66, 0.76, 0.86, 0.85, 0.01), CREAM)
    c.text(c.product.variant, 0.76, 0.805, 0.17, 0.07, INK)

def _backpack(c: Canvas) -> None:
    c.emblem = (0.5, 0.32, 0.12)
    c.line(oval(0.5, 0.12, 0.1, 0.09, pi, 2 * pi), 0.03, c.accent)
    c.line([(0.24, 0.25), (0.13, 0.5), (0.16, 0.85)], 0.05, c.accent)
    c.line([(0.76, 0.25), (0.87, 0.5), (0.84, 0.85)], 0.05, c.accent)
    c.part(smooth(profile((0.14, 0.08), (0.26, 0.12), (0.3, 0.4), (0.3, 0.95)), 2), shade="cloth")
    c.part(box(0.25, 0.52, 0.75, 0.9, 0.05), c.accent, "cloth")
    c.part(box(0.27, 0.58, 0.73, 0.88, 0.04), c.base, "cloth")
    c.line([(0.26, 0.49), (0.74, 0.49)], 0.01, INK)
    c.line([(0.7, 0.49), (0.7, 0.54)], 0.015, METAL)
    c.label(0.34, 0.61, 0.66, 0.83, "flat")

def _mug(c: Canvas) -> None:
    c.emblem = (0.41, 0.6, 0.14)
    c.line(oval(0.72, 0.52, 0.16, 0.18, -0.5 * pi, 0.5 * pi), 0.065, c.accent, "flat")
    c.part([(0.12, 0.2), (0.7, 0.2), (0.7, 0.84), *oval(0.41, 0.84, 0.29, 0.08, 0, pi), (0.12, 0.84)], None,
           "cylinder")
    c.part(oval(0.41, 0.2, 0.29, 0.07), c.base, light=1.1)
    c.part(oval(0.41, 0.21, 0.25, 0.055), (84, 54, 36))
    c.part(box(0.22, 0.32, 0.6, 0.43, 0.02), CREAM, "cylinder")
    c.text(c.product.brand, 0.41, 0.375, 0.34, 0.1, INK)
    c.text(c.product.variant, 0.41, 0.86, 0.2, 0.06, c.accent)

def _teapot(c: Canvas) -> None:
    c.emblem = (0.5, 0.68, 0.12)
    c.line(oval(0.76, 0.56, 0.16, 0.17, -0.6 * pi, 0.6 * pi), 0.05, c.accent, "flat")
    c.part(smooth([(0.28, 0.56), (0.16, 0.44), (0.12, 0.3), (0.03, 0.3), (0.08, 0.52), (0.28, 0.76)], 2), c.accent)
    c.part(oval(0.5, 0.6, 0.3, 0.27), None, "ball")
    c.part(box(0.36, 0.84, 0.64, 0.9, 0.02), c.accent)
    c.part([*oval(0.5, 0.37, 0.17, 0.1, pi, 2 * pi)], c.accent)
    c.part(oval(0.5, 0.25, 0.045, 0.045), c.base, "ball")
    c.part(box(0.33, 0.45, 0.67, 0.55, 0.02), CREAM)
    c.text(c.product.brand, 0.5, 0.5, 0.3, 0.09, INK)
    c.text(c.product.variant, 0.5, 0.87, 0.2, 0.05, c.base)

def _ball(c: Canvas) -> None:
    c.emblem = (0.5, 0.68, 0.16)
    c.part(oval(0.5, 0.5, 0.44, 0.44), None, "ball")
    c.line(oval(0.5, 0.5, 0.18, 0.44, 0.5 * pi, 1.5 * pi), 0.012, INK)
    c.line(oval(0.5, 0.5, 0.18, 0.44, -0.5 * pi, 0.5 * pi), 0.012, INK)
    c.line(oval(0.5, 0.29, 0.37, 0.07, 0, pi), 0.012, INK)
    c.part(box(0.3, 0.41, 0.7, 0.53, 0.03), CREAM)
    c.text(c.product.brand, 0.5, 0.47, 0.36, 0.11, INK)
    c.text(c.product.variant, 0.5, 0.24, 0.2, 0.06, c.accent)

def _toy_car(c: Canvas) -> None:
    c.emblem = (0.58, 0.58, 0.09)
    c.part(smooth([(0.24, 0.48), (0.32, 0.26), (0.7, 0.26), (0.82, 0.48)], 1), c.base)
    c.part([(0.31, 0.47), (0.37, 0.31), (0.51, 0.31), (0.51, 0.47)], GLASS)
    c.part([(0.55, 0.47), (0.55, 0.31), (0.67, 0.31), (0.75, 0.47)], GLASS)
    c.part(smooth([(0.03, 0.52), (0.2, 0.46), (0.86, 0.46), (0.97, 0.5), (0.97, 0.74), (0.03, 0.74)], 1))
    c.part(box(0.02, 0.69, 0.98, 0.76, 0.02), c.accent)
    c.part(oval(0.06, 0.57, 0.03, 0.045), (255, 240, 170), "ball")
    c.part(oval(0.95, 0.57, 0.025, 0.04), (220, 50, 40), "ball")
    for x in (0.24, 0.77):
        c.part(oval(x, 0.74, 0.12, 0.12), INK)
        c.part(oval(x, 0.74, 0.06, 0.06), METAL, "ball")
    c.part(box(0.12, 0.52, 0.46, 0.61, 0.01), CREAM)
    c.text(f"{c.product.brand} {c.product.variant}", 0.29, 0.565, 0.32, 0.08, INK)

def _fruit(outline: Callable[[Canvas, float, float, float], None]) -> Callable[[Canvas], None]:
    """A shape that shows one fruit, three, or a tray of them, each drawn by `outline` at (x, y) with radius r."""
    def draw(c: Canvas) -> None:
        if c.product.pattern == 'single':
            outline(c, 0.5, 0.52, 0.4)
            c.part(oval(0.56, 0.55, 0.1, 0.075), c.accent)
            c.sign(0.56, 0.535, 0.035, c.base)
            c.text(c.product.brand, 0.56, 0.59, 0.15, 0.04, c.base)
            return
        if c.product.pattern == 'trio':
            for x, y in ((0.5, 0.3), (0.28, 0.66), (0.72, 0.66)):
                outline(c, x, y, 0.24)
                c.part(oval(x, y + 0.03, 0.055, 0.045), c.accent)
                c.sign(x, y + 0.03, 0.03, c.base)
            return
        c.part(box(0.03, 0.2, 0.97, 0.9, 0.05), darker(c.accent, 0.6))
        for x, y in ((0.22, 0.36), (0.5, 0.34), (0.78, 0.36), (0.35, 0.54), (0.65, 0.54)):
            outline(c, x, y, 0.17)
        c.part([(0.0, 0.62), (1.0, 0.62), (0.95, 0.92), (0.05, 0.92)], c.accent)
        c.sign(0.2, 0.77, 0.08, c.base)
        c.part(box(0.34, 0.68, 0.86, 0.85, 0.02), CREAM)
        c.text(c.product.brand, 0.6, 0.74, 0.46, 0.12, INK)
        c.text(c.product.variant, 0.6, 0.82, 0.3, 0.05, INK)
    return draw

def _apple(c: Canvas, x: float, y: float, r: float) -> None:
    half = ((0.0, -0.72), (0.45, -0.95), (0.95, -0.6), (0.95, 0.1), (0.6, 0.9), (0.25, 0.98), (0.0, 0.86))
    outline = [(x + r * a, y + r * b) for a, b in mirrored(half)]
    c.part(smooth(outline, 2), c.base, "ball")
    c.line([(x, y - 0.65 * r), (x + 0.12 * r, y - 1.08 * r)], 0.09 * r, STALK)
    c.part(smooth([(x + 0.1 * r, y - 0.85 * r), (x + 0.5 * r, y - 1.15 * r), (x + 0.7 * r, y - 0.9 * r)], 2),
           (70, 130, 50))

def _pear(c: Canvas, x: float, y: float, r: float) -> None:
    half = ((0.0, -1.0), (0.35, -0.95), (0.4, -0.4), (0.85, 0.1), (0.85, 0.75), (0.4, 1.05), (0.0, 1.05))
    outline = [(x + r * a, y + r * b) for a, b in mirrored(half)]
    c.part(smooth(outline, 2), c.base, "ball")
    c.line([(x, y - 0.9 * r), (x + 0.1 * r, y - 1.2 * r)], 0.09 * r, STALK)

def _banana(c: Canvas, x: float, y: float, r: float) -> None:
    outer = oval(x, y - 0.35 * r, 1.05 * r, 1.05 * r, 0.05 * pi, 0.95 * pi)
    inner = oval(x, y - 0.55 * r, 0.85 * r, 0.72 * r, 0.1 * pi, 0.9 * pi)
    c.part(smooth([*outer, *inner[::-1]], 1), c.base, "flat")
    c.line(oval(x, y - 0.45 * r, 0.97 * r, 0.9 * r, 0.12 * pi, 0.88 * pi), 0.025 * r, darker(c.base, 0.75))
    for point in (outer[0], outer[-1]):
        c.part(oval(point[0], point[1], 0.1 * r, 0.1 * r), STALK)

def _orange(c: Canvas, x: float, y: float, r: float) -> None:
    c.part(oval(x, y, 0.95 * r, 0.95 * r), c.base, "ball")
    for step in range(30):
        t, d = (2.4 * step, 0.8 * r * (step / 30) ** 0.5)
        c.part(oval(x + d * cos(t), y + d * sin(t), 0.02 * r, 0.02 * r), darker(c.base, 0.8), "none")
    c.part(smooth([(x, y - 0.8 * r), (x + 0.35 * r, y - 1.0 * r), (x + 0.5 * r, y - 0.75 * r)], 2), (70, 130, 50))

def _lemon(c: Canvas, x: float, y: float, r: float) -> None:
    half = ((1.12, -0.08), (0.95, -0.2), (0.6, -0.65), (0.0, -0.78))
    top = mirrored(half)
    outline = [*top, *[(a, -b) for a, b in reversed(top)]]
    c.part(smooth([(x + r * a, y + r * b) for a, b in outline], 2), c.base, "ball")

# fmt: on

SHAPES: dict[str, Callable[[Canvas], None]] = {
    "cereal box": _cereal_box,
    "milk carton": _milk_carton,
    "tin": _tin,
    "jam jar": _jam_jar,
    "juice bottle": _juice_bottle,
    "wine bottle": _wine_bottle,
    "shampoo bottle": _shampoo_bottle,
    "spray bottle": _spray_bottle,
    "t-shirt": _t_shirt,
    "dress": _dress,
    "trousers": _trousers,
    "sock": _sock,
    "cap": _cap,
    "sneaker": _sneaker,
    "boot": _boot,
    "handbag": _handbag,
    "backpack": _backpack,
    "mug": _mug,
    "teapot": _teapot,
    "ball": _ball,
    "toy car": _toy_car,
    "apple": _fruit(_apple),
    "pear": _fruit(_pear),
    "banana": _fruit(_banana),
    "orange": _fruit(_orange),
    "lemon": _fruit(_lemon),
}
