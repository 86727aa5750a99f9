"""The tables of docs/estimates.md: every shipped recipe at 1, 8, 64 and 1,024 ranks.

python -m tests.estimates > docs/estimates.md
"""

from __future__ import annotations

import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

from harness.commands.estimate import main as estimate

RECIPES = sorted(Path("jobs/recipes").glob("*.yaml"))
LARGE = [
    "--model.vision.preset=vit_l14",
    "--model.text.preset=bert_base",
    "--data.preprocess.image_size=224",
    "--data.queries_per_step=8192",
    "--data.documents_per_step=8192",
    "--num-classes=10000000",
    "--head.sample_rate=0.1",
    "--train.precision=bf16",
]
LAYOUTS = {1: 1, 8: 1, 64: 4, 1024: 4}  # ranks -> tensor parallel
HEAD = """# Estimates of the shipped recipes

Results of `shelfmark estimate` for every recipe in `jobs/recipes` on GPUs, and for a large OCLEAR: ViT-L/14 and BERT
base, 8,192 queries and 8,192 documents a step, 10,000,000 classes of which a tenth is sampled, bf16. Otherwise {sizes}.
Made by `python -m tests.estimates > docs/estimates.md`. Estimates are dry runs on one CPU core; the figures have not
been measured on GPUs. Measured on CPUs: [recipes.md](recipes.md#needs-of-a-recipe).

| recipe | ranks | tensor parallel | numbers on a rank | peak of a step | TFLOP a step | sent by a rank \
| checkpoint | seconds |
|---|---|---|---|---|---|---|---|---|"""
SIZES = {"num-classes": 100_000, "vocab-size": 30_000}


def row(name: str, world: int, words: list[str]) -> str:
    """One line of the table."""
    began = time.perf_counter()
    with redirect_stdout(sys.stderr):
        found = estimate([*words, f"--world={world}", f"--tensor-parallel={LAYOUTS[world]}"])
    cells = [name, f"{world:,}", str(LAYOUTS[world]), f"{found['parameters_per_rank'] / 1e6:,.1f} M"]
    cells += [f"{found['peak_memory_per_rank'] / 1e6:,.0f} MB", f"{found['flops_per_step_total'] / 1e12:,.3f}"]
    cells += [
        f"{size / 1e6:,.0f} MB" for size in (sum(found["sent_per_step_and_rank"].values()), found["checkpoint_bytes"])
    ]
    return f"| {' | '.join([*cells, f'{time.perf_counter() - began:.0f}'])} |"


def main() -> None:
    """Prints the page."""
    print(HEAD.format(sizes=f"{SIZES['num-classes']:,} classes, {SIZES['vocab-size']:,} word pieces and 100 keywords"))
    for recipe in [*RECIPES, None]:
        words = [f"--{name}={size}" for name, size in SIZES.items()]
        words += [f"--config={recipe}"] if recipe else LARGE
        words += ["--model.num_keywords=100"] if recipe and recipe.stem.startswith("make") else []
        for world in LAYOUTS:
            print(row(recipe.stem if recipe else "OCLEAR, large", world, words), flush=True)


if __name__ == "__main__":
    main()
