"""`shelfmark estimate` and the formulas of the meters, against what a fresh process measures and what torch counts."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from harness.bench.ranks import Traffic
from harness.config import parse
from harness.data.loader import TextTokens
from harness.errors import UserError
from harness.estimate import estimate
from harness.flops import StepFlops, Work, active_rows, flops_per_step, step_parts, vision, with_length
from harness.groups import freeze
from harness.methods import METHODS
from harness.passes import Layout, block_elements, reach, stem_elements
from models.oclear import OclearTowers
from models.plain.transformer import PlainBuilder
from models.recompute import RECOMPUTE
from models.text import TextConfig, TextTower
from models.transformer import MegatronBuilder
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
    if name == "weights":  # where saving needs more than a step
        held = said["peak"] - sum(said["memory_per_rank"][term] for term in ("activations", "working"))
        assert held + said["saving_memory"] == pytest.approx(found["saving"], rel=0.1)
    assert said["checkpoint_bytes"] == pytest.approx(found["checkpoint"], rel=0.1)


class Alive(TorchDispatchMode):
    """Knows what of all that was computed inside is still there; views of `module`'s parameters are not computed."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.parameters = {p.data_ptr() for p in module.parameters()}
        self.storages: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.parameters:
                storage = tensor.untyped_storage()
                self.storages[StorageWeakRef(storage)] = storage.nbytes()
        return found

    def bytes(self) -> int:
        return sum(size for storage, size in self.storages.items() if not storage.expired())


VISION: dict[str, Any] = {"image_size": 32, "patch_size": 4, "num_layers": 6, "hidden_size": 64, "pooling": "class"}
KEPT: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout": 0.1},
    "attention dropout": {"attention_dropout": 0.1},
    "gate": {
        "activation": "swiglu",
        "ffn_hidden_size": 192,
        "qk_norm": True,
        "positions": "rotary",
        "layer_scale": 0.1,
    },
    "stem": {"stem_channels": (16, 32), "stem_blocks": (1, 1)},
    "frozen below layer 4": {},
    "text": {"max_length": 65, "post_norm": True, "dropout": 0.1},
}
BATCH = 4


def kept_bytes(tensor_parallel: int, ways: list[Layout]) -> dict[str, tuple[float, float]]:
    """In a pool: bytes that a tower keeps for its backward beside its input, measured and by formula, for all of KEPT and `ways`."""
    found = {}
    gc.freeze()  # what was there before need not be looked through each time
    with layout(tensor_parallel) as mesh:
        for way, (name, fields) in itertools.product(ways, KEPT.items()):
            mesh.seed_streams(0, 0)
            builder = MegatronBuilder(mesh.groups, sequence_parallel=way.sequence_parallel, recompute=way.recompute)
            config: Any = (
                VisionConfig(**VISION | fields) if name != "text" else TextConfig(vocab_size=50, num_layers=6, **fields)
            )
            tokens = config.max_length if name == "text" else config.num_prefix + config.num_patches
            tower = TextTower(config, builder) if name == "text" else VisionTower(config, builder)
            if name.startswith("frozen"):
                freeze(tower, ["stem", "position", "class_token", "block.layers.[0-3]"])
            inputs = torch.ones(BATCH, tokens, dtype=torch.int64) if name == "text" else torch.randn(BATCH, 3, 32, 32)
            with Alive(tower) as alive:
                outputs = tower(inputs)
            gc.collect()
            time.sleep(0.05)  # gloo's threads let go of a collective's tensors a moment after it has ended
            stem = stem_elements(config) if name == "stem" else 0
            formula = 4 * BATCH * (stem + block_elements(config, tokens, way, 4, reach(tower)))
            found[f"{name}, {way}"] = alive.bytes(), formula
            del outputs
    gc.unfreeze()
    return found


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_a_tower_keeps_what_the_estimate_says(tensor_parallel):
    """Sequence parallelism, recomputation, dropout, frozen layers: all tensors that are alive after forward."""
    ways = [Layout(2, tensor_parallel, tensor_parallel > 1, recompute) for recompute in RECOMPUTE]
    ways += [Layout(2, tensor_parallel)] if tensor_parallel > 1 else []
    for name, (found, said) in ranks(2).run(kept_bytes, tensor_parallel, ways)[0].items():
        assert said == pytest.approx(found, rel=0.15), name


def counted(make: Callable[[], nn.Module], *inputs: Tensor, call: Callable[..., Any] | None = None) -> Work:
    """What torch counts of a plain twin on the meta device, where attention falls apart into the products that it is made of."""
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
        {},
        {"pooling": "class", "num_layers": 2, "activation": "swiglu", "ffn_hidden_size": 96},
        {"stem_channels": (16, 32, 32, 64), "stem_blocks": (0, 1, 2, 1), "projection_dim": 40},
        {"positions": "rotary", "register_tokens": 4, "class_token": True, "qk_norm": True},
        {"pooling": "attention"},
    ],
)
def test_flops_of_image_towers_are_what_torch_counts(fields):
    config = VisionConfig(image_size=64, **fields)
    found = counted(lambda: VisionTower(config, PlainBuilder()), torch.empty(3, 3, 64, 64, device="meta"))
    # attention pooling multiplies its one query once for the whole batch
    close = 1e-3 if config.pooling == "attention" else 1e-12
    assert found.forward == pytest.approx((vision(config) * 3).forward, rel=close)
    assert found.backward == pytest.approx((vision(config) * 3).backward, rel=close)


def test_flops_of_a_step_are_what_torch_counts():
    """The whole of OCLEAR: text tower with a cut length, fusion, transformation networks, and the cosines of a head without sampling."""
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
    assert found.forward == pytest.approx(sum(part.forward for part in parts.values()), rel=0.01)
    assert found.backward == pytest.approx(sum(part.backward for part in parts.values()), rel=0.01)
    assert flops_per_step(config, 77) == sum(part.total for part in parts.values())


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

    found, flops = one(2, 5) + one(1, 40), StepFlops.of(config, 77, 2)
    assert flops.fixed + flops.texts(TextTokens(45, 25 + 1600)) == pytest.approx(found.total, rel=0.01)
    padded = flops.fixed + flops.texts(TextTokens(80, 3200))
    assert padded == pytest.approx(flops_per_step(config, 77), rel=1e-12) and found.total < 0.97 * padded


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


@pytest.mark.parametrize("name", TERMS)
def test_a_step_of_other_lengths_costs_what_the_formulas_say(name):
    config = config_of(TERMS[name], 1)
    flops, n = StepFlops.of(config, 0, 6), 6
    for length, query in ((12, 5), (3, 2), (7, 4), (1, 1)):
        tokens = TextTokens(n * length, n * length**2, n * query, n * query**2)
        shorter = with_length(config, "text", length)
        shorter = with_length(shorter, "query", query) if name == "make" else shorter
        assert flops.fixed + flops.texts(tokens) == pytest.approx(flops_per_step(shorter, 0), rel=1e-12)


def test_a_shorter_text_costs_an_estimate_no_memory():
    words = [*flags(TINY), "--vocab-size", "99", "--num-classes", "9"]
    whole, short = estimate(words), estimate([*words, "--text-length", "7"])
    assert (whole["text_length"], short["text_length"]) == (64, 7)
    assert 0 < short["flops_per_step_total"] < whole["flops_per_step_total"]
    changed = {key for key in whole if whole[key] != short[key]}
    assert changed == {"text_length", "flops_per_step", "flops_per_step_total"}


def test_an_estimate_does_not_depend_on_this_machine(monkeypatch):
    words = [*flags(TINY), "--vocab-size", "99", "--num-classes", "9"]
    for here in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=here: found)
        assert estimate(words)["device"] == estimate([*words, "--mesh.device=cuda"])["device"] == "cuda"
        assert estimate([*words, "--mesh.device=cpu"])["device"] == "cpu"


def test_sampling_counts_each_active_class_once():
    assert active_rows(1000, 1.0, 50) == 1000
    assert active_rows(1000, 0.1, 50) == pytest.approx(100 + 0.9 * 50)


CLASSES = TINY | {"model.vision.class_token": True, "data.queries_per_step": 4, "data.documents_per_step": 4}


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
        assert sent == pytest.approx(sum(seen), rel=0.05)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--world", "none"], "--world is 'none'"),
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
