"""`shelfmark estimate` and the formulas of the meters, against what a fresh process measures and what torch counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from harness.bench.ranks import Memory, Traffic
from harness.config import parse
from harness.data.loader import StepData
from harness.errors import UserError
from harness.estimate import estimate
from harness.flops import Work, active_rows, flops_per_step, step_parts, vision
from models.batch import Batch
from models.oclear import OclearTowers
from models.plain.transformer import PlainBuilder
from models.vision import VisionConfig, VisionTower
from tests.pool import layout, ranks

TINY = {
    "data.preprocess.image_size": 64,
    "model.vision.image_size": 64,
    "model.vision.patch_size": 16,
    "model.text.vocab_size": 512,
    "data.read_ahead": 1,
}
# Recipes where weights, class rows and activations dominate.
RECIPES: dict[str, dict[str, Any]] = {
    "weights": TINY
    | {
        "model.vision.hidden_size": 512,
        "model.vision.num_layers": 3,
        "model.text.hidden_size": 384,
        "model.text.vocab_size": 4096,
        "data.queries_per_step": 4,
        "data.documents_per_step": 4,
        "num_classes": 1000,
    },
    "rows": TINY
    | {
        "head.sample_rate": 0.2,
        "head.row_dtype": "bf16",
        "optimizer.rows.state": "8bit",
        "optimizer.rows.bf16_rows": "stochastic",
        "data.queries_per_step": 4,
        "data.documents_per_step": 4,
        "num_classes": 120_000,
    },
    "activations": TINY
    | {
        "model.vision.patch_size": 4,
        "model.vision.stem_channels": [16, 32],
        "model.vision.stem_blocks": [0, 1],
        "model.vision.dropout": 0.1,
        "data.queries_per_step": 16,
        "data.documents_per_step": 16,
        "num_classes": 1000,
    },
}


def flags(recipe: dict[str, Any]) -> list[str]:
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in recipe.items()]


def without_classes(recipe: dict[str, Any]) -> list[str]:
    return flags({key: value for key, value in recipe.items() if key != "num_classes"})


def trainer(recipe: dict[str, Any], num_classes: int, mesh: Any) -> Any:
    """The loop's own Trainer with its own parts, but fed without a catalogue."""
    from harness.loop import Trainer
    from harness.meters import StepClock
    from harness.methods import build
    from harness.optimizer import TowerOptimizer
    from models.heads.row_optimizer import RowAdamW

    made: Any = Trainer.__new__(Trainer)
    made.config = config = _config(recipe, mesh.world_size)
    made.mesh, made.clock, made.step = mesh, StepClock(mesh), 0
    made.ema, made._own_ledger, made._last_ledgers = None, 0, deque(maxlen=1)
    made.method, made.model_config = build(
        config.method,
        config.model,
        config.head,
        mesh,
        num_classes=num_classes,
        vocab_size=0,
        seed=0,
        precision=config.train.precision,
    )
    made.towers = TowerOptimizer(made.method.towers, config.optimizer, mesh)
    made.rows = RowAdamW.for_head(made.method.head, config.optimizer.rows)
    return made


def _config(recipe: dict[str, Any], world: int) -> Any:
    return parse(without_classes(recipe), world)[0]


def step_of(config: Any, num_classes: int, ranks: int) -> StepData:
    """A drawn step: this rank's part of it in one micro-batch."""
    side = config.model.vision.image_size
    q, n = config.data.queries_per_step // ranks, config.data.documents_per_step // ranks
    tokens = torch.randint(5, config.model.text.vocab_size, (n, config.model.text.max_length))
    query, document = torch.randint(num_classes, (q,)), torch.randint(num_classes, (n,))
    images = torch.randn(q, 3, side, side), torch.randn(n, 3, side, side)
    batch = Batch(
        images[0], query, torch.ones(q), torch.arange(q), images[1], tokens, document, torch.ones(n), torch.arange(n)
    )
    return StepData([batch], 0, [], 1, 0.0)


def traffic_of_a_step(recipe: dict[str, Any], tensor_parallel: int, num_classes: int) -> tuple[int, float]:
    """In a pool: numbers of parameters and rows that this rank holds, and the bytes that it sends in a step."""
    with layout(tensor_parallel) as mesh:
        torch.manual_seed(mesh.dp.rank())
        made = trainer(recipe, num_classes, mesh)
        data, traffic = step_of(made.config, num_classes, mesh.dp.size()), Traffic()
        with traffic.counted():
            made.train_step(data)
        head = made.method.head
        return sum(p.numel() for p in made.method.towers.parameters()) + head.rows.numel(), traffic.bytes


def measure(recipe: dict[str, Any], folder: str) -> dict[str, Any]:
    """In a fresh process: parameters, peak of three steps beyond what the process held before, bytes of a checkpoint."""
    import torch._dynamo  # noqa: F401  # torch's first optimizer would import it: memory of the process, not of the model

    from harness import checkpoint
    from harness.mesh import Mesh, MeshConfig

    def steps(made: Any, num_classes: int) -> None:
        for _ in range(3):
            made.train_step(step_of(made.config, num_classes, 1))

    mesh = Mesh(MeshConfig())
    small = TINY | {"data.queries_per_step": 2, "data.documents_per_step": 2}
    steps(trainer(small, 50, mesh), 50)  # brings the libraries their code and buffers
    memory = Memory(mesh.device)
    before = memory.start()
    made = trainer(recipe, recipe["num_classes"], mesh)
    head = made.method.head
    count = sum(p.numel() for p in made.method.towers.parameters()) + head.rows.numel()
    steps(made, recipe["num_classes"])
    peak = memory.peak() - before
    classes = Path(folder) / "classes.parquet"
    classes.touch()
    saved = checkpoint.save(
        Path(folder), 1, checkpoint.Trainable(made.method.towers, head, made.towers, made.rows), {}, classes, mesh, 1
    )
    size = sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())
    return {"parameters": count, "peak": peak, "saving": memory.peak() - before, "checkpoint": size}


# One of three in every run: each is a process that trains and saves.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "weights" else pytest.mark.full) for name in RECIPES]
)
def test_an_estimate_is_what_a_process_measures(name, tmp_path):
    """Parameters exactly; memory and checkpoint within a tenth."""
    recipe = RECIPES[name]
    command = f"import json; from tests.test_estimate import *; print(json.dumps(measure(RECIPES[{name!r}], {str(tmp_path)!r})))"
    # Freed blocks go back to the system at once, so that the peak is that of what is held and not of the allocator's habits.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", command], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    figures = estimate(flags({key.replace("num_classes", "num-classes"): value for key, value in recipe.items()}))
    peak = figures["peak_memory_per_rank"] - figures["memory_per_rank"]["read_ahead"]  # nothing reads here
    assert figures["parameters"] == found["parameters"]
    assert peak == pytest.approx(found["peak"], rel=0.1)
    if name == "weights":  # where saving needs more than a step
        held = peak - sum(figures["memory_per_rank"][term] for term in ("activations", "working"))
        assert held + figures["saving_memory"] == pytest.approx(found["saving"], rel=0.1)
    assert figures["checkpoint_bytes"] == pytest.approx(found["checkpoint"], rel=0.1)


def counted(make: Callable[[], nn.Module], *inputs: Tensor, call: Callable[..., Any] | None = None) -> Work:
    """What torch counts of a plain twin on the meta device, where attention falls apart into the products that it is made of."""
    with torch.device("meta"):
        module = make()
    with FlopCounterMode(display=False) as counter:
        found = (call or module)(*([module] if call else []), *inputs)
        forward = counter.get_total_flops()
        sum(output.sum() for output in (found if isinstance(found, tuple) else (found,))).backward()
    return Work(forward, counter.get_total_flops() - forward)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pooling": "class", "num_layers": 2, "activation": "swiglu", "ffn_hidden_size": 96},
        {"stem_channels": (16, 32, 32, 64), "stem_blocks": (0, 1, 2, 1), "projection_dim": 40},
        {"positions": "rotary", "register_tokens": 4, "class_token": True, "qk_norm": True},
        {"pooling": "attention"},
    ],
)
def test_flops_of_image_towers_are_what_torch_counts(fields):
    config = VisionConfig(image_size=64, **fields)
    found = counted(lambda: VisionTower(config, PlainBuilder()), torch.empty(3, 3, 64, 64, device="meta"))
    # attention pooling multiplies its one query once for the whole batch
    close = 1e-3 if config.pooling == "attention" else 1e-12
    assert found.forward == pytest.approx((vision(config) * 3).forward, rel=close)
    assert found.backward == pytest.approx((vision(config) * 3).backward, rel=close)


def test_flops_of_a_step_are_what_torch_counts():
    """The whole of OCLEAR: text tower with a cut length, fusion, transformation networks, and the cosines of a head without sampling."""
    recipe = TINY | {
        "model.vision.hidden_size": 64,
        "model.text.max_length": 40,
        "data.queries_per_step": 3,
        "data.documents_per_step": 2,
    }
    config = parse(flags(recipe))[0]
    model = config.model
    images, tokens = torch.empty(5, 3, 64, 64, device="meta"), torch.empty(2, 40, dtype=torch.int64, device="meta")
    rows = torch.empty(77, model.embedding_dim, device="meta", requires_grad=True)

    def call(towers: nn.Module) -> Tensor:
        return torch.cat(towers(images[:3], images[3:], tokens)[:2]) @ rows.T

    found = counted(lambda: OclearTowers(model, PlainBuilder()), call=call)
    parts = step_parts(config, num_classes=77)
    assert found.forward == pytest.approx(sum(part.forward for part in parts.values()), rel=0.01)
    assert found.backward == pytest.approx(sum(part.backward for part in parts.values()), rel=0.01)
    assert flops_per_step(config, 77) == sum(part.total for part in parts.values())


def test_sampling_counts_each_active_class_once():
    assert active_rows(1000, 1.0, 50) == 1000
    assert active_rows(1000, 0.1, 50) == pytest.approx(100 + 0.9 * 50)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_a_rank_holds_and_sends_what_the_estimate_says(tensor_parallel):
    """Two real ranks: parameters of each exactly, and the bytes of one step as torch.distributed is asked for them."""
    recipe = TINY | {"model.vision.class_token": True, "data.queries_per_step": 4, "data.documents_per_step": 4}
    found = ranks(2).run(traffic_of_a_step, recipe | {"mesh.tensor_parallel": tensor_parallel}, tensor_parallel, 40)
    words = [*flags(recipe), "--num-classes", "40", "--world=2", f"--tensor-parallel={tensor_parallel}"]
    figures = estimate(words)
    for parameters, sent in found:
        assert parameters == figures["parameters_per_rank"]
        # megatron-core took its data-parallel collectives from torch.distributed at its import: those are not seen
        seen = [figures["sent_per_step_and_rank"][term] for term in ("tensor_parallel", "head")]
        assert sent == pytest.approx(sum(seen), rel=0.05)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--world", "none"], "--world is 'none'"),
        (["--world", "3", "--tensor-parallel", "2"], "mesh.tensor_parallel is 2, but 3"),
        (["--num-classes", "9"], "--vocab-size"),
        (["--vocab-size", "9"], "--num-classes"),
        (["--wrold", "3"], "unknown key"),
    ],
)
def test_a_mistake_names_its_remedy(words, named):
    with pytest.raises(UserError, match=named):
        estimate(words)
