"""MAKE and ITEm in the harness: what the loader feeds them, layouts, resumes and memory banks of whole runs."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.commands import govern
from harness.commands.queries import QueriesConfig
from harness.commands.queries import run as make_queries
from harness.core.errors import UserError
from harness.data.loader import StepLoader
from harness.data.masking import draw_masks
from harness.text.catalogue_facts import prepared
from harness.train import run as train
from harness.train.config import RunConfig, parse
from models.batch import TENSORS, Batch
from models.registry import METHODS
from models.tp_state import merged_state_dict
from tests.pool import ranks
from tests.runs import UNUSED, trainer
from tests.test_layouts import same
from tests.test_loop import log_lines
from tests.twins import documents_alone

STEPS, EARLY = 20, 8
RUN: dict[str, Any] = {
    "seed": 1,
    "model.vision.image_size": 16,
    "model.vision.patch_size": 4,
    "model.text.num_layers": 1,
    "model.text.hidden_size": 16,
    "model.text.num_attention_heads": 4,
    "model.text.max_length": 12,
    "data.documents_per_step": 6,
    "data.threads": 1,
    "data.read_ahead": 2,
    "data.preprocess.image_size": 16,
    "optimizer.lr": 3e-3,
    "optimizer.warmup_steps": 2,
    "train.steps": STEPS,
    "train.log_every": 1,
    "evaluation.split": "train",
    "evaluation.category": "shape",
}
TOWER = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 4}
MAKE: dict[str, Any] = {
    **RUN,
    "method": "make",
    **{f"model.{name}.{key}": value for name in ("vision", "query", "fusion") for key, value in TOWER.items()},
    "model.query.max_length": 8,
    "model.embedding_dim": 8,
    "model.qic.temperature": 0.2,
    "model.memory_bank": 16,
    "model.memory_after": 24,  # from the fifth step on
    "model.mpm_patches": 3,
    "data.query_attributes": [1, 2],
    "evaluation.query_attributes": ["colour", "shape"],
}
KINDS: dict[str, dict[str, Any]] = {
    "make": MAKE,
    "symmetric": {**MAKE, "model.qic.symmetric": True, "data.micro_batches": 2},
    "item": {
        **RUN,
        "method": "item",
        "data.masking.one_heavy": True,
        "model.weights.contrast": 0.5,
        "model.aligned": True,
        "evaluation.tasks": ["category"],
    },
}


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 documents with queries. Read only!"""
    made = documents_alone(tmp_path_factory.mktemp("documents"))
    queries(made)
    return made


def queries(catalogue: Path, **options: Any) -> None:
    make_queries(QueriesConfig(catalogue=catalogue, **{"min_count": 2, "category": "shape", **options}))


def arguments(kind: str, catalogue: Path, run: Path, **overrides: Any) -> list[str]:
    values = {**KINDS[kind], "data.catalogue": catalogue, "run_dir": run, **overrides}
    return [f"--{key}={value if isinstance(value, str | Path) else json.dumps(value)}" for key, value in values.items()]


def config_of(kind: str, catalogue: Path, run: Path, **overrides: Any) -> RunConfig:
    config, _ = parse(arguments(kind, catalogue, run, **overrides))
    return replace(config, model=prepared(config.method, config.model, catalogue))


def open_loader(config: RunConfig, rank: int = 0, world: int = 1) -> closing[StepLoader]:
    reads = METHODS[config.method].reads(config.model)
    return closing(StepLoader(config.data, config.seed, reads, rank, world, torch.device("cpu")))


@pytest.mark.parametrize("kind", ["make", "item"])
def test_a_step_holds_the_same_however_it_is_cut(kind: str, catalogue: Path) -> None:
    wanted: Batch | None = None
    step = 1  # the second epoch of 11 documents begins within it
    for world in (1, 2, 3, 4):
        for micro_batches in (1, 2):
            settings = {"data.micro_batches": micro_batches, "data.backend": "reference"}
            config = config_of(kind, catalogue, UNUSED, **settings)
            parts = []
            for rank in range(world):
                with open_loader(config, rank, world) as loader:
                    parts.append(loader.load(step))
                    images = [batch.document_images for batch in parts[-1].batches]
                    assert loader.step_bytes == sum(x.numel() * x.itemsize for x in images)
                    ledgers = loader.ledgers(0, 3)
            batches = [parts[rank].batches[micro] for micro in range(micro_batches) for rank in range(world)]
            names = TENSORS
            for i, batch in enumerate(batches):
                assert batch.sizes is not None
                told = {side: counts[i % world] for side, counts in batch.sizes.items()}
                assert told == {"query": len(batch.query_labels), "document": len(batch.document_labels)}
            found = Batch(**{name: torch.cat([getattr(batch, name) for batch in batches]) for name in names})
            wanted = wanted or found
            for name in names:
                assert torch.equal(getattr(found, name), getattr(wanted, name)), (name, world, micro_batches)
            assert sum(part.ledger for part in parts) % 2**64 == ledgers[step]
    assert wanted is not None and len(wanted.document_ids) == 6 and not len(wanted.query_images)
    sizes = {name: tuple(getattr(wanted, name).shape) for name in names[9:]}
    shared = {"masked_tokens": (6, 12), "masked_words": (6, 12), "masked_patches": (6, 16), "masked_titles": (6,)}
    if kind == "make":
        texts = {"query_tokens": (6, 8), "categories": (6,), "keywords": (6, 12), "query_keywords": (6, 12)}
        assert sizes == {**texts, **shared, "other_tokens": (0, 0), "answers": (0, 0), "document_mosaics": (0, 0)}
        assert torch.equal(wanted.query_ids, wanted.document_ids)
        assert torch.equal(wanted.query_labels, wanted.document_labels)
    else:
        assert {name: size for name, size in sizes.items() if size[0]} == {**shared, "other_tokens": (6, 12)}
        assert not len(wanted.query_ids)


def test_queries_and_masks_are_those_of_the_documents(catalogue: Path) -> None:
    config = config_of("make", catalogue, UNUSED)
    with open_loader(config) as loader:
        batch = loader.load(1).batches[0]
        ids = batch.document_ids.numpy()
        draw = loader.order.draw("document", np.arange(6, 12))
        texts = loader.products.draw(ids, draw.epochs, 1, 1, 2)
        masks = draw_masks(
            config.data.masking, batch.document_tokens.numpy(), 16, loader.tokens.special, 1, draw.epochs, ids
        )
        tokens = [loader.tokenizer.encode(text) for text in texts]
        keywords = loader.products.keywords[ids]
        shapes = loader.products.categories[ids]
    assert ids.tolist() == draw.sample_ids.tolist() and set(draw.epochs.tolist()) == {0, 1}
    for row, text in zip(batch.query_tokens.tolist(), tokens, strict=True):
        assert row == ([2, *text[:6], 3] + [0] * 8)[:8]
    assert batch.query_weights.tolist() == [1.0] * 6
    assert batch.keywords.tolist() == keywords.tolist() and batch.categories.tolist() == shapes.tolist()
    for name, mask in zip(("masked_tokens", "masked_words", "masked_patches", "masked_titles"), masks, strict=True):
        assert np.array_equal(getattr(batch, name).numpy(), mask), name
    without = config_of("make", catalogue, UNUSED, **{"model.weights.mlm": 0, "model.weights.mpm": 0})
    with open_loader(without) as loader:
        assert not loader.load(1).batches[0].masked_patches.numel()


def test_other_titles_are_those_of_governed_documents(catalogue: Path) -> None:
    settings = {"data.masking.mismatched": 1.0, "model.text.max_length": 40}
    with open_loader(config_of("item", catalogue, UNUSED, **settings)) as loader:
        known = loader.tokens.batch(np.arange(12), 40).tolist()
        batches = [loader.load(step).batches[0] for step in range(40)]
    titles = [known.index(row) for batch in batches for row in batch.other_tokens.tolist()]
    ids = [i for batch in batches for i in batch.document_ids.tolist()]
    assert len({tuple(row) for row in known}) == 12 and set(titles) == set(range(11)), "11 is of split val"
    own = np.mean([title == i for title, i in zip(titles, ids, strict=True)])
    assert own == pytest.approx(1 / 11, abs=0.06)


def test_a_document_without_a_query_counts_nothing(catalogue: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(catalogue, tmp_path / "catalogue")
    queries(copy, attributes="shape", category="")
    with open_loader(config_of("make", copy, UNUSED)) as loader:
        batches = [loader.load(step).batches[0] for step in range(4)]
    for batch in batches:
        assert torch.equal(batch.query_weights == 0, batch.document_ids == 0)
        assert (batch.document_weights == 1).all()


def trained(config: RunConfig, tensor_parallel: int, end: int) -> dict[str, Any]:
    """In a pool: resumes, trains to step `end` and saves; losses, and all that the checkpoint holds of weights and
    memory.
    """
    with trainer(config, tensor_parallel, ready=False) as t:
        began = memory(t)
        losses = [t.train_step(data).loss.item() for data in t.loader.steps(t.step, end)]
        t.save()
        towers = {name: value.clone() for name, value in merged_state_dict(t.method.towers, t.mesh.tp).items()}
        return {"losses": losses, "began": began, "memory": memory(t), "towers": towers, "notes": t.notes}


def memory(t: Any) -> dict[str, torch.Tensor]:
    return {} if t.method.memory is None else {k: v.clone() for k, v in t.method.memory.state_dict().items()}


Straight = Callable[[str, int, int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def straight(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """Results of every rank in a run of 20 steps without a stop, by kind, ranks and tensor-parallel size; its folder as
    'run'.
    """
    done: dict[tuple[str, int, int], list[dict[str, Any]]] = {}

    def of(kind: str, world: int, tensor_parallel: int) -> list[dict[str, Any]]:
        key = kind, world, tensor_parallel
        if key not in done:
            run = tmp_path_factory.mktemp("straight") / "run"
            found = ranks(world).run(trained, config_of(kind, catalogue, run), tensor_parallel, STEPS)
            done[key] = [{**one, "run": run} for one in found]
        return done[key]

    return of


FULL = pytest.mark.full


@pytest.mark.parametrize(
    ("kind", "world", "tensor_parallel"),
    [
        *(("make", 2, 2), ("item", 2, 2)),
        *(pytest.param("symmetric", 2, 2, marks=FULL), *(pytest.param(kind, 2, 1, marks=FULL) for kind in KINDS)),
        *(pytest.param(kind, 4, 2, marks=FULL) for kind in KINDS),
    ],
)
def test_every_layout_gives_the_same_losses(kind: str, world: int, tensor_parallel: int, straight: Straight) -> None:
    one, found = straight(kind, 1, 1)[0], straight(kind, world, tensor_parallel)
    assert all(rank["losses"] == found[0]["losses"] for rank in found), "ranks disagree about the loss"
    assert len(one["losses"]) == STEPS and min(one["losses"][-3:]) < one["losses"][0] - 0.1, "it learns nothing"
    assert found[0]["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert found[0]["memory"].keys() == one["memory"].keys()
    for name, value in one["memory"].items():
        torch.testing.assert_close(found[0]["memory"][name], value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "world", "tensor_parallel"),
    [
        *(("make", 2, 2), pytest.param("item", 2, 2, marks=FULL)),
        *(pytest.param(kind, 2, 1, marks=FULL) for kind in KINDS),
        *(pytest.param(kind, 1, 1, marks=FULL) for kind in KINDS),
    ],
)
def test_resumed_equals_uninterrupted_to_the_digit(
    kind: str, world: int, tensor_parallel: int, straight: Straight, catalogue: Path, tmp_path: Path
) -> None:
    wanted = straight(kind, world, tensor_parallel)[0]
    config, pool = config_of(kind, catalogue, tmp_path / "run"), ranks(world)
    first = pool.run(trained, config, tensor_parallel, EARLY)[0]
    others = {(1, 1), (2, 1)} - {(world, tensor_parallel)} if kind != "item" else set()
    elsewhere = {layout: shutil.copytree(tmp_path / "run", tmp_path / f"run-{layout}") for layout in others}
    second = pool.run(trained, config, tensor_parallel, STEPS)[0]
    assert first["losses"] + second["losses"] == wanted["losses"]
    same(second["began"], first["memory"])
    same(second["memory"], wanted["memory"])
    same(second["towers"], wanted["towers"])
    if kind != "item":
        assert first["memory"]["documents.pushed"] == 6 * EARLY > 24, "the bank has not taken part"
        assert set(first["memory"]) == {
            f"{bank}.{name}"
            for bank in (("documents", "queries") if kind == "symmetric" else ("documents",))
            for name in ("embeddings", "labels", "pushed")
        }
    for layout, run in elsewhere.items():
        for rank in ranks(layout[0]).run(trained, replace(config, run_dir=run), layout[1], EARLY + 2):
            same(rank["began"], first["memory"])
            assert rank["losses"] == pytest.approx(second["losses"][:2], rel=1e-4)


def test_another_run_may_start_from_one_with_a_bank_and_other_objectives(
    straight: Straight, catalogue: Path, tmp_path: Path
) -> None:
    source = straight("make", 1, 1)[0]
    fine = {
        "train.init_from": source["run"],
        "model.weights.mlm": 0.0,
        "model.weights.mpm": 0.0,
        "model.weights.keywords": 0.0,
        "model.qic.margin": 0.0,
        "model.memory_bank": 10,
        "model.memory_after": 0,
        "model.related_keywords": 1,
    }
    found = trained(config_of("make", catalogue, tmp_path / "run", **fine), 1, 0)
    same(found["towers"], source["towers"])
    assert found["began"]["documents.pushed"] == 0 and len(found["began"]["documents.labels"]) == 10
    assert any(note.startswith(f"started from {source['run']}") for note in found["notes"])
    with pytest.raises(UserError, match=r"with model.embedding_dim = 8, not 4"):
        trained(config_of("make", catalogue, tmp_path / "other", **fine, **{"model.embedding_dim": 4}), 1, 0)


@pytest.mark.parametrize("kind", ["symmetric", "item"])
def test_micro_batches_average_their_losses(kind: str, catalogue: Path, tmp_path: Path) -> None:
    config = config_of(kind, catalogue, tmp_path / "run", **{"data.micro_batches": 2})
    with trainer(config) as t:
        data = t.loader.load(0)
        losses = [t.method.loss(batch)[0] for batch in data.batches]
        weights = [parameter for parameter in t.method.towers.parameters() if parameter.requires_grad]
        grads = torch.autograd.grad(sum(losses) / 2, weights, allow_unused=True)
        result = t.train_step(data)
    assert len(losses) == 2 and losses[0].item() != losses[1].item()
    assert result.loss.item() == pytest.approx(sum(losses).item() / 2, rel=1e-6)
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads if grad is not None))
    assert result.norm == pytest.approx(norm, rel=1e-5)
    qic = result.sums[result.names.index("qic" if kind == "symmetric" else "itm")]
    assert qic[1] == 2, "a mean of two terms"


def test_a_run_by_its_command_line(catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = shutil.copytree(catalogue, tmp_path / "bare")
    shutil.rmtree(bare / "queries")  # which ITEm does not read
    for kind, data in (("make", catalogue), ("item", bare)):
        assert train.main(arguments(kind, data, tmp_path / kind, **{"train.steps": 2})) == 0
        (line,) = [line for line in log_lines(tmp_path / kind) if line["step"] == 1]
        terms = {"make": "qic qim query_image keywords mlm mpm", "item": "itm mlm mim gmlm gmim contrast"}[kind].split()
        assert all(math.isfinite(line[f"train/{term}"]) for term in terms)
    capsys.readouterr()
    assert train.main(arguments("make", bare, tmp_path / "b")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{bare} has no queries. Run `shelfmark queries {bare}`" in said


def test_the_keyword_table_is_the_catalogues(catalogue: Path, tmp_path: Path) -> None:
    config = config_of("make", catalogue, tmp_path / "run")
    count = config.model.num_keywords
    assert count > 7 and config.model.product_keywords == 12
    copy = shutil.copytree(catalogue, tmp_path / "catalogue")
    queries(copy, keywords_per_product=2)
    # Without the objective on keywords they still say which products are related, and the bank has room for them.
    settings = {"model.weights.keywords": 0.0, "train.steps": 1}
    with trainer(config_of("make", copy, tmp_path / "two", **settings)) as t:
        t.train_step(t.loader.load(0))
        assert t.method.memory["documents"].labels.shape == (16, 6) and t.method.memory["documents"].pushed == 6
    with pytest.raises(UserError, match=rf"model.num_keywords is 5, .* has {count} keywords"):
        config_of("make", catalogue, tmp_path / "run", **{"model.num_keywords": 5})
    file = copy / "queries/queries.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "keywords": []}))
    with pytest.raises(UserError, match="has no keywords to train on"):
        config_of("make", copy, tmp_path / "run")


def test_a_query_tower_for_other_tokens_is_refused(catalogue: Path, tmp_path: Path) -> None:
    config = config_of("make", catalogue, tmp_path / "run", **{"model.query.pad_id": 3})
    with pytest.raises(
        UserError, match=r"does not fit model.query: the tokenizer pads with 0, model.query.pad_id is 3"
    ):
        trained(config, 1, 0)


def test_queries_made_anew_are_another_run(catalogue: Path, tmp_path: Path) -> None:
    copy, run = shutil.copytree(catalogue, tmp_path / "catalogue"), tmp_path / "run"
    trained(config_of("make", copy, run), 1, 1)
    for options in ({"keywords_per_product": 2}, {"min_count": 5}, {"category": ""}):
        queries(copy, **options)
        with pytest.raises(
            UserError, match=r"step-00000001 was trained on other queries than those of .* has replaced them"
        ):
            trained(config_of("make", copy, run), 1, 1)
    queries(copy)
    assert trained(config_of("make", copy, run), 1, 2)["losses"]


def test_a_new_phase_begins_with_an_empty_bank(catalogue: Path, tmp_path: Path) -> None:
    """Embeddings in a bank are labelled with class ids, which mean other classes there."""
    copy = shutil.copytree(catalogue, tmp_path / "catalogue")
    config = config_of("make", copy, tmp_path / "run")
    assert trained(config, 1, 2)["memory"]["documents.pushed"] == 12
    govern.run(govern.GovernConfig(catalogue=copy, min_queries=0, split="val"))
    new_phase = replace(config, train=replace(config.train, new_phase=True))
    found = trained(new_phase, 1, 3)
    assert found["began"]["documents.pushed"] == 0 and (found["began"]["documents.labels"] == -1).all()
    assert found["memory"]["documents.pushed"] == 6
    assert trained(config, 1, 3)["began"]["documents.pushed"] == 6, "which then goes on"
