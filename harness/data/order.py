"""The order of the samples: a pure function of the position, without shuffling, lists or state.

    position -> (epoch, offset) -> keyed bijection of the epoch's slots -> slot -> class -> keyed rotation of members

An epoch of a kind has one position for each slot that governance gave; every class fills exactly its slots in it. The
slots exist as prefix sums only, mapped from disk, so that ten billion of them open as fast as ten.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from harness.catalogue.catalogue import MOST, open_array
from harness.catalogue.classes import ARRAYS, GOVERNANCE_FORMAT, KINDS
from harness.core.errors import UserError
from harness.core.files import read_record
from harness.core.keyed_random import Stream, keyed_hash, keyed_permutation

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Draw:
    """Samples at n positions; int64 arrays [n]."""

    sample_ids: Ints
    class_ids: Ints
    epochs: Ints


@dataclass(frozen=True)
class _Kind:
    """One kind's arrays as harness/commands/govern.py writes them, memory-mapped."""

    members: Ints
    member_offsets: Ints
    slot_offsets: Ints


class ClassOrder:
    """Order defined by a governed catalogue and a seed.

    Attributes:
        seed: any integer.
        order_id: 16 hex digits, checksum of the governed classes; positions are comparable only under the same id.
        num_classes: class ids are 0 .. num_classes - 1.
    """

    def __init__(self, kinds: dict[str, _Kind], order_id: str, num_classes: int, seed: int) -> None:
        self._kinds = kinds
        self.order_id = order_id
        self.num_classes = num_classes
        self.seed = seed

    @classmethod
    def open(cls, catalogue: Path, seed: int) -> ClassOrder:
        """Maps the classes of a catalogue without reading them, at the same cost for any size.

        Raises:
            UserError: the catalogue has no classes, or they are incomplete.
        """
        folder, remedy = Path(catalogue) / "classes", f"Run: shelfmark govern {catalogue}"
        if not (folder / "governance.json").is_file():
            raise UserError(f"{catalogue} has no classes; run: shelfmark govern {catalogue}")
        meta = read_record(folder / "governance.json", remedy)
        if meta.values.get("format") != GOVERNANCE_FORMAT:
            raise UserError(f"{folder} has format {meta.values.get('format')}, not {GOVERNANCE_FORMAT}", remedy)
        num_classes = meta.number("num_classes", MOST)
        kinds = {}
        for name in KINDS:
            arrays = _Kind(*(open_array(folder / f"{name}.{array}.npy", np.int64, remedy) for array in ARRAYS))
            offsets, slots = arrays.member_offsets, arrays.slot_offsets
            if not len(offsets) == len(slots) == num_classes + 1 or offsets[-1] != len(arrays.members):
                raise UserError(f"{folder}: the {name} arrays do not fit together", remedy)
            kinds[name] = arrays
        return cls(kinds, meta.get("order_id", str), num_classes, seed)

    def slots(self, kind: str) -> int:
        """Positions in one epoch of `kind` ('query' or 'document')."""
        return int(self._kinds[kind].slot_offsets[-1])

    def draw(self, kind: str, positions: npt.ArrayLike) -> Draw:
        """Samples at the given positions; each answer depends on its own position only.

        Over consecutive epochs a class walks through all its members, once each per lap, every lap in another order.

        Args:
            kind: 'query' or 'document'.
            positions: integers [n] from 0; position // slots(kind) is the epoch.

        Raises:
            UserError: the catalogue has no slots of that kind, or gives slots to a class without members.
        """
        arrays, word, slots = self._kinds[kind], KINDS[kind], self.slots(kind)
        if slots == 0:
            raise UserError(f"the catalogue's classes have no {kind} slots", "Check the result of: shelfmark govern")
        position = np.asarray(positions, dtype=np.int64)
        if position.size and position.min() < 0:
            raise ValueError("positions start at 0")
        epochs, offsets = np.divmod(position, slots)
        slot = keyed_permutation(offsets, slots, keyed_hash(self.seed, Stream.SLOT, word, epochs))
        class_ids = np.searchsorted(arrays.slot_offsets, slot, side="right") - 1
        first = arrays.slot_offsets[class_ids]
        visit = epochs * (arrays.slot_offsets[class_ids + 1] - first) + (slot - first)
        begin, size = self._members(kind, class_ids)
        lap, place = np.divmod(visit, size)
        member = keyed_permutation(place, size, keyed_hash(self.seed, Stream.MEMBER, word, class_ids, lap))
        return Draw(np.asarray(arrays.members[begin + member]), class_ids, epochs)

    def paired(self, class_ids: npt.ArrayLike, positions: npt.ArrayLike, kind: str) -> Ints:
        """Draws a member of the given kind for each class, uniform and keyed by the position.

        Args:
            class_ids: integers [n].
            positions: integers [n]; in contrastive training, positions of the queries to be paired.
            kind: kind of the members.

        Returns:
            sample ids, int64 [n].

        Raises:
            UserError: a class has no member of that kind.
        """
        classes = np.asarray(class_ids, dtype=np.int64)
        begin, size = self._members(kind, classes)
        pick = keyed_hash(self.seed, Stream.PAIR, KINDS[kind], classes, positions) % size.astype(np.uint64)
        return np.asarray(self._kinds[kind].members[begin + pick.astype(np.int64)])

    def _members(self, kind: str, class_ids: Ints) -> tuple[Ints, Ints]:
        offsets = self._kinds[kind].member_offsets
        begin = offsets[class_ids]
        size = offsets[class_ids + 1] - begin
        if (size == 0).any():
            raise UserError(
                f"class {int(class_ids[size == 0][0])} has no {kind} member",
                "Run shelfmark govern again, or choose a method that needs none",
            )
        return begin, size


def ledger(positions: npt.ArrayLike, ids: npt.ArrayLike, kind: str, key: int) -> int:
    """Sum modulo 2**64 of keyed hashes of (position, id), an account of the samples read.

    The sums of disjoint parts add up (modulo 2**64) to the sum of the whole, in any order and on any number of ranks.
    Two runs have read the same samples at the same positions if and, but for chance, only if their ledgers agree.
    """
    return int(keyed_hash(key, KINDS[kind], positions, ids).sum(dtype=np.uint64))
