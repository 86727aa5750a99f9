"""Fine-tuning: frozen parts, learning rates by layer and by name, the average of the weights; all of it over layouts,
resumes and warm starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from harness.core.errors import UserError
from harness.text.tokenizer import Tokenizer
from harness.train import checkpoint, checkpoint_files
from harness.train.open_run import load_method
from models.tp_state import merge_shards, merged_state_dict
from tests.pool import layout, ranks
from tests.runs import tiny_config, trainer
from tests.test_class_life import Catalogues, catalogues, train  # noqa: F401  (a fixture)
from tests.test_layouts import same
from tests.test_loader_guards import rewrite_state

FROZEN = ["vision.stem", "text.words", "vision.block.layers.0"]
ALL_THREE: dict[str, Any] = {
    "model.vision.num_layers": 2,
    "optimizer.frozen": FROZEN,
    "optimizer.layer_decay": 0.5,
    "optimizer.lr_factors": ["query_transform=10"],
    "optimizer.warmup_steps": 0,
    "train.ema_decay": 0.9,
}


def is_frozen(name: str) -> bool:
    return name.startswith(tuple(FROZEN))


def averages(t: Any) -> dict[str, torch.Tensor]:
    """The average of every trained parameter, joined over tensor-parallel ranks."""
    of = dict(t.method.towers.named_parameters())
    return {name: merge_shards(value, of[name], t.mesh.tp).clone() for name, value in t.ema.state.items()}


def weights(t: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in merged_state_dict(t.method.towers, t.mesh.tp).items()}


def tune(catalogue: Path, run: Path, settings: dict[str, Any], tensor_parallel: int) -> dict[str, Any]:
    """Three steps: weights and average before and after each of them, and what there is of gradients and state."""
    with trainer(tiny_config(catalogue, run, **settings), tensor_parallel) as t:
        seen, averaged, found = [weights(t)], [averages(t)], []
        for data in t.loader.steps(t.step, 3):
            found.append(t.train_step(data).loss.item())
            seen.append(weights(t))
            averaged.append(averages(t))
        t.save()
        with t.ema.applied():
            applied = weights(t)
        same(weights(t), seen[-1])
        trained = [p for p in t.method.towers.parameters() if p.requires_grad]
        moments = sum(e["exp_avg"].numel() for part in t.towers._parts for e in part.optimizer.state.values())
        return {
            "losses": found,
            "weights": seen,
            "averages": averaged,
            "applied": applied,
            "buffered": {n for n, p in t.method.towers.named_parameters() if hasattr(p, "main_grad")},
            "moments": float(t.mesh.sum(torch.tensor(float(moments)))) / t.mesh.tp.size(),
            "elements": sum(p.numel() for p in trained),
            "notes": t.notes,
        }


@pytest.fixture(scope="module")
def tuned(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        name: (folder, ranks(world).run(tune, catalogue, folder, ALL_THREE, tensor_parallel)[0])
        for name, world, tensor_parallel in (("one", 1, 1), ("dp2", 2, 1), ("tp2", 2, 2))
        for folder in [tmp_path_factory.mktemp("tuned") / name]
    }


@pytest.mark.parametrize("name", ["one", "dp2", "tp2"])
def test_frozen_parameters_stay_and_cost_nothing_and_all_others_move(tuned: dict[str, Any], name: str) -> None:
    found = tuned[name][1]
    before, after = found["weights"][0], found["weights"][-1]
    assert {part for part in before if torch.equal(before[part], after[part])} == set(filter(is_frozen, before))
    assert found["buffered"] == {part for part in before if not is_frozen(part)} == set(found["averages"][0])
    assert found["moments"] == found["elements"], "AdamW's state is only of the trained parameters"
    assert found["losses"] == pytest.approx(tuned["one"][1]["losses"], rel=1e-4)
    assert f"frozen: {sum(map(is_frozen, before))} of the towers' {len(before)} tensors" in found["notes"]


@pytest.mark.parametrize("name", ["one", "tp2"])
def test_the_average_is_that_of_a_loop(tuned: dict[str, Any], name: str) -> None:
    found = tuned[name][1]
    trained = [part for part in found["weights"][0] if not is_frozen(part)]
    wanted = {part: found["weights"][0][part].double() for part in trained}
    for seen, averaged in zip(found["weights"][1:], found["averages"][1:], strict=True):
        wanted = {part: 0.9 * wanted[part] + 0.1 * seen[part].double() for part in trained}
        for part in trained:
            torch.testing.assert_close(averaged[part].double(), wanted[part], rtol=0, atol=5e-7)
    same(found["applied"], {**found["weights"][-1], **found["averages"][-1]})


def load_trained(catalogue: Path, run: Path, tensor_parallel: int) -> dict[str, torch.Tensor]:
    """The weights that evaluation and export load."""
    with layout(tensor_parallel) as mesh:
        settings = tiny_config(catalogue, run, **ALL_THREE)
        path = run / "checkpoints/step-00000003"
        return merged_state_dict(load_method(settings, path, Tokenizer.load(catalogue), mesh)[0].towers, mesh.tp)


def start_from(catalogue: Path, run: Path, settings: dict[str, Any], tensor_parallel: int) -> tuple[Any, ...]:
    with trainer(tiny_config(catalogue, run, **settings), tensor_parallel) as t:
        return weights(t), averages(t), t.notes


def test_evaluation_and_warm_starts_take_the_average(
    tuned: dict[str, Any], catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Saved at tensor parallel 2, loaded at 1 and 2, and by a run that freezes other parts."""
    run, found = tuned["tp2"]
    same(load_trained(catalogue, run, 1), found["applied"])
    assert "step-00000003: the average of the weights (train.ema_decay 0.9)" in capsys.readouterr().out
    same(ranks(2).run(load_trained, catalogue, run, 2)[0], found["applied"])
    settings = {**ALL_THREE, "optimizer.frozen": ["text"], "train.init_from": run}
    began, average, notes = start_from(catalogue, tmp_path / "run", settings, 1)
    same(began, found["applied"])
    same(average, {name: value for name, value in began.items() if not name.startswith("text.")})
    assert any("(its step 3, the average of its weights)" in note for note in notes)


def held(catalogue: Path, run: Path, settings: dict[str, Any], tensor_parallel: int, end: int) -> dict[str, Any]:
    """Goes on to step `end` and saves: what there then is of the towers, joined over the ranks; of the moments this
    rank's own shards.
    """
    with trainer(tiny_config(catalogue, run, **settings), tensor_parallel, ready=False) as t:
        for data in t.loader.steps(t.step, end):
            t.train_step(data)
        t.save()
        entries = [e for part in t.towers._parts for e in part.optimizer.state.values() if "exp_avg" in e]
        return {
            "weights": weights(t),
            "averages": averages(t) if t.ema is not None else {},
            "moments": {str(i): entry["exp_avg"].clone() for i, entry in enumerate(entries)},
            "updates": {float(entry["step"]) for entry in entries},
        }


def test_resumed_equals_uninterrupted_with_all_of_it(catalogue: Path, tmp_path: Path) -> None:
    settings = {**ALL_THREE, "train.steps": 6, "model.vision.dropout": 0.1}
    straight = ranks(2).run(held, catalogue, tmp_path / "6", settings, 2, 6)
    ranks(2).run(held, catalogue, tmp_path / "3", settings, 2, 3)
    resumed = ranks(2).run(held, catalogue, tmp_path / "3", settings, 2, 6)
    for rank in (0, 1):
        same(resumed[rank], straight[rank])
    assert straight[0]["updates"] == {6.0}
    one = held(catalogue, tmp_path / "3", settings, 1, 6)
    same({**one, "moments": 0}, {**straight[0], "moments": 0})


def by_hand(t: Any, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One step of torch's AdamW, every parameter with the learning rate that its place in a tower of ALL_THREE's depth
    says.
    """
    decay, lr = 0.5, t.config.optimizer.lr
    below = {"vision.position": 3, "vision.stem": 3, "vision.block.layers.0": 2, "vision.block.layers.1": 1}
    below |= {"text.position": 2, "text.words": 2, "text.norm": 2, "text.block.layers.0": 1}
    result = {}
    for name, parameter in t.method.towers.named_parameters():
        factor = next((decay**layers for part, layers in below.items() if name.startswith(f"{part}")), 1.0)
        factor *= {"query_transform.project.bias": 3, "query_transform.project.weight": 10}.get(name, 1)
        copy = torch.nn.Parameter(before[name].clone())
        copy.grad = parameter.main_grad.reshape(copy.shape).clone()
        weight_decay = 0.5 if copy.ndim > 1 else 0.0
        torch.optim.AdamW([copy], lr * factor, (0.9, 0.98), 1.0, weight_decay).step()
        result[name] = copy.detach()
    return result


def one_step(catalogue: Path, run: Path, settings: dict[str, Any]) -> tuple[Any, Any]:
    """Weights after one step, and by_hand's of the same gradients where this rank has all of them."""
    with trainer(tiny_config(catalogue, run, **settings)) as t:
        before = weights(t)
        t.train_step(t.loader.load(0))
        return weights(t), by_hand(t, before) if t.mesh.world_size == 1 else None


def test_a_step_is_adamw_with_every_parameters_own_learning_rate(catalogue: Path, tmp_path: Path) -> None:
    # A large eps makes an update linear in its gradient, so that rounding in a small gradient stays small.
    large = {"optimizer.lr": 0.1, "optimizer.eps": 1.0, "optimizer.weight_decay": 0.5, "optimizer.clip_norm": 0.0}
    factors = ["query_transform.project=10", "query_transform.project.bias=3"]
    settings = {**ALL_THREE, **large, "optimizer.frozen": [], "optimizer.lr_factors": factors}
    one, wanted = one_step(catalogue, tmp_path / "one", settings)
    two, _ = ranks(2).run(one_step, catalogue, tmp_path / "two", settings)[0]
    for name, value in wanted.items():
        torch.testing.assert_close(one[name], value, rtol=0, atol=1e-7, msg=f"{name} of one rank")
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5, msg=f"{name} of two ranks")


@pytest.mark.full
def test_what_may_change_when_a_run_goes_on(catalogue: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {**ALL_THREE, "train.steps": 9}

    def go(end: int, **change: Any) -> tuple[dict[str, Any], list[str]]:
        """Trains to step `end`; the learning rate and weight decay of AdamW's groups after it, and the notes."""
        now = {**settings, **{key.replace("__", "."): value for key, value in change.items()}}
        with trainer(tiny_config(catalogue, run, **now), ready=False) as t:
            for data in t.loader.steps(t.step, end):
                t.train_step(data)
            t.save()
            groups = {(g["lr_mult"], g["weight_decay"]) for g in t.towers.optimizer.param_groups if g["params"]}
            steps = {float(e["step"]) for part in t.towers._parts for e in part.optimizer.state.values()}
            assert steps == {float(end)}
            return {"groups": groups, "averages": averages(t) if t.ema else {}, "weights": weights(t)}, t.notes

    first, _ = go(1)
    assert first["groups"] == {(f, w) for f in (0.125, 0.25, 0.5, 1.0, 10.0) for w in (0.0, 0.05)} - {(0.125, 0.0)}
    other, notes = go(2, optimizer__layer_decay=1.0, optimizer__lr_factors=[], optimizer__weight_decay=0.5)
    assert other["groups"] == {(1.0, 0.0), (1.0, 0.5)}, "the present configuration's"
    assert "changed since: optimizer.weight_decay 0.05 -> 0.5" in notes
    # Without an average there is none to go on with: it starts from the weights.
    assert not checkpoint.has_average(run / "checkpoints/step-00000002") or other["averages"]
    dropped, notes = go(3, train__ema_decay=0.0)
    assert "changed since: train.ema_decay 0.9 -> 0.0" in notes
    assert not checkpoint.has_average(run / "checkpoints/step-00000003")
    begun, notes = go(3)
    assert "step-00000003 holds no average of the weights: it starts from its weights" in notes
    same(begun["averages"], {name: w for name, w in dropped["weights"].items() if not is_frozen(name)})
    with pytest.raises(UserError, match=r"was trained with optimizer\.frozen = .*That makes another run"):
        go(4, optimizer__frozen=[])


def test_a_checkpoint_from_before_there_was_any_of_it(catalogue: Path, tmp_path: Path) -> None:
    plain = {"train.steps": 6}
    before = held(catalogue, tmp_path / "run", plain, 1, 2)
    config = checkpoint_files.read_state(tmp_path / "run/checkpoints/step-00000002")["config"]
    for key in ("frozen", "layer_decay", "lr_factors"):
        del config["optimizer"][key]
    del config["train"]["ema_decay"]
    rewrite_state(tmp_path / "run", 2, {"config": config})
    with trainer(tiny_config(catalogue, tmp_path / "run", **plain, **{"train.ema_decay": 0.5}), ready=False) as t:
        after = {"weights": weights(t), "averages": averages(t)}
    same(after["weights"], before["weights"])
    same(after["averages"], before["weights"])


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.full
def test_a_warm_start_with_new_classes(
    world: int,
    catalogues: Catalogues,  # noqa: F811
    tmp_path: Path,
) -> None:
    before = train(catalogues[0], tmp_path / "before", {}, 2)
    settings = {**ALL_THREE, "model.vision.num_layers": 1, "train.init_from": tmp_path / "before"}
    after = ranks(world).run(train, catalogues[1], tmp_path / "run", settings, 2)[0]
    for name, value in after["towers"].items():
        assert torch.equal(value, before["towers"][name]) == is_frozen(name), name
    assert any("(4 kept, 3 new, 1 dropped)" in note for note in after["notes"])
    again = ranks(world).run(train, catalogues[1], tmp_path / "run", settings, 4)[0]
    assert again["step"] == 4 and again["adam_steps"] == [4.0]


def test_ranks_without_a_share_of_what_is_trained(catalogue: Path, tmp_path: Path) -> None:
    """A part so small that the second rank has no piece of it to update."""
    settings = {**ALL_THREE, "optimizer.frozen": ["vision", "text", "fusion", "document_transform", "*.body"]}
    settings |= {"optimizer.lr_factors": ["query_transform.project.bias=2"], "train.steps": 6}
    settings["optimizer.frozen"] += ["query_transform.project.weight"]
    ranks(2).run(held, catalogue, tmp_path / "run", settings, 1, 2)
    found = ranks(2).run(held, catalogue, tmp_path / "run", settings, 1, 4)
    assert list(found[0]["averages"]) == ["query_transform.project.bias"]
    assert found[0]["updates"] == {4.0} and not found[1]["moments"]
    one = held(catalogue, tmp_path / "run", settings, 1, 4)
    same(one["weights"], found[1]["weights"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optimizer.frozen", ["vison.stem"], r"no parameter 'vison\.stem'.*vision\.stem"),
        ("optimizer.frozen", ["vision.block.layers.1"], r"no parameter 'vision\.block\.layers\.1'.*layers\.0"),
        ("optimizer.frozen", ["*"], "leaves no parameter of the towers to train"),
        ("optimizer.lr_factors", ["querytransform=10"], r"lr_factors: .* Did you mean query_transform"),
        ("optimizer.lr_factors", ["query_transform"], r"has 'query_transform'; it must be name=factor"),
        ("optimizer.lr_factors", ["query_transform=0"], "a factor above 0"),
        ("optimizer.lr_factors", ["query_transform=inf"], "a factor above 0"),
        ("optimizer.betas", [0.9, 1.0], r"optimizer\.betas is 1\.0\. It must be a float in \[0, 1\)"),
        ("optimizer.rows.betas", [1.0, 0.999], r"optimizer\.rows\.betas is 1\.0\. It must be a float in \[0, 1\)"),
        ("optimizer.layer_decay", 1.5, r"layer_decay is 1\.5. It must be a float in \(0, 1\]"),
        ("train.ema_decay", 1.0, r"ema_decay is 1\.0. It must be a float in \[0, 1\)"),
    ],
)
def test_mistakes_are_named(catalogue: Path, tmp_path: Path, key: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message), trainer(tiny_config(catalogue, tmp_path / "run", **{key: value})):
        pass
