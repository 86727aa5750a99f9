"""Training queries of a catalogue's documents, made of clicks and attributes.

A training query is a function of (seed, epoch, sample id): a clicked text drawn by its clicks or, for a document
without one, some of its attributes' values in any order, each in one of its wordings. The papers train on click logs;
queries from attributes are ours.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from harness.catalogue.catalogue import MOST, Catalogue, open_array
from harness.core.errors import UserError
from harness.core.files import Record, read_record
from harness.core.keyed_random import Stream, keyed_hash, keyed_uniform

QUERIES_FORMAT = 1
# Of queries/: type and number of dimensions.
ARRAYS: dict[str, tuple[type[np.integer], int]] = {
    "attributes": (np.int32, 2),
    "keywords": (np.int32, 2),
    "categories": (np.int32, 1),
    "text_offsets": (np.int64, 1),
    "text_clicks": (np.int64, 1),
}
_COUNT, _ORDER = Stream.ATTRIBUTE_COUNT, Stream.ATTRIBUTE_ORDER
_WORDING, _TEXT = Stream.WORDING, Stream.CLICKED_TEXT

Ints = npt.NDArray[np.int64]


def words_of(text: str) -> list[str]:
    """Lower-case words of a text, without possessive and plural s, so that Men's, Mens and Men are one word."""
    return [re.sub(r"(['’]s|(?<!s)s)$", "", word) or word for word in re.findall(r"[^\W_]+(?:['’]s)?", text.lower())]


class ProductQueries:
    """The queries/ of a catalogue, memory-mapped.

    Attributes:
        meta: content of queries.json.
        keywords: int32 [num_samples, K].
        categories: int32 [num_samples].

    Raises:
        UserError: the catalogue has none, one of another format, or one of another number of samples.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        folder = catalogue.path / "queries"
        self.meta = read_meta(catalogue.path)
        again = f"Run `shelfmark queries {catalogue.path}` again"
        loaded = {name: open_array(folder / f"{name}.npy", of, again, ndim) for name, (of, ndim) in ARRAYS.items()}
        try:
            texts = pa.ipc.open_file(pa.memory_map(str(folder / "texts.arrow"))).read_all()
            texts.column("text")
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder} is damaged: {error}", again) from error
        rows, offsets = catalogue.num_samples, loaded["text_offsets"]
        fits = all(len(loaded[name]) == rows for name in ("attributes", "keywords", "categories"))
        if not fits or len(offsets) != rows + 1 or not offsets[-1] == len(loaded["text_clicks"]) == len(texts):
            raise UserError(f"{folder} does not fit the catalogue", again)
        self.keywords, self.categories = loaded["keywords"], loaded["categories"]
        self._codes, self._offsets, self._clicks = loaded["attributes"], loaded["text_offsets"], loaded["text_clicks"]
        self._texts = texts.column("text")
        self._code = {word: code for code, word in enumerate(self.meta["keywords"])}
        self._wordings = [values["wordings"] for values in self.meta["attributes"]]
        # Another wording names the keywords of the value itself: 'navy' those of 'blue'.
        self._synonyms: dict[tuple[str, ...], list[str]] = {}
        for own, *others in (wordings for column in self._wordings for wordings in column):
            for wording in others:
                self._synonyms.setdefault(tuple(words_of(wording)), []).extend(words_of(own))

    def draw(self, sample_ids: Ints, epochs: Ints, seed: int, least: int, most: int) -> list[str]:
        """A query for each document; empty where nothing is known of it.

        Args:
            sample_ids: int64 [n].
            epochs: int64 [n].
            seed: of the run.
            least: fewest attributes of a query made of attributes; all of them where a document has fewer.
            most: most of them.
        """
        key = (epochs, sample_ids)
        first, end = self._offsets[sample_ids], self._offsets[sample_ids + 1]
        # text_clicks counts up over all texts, so that a document's texts are a stretch of a line, each as long as its
        # clicks.
        begin, total = self._upto(first), self._upto(end) - self._upto(first)
        clicked = begin + (keyed_uniform(seed, _TEXT, *key) * total).astype(np.int64)
        text = np.searchsorted(self._clicks, clicked, side="right")
        made = self._from_attributes(sample_ids, epochs, seed, least, most)
        return [self._texts[int(t)].as_py() if n else m for t, n, m in zip(text, end - first, made, strict=True)]

    def keywords_of(self, texts: list[str]) -> Ints:
        """Keywords that texts name, themselves or by a synonym of an attribute's value, as codes int64 [n, K], -1
        behind the last.
        """
        found = np.full((len(texts), self.keywords.shape[1]), -1, np.int64)
        longest = max(map(len, self._synonyms), default=0)
        for row, text in enumerate(texts):
            words = words_of(text)
            stretches = (tuple(words[i : i + n]) for i in range(len(words)) for n in range(1, longest + 1))
            meant = [word for stretch in stretches for word in self._synonyms.get(stretch, [])]
            codes = list(dict.fromkeys(self._code[word] for word in [*words, *meant] if word in self._code))
            found[row, : len(codes)] = codes[: found.shape[1]]
        return found

    def _upto(self, places: Ints) -> Ints:
        """Clicks on all texts before each place."""
        return np.where(places > 0, self._clicks[np.maximum(places, 1) - 1], 0) if len(self._clicks) else 0 * places

    def _from_attributes(self, sample_ids: Ints, epochs: Ints, seed: int, least: int, most: int) -> list[str]:
        codes = np.asarray(self._codes[sample_ids])
        if not codes.shape[1]:
            return [""] * len(sample_ids)
        which, key = np.arange(codes.shape[1]), (epochs[:, None], sample_ids[:, None])
        place = np.where(codes < 0, np.inf, keyed_uniform(seed, _ORDER, *key, which))
        known = (codes >= 0).sum(1)
        span = np.maximum(np.minimum(most, known) - least, 0) + 1
        count = np.minimum(least + (keyed_uniform(seed, _COUNT, epochs, sample_ids) * span).astype(np.int64), known)
        wording = keyed_hash(seed, _WORDING, *key, which)
        made = []
        for row, order in enumerate(place.argsort(axis=1, kind="stable")):
            parts = []
            for column in order[: count[row]]:
                choices = self._wordings[column][codes[row, column]]
                parts.append(choices[int(wording[row, column] % np.uint64(len(choices)))])
            made.append(" ".join(parts))
        return made


def read_meta(catalogue: Path) -> dict[str, Any]:
    """queries.json of a catalogue.

    Raises:
        UserError: there is none, or one of another format.
    """
    file = catalogue / "queries" / "queries.json"
    if not file.is_file():
        raise UserError(f"{catalogue} has no queries", f"Run `shelfmark queries {catalogue}`")
    record = read_record(file, f"Run `shelfmark queries {catalogue}` again")
    if record.values.get("format") != QUERIES_FORMAT:
        raise UserError(
            f"{file} has format {record.values.get('format')}, this version reads {QUERIES_FORMAT}", "Make it again"
        )
    record.get("id", str)
    record.number("keywords_per_product", MOST, 1)
    record.list_of("keywords", str)
    record.list_of("categories", str)
    for values in record.list_of("attributes", dict):
        attribute = Record(file, values, record.remedy)
        attribute.get("name", str)
        for wordings in attribute.list_of("wordings", list):
            if not wordings or not all(isinstance(wording, str) for wording in wordings):
                attribute.refuse("wordings are not lists of texts")
    return dict(record.values)
