"""Baselines of a search, signs of a search that does not work, and imported weights evaluated without training."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness.catalogue.catalogue import Catalogue
from harness.commands import evaluate
from harness.core import manifest
from harness.core.errors import UserError
from harness.evaluate.baselines import (
    HISTOGRAM,
    IMPORTED,
    TITLES,
    UNTRAINED,
    Baselines,
    Sample,
    baselines_of,
    histogram_recall,
    sampled,
    titles_recall,
)
from harness.evaluate.coded import Coded
from harness.evaluate.embed import ClassKeys, Side, side_of
from harness.evaluate.ranking import Embedded
from harness.evaluate.signs import signs, trained_and_new, warnings
from harness.train import run_baselines
from harness.train.run import train
from models.frozen import FrozenConfig, FrozenTowers
from models.plain.transformer import PlainBuilder
from models.vision import VisionConfig
from models.weights.convert import Converted, write_converted
from tests.catalogues import draw_rows, make_catalogue, write_manifest
from tests.pool import layout, ranks
from tests.runs import UNUSED, arguments, tiny_config, trainer


def side(kind: str, labels: list[int]) -> Side:
    """Of no catalogue; ids are 10, 20, ..."""
    ids = np.arange(1, len(labels) + 1) * 10
    return Side(SimpleNamespace(), kind, ids, ids, np.array(labels), {})  # type: ignore[arg-type]


@pytest.mark.parametrize("limit,asked", [(1, 1), (3, 3), (99, 6)])
def test_a_sample_asks_for_what_it_holds(limit: int, asked: int) -> None:
    queries, documents = side("query", [7, -1, 3, 3, 9, 0, 1, 2]), side("document", [-1, 0, 1, 2, 3, 3, 5, 6, 7])
    assert sampled(queries, documents, 0) is None and sampled(side("query", [-1, 9]), documents, 5) is None
    found = sampled(queries, documents, limit)
    assert found is not None
    some, gallery = found.queries, found.documents
    assert len(some.ids) == asked and 50 not in some.ids, "nothing answers label 9"
    assert set(some.labels) <= set(gallery.labels) and -1 not in some.labels
    assert len(gallery.ids) == min(2 * limit, 9) and (np.diff(gallery.ids) > 0).all()
    if limit == 3:
        assert some.ids.tolist() == [10, 40, 70], "spread evenly over those with an answer"


def test_a_sample_of_documents_holds_another_of_each_that_asks() -> None:
    documents = side("document", [-1, 4, 5, 4, 6, 5, 4, -1, 6, 7])
    found = sampled(documents, documents, 3, without_self=True)
    assert found is not None and found.queries.ids.tolist() == [20, 40, 60], "7 has no other"
    held = found.documents.labels.tolist()
    assert len(held) == 6 and held.count(4) >= 2 and held.count(5) >= 2
    assert sampled(side("document", [1, 2, -1, -1]), side("document", [1, 2, -1, -1]), 3, without_self=True) is None


def test_titles_are_ranked_by_their_words() -> None:
    """A title in other words is not found; of equal ones, and for a text of unknown words, the lowest id counts."""
    titles = ["green disc", "Red box", None, "blue boxes, blue", "red box"]
    documents = replace(side("document", [0, 1, 2, 3, 4]), columns={"title": Coded.of_list(titles)})
    texts = ["disc", "blue box", "red box", "red box", "star", "star"]
    for labels, recall in (([0, 3, 1, 1, 0, 0], 1.0), ([0, 3, 1, 4, 0, 1], 4 / 6), ([2, 2, 2, 2, 2, 2], 0.0)):
        sample = Sample(side("text", labels), documents, tuple(texts))
        assert titles_recall(sample) == pytest.approx(recall)
        with layout() as mesh:
            found = baselines_of(sample, "val", mesh)
        assert str(found) == f"val recall@1 of 6 texts against 5 documents: {TITLES} {recall:.3f}"
    wordless = replace(documents, columns={"title": Coded.of_list([None, "", "&", None, "!"])})
    assert titles_recall(Sample(side("text", [0, 1]), wordless, ("red", "box"))) == 0.5


@pytest.mark.parametrize("colours,expected", [(True, 1.0), (False, 0.0)])
def test_the_histogram_finds_by_colour_only(tmp_path: Path, colours: bool, expected: float) -> None:
    """Photos in their document's colour are all found, those in another document's colour never."""
    catalogue = make_catalogue(tmp_path, classes=4, queries=5, ingest=False).parent
    palette = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30)]
    for number in range(4):
        for member in range(6):
            suffix = "png" if (number + member) % 2 else "jpg"
            shown = number if colours or member == 0 else (number + 1) % 4
            pixels = np.tile(np.array(palette[shown], np.uint8), (60, 50, 1))
            Image.fromarray(pixels).save(catalogue / f"images/{number:03d}-{member:02d}.{suffix}")
    from harness.commands.ingest import IngestConfig, run

    run(IngestConfig(manifest=catalogue / "manifest.tsv", images=catalogue, out=catalogue / "c", workers=1))
    keys, made = ClassKeys(), Catalogue(catalogue / "c")
    documents, queries = (side_of(made, kind, "test", [], keys, 0) for kind in ("document", "query"))
    with layout() as mesh:
        assert histogram_recall(Sample(queries, documents), mesh) == expected


def overlaps(side: Side) -> np.ndarray:
    """The histograms as they are defined, one by one."""
    rows = []
    for sample in side.sample_ids:
        image = Image.open(io.BytesIO(side.catalogue.read_bytes(int(sample)))).convert("RGB")
        colours = np.asarray(image.resize((64, 64)))[16:48, 16:48].reshape(-1, 3) // 32
        rows.append(np.histogramdd(colours, (8, 8, 8), [(0, 8)] * 3)[0].flatten())
    return np.array(rows)


SAMPLED = {"evaluation.batch_size": 4, "evaluation.split": "train", "evaluation.baselines": 7}


def compared(catalogue: Path, settings: dict[str, Any]) -> tuple[Any, ...]:
    with trainer(tiny_config(catalogue, UNUSED, **settings), ready=False) as t:
        found = run_baselines.computed(t.config, t.validation.evaluation, t.method, t.mesh)
        return asdict(found), t.validation.evaluation.run(t.method).signs


def test_every_number_of_ranks_finds_the_same(catalogue: Path) -> None:
    ((wanted, seen),) = ranks(1).run(compared, catalogue, SAMPLED)
    assert (wanted["queries"], wanted["asked"], wanted["documents"]) == (7, "photos", 6)
    assert set(wanted["recall"]) == {HISTOGRAM, UNTRAINED}
    assert seen["sample_recall_at_1"] == wanted["recall"][UNTRAINED] and 0 < seen["document_cosine"] < 1
    for world in (2, 3):
        for found, figures in ranks(world).run(compared, catalogue, SAMPLED):
            assert found == wanted and figures == seen
    with trainer(tiny_config(catalogue, UNUSED, **SAMPLED), ready=False) as t:
        sample = t.validation.evaluation.sample
    shared = np.minimum(overlaps(sample.queries)[:, None], overlaps(sample.documents)[None]).sum(2)
    best = sample.documents.labels[shared.argmax(1)] == sample.queries.labels
    assert wanted["recall"][HISTOGRAM] == best.mean() and 0 < best.mean() < 1


def embedded(vectors: torch.Tensor, labels: list[int]) -> Embedded:
    ids = torch.arange(1, len(labels) + 1) * 10
    return Embedded(F.normalize(vectors, dim=1), ids, torch.tensor(labels))


def told(
    queries: torch.Tensor, documents: torch.Tensor, baselines: Baselines | None = None, rows: Sequence[Any] = ()
) -> tuple[Any, list[str]]:
    """Signs and warnings where query i asks for document i, and nothing else does."""
    labels = [*range(len(documents))]
    sample = Sample(side("query", labels), side("document", labels))
    found = signs(embedded(queries, labels), embedded(documents, labels), sample, None)
    return found, warnings({**found, **trained_and_new(rows)}, baselines, "val")


def test_figures_of_vectors_that_are_known() -> None:
    documents = torch.eye(6)
    documents[1] = documents[0]  # two of six are alike; one pair of 15 has cosine 1, the others 0
    found, lines = told(torch.eye(6), documents)
    assert found == {
        "sample_recall_at_1": 5 / 6,  # both 0 and 1 are found first for 0, nothing for 1: the lowest id, which is wrong
        "asked": 6.0,
        "found": 5.0,
        "document_cosine": pytest.approx(1 / 15, abs=1e-12),
        "documents_alike": pytest.approx(2 / 6),
    }
    assert lines == []


def test_signs_of_documents_that_ask_leave_out_themselves() -> None:
    """Pictures 0 and 1 find each other, 2 and 3 find 0."""
    documents, labels = torch.eye(4), [0, 0, 1, 1]
    pictures = torch.tensor([[1, 0.9, 0, 0], [0.9, 1, 0, 0], [0.5, 0, 1, 0], [0.5, 0, 0, 1]])
    asked = side("document", labels)
    found = signs(embedded(pictures, labels), embedded(documents, labels), Sample(asked, asked, (), True), None)
    assert (found["sample_recall_at_1"], found["asked"], found["found"]) == (0.5, 2, 2)


def test_each_warning_on_vectors_that_deserve_it_and_none_on_others() -> None:
    torch.manual_seed(0)
    apart = torch.randn(20, 16)
    good = Baselines("val", 20, "photos", 20, {HISTOGRAM: 0.2, UNTRAINED: 0.05})
    found, lines = told(apart + 0.1 * torch.randn(20, 16), apart, good)
    assert found["sample_recall_at_1"] == 1.0 and lines == []
    _, lines = told(apart.roll(1, 0), apart, good)
    below = "val recall@1 0.000 is below colour histogram (0.200) and untrained (0.050), standard error 0.089 by 20"
    assert len(lines) == 1 and below in lines[0]
    # Documents whose vectors come from one of two titles, the pictures hardly counting.
    titles = torch.randn(2, 16).repeat_interleave(10, 0)
    found, lines = told(apart, titles + 0.01 * apart)
    assert found["documents_alike"] == 1.0 and found["document_cosine"] < 0.9
    assert any("100% of the documents have almost the same vector" in line for line in lines)
    # A narrow cone, in which neighbours are apart.
    found, lines = told(apart, apart + 3.5)
    assert found["documents_alike"] < 0.5 and found["document_cosine"] > 0.9 and "almost the same" in lines[-1]
    # Trained products are found, new ones are not.
    rows = [{"slice": "class", "value": v, "queries": 30, "recall_at_1": r} for v, r in (("head", 0.9), ("tail", 0.5))]
    for recall, warned in ((0.3, True), (0.4, False)):
        new = {"slice": "class", "value": "never trained", "queries": 10, "recall_at_1": recall}
        _, lines = told(apart, apart, rows=[*rows, new])
        assert (
            any(f"{recall:.3f} for products never trained on and 0.700 for trained ones" in x for x in lines) == warned
        )
    assert trained_and_new([*rows, {**new, "queries": 9}]) == {}, "too few to tell"
    # All photos alike.
    found, lines = told(apart[:1].expand(20, -1), apart)
    assert found["found"] == 1 and len(lines) == 1 and "queries of 20 classes find only 1 different" in lines[0]


def lines_of(output: str, start: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith(start)]


def placeholders(folder: Path, kind: str) -> Path:
    """A catalogue whose documents all have one title, and whose pictures of a kind are all the same."""
    from harness.commands import govern, ingest, tokenizer

    rows = draw_rows(folder, classes=6, queries=5, size=48, seed=0)
    for row in rows:
        if row["kind"] == kind:
            Image.new("RGB", (50, 50), (128, 128, 128)).save(folder / row["image"])
        if row["kind"] == "document":
            row |= {"title": "office chair", "description": ""}
    table, catalogue = write_manifest(folder / "manifest.tsv", rows), folder / "catalogue"
    ingest.run(ingest.IngestConfig(manifest=table, images=folder, out=catalogue, workers=1))
    govern.run(govern.GovernConfig(catalogue=catalogue))
    tokenizer.run(tokenizer.TokenizerConfig(catalogue=catalogue, vocab_size=14))
    return catalogue


@pytest.mark.parametrize(
    "kind,sign",
    [
        ("document", "100% of the documents have almost the same vector as one of another class (mean cosine 1.00)"),
        ("query", "queries of 6 classes find only 1 different document(s) first"),
        ("none", ""),
    ],
)
def test_a_run_warns_after_its_warm_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, sign: str
) -> None:
    settings = {"evaluation.baselines": 50, "train.evaluate_every": 2, "train.margin_warmup": 3}
    train(arguments(placeholders(tmp_path, kind), tmp_path / "run", **settings))
    before, after = capsys.readouterr().out.split("step 4: val recall@1 ")
    assert "step 2: val recall@1 " in before and "warning: " not in before
    signs = [line for line in after.splitlines() if line.startswith("warning: ") and "is below" not in line]
    if kind == "none":
        assert signs == []
        return
    assert any(line.startswith(f"warning: {sign}") for line in signs)
    assert set(signs) <= set(json.loads((tmp_path / "run/eval-00000004.json").read_text())["warnings"])  # export's
    board = EventAccumulator(str(tmp_path / "run/tensorboard"))
    board.Reload()
    (shown,) = board.Tensors("run/warnings/text_summary")
    assert shown.step == 4 and sign[5:20].encode() in shown.tensor_proto.string_val[0]


def test_a_run_computes_its_baselines_once(catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"evaluation.baselines": 50, "train.evaluate_every": 2}
    run = tmp_path / "run"
    train(arguments(catalogue, run, **settings, **{"train.stop_at": 2}))
    first = capsys.readouterr().out
    (line,) = lines_of(first, "baselines")
    kept = json.loads((run / "baselines.json").read_text())
    recall = kept["baselines"]["recall"]
    assert list(recall) == [HISTOGRAM, UNTRAINED] and kept["baselines"]["queries"] == 6
    shown = f"colour histogram {recall[HISTOGRAM]:.3f}, untrained {recall[UNTRAINED]:.3f}"
    assert line.split(maxsplit=1)[1] == f"val recall@1 of 6 photos against 6 documents: {shown}"
    (own,) = (json.loads(line) for line in (run / "log.jsonl").read_text().splitlines() if "retrieval/map" in line)
    assert lines_of(first, "step 2: val") == [f"step 2: val recall@1 {own['retrieval/recall_at_1']:.3f}; {shown}"]
    kept["baselines"]["recall"][UNTRAINED] = 0.987  # a resume must not compute it again
    (run / "baselines.json").write_text(json.dumps(kept))
    train(arguments(catalogue, run, **settings))
    second = capsys.readouterr().out
    assert "untrained 0.987" in lines_of(second, "step 4: val")[0] and "untrained (0.987)" in second
    # Of another sample it must; the weights of the start are gone.
    train(arguments(catalogue, run, **settings | {"evaluation.baselines": 2, "train.steps": 5}))
    third = capsys.readouterr().out
    assert "of 2 photos against 4 documents: colour histogram" in third and "untrained" not in third
    # The command takes the run's own where it asks for the same, and else has the weights of the seed again.
    figures = evaluate.run(evaluate.EvalConfig(run=run, split="val"))
    assert list(figures["baselines"]["recall"]) == [HISTOGRAM] and lines_of(capsys.readouterr().out, HISTOGRAM)
    figures = evaluate.run(evaluate.EvalConfig(run=run, split="test"))
    assert list(figures["baselines"]["recall"]) == [HISTOGRAM, UNTRAINED] and figures["baselines"]["split"] == "test"


VISION = {"image_size": 32, "patch_size": 8, "num_layers": 1, "hidden_size": 32, "num_attention_heads": 4}
AS_IMPORTED = {  # preprocessing of a folder that says nothing of it, and ImageNet's share of the short side
    "data.preprocess.eval_crop": 0.875,
    "evaluation.batch_size": 4,
    "evaluation.baselines": 50,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `shelfmark import` writes it, of a random image tower."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(5)
    config = FrozenConfig(vision=VisionConfig(**VISION))
    state = dict(FrozenTowers(config, PlainBuilder()).state_dict())
    state = {name: tensor.contiguous() for name, tensor in state.items() if not name.endswith("_extra_state")}
    write_converted(folder, {"vision": Converted(config.vision, state, [], "a test")})
    (folder / "recipe.yaml").write_text(f"model:\n  vision: {json.dumps(VISION)}\n")
    manifest.write_manifest(folder, algorithm="sha256")
    return folder


def frozen(catalogue: Path, weights: Path, split: str, tensor_parallel: int = 1) -> dict[str, Any]:
    return evaluate.run(
        evaluate.EvalConfig(
            run=catalogue, frozen=weights, split=split, batch_size=4, tensor_parallel=tensor_parallel, device="cpu"
        )
    )


@pytest.mark.parametrize("objective", ["classification", "contrastive"])
def test_frozen_weights_are_what_a_run_starts_from(
    catalogue: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], objective: str
) -> None:
    run = tmp_path / "run"
    settings = {**AS_IMPORTED, "model.objective": objective, "train.init_from": weights, "train.steps": 2}
    train(arguments(catalogue, run, **settings))
    kept = json.loads((run / "baselines.json").read_text())["baselines"]
    assert list(kept["recall"]) == [HISTOGRAM, IMPORTED]
    capsys.readouterr()
    figures = frozen(catalogue, weights, "val")
    assert figures["recall_at_1"] == kept["recall"][IMPORTED]
    assert figures["baselines"]["recall"] == {HISTOGRAM: kept["recall"][HISTOGRAM]}
    out = capsys.readouterr().out
    assert f"{weights}, image tower without training: split val of {catalogue}" in out and lines_of(out, HISTOGRAM)
    of_run = evaluate.run(evaluate.EvalConfig(run=run, split="test"))["baselines"]["recall"]
    assert of_run[IMPORTED] == frozen(catalogue, weights, "test")["recall_at_1"]


def test_frozen_weights_on_every_layout(catalogue: Path, weights: Path) -> None:
    (wanted,) = ranks(1).run(frozen, catalogue, weights, "train")
    assert 0 < wanted["map"] < 1
    for found in ranks(2).run(frozen, catalogue, weights, "train"):
        assert found == wanted
    for found in ranks(2).run(frozen, catalogue, weights, "train", 2):
        assert found["map"] == pytest.approx(wanted["map"], abs=0.1)  # tensor parallelism rounds otherwise
        assert found["baselines"] == wanted["baselines"]


def test_mistakes_with_frozen_weights_are_named(catalogue: Path, weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--views is of a run, and --frozen has none\. Leave out --views"):
        evaluate.run(evaluate.EvalConfig(run=catalogue, frozen=weights, views=("image",)))
    with pytest.raises(UserError, match=r"no such folder\. Make one with `shelfmark ingest`"):
        evaluate.run(evaluate.EvalConfig(run=tmp_path / "none", frozen=weights))
    with pytest.raises(UserError, match=r"imported weights .*manifest.json is missing"):
        evaluate.run(evaluate.EvalConfig(run=catalogue, frozen=tmp_path))
