"""Shared by the tests of MAKE and ITEm: drawn batches, and the comparison of tensor-parallel towers with their plain
twin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.data.masking import MaskConfig, draw_masks
from harness.text.special_tokens import SpecialTokens
from models.batch import Batch
from models.tp_state import merge_shards
from tests.catalogues import draw_rows, write_manifest
from tests.pool import layout

VOCAB, LENGTH, IMAGE, PATCH = 40, 8, 16, 4
PATCHES = (IMAGE // PATCH) ** 2
SPECIAL = SpecialTokens(vocab_size=VOCAB, pad=0, unk=1, bos=2, eos=3, mask=4)


def products(n: int, seed: int, masks: MaskConfig | None = None) -> Batch:
    """n pairs of a text query and a product, every optional field filled in; one of them damaged."""
    g = torch.Generator().manual_seed(seed)

    def ints(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=g)

    tokens = ints(5, VOCAB, n, LENGTH)
    for row, length in enumerate(ints(2, LENGTH + 1, n).tolist()):
        tokens[row, 0] = 2
        tokens[row, length:] = 0
    keywords = torch.stack([torch.randperm(9, generator=g)[:3] for _ in range(n)])
    keywords[torch.arange(3) >= ints(0, 4, n, 1)] = -1
    named = torch.where(ints(0, 2, n, 1) > 0, keywords, keywords.flip(0))
    named[torch.arange(3) >= ints(0, 4, n, 1)] = -1
    weights = torch.rand(n, generator=g) + 0.5
    weights[1] = 0
    labels = ints(-1, 4, n)
    ids = torch.arange(n)
    others = tokens.clone()
    others[::2] = tokens.flip(0)[::2]
    drawn = draw_masks(masks or MaskConfig(word_rate=0.4), tokens.numpy(), PATCHES, SPECIAL, seed, 0, ids.numpy())
    masked = [torch.from_numpy(np.ascontiguousarray(x)) for x in drawn]
    masked[2][2] &= masked[2][2].cumsum(0) <= 2  # fewer than MAKE compares
    return Batch(
        torch.randn(n, 3, IMAGE, IMAGE, generator=g, dtype=torch.float64),
        labels,
        torch.ones(n),
        ids,
        torch.randn(n, 3, IMAGE, IMAGE, generator=g, dtype=torch.float64),
        tokens,
        labels,
        weights,
        ids,
        query_tokens=ints(1, VOCAB, n, 5),
        categories=ints(-1, 5, n),
        keywords=keywords,
        query_keywords=named,
        masked_tokens=masked[0],
        masked_words=masked[1],
        masked_patches=masked[2],
        masked_titles=masked[3],
        other_tokens=others,
    ).with_lengths(SPECIAL.pad)


def documents_alone(folder: Path) -> Path:
    """A governed and tokenized catalogue of 12 documents and no query photos, titled like 'Acme's red disc 24 style0'.

    The last one is of split val and has a shape of its own, the first is of all splits and has no shape.
    """
    from harness.commands import govern, ingest, tokenizer

    rows = draw_rows(folder, classes=12, queries=0, size=24, seed=0)
    for number, row in enumerate(rows):
        row |= {"title": f"Acme's {row['colour']} {row['shape']} 24 style{number // 2}", "split": "train"}
    rows[0] |= {"shape": "", "split": "all"}
    rows[-1] |= {"shape": "star", "split": "val"}
    manifest, catalogue = write_manifest(folder / "manifest.tsv", rows), folder / "catalogue"
    ingest.run(
        ingest.IngestConfig(
            manifest=manifest, images=folder, out=catalogue, attribute_columns="colour,shape", workers=1
        )
    )
    govern.run(govern.GovernConfig(catalogue=catalogue, min_queries=0))
    tokenizer.run(tokenizer.TokenizerConfig(catalogue=catalogue, vocab_size=48))
    return catalogue


def part(batch: Batch, sizes: list[int], rank: int) -> Batch:
    """The rows of one of the ranks, which have `sizes` of them."""
    rows = [name for name in vars(batch) if name not in ("sizes", "origin") and len(getattr(batch, name))]
    own = {name: getattr(batch, name).split(sizes)[rank] for name in rows}
    return replace(batch, **own, sizes={"query": sizes, "document": sizes})


def require_equal_gradients(towers: nn.Module, plain: nn.Module, mesh: Any) -> None:
    """Gradients of the towers, merged over tp and summed over dp, against those of the plain twin, to 1e-10."""
    reference = dict(plain.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in reference.values() if p.grad is not None)
    for name, parameter in towers.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        torch.distributed.all_reduce(grad, group=mesh.dp)
        merged, wanted = merge_shards(grad, parameter, mesh.tp), reference[name].grad
        wanted = torch.zeros_like(merged) if wanted is None else wanted
        error = (merged - wanted).abs().max()
        assert error <= 1e-10 * max(1e-3 * largest, float(wanted.abs().max())), f"{name}: {error:.3e}"


def losses(
    tensor_parallel: int, make: Callable[..., Any], config: Any, batches: list[Batch], steps: int
) -> list[float]:
    """In a pool: the losses of `steps` steps of gradient descent, from weights that depend on no layout."""
    from models.transformer import MegatronBuilder

    with layout(tensor_parallel) as mesh:
        torch.manual_seed(0)
        method = make(config, MegatronBuilder(mesh.groups), mesh.dp)
        found = []
        for step in range(steps):
            loss, _ = method.loss(batches[step % len(batches)])
            found.append(loss.item())
            method.towers.zero_grad()
            loss.backward()
            with torch.no_grad():
                for p in method.towers.parameters():
                    if p.grad is not None:
                        p -= 0.02 * p.grad
        return found


def half_precision(make: Callable[..., Any], config: Any, batch: Batch) -> tuple[float, float, bool]:
    """In a pool of one: the loss in float64 and in bf16, as the loop casts towers and batch; whether all gradients of
    the latter are finite.
    """
    from models.plain.transformer import PlainBuilder

    with layout() as mesh:
        found = []
        for dtype in (torch.float64, torch.bfloat16):
            torch.manual_seed(0)
            method = make(config, PlainBuilder(), mesh.dp)
            method.towers.to(dtype)
            loss, _ = method.loss(batch.to(torch.device("cpu"), dtype))
            found.append(loss)
        found[1].backward()
        finite = all(bool(p.grad.isfinite().all()) for p in method.towers.parameters() if p.grad is not None)
        return found[0].item(), found[1].item(), finite
