"""Sequence parallelism and recomputation change memory, not results: outputs and all gradients equal the plain twin's
in float64.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.plain.transformer import PlainBuilder
from models.sequence import sum_partial_gradients
from models.shape import TransformerBuilder
from models.text import TextConfig, TextTower
from models.tp_state import merge_shards, merged_state_dict
from models.vision import VisionConfig, VisionTower
from tests.pool import layout, ranks

LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # (world, tensor parallel)
SHAPE: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
VISION = {
    "21 tokens: class, 4 registers, patches; rotary, gate, layer scale, head norms": VisionConfig(
        **SHAPE,
        **{"image_size": 32, "patch_size": 8, "pooling": "class", "positions": "rotary", "register_tokens": 4},
        **{"activation": "swiglu", "ffn_hidden_size": 48, "layer_scale": 0.3, "qk_norm": True, "key_bias": False},
    ),
    "9 tokens, attention pooling": VisionConfig(**SHAPE, image_size=24, patch_size=8, pooling="attention"),
}
TEXT = {
    "post-norm, padding hidden": TextConfig(**SHAPE, vocab_size=100, max_length=11, post_norm=True, token_types=2),
    "causal, padding seen": TextConfig(**SHAPE, vocab_size=100, max_length=11, causal=True, mask_padding=False),
}


class Towers(nn.Module):
    """One tower of each configuration, over the same images and texts."""

    def __init__(self, build: TransformerBuilder, changes: dict[str, Any] | None = None) -> None:
        super().__init__()
        vision = [VisionTower(replace(config, **changes or {}), build) for config in VISION.values()]
        text = [TextTower(replace(config, **changes or {}), build) for config in TEXT.values()]
        self.vision, self.text = nn.ModuleList(vision), nn.ModuleList(text)

    def forward(self, images: Tensor, tokens: Tensor) -> list[Tensor]:
        """All that the towers give for images [b, 3, 32, 32] and tokens [b, L]; the first tower twice, as methods with
        several inputs do.
        """
        found = []
        for tower in self.vision:
            side = tower.config.image_size
            found += tower(images[..., :side, :side])
        found.append(self.vision[0](images.flip(-1))[1])
        seen = (tokens != 0)[..., None]
        return found + [tower(tokens) * seen for tower in self.text]


def built(mesh: Any, sequence: bool, recompute: str, changes: dict[str, Any] | None = None) -> Towers:
    from models.transformer import MegatronBuilder

    mesh.seed_streams(7, 0)
    torch.manual_seed(0)
    return Towers(MegatronBuilder(mesh.groups, sequence_parallel=sequence, recompute=recompute), changes)


def inputs() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 32, 32, generator=g, dtype=torch.float64)
    tokens = torch.randint(5, 100, (4, 11), generator=g)
    for row, length in enumerate((11, 3, 7, 1)):
        tokens[row, length:] = 0
    return images, tokens


def weighted(outputs: list[Tensor], rank: int = 0, size: int = 1) -> Tensor:
    """A sum over the samples in which every output element counts differently; `outputs` are those of one of `size`
    equal parts of the batch.
    """
    total = torch.zeros((), dtype=torch.float64)
    for i, output in enumerate(outputs):
        weights = torch.randn(
            (size * len(output), *output.shape[1:]), generator=torch.Generator().manual_seed(i), dtype=torch.float64
        )
        total = total + (weights.chunk(size)[rank] * output).sum()
    return total


def off(found: Tensor, wanted: Tensor, least: float = 1e-6) -> float:
    return float((found - wanted).abs().max()) / max(least, float(wanted.abs().max()))


def check_against_plain(tensor_parallel: int, ways: list[tuple[bool, str]]) -> None:
    with layout(tensor_parallel) as mesh:
        plain = Towers(PlainBuilder()).double()
        plain.load_state_dict(merged_state_dict(built(mesh, False, "none").double(), mesh.tp))
        images, tokens = inputs()
        images.requires_grad_()
        wanted = plain(images, tokens)
        weighted(wanted).backward()
        reference = dict(plain.named_parameters())
        largest = max(float(p.grad.abs().max()) for p in reference.values())
        rank, size = mesh.dp.rank(), mesh.dp.size()
        for sequence, recompute in ways:
            towers, way = built(mesh, sequence, recompute).double(), f"{sequence=} {recompute=}"
            own = images.detach().chunk(size)[rank].clone().requires_grad_()
            outputs = towers(own, tokens.chunk(size)[rank])
            weighted(outputs, rank, size).backward()
            sum_partial_gradients(towers, mesh.tp)
            for i, (output, whole) in enumerate(zip(outputs, wanted, strict=True)):
                assert off(output, whole.chunk(size)[rank]) < 1e-10, f"{way}: output {i}"
            assert off(own.grad, images.grad.chunk(size)[rank]) < 1e-10, f"{way}: gradient of the images"
            for name, parameter in towers.named_parameters():
                grad = parameter.grad.clone()
                dist.all_reduce(grad, group=mesh.dp)
                error = off(merge_shards(grad, parameter, mesh.tp), reference[name].grad, 1e-3 * largest)
                assert error < 1e-10, f"{way}: gradient of {name}: {error:.1e}"


@pytest.mark.parametrize(("world", "tensor_parallel"), LAYOUTS)
def test_outputs_and_all_gradients_equal_the_plain_twin(world: int, tensor_parallel: int) -> None:
    """Every layout x sequence parallelism x recomputation; the selective one, which no data-parallel rank sees, at one
    layout of each kind.
    """
    ways = [(sequence, recompute) for sequence in {False, tensor_parallel > 1} for recompute in ("none", "full")]
    ways += [(tensor_parallel > 1, "selective")] if world < 4 else []
    ranks(world).run(check_against_plain, tensor_parallel, ways)


DROPPING = {"dropout": 0.1, "attention_dropout": 0.2, "drop_path": 0.3}


def one_pass(mesh: Any, sequence: bool, recompute: str) -> list[Tensor]:
    """Loss and all gradients of one pass in training, float32, and the next random numbers of torch and of the tracked
    stream.
    """
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    towers = built(mesh, sequence, recompute, DROPPING)
    mesh.seed_streams(3, 5)
    images, tokens = inputs()
    loss = weighted(towers(images.float(), tokens))
    loss.backward()
    sum_partial_gradients(towers, mesh.tp)
    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(3)
    return [loss.detach(), *(p.grad for p in towers.parameters()), torch.rand(3), tracked]


def check_same_bits(tensor_parallel: int) -> None:
    with layout(tensor_parallel) as mesh:
        for sequence in {False, tensor_parallel > 1}:
            first = one_pass(mesh, sequence, "none")
            for recompute in ("none", "selective", "full"):
                again = one_pass(mesh, sequence, recompute)
                assert all(map(torch.equal, first, again)), f"{sequence=} {recompute=}"


@pytest.mark.parametrize(
    ("world", "tensor_parallel"), [(2, 2), *(pytest.param(*x, marks=pytest.mark.full) for x in ((1, 1), (4, 2)))]
)
def test_two_passes_are_bit_equal_with_dropout_and_however_much_is_recomputed(world: int, tensor_parallel: int) -> None:
    ranks(world).run(check_same_bits, tensor_parallel)


def kept_tensors(recompute: str) -> int:
    """In a pool of one: elements of tensors that forward keeps for backward, other than parameters."""
    with layout() as mesh:
        towers = built(mesh, False, recompute, {"num_layers": 6})
        own, kept = {p.data_ptr() for p in towers.parameters()}, {}

        def note(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in own:
                kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        images, tokens = inputs()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            outputs = towers(images.float(), tokens)
        assert outputs[0].requires_grad
        return sum(kept.values())


def test_recomputation_keeps_less() -> None:
    none, selective, full = (ranks(1).run(kept_tensors, recompute)[0] for recompute in ("none", "selective", "full"))
    assert full < selective < none and full < 0.5 * none


def dropped(rates: dict[str, float]) -> Tensor:
    """In a pool of one tensor-parallel group: what a sequence-parallel block makes of 4 tokens that are all alike [4,
    64, 32].
    """
    from models.transformer import MegatronBuilder

    with layout(dist.get_world_size()) as mesh:
        torch.manual_seed(0)
        builder = MegatronBuilder(mesh.groups, sequence_parallel=True)
        block = builder.block(VisionConfig(**SHAPE, **rates), final_norm=False)
        mesh.seed_streams(2, 1)
        return block(torch.randn(1, 64, 32).expand(4, -1, -1).contiguous(), None).detach()


def test_drop_path_drops_a_sample_on_all_ranks_and_dropout_differs_between_their_tokens() -> None:
    first, second = ranks(2).run(dropped, {"drop_path": 0.5})
    assert torch.equal(first, second)
    torch.testing.assert_close(first, first[:1].expand_as(first), msg="a sample was dropped on one rank only")
    first, _ = ranks(2).run(dropped, {"dropout": 0.5})
    assert (first[0] != first[2]).any(-1).all(), "both ranks dropped the same channels"


def check_mappings() -> None:
    """The mappings that the towers stand on, forward and backward, against what they mean for the sum of all ranks'
    losses.
    """
    from megatron.core import tensor_parallel as tp

    with layout(dist.get_world_size()) as mesh:
        size, rank, group = mesh.tp.size(), mesh.tp.rank(), mesh.tp
        drawn = torch.randn(3, size, 2 * size, 3 * size, generator=torch.Generator().manual_seed(0))
        whole, own, upstream = (
            drawn.double()
        )  # of which `own` and `upstream` [size, 2 size, 3 size] hold a tensor of every rank
        whole = whole[0]
        mean_grad = upstream.sum(0)
        rows = upstream[:, :2]  # gradients of a range of the tokens, one of each rank
        columns = upstream[:, :, :3]

        def check(mapping: Any, x: Tensor, grad: Tensor, forward: Tensor, backward: Tensor) -> None:
            x = x.clone().requires_grad_()
            y = mapping(x.clone(), group=group)
            assert torch.allclose(y, forward, atol=1e-12, rtol=0), f"{mapping} forward"
            y.backward(grad.clone())  # some add up in place
            assert torch.allclose(x.grad, backward, atol=1e-12, rtol=0), f"{mapping} backward"

        def cut(x: Tensor, dim: int) -> Tensor:
            return x.chunk(size, dim)[rank]

        def gather_replicated(x: Tensor, group: Any) -> Tensor:
            return tp.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=group)

        mine = upstream[rank]
        check(tp.copy_to_tensor_model_parallel_region, whole, mine, whole, mean_grad)
        check(tp.reduce_from_tensor_model_parallel_region, own[rank], whole, own.sum(0), whole)
        check(
            tp.scatter_to_tensor_model_parallel_region, whole, columns[rank], cut(whole, 1), torch.cat(list(columns), 1)
        )
        check(tp.gather_from_tensor_model_parallel_region, cut(own[0], 1), whole, own[0], cut(whole, 1))
        check(tp.scatter_to_sequence_parallel_region, whole, rows[rank], cut(whole, 0), torch.cat(list(rows)))
        check(tp.gather_from_sequence_parallel_region, cut(own[0], 0), mine, own[0], cut(mean_grad, 0))
        check(gather_replicated, cut(own[0], 0), whole, own[0], cut(whole, 0))
        check(
            tp.reduce_scatter_to_sequence_parallel_region,
            own[rank],
            rows[rank],
            cut(own.sum(0), 0),
            torch.cat(list(rows)),
        )


@pytest.mark.parametrize("world", [2, 4])
def test_mappings_forward_and_backward(world: int) -> None:
    ranks(world).run(check_mappings)


RATE = 1e-2
CLIP = 0.5


def check_updates(tensor_parallel: int, sequence: bool) -> None:
    from harness.train.optimizer import TowerOptimizer
    from harness.train.schedule import OptimizerConfig

    with layout(tensor_parallel) as mesh:
        towers = built(mesh, sequence, "none")
        plain = Towers(PlainBuilder())
        plain.load_state_dict(merged_state_dict(towers, mesh.tp))
        config = OptimizerConfig(lr=RATE, weight_decay=0.1, eps=1e-3, betas=(0.9, 0.98))
        sharded = TowerOptimizer(towers, config, mesh)
        matrices = [p for p in plain.parameters() if p.dim() > 1]
        vectors = [p for p in plain.parameters() if p.dim() == 1]
        dense = torch.optim.AdamW(
            [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
            lr=RATE,
            weight_decay=0.1,
            eps=1e-3,
            betas=(0.9, 0.98),
        )
        before = [p.detach().clone() for p in plain.parameters()]
        images, tokens = inputs()
        rank, size = mesh.dp.rank(), mesh.dp.size()
        for _ in range(3):
            sharded.zero_grad()
            loss = weighted(towers(images.float().chunk(size)[rank], tokens.chunk(size)[rank]), rank, size) / 1000
            loss.backward()
            sharded.reduce()
            norm = mesh.sum(sharded.squared_norm()).sqrt()
            sharded.scale(CLIP / norm)
            sharded.step(RATE)
            dense.zero_grad()
            (weighted(plain(images.float(), tokens)) / 1000).backward()
            wanted = torch.nn.utils.clip_grad_norm_(plain.parameters(), CLIP)
            assert wanted > CLIP and abs(norm / wanted - 1) < 1e-4, f"norm {norm}, dense {wanted}"
            dense.step()
        found = merged_state_dict(towers, mesh.tp)
        for (name, parameter), old in zip(plain.named_parameters(), before, strict=True):
            moved = float((parameter - old).abs().max())
            assert moved > 0 and float((found[name] - parameter).abs().max()) < 1e-3 * max(moved, RATE), name


@pytest.mark.parametrize(
    ("world", "tensor_parallel", "sequence"), [(2, 1, False), (2, 2, True), (4, 2, False), (4, 2, True)]
)
def test_sharded_clipped_adamw_equals_the_plain_one(world: int, tensor_parallel: int, sequence: bool) -> None:
    ranks(world).run(check_updates, tensor_parallel, sequence)


def check_state_of_torch_adamw(folder: Path) -> None:
    """Errors of megatron-core's distributed optimizer on top of torch's AdamW, fixed in harness/train/optimizer.py."""
    from harness.train import checkpoint
    from harness.train.checkpoint_files import Keep
    from harness.train.optimizer import TowerOptimizer
    from harness.train.schedule import OptimizerConfig

    with layout(2) as mesh:
        images, tokens = inputs()

        def made(seed: int) -> tuple[nn.Module, Any]:
            torch.manual_seed(seed)
            towers = built(mesh, False, "none")
            with torch.no_grad():
                for p in towers.parameters():
                    p += 0.01 * seed
            return towers, TowerOptimizer(towers, OptimizerConfig(lr=RATE), mesh)

        def update(towers: nn.Module, optimizer: Any) -> None:
            optimizer.zero_grad()
            weighted(towers(images.float(), tokens)).backward()
            optimizer.reduce()
            optimizer.step(RATE)

        def steps(optimizer: Any) -> list[Tensor]:
            return [entry["step"] for part in optimizer._parts for entry in part.optimizer.state.values()]

        (folder / "classes").touch()
        first, optimizer = made(0)
        optimizer.optimizer.state_dict()  # of a fresh one: stock asserts that there is one step
        update(first, optimizer)
        update(first, optimizer)
        parts = checkpoint.Trainable(first, None, optimizer, None)
        saved = checkpoint.save(folder, 2, parts, {}, folder / "classes", mesh, Keep(1))
        second, resumed = made(1)
        # Stock: KeyError 'step'; then an in-place write to a leaf.
        checkpoint.load(saved, checkpoint.Trainable(second, None, resumed, None), mesh)
        counts = steps(resumed)
        assert len({count.data_ptr() for count in counts}) == len(counts) > 10, "parameters share their count of steps"
        for towers, o in ((first, optimizer), (second, resumed)):
            update(towers, o)
            update(towers, o)
        assert {float(count) for count in steps(resumed)} == {4.0}
        for (name, wanted), found in zip(first.named_parameters(), second.parameters(), strict=True):
            assert torch.equal(wanted, found), name


def test_the_distributed_optimizer_without_transformer_engine_is_saved_loaded_and_counts_its_steps(
    tmp_path: Path,
) -> None:
    ranks(2).run(check_state_of_torch_adamw, tmp_path)
