"""Classes come, go and change their ids while a run goes on: rows follow their keys, new rows start from their samples,
the order starts again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from harness.catalogue.catalogue import Catalogue
from harness.commands import govern, tokenizer
from harness.commands.ingest import IngestConfig
from harness.commands.ingest import run as ingest
from harness.core.errors import UserError
from harness.data.order import ClassOrder
from harness.evaluate.embed import ClassKeys, Embedder, side_of
from harness.text import tokenizer as text_tokenizer
from harness.train import checkpoint_files, class_rows
from harness.train.class_rows import NEW, ClassMap, move_rows
from models.comm import gather_shards
from models.oclear import Oclear
from models.tp_state import merged_state_dict
from tests.catalogues import draw_rows, write_manifest
from tests.pool import layout, ranks
from tests.runs import tiny_config, trainer
from tests.test_layouts import same
from tests.test_loader_guards import rewrite_state

OLD, GROWN = ["c0", "c2", "c3", "c4", "c5"], ["c0", "c1", "c2", "c3", "c4", "c6", "c7"]
SETTINGS: dict[str, Any] = {
    "train.steps": 10,
    "train.margin_warmup": 8,
    "model.vision.dropout": 0.2,
    "head.sample_rate": 0.5,
    "optimizer.rows.weight_decay": 0.1,
    "data.queries_per_step": 7,
    "data.documents_per_step": 3,
    "evaluation.batch_size": 5,
}
Catalogues = tuple[Path, Path]


def keys(classes: Path) -> list[str]:
    return pq.read_table(classes, columns=["class_key"])["class_key"].to_pylist()


@pytest.fixture(scope="module")
def catalogues(tmp_path_factory: pytest.TempPathFactory) -> Catalogues:
    """(old, grown): c1 becomes large enough and has low sample ids, c5 becomes too small, c6 and c7 are new; c7 has 19
    samples.
    """
    folder = tmp_path_factory.mktemp("life")
    rows = [row for row in draw_rows(folder, classes=8, queries=5, size=32, seed=0) if row["id"] != "q5-3"]
    first = [row for row in rows if row["class_id"] < "c6" and row["id"] not in ("q1-2", "q1-3")]
    more = [{**rows[-5], "id": f"q7-1-{n}"} for n in range(15)]
    later = [row for row in rows if row not in first] + more
    old, grown = folder / "old", folder / "grown"

    def add(out: Path, rows: list[dict[str, str]], append: bool) -> None:
        manifest = write_manifest(folder / "manifest.tsv", rows)
        ingest(
            IngestConfig(
                manifest=manifest, images=folder, out=out, attribute_columns="colour,shape", append=append, workers=2
            )
        )

    add(old, first, append=False)
    govern.run(govern.GovernConfig(catalogue=old, min_queries=2))
    tokenizer.run(tokenizer.TokenizerConfig(catalogue=old, vocab_size=48))
    shutil.copytree(old, grown)
    add(grown, later, append=True)
    govern.run(govern.GovernConfig(catalogue=grown, min_queries=3))
    tokenizer.run(tokenizer.TokenizerConfig(catalogue=grown, keep_from=old))
    assert (keys(old / "classes/classes.parquet"), keys(grown / "classes/classes.parquet")) == (OLD, GROWN)
    return old, grown


def train(
    catalogue: Path, run: Path, settings: dict[str, Any], end: int, tensor_parallel: int = 1, save: bool = True
) -> dict[str, Any]:
    """Resumes, trains to step `end` and saves: what it then holds, joined over the ranks, and what it said when it
    started.

    Tensor-parallel ranks but the first embed a little off, as another GPU may.
    """
    exact, off = Oclear.embed_query, 1e-3 * (dist.is_initialized() and dist.get_rank() % tensor_parallel)
    config = tiny_config(catalogue, run, **{**SETTINGS, **settings})
    with (
        mock.patch.object(Oclear, "embed_query", lambda method, batch: exact(method, batch) + off),
        trainer(config, tensor_parallel, ready=False) as t,
    ):
        losses = [t.train_step(data).loss.item() for data in t.loader.steps(t.step, end)]
        if save:
            t.save()
        head = t.method.head
        tensors = {"rows": head.rows, **t.rows.row_state()}
        return {
            **{name: gather_shards(value, head.row_group).clone() for name, value in tensors.items()},
            "towers": merged_state_dict(t.method.towers, t.mesh.tp),
            "adam_steps": sorted({float(e["step"]) for p in t.towers._parts for e in p.optimizer.state.values()}),
            "log_decay": t.rows.log_decay,
            "step": t.step,
            "phases": [str(phase) for phase in t.resume.phases],
            "ledger": t.ledger.total,
            "losses": losses,
            "notes": t.notes,
        }


@pytest.fixture(scope="module")
def trained(catalogues: Catalogues, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of 4 steps by 2 ranks on the old catalogue, and what it held at its end."""
    run = tmp_path_factory.mktemp("trained") / "run"
    return run, ranks(2).run(train, catalogues[0], run, {}, 4)[0]


@pytest.fixture
def run(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(trained[0], tmp_path / "run")


@pytest.fixture(scope="module")
def means(trained: tuple[Path, dict[str, Any]], catalogues: Catalogues) -> dict[str, torch.Tensor]:
    """Class key -> mean of the unit embeddings of its first 16 samples by the trained towers, as evaluation embeds
    them.
    """
    config = tiny_config(catalogues[0], trained[0], **SETTINGS)
    catalogue = Catalogue(catalogues[1])
    with trainer(config, ready=False) as t:
        t.method.towers.eval()
        embedder = Embedder(config.data, config.model, t.tokenizer, 3, t.mesh)
        labels = ClassKeys()
        sides = [side_of(catalogue, k, "train", ["title", "description"], labels, 0) for k in ("query", "document")]
        found = [embedder.embed(t.method, side) for side in sides]
        vectors, ids, label = (
            torch.cat([getattr(e, name) for e in found]).double() for name in ("vectors", "ids", "labels")
        )
    result = {}
    for number, key in enumerate(labels.keys.to_pylist()):
        own = (label == number).nonzero()[:, 0]
        result[key] = vectors[own[ids[own].argsort()[:16]]].mean(0)
        if key == "c7":
            assert len(own) == 19 and not torch.allclose(result[key], vectors[own].mean(0), atol=1e-3)
    return result


def check_rows(held: dict[str, Any], before: dict[str, Any], means: dict[str, torch.Tensor], state: bool) -> None:
    """Rows of kept classes are the previous ones, new ones point along their means; with `state`, their optimizer state
    too.
    """
    was, now = ({key: i for i, key in enumerate(names)} for names in (OLD, GROWN))
    kept = [key for key in GROWN if key in was]
    a, b = [now[key] for key in kept], [was[key] for key in kept]
    names = ("rows", "exp_avg", "exp_avg_sq", "row_step", "paid") if state else ("rows",)
    for name in names:
        assert torch.equal(held[name][a], before[name][b]), name
    length = before["rows"][b].double().norm(dim=1).mean()
    new = [now[key] for key in ("c1", "c6", "c7")]
    wanted = torch.stack([means[GROWN[i]] / means[GROWN[i]].norm() * length for i in new])
    assert torch.allclose(held["rows"][new].double(), wanted, atol=1e-6)
    for name in ("exp_avg", "exp_avg_sq", "row_step"):
        assert not held[name][new].any(), name
    assert (held["paid"][new] == held["log_decay"]).all()


@pytest.mark.full
def test_state_of_every_format_moves_with_its_row(catalogues: Catalogues, tmp_path: Path) -> None:
    settings = {"optimizer.rows.state": "8bit", "head.row_dtype": "bf16", "train.new_phase": True}
    before = ranks(2).run(train, catalogues[0], tmp_path / "run", settings, 4)[0]
    held = train(catalogues[1], tmp_path / "run", settings, 4, save=False)
    kept = [key for key in GROWN if key in OLD]
    a, b = [GROWN.index(key) for key in kept], [OLD.index(key) for key in kept]
    for name in (
        "rows",
        "master",
        "row_step",
        "paid",
        *(f"exp_avg{m}_{part}" for m in ("", "_sq") for part in ("codes", "scales")),
    ):
        assert torch.equal(held[name][a], before[name][b]), name
    new = [GROWN.index(key) for key in ("c1", "c6", "c7")]
    assert torch.equal(held["master"][new].bfloat16(), held["rows"][new]) and held["master"][new].any(dim=1).all()
    assert not held["exp_avg_codes"][new].any()


@pytest.mark.parametrize(
    ("world", "tensor_parallel"),
    [(2, 2), *(pytest.param(*x, marks=pytest.mark.full) for x in ((1, 1), (3, 1)))],
)
def test_rows_follow_their_class_and_new_ones_start_from_their_samples(
    world: int,
    tensor_parallel: int,
    run: Path,
    trained: tuple[Path, dict[str, Any]],
    catalogues: Catalogues,
    means: dict[str, torch.Tensor],
) -> None:
    before, new_phase = trained[1], {"train.new_phase": True}
    assert before["row_step"].unique().numel() > 1 and before["log_decay"] < 0 and (before["paid"] < 0).any()
    pool, grown = ranks(world), catalogues[1]
    held = pool.run(train, grown, run, new_phase, 4, tensor_parallel, False)[0]
    check_rows(held, before, means, state=True)
    same(held["towers"], before["towers"])
    assert (held["log_decay"], held["step"], held["ledger"]) == (before["log_decay"], 4, before["ledger"])
    order = ClassOrder.open(grown, 1).order_id
    assert held["phases"] == [
        *before["phases"],
        f"from step 4 on in order {order} of 7 classes (4 kept, 3 new, 1 dropped)",
    ]
    assert f"data phase 2 begins: {held['phases'][1]}" in held["notes"]
    after = pool.run(train, grown, run, new_phase, 6, tensor_parallel)[0]
    assert len(after["losses"]) == 2 and np.isfinite(after["losses"]).all()


def samples_of(catalogue: Path, run: Path, settings: dict[str, Any], step: int) -> tuple[list[int], list[int]]:
    with trainer(tiny_config(catalogue, run, **{**SETTINGS, **settings}), ready=False) as t:
        return t.loader.load(step).batches[0].query_ids.tolist(), t.loader.ledgers(4, 10)


def test_a_phase_starts_its_order_and_resumes_to_the_digit(run: Path, catalogues: Catalogues, tmp_path: Path) -> None:
    (old, grown), new_phase = catalogues, {"train.new_phase": True}
    other = shutil.copytree(run, tmp_path / "other")
    ids, ledgers = samples_of(grown, run, new_phase, 4)
    assert ids == ClassOrder.open(grown, seed=1).draw("query", range(7)).sample_ids.tolist()
    before = int(checkpoint_files.read_state(run / "checkpoints/step-00000004")["ledger"], 16)
    straight = ranks(2).run(train, grown, run, new_phase, 10)[0]
    first = ranks(2).run(train, grown, other, new_phase, 7)[0]
    # Not told again: it is the order of its last phase now. And one more resume, with nothing left to do.
    second = ranks(2).run(train, grown, other, {}, 10)[0]
    assert any(note.startswith("data phase 2 goes on: from step 4 on") for note in second["notes"])
    same(first.pop("losses") + second.pop("losses"), straight.pop("losses"))
    same({**second, "notes": 0}, {**straight, "notes": 0})
    state = checkpoint_files.read_state(other / "checkpoints/step-00000010")
    assert int(state["ledger"], 16) == (before + sum(ledgers)) % 2**64
    assert [phase["first_step"] for phase in state["phases"]] == [0, 4]
    assert state["positions"] == {"query": 42, "document": 18}
    assert state["ledger_before"]["step"] == 4
    # The way back is a phase too.
    with pytest.raises(UserError, match="was governed again since"):
        train(old, other, {}, 10, save=False)
    assert len(train(old, other, new_phase, 10, save=False)["phases"]) == 3


def test_what_does_not_belong_to_the_run_is_refused(run: Path, catalogues: Catalogues, tmp_path: Path) -> None:
    grown = shutil.copytree(catalogues[1], tmp_path / "grown")
    with pytest.raises(
        UserError, match=r"was trained on order .* was governed again since\. Add --train\.new-phase true"
    ):
        train(grown, run, {}, 4)
    train(grown, run, {"train.new_phase": True}, 6)
    # Other samples under the same order id: the ledger of the phase's own steps tells.
    members = grown / "classes/query.members.npy"
    whole = np.load(members)
    np.save(members, np.roll(whole, 1))
    with pytest.raises(UserError, match="the samples of its steps 4 to 5 are not those"):
        train(grown, run, {}, 6)
    np.save(members, whole)
    # The same samples under other keys: the catalogue of something else.
    table = pq.read_table(grown / "classes/classes.parquet")
    names = [f"other {key}" for key in table["class_key"].to_pylist()]
    other = table.set_column(table.column_names.index("class_key"), "class_key", [names])
    pq.write_table(other, grown / "classes/classes.parquet")
    with pytest.raises(UserError, match="with other class keys"):
        train(grown, run, {}, 6)
    pq.write_table(table, grown / "classes/classes.parquet")
    meta = grown / "tokenizer/tokenizer.json"
    meta.write_text(meta.read_text().replace('"xxh3": "', '"xxh3": "0'))
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(UserError, match="with another tokenizer than that"),
    ):
        patch.setattr(
            text_tokenizer.Tokenizer,
            "load",
            classmethod(lambda cls, _: text_tokenizer.Tokenizer((meta.parent / "spm.model").read_bytes())),
        )
        train(grown, run, {}, 6)


def test_a_checkpoint_from_before_there_were_phases(run: Path, catalogues: Catalogues) -> None:
    rewrite_state(run, 4, {"phases": None, "tokenizer": None})
    state = checkpoint_files.read_state(run / "checkpoints/step-00000004")
    held = train(catalogues[0], run, {}, 4, save=False)
    assert held["phases"] == [f"from step 0 on in order {state['order_id']} of 5 classes (0 kept, 5 new, 0 dropped)"]
    assert len(train(catalogues[1], run, {"train.new_phase": True}, 4, save=False)["phases"]) == 2


def test_a_checkpoint_names_the_classes_that_were_trained(catalogues: Catalogues, tmp_path: Path) -> None:
    """Also where the catalogue is governed again while the run goes on."""
    catalogue = shutil.copytree(catalogues[0], tmp_path / "catalogue")
    with trainer(tiny_config(catalogue, tmp_path / "run", **SETTINGS), ready=False) as t:
        govern.run(govern.GovernConfig(catalogue=catalogue, min_queries=3))
        path, rows = t.save(), t.method.head.rows.clone()
    assert keys(path / "classes.parquet") == OLD
    assert keys(catalogue / "classes/classes.parquet") == [
        "c0",
        "c2",
        "c3",
        "c4",
    ]  # the previous ids, but other classes
    held = train(catalogue, tmp_path / "run", {"train.new_phase": True}, 0, save=False)
    assert held["phases"][1].endswith("of 4 classes (4 kept, 0 new, 1 dropped)")
    assert torch.equal(held["rows"], rows[:4])


def test_a_run_starts_from_the_weights_of_another(
    trained: tuple[Path, dict[str, Any]], catalogues: Catalogues, means: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    (source, before), (old, grown), run = trained, catalogues, tmp_path / "run"
    settings = {"train.init_from": source}
    held = ranks(2).run(train, grown, run, settings, 0)[0]
    check_rows(held, before, means, state=False)
    same(held["towers"], before["towers"])
    assert not any(held[name].any() for name in ("exp_avg", "exp_avg_sq", "row_step", "paid"))
    assert (held["step"], held["ledger"], held["log_decay"], held["adam_steps"]) == (0, 0, 0.0, [0.0])
    (note,) = held["notes"]
    assert note.startswith(f"started from {source}/checkpoints/step-00000004 (its step 4): from step 0 on in order ")
    assert note.endswith("of 7 classes (4 kept, 3 new, 1 dropped)")
    # Its own checkpoint wins; a step folder will do; classes that are the same need no map.
    held = train(grown, run, settings, 2)
    assert held["step"] == 2 and "train.init_from has no effect" in held["notes"][-1]
    held = train(old, tmp_path / "same", {"train.init_from": source / "checkpoints/step-00000004"}, 0, save=False)
    assert torch.equal(held["rows"], before["rows"])

    def refused(message: str, **more: Any) -> None:
        with pytest.raises(UserError, match=message):
            train(grown, tmp_path / "refused", {**settings, **more}, 0)

    refused(r"with model\.text\.hidden_size = 32, not 64: its weights do not fit", **{"model.text.hidden_size": 64})
    refused("is not a folder", **{"train.init_from": tmp_path / "absent"})
    refused("manifest.json is missing", **{"train.init_from": grown})


def test_a_run_on_classes_starts_from_one_on_pairs(catalogues: Catalogues, tmp_path: Path) -> None:
    """Which has no class rows: they are those of a new run."""
    source, more = tmp_path / "pairs", {"model.objective": "contrastive"}
    with trainer(tiny_config(catalogues[0], source, **{**SETTINGS, **more}), ready=False) as t:
        for data in t.loader.steps(0, 2):
            t.train_step(data)
        t.save()
        towers = merged_state_dict(t.method.towers, t.mesh.tp)
    held = ranks(2).run(train, catalogues[1], tmp_path / "run", {"train.init_from": source}, 0)[0]
    fresh = ranks(2).run(train, catalogues[1], tmp_path / "fresh", {}, 0)[0]
    same(held["towers"], towers)
    assert torch.equal(held["rows"], fresh["rows"]) and held["step"] == 0
    rows, started = held["notes"]
    assert rows == f"{source}/checkpoints/step-00000002 has no class rows: they start at random"
    assert started.startswith(f"started from {source}/checkpoints/step-00000002 (its step 2): ")


def test_a_warm_start_in_bf16_reaches_the_masters(
    trained: tuple[Path, dict[str, Any]], catalogues: Catalogues, tmp_path: Path
) -> None:
    settings = {
        "train.init_from": trained[0],
        "train.precision": "bf16",
        "head.row_dtype": "bf16",
        "optimizer.lr": 1e-12,
    }
    held = train(catalogues[0], tmp_path / "run", settings, 1, save=False)
    assert torch.equal(held["rows"], trained[1]["rows"].bfloat16())
    wanted = {name: value.bfloat16() for name, value in trained[1]["towers"].items()}
    assert all(torch.equal(held["towers"][name].bfloat16(), value) for name, value in wanted.items())


def own_part(count: int, size: int, rank: int) -> slice:
    per_rank = -(-count // size)
    return slice(min(count, rank * per_rank), min(count, (rank + 1) * per_rank))


def check_moves(cases: list[tuple[list[int], int]]) -> None:
    """`move_rows` of tensors of three types, all rows at once and in rounds of one row, against indexing."""
    with layout() as mesh, pytest.MonkeyPatch.context() as patch:
        place = mesh.world_size, mesh.rank
        for at_once in (1 << 28, 1):
            patch.setattr(class_rows, "AT_ONCE", at_once)
            for source, num_before in cases:
                own = own_part(len(source), *place)
                classes = ClassMap(torch.tensor(source, dtype=torch.int64)[own], num_before, 0, 0, 0)
                known = [i for i, s in enumerate(source) if s != NEW]
                for whole in (
                    torch.arange(num_before * 3).reshape(num_before, 3).to(torch.uint8),
                    torch.arange(num_before, dtype=torch.float64)[:, None],
                    torch.arange(num_before * 4).reshape(num_before, 4).bfloat16(),
                ):
                    wanted = torch.full((len(source), whole.shape[1]), 99, dtype=whole.dtype)
                    into = wanted[own].clone()
                    wanted[known] = whole[[source[i] for i in known]]
                    move_rows(whole[own_part(num_before, *place)], into, classes, mesh.row_group)
                    assert torch.equal(into, wanted[own]), (source, num_before, whole.dtype)


@pytest.mark.parametrize("world", [1, 3])
def test_rows_move_between_uneven_and_empty_shards(world: int) -> None:
    backwards = list(range(16, -1, -1))
    cases = [([3, NEW, 0], 4), ([NEW, 1], 2), ([1, 0], 7), ([NEW] * 5, 1), (backwards, 17), ([0], 20)]
    ranks(world).run(check_moves, cases)


def test_the_first_members_of_a_class_are_those_with_the_lowest_ids(catalogues: Catalogues) -> None:
    table = Catalogue(catalogues[1]).table(["kind", "class_key"], split="train").to_pylist()
    classes = np.array([6, 1])
    found = class_rows.first_members(catalogues[1] / "classes", classes)
    for place, key in enumerate(("c7", "c1")):
        wanted = [(row["sample_id"], row["kind"]) for row in table if row["class_key"] == key][:16]
        got = sorted((i, kind) for kind, (ids, places) in found.items() for i in ids[places == place].tolist())
        assert got == wanted
    assert json.loads((catalogues[1] / "classes/governance.json").read_text())["num_classes"] == 7
