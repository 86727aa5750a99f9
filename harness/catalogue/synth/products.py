"""Products of the demo: kinds, colours, patterns and brands, put together by a seed."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np

from harness.core.keyed_random import SynthStream

COLOURS = {
    "red": (206, 38, 44),
    "orange": (242, 128, 26),
    "yellow": (246, 208, 48),
    "green": (46, 148, 66),
    "blue": (42, 84, 192),
    "purple": (122, 56, 164),
    "pink": (242, 128, 178),
    "brown": (124, 78, 46),
    "white": (240, 239, 234),
    "black": (44, 44, 50),
}
PATTERNS = ("plain", "striped", "dotted", "checked", "zigzag", "two-tone", "diagonal", "emblem")
ARRANGEMENTS = ("single", "trio", "tray")  # fruit is not printed on, so these take the place of its pattern
# Invented names; each brand has a sign of its own.
BRANDS = {
    "Nuvolo": "star",
    "Brimka": "disc",
    "Tafelo": "diamond",
    "Zorvia": "triangle",
    "Quendo": "heart",
    "Molari": "bolt",
    "Pintek": "moon",
    "Havuna": "drop",
    "Oskery": "leaf",
    "Drupa": "flower",
    "Kestri": "hexagon",
    "Wumbel": "cross",
}


class Kind(NamedTuple):
    """A kind of product: its group, the words of its small print and, for fruit, its natural colours."""

    category: str
    variants: tuple[str, ...]
    colours: tuple[str, ...] = tuple(COLOURS)
    patterns: tuple[str, ...] = PATTERNS


_FOOD = ("Classic", "Honey", "Cocoa", "Berry", "Family 1 kg", "Mini 200 g")
_DRINK = ("Classic", "Mild", "Extra", "Light", "500 ml", "1 litre")
_CARE = ("Sensitive", "Fresh", "Citrus", "Refill", "250 ml", "750 ml")
_WEAR = ("S", "M", "L", "XL")
_GOODS = ("Mini", "Sport", "City", "Junior")
_FRUIT = ("Class I",)

KINDS = {
    "cereal box": Kind("package", _FOOD),
    "milk carton": Kind("package", _DRINK),
    "tin": Kind("package", _FOOD),
    "jam jar": Kind("jar", _FOOD),
    "juice bottle": Kind("bottle", _DRINK),
    "wine bottle": Kind("bottle", _DRINK),
    "shampoo bottle": Kind("bottle", _CARE),
    "spray bottle": Kind("bottle", _CARE),
    "t-shirt": Kind("clothes", _WEAR),
    "dress": Kind("clothes", _WEAR),
    "trousers": Kind("clothes", _WEAR),
    "sock": Kind("clothes", _WEAR),
    "cap": Kind("clothes", _WEAR),
    "sneaker": Kind("shoes", _WEAR),
    "boot": Kind("shoes", _WEAR),
    "handbag": Kind("bag", _GOODS),
    "backpack": Kind("bag", _GOODS),
    "mug": Kind("kitchen", _GOODS),
    "teapot": Kind("kitchen", _GOODS),
    "ball": Kind("toy", _GOODS),
    "toy car": Kind("toy", _GOODS),
    "apple": Kind("fruit", _FRUIT, ("red", "green", "yellow"), ARRANGEMENTS),
    "pear": Kind("fruit", _FRUIT, ("green", "yellow"), ARRANGEMENTS),
    "banana": Kind("fruit", _FRUIT, ("yellow", "green"), ARRANGEMENTS),
    "orange": Kind("fruit", _FRUIT, ("orange",), ARRANGEMENTS),
    "lemon": Kind("fruit", _FRUIT, ("yellow", "green"), ARRANGEMENTS),
}
MAX_PRODUCTS = 2000  # far below the number of combinations, so that drawing different ones by chance ends soon


@dataclass(frozen=True)
class Product:
    """One product of the catalogue.

    Args:
        number: its place in the catalogue.
        kind: key of KINDS.
        colour: key of COLOURS.
        accent: key of COLOURS, that of pattern and details.
        pattern: one of PATTERNS, for fruit one of ARRANGEMENTS.
        brand: key of BRANDS.
        variant: the word in small print, a flavour or a size.
        unseen: True if it occurs in no training photo, no shared split and no click.
        twin: number of the product that differs in small print or colour only.
    """

    number: int
    kind: str
    colour: str
    accent: str
    pattern: str
    brand: str
    variant: str
    unseen: bool = False
    twin: int | None = None

    @property
    def category(self) -> str:
        """Group of its kind."""
        return KINDS[self.kind].category

    @property
    def title(self) -> str:
        """Brand, colour, pattern, kind and small print."""
        return f"{self.brand} {self.colour} {self.pattern} {self.kind}, {self.variant}"

    @property
    def description(self) -> str:
        """Three sentences on its look."""
        if self.category == "fruit":
            shown = {"single": "A single fruit", "trio": "Three fruits", "tray": f"Fruits in a {self.accent} tray"}
            return (
                f"{shown[self.pattern]}: ripe {self.colour} {self.kind} by {self.brand}. "
                f"Look for the {BRANDS[self.brand]} sticker. {self.variant}, washed and sorted."
            )
        finish = {"plain": "in one colour", "emblem": f"with a big {self.accent} {BRANDS[self.brand]}"}
        look = finish.get(self.pattern, f"with a {self.pattern} design in {self.colour} and {self.accent}")
        return (
            f"A {self.colour} {self.kind} by {self.brand}, {look}. Its details are {self.accent}, and the brand's "
            f"{BRANDS[self.brand]} is its sign. This is the {self.variant} version."
        )


@cache
def make_products(count: int, near_duplicates: float, unseen: float, seed: int) -> tuple[Product, ...]:
    """Draws the products: `near_duplicates` of `count` belong to pairs, `unseen` of them are never trained on.

    Other products of one kind differ in at least two of colour, pattern and brand while there is room, else in one.
    """
    rng = np.random.default_rng([seed, SynthStream.PRODUCTS])
    pairs = round(count * near_duplicates / 2)
    products: list[Product] = []
    looks: list[tuple[str, ...]] = []
    bag: list[str] = []
    tries = 0
    while len(products) < count - pairs:
        # A shuffled bag of all kinds, again and again, makes kinds equally frequent; fruit has less room and ends
        # early.
        bag = bag or [str(kind) for kind in rng.permutation(list(KINDS))]
        name = bag.pop()
        kind = KINDS[name]
        colour, pattern, brand = (str(rng.choice(pool)) for pool in (kind.colours, kind.patterns, list(BRANDS)))
        look = (name, colour, pattern, brand)
        room = 2 if tries < 20 * count else 3
        tries += 1
        alike = (sum(map(operator.eq, look, other)) for other in looks if other[0] == name)
        if max(alike, default=0) > room:
            continue
        looks.append(look)
        accent, variant = str(rng.choice(contrasts(colour))), str(rng.choice(kind.variants))
        products.append(Product(len(products), name, colour, accent, pattern, brand, variant))
    for number in rng.permutation(len(products))[:pairs]:
        products[number] = replace(products[number], twin=len(products))
        products.append(_twin(products[number], len(products), looks, rng))
    return tuple(_hold_out(products, round(count * unseen), rng))


def contrasts(colour: str) -> list[str]:
    """Colours that stand out on `colour` by their brightness."""

    def luma(name: str) -> float:
        return float(np.dot(COLOURS[name], (0.299, 0.587, 0.114)))

    return [other for other in COLOURS if abs(luma(other) - luma(colour)) > 60]


def _twin(product: Product, number: int, looks: list[tuple[str, ...]], rng: np.random.Generator) -> Product:
    kind = KINDS[product.kind]
    twin = replace(product, number=number, twin=product.number)
    others = [variant for variant in kind.variants if variant != product.variant]
    if others and rng.random() < 0.5:
        return replace(twin, variant=str(rng.choice(others)))
    # The accent stays, so the new colour has to stand out from it too.
    taken = {look[1] for look in looks if look == (product.kind, look[1], product.pattern, product.brand)}
    colours = [colour for colour in kind.colours if colour not in taken and product.accent in contrasts(colour)]
    if not colours:
        return replace(twin, variant=str(rng.choice(others)) if others else "Class II")
    return replace(twin, colour=str(rng.choice(colours)))


def _hold_out(products: list[Product], count: int, rng: np.random.Generator) -> list[Product]:
    """Marks `count` products as unseen: first those whose kind, colour, pattern and brand training still shows."""

    def values(product: Product) -> list[tuple[str, str]]:
        return [(field, getattr(product, field)) for field in ("kind", "colour", "pattern", "brand")]

    left = Counter(value for product in products for value in values(product))
    order = [int(number) for number in rng.permutation(len(products))]
    chosen: list[int] = []
    for number in order:
        if len(chosen) < count and min(left[value] for value in values(products[number])) > 1:
            chosen.append(number)
            left.subtract(values(products[number]))
    chosen += [number for number in order if number not in chosen][: count - len(chosen)]
    return [replace(product, unseen=product.number in chosen) for product in products]
