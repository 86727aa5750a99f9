"""Stages of a run: against dense float64 in plain torch, resumed inside and across a boundary, on other ranks too;
mistakes in a recipe.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.catalogue.catalogue import Catalogue
from harness.commands.estimate import main as estimate
from harness.core.errors import UserError
from harness.train.config import load, parse
from harness.train.run import train
from models.comm import gather_shards
from models.heads.class_parallel import ClassHeadConfig
from models.oclear import OclearTowers
from models.plain.transformer import PlainBuilder
from models.tp_state import merged_state_dict
from tests.dense import dense_loss
from tests.pool import ranks
from tests.runs import arguments, tiny_config, trainer
from tests.test_hybrid import dense_pairs
from tests.test_layouts import same
from tests.test_loop import damage

FULL = pytest.mark.full
BOUNDARY = 3
SETTINGS: dict[str, Any] = {
    "train.steps": 6,
    "train.stages": [
        {"steps": BOUNDARY, "objective": "contrastive", "frozen": ["vision.stem", "text.words"], "image_size": 16},
        {"steps": 3, "rows": "class_mean", "margin_warmup": 2, "lr": 0.05, "warmup_steps": 2},
    ],
    "optimizer.lr": 0.1,
    # A large eps makes an update linear in its gradient, so that rounding in a small gradient stays small.
    "optimizer.eps": 1.0,
    "optimizer.rows.eps": 1.0,
    "optimizer.rows.lr_factor": 3.0,
    "optimizer.weight_decay": 0.5,
    "optimizer.clip_norm": 5.0,
    "optimizer.overlap": "always",  # what has gradients changes at the boundary
    "data.queries_per_step": 7,  # divides by no number of ranks
    "evaluation.batch_size": 3,
    "head.init_std": 0.02,
}
# By hand: the run's schedule of 6 steps and 2 of warm-up, then the second stage's own of 3 and 2; the margins.
RATES, MARGINS = (0.05, 0.1, 0.1, 0.025, 0.05, 0.05), (0.0, 0.0, 0.0, 0.05, 0.1, 0.1)
UNREADABLE = "c5"  # the class of which no picture can be read


@pytest.fixture(scope="module")
def damaged(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the catalogue in which all samples of UNREADABLE and a photo of another class are damaged."""
    folder = tmp_path_factory.mktemp("damaged") / "catalogue"
    shutil.copytree(catalogue, folder)
    keys = dict(zip(*Catalogue(folder).table(["class_key"]).to_pydict().values(), strict=True))
    first = next(sample for sample, key in keys.items() if key == "c1")
    damage(folder, [first, *(sample for sample, key in keys.items() if key == UNREADABLE)])
    return folder


def weights_of(t: Any) -> dict[str, Tensor]:
    """Towers, merged over the ranks that share them, and all class rows: a copy."""
    found = {**merged_state_dict(t.method.towers, t.mesh.tp), "rows": t.method.head.full_weight()}
    return {name: value.clone() for name, value in found.items()}


def trained(catalogue: Path, run: Path, tensor_parallel: int, end: int, settings: dict[str, Any] = SETTINGS) -> Any:
    """Trains `run` on to step `end` and saves: (loss, norm, weights after it) of each step, and all it then holds."""
    config = tiny_config(catalogue, run, **settings)
    with trainer(config, tensor_parallel, ready=False) as t:
        steps = []
        for data in t.steps(end):
            result = t.train_step(data)
            steps.append((result.loss.item(), result.norm, weights_of(t)))
        t.save()
        head = t.method.head
        state = {name: gather_shards(value, head.row_group) for name, value in t.rows.row_state().items()}
        inner = [entry for part in t.towers._parts for entry in part.optimizer.state.values()]
        return steps, weights_of(t) | state, [sorted(float(entry["step"]) for entry in inner), t.rows.log_decay]


def on_pairs(catalogue: Path, run: Path, settings: dict[str, Any]) -> None:
    """Trains `run` to BOUNDARY and saves, without a class head."""
    with trainer(tiny_config(catalogue, run, **settings), ready=False) as t:
        assert t.method.head is None
        for data in t.steps(BOUNDARY):
            t.train_step(data)
        t.save()


def members(catalogue: Path, kind: str, label: int) -> list[int]:
    """Training samples of a class."""
    ids, offsets = (np.load(catalogue / f"classes/{kind}.{name}.npy") for name in ("members", "member_offsets"))
    return ids[offsets[label] : offsets[label + 1]].tolist()


@torch.no_grad()
def dense_means(t: Any, plain: OclearTowers, rows: Tensor) -> Tensor:
    """Rows along the mean embedding of all readable samples of their class; without one they stay."""
    found = rows.clone()
    for label in range(len(rows)):
        vectors = []
        for kind in ("query", "document"):
            ids = np.array(members(t.config.data.catalogue, kind, label))
            images, ok = t.loader.images.read(ids, t.loader.images.parameters(ids))
            tokens = torch.from_numpy(t.loader.tokens.batch(ids, t.loader.reads.text_length))
            images = images.double()
            found_vectors = plain.query(images) if kind == "query" else plain.document(images, tokens)[0]
            vectors.append(F.normalize(found_vectors, dim=-1)[ok])
        if len(joined := torch.cat(vectors)):
            length = t.config.head.init_std * rows.shape[1] ** 0.5
            found[label] = length * F.normalize(joined.mean(0), dim=0)
    return found


def reference(catalogue: Path, run: Path) -> list[Any]:
    """`trained` in plain torch: one process, float64, all logits at once, gradients by autograd, torch's AdamW; before
    its steps the weights at the start.
    """
    with trainer(tiny_config(catalogue, run, **SETTINGS)) as t:
        model, optimizer = t.model_config, t.config.optimizer
        plain = OclearTowers(model, PlainBuilder()).double()
        plain.load_state_dict({name: x.double() for name, x in merged_state_dict(t.method.towers, t.mesh.tp).items()})
        rows = t.method.head.full_weight().double()
        matrices = [name for name, p in plain.named_parameters() if p.ndim > 1]
        found: list[Any] = [{**plain.state_dict(), "rows": rows}]
        found = [{name: x.detach().clone() for name, x in found[0].items()}]
        for step in range(SETTINGS["train.steps"]):
            batch = t.loader.load(step).batches[0].to(torch.device("cpu"), torch.float64)
            assert batch.query_images.shape[-1] == (16 if step < BOUNDARY else 32)
            held = ("vision.stem", "text.words") if step < BOUNDARY else ()
            if step == BOUNDARY:
                rows = dense_means(t, plain.eval(), rows)
                plain.train()
            if step in (0, BOUNDARY):
                rows.requires_grad_()
                live = {name: p for name, p in plain.named_parameters() if not name.startswith(held or "-")}
                groups = [
                    {"params": [p for name, p in live.items() if (name in matrices) is matrix], "weight_decay": decay}
                    for matrix, decay in ((True, optimizer.weight_decay), (False, 0.0))
                ]
                towers = torch.optim.AdamW(groups, 0.0, optimizer.betas, optimizer.eps)
                of_rows = torch.optim.AdamW([rows], 0.0, optimizer.rows.betas, optimizer.rows.eps, 0.0)
            queries, documents, _ = plain(batch.query_images, batch.document_images, batch.document_tokens)
            if step < BOUNDARY:
                assert torch.equal(batch.query_labels, batch.document_labels)
                loss = dense_pairs(model, queries, documents, batch, batch.document_weights)
            else:
                assert len(documents) == 4
                head = ClassHeadConfig(margin=(1.0, 0.0, MARGINS[step]), scale=16.0)
                loss = dense_loss(torch.cat([queries, documents]), rows, batch.labels, batch.weights.double(), head)
            parameters = [*live.values(), *([rows] if step >= BOUNDARY else [])]
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            norm = torch.stack([g.square().sum() for g in gradients if g is not None]).sum().sqrt()
            factor = min(1.0, optimizer.clip_norm / (float(norm) + 1e-6))
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient * factor
            for part, times in ((towers, 1.0), (of_rows, optimizer.rows.lr_factor)):
                for group in part.param_groups:
                    group["lr"] = RATES[step] * times
            towers.step()
            if step >= BOUNDARY:
                of_rows.step()
            state = {name: x.detach().clone() for name, x in {**plain.state_dict(), "rows": rows}.items()}
            found.append((loss.item(), float(norm), state))
        return found


@pytest.fixture(scope="module")
def dense(damaged: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return reference(damaged, tmp_path_factory.mktemp("dense") / "run")


@pytest.mark.parametrize(
    ("world", "tensor_parallel"), [(2, 1), *(pytest.param(*x, marks=FULL) for x in ((1, 1), (3, 1), (4, 1), (4, 2)))]
)
def test_a_staged_run_equals_dense_float64(
    world: int, tensor_parallel: int, dense: list[Any], damaged: Path, tmp_path: Path
) -> None:
    """Losses, gradients (by their norm and by every weight after a step that is linear in them), class means."""
    found = ranks(world).run(trained, damaged, tmp_path / "run", tensor_parallel, 6)[0][0]
    before, *wanted = dense
    assert any(norm > SETTINGS["optimizer.clip_norm"] for _, norm, _ in wanted), "no step was clipped"
    for step, ((loss, norm, weights), (true_loss, true_norm, states)) in enumerate(zip(found, wanted, strict=True)):
        assert abs(loss / true_loss - 1) < 1e-4, f"step {step}: loss {loss} against {true_loss}"
        assert abs(norm / true_norm - 1) < 1e-3, f"step {step}: norm {norm} against {true_norm}"
        for name, state in states.items():
            moved = float((state - before[name]).abs().max())
            error = float((weights[name].double() - state).abs().max())
            assert error <= 1e-3 * moved + 2e-6, f"step {step}: {name} is off by {error:.1e}, moved by {moved:.1e}"


@FULL
def test_what_a_stage_freezes_and_what_it_resets(dense: list[Any], damaged: Path, tmp_path: Path) -> None:
    """Frozen parts and rows that no step trains, to the bit; one count of AdamW's updates, since the boundary."""
    steps, _, (updates, _) = trained(damaged, tmp_path / "run", 1, 4)
    assert set(updates) == {1.0}, "AdamW began again at the boundary"
    for name, value in steps[BOUNDARY - 1][2].items():
        still = name == "rows" or name.startswith(("vision.stem", "text.words"))
        assert torch.equal(value.double(), dense[0][name]) == still, name


WHOLE = SETTINGS | {"head.sample_rate": 0.5, "optimizer.rows.weight_decay": 0.1}


def losses_of(found: Any) -> list[float]:
    return [loss for loss, _, _ in found[0]]


def require_equal(found: Any, wanted: Any) -> None:
    """Two results of `trained` are bit-equal, as far as the first has steps."""
    assert losses_of(found) == losses_of(wanted)[-len(found[0]) :]
    same(found[1], wanted[1])
    assert found[2] == wanted[2]


@FULL
@pytest.mark.parametrize(
    ("world", "tensor_parallel", "stop"),
    [(2, 1, BOUNDARY), (2, 1, 2), (2, 1, 4), (1, 1, 4), (4, 2, BOUNDARY)],
)
def test_resumed_equals_uninterrupted_to_the_digit(
    world: int, tensor_parallel: int, stop: int, catalogue: Path, tmp_path: Path
) -> None:
    """Inside a stage, at its first step and behind it; and on one rank the same losses."""
    pool = ranks(world)
    straight = pool.run(trained, catalogue, tmp_path / "a", tensor_parallel, 6, WHOLE)
    pool.run(trained, catalogue, tmp_path / "b", tensor_parallel, stop, WHOLE)
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    resumed = pool.run(trained, catalogue, tmp_path / "b", tensor_parallel, 6, WHOLE)
    for found, wanted in zip(resumed, straight, strict=True):
        assert len(found[0]) == 6 - stop
        require_equal(found, wanted)
    elsewhere = losses_of(trained(catalogue, tmp_path / "c", 1, 6, WHOLE))
    assert elsewhere == pytest.approx(losses_of(straight[0])[stop:], rel=1e-4)


def test_a_boundary_that_was_interrupted_is_done_again(catalogue: Path, tmp_path: Path) -> None:
    def interrupt(line: str) -> None:
        if line.startswith("rows at the means of their classes"):
            raise KeyboardInterrupt

    straight = trained(catalogue, tmp_path / "a", 1, 6, WHOLE)
    with trainer(tiny_config(catalogue, tmp_path / "b", **WHOLE)) as t, pytest.raises(KeyboardInterrupt):
        for data in t.steps(6, interrupt):
            t.train_step(data)
            if t.step == BOUNDARY:
                t.save()
    require_equal(trained(catalogue, tmp_path / "b", 1, 6, WHOLE), straight)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=FULL)])
def test_a_stage_on_classes_is_added_to_a_run_on_pairs(world: int, catalogue: Path, tmp_path: Path) -> None:
    """Its checkpoint has no class rows: they begin as this stage says, as in a run that had it from the start."""
    pool, (first, second) = ranks(world), WHOLE["train.stages"]
    straight = pool.run(trained, catalogue, tmp_path / "a", 1, 6, WHOLE)
    pairs = WHOLE | {"train.stages": [first, {"steps": 3, "objective": "contrastive"}]}
    pool.run(on_pairs, catalogue, tmp_path / "b", pairs)
    assert not (tmp_path / "b" / "checkpoints" / f"step-{BOUNDARY:08d}" / "head").exists()
    for found, wanted in zip(pool.run(trained, catalogue, tmp_path / "b", 1, 6, WHOLE), straight, strict=True):
        assert len(found[0]) == 6 - BOUNDARY and second["rows"] == "class_mean"
        require_equal(found, wanted)


@FULL
def test_random_rows_are_those_of_a_new_head_with_fresh_state(catalogue: Path, tmp_path: Path) -> None:
    settings = WHOLE | {"train.stages": [{"steps": 2}, {"steps": 4, "rows": "random"}]}
    _, before, _ = trained(catalogue, tmp_path / "run", 1, 2, settings)
    with trainer(tiny_config(catalogue, tmp_path / "run", **settings), ready=False) as t:
        head, state = t.method.head, t.rows.row_state()
        new = head.draw(torch.empty_like(head.rows))
        assert not torch.equal(head.rows, new) and before["row_step"].any() and before["exp_avg"].any()
        next(t.steps(6))
        assert torch.equal(head.rows, new)
        assert not any(state[name].any() for name in ("row_step", "exp_avg", "exp_avg_sq"))
        assert t.rows.log_decay < 0 and bool((state["paid"] == t.rows.log_decay).all())


@FULL
def test_one_stage_that_sets_nothing_is_a_run_without_stages(catalogue: Path, tmp_path: Path) -> None:
    plain = {key: value for key, value in WHOLE.items() if key != "train.stages"}
    without = trained(catalogue, tmp_path / "a", 1, 3, plain)
    one = trained(catalogue, tmp_path / "b", 1, 3, plain | {"train.stages": [{"steps": 6}]})
    require_equal(one, without)
    assert "stages" not in tiny_config(catalogue, tmp_path / "a", **plain).to_dict()["train"]


@FULL
def test_a_run_names_its_stages_and_goes_on_with_those_ahead(
    catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(stages: list[dict[str, Any]], stop: int) -> str:
        settings = {"train.steps": 4, "train.stages": stages, "train.stop_at": stop}
        train(arguments(catalogue, tmp_path / "run", **settings))
        return capsys.readouterr().out

    first, second = {"steps": 2, "objective": "contrastive"}, {"steps": 2, "rows": "class_mean"}
    out = run([first, second], 3)
    assert "a step      8 photos and 8 documents in stage 1, 8 photos and 4 documents in stage 2" in out
    assert "stage 2 begins: steps 2 to 4, rows class_mean" in out and "their classes: 6 of 6" in out
    with pytest.raises(UserError, match=r"was trained to step 3 with other stages than train\.stages"):
        run([first, {"steps": 2}], 4)
    out = run([first, {"steps": 1, "rows": "class_mean"}, {"steps": 1, "lr": 0.1}], 4)
    assert "stage 3 begins: steps 3 to 4, lr 0.1" in out
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["train/stage"] for line in lines if "train/stage" in line] == [1, 1, 2, 3]
    stages = load(tmp_path / "run").train.stages
    assert [(stage.steps, stage.rows, stage.lr) for stage in stages[1:]] == [(1, "class_mean", None), (1, "kept", 0.1)]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"steps": 6, "lrr": 1.0}], r"train\.stages\[0\]: unknown key 'lrr'\. Did you mean 'lr'"),
        ([{"steps": -1}], r"train\.stages\[0\]\.steps is -1"),
        ([{"objective": "contrastive"}], r"train\.stages\[0\] has no steps"),
        ([{"steps": 6, "rows": "mean"}], r"stages\[0\]\.rows is 'mean'; it can be kept or random or class_mean"),
        ([{"steps": 2}, {"steps": 3}], r"train\.steps is 6, but the steps of train\.stages add up to 5"),
        ([{"steps": 6, "objective": "contrastive", "rows": "class_mean"}], "but this stage trains no class rows"),
        ([{"steps": 6, "objective": "contrastive", "margin_warmup": 2}], "but this stage trains no class rows"),
        ([{"steps": 6, "image_size": 20}], r"image_size 20 is not a multiple of model\.vision\.patch_size 8"),
        ([{"steps": 6, "lr": 0}], r"stages\[0\]\.lr is 0\.0\. It must be a float, above 0"),
        ([7], r"train\.stages\[0\] is 7, not a mapping"),
        (7, r"train\.stages is 7, not a list of stages"),
    ],
)
def test_mistakes_are_named(stages: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(tmp_path, tmp_path / "run", **{"train.steps": 6, "train.stages": stages})


def test_parts_that_a_later_stage_freezes_are_looked_for_at_the_start(catalogue: Path, tmp_path: Path) -> None:
    for frozen, message in ((["vison"], r"train\.stages\[1\]\.frozen: .* no parameter 'vison'"), (["*"], "leaves no")):
        settings = {"train.steps": 4, "train.stages": [{"steps": 2}, {"steps": 2, "frozen": frozen}]}
        with pytest.raises(UserError, match=message), trainer(tiny_config(catalogue, tmp_path / "run", **settings)):
            pass


def test_what_a_method_does_not_have_is_refused(tmp_path: Path) -> None:
    for key, value in (("objective", "contrastive"), ("image_size", 32)):
        stages = json.dumps([{"steps": 5, key: value}])
        with pytest.raises(UserError, match=rf"train\.stages\[0\]\.{key} is set"):
            parse(["--method=item", f"--data.catalogue={tmp_path}", f"--train.stages={stages}"])


@FULL
def test_an_estimate_has_the_figures_of_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    def of(**settings: Any) -> dict[str, Any]:
        return estimate([*arguments(Path("none"), Path("none"), **settings), "--num-classes=50", "--vocab-size=40"])

    stages = [{"steps": 3, "objective": "contrastive", "image_size": 16, "frozen": ["vision"]}, {"steps": 1}]
    staged = of(**{"train.steps": 4, "train.stages": stages})
    small = {"data.preprocess.image_size": 16, "model.vision.image_size": 16, "optimizer.frozen": ["vision"]}
    alone = [of(**{"model.objective": "contrastive"}, **small), of()]
    flops = [found["flops_per_step_total"] for found in alone]
    assert [stage["flops_per_step_total"] for stage in staged["stages"]] == flops and flops[0] < flops[1]
    assert {**staged, "stages": 0} == {**alone[1], "stages": 0}, "the largest stage"
    assert "stage 1: peak of a step, memory of a rank" in capsys.readouterr().out
