"""`shelfmark queries`: Collect the sources of text queries.

queries/
    queries.json      values of the attributes with their synonyms, keywords, categories; each list in the order of its
                      codes
    attributes.npy    int32 [num_samples, attributes]: code of each value, -1 = none
    keywords.npy      int32 [num_samples, keywords_per_product]: a document's keywords, -1 behind the last
    categories.npy    int32 [num_samples], -1 = none
    texts.arrow       texts of the click log by the document that was clicked
    text_offsets.npy  int64 [num_samples + 1]: range of each document's texts
    text_clicks.npy   int64: running sum of the texts' clicks
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from harness.catalogue.catalogue import Catalogue, nearest_first
from harness.catalogue.table import Manifest
from harness.catalogue.wholeness import require_whole
from harness.core.errors import UserError
from harness.core.files import printable, read_yaml, write_json
from harness.core.manifest import write_manifest
from harness.core.staged_folder import staged_folder
from harness.text.product_queries import ARRAYS, QUERIES_FORMAT, words_of
from models.ranges import PositiveInt, UnitIntervalAbove0

EXAMPLE = "shelfmark queries catalogues/fashion --attributes gender,base_colour,sub_category --category sub_category"
CLICK_COLUMNS = ("text", "document", "clicks")
MOST_CLICKS = 10**12  # of one row: their sum must fit int64


@dataclass(frozen=True, kw_only=True)
class QueriesConfig:
    """Collects texts, keywords and categories of a catalogue's documents and writes queries/.

    Args:
        catalogue: the catalogue folder; an existing queries/ in it is replaced.
        attributes: attribute columns for queries, comma-separated; all of them by default.
        category: attribute column with a document's category; none by default.
        clicks: click log, a TSV, CSV or Parquet file with the columns text, document (item id) and clicks.
        synonyms: YAML file: a value of an attribute -> other wordings of it, a list.
        split: split that keywords and values are taken from, together with split 'all'.
        min_count: fewest titles of the split that contain a keyword; with --clicks, titles of clicked documents only.
        max_share: largest share of those titles.
        keywords_per_product: keywords kept for a document: the words of its attributes, then the rarest of its title.
    """

    catalogue: Path = field(kw_only=False)
    attributes: str = ""
    category: str = ""
    clicks: Path | None = None
    synonyms: Path | None = None
    split: str = "train"
    min_count: PositiveInt = 5
    max_share: UnitIntervalAbove0 = 0.3
    keywords_per_product: PositiveInt = 12


def run(config: QueriesConfig) -> dict[str, Any]:
    """Writes queries/ and prints a summary.

    Returns:
        keywords, categories, texts, clicked_documents and with_keywords (documents that have a keyword), all counts.

    Raises:
        UserError: an unknown attribute or split, a click log or a file of synonyms that cannot be used, or no document
            with a text or an attribute.
    """
    catalogue = Catalogue(config.catalogue)
    require_whole(catalogue)
    attributes = _columns(catalogue, config)
    rows = _Rows.read(catalogue, attributes, config)
    synonyms = _synonyms(config.synonyms)
    texts, offsets, clicks = _click_texts(config.clicks, rows.table["item"].to_pylist(), rows.documents)
    clicked = np.diff(offsets) > 0
    codes, described = _attribute_codes(rows, attributes, synonyms)
    categories, category_codes = rows.coded(config.category) if config.category else ([], rows.none())
    _require_queries(clicked | (codes >= 0).any(1), rows, catalogue, config)
    titles = [words_of(title or "") for title in rows.table["title"].to_pylist()]
    counted = rows.learned & clicked if config.clicks else rows.learned
    keywords, keyword_codes = _mined(titles, _attribute_words(codes, described), counted, config)
    meta = {
        "format": QUERIES_FORMAT,
        "attributes": described,
        "keywords": keywords,
        "keywords_per_product": config.keywords_per_product,
        "category": config.category,
        "categories": categories,
    }
    arrays = dict(zip(ARRAYS, (codes, keyword_codes, category_codes, offsets, clicks), strict=True))
    _write(catalogue.path / "queries", meta, arrays, texts)
    figures = {
        "keywords": len(keywords),
        "categories": len(categories),
        "texts": len(texts),
        "clicked_documents": int(clicked.sum()),
        "with_keywords": int((keyword_codes[rows.documents] >= 0).any(1).sum()),
    }
    print(
        f"{config.catalogue}/queries: {len(texts):,} clicked texts of {figures['clicked_documents']:,} documents, "
        f"attributes {printable(', '.join(attributes), 1000) or 'none'}; {len(keywords):,} keywords, of which "
        f"{figures['with_keywords']:,} of {int(rows.documents.sum()):,} documents have one; {len(categories):,} "
        "categories"
    )
    return figures


@dataclass(frozen=True)
class _Rows:
    """Rows of a catalogue.

    Args:
        table: their item, title and attributes, n rows.
        documents: bool [n], True for documents.
        learned: bool [n], True for the documents that keywords and values are taken from.
    """

    table: pa.Table
    documents: np.ndarray
    learned: np.ndarray

    @classmethod
    def read(cls, catalogue: Catalogue, attributes: list[str], config: QueriesConfig) -> _Rows:
        """Reads all rows.

        Raises:
            UserError: the catalogue has no split of that name.
        """
        splits = catalogue.meta["counts"]["splits"]
        if config.split not in splits:
            raise UserError(
                f"{catalogue.path} has no split {config.split!r}", f"The splits are {', '.join(splits)} (--split)"
            )
        columns = dict.fromkeys([*attributes, *([config.category] if config.category else [])])
        table = catalogue.table(["kind", "split", "item", "title", *columns])
        documents = np.array([kind == "document" for kind in table["kind"].to_pylist()])
        of_split = np.array([split in (config.split, "all") for split in table["split"].to_pylist()])
        return cls(table, documents, documents & of_split)

    def none(self) -> np.ndarray:
        """A code for each row, int32 [n], -1 for none."""
        return np.full(len(self.table), -1, np.int32)

    def coded(self, column: str) -> tuple[list[str], np.ndarray]:
        """The distinct values of the learned rows, sorted, and the code of each row's value, int32 [n], -1 for any
        other value and for none.
        """
        values = self.table[column].to_pylist()
        known = sorted({value for value, use in zip(values, self.learned, strict=True) if use and value})
        place = {value: code for code, value in enumerate(known)}
        return known, np.array([place.get(value or "", -1) for value in values], np.int32)


def _attribute_codes(
    rows: _Rows, attributes: list[str], synonyms: dict[str, list[str]]
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Codes the attributes' values.

    Returns:
        Codes int32 [rows, attributes], -1 = none; and each attribute's name and wordings of its values, in the order of
        their codes.
    """
    codes, described = np.full((len(rows.table), len(attributes)), -1, np.int32), []
    for column, name in enumerate(attributes):
        values, codes[:, column] = rows.coded(name)
        lower = [value.lower() for value in values]
        wordings = [[value, *(word.lower() for word in synonyms.get(value, []))] for value in lower]
        described.append({"name": name, "wordings": wordings})
    return codes, described


def _attribute_words(codes: np.ndarray, described: list[dict[str, Any]]) -> list[list[str]]:
    """Words of each row's attribute values, in the order of the attributes."""
    words = [[words_of(own) for own, *_ in attribute["wordings"]] for attribute in described]
    found = []
    for row in codes.tolist():
        values = [words[column][code] for column, code in enumerate(row) if code >= 0]
        found.append([word for value in values for word in value])
    return found


def _require_queries(has_query: np.ndarray, rows: _Rows, catalogue: Catalogue, config: QueriesConfig) -> None:
    """Raises UserError where no learned row has a query, bool [rows]."""
    if not has_query[rows.learned].any():
        raise UserError(
            f"no document of split {config.split!r} of {catalogue.path} has a clicked text or an attribute to make a "
            "query of",
            "Name --clicks, or ingest with --attribute-columns",
        )


def _write(folder: Path, meta: dict[str, Any], arrays: dict[str, np.ndarray], texts: list[str]) -> None:
    """Replaces queries/; its id is a checksum of all content."""
    digest = xxhash.xxh3_64(json.dumps(meta).encode())
    for array in arrays.values():
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update("\0".join(texts).encode())
    with staged_folder(folder, replace=True) as stage:
        for name, array in arrays.items():
            np.save(stage / f"{name}.npy", array)
        rows = pa.table({"text": pa.array(texts, pa.large_string())})
        with pa.ipc.new_file(stage / "texts.arrow", rows.schema) as writer:
            writer.write_table(rows)
        write_json(stage / "queries.json", {**meta, "id": digest.hexdigest()})
        write_manifest(stage)


def _columns(catalogue: Catalogue, config: QueriesConfig) -> list[str]:
    """Attribute columns that queries are made of.

    Raises:
        UserError: an unknown attribute, or a value out of range.
    """
    wanted = [name.strip() for name in config.attributes.split(",") if name.strip()] or catalogue.attributes
    for name in [*wanted, *([config.category] if config.category else [])]:
        if name not in catalogue.attributes:
            known = nearest_first(name, catalogue.attributes)
            raise UserError(
                f"{catalogue.path} has no attribute {name!r}",
                f"It has {', '.join(known) or 'none'} (ingest --attribute-columns)",
            )
    return wanted


def _synonyms(file: Path | None) -> dict[str, list[str]]:
    """Reads other wordings by the value in lower case.

    Raises:
        UserError: the file is not a table of lists of words.
    """
    if file is None:
        return {}
    content = read_yaml(file, f"--synonyms {file}")
    lists = list(content.values()) if isinstance(content, dict) else [None]
    if not all(isinstance(words, list) and all(isinstance(word, str) for word in words) for words in lists):
        raise UserError(
            f"--synonyms {file} is not a table of lists of words", "Write lines such as   navy blue: [navy, dark blue]"
        )
    return {str(value).lower(): words for value, words in content.items()}


def _mined(
    titles: list[list[str]], of_attributes: list[list[str]], counted: np.ndarray, config: QueriesConfig
) -> tuple[list[str], np.ndarray]:
    """Chooses keywords and codes each row's.

    Args:
        titles: words of each row's title.
        of_attributes: words of each row's attribute values.
        counted: bool [rows], True for rows whose titles are counted.
        config: bounds.

    Returns:
        The keywords: all words of attributes, then those of titles, most frequent first; and codes int32 [rows,
        keywords_per_product]: words of the row's attributes, then the rarest of its title, -1 behind the last.
    """
    frequency: Counter[str] = Counter()
    for words, use in zip(titles, counted, strict=True):
        if use:
            frequency.update(set(words))
    most = config.max_share * int(counted.sum())
    kept = [(word, n) for word, n in frequency.items() if config.min_count <= n <= most and not word.isdigit()]
    mined = [word for word, _ in sorted(kept, key=lambda pair: (-pair[1], pair[0]))]
    keywords = list(dict.fromkeys([*sorted(set(chain(*of_attributes))), *mined]))
    place = {word: code for code, word in enumerate(keywords)}
    codes = np.full((len(titles), config.keywords_per_product), -1, np.int32)
    for row, (attributes, words) in enumerate(zip(of_attributes, titles, strict=True)):
        of_title = sorted({place[word] for word in words if word in place}, reverse=True)  # the rarest first
        own = [place[word] for word in attributes]
        found = list(dict.fromkeys([*own, *of_title]))[: config.keywords_per_product]
        codes[row, : len(found)] = found
    return keywords, codes


def _click_texts(
    file: Path | None, items: Sequence[str], documents: np.ndarray
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Reads the click log.

    Args:
        file: the log; None has no clicks.
        items: item id of each row.
        documents: bool [rows], True for documents.

    Returns:
        Texts sorted by their document's row, offsets int64 [rows + 1] into them, and the running sum of their clicks.

    Raises:
        UserError: a row that cannot be used, or no click on a document of the catalogue.
    """
    clicks: Counter[tuple[int, str]] = Counter()
    if file is not None:
        row_of = {item: row for row, (item, use) in enumerate(zip(items, documents, strict=True)) if use}
        log = Manifest(file)
        for note in log.said:
            print(f"{file}: {note}")
        for column in CLICK_COLUMNS:
            log.require(column, "--clicks")
        for number, (cells, problem, _) in enumerate(log.rows(CLICK_COLUMNS), 1):
            text, item, count = cells
            if problem or not count.isdecimal() or int(count) > MOST_CLICKS:
                wrong = problem or f"clicks is {count!r}, not a whole number from 0 to {MOST_CLICKS:,}"
                raise UserError(f"--clicks {file}, row {number}: {wrong}")
            if text.strip() and int(count) and item in row_of:
                clicks[row_of[item], text.strip()] += int(count)
        if not clicks:
            raise UserError(f"no click of {file} has a text and leads to a document of the catalogue")
    pairs = sorted(clicks)
    offsets = np.searchsorted([row for row, _ in pairs], np.arange(len(items) + 1)).astype(np.int64)
    return [text for _, text in pairs], offsets, np.cumsum([clicks[pair] for pair in pairs], dtype=np.int64)
