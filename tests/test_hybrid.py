"""OCLEAR's step of several parts (classes by sides, images alone, InfoNCE on pairs) and its sum of unit vectors.

Loss and every gradient against the plain twin and one dense float64 statement; what each part of the sum can see.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.batch import TENSORS, Batch
from models.fusion import SumFusion
from models.heads.class_parallel import ClassHeadConfig, ClassParallelHead
from models.oclear import METHOD, Oclear, OclearConfig, OclearTowers
from models.plain.transformer import PlainBuilder
from models.text import TextConfig
from models.tp_state import merged_state_dict
from models.vision import VisionConfig
from tests.dense import dense_loss
from tests.pool import layout, ranks
from tests.test_towers import close, part
from tests.twins import require_equal_gradients

SMALL: dict[str, Any] = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 4}
BASE = OclearConfig(
    vision=VisionConfig(**SMALL, image_size=16, patch_size=8),
    text=TextConfig(**SMALL, vocab_size=40, max_length=6),
    embedding_dim=8,
    concept_slots=3,
    temperature=0.3,
)
SUM = replace(BASE, fusion_kind="sum", fusion_weights=(1.0, 0.7, 0.4))
STEPS = {
    "concept, classes and pairs": replace(BASE, contrast_weight=0.7),
    "sum, images alone, sides, pairs": replace(SUM, contrast_weight=2.0, image_anchor=0.5, document_share=0.3),
    "sum, AM-softmax, stopped, images alone, wrong texts": replace(
        SUM, contrast_weight=0.7, contrast_margin=0.3, fused_stop_gradient=True, image_anchor=0.5, wrong_texts=True
    ),
    "concept, pairs, wrong texts": replace(BASE, objective="contrastive", wrong_texts=True),
    "concat, AM-softmax, wrong texts": replace(
        BASE, fusion_kind="concat", contrast_weight=2.0, contrast_margin=0.2, wrong_texts=True
    ),
    "concept, stopped": replace(BASE, fused_stop_gradient=True, document_share=0.5, image_anchor=1.0),
    "concept, wrong texts without pairs": replace(BASE, wrong_texts=True, image_anchor=0.5),
    "sum, mosaics, sides, pairs": replace(SUM, contrast_weight=1.0, image_anchor=0.5, document_share=0.3),
    "sum, mosaics": replace(SUM, image_anchor=0.5),
    "sum, images alone": replace(SUM, image_anchor=0.5),
    "sum, sides, no document that can be read": replace(SUM, image_anchor=0.5, document_share=0.3),
    "concept, sides, no photo that can be read": replace(BASE, document_share=0.6),
    "concept, sides": replace(BASE, document_share=0.6, separate_transforms=False),
    "sum, pairs and images alone": replace(SUM, objective="contrastive", image_anchor=2.0),
    "steered only": replace(SUM, fusion_weights=(0.0, 1.0, 0.0), image_anchor=1.0),
    "text only": replace(SUM, fusion_weights=(0.0, 0.0, 1.0), document_share=0.5),
}
HEAD = ClassHeadConfig(num_classes=7, embedding_dim=8, scale="auto", margin=(1.0, 0.2, 0.1))


def pairs(n: int = 7) -> Batch:
    """n pairs: two of one class, one of none, one with a damaged photo, one with a damaged document."""
    g = torch.Generator().manual_seed(3)
    tokens = torch.randint(5, 40, (n, 6), generator=g)
    for row, length in enumerate((6, 3, 5, 1, 2, 4, 6)):
        tokens[row, length:] = 0
    labels = torch.tensor([0, 6, 3, 3, 1, -1, 2])
    return Batch(
        torch.randn(n, 3, 16, 16, generator=g, dtype=torch.float64),
        labels,
        torch.tensor([1.0, 0.5, 2.0, 1.0, 0.0, 1.0, 1.0]),
        torch.arange(n),
        torch.randn(n, 3, 16, 16, generator=g, dtype=torch.float64),
        tokens,
        labels,
        torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]),
        torch.arange(n),
    )


def dense_pairs(
    config: OclearConfig, queries: Tensor, documents: Tensor, batch: Batch, weights: Tensor, wrong: Tensor | None = None
) -> Tensor:
    """Symmetric InfoNCE of all pairs at once, without those that are no negatives: of one class, or of weight 0. Its
    first direction has the further logits `wrong` [n, n], without those that are -inf.
    """
    weights, labels = (batch.query_weights * weights).double(), batch.query_labels
    cosine = F.normalize(queries, dim=-1) @ F.normalize(documents, dim=-1).T
    logits = (cosine - config.contrast_margin * torch.eye(len(cosine), dtype=torch.float64)) / config.temperature
    hidden = ((labels[:, None] == labels) & (labels >= 0)) | (weights == 0)
    hidden.fill_diagonal_(False)
    sides = [x.masked_fill(hidden, float("-inf")) for x in (logits, logits.T)]
    if wrong is not None:
        sides[0] = torch.cat([sides[0], wrong.masked_fill(weights == 0, float("-inf"))], 1)
    terms = [side.logsumexp(1) - logits.diag() for side in sides]
    return (sum(terms) / 2) @ weights / weights.sum()


def dense_wrong_texts(
    config: OclearConfig, queries: Tensor, batch: Batch, towers: OclearTowers, pieces: list[Tensor]
) -> Tensor:
    """Logits [n, n] of the photos and each document's image with the text of the one before it in its piece of the
    step; -inf for photos of that one's class, and where its text is the document's own.
    """
    found = torch.full((len(queries), len(queries)), float("-inf"), dtype=torch.float64)
    unit = F.normalize(queries, dim=-1)
    for piece in pieces:
        for place, row in enumerate(piece.tolist()):
            other = int(piece[place - 1])
            if torch.equal(batch.document_tokens[row], batch.document_tokens[other]):
                continue
            images, tokens = batch.document_images[row, None], batch.document_tokens[other, None]
            document, label = F.normalize(towers.document(images, tokens)[0][0], dim=-1), batch.query_labels[other]
            negative = (batch.query_labels != label) | (label < 0)
            found[negative, row] = (unit @ document)[negative] / config.temperature
    return found


def dense_step(config: OclearConfig, batch: Batch, towers: OclearTowers, rows: Tensor, pieces: list[Tensor]) -> Tensor:
    """The loss of a whole step, from the description of the keys; `pieces`: places of each micro-batch's documents."""
    anchor, share = config.image_anchor, config.document_share
    queries, fused, _ = towers(batch.query_images, batch.document_images, batch.document_tokens)
    alone = towers.image_document(batch.document_images)
    unmixed = batch.document_weights.clone()  # a mosaic counts with its text only
    if batch.document_mosaics.numel():
        unmixed[batch.document_mosaics] = 0
    wrong = dense_wrong_texts(config, queries, batch, towers, pieces) if config.wrong_texts else None
    of_fused = dense_pairs(config, queries, fused, batch, batch.document_weights, wrong)
    pair_loss = (of_fused + anchor * dense_pairs(config, queries, alone, batch, unmixed)) / (1 + anchor)
    if config.objective == "contrastive":
        return pair_loss
    known = batch.query_labels >= 0
    photo = batch.query_weights.double() * known
    document = torch.cat([batch.document_weights.double() * known, anchor * unmixed.double() * known])
    if share and photo.any() and document.any():
        photo, document = (1 - share) * photo / photo.sum(), share * document / document.sum()
    weights = torch.cat([photo, document])
    found, labels = torch.cat([queries, fused, alone]), batch.query_labels.repeat(3)
    loss = dense_loss(found, rows, labels, weights, replace(HEAD, scale=2**0.5 * torch.tensor(6.0).double().log()))
    return loss + config.contrast_weight * pair_loss if config.contrast_weight else loss


def check_step(name: str, tensor_parallel: int, micro_batches: int, first_empty: bool) -> None:
    from models.transformer import MegatronBuilder

    config, whole = STEPS[name], pairs()
    if "mosaics" in name:
        whole = replace(whole, document_mosaics=torch.arange(len(whole.document_ids)) % 3 == 1)
    for side in ("document", "photo"):
        if f"no {side}" in name:
            field = f"{'query' if side == 'photo' else side}_weights"
            whole = replace(whole, **{field: torch.zeros_like(whole.document_weights)})
    if config.wrong_texts:  # equal texts of two classes beside each other
        whole = replace(whole, document_tokens=whole.document_tokens[[0, 0, 2, 3, 4, 5, 6]])
    with layout(tensor_parallel) as mesh:
        torch.manual_seed(0)
        towers = OclearTowers(config, MegatronBuilder(mesh.groups)).double()
        plain = OclearTowers(config, PlainBuilder()).double()
        plain.load_state_dict(merged_state_dict(towers, mesh.tp))
        head = ClassParallelHead(HEAD, mesh.row_group, mesh.dp, dtype=torch.float64, copy_group=mesh.tp)
        rows = head.full_weight().clone().requires_grad_()
        every, size = torch.arange(7), mesh.dp.size()
        shares = [every[:0], *every.tensor_split(size - 1)] if first_empty else every.tensor_split(size)
        places = [piece for own in shares for piece in own.tensor_split(micro_batches)]
        wanted = dense_step(config, whole, plain, rows, places)
        wanted.backward()

        start = sum(len(own) for own in shares[: mesh.dp.rank()])
        mine = slice(start, start + len(shares[mesh.dp.rank()]))
        own = replace(whole, **{field: getattr(whole, field)[mine] for field in TENSORS})
        batches = [part(own, micro, micro_batches) for micro in range(micro_batches)]
        classes = METHOD.classifies(config)
        if classes:
            head.begin_step(own.labels, own.weights)
        total = torch.zeros((), dtype=torch.float64)
        for loss, _ in Oclear(config, towers, head if classes else None, mesh.dp).losses(batches):
            loss.backward()
            total += loss.detach()
        close(total, wanted, "loss")
        if classes:
            close(head.row_grad[1], rows.grad[head.start : head.stop], "rows' gradient")
        require_equal_gradients(towers, plain, mesh)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(
    ("world", "tensor_parallel", "micro_batches"),
    [(2, 1, 2), *(pytest.param(*x, marks=pytest.mark.full) for x in ((1, 1, 1), (3, 1, 1), (4, 2, 2), (2, 2, 1)))],
)
def test_a_step_equals_its_dense_statement(name: str, world: int, tensor_parallel: int, micro_batches: int) -> None:
    ranks(world).run(check_step, name, tensor_parallel, micro_batches, False)


@pytest.mark.full
@pytest.mark.parametrize("name", STEPS)
def test_a_rank_without_pairs_takes_part(name: str) -> None:
    ranks(3).run(check_step, name, 1, 1, True)


def test_hybrid_steps_read_pairs() -> None:
    assert METHOD.reads(STEPS["concept, classes and pairs"]).kind == "pairs"
    assert METHOD.reads(STEPS["sum, images alone"]).kind == "photos"


def summed(weights: tuple[float, float, float], equal_patches: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Documents with their own texts and with other ones, and the documents' image anchors, all of unit length."""
    torch.manual_seed(0)
    towers = OclearTowers(replace(SUM, fusion_weights=weights), PlainBuilder()).double().eval()
    batch = pairs()
    if equal_patches:
        patches, pooled = towers.vision(batch.document_images)
        towers.vision.forward = lambda images: (patches[:, :1].expand_as(patches), pooled)  # type: ignore[method-assign]
    images, other = batch.document_images, batch.document_tokens.where(batch.document_tokens == 0, 7)
    found = [towers.document(images, tokens)[0] for tokens in (batch.document_tokens, other)]
    return *(F.normalize(x, dim=-1) for x in found), F.normalize(towers.image_document(images), dim=-1)


@torch.no_grad()
def test_each_part_of_the_sum_sees_what_it_should() -> None:
    """The image no text; the steered average only through the choice of patches; the identity the text."""
    own, other, image = summed((2.0, 0.0, 0.0))
    close(own, image, "image")
    assert torch.equal(own, other)
    own, other, _ = summed((0.0, 1.0, 0.0))
    assert (own - other).abs().amax(1).min() > 1e-6
    own, other, _ = summed((0.0, 1.0, 0.0), equal_patches=True)  # nothing to choose from
    close(own, other, "steered")
    own, other, _ = summed((0.0, 0.0, 1.0))
    assert (own - other).abs().amax(1).min() > 1e-6
    images = pairs().document_images.flip(0)
    towers = OclearTowers(replace(SUM, fusion_weights=(0.0, 0.0, 1.0)), PlainBuilder()).double().eval()
    tokens = pairs().document_tokens
    assert torch.equal(towers.document(images, tokens)[0], towers.document(images.flip(0), tokens)[0])


@torch.no_grad()
def test_parts_of_weight_0_have_no_parameters_and_the_others_add_up() -> None:
    names = {name.split(".")[0] for name, _ in SumFusion(16, 16, 8, 3, 4, (1.0, 0.0, 0.0), 0.0).named_parameters()}
    assert not names
    fusion = SumFusion(16, 12, 8, 3, 4, (0.5, 2.0, 0.25), 0.0).double()
    image, patches, words = (torch.randn(5, *shape).double() for shape in ((16,), (4, 16), (3, 12)))
    transform = torch.nn.Linear(16, 8).double()
    nothing = torch.zeros(5, 1, 1, 3, dtype=torch.bool)
    vector = fusion(image, patches, words, nothing, transform)[0].vector
    steered = fusion.norm(fusion.patch_attention(fusion.text_attention(fusion.memory.expand(5, -1, -1), words)[0],
                                                 patches)[0]).mean(1)  # fmt: skip
    parts = zip(
        fusion.part_weights, (transform(image), transform(steered), fusion.identity(words.mean(1))), strict=True
    )
    close(vector, sum(weight * F.normalize(x, dim=-1) for weight, x in parts), "sum")


@pytest.mark.parametrize("config", [SUM, BASE], ids=["sum", "concept"])
def test_the_stop_keeps_fused_losses_off_the_image_tower(config: OclearConfig) -> None:
    """Photos and images alone train it; the vectors are the same; text, fusion and transforms learn as without it."""
    batch, found = pairs(), {}
    for stop in (False, True):
        torch.manual_seed(0)
        towers = OclearTowers(replace(config, fused_stop_gradient=stop), PlainBuilder()).double()
        queries, documents, _ = towers(batch.query_images, batch.document_images, batch.document_tokens, alone=True)
        tower = list(towers.vision.parameters())
        for name, x in (("photos", queries), ("fused", documents[:, 0]), ("alone", documents[:, 1])):
            grads = torch.autograd.grad(x.square().sum(), tower, retain_graph=True, allow_unused=True)
            total = sum(float(g.abs().sum()) for g in grads if g is not None)
            assert (total == 0) == (stop and name == "fused"), name
        rest = [p for name, p in towers.named_parameters() if not name.startswith(("vision.", "query_transform."))]
        learned = torch.autograd.grad(documents[:, 0].square().sum(), rest)
        found[stop] = [queries, documents, *learned]
    for number, (a, b) in enumerate(zip(found[False], found[True], strict=True)):
        close(a, b, f"tensor {number}")  # where fewer gradients are asked for, torch may add in another order


@pytest.mark.parametrize("config", [SUM, BASE], ids=["sum", "concept"])
def test_wrong_texts_are_never_left_out(config: OclearConfig) -> None:
    """Else the image alone, a right answer, would be a negative."""
    batch = pairs()
    towers = OclearTowers(replace(config, text_dropout=1.0), PlainBuilder()).double().train()
    seen = towers(batch.query_images, batch.document_images, batch.document_tokens, wrong_texts=True)[1]
    towers.eval()
    wanted = towers.document(batch.document_images, batch.document_tokens.roll(1, 0))[0]
    close(seen[:, 1], wanted, "wrong texts")
    own = towers.document(batch.document_images, batch.document_tokens)[0]
    assert (seen[:, 0] - own).abs().amax(1).min() > 1e-6, "its own text is left out"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"fusion_kind": "image"}, "no part of a document's vector"),
        ({"fusion_weights": (1.0, 0.0, 0.0)}, "no part of a document's vector"),
        ({}, None),
        ({"fusion_kind": "concat"}, None),
    ],
)
def test_wrong_texts_need_texts(change: dict[str, Any], error: str | None) -> None:
    errors = replace(SUM, wrong_texts=True, **change).errors(1)
    assert (not errors) if error is None else (len(errors) == 1 and error in errors[0])


def test_the_texts_own_vector_is_left_out_of_its_share() -> None:
    fusion = SumFusion(16, 16, 8, 2, 2, (1.0, 0.5, 0.5), text_dropout=0.3).train()
    n, seen = 2000, torch.zeros(2000, 1, 1, 3, dtype=torch.bool)
    inputs = torch.randn(n, 16), torch.randn(n, 4, 16), torch.randn(n, 3, 16), seen, torch.nn.Linear(16, 8)
    vector = fusion(*inputs)[0].vector
    kept = fusion.eval()(*inputs)[0].vector
    assert (vector == kept).all(1).double().mean().item() == pytest.approx(0.7, abs=0.05)


def test_weights_that_leave_nothing_are_named() -> None:
    assert "model.fusion_weights are all 0" in replace(SUM, fusion_weights=(0.0, 0.0, 0.0)).errors(1)[0]
