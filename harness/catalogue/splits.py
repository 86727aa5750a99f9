"""Splits of a shop's photos where it has none: val and test photos, and products held out from training.

Every choice is keyed by the seed and by names (a product's, a photo's), so that the order of the rows does not matter
and rows that come later move no others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import xxhash

from harness.catalogue.catalogue import ALL_SPLITS
from harness.catalogue.samples import KINDS
from harness.core.errors import UserError
from harness.core.keyed_random import Stream, keyed_uniform

SHARE = 0.1  # of the products that are held out, and of the photos of each other product for val and for test
VAL_SHARE = 0.05  # of the products that are held out for val, so that training sees how new products fare
FEWEST_PRODUCTS, FEWEST_FOR_VAL = 5, 20  # with less, none is held out for test, for val
_USUAL = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class Photo(NamedTuple):
    """One image of a shop; product, split and kind may be empty."""

    image: str
    product: str
    split: str = ""
    kind: str = ""


class Place(NamedTuple):
    """Kind and split of a photo in the catalogue."""

    kind: str
    split: str


def usual_split(name: str) -> str:
    """train, val or test for their usual names, else ''."""
    return _USUAL.get(name.strip().lower(), "")


def place(photos: Sequence[Photo], seed: int) -> list[Place]:
    """Kind and split of each photo.

    Without a kind, the first photo of a product is its document and the others are query photos. Splits that the photos
    have are kept. Where val or test has no query photo, some of the train photos go there; where no photo has a split,
    some products are held out too: all photos and the document of a tenth are `test`, those of a twentieth `val`. Each
    other product keeps at least one train photo, and an image that shows several products is in one split.

    Raises:
        UserError: no product has a document and a query photo to train on, or there are too few for val and test.
    """
    kinds = _kinds(photos)
    splits = [usual_split(photo.split) or photo.split.strip() for photo in photos]
    queries = [n for n, kind in enumerate(kinds) if kind == "query"]
    given = {splits[n] for n in queries} - {"", ALL_SPLITS}
    with_document = {photo.product for photo, kind in zip(photos, kinds, strict=True) if kind == "document"} - {""}
    members: dict[str, list[int]] = defaultdict(list)
    for n in queries:
        if splits[n] in ("", ALL_SPLITS, "train") and photos[n].product in with_document:
            members[photos[n].product].append(n)
    if not members:
        raise UserError(
            "no product has two images, one for the catalogue and a photo to train on",
            "Check --product-column: it names the product that an image shows, equal in all rows of that product",
        )
    images = {product: {photos[n].image for n in rows} for product, rows in members.items()}
    missing = [name for name in ("val", "test") if name not in given]
    groups = sorted(_groups(photos, members), key=lambda group: _uniform(seed, min(group)))
    held = {} if given else _hold_out(groups, "test", seed, len(members), {})
    if held and len(members) >= FEWEST_FOR_VAL:
        held |= _hold_out(groups, "val", seed, len(members), held, VAL_SHARE)
    moved = _move({product: found for product, found in images.items() if product not in held}, missing, seed)
    for name in missing:
        if name not in {*moved.values(), *held.values()}:
            held |= _hold_out(groups, name, seed, len(members), held)
        if name not in {*moved.values(), *held.values()}:
            raise UserError(
                f"{len(members):,} products with {sum(map(len, members.values())):,} photos are too few to keep some "
                f"for {name}",
                f"Give some products three images or more, or name {FEWEST_PRODUCTS} products",
            )
    places = []
    for photo, kind, split in zip(photos, kinds, splits, strict=True):
        if photo.product in held:
            split = held[photo.product]
        elif kind == "query" and split in ("", ALL_SPLITS, "train"):
            split = moved.get(photo.image, "train")
        places.append(Place(kind, split))
    return _with_documents(photos, places)


def _kinds(photos: Sequence[Photo]) -> list[str]:
    seen: set[str] = set()
    kinds = []
    for photo in photos:
        kind = KINDS.get(photo.kind.strip().lower())
        if kind is None:
            kind = "query" if photo.product in seen and photo.product else "document"
            seen.add(photo.product)
        kinds.append(kind)
    return kinds


def _with_documents(photos: Sequence[Photo], places: Sequence[Place]) -> list[Place]:
    """The places, documents in every split except where all photos of their product are in one that is not train."""
    around: dict[str, set[str]] = defaultdict(set)
    for photo, (kind, split) in zip(photos, places, strict=True):
        if kind == "query":
            around[photo.product].add(split)
    result = []
    for photo, (kind, split) in zip(photos, places, strict=True):
        if kind == "document" and (split in ("", "train") or around[photo.product] - {split}):
            split = ALL_SPLITS
        result.append(Place(kind, split))
    return result


def _groups(photos: Sequence[Photo], members: Mapping[str, Sequence[int]]) -> list[list[str]]:
    """Products that share an image, directly or through others; most stand by themselves."""
    leader: dict[str, str] = {}

    def find(product: str) -> str:
        while (above := leader.setdefault(product, product)) != product:
            leader[product] = product = leader[above]
        return product

    first: dict[str, str] = {}
    for photo in photos:
        if photo.product:
            leader[find(photo.product)] = find(first.setdefault(photo.image, photo.product))
    found: dict[str, list[str]] = defaultdict(list)
    for product in members:
        found[find(product)].append(product)
    return list(found.values())


def _hold_out(
    groups: Sequence[list[str]], name: str, seed: int, products: int, taken: Mapping[str, str], share: float = SHARE
) -> dict[str, str]:
    """Products of about a `share` of the groups -> the split `name`. `groups` are in the order of their draw."""
    if products < FEWEST_PRODUCTS:
        return {}
    free = [group for group in groups if len(group) <= max(1, SHARE * products) and group[0] not in taken]
    least = SHARE if taken else 0.0
    chosen = [group for group in free if least <= _uniform(seed, min(group)) < least + share] or free[:1]
    return {product: name for group in chosen for product in group}


def _move(images: Mapping[str, Iterable[str]], missing: Sequence[str], seed: int) -> dict[str, str]:
    """Image -> val or test for a tenth of each product's photos; every product keeps a train photo."""
    draw = {image: _uniform(seed, image) for found in images.values() for image in found}
    kept = {max(found, key=draw.__getitem__) for found in map(list, images.values())}
    free = sorted((image for image in draw if image not in kept), key=draw.__getitem__)
    moved: dict[str, str] = {}
    for number, name in enumerate(missing):
        chosen = [image for image in free if number * SHARE <= draw[image] < (number + 1) * SHARE]
        left = [image for image in free if draw[image] >= len(missing) * SHARE]
        chosen = chosen or left[number : number + 1]
        moved |= dict.fromkeys(chosen, name)
    return moved


def _uniform(seed: int, name: str) -> float:
    return float(keyed_uniform(seed, Stream.SPLIT, xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogateescape"))))
