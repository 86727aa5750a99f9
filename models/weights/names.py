"""Where a project keeps each tensor of a tower, as data, and the rules that follow from it and the tower's configuration.

A name of a layer that ends in "." or "_" is followed by "weight" or "bias"; names of layers are below `layer`, which holds "{i}".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from models.activation import GATED
from models.shape import TransformerShape, padded_vocab
from models.text import TextConfig
from models.vision import VisionConfig
from models.weights import rules
from models.weights.rules import Rule


@dataclass(frozen=True, kw_only=True)
class LayerNames:
    """Tensors of one transformer layer; `qkv`: one name or three; `gated_fc1`: one name or two (gate, up). Empty: the project has none."""

    layer: str
    qkv: tuple[str, ...]
    proj: str
    norm1: str
    norm2: str
    fc1: str
    fc2: str
    gated_fc1: tuple[str, ...] = ()
    gated_fc2: str = ""
    scale1: str = ""
    scale2: str = ""
    head_norms: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PoolNames:
    """Tensors of attention pooling. `qkv`: one name, or two (queries; keys and values)."""

    probe: str
    qkv: tuple[str, ...]
    proj: str
    norm: str
    fc1: str
    fc2: str


@dataclass(frozen=True, kw_only=True)
class VisionNames:
    """Tensors of an image tower. `projection` says itself where the prefix goes.

    token_dims, position_dims: dimensions of the class token and of the position table.
    """

    layers: LayerNames
    patch: str
    class_token: str = ""
    position: str = ""
    register: str = ""
    embedding_norm: str = ""
    final_norm: str
    pool: PoolNames | None = None
    projection: str = ""
    projection_transposed: bool = False
    token_dims: int = 3
    position_dims: int = 3
    flat_patches: bool = False


@dataclass(frozen=True, kw_only=True)
class TextNames:
    """Tensors of a text tower. `projection` says itself where the prefix goes, and without "weight" where it has a bias."""

    layers: LayerNames
    words: str
    position: str
    token_type: str = ""
    norm: str = ""
    final_norm: str = ""
    projection: str = ""
    projection_transposed: bool = False


def vision_rules(config: VisionConfig, names: VisionNames, prefix: str) -> list[Rule]:
    """The rules of an image tower, one for all of its tensors; `prefix` stands before their names."""
    found = list(_with_prefix(_vision(config, names), prefix))
    if config.projection_dim:
        make = rules.transposed if names.projection_transposed else rules.same
        found.append(make("vision.projection.weight", names.projection.format(prefix=prefix)))
    return found


def text_rules(config: TextConfig, names: TextNames, prefix: str) -> list[Rule]:
    """The rules of a text tower, one for all of its tensors; `prefix` stands before their names."""
    found = list(_with_prefix(_text(config, names), prefix))
    projection = names.projection.format(prefix=prefix)
    if config.projection_bias:
        found += _both("text.projection.", f"{projection}.")
    elif config.projection_dim:
        make = rules.transposed if names.projection_transposed else rules.same
        found.append(make("text.projection.weight", projection))
    return found


def _with_prefix(found: Iterator[Rule], prefix: str) -> Iterator[Rule]:
    for rule in found:
        yield Rule(rule.ours, tuple(f"{prefix}{name}" for name in rule.theirs), rule.load, rule.save)


def _vision(config: VisionConfig, names: VisionNames) -> Iterator[Rule]:
    if names.flat_patches:
        yield rules.flat_patches("vision.stem.weight", f"{names.patch}weight", config.patch_size)
    else:
        yield rules.same("vision.stem.weight", f"{names.patch}weight")
    if config.patch_bias:
        yield rules.same("vision.stem.bias", f"{names.patch}bias")
    if config.has_class_token:
        yield rules.leading("vision.class_token", names.class_token, names.token_dims)
    if config.class_position:
        yield rules.first_and_rest("vision.class_position", "vision.position", names.position, names.position_dims)
    elif config.positions == "learned":
        yield rules.leading("vision.position", names.position, names.position_dims)
    if config.register_tokens:
        yield rules.leading("vision.register_token", names.register, 3)
    if config.embedding_norm:
        yield from _both("vision.embedding_norm.", names.embedding_norm)
    yield from _layers(config, names.layers, "vision.block.")
    yield from _both("vision.block.final_layernorm.", names.final_norm)
    if config.pooling == "attention" and names.pool is not None:
        yield from _pool(names.pool)


def _text(config: TextConfig, names: TextNames) -> Iterator[Rule]:
    yield rules.padded_rows("text.words.weight", names.words, config.vocab_size, padded_vocab(config.vocab_size))
    yield rules.same("text.position", names.position)
    if config.token_types:
        yield rules.same("text.token_type", names.token_type)
    if config.embedding_norm:
        yield from _both("text.norm.", names.norm)
    yield from _layers(config, names.layers, "text.block.")
    if not config.post_norm:
        yield from _both("text.block.final_layernorm.", names.final_norm)


def _pool(names: PoolNames) -> Iterator[Rule]:
    yield rules.leading("vision.pool.probe", names.probe, 3)
    for part in ("weight", "bias"):
        theirs = tuple(f"{name}{part}" for name in names.qkv)
        yield rules.concatenated(f"vision.pool.linear_qkv.{part}", theirs, (3,) if len(theirs) == 1 else (1, 2))
    yield from _both("vision.pool.linear_proj.", names.proj)
    yield from _both("vision.pool.norm.", names.norm)
    yield from _both("vision.pool.linear_fc1.", names.fc1)
    yield from _both("vision.pool.linear_fc2.", names.fc2)


def _layers(shape: TransformerShape, names: LayerNames, block: str) -> Iterator[Rule]:
    for layer in range(shape.num_layers):
        yield from _layer(shape, names, f"{block}layers.{layer}.", names.layer.format(i=layer))


def _layer(shape: TransformerShape, names: LayerNames, ours: str, theirs: str) -> Iterator[Rule]:
    heads = shape.num_attention_heads
    qkv = [f"{theirs}{name}" for name in names.qkv]
    yield rules.interleaved_heads(f"{ours}self_attention.linear_qkv.weight", tuple(f"{n}weight" for n in qkv), heads)
    bias = f"{ours}self_attention.linear_qkv.bias"
    if shape.qkv_bias and shape.key_bias:
        yield rules.interleaved_heads(bias, tuple(f"{n}bias" for n in qkv), heads)
    elif shape.qkv_bias:
        yield rules.keyless_bias(bias, f"{qkv[0]}bias", f"{qkv[2]}bias", heads)
    yield from _both(f"{ours}self_attention.linear_proj.", f"{theirs}{names.proj}")
    if shape.qk_norm:
        for mine, other in zip(("q_layernorm.", "k_layernorm."), names.head_norms, strict=True):
            yield from _both(f"{ours}self_attention.{mine}", f"{theirs}{other}")
    norms = ("self_attn_bda.norm.", "mlp_bda.norm.") if shape.post_norm else ("input_layernorm.", "pre_mlp_layernorm.")
    for mine, other in zip(norms, (names.norm1, names.norm2), strict=True):
        yield from _both(f"{ours}{mine}", f"{theirs}{other}")
    if shape.layer_scale:
        yield rules.same(f"{ours}self_attn_bda.scale", f"{theirs}{names.scale1}")
        yield rules.same(f"{ours}mlp_bda.scale", f"{theirs}{names.scale2}")
    if shape.activation in GATED:
        for part in ("weight", "bias"):
            fc1 = tuple(f"{theirs}{name}{part}" for name in names.gated_fc1)
            yield rules.gated(f"{ours}mlp.linear_fc1.{part}", fc1)
        yield from _both(f"{ours}mlp.linear_fc2.", f"{theirs}{names.gated_fc2}")
    else:
        yield from _both(f"{ours}mlp.linear_fc1.", f"{theirs}{names.fc1}")
        yield from _both(f"{ours}mlp.linear_fc2.", f"{theirs}{names.fc2}")


def _both(ours: str, theirs: str) -> Iterator[Rule]:
    for part in ("weight", "bias"):
        yield rules.same(f"{ours}{part}", f"{theirs}{part}")
