"""`shelfmark queries` and the training queries that follow from it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.catalogue.catalogue import Catalogue
from harness.commands.queries import QueriesConfig, run
from harness.core.errors import UserError
from harness.core.files import sealed
from harness.text.product_queries import ProductQueries, words_of
from tests.twins import documents_alone

CLICKS = [
    ("text", "document", "clicks"),
    ("round red thing", "d0", "2"),
    ("crimson", "d0", "2"),
    ("round red thing ", "d0", "4"),  # once more
    ("green", "d1", "1"),
    ("never clicked", "d1", "0"),
    (" ", "d2", "9"),
    ("of another shop", "d99", "9"),
    ("star", "d11", "3"),
]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only!"""
    return documents_alone(tmp_path_factory.mktemp("drawn"))


@pytest.fixture
def catalogue(drawn: Path, tmp_path: Path) -> Path:
    return shutil.copytree(drawn, tmp_path / "catalogue")


def write(file: Path, rows: list[tuple[str, ...]]) -> Path:
    file.write_text("\n".join("\t".join(row) for row in rows) + "\n", encoding="utf-8")
    return file


def made(catalogue: Path, **options: Any) -> ProductQueries:
    """The queries of a catalogue with few titles."""
    run(QueriesConfig(catalogue=catalogue, **{"min_count": 2, "max_share": 0.5, **options}))
    return ProductQueries(Catalogue(catalogue))


def test_words_have_neither_possessive_nor_plural() -> None:
    assert words_of("Men's MENS men, Men’s T-shirts; dress 42s s") == "men men men men t shirt dress 42 s".split()
    assert words_of("") == []


def test_codes_are_those_of_the_values_of_the_split(catalogue: Path, tmp_path: Path) -> None:
    synonyms = tmp_path / "synonyms.yaml"
    synonyms.write_text("Blue: [Navy, sky blue]\npurple: [violet]\n")
    queries = made(catalogue, attributes=" shape, colour", category="shape", synonyms=synonyms)
    assert queries.meta["attributes"] == [
        {"name": "shape", "wordings": [["box"], ["cross"], ["disc"]]},
        {"name": "colour", "wordings": [["blue", "navy", "sky blue"], ["green"], ["red"], ["yellow"]]},
    ]
    assert queries.meta["categories"] == ["box", "cross", "disc"]
    # No shape is none of the values, and 'star' is known of a document of val alone.
    shapes = [-1, 2, 2, 2, 0, 0, 0, 0, 1, 1, 1, -1]
    assert queries.categories.tolist() == shapes
    codes = np.load(catalogue / "queries/attributes.npy")
    assert codes.dtype == np.int32 and codes.tolist() == [[s, c] for s, c in zip(shapes, [2, 1, 0, 3] * 3, strict=True)]
    assert made(catalogue, split="val").meta["attributes"][1]["wordings"] == [["star"]]


def test_keywords_are_words_of_attributes_and_the_rarest_of_a_title_that_are_not_too_rare(catalogue: Path) -> None:
    def of(**options: Any) -> ProductQueries:
        return made(catalogue, **{"attributes": "colour", "max_share": 0.4, **options})

    # Of 11 titles of the split all have 'acme' and 24, 4 'disc' and 'box', 3 'cross', 2 style0 to style4, 1 style5.
    colours, styles = ["blue", "green", "red", "yellow"], [f"style{n}" for n in range(5)]
    queries, order = of(), [*colours, "box", "disc", "cross", *styles]
    assert queries.meta["keywords"] == order
    assert queries.keywords.shape == (12, 12) and queries.keywords.dtype == np.int32
    words = [[order[code] for code in row if code >= 0] for row in queries.keywords]
    assert words[0] == ["red", "style0", "disc"] and words[7] == ["yellow", "style3", "box"]
    assert words[11] == ["yellow", "cross"], "a document of another split has keywords of this one"
    assert (queries.keywords[0, 3:] == -1).all()
    named = queries.keywords_of(["Yellow red crosse's reds", "navy thing", "", "style4 disc"])
    assert named.shape == (4, 12) and named[:, :3].tolist() == [[3, 2, -1], [-1] * 3, [-1] * 3, [11, 5, -1]]
    assert of(keywords_per_product=2).keywords.tolist() == queries.keywords[:, :2].tolist()
    assert of(keywords_per_product=1).keywords_of(["red green"]).tolist() == [[2]]
    assert of(min_count=3).meta["keywords"] == order[:7]
    assert of(max_share=0.3).meta["keywords"] == [*colours, "cross", *styles]
    assert of(max_share=1.0).meta["keywords"] == [*colours, "acme", *order[4:]], "24 is a number"


def test_a_synonym_names_the_keywords_of_its_value(catalogue: Path, tmp_path: Path) -> None:
    synonyms = tmp_path / "synonyms.yaml"
    synonyms.write_text("Blue: [Navy, colours of the sky]\nred: [navy]\ncross: [box]\n")
    queries = made(catalogue, attributes="colour,shape", synonyms=synonyms)
    blue, box, cross, disc, _, red, _ = queries.meta["keywords"][:7]
    assert (blue, box, cross, disc, red) == ("blue", "box", "cross", "disc", "red")
    texts = ["disc, colour of the sky", "disc of the sky", "a box", "navy"]
    found = [[queries.meta["keywords"][code] for code in row if code >= 0] for row in queries.keywords_of(texts)]
    assert found == [["disc", "blue"], ["disc"], ["box", "cross"], ["blue", "red"]]


def test_with_clicks_keywords_of_titles_are_those_of_clicked_documents(catalogue: Path, tmp_path: Path) -> None:
    # d0 and d1 are clicked and of the split; what was clicked of d2 has no text.
    clicks = write(tmp_path / "clicks.tsv", CLICKS)
    queries = made(catalogue, clicks=clicks, attributes="colour", max_share=1.0)
    assert queries.meta["keywords"] == ["blue", "green", "red", "yellow", "acme", "disc", "style0"]


def test_the_id_is_that_of_the_content(catalogue: Path, tmp_path: Path) -> None:
    clicks = [
        write(tmp_path / f"{n}.tsv", rows) for n, rows in enumerate((CLICKS, [*CLICKS[:-1], ("star", "d11", "4")]))
    ]
    ids = [made(catalogue, clicks=file).meta["id"] for file in (clicks[0], None, clicks[1], clicks[0])]
    assert ids[0] == ids[3] and len(set(ids)) == 3


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".parquet"])
def test_texts_are_drawn_by_their_clicks(catalogue: Path, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"clicks{suffix}"
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        text, document, clicks = zip(*CLICKS[1:], strict=True)
        pq.write_table(pa.table({"text": text, "document": document, "clicks": [int(n) for n in clicks]}), file)
    else:
        write(file, CLICKS)
        if suffix == ".csv":
            file.write_text(file.read_text().replace("\t", ","))
    queries = made(catalogue, clicks=file)
    epochs = np.arange(4000)
    found = {i: Counter(queries.draw(np.full(4000, i), epochs, 7, 1, 2)) for i in (0, 1, 2, 11)}
    assert found[1] == {"green": 4000} and found[11] == {"star": 4000}
    assert set(found[0]) == {"round red thing", "crimson"} and found[0]["crimson"] / 4000 == pytest.approx(
        1 / 4, abs=0.03
    )
    assert set(found[2]) == {"blue", "disc", "blue disc", "disc blue"}, "no clicked text: its attributes"


def test_a_query_depends_on_seed_epoch_and_document_alone(catalogue: Path, tmp_path: Path) -> None:
    queries = made(catalogue, clicks=write(tmp_path / "clicks.tsv", CLICKS))
    ids, epochs = np.tile(np.arange(12), 50), np.repeat(np.arange(50), 12)
    whole = queries.draw(ids, epochs, 7, 1, 2)
    for rows in (slice(0, 1), slice(100, 117), slice(5, 5), slice(None, None, -1)):
        assert queries.draw(ids[rows], epochs[rows], 7, 1, 2) == whole[rows]
    for other in (queries.draw(ids, epochs, 8, 1, 2), queries.draw(ids, epochs + 50, 7, 1, 2)):
        assert np.mean([a == b for a, b in zip(whole, other, strict=True)]) < 0.5
    assert [text.replace("box", "cross") for text in whole[4::12]] != whole[8::12], "red boxes and red crosses"
    # Pinned: another version would go on with other queries.
    pinned = ["round red thing", "green", "disc blue", "yellow disc", "box", "green box"]
    assert queries.draw(np.arange(6), np.arange(6), 7, 1, 2) == pinned


def test_attributes_come_in_every_number_order_and_wording(catalogue: Path, tmp_path: Path) -> None:
    synonyms = tmp_path / "synonyms.yaml"
    synonyms.write_text("blue: [navy]\n")
    queries = made(catalogue, synonyms=synonyms)
    n = 6000

    def drawn(document: int, least: int, most: int) -> dict[str, float]:
        return {
            text: count / n
            for text, count in Counter(queries.draw(np.full(n, document), np.arange(n), 7, least, most)).items()
        }

    both = {" ".join(p): 1 / 4 for colour in ("blue", "navy") for p in permutations((colour, "disc"))}
    alone = {"disc": 1 / 2, "blue": 1 / 4, "navy": 1 / 4}
    half = {text: share / 2 for text, share in {**both, **alone}.items()}
    for least, most, wanted in ((2, 2, both), (1, 1, alone), (1, 2, half), (1, 9, half), (3, 4, both)):
        assert drawn(2, least, most) == pytest.approx(wanted, abs=0.03), (least, most)
    assert drawn(0, 1, 2) == {"red": 1.0} == drawn(0, 2, 2), "it has no shape"
    assert drawn(11, 2, 2) == {"yellow": 1.0}, "its shape is not known"


def test_a_document_of_which_nothing_is_known_has_no_query(catalogue: Path) -> None:
    queries = made(catalogue, attributes="shape")
    assert queries.draw(np.arange(4), np.zeros(4, int), 7, 1, 4) == ["", "disc", "disc", "disc"]


def grow(catalogue: Path, _: Path) -> dict[str, Any]:
    """The catalogue counts one document less than it has queries for."""
    made(catalogue)
    file = catalogue / "catalogue.json"
    file.write_text(json.dumps(sealed({**json.loads(file.read_text()), "num_samples": 11})))
    ProductQueries(Catalogue(catalogue))
    raise AssertionError


def of(**files: Any) -> Any:
    """Options with a click log of these rows or synonyms of this text."""

    def options(_: Path, folder: Path) -> dict[str, Any]:
        if "clicks" in files:
            return {"clicks": write(folder / "clicks.tsv", files["clicks"])}
        if "synonyms" in files:
            (folder / "synonyms.yaml").write_bytes(files["synonyms"])
            return {"synonyms": folder / "synonyms.yaml"}
        return files

    return options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (of(attributes="colour,shap"), r"no attribute 'shap'\. It has shape, colour"),
        (of(category="kind"), "no attribute 'kind'"),
        (of(split="nowhere", attributes="shape"), "has no split 'nowhere'"),
        (of(clicks=[("text", "document"), ("red", "d0")]), r"no column 'clicks' \(--clicks\)"),
        (of(clicks=[*CLICKS, ("red", "d0", "many")]), "row 9: clicks is 'many', not a whole number"),
        (of(clicks=[*CLICKS, ("red", "d0", "-1")]), "row 9: clicks is '-1'"),
        (of(clicks=[*CLICKS, ("red", "d0", "²")]), "row 9: clicks is '²'"),
        (of(clicks=[*CLICKS, ("red", "d0", "9" * 20)]), "row 9: clicks is '9999"),
        (of(clicks=[*CLICKS, ("red", "d0")]), "row 9: wrong number of cells"),
        (of(clicks=[CLICKS[0], CLICKS[-2]]), "no click of"),
        (lambda _, folder: {"clicks": folder / "absent.tsv"}, "cannot read"),
        (of(synonyms=b"blue: navy"), "is not a table of lists of words"),
        (of(synonyms=b"- blue"), "is not a table"),
        (of(synonyms=b"blue: [navy, 4]"), "is not a table of lists of words"),
        (of(synonyms=b"blue: [navy"), "is not YAML"),
        (of(synonyms=b"blue: [\xff]"), "is not YAML"),
        (lambda _, folder: {"synonyms": folder / "absent.yaml"}, "No such file"),
        (grow, r"queries does not fit the catalogue\. Run `shelfmark queries"),
    ],
)
def test_errors_say_what_to_mend(catalogue: Path, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        run(QueriesConfig(catalogue=catalogue, **options(catalogue, tmp_path)))
    assert "\n" not in str(error.value)
    if options is not grow:
        assert not (catalogue / "queries").exists()


def test_queries_that_are_not_there_or_damaged(catalogue: Path) -> None:
    with pytest.raises(UserError, match=r"has no queries\. Run `shelfmark queries"):
        ProductQueries(Catalogue(catalogue))
    queries = made(catalogue)
    assert (
        run(QueriesConfig(catalogue=catalogue))
        and ProductQueries(Catalogue(catalogue)).meta["id"] != queries.meta["id"]
    )
    (catalogue / "queries/texts.arrow").write_bytes(b"")
    with pytest.raises(UserError, match="queries is damaged"):
        ProductQueries(Catalogue(catalogue))
    meta = catalogue / "queries/queries.json"
    meta.write_text(meta.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(UserError, match="has format 9, this version reads 1"):
        ProductQueries(Catalogue(catalogue))
