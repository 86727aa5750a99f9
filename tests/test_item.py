"""ITEm: every loss term against one dense process in float64, gradients, and what the global heads may see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.core.errors import UserError
from harness.data.masking import MaskConfig
from harness.text.tokenizer import TokenStore
from harness.text.tower_check import require_texts_fit
from models.batch import Batch
from models.item import Item, ItemConfig, ItemQuery, ItemTowers, ItemWeights, PatchConfig, StreamConfig
from models.plain.transformer import PlainBuilder
from models.shape import TransformerBuilder
from models.tp_state import merged_state_dict
from tests.pool import layout, ranks
from tests.twins import (
    IMAGE,
    LENGTH,
    PATCH,
    PATCHES,
    SPECIAL,
    VOCAB,
    half_precision,
    losses,
    part,
    products,
    require_equal_gradients,
)

FULL = pytest.mark.full
PATCHED = ItemConfig(
    vision=PatchConfig(image_size=IMAGE, patch_size=PATCH),
    text=StreamConfig(num_layers=2, hidden_size=16, num_attention_heads=2, vocab_size=VOCAB, max_length=LENGTH),
    weights=ItemWeights(itm=1.0, mlm=0.9, mim=0.8, gmlm=0.7, gmim=0.6, contrast=0.5),
)
STEM = replace(
    PATCHED,
    vision=replace(PATCHED.vision, stem_channels=(4, 8), stem_blocks=(0, 1)),
    weights=ItemWeights(),
    global_targets="all",
)
MASKS = MaskConfig(word_rate=0.4, one_heavy=True)


def dense(towers: ItemTowers, config: ItemConfig, batch: Batch) -> dict[str, Tensor]:
    """Every term over the whole batch, sample by sample."""
    weights = batch.document_weights.double()
    sums = {name: torch.zeros((), dtype=torch.float64) for name, value in vars(config.weights).items() if value}
    totals = dict.fromkeys(sums, 0.0)

    def add(name: str, term: Tensor, weight: Tensor) -> None:
        sums[name] = sums[name] + weight * term
        totals[name] += float(weight)

    hidden = batch.document_images.clone()
    cut = {}
    for i in range(len(hidden)):
        for place in range(PATCHES):
            y, x = (PATCH * index for index in divmod(place, IMAGE // PATCH))
            cut[i, place] = batch.document_images[i, :, y : y + PATCH, x : x + PATCH].flatten()
            if batch.masked_patches[i, place]:
                hidden[i, :, y : y + PATCH, x : x + PATCH] = 0
    states = towers(hidden, batch.masked_tokens.masked_fill(batch.masked_titles[:, None], 0))  # padding is not seen
    whole, words, patches = states[:, 0], states[:, 1 : 1 + LENGTH], states[:, 1 + LENGTH :]
    everything = config.global_targets == "all"
    for i, place in (batch.document_tokens != 0).nonzero().tolist():
        true = batch.document_tokens[i, place]
        if batch.masked_words[i, place] and not batch.masked_titles[i]:
            add("mlm", -F.log_softmax(towers.mlm(words[i, place]), 0)[true], weights[i])
        if batch.masked_words[i, place] or everything:
            add("gmlm", -F.log_softmax(towers.gmlm(whole[i], torch.tensor(place)), 0)[true], weights[i])
    for (i, place), pixels in cut.items():
        pixels = (pixels - pixels.mean()) / (pixels.var(unbiased=False) + 1e-6).sqrt()
        if batch.masked_patches[i, place]:
            add("mim", (towers.mim(patches[i, place]) - pixels).square().mean(), weights[i])
        if batch.masked_patches[i, place] or everything:
            add("gmim", (towers.gmim(whole[i], torch.tensor(place)) - pixels).square().mean(), weights[i])
    logits = towers.itm(towers(batch.document_images, batch.other_tokens)[:, 0])[:, 0]
    for i, logit in enumerate(logits):
        own = torch.equal(batch.other_tokens[i], batch.document_tokens[i])
        add("itm", -F.logsigmoid(logit if own else -logit), weights[i])
    if config.weights.contrast:
        title, image = (
            F.normalize(towers(batch.document_images, batch.document_tokens, seen)[:, 0], dim=-1)
            for seen in ("title", "image")
        )
        labels = batch.document_labels
        for i in range(len(labels)):
            rivals = [
                j for j in range(len(labels)) if j != i and weights[j] > 0 and (labels[i] != labels[j] or labels[i] < 0)
            ]
            for own, others in ((title, image), (image, title)):
                row = torch.stack([own[i] @ others[j] for j in [i, *rivals]]) / config.contrast.temperature
                add("contrast", -F.log_softmax(row, 0)[0], weights[i])
    return {name: x / totals[name] for name, x in sums.items()}


def check_dense(tensor_parallel: int, sizes: list[int]) -> None:
    from models.transformer import MegatronBuilder

    for config, masks in ((PATCHED, replace(MASKS, heavy_word_rate=1.0)), (STEM, MASKS)):
        with layout(tensor_parallel) as mesh:
            torch.manual_seed(0)
            towers = ItemTowers(config, MegatronBuilder(mesh.groups)).double()
            plain = ItemTowers(config, PlainBuilder()).double()
            plain.load_state_dict(merged_state_dict(towers, mesh.tp))
            batch = products(7, 3, masks)
            assert batch.masked_titles.any() == (masks.heavy_word_rate == 1)
            loss, metrics = Item(config, towers, None, mesh.dp).loss(part(batch, sizes, mesh.dp.rank()))
            wanted = dense(plain, config, batch)
            for name, value in wanted.items():
                torch.testing.assert_close(metrics[name][0], value.detach(), rtol=1e-10, atol=0, msg=name)
            total = torch.stack([getattr(config.weights, name) * value for name, value in wanted.items()]).sum()
            torch.testing.assert_close(loss, total, rtol=1e-10, atol=0)
            loss.backward()
            total.backward()
            require_equal_gradients(towers, plain, mesh)


@pytest.mark.parametrize(
    ("world", "tensor_parallel", "sizes"),
    [(2, 1, [5, 2]), *(pytest.param(*x, marks=FULL) for x in ((1, 1, [7]), (3, 1, [1, 4, 2]), (4, 2, [3, 4])))],
)
def test_equals_one_dense_process(world: int, tensor_parallel: int, sizes: list[int]) -> None:
    ranks(world).run(check_dense, tensor_parallel, sizes)


def build_item(config: ItemConfig, build: TransformerBuilder, group: Any) -> Item:
    return Item(config, ItemTowers(config, build).double(), None, group)


@pytest.mark.full  # tests/test_two_methods.py shows it of whole runs
def test_tensor_parallel_runs_have_the_same_losses() -> None:
    batches = [products(6, seed, MASKS) for seed in range(3)]
    one = ranks(1).run(losses, 1, build_item, PATCHED, batches, 20)[0]
    two = ranks(2).run(losses, 2, build_item, PATCHED, batches, 20)
    assert two[0] == two[1] and two[0] == pytest.approx(one, rel=1e-8)
    assert one[18] < one[0] - 0.1, "it does not learn, so equal losses say little"


def test_bf16_gives_the_same_loss_but_for_rounding() -> None:
    exact, rounded, finite = ranks(1).run(half_precision, build_item, PATCHED, products(6, 1, MASKS))[0]
    assert finite and rounded == pytest.approx(exact, rel=0.02)


def test_global_heads_see_the_global_vector_and_the_position_alone() -> None:
    ranks(1).run(check_global_heads)


def check_global_heads() -> None:
    with layout() as mesh:
        torch.manual_seed(0)
        item = build_item(PATCHED, PlainBuilder(), mesh.dp)
        batch = products(6, 4, MASKS)
        states = torch.randn(6, 1 + LENGTH + PATCHES, 16, dtype=torch.float64, requires_grad=True)
        terms = item.masked_terms(states, batch)
        elsewhere, global_vector = states.detach().clone(), states.detach().clone()
        elsewhere[:, 1:] += torch.randn_like(elsewhere[:, 1:])
        global_vector[:, 0] += 1
        moved, turned = item.masked_terms(elsewhere, batch), item.masked_terms(global_vector, batch)
        masked = torch.cat([torch.zeros(6, 1, dtype=torch.bool), batch.masked_words, batch.masked_patches], 1)
        masked &= batch.document_weights[:, None] > 0
        first = torch.arange(masked.shape[1]) == 0
        for name in ("gmlm", "gmim"):
            assert torch.equal(terms[name], moved[name]) and not torch.equal(terms[name], turned[name])
            (grad,) = torch.autograd.grad(terms[name], states, retain_graph=True)
            assert not grad[:, 1:].any() and grad[:, 0].any()
        for name, kind in (("mlm", slice(1, 1 + LENGTH)), ("mim", slice(1 + LENGTH, None))):
            assert torch.equal(terms[name], turned[name]) and not torch.equal(terms[name], moved[name])
            (grad,) = torch.autograd.grad(terms[name], states, retain_graph=True)
            assert torch.equal(grad.any(2)[:, kind], masked[:, kind])
            grad[:, kind] = 0
            assert not grad.any() and not masked[:, first].any()
        # One vector at two positions: the heads tell them apart.
        for head in (item.towers.gmlm, item.towers.gmim):
            out = head(torch.ones(2, 16, dtype=torch.float64), torch.tensor([1, 2]))
            assert not torch.allclose(out[0], out[1])


def gradients(config: ItemConfig) -> tuple[set[str], set[str]]:
    """In a pool of one: names of the parameters with a gradient, and of the metrics."""
    with layout() as mesh:
        torch.manual_seed(0)
        item = build_item(config, PlainBuilder(), mesh.dp)
        loss, metrics = item.loss(products(6, 2, MASKS))
        loss.backward()
        named = item.towers.named_parameters()
        return {name for name, p in named if p.grad is not None and p.grad.any()}, set(metrics)


@pytest.mark.full
def test_a_term_of_weight_0_has_no_gradient() -> None:
    heads = ("itm", "mlm", "mim", "gmlm", "gmim")
    for name in (*heads, "contrast"):
        weights = ItemWeights(**{**dict.fromkeys(heads, 0.0), name: 1.0})
        found, metrics = ranks(1).run(gradients, replace(PATCHED, weights=weights))[0]
        assert {head for head in heads if any(key.startswith(f"{head}.") for key in found)} == {name} & set(heads)
        assert metrics & {*heads, "contrast"} == {name}
        assert any(key.startswith("block.") for key in found), name


def fitted(aligned: bool) -> Item:
    """With an alignment of its views to products of another seed, if there is one."""
    item = build_item(replace(PATCHED, aligned=aligned), PlainBuilder(), None)
    item.towers.eval()
    if item.towers.alignment is not None:
        vectors = item.both_views(products(9, 8)).double()
        item.towers.alignment.fit(torch.tensor(9.0).double(), vectors.sum(0), vectors.T @ vectors, 1e-3)
    return item


ALIGNED = pytest.mark.parametrize("aligned", [False, True])


@ALIGNED
def test_a_view_does_not_see_what_is_left_out(aligned: bool) -> None:
    item, batch = fitted(aligned), products(4, 3)
    pixels = replace(batch, document_images=batch.document_images + 1)
    words = replace(batch, document_tokens=batch.document_tokens.flip(0))
    for seen, blind, sharp in (("title", pixels, words), ("image", words, pixels)):
        assert torch.equal(item.embed_document(batch, seen), item.embed_document(blind, seen))
        assert not torch.equal(item.embed_document(batch, seen), item.embed_document(sharp, seen))
    for other in (pixels, words):
        assert not torch.equal(item.embed_document(batch), item.embed_document(other))


def test_a_view_is_the_whole_sequence_with_the_other_modality_hidden() -> None:
    towers, batch = ItemTowers(PATCHED, PlainBuilder()).double(), products(4, 3)
    images, tokens = batch.document_images, batch.document_tokens
    words = towers.words(tokens) + towers.word_position + towers.modality[0]
    patches = towers.stem(images).flatten(2).transpose(1, 2) + towers.patch_position + towers.modality[1]
    x = towers.norm(torch.cat([towers.first.expand(len(images), 1, -1), words, patches], 1)).transpose(0, 1)
    for seen in ("title", "image"):
        hidden = torch.ones(len(images), len(x), dtype=torch.bool)
        hidden[:, 0] = False
        if seen == "title":
            hidden[:, 1 : 1 + LENGTH] = tokens == 0
        else:
            hidden[:, 1 + LENGTH :] = False
        whole = towers.block(x, hidden[:, None, None, :])[0]
        short = towers.embed(images, tokens, seen)
        torch.testing.assert_close(short, whole, rtol=1e-12, atol=1e-12)
        shared = [*towers.block.parameters(), *towers.norm.parameters(), towers.first, towers.modality]
        found, wanted = (torch.autograd.grad(v.sin().sum(), shared, retain_graph=True) for v in (short, whole))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_padding_is_not_seen() -> None:
    towers, batch = ItemTowers(PATCHED, PlainBuilder()).double(), products(4, 3)
    tokens = batch.document_tokens.masked_fill(torch.arange(LENGTH) >= 5, 0)
    short, long = (towers.embed(batch.document_images, t) for t in (tokens[:, :5], tokens))
    torch.testing.assert_close(short, long, rtol=1e-12, atol=1e-12)


@ALIGNED
def test_a_query_photo_is_a_product_without_title(aligned: bool) -> None:
    item, batch = fitted(aligned), products(4, 3)
    batch = replace(batch, query_images=batch.document_images)
    untitled = replace(batch, document_tokens=torch.zeros_like(batch.document_tokens))
    torch.testing.assert_close(item.embed_query(batch), item.embed_document(untitled), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(item.embed_query(batch), item.embed_document(batch, "image"), atol=1e-6, rtol=1e-6)
    assert torch.equal(item.embed_query(batch), ItemQuery(item.towers)(batch.query_images))


def test_an_empty_text_is_no_title() -> None:
    """Its row of tokens is not empty: it has those that begin a text and end its fields."""
    word = np.array([7], np.int32)
    ends = {"title": np.array([0, 0, 1, 1]), "description": np.array([0, 0, 0, 1])}  # no text, a title, a description
    store = TokenStore({"title": word, "description": word}, ends, SPECIAL)
    require_texts_fit(store.special, replace(PATCHED, aligned=True))
    tokens = torch.from_numpy(store.batch(np.arange(3), LENGTH))
    assert ((tokens != 0).sum(1) == torch.tensor([3, 4, 4])).all()
    item, batch = fitted(aligned=True), replace(products(3, 3), document_tokens=tokens)
    pair = item.embed_document(batch), item.embed_document(batch, "image")
    alike = F.cosine_similarity(*pair)
    assert alike[0] > 1 - 1e-6 and alike[1:].max() < 0.999
    other = replace(store.special, bos=None, eos=5)
    with pytest.raises(UserError, match=r"frames texts with \[5\], model.text.frame_ids is \[2, 3\]"):
        require_texts_fit(other, replace(PATCHED, aligned=True))
    require_texts_fit(other, PATCHED)


def test_configuration_errors_name_the_key() -> None:
    assert not PATCHED.errors(2) and not STEM.errors(2)
    none = ItemWeights(**dict.fromkeys(vars(PATCHED.weights), 0.0))
    bad = {
        "model.weights": replace(PATCHED, weights=none),
        "model.vision.patch_size": replace(PATCHED, vision=PatchConfig(image_size=IMAGE, patch_size=5)),
        "model.text.num_attention_heads": replace(PATCHED, text=replace(PATCHED.text, num_attention_heads=1)),
    }
    for key, config in bad.items():
        assert any(key in line for line in config.errors(2)), key
