"""Parts of a document's vector and attention over its patches: dense formulas in float64, and the plain twins."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.batch import Batch
from models.explanation import Explanation
from models.item import Item, ItemConfig, ItemTowers, PatchConfig, StreamConfig
from models.make import Make, MakeTowers
from models.method import Method
from models.oclear import Oclear, OclearTowers
from models.plain.transformer import PlainBuilder
from models.tp_state import merged_state_dict
from tests.pool import layout, ranks
from tests.test_hybrid import BASE, SUM, pairs
from tests.test_make import AM_SOFTMAX
from tests.twins import IMAGE, LENGTH, PATCH, VOCAB, products

SIZE = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "dropout": 0.0}
ITEM = ItemConfig(
    vision=PatchConfig(image_size=IMAGE, patch_size=PATCH),
    text=StreamConfig(**SIZE, vocab_size=VOCAB, max_length=LENGTH),
    aligned=True,
)
Made = Callable[[Any, Any], Method]


def oclear(config: Any, builder: Any) -> Method:
    return Oclear(config, OclearTowers(config, builder).double().eval(), None, None)  # type: ignore[arg-type]


def make(config: Any, builder: Any) -> Method:
    return Make(config, MakeTowers(config, builder).double().eval(), None, None)  # type: ignore[arg-type]


def item(config: Any, builder: Any) -> Method:
    towers = ItemTowers(config, builder).double().eval()
    assert towers.alignment is not None
    with torch.no_grad():  # as a fit would leave it: nothing is the identity
        towers.alignment.mean.normal_(generator=torch.Generator().manual_seed(1))
        towers.alignment.map.normal_(generator=torch.Generator().manual_seed(2))
        towers.alignment.correlation.uniform_(0.2, 0.9, generator=torch.Generator().manual_seed(3))
    return Item(config, towers, None, None)  # type: ignore[arg-type]


CASES: dict[str, tuple[Made, Any, Callable[[], Batch], tuple[str, ...]]] = {
    "sum": (oclear, SUM, pairs, ("image", "steered", "text")),
    "sum without text": (oclear, replace(SUM, fusion_weights=(1.0, 0.5, 0.0)), pairs, ("image", "steered")),
    "sum without steering": (oclear, replace(SUM, fusion_weights=(1.0, 0.0, 0.5)), pairs, ("image", "text")),
    "concept": (oclear, BASE, pairs, ("image", "concepts")),
    "make": (make, AM_SOFTMAX, lambda: products(5, 1), ("title", "image", "fused")),
    "item, aligned": (item, ITEM, lambda: products(5, 1), ("image", "title")),
}


def explained(name: str) -> tuple[Any, Batch, Explanation, Tensor]:
    """A case's method, batch, explanation, and the vectors that export takes."""
    build, config, batch, parts = CASES[name]
    torch.manual_seed(0)
    method, rows = build(config, PlainBuilder()), batch()
    assert method.parts == parts
    return method, rows, method.explain_document(rows), method.embed_document(rows)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_parts_make_the_vector_that_is_exported(name: str) -> None:
    method, _, found, vectors = explained(name)
    assert torch.equal(found.vectors, vectors), "the same arithmetic"
    whole = found.parts.sum(1)
    made = method.towers.document_transform(whole) if name == "concept" else whole
    torch.testing.assert_close(F.normalize(made.float(), dim=-1), vectors, rtol=0, atol=1e-6)
    assert found.weights.shape == found.shares.shape == (len(vectors), len(method.parts))
    direction = F.normalize(whole, dim=-1)
    projected = torch.einsum("nkd,nd->nk", found.parts, direction) / whole.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(found.shares, projected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.shares.sum(1), torch.ones(len(vectors)).double(), rtol=1e-10, atol=1e-10)
    assert (found.attention is not None) == (name in ("sum", "sum without text", "concept"))


def looked(fusion: Any, patches: Tensor, words: Tensor, padding: Tensor) -> Tensor:
    """Attention of the text's concepts over the patches [n, P], document by document, word by word, head by head."""

    def heads(attention: Any, x: Tensor, context: Tensor) -> Tensor:
        size = attention.query.out_features // attention.heads
        q = attention.query(attention.norm_query(x)).unflatten(1, (attention.heads, size))
        k, v = attention.key_value(attention.norm_context(context)).unflatten(1, (2, attention.heads, size)).unbind(1)
        weights = (torch.einsum("mhc,nhc->hmn", q, k) / math.sqrt(size)).softmax(-1)
        read = attention.out(torch.einsum("hmn,nhc->mhc", weights, v).flatten(1))
        concepts.append(x + read if attention.residual else read)
        return weights

    rows = []
    for document in range(len(patches)):
        concepts: list[Tensor] = []
        heads(fusion.text_attention, fusion.memory, words[document][~padding[document]])
        rows.append(heads(fusion.patch_attention, concepts[0], patches[document]).mean((0, 1)))
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["sum", "sum without text", "concept"])
@torch.no_grad()
def test_attention_is_the_mean_of_the_concepts_and_adds_up_to_1(name: str) -> None:
    method, batch, found, _ = explained(name)
    towers, tokens = method.towers, batch.document_tokens
    patches, pooled = towers.vision(batch.document_images)
    assert found.attention is not None
    wanted = looked(towers.fusion, patches, towers.text(tokens), tokens == 0)
    torch.testing.assert_close(found.attention, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.attention.sum(1), torch.ones(len(tokens)).double(), rtol=1e-12, atol=1e-12)
    assert found.attention.shape == (len(tokens), method.config.vision.num_patches)
    assert found.attention.max() > 1.01 * found.attention.min() > 0
    if name == "concept":
        gate = towers.document(batch.document_images, tokens)[1]
        torch.testing.assert_close(found.weights, torch.stack([1 - gate, gate], 1))
        torch.testing.assert_close(found.parts[:, 0], (1 - gate[:, None]) * pooled)
    else:
        assert found.weights.tolist() == [[w for w in method.config.fusion_weights if w]] * len(tokens)


@torch.no_grad()
def test_an_alignment_without_a_title_has_only_an_image() -> None:
    method, batch, _, _ = explained("item, aligned")
    tokens = batch.document_tokens.clone()
    tokens[2] = 0
    found = method.explain_document(replace(batch, document_tokens=tokens).with_lengths(0))
    assert found.parts[2, 1].abs().max() == 0 and found.shares[2].tolist() == pytest.approx([1, 0])
    assert (found.parts[[0, 1, 3, 4], 1].abs().amax(1) > 0).all()


def test_what_cannot_be_taken_apart_has_no_parts() -> None:
    for config in (replace(BASE, fusion_kind="image"), replace(BASE, fusion_kind="concat")):
        assert oclear(config, PlainBuilder()).parts == ()
    config = replace(ITEM, aligned=False)
    assert Item(config, ItemTowers(config, PlainBuilder()), None, None).parts == ()  # type: ignore[arg-type]


def check_parallel(name: str, tensor_parallel: int) -> None:
    from models.transformer import MegatronBuilder

    build, config, batch, _ = CASES[name]
    with layout(tensor_parallel) as mesh, torch.no_grad():
        torch.manual_seed(0)
        method = build(config, MegatronBuilder(mesh.groups))
        plain = build(config, PlainBuilder())
        plain.towers.load_state_dict(merged_state_dict(method.towers, mesh.tp))
        found, wanted = (each.explain_document(batch()) for each in (method, plain))
        assert torch.equal(found.vectors, method.embed_document(batch()))
        for field in ("vectors", "parts", "weights", "attention", "shares"):
            mine, dense = getattr(found, field), getattr(wanted, field)
            if dense is None:
                assert mine is None
                continue
            exact = 1e-6 if field == "vectors" else 1e-10
            torch.testing.assert_close(mine, dense, rtol=exact, atol=exact, msg=lambda said, f=field: f"{f}: {said}")
        if found.attention is not None:
            torch.testing.assert_close(found.attention.sum(1), torch.ones(len(found.vectors)).double())


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_tensor_parallel_towers_explain_as_the_plain_twin(name: str, tensor_parallel: int) -> None:
    ranks(tensor_parallel).run(check_parallel, name, tensor_parallel)
