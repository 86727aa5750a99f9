"""`shelfmark estimate` and the FLOPs of the meters, against what a fresh process measures, what real ranks keep and
send, and what torch counts.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harness.bench.ranks import Traffic
from harness.commands.estimate import main as estimate
from harness.core.errors import UserError
from harness.data.step_data import TextTokens
from harness.train.config import parse
from harness.train.dry_run import Recorder, dry_run
from harness.train.flops import (
    StepFlops,
    Work,
    active_rows,
    flops_per_step,
    step_parts,
    tower_flops,
    utilisation,
    with_length,
)
from models.batch import TENSORS
from models.oclear import OclearTowers
from models.plain.transformer import PlainBuilder
from models.registry import METHODS
from models.vision import VisionConfig, VisionTower
from tests.measured import RECIPES, TINY, config_of, estimated, fill_banks, flags, measured, numbers, step_of, trainer
from tests.pool import layout, ranks


def traffic_of_a_step(recipe: dict[str, Any], tensor_parallel: int, num_classes: int) -> tuple[int, float]:
    """In a pool: numbers of parameters and rows that this rank holds, and the bytes that it sends in a step."""
    with layout(tensor_parallel) as mesh:
        torch.manual_seed(mesh.dp.rank())
        made = trainer(recipe, num_classes, mesh)
        data, traffic = step_of(made.config, num_classes, mesh.dp.size()), Traffic()
        with traffic.counted():
            made.train_step(data)
        return numbers(made.method), traffic.bytes


@pytest.mark.full  # each is a process or two that train and save
@pytest.mark.parametrize("name", RECIPES)
def test_an_estimate_is_what_a_process_measures(name, tmp_path):
    """Parameters of a rank exactly; memory and checkpoint within a tenth."""
    found, said = measured(name, tmp_path), estimated(name)
    assert said["parameters_per_rank"] == found["parameters"]
    assert said["peak"] == pytest.approx(found["peak"], rel=0.1)
    assert found["saving"] == pytest.approx(found["peak"], rel=0.1)  # each rank writes what it holds, without a copy
    assert said["checkpoint_bytes"] == pytest.approx(found["checkpoint"], rel=0.1)


# A step of each method, its losses and layouts in what they keep: dropout of both kinds, gates, a stem, frozen layers,
# shared towers, banks.
SMALL: dict[str, Any] = TINY | {
    "model.text.max_length": 33,
    "model.text.num_layers": 1,
    "model.vision.patch_size": 8,
    "data.queries_per_step": 12,
    "data.documents_per_step": 12,
}
KEPT: dict[str, dict[str, Any]] = {
    "oclear": SMALL
    | {
        "model.vision.num_layers": 2,
        "model.vision.dropout": 0.1,
        "model.vision.attention_dropout": 0.1,
        "model.vision.activation": "swiglu",
        "model.vision.qk_norm": True,
        "model.vision.positions": "rotary",
        "model.vision.layer_scale": 0.1,
        "model.vision.class_token": True,
        "model.text.dropout": 0.1,
        "model.text.post_norm": True,
        "optimizer.frozen": ["vision.stem", "vision.class_token", "vision.block.layers.0"],
        "data.micro_batches": 2,
    },
    "in micro-batches at once": SMALL
    | {"model.vision.num_layers": 1, "model.objective": "contrastive", "data.micro_batches": 3},
}


def kept_bytes(recipes: list[dict[str, Any]], tensor_parallel: int) -> list[tuple[int, int]]:
    """In a pool: bytes that backward finds of a micro-batch, and the most at a time, of a real step of each recipe."""
    found = []
    for recipe in recipes:
        with layout(tensor_parallel) as mesh:
            recipe = recipe | {"mesh.tensor_parallel": tensor_parallel}
            mesh.config = config_of(recipe, mesh.world_size).mesh
            made = trainer(recipe, 40, mesh)
            method, config = made.method, made.config
            mesh.seed_streams(0, 0)
            batches = (
                step_of(config, 40, mesh.dp.size() * config.data.micro_batches).batches * config.data.micro_batches
            )
            there = [*method.towers.parameters(), *method.towers.buffers()]
            there += [getattr(batch, name) for batch in batches for name in TENSORS]
            there += [] if method.head is None else [method.head.rows]
            there += [] if method.memory is None else method.memory.buffers()
            there += [buffer.grad_data for buffer in made.towers.ddp.buffers]
            kept, recorder = 0, Recorder(there)
            with recorder:
                if method.head is not None:
                    method.head.begin_step(torch.cat([batch.labels for batch in batches]))
                for i, (loss, _) in enumerate(method.losses(batches)):
                    gc.collect()
                    time.sleep(0.05)  # gloo's threads let go of a collective's tensors a moment after it has ended
                    kept = max(kept, recorder.alive)
                    with made.towers.accumulate(last=i == len(batches) - 1):
                        loss.backward()
                    del loss
            found.append((kept, recorder.peak))
    return found


WAYS: dict[str, dict[str, Any]] = {way: {"mesh.recompute": way} for way in ("none", "selective", "full")}
ONES = {way: KEPT["oclear"] | more for way, more in WAYS.items()} | {"cached": KEPT["in micro-batches at once"]}
SPREAD = {way: KEPT["oclear"] | more | {"mesh.sequence_parallel": True} for way, more in WAYS.items()}


@pytest.mark.parametrize(
    ("tensor_parallel", "names"),
    [
        (1, ["make"]),
        (2, ["full"]),
        pytest.param(1, ["cached", "item", "none", "selective", "full"], marks=pytest.mark.full),
        pytest.param(2, ["whole", "none", "selective"], marks=pytest.mark.full),
    ],
)
def test_a_dry_run_keeps_what_a_step_keeps(tensor_parallel, names):
    """Two real ranks: all tensors that are alive after forward; and the most at a time, to which gloo's threads may add
    what they let go late.
    """
    known = TERMS | (ONES if tensor_parallel == 1 else SPREAD | {"whole": KEPT["oclear"]})
    recipes = [known[name] for name in names]
    for recipe, (kept, peak) in zip(recipes, ranks(2).run(kept_bytes, recipes, tensor_parallel)[0], strict=True):
        config = config_of(recipe | {"mesh.tensor_parallel": tensor_parallel}, 2)
        said = dry_run(config, 2, 40 if METHODS[config.method].classifies(config.model) else 0, cuda=False)
        assert said.kept == pytest.approx(kept, rel=0.01), recipe
        assert said.peak == pytest.approx(peak, rel=0.1), recipe


def counted(make: Callable[[], nn.Module], *inputs: Tensor, call: Callable[..., Any] | None = None) -> Work:
    """Operations of a plain twin by torch's counter, on the meta device, where attention is decomposed into its
    products.
    """
    with torch.device("meta"):
        module = make()
    with FlopCounterMode(display=False) as counter:
        found = (call or module)(*([module] if call else []), *inputs)
        forward = counter.get_total_flops()
        sum(output.sum() for output in (found if isinstance(found, tuple) else (found,))).backward()
    return Work(forward, counter.get_total_flops() - forward)


@pytest.mark.parametrize(
    "fields",
    [
        {"stem_channels": (16, 32, 32, 64), "stem_blocks": (0, 1, 2, 1), "projection_dim": 40},
        {"pooling": "attention", "activation": "swiglu", "ffn_hidden_size": 96},
    ],
)
def test_flops_of_image_towers_are_what_torch_counts(fields):
    config, images = VisionConfig(image_size=64, **fields), torch.empty(3, 3, 64, 64, device="meta")
    found = counted(lambda: VisionTower(config, PlainBuilder()), images)
    assert tower_flops(lambda: VisionTower(config, PlainBuilder()), images) == found.total


def test_flops_of_a_step_are_what_torch_counts():
    """The whole of OCLEAR: text tower with a cut length, fusion, transformation networks, and the cosines of a head
    without sampling.
    """
    recipe = TINY | {
        "model.vision.hidden_size": 64,
        "model.text.max_length": 40,
        "data.queries_per_step": 3,
        "data.documents_per_step": 2,
    }
    config = parse(flags(recipe))[0]
    model = config.model
    images, tokens = torch.empty(5, 3, 64, 64, device="meta"), torch.empty(2, 40, dtype=torch.int64, device="meta")
    rows = torch.empty(77, model.embedding_dim, device="meta", requires_grad=True)

    def call(towers: nn.Module) -> Tensor:
        return torch.cat(towers(images[:3], images[3:], tokens)[:2]) @ rows.T

    found = counted(lambda: OclearTowers(model, PlainBuilder()), call=call)
    parts = step_parts(config, num_classes=77)
    assert found.forward == pytest.approx(sum(part.forward for part in parts.values()), rel=1e-9)
    assert found.backward == pytest.approx(sum(part.backward for part in parts.values()), rel=1e-9)
    for part in parts.values():  # no part has another's backward
        assert part.forward < part.backward <= 2 * part.forward
    assert flops_per_step(config, 77) == sum(part.total for part in parts.values())


@pytest.mark.full
def test_wrong_texts_cost_a_second_pass_of_the_fusion_and_none_of_a_tower():
    recipe = TINY | {"model.contrast_weight": 1.0, "model.fusion_kind": "sum", "data.queries_per_step": 3}
    plain, wrong = (step_parts(parse(flags(recipe | {"model.wrong_texts": x}))[0], 77) for x in (False, True))
    assert plain.keys() == wrong.keys()
    for part in plain:
        factor = {"fusion": 2, "document_transform": 2}.get(part, 1)
        assert part == "losses" or wrong[part].forward == pytest.approx(factor * plain[part].forward, rel=1e-9), part
    assert wrong["losses"].forward > plain["losses"].forward


def test_a_step_costs_what_its_own_texts_cost():
    """Documents of 5 and of 40 tokens against what torch counts of each without padding."""
    recipe = TINY | {
        "model.vision.hidden_size": 64,
        "model.text.max_length": 40,
        "data.queries_per_step": 3,
        "data.documents_per_step": 2,
    }
    config = parse(flags(recipe))[0]
    rows = torch.empty(77, config.model.embedding_dim, device="meta", requires_grad=True)

    def one(queries: int, length: int) -> Work:
        images = torch.empty(queries + 1, 3, 64, 64, device="meta")
        tokens = torch.empty(1, length, dtype=torch.int64, device="meta")

        def call(towers: nn.Module) -> Tensor:
            return torch.cat(towers(images[:queries], images[queries:], tokens)[:2]) @ rows.T

        return counted(lambda: OclearTowers(config.model, PlainBuilder()), call=call)

    found, flops = one(2, 5).total + one(1, 40).total, StepFlops.of(config, 77, 2)
    assert flops.fixed + flops.texts(TextTokens(45, 25 + 1600)) == pytest.approx(found, rel=1e-9)
    padded = flops.fixed + flops.texts(TextTokens(80, 3200))
    assert padded == pytest.approx(flops_per_step(config, 77), rel=1e-12) and found < 0.97 * padded


# All terms of MAKE and ITEm, every size different from every other.
TERMS: dict[str, dict[str, Any]] = {
    "make": {
        "evaluation.query_attributes": ["colour"],
        "model.vision.hidden_size": 48,
        "model.text.hidden_size": 64,
        "model.text.projection_dim": 20,
        "model.text.max_length": 12,
        "model.query.hidden_size": 32,
        "model.query.max_length": 5,
        "model.fusion.hidden_size": 80,
        "model.embedding_dim": 24,
        "model.num_keywords": 70,
        "model.memory_bank": 90,
        "model.qic.symmetric": True,
        "model.mpm_patches": 3,
    },
    "item": {"model.text.max_length": 12, "model.weights.contrast": 1.0},
}
for _name, _recipe in TERMS.items():
    _recipe |= TINY | {"method": _name, "data.masking.word_rate": 0.25, "data.documents_per_step": 6}
    _recipe |= {
        f"model.{tower}.num_layers": 1
        for tower in (["vision", "text", "query", "fusion"] if _name == "make" else ["text"])
    }
    _recipe |= {"model.vision.stem_channels": [8, 16, 32, 32], "model.vision.stem_blocks": [0, 1, 0, 1]}


def flops_of_a_loss(recipe: dict[str, Any]) -> Work:
    """In a pool of one: what torch counts of the loss of a step on plain towers, with full memory banks."""
    config = config_of(recipe, 1)
    spec = METHODS[config.method]
    with layout() as mesh:
        torch.manual_seed(0)
        method: Any = spec.assemble(config.model, spec.towers(config.model, PlainBuilder()), None, mesh.dp)
        fill_banks(method)
        batch = step_of(config, 40, 1).batches[0]
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            (loss,) = (loss for loss, _ in method.losses([batch]))
            forward = counter.get_total_flops()
            loss.backward()
        return Work(forward, counter.get_total_flops() - forward)


@pytest.mark.parametrize(
    ("name", "more"),
    [*((name, {}) for name in TERMS), ("make", {"model.hide_words": True}), ("item", {"model.global_targets": "all"})],
)
def test_flops_of_all_terms_are_what_torch_counts(name, more):
    """MAKE and ITEm: every term, with as many masked words and patches as the formula expects."""
    recipe = TERMS[name] | more
    found = ranks(1).run(flops_of_a_loss, recipe)[0]
    parts = step_parts(config_of(recipe, 1), 0)
    assert sum(part.forward for part in parts.values()) == pytest.approx(found.forward, rel=1e-9)
    assert sum(part.backward for part in parts.values()) == pytest.approx(found.backward, rel=1e-9)


@pytest.mark.parametrize("name", ["make", pytest.param("item", marks=pytest.mark.full)])
def test_a_step_of_other_lengths_costs_what_the_formulas_say(name):
    config = config_of(TERMS[name], 1)
    flops, n = StepFlops.of(config, 0, 6), 6
    length, query = 4, 2  # a quarter of which is a whole number of masked words
    tokens = TextTokens(n * length, n * length**2, n * query, n * query**2)
    shorter = with_length(config, "text", length)
    shorter = with_length(shorter, "query", query) if name == "make" else shorter
    assert flops.fixed + flops.texts(tokens) == pytest.approx(flops_per_step(shorter, 0), rel=1e-9)


LITTLE = [*flags(TINY), *(f"--model.{tower}.num_layers=1" for tower in ("vision", "text")), "--num-classes", "9"]


def test_a_shorter_text_costs_an_estimate_no_memory():
    words = LITTLE
    whole, short = estimate(words), estimate([*words, "--text-length", "7"])
    assert (whole["text_length"], short["text_length"]) == (64, 7)
    assert 0 < short["flops_per_step_total"] < whole["flops_per_step_total"]
    changed = {key for key in whole if whole[key] != short[key]}
    assert changed == {"text_length", "flops_per_step", "flops_per_step_total"}


def test_an_estimate_does_not_depend_on_this_machine(monkeypatch):
    without = estimate(LITTLE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert estimate(LITTLE) == without and without["device"] == "cuda"


def test_a_method_that_cannot_be_counted_trains_without_utilisation(monkeypatch):
    """And is told so; where the device has no peak to compare with, nothing is tried."""
    config, texts = config_of(TINY, 1), TextTokens(9, 81)

    def fails(*_: Any) -> Any:
        raise RuntimeError("it reads its numbers")

    monkeypatch.setitem(METHODS, "oclear", replace(METHODS["oclear"], assemble=fails))
    assert StepFlops.for_meters(config, 9, 4, torch.device("cpu")) == StepFlops()
    monkeypatch.setattr("harness.train.flops.peak_flops", lambda *_: 1e12)
    with pytest.warns(UserWarning, match="oclear failed: it reads its numbers"):
        flops = StepFlops.for_meters(config, 9, 4, torch.device("cuda"))
    assert utilisation(flops.fixed + flops.texts(texts), 1.0, 1, torch.device("cuda"), "fp32") == {}
    with pytest.raises(UserError, match="fails: it reads its numbers"):
        estimate([*flags(TINY), "--num-classes", "9"])


def test_dropout_costs_a_gpu_a_byte_and_attention_no_map():
    config = config_of(CLASSES, 1)

    def kept(cuda: bool, **rates: float) -> int:
        vision = replace(config.model.vision, **rates)
        return dry_run(replace(config, model=replace(config.model, vision=vision)), 1, 40, cuda).kept

    none, on_cpu = kept(True), kept(False, dropout=0.1)
    assert kept(True, attention_dropout=0.1) == none
    assert kept(True, dropout=0.1) - none == pytest.approx((on_cpu - none) / 4, rel=0.01)


def test_sampling_counts_each_active_class_once():
    assert active_rows(1000, 1.0, 50) == 1000
    assert active_rows(1000, 0.1, 50) == pytest.approx(100 + 0.9 * 50)


CLASSES = TINY | {
    "model.vision.num_layers": 2,
    "model.text.num_layers": 1,
    "model.vision.class_token": True,
    "data.queries_per_step": 4,
    "data.documents_per_step": 4,
}


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("recipe", [CLASSES, *TERMS.values()], ids=["oclear", *TERMS])
def test_a_rank_holds_and_sends_what_the_estimate_says(recipe, tensor_parallel):
    """Two real ranks: parameters of each exactly, and the bytes of one step as torch.distributed is asked for them."""
    found = ranks(2).run(traffic_of_a_step, recipe | {"mesh.tensor_parallel": tensor_parallel}, tensor_parallel, 40)
    words = [*flags(recipe), "--num-classes", "40", "--world=2", f"--tensor-parallel={tensor_parallel}"]
    figures = estimate(words)
    for parameters, sent in found:
        assert parameters == figures["parameters_per_rank"]
        # megatron-core took its data-parallel collectives from torch.distributed at its import: those are not seen
        seen = [figures["sent_per_step_and_rank"][term] for term in ("tensor_parallel", "head")]
        # but for sizes that a real step exchanges, and its norm
        assert sent == pytest.approx(sum(seen), rel=0.002, abs=100)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--world", "none"], "world"),
        (["--world", "-1"], "^world is -1"),
        (["--world", "6", "--tensor-parallel", "3"], "mesh.tensor_parallel"),
        (["--world", "3", "--tensor-parallel", "2"], "mesh.tensor_parallel is 2, but 3"),
        (["--num-classes", "9"], "--vocab-size"),
        (["--vocab-size", "9"], "--num-classes"),
        (["--method=make", "--evaluation.query_attributes=[colour]", "--vocab-size", "9"], "--model.num_keywords"),
        (["--wrold", "3"], "unknown key"),
    ],
)
def test_a_mistake_names_its_remedy(words, named):
    with pytest.raises(UserError, match=named):
        estimate(words)
