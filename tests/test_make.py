"""MAKE: every loss term against one dense process in float64, written term by term; gradients of all towers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.batch import Batch
from models.heads.contrastive import ContrastiveConfig
from models.make import Make, MakeConfig, MakeQuery, MakeTowers, MakeWeights
from models.masked_modelling import hide_patches
from models.plain.transformer import PlainBuilder
from models.shape import TransformerBuilder, TransformerShape
from models.text import TextConfig
from models.tp_state import merged_state_dict
from models.vision import VisionConfig
from tests.pool import layout, ranks
from tests.twins import IMAGE, PATCH, VOCAB, half_precision, losses, part, products, require_equal_gradients

FULL = pytest.mark.full
SIZE: dict[str, Any] = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
AM_SOFTMAX = MakeConfig(
    related_keywords=2,
    vision=VisionConfig(image_size=IMAGE, patch_size=PATCH, **SIZE),
    text=TextConfig(vocab_size=VOCAB, max_length=8, pooling="class", **SIZE),
    query=TextConfig(max_length=5, pooling="mean", **SIZE),
    fusion=TransformerShape(**SIZE | {"hidden_size": 24}),
    embedding_dim=6,
    num_keywords=9,
    product_keywords=3,
    qic=ContrastiveConfig(temperature=0.2, margin=0.2, symmetric=False),
    memory_bank=5,  # less than a step leaves
    mpm_patches=3,
    weights=MakeWeights(qic=1.0, qim=0.7, query_image=0.6, keywords=0.5, mlm=0.4, mpm=0.3),
)
SYMMETRIC = replace(
    AM_SOFTMAX,
    hide_words=True,
    modalities="equal",
    related_category=False,
    related_keywords=1,
    qic=ContrastiveConfig(temperature=0.3),
    memory_bank=20,  # more than the steps leave
)
Old = list[tuple[Tensor, Tensor, Tensor]]  # unit query, unit document and labels of each pair of earlier steps


def labels_of(batch: Batch) -> Tensor:
    return torch.cat(
        [batch.document_labels[:, None], batch.categories[:, None], batch.keywords, batch.query_keywords], 1
    )


def related(a: Tensor, b: Tensor, config: MakeConfig) -> bool:
    named, have = ({int(x) for x in row if x >= 0} for row in (a[5:], b[2:5]))
    needed = min(len(named), config.related_keywords)
    return (
        bool(a[0] == b[0] >= 0)
        or (config.related_category and bool(a[1] == b[1] >= 0))
        or (needed > 0 and len(named & have) >= needed)
    )


def seen_title(batch: Batch, config: MakeConfig) -> Tensor:
    return batch.masked_tokens if config.hide_words else batch.document_tokens


def dense(towers: MakeTowers, config: MakeConfig, batch: Batch, old: Old) -> dict[str, Tensor]:
    """Every term over the whole batch, sample by sample."""
    raw, found = towers(batch.query_tokens, batch.document_images, seen_title(batch, config))
    query, document, image = (F.normalize(x, dim=-1) for x in (raw, found.embedding, found.image))
    labels, weights = labels_of(batch), batch.document_weights.double()
    live = [i for i in range(len(weights)) if weights[i] > 0]
    sums = {name: torch.zeros((), dtype=torch.float64) for name in vars(config.weights)}
    totals = dict.fromkeys(sums, 0.0)

    def add(name: str, term: Tensor, weight: Any) -> None:
        sums[name] = sums[name] + weight * term
        totals[name] += float(weight)

    old = old[-config.memory_bank :]
    for i in live:
        rivals = [j for j in live if j != i and not related(labels[i], labels[j], config)]
        past = [x for x in old if not related(labels[i], x[2], config)]
        scale, positive = 1 / config.qic.temperature, query[i] @ document[i] - config.qic.margin
        forth = [positive, *(query[i] @ document[j] for j in rivals), *(query[i] @ d for _, d, _ in past)]
        askers = [j for j in live if j != i and not related(labels[j], labels[i], config)]
        asked = [x for x in old if not related(x[2], labels[i], config)]
        back = [positive, *(document[i] @ query[j] for j in askers), *(document[i] @ q for q, _, _ in asked)]
        terms = [-F.log_softmax(scale * torch.stack(x), 0)[0] for x in (forth, back)]
        add("qic", (terms[0] + terms[1]) / 2 if config.qic.symmetric else terms[0], weights[i])
        own = raw[i : i + 1]
        add("qim", -F.logsigmoid(towers.match(own, found.embedding[i : i + 1])[0]), weights[i])
        if rivals:
            hardest = max(rivals, key=lambda j: (query[i] @ document[j]).item())
            add("qim", -F.logsigmoid(-towers.match(own, found.embedding[hardest : hardest + 1])[0]), weights[i])
        positive = query[i] @ image[i] - config.qic.margin
        forth = [positive, *(query[i] @ image[j] for j in rivals)]
        back = [positive, *(image[i] @ query[j] for j in askers)]
        terms = [-F.log_softmax(scale * torch.stack(x), 0)[0] for x in (forth, back)]
        add("query_image", (terms[0] + terms[1]) / 2 if config.qic.symmetric else terms[0], weights[i])
        words = [int(w) for w in batch.keywords[i] if w >= 0]
        if words:
            add("keywords", -F.log_softmax(towers.keywords(raw[i]), 0)[words].mean(), weights[i])

    padding = batch.document_tokens == 0
    _, states, _ = towers.fusion(towers.text(batch.masked_tokens), padding, found.patches)
    for i, place in batch.masked_words.nonzero().tolist():
        logits = towers.masked_words(states[i, place])
        add("mlm", -F.log_softmax(logits, 0)[batch.document_tokens[i, place]], weights[i])

    hidden = hide_patches(batch.document_images, batch.masked_patches, PATCH)
    _, _, states = towers.fusion(found.words, padding, towers.vision(hidden)[0])
    guesses, truths, shares = [], [], []
    for i in live:
        masked = batch.masked_patches[i].nonzero()[:, 0].tolist()
        k = config.mpm_patches
        for place in [masked[(2 * j + 1) * len(masked) // (2 * k)] for j in range(k)] if len(masked) >= k else []:
            y, x = divmod(place, IMAGE // PATCH)
            pixels = batch.document_images[i, :, y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH].flatten()
            pixels = (pixels - pixels.mean()) / (pixels.var(unbiased=False) + 1e-6).sqrt()
            guesses.append(F.normalize(towers.masked_patches(states[i, place]), dim=0))
            truths.append(F.normalize(towers.patch_content(pixels), dim=0))
            shares.append(weights[i])
    logits = torch.stack(guesses) @ torch.stack(truths).T / config.mpm.temperature
    for j, share in enumerate(shares):
        add("mpm", -F.log_softmax(logits[j], 0)[j], share)
    return {name: x / totals[name] for name, x in sums.items()}


def earlier(towers: MakeTowers, config: MakeConfig, batch: Batch) -> Old:
    with torch.no_grad():
        raw, found = towers(batch.query_tokens, batch.document_images, seen_title(batch, config))
    pairs = zip(F.normalize(raw, dim=-1), F.normalize(found.embedding, dim=-1), labels_of(batch), strict=True)
    return [pair for pair, weight in zip(pairs, batch.document_weights, strict=True) if weight > 0]


def check_dense(tensor_parallel: int, sizes: list[int]) -> None:
    from models.transformer import MegatronBuilder

    for config in (AM_SOFTMAX, SYMMETRIC):
        with layout(tensor_parallel) as mesh:
            torch.manual_seed(0)
            towers = MakeTowers(config, MegatronBuilder(mesh.groups)).double()
            plain = MakeTowers(config, PlainBuilder()).double()
            plain.load_state_dict(merged_state_dict(towers, mesh.tp))
            make = Make(config, towers, None, mesh.dp)
            first, second = products(7, 1), products(7, 2)
            make.loss(part(first, sizes, mesh.dp.rank()))  # fills the banks
            resumed = Make(config, towers, None, mesh.dp)
            resumed.banks.load_state_dict(make.banks.state_dict())
            loss, metrics = make.loss(part(second, sizes, mesh.dp.rank()))
            again, _ = resumed.loss(part(second, sizes, mesh.dp.rank()))
            assert torch.equal(loss, again), "the banks are not all of the state"
            assert all(torch.equal(x, resumed.banks.state_dict()[name]) for name, x in make.banks.state_dict().items())

            wanted = dense(plain, config, second, earlier(plain, config, first))
            for name, value in wanted.items():
                torch.testing.assert_close(metrics[name][0], value.detach(), rtol=1e-10, atol=0, msg=name)
            total = torch.stack([getattr(config.weights, name) * value for name, value in wanted.items()]).sum()
            torch.testing.assert_close(loss, total, rtol=1e-10, atol=0)
            loss.backward()
            total.backward()
            require_equal_gradients(towers, plain, mesh)


@pytest.mark.parametrize(
    ("world", "tensor_parallel", "sizes"),
    [
        (2, 1, [5, 2]),
        (2, 1, [0, 7]),
        *(pytest.param(*x, marks=FULL) for x in ((1, 1, [7]), (3, 1, [1, 4, 2]), (4, 2, [3, 4]))),
    ],
)
def test_equals_one_dense_process(world: int, tensor_parallel: int, sizes: list[int]) -> None:
    ranks(world).run(check_dense, tensor_parallel, sizes)


def check_matching() -> None:
    with layout() as mesh:
        torch.manual_seed(0)
        make = Make(AM_SOFTMAX, MakeTowers(AM_SOFTMAX, PlainBuilder()).double(), None, mesh.dp)
        queries = torch.eye(6, dtype=torch.float64)[:4]
        documents = queries.clone()  # each query's own is nearest by far, and the damaged last one next
        documents[3] = 1
        documents[0, 1] = documents[1, 2] = documents[2, 0] = 0.2
        labels, weights = torch.full((4, 8), -1), torch.tensor([1.0, 1.0, 1.0, 0.0])
        found = make._matching(queries, documents, labels, weights)
        alone = make._matching(queries, documents, labels * 0, weights)
        right = make.towers.match(queries[:3], documents[:3])
        wrong = make.towers.match(queries[:3], documents[[2, 0, 1]])
        torch.testing.assert_close(found, -F.logsigmoid(torch.cat([right, -wrong])).mean())
        torch.testing.assert_close(alone, -F.logsigmoid(right).mean())


def test_the_hardest_negative_is_another_readable_unrelated_product() -> None:
    """Products of which nothing is known are not related even to themselves; where all are related there is no
    negative.
    """
    ranks(1).run(check_matching)


def first_losses(config: MakeConfig) -> list[float]:
    """In a pool of one: QIC's loss of three equal batches of 5 readable pairs without training."""
    with layout() as mesh:
        torch.manual_seed(0)
        make = build_make(config, PlainBuilder(), mesh.dp)
        return [make.loss(products(6, 1))[1]["qic"][0].item() for _ in range(3)]


def test_the_bank_takes_part_when_enough_went_into_it() -> None:
    config = replace(AM_SOFTMAX, related_category=False)
    at_once, late = (ranks(1).run(first_losses, replace(config, memory_after=n))[0] for n in (0, 10))
    assert at_once[0] == late[0] == late[1] < late[2] == pytest.approx(at_once[2])
    assert at_once[1] > at_once[0]


def build_make(config: MakeConfig, build: TransformerBuilder, group: Any) -> Make:
    return Make(config, MakeTowers(config, build).double(), None, group)


@pytest.mark.full  # tests/test_two_methods.py shows it of whole runs
def test_tensor_parallel_runs_have_the_same_losses() -> None:
    batches = [products(6, seed) for seed in range(3)]
    one = ranks(1).run(losses, 1, build_make, AM_SOFTMAX, batches, 20)[0]
    two = ranks(2).run(losses, 2, build_make, AM_SOFTMAX, batches, 20)
    assert two[0] == two[1] and two[0] == pytest.approx(one, rel=1e-8)
    assert one[18] < one[0] - 0.1, "it does not learn, so equal losses say little"


def gradients(config: MakeConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """In a pool of one: gradients that are not 0, by name, and metrics."""
    with layout() as mesh:
        torch.manual_seed(0)
        make = build_make(config, PlainBuilder(), mesh.dp)
        make.loss(products(6, 1))
        loss, metrics = make.loss(products(6, 2))
        loss.backward()
        named = make.towers.named_parameters()
        return {name: p.grad for name, p in named if p.grad is not None and p.grad.any()}, metrics


def test_bf16_gives_the_same_loss_but_for_rounding() -> None:
    config = replace(AM_SOFTMAX, memory_bank=0)
    exact, rounded, finite = ranks(1).run(half_precision, build_make, config, products(6, 1))[0]
    assert finite and rounded == pytest.approx(exact, rel=0.02)


OWN = {
    "qim": ("match.",),
    "keywords": ("keywords.",),
    "mlm": ("masked_words.",),
    "mpm": ("masked_patches.", "patch_content."),
}


@pytest.mark.full
def test_a_term_of_weight_0_has_no_gradient() -> None:
    """All weights but one at 0 leave that term's; with only QIC it is the baseline, which only reaches the towers."""
    every = [prefix for prefixes in OWN.values() for prefix in prefixes]
    for name in vars(AM_SOFTMAX.weights):
        weights = MakeWeights(**{other: float(other == name) for other in vars(AM_SOFTMAX.weights)})
        found, metrics = ranks(1).run(gradients, replace(AM_SOFTMAX, weights=weights))[0]
        reached = {prefix for prefix in every if any(key.startswith(prefix) for key in found)}
        assert reached == set(OWN.get(name, ())), name
        assert {key for key in metrics if key in vars(weights)} == {name}
        assert any(key.startswith(("text.", "query_text.")) for key in found), name


def test_title_or_image_alone_is_a_product_without_the_other() -> None:
    towers = MakeTowers(AM_SOFTMAX, PlainBuilder()).double()
    make, batch = Make(AM_SOFTMAX, towers, None, None), products(4, 3)  # type: ignore[arg-type]
    other = replace(batch, document_images=batch.document_images + 1)
    assert torch.equal(make.embed_document(batch, "title"), make.embed_document(other, "title"))
    assert not torch.equal(make.embed_document(batch, "image"), make.embed_document(other, "image"))
    other = replace(batch, document_tokens=batch.document_tokens.flip(0))
    assert torch.equal(make.embed_document(batch, "image"), make.embed_document(other, "image"))
    assert not torch.equal(make.embed_document(batch), make.embed_document(batch, "image"))
    torch.testing.assert_close(make.explain_document(batch).weights.sum(1), torch.ones(4))
    torch.testing.assert_close(MakeQuery(towers)(batch.query_tokens), make.embed_query(batch))


def test_padding_is_not_seen() -> None:
    towers, batch = MakeTowers(AM_SOFTMAX, PlainBuilder()).double(), products(4, 3)
    tokens = batch.document_tokens.masked_fill(torch.arange(8) >= 5, 0)
    for modalities in ("learned", "title"):
        short, long = (towers.products(batch.document_images, t, modalities).embedding for t in (tokens[:, :5], tokens))
        torch.testing.assert_close(short, long, rtol=1e-12, atol=1e-12)


def test_configuration_errors_name_the_key() -> None:
    assert not AM_SOFTMAX.errors(2)
    bad = {
        "model.mpm_patches": replace(AM_SOFTMAX, mpm_patches=17),
        "model.weights are all 0": replace(AM_SOFTMAX, weights=MakeWeights(**dict.fromkeys(vars(MakeWeights()), 0.0))),
        "model.query.pooling": replace(AM_SOFTMAX, query=replace(AM_SOFTMAX.query, pooling="none")),
        "model.fusion.num_attention_heads": replace(
            AM_SOFTMAX, fusion=TransformerShape(hidden_size=24, num_attention_heads=3)
        ),
    }
    for key, config in bad.items():
        assert any(key in line for line in config.errors(2)), key
