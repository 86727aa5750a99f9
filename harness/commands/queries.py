"""`shelfmark queries`: what is known of a catalogue's documents besides title and photo: texts that lead to them,
keywords, categories.

queries/
    queries.json     the attributes' values with their synonyms, the keywords and the categories, each list in the order of its codes
    attributes.npy   int32 [num_samples, attributes]: code of each value, -1 = none
    keywords.npy     int32 [num_samples, keywords_per_product]: a document's keywords, -1 behind the last
    categories.npy   int32 [num_samples], -1 = none
    texts.arrow, text_offsets.npy [num_samples + 1], text_clicks.npy   texts of the click log by the document that was clicked
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from harness.catalogue.catalogue import Catalogue, nearest_first
from harness.catalogue.table import Manifest
from harness.catalogue.wholeness import require_whole
from harness.core.errors import UserError
from harness.core.files import printable, read_yaml
from harness.core.manifest import write_manifest
from harness.core.staged_folder import staged_folder
from harness.text.product_queries import ARRAYS, QUERIES_FORMAT, words_of

EXAMPLE = "shelfmark queries catalogues/fashion --attributes gender,base_colour,sub_category --category sub_category"
CLICK_COLUMNS = ("text", "document", "clicks")
MOST_CLICKS = 10**12  # of one row: their sum must fit int64


@dataclass(frozen=True, kw_only=True)
class QueriesConfig:
    """Collects texts, keywords and categories of a catalogue's documents and writes queries/.

    Args:
        catalogue: the catalogue folder; an existing queries/ in it is replaced.
        attributes: attribute columns that queries are made of, comma-separated; all of them by default.
        category: attribute column that names a document's category; none by default.
        clicks: click log, a TSV, CSV or Parquet file with the columns text, document (item id) and clicks.
        synonyms: YAML file: a value of an attribute -> other wordings of it, a list.
        split: split that keywords and values are taken from; samples of split 'all' belong to it.
        min_count: fewest titles of the split that a keyword stands in; with clicks, of the clicked documents.
        max_share: largest share of those titles.
        keywords_per_product: keywords of a document that are kept: the words of its attributes, then the rarest of its
            title.
    """

    catalogue: Path
    attributes: str = ""
    category: str = ""
    clicks: Path | None = None
    synonyms: Path | None = None
    split: str = "train"
    min_count: int = 5
    max_share: float = 0.3
    keywords_per_product: int = 12


def run(config: QueriesConfig) -> dict[str, Any]:
    """Writes queries/ and prints a summary; returns keywords, categories, texts, clicked_documents, with_keywords
    (documents).

    Raises:
        UserError: an unknown attribute, a click log or a file of synonyms that cannot be used, or nothing to make a
            query of.
    """
    catalogue = Catalogue(config.catalogue)
    require_whole(catalogue)
    attributes = _columns(catalogue, config)
    splits = catalogue.meta["counts"]["splits"]
    if config.split not in splits:
        raise UserError(
            f"{catalogue.path} has no split {config.split!r}", f"The splits are {', '.join(splits)} (--split)"
        )
    extra = [config.category] if config.category and config.category not in attributes else []
    table = catalogue.table(["kind", "split", "item", "title", *attributes, *extra])
    documents = np.array([kind == "document" for kind in table["kind"].to_pylist()])
    learned = documents & np.array([split in (config.split, "all") for split in table["split"].to_pylist()])
    synonyms = _synonyms(config.synonyms)
    texts, offsets, clicks = _click_texts(config.clicks, table["item"].to_pylist(), documents)
    codes, described = np.full((len(table), len(attributes)), -1, np.int32), []
    for column, name in enumerate(attributes):
        values, codes[:, column] = _coded(table[name].to_pylist(), learned)
        wordings = [[value.lower(), *(w.lower() for w in synonyms.get(value.lower(), []))] for value in values]
        described.append({"name": name, "wordings": wordings})
    of_attributes = [
        [
            word
            for column, code in enumerate(row)
            if code >= 0
            for word in words_of(described[column]["wordings"][code][0])
        ]
        for row in codes.tolist()
    ]
    categories: list[str] = []
    category_codes = np.full(len(table), -1, np.int32)
    if config.category:
        categories, category_codes = _coded(table[config.category].to_pylist(), learned)
    if not ((np.diff(offsets) > 0) | (codes >= 0).any(1))[learned].any():
        raise UserError(
            f"no document of split {config.split!r} of {catalogue.path} has a clicked text or an attribute to make a query of",
            "Name --clicks, or ingest with --attribute-columns",
        )
    titles = [words_of(title or "") for title in table["title"].to_pylist()]
    counted = learned & (np.diff(offsets) > 0) if config.clicks else learned
    keywords, keyword_codes = _mined(titles, of_attributes, counted, config)
    arrays = dict(zip(ARRAYS, (codes, keyword_codes, category_codes, offsets, clicks), strict=True))
    meta = {
        "format": QUERIES_FORMAT,
        "attributes": described,
        "keywords": keywords,
        "keywords_per_product": config.keywords_per_product,
        "category": config.category,
        "categories": categories,
    }
    digest = xxhash.xxh3_64(json.dumps(meta).encode())
    for array in arrays.values():
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update("\0".join(texts).encode())
    with staged_folder(catalogue.path / "queries", replace=True) as stage:
        for name, array in arrays.items():
            np.save(stage / f"{name}.npy", array)
        rows = pa.table({"text": pa.array(texts, pa.large_string())})
        with pa.ipc.new_file(stage / "texts.arrow", rows.schema) as writer:
            writer.write_table(rows)
        (stage / "queries.json").write_text(json.dumps({**meta, "id": digest.hexdigest()}, indent=1), encoding="utf-8")
        write_manifest(stage)
    figures = {
        "keywords": len(keywords),
        "categories": len(categories),
        "texts": len(texts),
        "clicked_documents": int((np.diff(offsets) > 0).sum()),
        "with_keywords": int((keyword_codes[documents] >= 0).any(1).sum()),
    }
    print(
        f"{config.catalogue}/queries: {figures['texts']:,} clicked texts of {figures['clicked_documents']:,} documents, attributes "
        f"{printable(', '.join(attributes), 1000) or 'none'}; {len(keywords):,} keywords, of which {figures['with_keywords']:,} of "
        f"{int(documents.sum()):,} documents have one; {len(categories):,} categories"
    )
    return figures


def _columns(catalogue: Catalogue, config: QueriesConfig) -> list[str]:
    wanted = [name.strip() for name in config.attributes.split(",") if name.strip()] or catalogue.attributes
    for name in [*wanted, *([config.category] if config.category else [])]:
        if name not in catalogue.attributes:
            known = nearest_first(name, catalogue.attributes)
            raise UserError(
                f"{catalogue.path} has no attribute {name!r}",
                f"It has {', '.join(known) or 'none'} (ingest --attribute-columns)",
            )
    if config.min_count < 1 or not 0 < config.max_share <= 1 or config.keywords_per_product < 1:
        raise UserError("--min-count and --keywords-per-product must be at least 1, --max-share in (0, 1]")
    return wanted


def _synonyms(file: Path | None) -> dict[str, list[str]]:
    """Value in lower case -> other wordings."""
    if file is None:
        return {}
    content = read_yaml(file, f"--synonyms {file}")
    lists = list(content.values()) if isinstance(content, dict) else [None]
    if not all(isinstance(words, list) and all(isinstance(word, str) for word in words) for words in lists):
        raise UserError(
            f"--synonyms {file} is no table of lists of words", "Write lines such as   navy blue: [navy, dark blue]"
        )
    return {str(value).lower(): words for value, words in content.items()}


def _coded(values: Sequence[str | None], learned: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The distinct values among `learned` rows, sorted, and each row's code int32, -1 for any other value and for none."""
    known = sorted({value for value, use in zip(values, learned, strict=True) if use and value})
    place = {value: code for code, value in enumerate(known)}
    return known, np.array([place.get(value or "", -1) for value in values], np.int32)


def _mined(
    titles: list[list[str]], of_attributes: list[list[str]], counted: np.ndarray, config: QueriesConfig
) -> tuple[list[str], np.ndarray]:
    """The keywords: all words of attributes, then those of titles, most frequent first; and each row's as codes int32
    [rows, keywords_per_product]: those of its attributes, then the rarest of its title."""
    frequency: Counter[str] = Counter()
    for words, use in zip(titles, counted, strict=True):
        if use:
            frequency.update(set(words))
    most = config.max_share * int(counted.sum())
    kept = [(word, n) for word, n in frequency.items() if config.min_count <= n <= most and not word.isdigit()]
    mined = [word for word, _ in sorted(kept, key=lambda pair: (-pair[1], pair[0]))]
    keywords = list(dict.fromkeys([*sorted({word for row in of_attributes for word in row}), *mined]))
    place = {word: code for code, word in enumerate(keywords)}
    codes = np.full((len(titles), config.keywords_per_product), -1, np.int32)
    for row, (attributes, words) in enumerate(zip(of_attributes, titles, strict=True)):
        rarest = sorted({place[word] for word in words if word in place}, reverse=True)
        found = list(dict.fromkeys([*(place[word] for word in attributes), *rarest]))[: config.keywords_per_product]
        codes[row, : len(found)] = found
    return keywords, codes


def _click_texts(
    file: Path | None, items: Sequence[str], documents: np.ndarray
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Texts sorted by their document's row, offsets [rows + 1] into them, and the running sum of their clicks."""
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
                wrong = problem or f"clicks is {count!r}, no whole number from 0 to {MOST_CLICKS:,}"
                raise UserError(f"--clicks {file}, row {number}: {wrong}")
            if text.strip() and int(count) and item in row_of:
                clicks[row_of[item], text.strip()] += int(count)
        if not clicks:
            raise UserError(f"no click of {file} has a text and leads to a document of the catalogue")
    pairs = sorted(clicks)
    offsets = np.searchsorted([row for row, _ in pairs], np.arange(len(items) + 1)).astype(np.int64)
    return [text for _, text in pairs], offsets, np.cumsum([clicks[pair] for pair in pairs], dtype=np.int64)
