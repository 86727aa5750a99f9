"""Tensor- and data-parallel towers, fusion and head against the plain twin in one float64 process: forward and every gradient."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.batch import Batch
from models.fusion import ConceptFusion
from models.heads.class_parallel import ClassHeadConfig, ClassParallelHead
from models.merge import merge_shards, merged_state_dict
from models.oclear import Oclear, OclearConfig, OclearTowers
from models.plain.transformer import PlainBlock, PlainBuilder
from models.shape import TransformerShape
from models.text import TextConfig
from models.vision import VisionConfig
from tests.dense import dense_loss
from tests.pool import layout, ranks

CONV = VisionConfig(
    image_size=32, patch_size=8, num_layers=2, hidden_size=32, stem_channels=(8, 16, 32), stem_blocks=(0, 1, 1)
)
CONFIGS = {
    "conv stem, mean": OclearConfig(
        vision=CONV, text=TextConfig(num_layers=2, hidden_size=48, vocab_size=100, max_length=12), embedding_dim=16
    ),
    "patch stem, class token, shared transform": OclearConfig(
        vision=VisionConfig(image_size=32, patch_size=8, num_layers=2, hidden_size=32, pooling="class"),
        text=TextConfig(num_layers=1, hidden_size=32, vocab_size=100, max_length=12),
        embedding_dim=16,
        separate_transforms=False,
    ),
    "conv stem, mean and maximum": OclearConfig(
        vision=replace(CONV, pooling="mean_max", branch_init=0.1, num_layers=1),
        text=TextConfig(num_layers=1, hidden_size=32, vocab_size=100, max_length=12),
        embedding_dim=16,
    ),
}
CLASSES = 7
HEAD = ClassHeadConfig(num_classes=CLASSES, embedding_dim=16, scale=12.0, margin=(1.0, 0.0, 0.2))


def global_batch(queries: int = 5, documents: int = 4) -> Batch:
    g = torch.Generator().manual_seed(3)
    tokens = torch.randint(5, 100, (documents, 12), generator=g)
    for row, length in enumerate((12, 3, 7, 1)):
        tokens[row, length:] = 0
    return Batch(
        torch.randn(queries, 3, 32, 32, generator=g, dtype=torch.float64),
        torch.tensor([0, 6, 3, 3, 1])[:queries],
        torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0])[:queries],
        torch.arange(queries),
        torch.randn(documents, 3, 32, 32, generator=g, dtype=torch.float64),
        tokens,
        torch.tensor([6, 3, 2, 0])[:documents],
        torch.ones(documents),
        torch.arange(documents),
    )


def part(batch: Batch, rank: int, size: int) -> Batch:
    cut = {name: value.tensor_split(size)[rank] for name, value in vars(batch).items()}
    return replace(batch, **cut)


def close(found: Tensor, wanted: Tensor, name: str, tolerance: float = 1e-10) -> None:
    error = (found - wanted).abs().max() if wanted.numel() else torch.tensor(0.0)
    assert error <= tolerance * max(1e-6, float(wanted.abs().max())), (
        f"{name}: {error:.3e} off of {wanted.abs().max():.3e}"
    )


def check_against_plain(name: str, tensor_parallel: int) -> None:
    from models.transformer import MegatronBuilder

    config = CONFIGS[name]
    with layout(tensor_parallel) as mesh:
        torch.manual_seed(0)
        towers = OclearTowers(config, MegatronBuilder(mesh.groups)).double()
        plain = OclearTowers(config, PlainBuilder()).double()
        plain.load_state_dict(merged_state_dict(towers, mesh.tp))
        head = ClassParallelHead(HEAD, mesh.row_group, mesh.dp, dtype=torch.float64)
        rows = head.full_weight().clone().requires_grad_()

        whole = global_batch()
        own = part(whole, mesh.dp.rank(), mesh.dp.size())
        q, d, gate = towers(own.query_images, own.document_images, own.document_tokens)
        loss, _ = Oclear(config, towers, head, mesh.dp).loss(own)
        loss.backward()

        pq, pd, pgate = plain(whole.query_images, whole.document_images, whole.document_tokens)
        wanted = dense_loss(torch.cat([pq, pd]), rows, whole.labels, whole.weights.double(), HEAD)
        wanted.backward()

        mine = mesh.dp.rank()
        close(q, pq.tensor_split(mesh.dp.size())[mine], "query embeddings")
        close(d, pd.tensor_split(mesh.dp.size())[mine], "document embeddings")
        close(gate, pgate.tensor_split(mesh.dp.size())[mine], "gate")
        close(loss, wanted, "loss")
        close(head.row_grad[1], rows.grad[head.start : head.stop], "rows' gradient")
        reference = dict(plain.named_parameters())
        largest = max(float(p.grad.abs().max()) for p in reference.values())
        for key, parameter in towers.named_parameters():
            grad = parameter.grad.clone()
            torch.distributed.all_reduce(grad, group=mesh.dp)
            error = (merge_shards(grad, parameter, mesh.tp) - reference[key].grad).abs().max()
            assert error <= 1e-10 * max(1e-3 * largest, float(reference[key].grad.abs().max())), f"{key}: {error:.3e}"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("world", "tensor_parallel"), [(1, 1), (2, 2), (2, 1), (3, 1), (4, 2), (4, 4), (4, 1)])
def test_forward_and_gradients_equal_the_plain_twin(name: str, world: int, tensor_parallel: int) -> None:
    ranks(world).run(check_against_plain, name, tensor_parallel)


def test_vision_attention_is_not_causal() -> None:
    """The stock local ViT spec of megatron-core is: then the first patch could not see the last."""
    ranks(2).run(check_not_causal)


def check_not_causal() -> None:
    from models.transformer import MegatronBuilder

    with layout(2) as mesh:
        torch.manual_seed(0)
        block = MegatronBuilder(mesh.groups).block(TransformerShape(num_layers=1, hidden_size=32))
        hidden = torch.randn(6, 2, 32)
        changed = hidden.clone()
        changed[-1] += torch.randn(32)
        difference = (block(hidden, None) - block(changed, None)).abs().amax(-1)
        assert (difference[0] > 1e-6).all(), "the first token does not see the last"


def test_padding_is_not_seen() -> None:
    torch.manual_seed(0)
    block = PlainBlock(TransformerShape(num_layers=2, hidden_size=32)).eval()
    hidden, mask = torch.randn(6, 2, 32), torch.zeros(2, 1, 1, 6, dtype=torch.bool)
    mask[:, :, :, 4:] = True
    changed = hidden.clone()
    changed[4:] = 100.0
    torch.testing.assert_close(block(hidden, mask)[:4], block(changed, mask)[:4])


def test_changing_the_text_changes_the_attention_over_patches() -> None:
    torch.manual_seed(0)
    config = CONFIGS["conv stem, mean"]
    towers = OclearTowers(config, PlainBuilder()).eval()
    batch = global_batch()
    patches, pooled = towers.vision(batch.document_images.float())
    hidden = batch.document_tokens == 0

    def fuse(tokens: Tensor) -> tuple[Tensor, Tensor]:
        fused = towers.fusion(pooled, patches, towers.text(tokens), hidden[:, None, None, :])
        return fused.attention, fused.gate

    attention, gate = fuse(batch.document_tokens)
    assert attention.shape == (4, config.concept_slots, 16) and config.concept_slots >= 8
    torch.testing.assert_close(attention.sum(-1), torch.ones(4, 8))
    assert ((gate > 0) & (gate < 1)).all()
    other = batch.document_tokens.clone()
    other[0, :5] = torch.tensor([2, 50, 51, 52, 3])
    moved = (fuse(other)[0] - attention).abs().amax((1, 2))
    assert moved[0] > 1e-6, "the text does not reach the attention over patches"
    assert moved[1:].max() == 0, "another document's text does"


def test_no_batch_norm_and_a_sample_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    towers = OclearTowers(CONFIGS["conv stem, mean"], PlainBuilder()).double()
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in towers.modules())
    images = global_batch().query_images
    torch.testing.assert_close(towers.query(images)[2:3], towers.query(images[2:3]), rtol=1e-12, atol=1e-12)


def branch_weights(shape: TransformerShape) -> tuple[list[float], list[float]]:
    """In a pool: standard deviations of the weights that end a branch, and of the others."""
    from models.transformer import MegatronBuilder

    with layout() as mesh:
        torch.manual_seed(0)
        block = MegatronBuilder(mesh.groups).block(shape)
        named = {name: p.std().item() for name, p in block.named_parameters() if p.dim() == 2}
    ends = [std for name, std in named.items() if name.endswith(("linear_proj.weight", "linear_fc2.weight"))]
    return ends, [std for name, std in named.items() if name.endswith(("linear_qkv.weight", "linear_fc1.weight"))]


def test_branch_init_scales_what_ends_a_branch_alone() -> None:
    shape = TransformerShape(num_layers=2, hidden_size=32)
    (ends, others), (small, same) = (
        ranks(1).run(branch_weights, replace(shape, branch_init=factor))[0] for factor in (1.0, 0.1)
    )
    assert small == pytest.approx([0.1 * std for std in ends], rel=1e-5) and len(ends) == 4
    assert same == others


def test_text_dropout_leaves_out_text_in_training_alone() -> None:
    """All of it left out, a document is its image and its text learns nothing; evaluation sees the text again."""
    torch.manual_seed(0)
    config = replace(CONFIGS["conv stem, mean"], text_dropout=1.0, gate_init=0.1, transform_dropout=0.0)
    towers = OclearTowers(config, PlainBuilder()).double()
    batch = global_batch()
    towers.train()
    documents, gate = towers.document(batch.document_images, batch.document_tokens)
    image_alone = towers.document_transform(towers.vision(batch.document_images)[1])
    torch.testing.assert_close(documents, image_alone, rtol=0, atol=1e-12)
    documents.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in towers.text.parameters())
    torch.manual_seed(0)
    even = OclearTowers(replace(config, gate_init=0.5), PlainBuilder()).double()
    _, half = even.document(batch.document_images, batch.document_tokens)
    torch.testing.assert_close(gate.logit() - half.logit(), torch.full_like(gate, math.log(0.1 / 0.9)))
    towers.eval()
    assert (towers.document(batch.document_images, batch.document_tokens)[0] - image_alone).abs().max() > 1e-3


def test_text_dropout_leaves_out_its_share() -> None:
    fusion = ConceptFusion(16, 16, slots=2, heads=2, text_dropout=0.3).train()
    n = 2000
    image, patches, words = torch.randn(n, 16), torch.randn(n, 4, 16), torch.randn(n, 3, 16)
    vector = fusion(image, patches, words, torch.zeros(n, 1, 1, 3, dtype=torch.bool)).vector
    assert (vector == image).all(1).double().mean().item() == pytest.approx(0.3, abs=0.05)


def left_out(seed: int) -> list[bool]:
    """In a pool of one tensor-parallel pair: documents of which this rank leaves out the text in a step."""
    with layout(2) as mesh:
        mesh.seed_streams(seed, 3)
        fusion = ConceptFusion(16, 16, slots=2, heads=2, text_dropout=0.5).train()
        mesh.seed_streams(seed, 4)
        image, patches, words = torch.ones(64, 16), torch.ones(64, 4, 16), torch.ones(64, 3, 16)
        vector = fusion(image, patches, words, torch.zeros(64, 1, 1, 3, dtype=torch.bool)).vector
        return (vector == image).all(1).tolist()


def test_tensor_parallel_ranks_leave_out_the_same_texts() -> None:
    """They hold shares of one model: with different texts their sums would mix two documents."""
    first, second = ranks(2).run(left_out, 1)
    assert first == second and 0 < sum(first) < 64
    assert ranks(2).run(left_out, 2)[0] != first
