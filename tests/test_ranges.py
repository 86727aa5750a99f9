"""Choices and ranges of the configurations: what the command line, recipes and the JSON of strangers are held to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from harness.__main__ import command
from harness.bench.decode import DecodeConfig
from harness.bench.head import HeadConfig
from harness.bench.kernels import KernelsConfig
from harness.core.cli import Parser
from harness.core.errors import UserError
from harness.data.preprocess import PreprocessSpec
from harness.train.config import RunConfig, check, parser
from models.item import ItemConfig
from models.make import MakeConfig
from models.oclear import OclearConfig
from models.plain_values import from_plain
from models.ranges import Range
from tests.runs import UNUSED, tiny_config

METHODS: dict[str, Any] = {"oclear": OclearConfig, "make": MakeConfig, "item": ItemConfig}
OF_RUNS = [
    ("oclear", "model.vision.pooling", "max", "It can be mean, class, attention or mean_max"),
    ("oclear", "model.vision.activation", "relu", "It can be gelu, gelu_tanh, quick_gelu or swiglu"),
    ("oclear", "model.vision.position_resize", "cubic", "It can be bicubic, "),
    ("oclear", "model.vision.drop_path", "1.0", "It must be a float in [0, 1)"),
    ("oclear", "model.vision.num_layers", "1001", "It must be an int from 1 to 1,000"),
    ("oclear", "model.vision.stem_channels", "[8,0]", "is 0. It must be an int from 1 to 10,000,000"),
    ("oclear", "model.text.pooling", "first", "It can be none, class, mean, eos or last"),
    ("oclear", "model.gate_init", "1", "It must be a float in (0, 1)"),
    ("oclear", "model.temperature", "0", "It must be a float, above 0"),
    ("make", "model.modalities", "both", "It can be learned, equal, title or image"),
    ("make", "model.weights.qim", "-1", "It must be a float, at least 0"),
    ("make", "model.embedding_dim", "1" + "0" * 200, "is far too large. It must be an int from 1 to 10,000,000"),
    ("item", "model.global_targets", "none", "It can be masked or all"),
    ("item", "model.text.max_length", "true", "It must be an int from 1"),
    ("oclear", "head.row_dtype", "fp8", "It can be fp32 or bf16"),
    ("oclear", "head.seed", "-1", "It must be an int, at least 0"),
    ("oclear", "head.scale", "fixed", "It must be a float, above 0"),
    ("oclear", "model.fusion_weights", "[1,-1,0]", "It must be a float, at least 0"),
    ("oclear", "train.margin_schedule", "log", "It can be constant, linear or cosine"),
    ("oclear", "optimizer.rows.state", "4bit", "It can be fp32 or 8bit"),
    ("oclear", "optimizer.layer_decay", "1.5", "It must be a float in (0, 1]"),
    ("oclear", "optimizer.overlap", "on", "It can be auto, always or never"),
    ("oclear", "train.ema_decay", "1.0", "It must be a float in [0, 1)"),
    ("oclear", "mesh.device", "gpu", "It can be auto, cuda or cpu"),
    ("oclear", "data.masking.mismatched", "-0.1", "It must be a float in [0, 1]"),
    ("oclear", "evaluation.align_documents", "1", "It must be an int, at least 2"),
    ("oclear", "evaluation.panel", "-1", "It must be an int, at least 0"),
    ("oclear", "data.preprocess.hue", "0.6", "It must be a float in [0, 0.5]"),
    ("oclear", "seed", ".nan", "It must be an int, at least 0"),
]
OF_COMMANDS = [
    ("ingest", "workers", "0", "It must be an int, at least 1"),
    ("index", "kind", "photo", "It can be query or document"),
    ("govern", "min_queries", "-1", "It must be an int, at least 0"),
    ("govern", "query_power", "1.5", "It must be a float in [0, 1]"),
    ("govern", "document_ratio", "inf", "It must be a float, above 0"),
    ("tokenizer", "max_texts", "0", "It must be an int, at least 1"),
    ("queries", "max_share", "0", "It must be a float in (0, 1]"),
    ("search", "top", "0", "It must be an int, at least 1"),
    ("search", "backend", "foo", "It can be dali or reference"),
    ("verify", "threads", "0", "It must be an int, at least 1"),
]


@pytest.fixture(scope="module")
def parsers() -> dict[str, Parser]:
    """A parser of a run of each method."""
    return {method: parser(method) for method in METHODS}


@pytest.mark.parametrize(("method", "key", "value", "message"), OF_RUNS)
def test_a_value_of_a_recipe_is_held_to_its_type(
    parsers: dict[str, Parser], method: str, key: str, value: str, message: str
) -> None:
    with pytest.raises(UserError) as error:
        parsers[method].parse([f"--{key}={value}"])
    assert str(error.value).startswith(f"{key} is ") and message in str(error.value)


@pytest.mark.parametrize(("name", "key", "value", "message"), OF_COMMANDS)
def test_an_option_of_a_command_is_held_to_its_type(name: str, key: str, value: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        command(name, [f"--{key}", value])
    assert str(error.value).startswith(f"{key} is {value}") and message in str(error.value)


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [(DecodeConfig, "images", "0"), (HeadConfig, "sample_rate", "1.0"), (KernelsConfig, "dim", "0")],
)
def test_an_option_of_a_bench_is_held_to_its_type(config: Any, key: str, value: str) -> None:
    benches = Parser("bench")
    benches.add_class_arguments(config)
    with pytest.raises(UserError, match=f"^{key} is {value}. It must be "):
        benches.parse([f"--{key}", value])


def numbers(kind: Any, value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of all numbers in nested dataclasses, single and in tuples."""
    for name, hint in get_type_hints(kind).items():
        one = getattr(value, name)
        if dataclasses.is_dataclass(one):
            yield from numbers(type(one), one, f"{key}{name}.")
        elif isinstance(one, int | float) and not isinstance(one, bool):
            yield f"{key}{name}", next(iter(get_args(hint)), hint)  # head.scale may also be a word


def changed(config: Any, key: str, value: float) -> Any:
    """A copy of nested dataclasses with another value at a dotted key."""
    name, _, rest = key.partition(".")
    return dataclasses.replace(config, **{name: changed(getattr(config, name), rest, value) if rest else value})


def test_every_number_has_a_range_and_its_least_value_is_refused_or_taken(catalogue: Path) -> None:
    """By the rules between the fields, which divide by some of them."""
    config = tiny_config(catalogue, UNUSED)
    found = dict(numbers(RunConfig, config))
    assert len(found) > 50
    for key, kind in found.items():
        assert issubclass(kind, Range) and kind.least >= 0, f"{key} takes any number"
        least = kind.number(kind.least) if kind.least not in kind.outside else 1e-9
        try:
            check(changed(config, key, least), 1)
        except UserError as error:
            assert key.rsplit(".", 1)[-1] in str(error), f"{key} = {least}: {error}"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vision": {"num_layers": 0}}, "model.vision.num_layers is 0. It must be an int from 1 to 1,000"),
        ({"vision": {"num_layers": "4"}}, "model.vision.num_layers is 4. It must be an int"),
        ({"vision": {"pooling": "max"}}, "model.vision.pooling is 'max'; it can be mean or class or"),
        ({"vision": {"pooling": ["mean"]}}, "model.vision.pooling is ['mean']; it can be"),
        ({"vision": {"stem_blocks": [0, -1]}}, "model.vision.stem_blocks is -1. It must be an int from 0"),
        ({"gate_init": float("nan")}, "model.gate_init is nan. It must be a float in (0, 1)"),
        ({"temperature": float("inf")}, "model.temperature is inf. It must be a float, above 0"),
        ({"temperature": 1 << 40}, "model.temperature is 1099511627776.0, not between 0 and"),
    ],
)
def test_json_of_strangers_is_held_to_the_same(values: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        from_plain(OclearConfig, values, "model")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", 0),
        ("mean", [0.0]),
        ("std", [1.0, 0.0, 1.0]),
        ("crop_scale", [0.5, 1.5]),
        ("crop_scale", [0.9, 0.5]),
        ("crop_ratio", [2.0, 1.0]),
        ("flip", 1.5),
        ("brightness", -0.1),
        ("contrast", 2.0),
        ("saturation", float("nan")),
        ("hue", 0.6),
        ("eval_crop", 0.0),
    ],
)
def test_a_specification_of_the_input_is_held_to_the_same(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^preprocess\.{field} is "):
        PreprocessSpec.from_dict(PreprocessSpec().to_dict() | {field: value})


def test_ends_of_a_range_are_taken_where_they_belong_to_it(parsers: dict[str, Parser]) -> None:
    given = {
        "train.ema_decay": 0,
        "optimizer.layer_decay": 1,
        "model.vision.num_layers": 1000,
        "data.preprocess.hue": 0.5,
    }
    values = parsers["oclear"].parse([f"--{key}={value}" for key, value in given.items()])
    assert type(values.train.ema_decay) is float and type(values.model.vision.num_layers) is int
    assert (values.optimizer.layer_decay, values.model.vision.num_layers, values.data.preprocess.hue) == (
        1.0,
        1000,
        0.5,
    )
