"""Compiled blocks: the initial weights of megatron-core's, the same outputs and gradients as uncompiled, whole graphs
and few of them.

Backend aot_eager traces and differentiates as inductor does, then runs the graph as it is, random numbers included:
results are equal to the bit.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from harness.core import build as building
from harness.core.errors import UserError
from harness.core.mesh import Mesh, MeshConfig
from models.item import ItemConfig, ItemTowers, PatchConfig, StreamConfig
from models.make import MakeConfig, MakeTowers
from models.oclear import OclearConfig, OclearTowers
from models.plain.transformer import PlainBlock, PlainBuilder
from models.shape import TransformerBuilder, TransformerShape
from models.text import TextConfig
from models.vision import VisionConfig
from tests import test_layouts, test_parallel
from tests.pool import layout, ranks
from tests.runs import tiny_config

SMALL: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
VISION: dict[str, Any] = {"image_size": 32, "patch_size": 8}
TOWERS: dict[str, Any] = {
    "oclear": (
        OclearTowers,
        OclearConfig(
            vision=VisionConfig(**SMALL, **VISION, branch_init=0.1, layer_scale=0.3, qk_norm=True, key_bias=False),
            text=TextConfig(**SMALL, vocab_size=100, post_norm=True),
        ),
    ),
    "make": (
        MakeTowers,
        MakeConfig(
            vision=VisionConfig(**SMALL, **VISION, activation="swiglu", ffn_hidden_size=48, qkv_bias=False),
            text=TextConfig(**SMALL, vocab_size=100, pooling="class"),
            fusion=TransformerShape(**SMALL),
        ),
    ),
    "item": (ItemTowers, ItemConfig(vision=PatchConfig(**VISION), text=StreamConfig(**SMALL, vocab_size=100))),
}


def initial(name: str, plain: bool) -> tuple[dict[str, Tensor], Tensor]:
    """In a pool of one: the initial weights, and the generator's next number."""
    from models.transformer import MegatronBuilder

    kind, config = TOWERS[name]
    with layout() as mesh:
        torch.manual_seed(5)
        made = kind(config, PlainBuilder(backend="aot_eager") if plain else MegatronBuilder(mesh.groups))
        return {key: value.detach() for key, value in made.named_parameters()}, torch.rand(1)


@pytest.mark.parametrize("name", TOWERS)
def test_plain_blocks_start_from_megatron_cores_weights(name: str) -> None:
    (wanted, follows), (found, then) = (ranks(1).run(initial, name, plain)[0] for plain in (False, True))
    assert found.keys() == wanted.keys() and torch.equal(then, follows)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


# what is recomputed -> (shape, graphs with a mask or without)
FEATURES: dict[str, tuple[dict[str, Any], int]] = {
    "selective": ({"dropout": 0.1, "attention_dropout": 0.2}, 1),
    # the first layer drops no sample, the others do, each at a rate of its own
    "full": ({"num_layers": 3, "drop_path": 0.5, "layer_scale": 0.3, "qk_norm": True, "key_bias": False}, 2),
    "none": ({"post_norm": True, "activation": "swiglu", "ffn_hidden_size": 48}, 1),
}


def passed(block: nn.Module, tokens: int, samples: int, masked: bool, rotary: bool) -> list[Tensor]:
    """Output and all gradients of one pass on drawn inputs."""
    g = torch.Generator().manual_seed(tokens * samples)
    hidden = torch.randn(tokens, samples, 32, generator=g, dtype=torch.float64).requires_grad_()
    mask = torch.zeros(samples, 1, 1, tokens, dtype=torch.bool)
    mask[..., tokens - 2 :] = True
    angles = torch.rand(tokens, 1, 1, 8, generator=g, dtype=torch.float64) if rotary else None
    torch.manual_seed(5)
    block.zero_grad()
    out = block(hidden, mask if masked else None, rotary_pos_emb=angles)
    (out * torch.arange(32)).sum().backward()
    grads = [p.grad if p.grad is not None else torch.zeros(0) for p in block.parameters()]
    return [out.detach(), hidden.grad, *grads]


@pytest.mark.parametrize("recompute", FEATURES)
def test_compiled_equals_uncompiled_in_one_graph_for_all_sizes(recompute: str) -> None:
    """Layers share a graph, whatever their drop rate, and so do all numbers of tokens and samples; 1 and 0 samples make
    none of their own.
    """
    features, graphs = FEATURES[recompute]
    torch._dynamo.reset()
    counters.clear()
    blocks = []
    for backend in ("", "aot_eager"):
        torch.manual_seed(0)
        blocks.append(
            PlainBlock(TransformerShape(**{**SMALL, **features}), recompute=recompute, backend=backend).double()
        )
    for tokens, samples, masked in ((8, 4, True), (16, 4, False), (8, 8, True), (24, 3, True), (5, 2, False)):
        plain, compiled = (passed(block, tokens, samples, masked, False) for block in blocks)
        assert all(map(torch.equal, compiled, plain)), f"{tokens} tokens of {samples} samples, {masked=}"
    assert counters["stats"]["unique_graphs"] == 2 * graphs, "graphs with and without a mask"
    for samples in (1, 0):
        out, grad, *_ = passed(blocks[1], 8, samples, True, False)
        assert out.shape == grad.shape == (8, samples, 32)
    assert counters["stats"]["unique_graphs"] == 2 * graphs and not counters["graph_break"]


def test_rotary_frozen_layers_and_evaluation() -> None:
    shape = TransformerShape(**SMALL, dropout=0.1)
    torch._dynamo.reset()
    blocks = []
    for backend in ("", "aot_eager"):
        torch.manual_seed(0)
        blocks.append(PlainBlock(shape, backend=backend).double())
        blocks[-1].layers[0].requires_grad_(False)
        blocks[-1].layers[1].mlp.requires_grad_(False)
    for _ in ("training", "evaluation"):
        for samples in (3, 4, 1, 0):
            plain, compiled = (passed(block, 9, samples, True, True) for block in blocks)
            dropped = blocks[0].training and samples < 2  # the samples that fill up take random numbers
            assert dropped or all(map(torch.equal, compiled, plain)), samples
        for block in blocks:
            block.eval()


def fused(tensor_parallel: int, sequence: bool, recompute: str) -> tuple[bool, int, int]:
    """In a pool: whether a pass in training with fused epilogues equals one without to the bit; graphs and breaks."""
    from models.transformer import MegatronBuilder

    def one_pass(backend: str) -> list[Tensor]:
        def built(mesh: Any, sequence: bool, recompute: str, changes: Any) -> nn.Module:
            mesh.seed_streams(7, 0)
            torch.manual_seed(0)
            build = MegatronBuilder(mesh.groups, sequence_parallel=sequence, recompute=recompute, backend=backend)
            return test_parallel.Towers(build, changes)

        with mock.patch.object(test_parallel, "built", built):
            return test_parallel.one_pass(mesh, sequence, recompute)

    with layout(tensor_parallel) as mesh:
        torch._dynamo.reset()
        counters.clear()
        plain, compiled = one_pass(""), one_pass("aot_eager")
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        return all(map(torch.equal, plain, compiled)), graphs, breaks


@pytest.mark.parametrize(("sequence", "recompute"), [(False, "full"), (True, "none")])
def test_fused_epilogues_of_tensor_parallel_blocks_equal_the_separate_operations(
    sequence: bool, recompute: str
) -> None:
    for equal, graphs, breaks in ranks(2).run(fused, 2, sequence, recompute):
        assert equal and not breaks and 0 < graphs <= 12


def compiled_run(*args: Any) -> Any:
    """In a pool: a function of tests.test_layouts whose trainers have compiled plain blocks."""
    function, *rest = args

    def plain(mesh: Mesh) -> TransformerBuilder:
        return PlainBuilder(backend="aot_eager")

    with mock.patch.object(building, "builder", plain):
        return getattr(test_layouts, function)(*rest)


def test_checkpoints_of_compiled_and_of_tensor_parallel_blocks_are_the_same(catalogue: Path, tmp_path: Path) -> None:
    """Saved by one compiled rank, loaded by two tensor-parallel ones and back: all state equal, and the next losses to
    1e-5.
    """
    settings = test_layouts.SETTINGS
    run = tmp_path / "run"
    ranks(1).run(compiled_run, "seed_and_train", catalogue, run, settings, 1, 3)
    saved = ranks(1).run(compiled_run, "states", catalogue, run, settings, 1)[0]
    loaded = ranks(2).run(test_layouts.states, catalogue, run, settings, 2)[0]
    for key in set(saved) - {"moments"}:
        test_layouts.same(loaded[key], saved[key], key)
    onward = ranks(1).run(compiled_run, "losses", catalogue, test_layouts.copy(run, tmp_path / "a"), settings, 1, 5)[0]
    other = ranks(2).run(test_layouts.losses, catalogue, run, settings, 2, 5, True)[0]
    assert [loss for loss, _ in other] == pytest.approx([loss for loss, _ in onward], rel=1e-5)
    back = ranks(1).run(compiled_run, "states", catalogue, run, settings, 1)[0]
    there = ranks(2).run(test_layouts.states, catalogue, run, settings, 2)[0]
    for key in set(there) - {"moments"}:
        test_layouts.same(back[key], there[key], key)


def chosen() -> dict[str, tuple[str, str]]:
    """In a pool of one tensor-parallel group: the builder that each mesh.compile takes, and its backend. None compiles
    before it is called.
    """
    size, found = torch.distributed.get_world_size(), {}
    with layout(size) as mesh:
        counters.clear()
        for choice in ("auto", "always", "never"):
            mesh.config = MeshConfig(tensor_parallel=size, compile=choice)
            made: Any = building.builder(mesh)
            block = made.block(TransformerShape(**SMALL))
            if not made.backend:
                block(torch.zeros(4, 2, 32), None)
            found[choice] = type(made).__name__, made.backend
        assert not counters["stats"]["unique_graphs"]
    return found


@pytest.mark.skipif(not shutil.which("g++"), reason="mesh.compile always needs a C++ compiler on a CPU")
def test_on_a_cpu_nothing_is_compiled_unless_it_is_asked_for() -> None:
    eager = dict.fromkeys(("auto", "never"), ("MegatronBuilder", ""))
    assert ranks(1).run(chosen) == [{**eager, "always": ("PlainBuilder", "inductor")}]
    assert ranks(2).run(chosen) == [{**eager, "always": ("MegatronBuilder", "inductor")}] * 2


def test_what_cannot_be_compiled_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"mesh.compile is yes.*auto, always or never"):
        tiny_config(tmp_path, tmp_path / "run", **{"mesh.compile": "yes"})
    monkeypatch.setenv("CXX", "no-such-compiler")
    mesh: Any = mock.Mock(config=MeshConfig(compile="always"), device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"no C\+\+ compiler"):
        building.builder(mesh)


@pytest.mark.full
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler on a CPU")
def test_inductor_equals_uncompiled() -> None:
    torch._dynamo.reset()
    blocks = []
    for backend in ("", "inductor"):
        torch.manual_seed(0)
        blocks.append(PlainBlock(TransformerShape(**SMALL, layer_scale=0.3, qk_norm=True), backend=backend).double())
    for tokens, samples in ((8, 4), (16, 3)):
        for wanted, found in zip(*(passed(block, tokens, samples, True, False) for block in blocks), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
