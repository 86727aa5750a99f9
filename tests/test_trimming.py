"""Padding that is cut off, and masks that are left out where nothing is padded, change no loss and no gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.data.masking import MaskConfig
from models.batch import WIDTH, Batch
from models.heads.class_parallel import ClassHeadConfig, ClassParallelHead
from models.item import Item, ItemConfig, ItemTowers, ItemWeights, PatchConfig, StreamConfig
from models.make import Make, MakeConfig, MakeTowers
from models.oclear import Oclear, OclearConfig, OclearTowers
from models.shape import TransformerShape
from models.text import TextConfig
from models.vision import VisionConfig
from tests.pool import layout, ranks
from tests.twins import IMAGE, PATCH, VOCAB, part, products

ROOM = 40  # tokens that a text may have; those of tests.twins have LENGTH at most
SMALL: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
TEXT: dict[str, Any] = {**SMALL, "vocab_size": VOCAB, "max_length": ROOM}
VISION = VisionConfig(**SMALL, image_size=IMAGE, patch_size=PATCH)
HEAD = ClassHeadConfig(num_classes=5, embedding_dim=32)
METHODS: dict[str, Any] = {
    "oclear": OclearConfig(vision=VISION, text=TextConfig(**TEXT, post_norm=True), embedding_dim=32),
    "oclear, causal text that sees padding": OclearConfig(
        vision=VISION, text=TextConfig(**TEXT, causal=True, mask_padding=False), embedding_dim=32
    ),
    "oclear, text that sees padding": OclearConfig(
        vision=VISION, text=TextConfig(**TEXT, mask_padding=False), embedding_dim=32
    ),
    "make": MakeConfig(
        vision=VISION,
        text=TextConfig(**TEXT, pooling="class"),
        query=TextConfig(**TEXT, pooling="mean"),
        fusion=TransformerShape(**SMALL),
        embedding_dim=32,
        num_keywords=9,
        product_keywords=3,
    ),
    "make, words hidden, last position of the query": MakeConfig(
        vision=VISION,
        text=TextConfig(**TEXT, pooling="mean"),
        query=TextConfig(**TEXT, pooling="last"),
        fusion=TransformerShape(**SMALL),
        embedding_dim=32,
        hide_words=True,
        num_keywords=9,
        product_keywords=3,
    ),
    "item": ItemConfig(
        vision=PatchConfig(image_size=IMAGE, patch_size=PATCH),
        text=StreamConfig(**TEXT),
        weights=ItemWeights(contrast=0.5),
    ),
    "item, everything told": ItemConfig(
        vision=PatchConfig(image_size=IMAGE, patch_size=PATCH), text=StreamConfig(**TEXT), global_targets="all"
    ),
}
UNTRIMMED = ("oclear, text that sees padding", "make, words hidden, last position of the query")
CAUSAL = ("oclear, causal text that sees padding",)
LENGTHS = ("query_lengths", "document_lengths", "masked_lengths", "other_lengths")
MASKS = {"mixed": MaskConfig(word_rate=0.4), "titles hidden": MaskConfig(one_heavy=True, heavy_word_rate=1.0)}


def roomy(batch: Batch) -> Batch:
    """The batch with its texts padded to ROOM, as a store gives them, and without their lengths."""
    wide = dict.fromkeys(LENGTHS, torch.empty(0, 0))
    for name in ("document_tokens", "masked_tokens", "masked_words", "other_tokens", "query_tokens"):
        tokens = getattr(batch, name)
        wide[name] = F.pad(tokens, (0, ROOM - tokens.shape[1]))
    return replace(batch, **wide)


def full(batch: Batch) -> Batch:
    """The batch with texts that have no padding at all, and without their lengths."""
    document = batch.document_tokens.masked_fill(batch.document_tokens == 0, 7)
    masked = torch.where(batch.masked_words, batch.masked_tokens, document)
    unknown = dict.fromkeys(LENGTHS, torch.empty(0, 0))
    return replace(batch, document_tokens=document, masked_tokens=masked, other_tokens=document.flip(0), **unknown)


@contextmanager
def noting() -> Iterator[list[tuple[bool, int]]]:
    """Inside, each attention leaves whether it was given a mask, and the number of its keys."""
    attention, seen = F.scaled_dot_product_attention, []

    def note(query: Tensor, key: Tensor, *args: Any, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        seen.append((attn_mask is not None, key.shape[2]))
        return attention(query, key, *args, attn_mask=attn_mask, **options)

    with mock.patch.object(F, "scaled_dot_product_attention", note):
        yield seen


def results(config: Any, batch: Batch, mesh: Any) -> tuple[list[Tensor], list[tuple[bool, int]]]:
    """Loss, embeddings and all gradients from the same weights; and what attention was given."""
    from models.transformer import MegatronBuilder

    torch.manual_seed(0)
    builder, method = MegatronBuilder(mesh.groups), None
    if isinstance(config, OclearConfig):
        head = ClassParallelHead(HEAD, mesh.row_group, mesh.dp, dtype=torch.float64, copy_group=mesh.tp)
        batch = replace(batch, query_labels=batch.query_labels.clamp_min(0))
        method = Oclear(config, OclearTowers(config, builder).double(), head, mesh.dp)
    elif isinstance(config, MakeConfig):
        method = Make(config, MakeTowers(config, builder).double(), None, mesh.dp)
    else:
        method = Item(config, ItemTowers(config, builder).double(), None, mesh.dp)
    with noting() as seen:
        ((loss, _),) = method.losses([batch])
        loss.backward()
        with torch.no_grad():
            vectors = [method.embed_document(batch)]
            if isinstance(config, MakeConfig):
                vectors += [method.embed_query(batch), method.explain_document(batch).weights]
            if isinstance(config, ItemConfig):
                vectors.append(method.both_views(batch))
    none = torch.zeros(())
    grads = [none if p.grad is None else p.grad for p in method.towers.parameters()]
    return [loss.detach(), *vectors, *grads], seen


def check(name: str, tensor_parallel: int) -> None:
    config = METHODS[name]
    trims, masked = name not in UNTRIMMED, name in CAUSAL
    with layout(tensor_parallel) as mesh:
        for masks, settings in MASKS.items():
            batch = roomy(products(5, 3, settings))
            known = batch.with_lengths(0).to(
                torch.device("cpu"), torch.float64
            )  # its masks on the host are not trimmed
            (wanted, before), (found, after) = (results(config, x, mesh) for x in (batch, known))
            compare(wanted, found, f"{name}, {masks}")
            assert max(keys for _, keys in before) >= ROOM
            assert (max(keys for _, keys in after) < ROOM) == trims
        batch = full(products(5, 3))
        (wanted, before), (found, after) = (results(config, x, mesh) for x in (batch, batch.with_lengths(0)))
        compare(wanted, found, f"{name}, nothing padded")
        assert any(m for m, _ in after) == masked and (any(m for m, _ in before) or not trims)


def compare(wanted: list[Tensor], found: list[Tensor], what: str) -> None:
    for i, (a, b) in enumerate(zip(wanted, found, strict=True)):
        assert float((a - b).abs().max()) <= 1e-12 * max(1.0, float(a.abs().max())), f"{what}: tensor {i}"


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("world", [1, 2])
def test_trimmed_equals_untrimmed(name: str, world: int) -> None:
    """Also without a mask where nothing is padded; what a tower sees of padding is neither cut nor hidden."""
    ranks(world).run(check, name, world)


def test_lengths_decide_on_the_host() -> None:
    batch = roomy(products(5, 3, MASKS["titles hidden"])).with_lengths(0)
    assert batch.padded("document") and batch.padded("masked") and batch.masked_titles.any()
    assert torch.equal(batch.masked_lengths == 0, batch.masked_titles)
    whole = full(products(5, 3)).with_lengths(0)
    assert not any(whole.padded(name) for name in ("document", "masked", "other"))
    longer = replace(batch, other_tokens=torch.full_like(batch.other_tokens, 7)).with_lengths(0)
    cut = longer.trimmed("document", "query")
    assert cut.other_tokens.shape == cut.document_tokens.shape == cut.masked_words.shape == (5, ROOM), (
        "they stay aligned"
    )
    assert cut.query_tokens.shape == (5, WIDTH)
    unknown = roomy(products(5, 3))
    assert unknown.padded("document") and unknown.trimmed("document").document_tokens.shape == (5, ROOM)
    empty = part(batch, [5, 0], 1)
    assert empty.with_lengths(0).trimmed("document", "query").document_tokens.shape == (0, ROOM)


def odd_tokens() -> tuple[Tensor, Tensor, list[tuple[bool, int]]]:
    """In a pool: a ViT with a class token without and with sequence parallelism, and what attention was given in the
    latter.
    """
    from models.transformer import MegatronBuilder
    from models.vision import VisionTower

    with layout(torch.distributed.get_world_size()) as mesh:
        config, found = replace(VISION, pooling="class", positions="rotary"), []
        for sequence in (False, True):
            mesh.seed_streams(1, 0)
            torch.manual_seed(0)
            tower = VisionTower(config, MegatronBuilder(mesh.groups, sequence_parallel=sequence)).double()
            with noting() as seen:
                found.append(tower(products(3, 1).document_images)[1].detach())
        return found[0], found[1], seen


def test_sequence_parallel_padding_is_cut_from_the_keys_and_needs_no_mask() -> None:
    for plain, parallel, seen in ranks(2).run(odd_tokens):
        torch.testing.assert_close(parallel, plain, rtol=1e-12, atol=1e-12)
        assert seen == [(False, 17)] * 2  # of 18 tokens, two layers
