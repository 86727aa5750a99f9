"""One run in this process: what it leaves behind, what it reports, and how it meets bad numbers and bad bytes."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import yaml

from harness.catalogue.catalogue import Catalogue, shard_name
from harness.core import manifest as checksums
from harness.core.errors import UserError
from harness.data.loader import StepLoader
from harness.data.step_data import StepData
from harness.text.tokenizer import Tokenizer
from harness.train import checkpoint_files, throughput
from harness.train.config import RunConfig
from harness.train.schedule import OptimizerConfig, learning_rate, margin_part
from models.batch import TENSORS, Batch, Reads
from tests.pool import ranks
from tests.runs import UNUSED, tiny_config, trainer

STEPS = 6
SETTINGS: dict[str, Any] = {
    "train.steps": STEPS,
    "train.evaluate_every": 3,
    "train.checkpoint_every": 2,
    "evaluation.slices": ["colour"],
}


@pytest.fixture(scope="module")
def finished(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[float]]:
    """A finished run: its folder, its figures, and the learning rate that the optimizer held after the last step."""
    run = tmp_path_factory.mktemp("finished") / "run"
    with trainer(tiny_config(catalogue, run, **SETTINGS)) as t:
        figures = t.fit()
        rates = [group["lr"] / group["lr_mult"] for group in t.towers.optimizer.param_groups]
    return run, figures, rates


def log_lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_the_run_folder_explains_itself(finished: tuple[Path, dict[str, Any], list[float]], catalogue: Path) -> None:
    run, figures, _ = finished
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["train"]["steps"] == STEPS and config["data"]["catalogue"] == str(catalogue)
    assert (run / "versions.json").is_file()
    assert json.loads((run / "preprocess.json").read_text())["image_size"] == 32
    assert Tokenizer.load(run).vocab_size == Tokenizer.load(catalogue).vocab_size
    folder = run / "checkpoints"
    assert (folder / "latest").read_text() == f"step-{STEPS:08d}"
    # keep_checkpoints is 2 of the three that were written, and nothing unfinished is left.
    assert sorted(f.name for f in folder.glob("[!.]*")) == ["latest", "step-00000004", "step-00000006"]
    assert all(checksums.verify(path) == "" for path in folder.glob("step-*"))
    state = checkpoint_files.read_state(folder / "step-00000006")
    assert (state["step"], state["positions"]) == (6, {"query": 48, "document": 24})
    report = json.loads((run / f"eval-{STEPS:08d}.json").read_text())
    assert report["recall_at_1"] == figures["recall_at_1"]
    assert {row["slice"] for row in report["slices"]} == {"colour", "class"}
    assert figures["steps"] == STEPS and figures["queries"] == 6 and figures["documents"] == 6


def test_the_log_has_every_figure_of_every_step(finished: tuple[Path, dict[str, Any], list[float]]) -> None:
    """tests/test_tensorboard.py compares what TensorBoard shows with it."""
    training = [line for line in log_lines(finished[0]) if "train/loss" in line]
    assert [line["step"] for line in training] == list(range(1, STEPS + 1))
    parts = {f"step_seconds/{part}" for part in ("data", "forward", "backward", "optimizer")}
    shown = {"train/loss", "train/positive_cosine", "train/accuracy", "train/gate", "train/gradient_norm"}
    shown |= {"train/learning_rate", "speed/images_per_second", "speed/data_wait_share", "data/bad_samples", *parts}
    shown |= {"speed/read_ahead_fill", "speed/decode_images_per_second"}
    assert all(set(line) == {"step", *shown} for line in training)
    assert all(0 < line["train/gate"] < 1 and -1 <= line["train/positive_cosine"] <= 1 for line in training)
    assert all(line["train/gradient_norm"] > 0 and line["speed/images_per_second"] > 0 for line in training)
    assert all(line[part] > 0 for line in training for part in (*parts, "speed/decode_images_per_second"))
    assert all(0 <= line["speed/read_ahead_fill"] <= 1 for line in training)
    evaluations = [line for line in log_lines(finished[0]) if "retrieval/map" in line]
    assert [line["step"] for line in evaluations] == [3, 6]
    for name in ("recall_at_1", "recall_at_5", "recall_at_10", "map", "ndcg_at_10", "mrr"):
        assert all(0 <= line[f"retrieval/{name}"] <= 1 for line in evaluations)


def train_by_a_clock_of_its_own(config: RunConfig) -> dict[str, Any]:
    """Trains where only waiting for data (3 s on rank 0, 6 s on rank 1), the forward pass (1 s) and evaluations (50 s)
    take time.
    """
    now = 0.0
    with trainer(config) as t:
        steps, losses, run = t.loader.steps, t.method.losses, t.validation.evaluation.run

        def slow_steps(first: int, end: int) -> Iterator[StepData]:
            nonlocal now
            for data in steps(first, end):
                now += 3.0 * (t.mesh.rank + 1)
                yield data

        def slow_losses(batches: list[Batch]) -> Iterator[Any]:
            nonlocal now
            for loss in losses(batches):
                now += 1.0
                yield loss

        def slow_run(*args: Any, **options: Any) -> Any:
            nonlocal now
            now += 50.0
            return run(*args, **options)

        with (
            mock.patch.object(throughput, "time", SimpleNamespace(perf_counter=lambda: now)),
            mock.patch.object(t.loader, "steps", slow_steps),
            mock.patch.object(t.method, "losses", slow_losses),
            mock.patch.object(t.validation.evaluation, "run", slow_run),
        ):
            t.clock = throughput.StepClock(t.mesh)
            return t.fit()


def test_the_share_of_waiting_is_that_of_the_slowest_rank(catalogue: Path, tmp_path: Path) -> None:
    config = tiny_config(catalogue, tmp_path / "run", **{"train.log_every": 2, "train.evaluate_every": 2})
    figures, _ = ranks(2).run(train_by_a_clock_of_its_own, config)
    training = [line for line in log_lines(tmp_path / "run") if "train/loss" in line]
    assert [line["speed/data_wait_share"] for line in training] == pytest.approx([6 / 7, 6 / 7])
    assert [line["step_seconds/data"] for line in training] == [3.0, 3.0]  # of rank 0 in that step
    # 12 images in 4 s: evaluations do not count.
    assert [line["speed/images_per_second"] for line in training] == [3.0, 3.0] and figures["images_per_second"] == 3.0
    assert figures["seconds"] == 116.0


def test_a_run_stopped_before_its_last_evaluation_is_evaluated(
    finished: tuple[Path, dict[str, Any], list[float]], catalogue: Path, tmp_path: Path
) -> None:
    run, figures, _ = finished
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / f"eval-{STEPS:08d}.json").unlink()
    with trainer(tiny_config(catalogue, copy, **SETTINGS)) as t:
        again = t.fit()
    assert (
        again["loss"] is None
        and again["recall_at_1"] == figures["recall_at_1"]
        and again["slices"] == figures["slices"]
    )
    assert (copy / f"eval-{STEPS:08d}.json").is_file()


def test_the_learning_rate_follows_its_schedule(finished: tuple[Path, dict[str, Any], list[float]]) -> None:
    # lr 1e-3, 2 steps of warm-up, then a cosine over the other 4 that would reach 1 % at step 6.
    cosine = [0.01 + 0.99 * (1 + math.cos(math.pi * part / 4)) / 2 for part in range(4)]
    wanted = [0.5e-3, 1e-3, *(1e-3 * factor for factor in cosine)]
    logged = [line["train/learning_rate"] for line in log_lines(finished[0]) if "train/loss" in line]
    assert logged == pytest.approx(wanted, rel=1e-9)
    assert finished[2] == pytest.approx([wanted[-1]] * len(finished[2]), rel=1e-9)
    config = OptimizerConfig(lr=2.0, warmup_steps=0, min_lr_factor=0.25)
    assert [learning_rate(config, step, 10) for step in (0, 5, 10, 99)] == pytest.approx([2.0, 1.25, 0.5, 0.5])


def test_the_margin_follows_its_schedule() -> None:
    wanted = {
        "constant": [1.0, 1.0, 1.0, 1.0],
        "linear": [0.25, 0.5, 1.0, 1.0],
        "cosine": [0.5 - 0.125**0.5, 0.5, 1.0, 1.0],
    }
    for schedule, parts in wanted.items():
        assert [margin_part(schedule, 4, step) for step in (0, 1, 3, 9)] == pytest.approx(parts), schedule
        assert margin_part(schedule, 0, 0) == 1.0


def test_a_resumed_log_has_every_step_once_and_survives_a_torn_line(catalogue: Path, tmp_path: Path) -> None:
    settings = {"train.steps": 5, "train.log_every": 2}
    with trainer(tiny_config(catalogue, tmp_path / "run", **settings, **{"train.stop_at": 3})) as t:
        t.fit()
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write('{"step": 4, "train/loss": 1}\n{"step": 4, "tra')  # a process that was killed after its checkpoint
    with trainer(tiny_config(catalogue, tmp_path / "run", **settings)) as t:
        assert t.fit()["steps"] == 5
    training = [line for line in log_lines(tmp_path / "run") if "train/loss" in line]
    assert [line["step"] for line in training] == [2, 3, 4, 5]
    assert training[2]["train/loss"] != 1


def weights(t: Any) -> list[torch.Tensor]:
    return [
        *(p.detach().clone() for p in t.method.towers.parameters()),
        t.method.head.rows.clone(),
        t.rows.row_state()["exp_avg"].clone(),
    ]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(a, b, strict=True))


def test_a_loss_that_is_not_finite_ends_the_run_before_it_reaches_the_weights(catalogue: Path, tmp_path: Path) -> None:
    settings = {"train.checkpoint_every": 1, "optimizer.warmup_steps": 0}
    with trainer(tiny_config(catalogue, tmp_path / "run", **settings, **{"optimizer.lr": 1e30})) as t:
        batch = t.loader.load(1).batches[0]
        t.train_step(t.loader.load(0))
        with pytest.raises(
            UserError, match=r"step 1: loss .* is not finite; nothing was updated.*nonfinite-step-1-rank-0"
        ):
            t.fit()
        assert t.step == 1
    found = json.loads((tmp_path / "run" / "nonfinite-step-1-rank-0.json").read_text())
    assert found["step"] == 1 and "nan" in found["loss"] + found["gradient_norm"]
    assert found["sample_ids"] == torch.cat([batch.query_ids, batch.document_ids]).tolist()
    assert checkpoint_files.newest(tmp_path / "run" / "checkpoints") == (None, [])


def test_a_weight_that_is_not_a_number_changes_nothing_and_the_checkpoint_stays_good(
    catalogue: Path, tmp_path: Path
) -> None:
    config = tiny_config(catalogue, tmp_path / "run")
    with trainer(config) as t:
        t.train_step(t.loader.load(0))
        t.save()
        good = weights(t)
        with torch.no_grad():
            next(p for name, p in t.method.towers.named_parameters() if name.startswith("vision.block"))[0] = math.nan
        before = weights(t)
        with pytest.raises(UserError, match="not finite"):
            t.train_step(t.loader.load(1))
        assert same(weights(t), before) and t.step == 1
    with trainer(config) as t:
        assert same(weights(t), good)
        assert math.isfinite(t.train_step(t.loader.load(1)).loss.item())


def damage(folder: Path, ids: list[int]) -> None:
    """Overwrites bytes of these samples in the shards of a catalogue."""
    for i in ids:
        shard, offset, length, *_ = Catalogue(folder).index[i].item()
        with (folder / "shards" / shard_name(shard)).open("r+b") as file:
            file.seek(offset + length // 2)
            file.write(b"\0damaged\0")


@pytest.fixture
def damaged(catalogue: Path, tmp_path: Path) -> tuple[Path, list[int]]:
    """A copy of the catalogue in which one training query and one document have other bytes than were ingested."""
    folder = tmp_path / "damaged"
    shutil.copytree(catalogue, folder)
    table = Catalogue(folder).table
    ids = [table([], kind=kind, split="train")["sample_id"][2].as_py() for kind in ("query", "document")]
    damage(folder, ids)
    return folder, ids


def test_a_damaged_sample_costs_itself_alone(
    catalogue: Path, damaged: tuple[Path, list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, ids = damaged
    with trainer(tiny_config(folder, tmp_path / "run")) as t:
        met: Counter[int] = Counter()
        for step in range(4):
            data = t.loader.load(step)
            met.update(data.bad_ids)
            batch = data.batches[0]
            seen = torch.cat([batch.query_ids, batch.document_ids])
            is_bad = torch.isin(seen, torch.tensor(ids))
            assert torch.equal(batch.weights, (~is_bad).float())
            assert sorted(data.bad_ids) == sorted(seen[is_bad].tolist())
        assert set(met) == set(ids), "4 steps of 8 queries and 4 documents meet both"
        figures = t.fit()
    assert figures["steps"] == 4 and math.isfinite(figures["loss"])
    assert log_lines(tmp_path / "run")[-2]["data/bad_samples"] == met.total()
    assert f"samples {ids} are damaged; they have weight 0" in capsys.readouterr().out
    with open_loader(catalogue) as whole, open_loader(folder) as loader:
        for step in range(4):
            a, b = whole.load(step).batches[0], loader.load(step).batches[0]
            kept = b.query_weights > 0
            assert torch.equal(a.query_images[kept], b.query_images[kept])
            assert torch.equal(a.query_ids, b.query_ids)


def damage_met(catalogue: Path, run: Path) -> int:
    """Trains; how many damaged samples this rank itself met."""
    with trainer(tiny_config(catalogue, run)) as t:
        t.fit()
    return t.damaged.count


def test_damaged_samples_of_all_ranks_are_counted(damaged: tuple[Path, list[int]], tmp_path: Path) -> None:
    met = ranks(2).run(damage_met, damaged[0], tmp_path / "run")
    assert min(met) > 0
    training = [line for line in log_lines(tmp_path / "run") if "train/loss" in line]
    assert training[-1]["data/bad_samples"] == sum(met)


def test_a_damaged_sample_counts_nothing_in_the_loss(
    catalogue: Path, damaged: tuple[Path, list[int]], tmp_path: Path
) -> None:
    with open_loader(damaged[0]) as loader:
        step, data = next((step, data) for step in range(4) if (data := loader.load(step)).bad_ids)
    with trainer(tiny_config(catalogue, tmp_path / "run")) as t:
        whole, bad = t.loader.load(step).batches[0], data.batches[0]
        left_out = replace(whole, query_weights=bad.query_weights, document_weights=bad.document_weights)
        batches = (bad, left_out, whole)
        losses = [next(t.method.losses([b]))[0].item() for b in batches if not t.method.head.end_step()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0] != pytest.approx(losses[2], rel=1e-3)


def open_loader(
    catalogue: Path,
    rank: int = 0,
    world: int = 1,
    paired: bool = False,
    backend: str = "dali",
    micro_batches: int = 1,
    **overrides: Any,
) -> closing[StepLoader]:
    """The loader of one rank; no rank is needed for it."""
    settings = {"data.backend": backend, "data.micro_batches": micro_batches, **overrides}
    config = tiny_config(catalogue, UNUSED, **settings)
    reads = Reads(kind="pairs" if paired else "photos", text_length=config.model.text.max_length)
    return closing(StepLoader(config.data, config.seed, reads, rank, world, torch.device("cpu")))


def whole_step(
    catalogue: Path, step: int, world: int, micro_batches: int, **options: Any
) -> tuple[list[torch.Tensor], int]:
    """A step put together from all ranks' micro-batches, in the order of its positions, and the sum of the ledgers."""
    parts: list[StepData] = []
    for rank in range(world):
        with open_loader(catalogue, rank, world, micro_batches=micro_batches, **options) as loader:
            parts.append(loader.load(step))
            assert len(parts[-1].batches) == micro_batches
    batches = [parts[rank].batches[micro] for micro in range(micro_batches) for rank in range(world)]
    for i, batch in enumerate(batches):
        assert batch.sizes is not None
        told = [counts[i % world] for counts in batch.sizes.values()]
        assert told == [len(batch.query_ids), len(batch.document_ids)], "what the others are told of this rank"
    joined = [torch.cat([getattr(batch, name) for batch in batches]) for name in TENSORS]
    return joined, sum(part.ledger for part in parts) % 2**64


@pytest.mark.parametrize(
    "step", [pytest.param(0, marks=pytest.mark.full), 2]
)  # the queries' second epoch begins within step 2
@pytest.mark.parametrize("options", [{}, {"paired": True}, {"backend": "reference"}], ids=["own", "paired", "pillow"])
def test_a_step_holds_the_same_however_it_is_cut(catalogue: Path, step: int, options: dict[str, Any]) -> None:
    wanted, ledger = whole_step(catalogue, step, 1, 1, **options)
    sizes = [tensor.numel() and len(tensor) for tensor in wanted]  # 0 of the answers too: no photo has several
    assert sizes[:9] == [8] * 4 + [8 if "paired" in options else 4] * 5
    assert not any(sizes[9:]), "the rest is MAKE's and ITEm's"
    for world in (1, 2, 3, 4):
        for micro_batches in (1, 2):
            found, sum_of_ledgers = whole_step(catalogue, step, world, micro_batches, **options)
            for name, a, b in zip(TENSORS, wanted, found, strict=True):
                assert torch.equal(a, b), f"{name} of {world} ranks with {micro_batches} micro-batches"
            assert sum_of_ledgers == ledger
    other, other_ledger = whole_step(catalogue, step + 1, 1, 1, **options)
    assert not torch.equal(other[0], wanted[0]) and other_ledger != ledger


@pytest.mark.parametrize("ahead", [{"read_ahead": 1}, {"read_ahead": 7}, {"read_ahead_bytes": 1}])
def test_steps_do_not_depend_on_the_read_ahead(catalogue: Path, ahead: dict[str, int]) -> None:
    with open_loader(catalogue) as loader:
        wanted = [loader.load(step).batches[0] for step in range(2, 7)]
    with open_loader(catalogue, **{f"data.{name}": value for name, value in ahead.items()}) as loader:
        for a, data in zip(wanted, loader.steps(2, 7), strict=True):
            for name in TENSORS:
                assert torch.equal(getattr(a, name), getattr(data.batches[0], name)), name


def test_paired_documents_show_their_querys_class(catalogue: Path) -> None:
    key = dict(zip(*Catalogue(catalogue).table(["class_key"]).to_pydict().values(), strict=True))
    with open_loader(catalogue, paired=True) as loader:
        batch = loader.load(0).batches[0]
    assert [key[i] for i in batch.query_ids.tolist()] == [key[i] for i in batch.document_ids.tolist()]
    assert torch.equal(batch.query_labels, batch.document_labels)


@pytest.mark.parametrize("backend", ["dali", "reference"])
@pytest.mark.parametrize("taken", [0, 2, 20])
def test_the_read_ahead_ends_with_close(catalogue: Path, backend: str, taken: int) -> None:
    with open_loader(catalogue, backend=backend) as loader:
        wanted = [loader.load(3 + i).ledger for i in range(taken)]
    before = set(threading.enumerate())
    with open_loader(catalogue, backend=backend) as loader:
        reading = loader.steps(3, 23)
        assert [next(reading).ledger for _ in range(taken)] == wanted
    assert set(threading.enumerate()) <= before


def test_an_error_in_the_read_ahead_reaches_the_loop_and_ends_the_thread(
    catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = StepLoader._plan

    def failing(self: StepLoader, step: int) -> Any:
        if step == 2:
            raise UserError("the class arrays are gone")
        return plan(self, step)

    monkeypatch.setattr(StepLoader, "_plan", failing)
    before = set(threading.enumerate())
    with trainer(tiny_config(catalogue, tmp_path / "run")) as t:
        with pytest.raises(UserError, match="the class arrays are gone"):
            t.fit()
        assert t.step == 1  # samples are drawn while the step before is decoded
    assert set(threading.enumerate()) <= before


def first_loss(config: RunConfig) -> float:
    with trainer(config) as t:
        assert next(t.method.towers.parameters()).dtype == getattr(
            torch, {"fp32": "float32", "bf16": "bfloat16"}[config.train.precision]
        )
        return t.train_step(t.loader.load(0)).loss.item()


def test_bf16_trains_and_begins_like_fp32(catalogue: Path, tmp_path: Path) -> None:
    wanted = first_loss(tiny_config(catalogue, tmp_path / "fp32"))
    bf16 = tiny_config(catalogue, tmp_path / "bf16", **{"train.precision": "bf16"})
    assert first_loss(bf16) == pytest.approx(wanted, rel=0.05)
    with trainer(bf16) as t:
        figures = t.fit()
    assert figures["steps"] == 4 and math.isfinite(figures["loss"]) and figures["queries"] == 6


def test_the_contrastive_objective_trains_on_pairs(catalogue: Path, tmp_path: Path) -> None:
    with trainer(tiny_config(catalogue, tmp_path / "run", **{"model.objective": "contrastive"})) as t:
        assert t.method.head is None and t.rows is None
        assert t.loader.samples(0)[1] == 8
        figures = t.fit()
    assert figures["steps"] == 4 and math.isfinite(figures["loss"])
    assert checkpoint_files.read_state(tmp_path / "run/checkpoints/step-00000004")["positions"]["document"] == 32


def test_micro_batches_do_not_change_the_contrastive_loss(catalogue: Path, tmp_path: Path) -> None:
    """Every pair meets the whole step's negatives, however few are in memory at a time."""
    found = []
    for micro_batches in (1, 2, 4):
        settings = {"model.objective": "contrastive", "data.micro_batches": micro_batches}
        with trainer(tiny_config(catalogue, tmp_path / str(micro_batches), **settings)) as t:
            steps = [t.train_step(data) for data in t.loader.steps(0, 3)]
        found.append([(step.loss.item(), step.norm, *(step.sums[:, 0] / step.sums[:, 1]).tolist()) for step in steps])
    for other in found[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(found[0]), rtol=1e-5, atol=1e-7)
