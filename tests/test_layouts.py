"""One run at every layout: from one seed checkpoint the same losses; stopped and resumed the same digits; saved
anywhere, loaded anywhere.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.core.errors import UserError
from harness.train import checkpoint_files
from harness.train.config import parse
from models.tp_state import merged_state_dict
from tests.pool import ranks
from tests.runs import arguments, tiny_config, trainer

STEPS = 20
SETTINGS: dict[str, Any] = {
    "train.steps": STEPS,
    "train.checkpoint_every": 0,
    "model.vision.stem_channels": [8, 16, 32],
    "model.vision.stem_blocks": [0, 1, 1],
    "optimizer.warmup_steps": 5,
    "optimizer.weight_decay": 0.05,
    "optimizer.rows.weight_decay": 0.01,
    "data.queries_per_step": 13,  # divides by no number of ranks
    "data.documents_per_step": 6,
}

FULL = pytest.mark.full


def seed_checkpoint(catalogue: Path, run: Path, settings: dict[str, Any]) -> None:
    """Step 0 of a run, written by one process."""
    with trainer(tiny_config(catalogue, run, **settings)) as t:
        t.save()


def losses(
    catalogue: Path, run: Path, settings: dict[str, Any], tensor_parallel: int, end: int = STEPS, save: bool = False
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step from the newest checkpoint of `run` to `end`."""
    with trainer(tiny_config(catalogue, run, **settings), tensor_parallel, ready=False) as t:
        found = []
        for data in t.loader.steps(t.step, end):
            result = t.train_step(data)
            found.append((result.loss.item(), result.norm))
        if save:
            t.save()
        return found


def states(catalogue: Path, run: Path, settings: dict[str, Any], tensor_parallel: int) -> dict[str, Any]:
    """Everything that a loaded checkpoint holds, joined over the ranks: weights, rows, their optimizer state,
    positions.
    """
    with trainer(tiny_config(catalogue, run, **settings), tensor_parallel, ready=False) as t:
        head = t.method.head
        joined = {name: checkpoint_rows(head, value) for name, value in t.rows.row_state().items()}
        adam = [float(e["step"]) for part in t.towers._parts for e in part.optimizer.state.values()]
        moments = {
            f"{name}-{i}": entry[name]
            for part in t.towers._parts
            for i, entry in enumerate(part.optimizer.state.values())
            for name in ("exp_avg", "exp_avg_sq")
        }  # of this rank's own shards: comparable at the same layout only
        return {
            "towers": merged_state_dict(t.method.towers, t.mesh.tp),
            "rows": head.full_weight(),
            **joined,
            "log_decay": t.rows.log_decay,
            "step": t.step,
            "ledger": t.ledger.total,
            "adam_steps": sorted(set(adam)),
            "moments": moments,
        }


def checkpoint_rows(head: Any, value: torch.Tensor) -> torch.Tensor:
    from models.comm import gather_shards

    return gather_shards(value, head.row_group)


@pytest.fixture(scope="module")
def seeded(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    run = tmp_path_factory.mktemp("seed") / "run"
    ranks(1).run(seed_checkpoint, catalogue, run, SETTINGS)
    return catalogue, run


def copy(run: Path, target: Path) -> Path:
    shutil.copytree(run, target)
    return target


@pytest.fixture(scope="module")
def one_rank(seeded: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    catalogue, run = seeded
    return ranks(1).run(losses, catalogue, copy(run, tmp_path_factory.mktemp("one") / "run"), SETTINGS, 1)[0]


@pytest.mark.parametrize(
    ("world", "tensor_parallel"), [(2, 2), (4, 2), (3, 1), *(pytest.param(*x, marks=FULL) for x in ((2, 1), (4, 4)))]
)
def test_every_layout_gives_the_same_losses(
    world: int, tensor_parallel: int, seeded: tuple[Path, Path], one_rank: list[tuple[float, float]], tmp_path: Path
) -> None:
    catalogue, run = seeded
    found = ranks(world).run(losses, catalogue, copy(run, tmp_path / "run"), SETTINGS, tensor_parallel)
    assert all(r == found[0] for r in found), "ranks disagree about the loss or the norm"
    assert len(one_rank) == STEPS and one_rank[-1][0] < one_rank[0][0]
    for step, ((loss, norm), (wanted, wanted_norm)) in enumerate(zip(found[0], one_rank, strict=True)):
        assert abs(loss / wanted - 1) < 1e-4, f"step {step}: loss {loss} against {wanted}"
        assert abs(norm / wanted_norm - 1) < 1e-3, f"step {step}: norm {norm} against {wanted_norm}"


@pytest.mark.parametrize(("world", "micro"), [(1, 3), (2, 2)])
def test_micro_batches_equal_one_large_batch(
    world: int, micro: int, seeded: tuple[Path, Path], one_rank: list[tuple[float, float]], tmp_path: Path
) -> None:
    catalogue, run = seeded
    settings = {**SETTINGS, "data.micro_batches": micro}
    found = ranks(world).run(losses, catalogue, copy(run, tmp_path / "run"), settings, 1, 5)[0]
    for (loss, norm), (wanted, wanted_norm) in zip(found, one_rank, strict=False):
        assert abs(loss / wanted - 1) < 1e-5 and abs(norm / wanted_norm - 1) < 1e-5


@pytest.mark.parametrize(
    ("world", "tensor_parallel"), [(2, 2), *(pytest.param(*x, marks=FULL) for x in ((1, 1), (2, 1)))]
)
def test_resumed_equals_uninterrupted_to_the_digit(
    world: int, tensor_parallel: int, seeded: tuple[Path, Path], tmp_path: Path
) -> None:
    catalogue, _run = seeded
    settings = {**SETTINGS, "model.vision.dropout": 0.1, "model.text.attention_dropout": 0.1, "head.sample_rate": 0.5}
    pool = ranks(world)
    pool.run(seed_and_train, catalogue, tmp_path / "a", settings, tensor_parallel, 10)
    pool.run(seed_and_train, catalogue, tmp_path / "b", settings, tensor_parallel, 4)
    assert json.loads((tmp_path / "b/checkpoints/step-00000004/state.json").read_text())["step"] == 4
    pool.run(losses, catalogue, tmp_path / "b", settings, tensor_parallel, 10, True)
    a = pool.run(states, catalogue, tmp_path / "a", settings, tensor_parallel)
    b = pool.run(states, catalogue, tmp_path / "b", settings, tensor_parallel)
    for rank_a, rank_b in zip(a, b, strict=True):
        same(rank_a, rank_b)
        assert rank_a["adam_steps"] == [10.0], "AdamW's step count is not the number of updates"


def seed_and_train(catalogue: Path, run: Path, settings: dict[str, Any], tensor_parallel: int, end: int) -> None:
    losses(catalogue, run, settings, tensor_parallel, end, True)


def same(a: Any, b: Any, name: str = "") -> None:
    """a and b are bit-equal."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), f"{name} differs by {(a.double() - b.double()).abs().max():.3e}"
    else:
        assert a == b, f"{name}: {a} != {b}"


@FULL
def test_saved_at_one_layout_loaded_at_another(seeded: tuple[Path, Path], tmp_path: Path) -> None:
    """World 4 with tensor parallel 2 -> every other layout: all state equal, and the next losses to 1e-5."""
    catalogue, _ = seeded
    ranks(4).run(seed_and_train, catalogue, tmp_path / "run", SETTINGS, 2, 5)
    wanted = ranks(4).run(states, catalogue, tmp_path / "run", SETTINGS, 2)[0]
    onward = ranks(4).run(losses, catalogue, copy(tmp_path / "run", tmp_path / "on"), SETTINGS, 2, 8)[0]
    for world, tensor_parallel in ((1, 1), (2, 2), (3, 1), (4, 4)):
        found = ranks(world).run(states, catalogue, tmp_path / "run", SETTINGS, tensor_parallel)[0]
        for key in set(wanted) - {"moments"}:
            same(found[key], wanted[key], f"{world}x{tensor_parallel}.{key}")
        target = copy(tmp_path / "run", tmp_path / f"on-{world}-{tensor_parallel}")
        next_losses = ranks(world).run(losses, catalogue, target, SETTINGS, tensor_parallel, 8)[0]
        for (loss, _), (expected, _) in zip(next_losses, onward, strict=True):
            assert abs(loss / expected - 1) < 1e-5


LAYOUTS = [(1, 1), (2, 1), (2, 2), (3, 1), (4, 1), (4, 2), (4, 4)]  # ranks, tensor parallel; 3 divides no tower


@FULL
@pytest.mark.parametrize(("world", "tensor_parallel"), LAYOUTS)
def test_a_run_goes_on_at_any_layout(world: int, tensor_parallel: int, catalogue: Path, tmp_path: Path) -> None:
    """50 more steps with sampled classes: the same samples, and losses to 1e-4."""
    settings = {**SETTINGS, "head.sample_rate": 0.3, "train.steps": 55}
    ranks(world).run(seed_and_train, catalogue, tmp_path / "run", settings, tensor_parallel, 5)
    wanted, ledgers = [], set()
    for others, other_tensor_parallel in sorted(LAYOUTS, key=lambda layout: layout != (world, tensor_parallel)):
        run = copy(tmp_path / "run", tmp_path / f"on-{others}-{other_tensor_parallel}")
        found = ranks(others).run(losses, catalogue, run, settings, other_tensor_parallel, 55, True)[0]
        wanted = wanted or found  # the same layout comes first
        assert len(found) == 50
        for step, ((loss, _), (expected, _)) in enumerate(zip(found, wanted, strict=True)):
            assert abs(loss / expected - 1) < 1e-4, f"to {others} x {other_tensor_parallel}, step {step}"
        ledgers.add(json.loads((run / "checkpoints/step-00000055/state.json").read_text())["ledger"])
    assert len(ledgers) == 1


def test_the_newest_complete_checkpoint_is_taken(seeded: tuple[Path, Path], tmp_path: Path) -> None:
    catalogue, _ = seeded
    run = tmp_path / "run"
    settings = {**SETTINGS, "train.keep_checkpoints": 3}
    for end in (1, 2, 3):
        ranks(1).run(losses, catalogue, run, settings, 1, end, True)
    folder = run / "checkpoints"
    assert (folder / "latest").read_text() == "step-00000003"
    (folder / "step-00000004.tmp").mkdir()  # a save that was killed
    damaged = next((folder / "step-00000003/towers").glob("*.distcp"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    path, passed_over = checkpoint_files.newest(folder)
    assert path == folder / "step-00000002"
    assert "step-00000004.tmp: never finished" in passed_over
    assert any("step-00000003" in line and "checksum" in line for line in passed_over)
    assert ranks(1).run(states, catalogue, run, settings, 1)[0]["step"] == 2
    (folder / "step-00000002/manifest.json").unlink()
    assert checkpoint_files.newest(folder)[0] == folder / "step-00000001"
    with pytest.raises(UserError, match="is not a checkpoint"):
        checkpoint_files.read_state(folder)


@pytest.mark.full
def test_a_row_group_larger_than_the_number_of_classes(seeded: tuple[Path, Path], tmp_path: Path) -> None:
    """6 classes on 4 ranks: 2, 2, 2, 0 rows; saved and loaded at 3 and 1."""
    catalogue, _ = seeded
    ranks(4).run(seed_and_train, catalogue, tmp_path / "run", SETTINGS, 1, 2)
    wanted = ranks(4).run(states, catalogue, tmp_path / "run", SETTINGS, 1)[3]
    for world in (3, 1):
        found = ranks(world).run(states, catalogue, tmp_path / "run", SETTINGS, 1)[0]
        for key in ("rows", "exp_avg", "exp_avg_sq", "row_step"):
            same(found[key], wanted[key], key)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (
            {"model.vision.num_attention_heads": 2},
            "model.vision.num_attention_heads 2 does not divide over mesh.tensor",
        ),
        ({"model.text.num_attention_heads": 2}, "model.text.num_attention_heads 2 does not divide over mesh.tensor"),
        (
            {"model.vision.hidden_size": 34},
            "model.vision.hidden_size 34 is not a multiple of model.vision.num_attention",
        ),
        ({"model.text.hidden_size": 30}, "model.text.hidden_size 30 is not a multiple of model.text.num_attention"),
        ({"model.fusion_heads": 5}, "model.vision.hidden_size 32 is not a multiple of model.fusion_heads 5"),
        ({"model.vision.ffn_hidden_size": 66}, "model.vision.ffn_hidden_size 66 does not divide over mesh.tensor"),
        (
            {"model.text.activation": "swiglu", "model.text.ffn_hidden_size": 66},
            "model.text.ffn_hidden_size 66 does not divide over mesh.tensor",
        ),
        (
            {"model.vision.num_attention_heads": 16, "model.vision.positions": "rotary"},
            "model.vision.positions rotary needs heads whose width is a multiple of 4, not 2",
        ),
        ({"mesh.tensor_parallel": 1, "mesh.sequence_parallel": True}, "mesh.sequence_parallel spreads tokens"),
        (
            # heads and widths divide by 3, the word table does not
            {
                **{f"model.{tower}.hidden_size": 48 for tower in ("vision", "text")},
                **{f"model.{tower}.num_attention_heads": 6 for tower in ("vision", "text")},
                "mesh.tensor_parallel": 3,
            },
            "mesh.tensor_parallel is 3; word tables, padded to a multiple of 128, do not divide",
        ),
    ],
)
def test_what_does_not_divide_is_one_line_before_any_process_group(
    settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        parse(arguments(tmp_path, tmp_path / "run", **{"mesh.tensor_parallel": 4} | settings), 12)
    assert str(caught.value).startswith(named) and "\n" not in str(caught.value)
    assert not torch.distributed.is_initialized() and not (tmp_path / "run").exists()


def first_moments(catalogue: Path, run: Path, settings: dict[str, Any]) -> tuple[float, float]:
    """After one step from scratch: (norm of AdamW's first moments, gradient norm before clipping)."""
    with trainer(tiny_config(catalogue, run, **settings)) as t:
        norm = t.train_step(t.loader.load(0)).norm
        moments = [e["exp_avg"] for part in t.towers._parts for e in part.optimizer.state.values()]
        total = sum(
            (m.double().square().sum() for m in [*moments, t.rows.row_state()["exp_avg"]]),
            torch.zeros((), dtype=torch.float64),
        )
        return float(t.mesh.sum(total).sqrt()), norm


@pytest.mark.parametrize("world", [1, 2])
def test_one_norm_clips_towers_and_rows_alike(world: int, catalogue: Path, tmp_path: Path) -> None:
    """From scratch, a first moment is (1 - beta1) x the clipped gradient, so all of them together have that norm."""
    for name, clip in (("clipped", 0.01), ("whole", 0.0)):
        settings = {**SETTINGS, "optimizer.clip_norm": clip, "optimizer.rows.betas": [0.9, 0.999]}
        moments, norm = ranks(world).run(first_moments, catalogue, tmp_path / name, settings)[0]
        assert norm > 0.1
        assert moments == pytest.approx(0.1 * (clip or norm), rel=1e-4)
