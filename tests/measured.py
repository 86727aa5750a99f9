"""Memory of training steps and size of checkpoints, measured in fresh processes beside the result of `shelfmark
estimate`.

python -m tests.measured vit_s16

prints a row of the table in docs/recipes.md; without a name all of them, a minute or two each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from harness.bench.ranks import Memory, on_ranks
from harness.commands.estimate import main as estimate
from harness.data.step_data import StepData
from harness.train.config import parse
from harness.train.dry_run import masked
from models.batch import Batch
from models.registry import METHODS

TINY = {
    "data.preprocess.image_size": 64,
    "model.vision.image_size": 64,
    "model.vision.patch_size": 16,
    "model.text.vocab_size": 512,
    "data.read_ahead": 1,
}
# Recipes where weights, class rows and activations dominate; `world` and `num_classes` are not keys of a recipe.
SMALL: dict[str, dict[str, Any]] = {
    "weights": TINY
    | {
        "model.vision.hidden_size": 512,
        "model.vision.num_layers": 3,
        "model.text.hidden_size": 384,
        "model.text.vocab_size": 4096,
        "train.ema_decay": 0.999,
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
    "make": TINY
    | {
        "method": "make",
        "evaluation.query_attributes": ["colour"],
        "model.vision.patch_size": 8,
        "model.text.vocab_size": 8192,
        "model.text.max_length": 24,
        "model.num_keywords": 100,
        "model.memory_bank": 20_000,
        "data.masking.word_rate": 0.25,
        "data.documents_per_step": 32,
        "num_classes": 1000,
    },
    "item": TINY
    | {
        "method": "item",
        "model.vision.patch_size": 8,
        "model.vision.stem_channels": [16, 32, 64],
        "model.vision.stem_blocks": [0, 1, 1],
        "model.text.vocab_size": 8192,
        "model.text.max_length": 24,
        "model.weights.contrast": 1.0,
        "data.masking.word_rate": 0.25,
        "data.documents_per_step": 32,
        "num_classes": 1000,
    },
}
SMALL |= {
    "make, hidden words": SMALL["make"] | {"model.hide_words": True, "data.masking.one_heavy": True},
    "item, all targets": SMALL["item"] | {"model.global_targets": "all", "model.aligned": True},
}
_WHOLE = {
    "model.vision.preset": "vit_s16",
    "data.preprocess.image_size": 224,
    "model.text.preset": "bert_small",
    "model.text.max_length": 64,
    "data.read_ahead": 1,
    "data.queries_per_step": 8,
    "data.documents_per_step": 8,
    "num_classes": 100_000,
}
_BASE = {"model.vision.preset": "vit_b16", "mesh.tensor_parallel": 2, "mesh.sequence_parallel": True, "world": 2}
_LOWER_HALF = (
    "vision.stem vision.position vision.class_* vision.block.layers.[0-5] "
    "text.words text.position text.norm text.token_type"
)
# As a user would train them.
REALISTIC: dict[str, dict[str, Any]] = {
    "vit_s16": _WHOLE,
    "vit_s16, lower half frozen": _WHOLE | {"optimizer.frozen": _LOWER_HALF.split()},
    "vit_s16, dropout and attention dropout 0.1, recompute selective": _WHOLE
    | {f"model.{tower}.{kind}": 0.1 for tower in ("vision", "text") for kind in ("dropout", "attention_dropout")}
    | {"mesh.recompute": "selective"},
    "vit_s16, recompute full": _WHOLE | {"mesh.recompute": "full"},
    "vit_b16, tensor and sequence parallel 2": _WHOLE | _BASE,
}
RECIPES = SMALL | REALISTIC


def flags(recipe: dict[str, Any]) -> list[str]:
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in recipe.items()]


def config_of(recipe: dict[str, Any], world: int) -> Any:
    return parse(flags({k: v for k, v in recipe.items() if k not in ("num_classes", "world")}), world)[0]


def trainer(recipe: dict[str, Any], num_classes: int, mesh: Any) -> Any:
    """The loop's own Trainer with its own parts, but fed without a catalogue."""
    from harness.core.build import build
    from harness.train.boundary import Boundary
    from harness.train.ema import Ema
    from harness.train.ledger import Ledger
    from harness.train.optimizer import TowerOptimizer
    from harness.train.stages import stages_of
    from harness.train.throughput import StepClock
    from harness.train.trainer import Trainer
    from models.heads.row_optimizer import RowAdamW

    made: Any = Trainer.__new__(Trainer)
    made.config = config = config_of(recipe, mesh.world_size)
    made.mesh, made.clock, made.step, made.stages = mesh, StepClock(mesh), 0, stages_of(config)
    made.ledger, made.boundary = Ledger(mesh), Boundary(mesh, 0)
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
    fill_banks(made.method)
    head = made.method.head
    made.rows = None if head is None else RowAdamW.for_head(head, config.optimizer.rows)
    decay = config.train.ema_decay
    made.ema = Ema(made.method.towers, decay) if decay else None
    return made


def step_of(config: Any, num_classes: int, ranks: int) -> StepData:
    """A drawn step with all that any method reads: this rank's part of it in one micro-batch, as much of it masked as
    is to be expected.
    """
    model, reads = config.model, METHODS[config.method].reads(config.model)
    photos, n = (
        count // ranks for count in reads.samples(config.data.queries_per_step, config.data.documents_per_step)
    )
    side, length, keywords = model.vision.image_size, reads.text_length, getattr(model, "product_keywords", 0)
    words, patches = masked(config.data.masking, length, reads.num_patches)
    hidden = torch.rand(n, length).argsort(1) < round(words)
    tokens = torch.randint(5, model.text.vocab_size, (n, length))
    document = torch.randint(num_classes, (n,))
    query = document if reads.query_length else torch.randint(num_classes, (photos,))
    batch = Batch(
        torch.randn(photos, 3, side, side),
        query,
        torch.ones(len(query)),
        torch.arange(len(query)),
        torch.randn(n, 3, side, side),
        tokens,
        document,
        torch.ones(n),
        torch.arange(n),
        query_tokens=torch.randint(5, model.text.vocab_size, (n, reads.query_length)),
        categories=torch.randint(9, (n,)),
        keywords=torch.randint(getattr(model, "num_keywords", 1), (n, keywords)),
        query_keywords=torch.randint(getattr(model, "num_keywords", 1), (n, keywords)),
        masked_tokens=tokens.masked_fill(hidden, 4),
        masked_words=hidden,
        masked_patches=torch.rand(n, reads.num_patches).argsort(1) < round(patches),
        masked_titles=torch.zeros(n, dtype=torch.bool),
        other_tokens=tokens.flip(0),
    )
    return StepData([batch], 0, [], 1, 0.0)


def fill_banks(method: Any) -> None:
    """Takes what the memory banks hold for embeddings of earlier steps, as after many of them."""
    for bank in method.memory.values() if method.memory is not None else ():
        bank.pushed.fill_(len(bank.labels))


def numbers(method: Any) -> int:
    """Parameters and class rows of this rank."""
    rows = 0 if method.head is None else method.head.rows.numel()
    return sum(p.numel() for p in method.towers.parameters()) + rows


def _measure(device: torch.device, name: str, folder: str) -> dict[str, Any]:
    """On every rank; of the first: numbers it holds, peak of two steps beyond what it held before, and with a save,
    bytes of a checkpoint.
    """
    from harness.core.mesh import Mesh
    from harness.train import checkpoint
    from harness.train.checkpoint_files import Keep

    recipe, world = RECIPES[name], dist.get_world_size()
    os.environ["WORLD_SIZE"] = str(world)

    def steps(made: Any, num_classes: int) -> None:
        for _ in range(2):
            made.train_step(step_of(made.config, num_classes, mesh.dp.size()))

    mesh = Mesh(config_of(recipe, world).mesh)
    torch.manual_seed(mesh.dp.rank())
    small = TINY | {"data.queries_per_step": 2 * world, "data.documents_per_step": 2 * world}
    alike = ("method", "mesh.", "head.", "optimizer.rows.", "train.", "evaluation.", "model.num_keywords")
    small |= {key: value for key, value in recipe.items() if key.startswith(alike)}
    steps(trainer(small, 50, mesh), 50)  # brings the libraries their code and buffers
    memory = Memory(device)
    before = memory.start()
    made = trainer(recipe, recipe["num_classes"], mesh)
    steps(made, recipe["num_classes"])
    peak = memory.peak() - before
    classes = Path(folder) / "classes.parquet"
    classes.touch()
    method = made.method
    parts = checkpoint.Trainable(method.towers, method.head, made.towers, made.rows, made.ema, method.memory)
    saved = checkpoint.save(Path(folder), 1, parts, {}, classes, mesh, Keep(1))
    size = sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())
    return {"parameters": numbers(method), "peak": peak, "saving": memory.peak() - before, "checkpoint": size}


def measured(name: str, folder: Path) -> dict[str, Any]:
    """Figures of the first rank of RECIPES[name]: parameters, peak, saving, checkpoint (see _measure); in processes of
    their own.
    """
    # Freed blocks go back to the system at once, so that the peak is that of what is held and not of the allocator's
    # habits.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    command = [sys.executable, "-W", "ignore", "-m", "tests.measured", name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def estimated(name: str) -> dict[str, Any]:
    """Result of `shelfmark estimate` for RECIPES[name]; `peak` without the images read ahead, since nothing reads in a
    measurement.
    """
    words = flags({key.replace("num_classes", "num-classes"): value for key, value in RECIPES[name].items()})
    with redirect_stdout(sys.stderr):
        figures = estimate([*words, "--mesh.device=cpu"])
    return figures | {"peak": figures["peak_memory_per_rank"] - figures["memory_per_rank"]["read_ahead"]}


def main(argv: list[str]) -> None:
    """Prints a row for each name, or is the process that starts the ranks (NAME FOLDER)."""
    if len(argv) == 2 and Path(argv[1]).is_dir():
        print(json.dumps(on_ranks(RECIPES[argv[0]].get("world", 1), _measure, *argv)))
        return
    for name in argv or REALISTIC:
        with tempfile.TemporaryDirectory() as folder:
            found, said = measured(name, Path(folder)), estimated(name)
        cells = [f"{found['parameters'] / 1e6:,.1f} M"]
        for one, other in ((found["peak"], said["peak"]), (found["checkpoint"], said["checkpoint_bytes"])):
            cells += [f"{one / 1e6:,.0f} MB", f"{other / 1e6:,.0f} MB", f"{100 * (other / one - 1):+.1f} %"]
        print(" | ".join(["", name, *cells, ""]).strip(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
