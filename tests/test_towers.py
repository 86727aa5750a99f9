"""Tensor- and data-parallel towers, fusion and head against the plain twin in one float64 process: forward and every
gradient.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.batch import TENSORS, Batch
from models.branch import BranchEnd
from models.fusion import ConceptFusion
from models.heads.class_parallel import ClassHeadConfig, ClassParallelHead
from models.oclear import Oclear, OclearConfig, OclearTowers
from models.plain.transformer import PlainBlock, PlainBuilder
from models.positions import rotary_angles, sine_cosine
from models.shape import TransformerShape, shape_errors
from models.text import TextConfig
from models.tp_state import merged_state_dict
from models.vision import VisionConfig
from models.vision_kinds import vision_tower
from tests.dense import dense_loss
from tests.pool import layout, ranks
from tests.twins import require_equal_gradients

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
OPTIONS = {}
OPTIONS["rotary, registers, gate, layer scale, head norms; post-norm text"] = OclearConfig(
    vision=VisionConfig(
        **{"image_size": 32, "patch_size": 8, "num_layers": 2, "hidden_size": 32, "pooling": "class"},
        **{"positions": "rotary", "register_tokens": 2, "activation": "swiglu", "ffn_hidden_size": 48},
        **{"layer_scale": 0.3, "qk_norm": True, "qkv_bias": False},
    ),
    text=TextConfig(
        **{"num_layers": 2, "hidden_size": 32, "vocab_size": 100, "max_length": 12, "post_norm": True},
        **{"token_types": 2, "position_offset": 2, "layernorm_eps": 1e-12},
    ),
    embedding_dim=16,
)
OPTIONS["fixed positions, class token, attention pooling; causal text"] = OclearConfig(
    vision=VisionConfig(
        **{"image_size": 32, "patch_size": 8, "num_layers": 1, "hidden_size": 32, "pooling": "attention"},
        **{"positions": "sincos", "class_token": True, "embedding_norm": True, "patch_bias": False},
        activation="quick_gelu",
    ),
    text=TextConfig(
        **{"num_layers": 2, "hidden_size": 32, "vocab_size": 100, "max_length": 12, "embedding_norm": False},
        **{"causal": True, "mask_padding": False, "activation": "gelu_tanh"},
    ),
    embedding_dim=16,
)
OPTIONS["EfficientNet-Lite"] = OclearConfig(
    vision=VisionConfig(
        kind="efficientnet_lite", width_factor=0.2, depth_factor=0.5, image_size=32, patch_size=32, hidden_size=32
    ),
    text=TextConfig(num_layers=1, hidden_size=32, vocab_size=100, max_length=12),
    embedding_dim=16,
)
COMPARED = {
    f"fusion by {kind}": replace(CONFIGS["patch stem, class token, shared transform"], fusion_kind=kind)
    for kind in ("concat", "image")
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
    cut = {name: getattr(batch, name).tensor_split(size)[rank] for name in TENSORS}
    return replace(batch, **cut)


def close(found: Tensor, wanted: Tensor, name: str, tolerance: float = 1e-10) -> None:
    error = (found - wanted).abs().max() if wanted.numel() else torch.tensor(0.0)
    assert error <= tolerance * max(1e-6, float(wanted.abs().max())), (
        f"{name}: {error:.3e} off of {wanted.abs().max():.3e}"
    )


def check_against_plain(name: str, tensor_parallel: int) -> None:
    from models.transformer import MegatronBuilder

    config = (CONFIGS | OPTIONS | COMPARED)[name]
    with layout(tensor_parallel) as mesh:
        torch.manual_seed(0)
        towers = OclearTowers(config, MegatronBuilder(mesh.groups)).double()
        plain = OclearTowers(config, PlainBuilder()).double()
        plain.load_state_dict(merged_state_dict(towers, mesh.tp))
        head = ClassParallelHead(HEAD, mesh.row_group, mesh.dp, dtype=torch.float64, copy_group=mesh.tp)
        rows = head.full_weight().clone().requires_grad_()

        whole = global_batch()
        own = part(whole, mesh.dp.rank(), mesh.dp.size())
        q, d, gate = towers(own.query_images, own.document_images, own.document_tokens)
        ((loss, _),) = Oclear(config, towers, head, mesh.dp).losses([own])
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
        require_equal_gradients(towers, plain, mesh)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("world", "tensor_parallel"),
    [(2, 2), (3, 1), (4, 2), *(pytest.param(*x, marks=pytest.mark.full) for x in ((1, 1), (2, 1), (4, 4), (4, 1)))],
)
def test_forward_and_gradients_equal_the_plain_twin(name: str, world: int, tensor_parallel: int) -> None:
    ranks(world).run(check_against_plain, name, tensor_parallel)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("world", [2, 4])
def test_options_equal_the_plain_twin(name: str, world: int) -> None:
    ranks(world).run(check_against_plain, name, world)


@pytest.mark.parametrize("name", COMPARED)
def test_fusions_for_comparison_equal_the_plain_twin(name: str) -> None:
    ranks(2).run(check_against_plain, name, 2)


@torch.no_grad()
@pytest.mark.parametrize("name", COMPARED)
def test_fusions_for_comparison_see_what_they_should(name: str) -> None:
    """Concatenation sees every word but no padding, the image only no word; both show a gate of 0."""
    torch.manual_seed(0)
    towers, batch = OclearTowers(COMPARED[name], PlainBuilder()).double().eval(), global_batch()
    vectors, gate = towers.document(batch.document_images, batch.document_tokens)
    assert gate.shape == (4,) and not gate.any()
    patches, pooled = towers.vision(batch.document_images)
    words, hidden = towers.text(batch.document_tokens), (batch.document_tokens == 0)[:, None, None, :]
    fused = towers.fusion(pooled, patches, words, hidden)
    assert fused.attention.shape == (4, 1, 16)
    if "image" in name:
        assert torch.equal(fused.vector, pooled)
    else:
        means = torch.stack([row[:length].mean(0) for row, length in zip(words, (12, 3, 7, 1), strict=True)])
        wanted = torch.cat([pooled, means], 1) @ towers.fusion.join.weight.T + towers.fusion.join.bias
        close(fused.vector, wanted, "concatenation")
    changed = batch.document_tokens.clone()
    changed[2, 6] = 50 + (changed[2, 6] == 50).long()  # the last word of seven
    moved = (towers.document(batch.document_images, changed)[0] - vectors).abs().amax(1)
    assert (moved[2] > 1e-6) == ("concat" in name) and not moved[[0, 1, 3]].any()
    shorter = towers.document(batch.document_images[1:], batch.document_tokens[1:, :7])[0]
    close(shorter, vectors[1:], "padding")
    assert not torch.equal(towers.document(batch.document_images.flip(0), batch.document_tokens)[0], vectors)


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


def test_any_tower_reads_other_resolutions_and_becomes_a_program() -> None:
    """Serving exports the query encoder with torch.export."""
    torch.manual_seed(0)
    for name, config in (CONFIGS | OPTIONS).items():
        tower, patch = vision_tower(config.vision, PlainBuilder()).eval(), config.vision.patch_size
        if not config.vision.stem_channels:
            patches, pooled = tower(torch.randn(2, 3, 5 * patch, 3 * patch))
            assert patches.shape == (2, 5 * 3, 32) and pooled.shape == (2, 32), name
        for side in (32,) if config.vision.stem_channels else (32, 6 * patch):
            images = torch.randn(3, 3, side, side)
            batch = torch.export.Dim("images", min=1)
            program = torch.export.export(tower, (torch.randn(2, 3, side, side),), dynamic_shapes=({0: batch},))
            torch.testing.assert_close(program.module()(images)[1], tower(images)[1], msg=name)


def test_positions_turn_with_the_image() -> None:
    """Rows and columns are told apart, and by the same measure: a transposed grid has transposed positions."""
    square, flat = sine_cosine(3, 3, 8, torch.zeros(1)), sine_cosine(2, 3, 8, torch.zeros(1))
    assert torch.equal(square[:6], flat)
    turned = square.unflatten(0, (3, 3)).transpose(0, 1).flatten(0, 1)
    assert torch.equal(torch.cat([turned[:, 4:], turned[:, :4]], 1), square) and len(square.unique(dim=0)) == 9
    angles = rotary_angles(2, 3, 2, 8, 100.0, torch.device("cpu"))[:, 0, 0]
    assert not angles[:2].any() and torch.equal(angles[2:5], -angles[5:].flip(0))


def dropped(rate: float) -> tuple[list[bool], bool, bool]:
    """In a pool: samples whose branches the last of three layers dropped; whether the first layer dropped any; whether
    evaluation did.
    """
    from models.transformer import MegatronBuilder

    shape = TransformerShape(num_layers=3, hidden_size=32, drop_path=rate)
    with layout(2) as mesh:
        torch.manual_seed(0)
        block = MegatronBuilder(mesh.groups).block(shape, final_norm=False)
        mesh.seed_streams(5, 1)
        hidden = torch.randn(1, 64, 32).expand(4, -1, -1).contiguous()

        def same(layer: int) -> Tensor:
            join = block.layers[layer].mlp_bda(block.training, False)
            joined = join((torch.ones_like(hidden), None), hidden, 0.0)
            return (joined == hidden).all(0).all(-1)

        last, first = same(2), same(0)
        block.eval()
        return last.tolist(), bool(first.any()), bool((block.layers[2].mlp_bda.join(hidden, hidden) == hidden).any())


def test_drop_path_drops_whole_samples_more_in_later_layers_alike_on_all_ranks() -> None:
    (last, first, evaluated), other = ranks(2).run(dropped, 0.5)
    assert last == other[0] and 16 < sum(last) < 48 and not first and not evaluated
    end = BranchEnd(TransformerShape(num_layers=2, drop_path=0.75), 1).train()
    torch.manual_seed(0)
    kept = end.join(torch.ones(1, 4000, 128), torch.zeros(1, 4000, 128))
    assert set(kept.unique().tolist()) == {0.0, 4.0} and float(kept.mean()) == pytest.approx(1.0, abs=0.1)


def test_what_does_not_fit_is_named() -> None:
    def errors(**fields: Any) -> list[str]:
        config = replace(VisionConfig(), **fields)
        return config.errors("model.vision") + shape_errors(config, 2, "model.vision")

    assert errors() == []
    assert (
        "num_attention_heads 3 does not divide over mesh.tensor_parallel 2"
        in errors(num_attention_heads=3, hidden_size=96)[0]
    )
    assert "class_position needs a class token" in errors(class_position=True)[0]
    assert "position_grid and model.vision.class_position need" in errors(positions="rotary", position_grid=7)[0]
    assert TextConfig().errors("model.text") == []
    assert "projection_dim needs a model.text.pooling" in TextConfig(projection_dim=8).errors("model.text")[0]
