"""The registry of methods: what `method` in a recipe selects. The loop knows no method by name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from harness.artefact.query_encoder import TOWERS, TowersSpec
from harness.core.device import set_precision
from harness.core.errors import UserError
from harness.core.mesh import Mesh
from harness.data.loader import Reads
from harness.text.product_queries import read_meta
from models.batch import Batch
from models.heads.class_parallel import ClassHeadConfig, ClassParallelHead
from models.item import Item, ItemConfig
from models.make import Make, MakeConfig
from models.merge import merged_state_dict
from models.oclear import Oclear, OclearConfig
from models.plain.transformer import PlainBuilder
from models.shape import TransformerBuilder
from models.transformer import MegatronBuilder


class Method(Protocol):
    """What the loop, evaluation and export ask of a method."""

    @property
    def towers(self) -> nn.Module:
        """The parameters that are trained."""
        ...

    @property
    def head(self) -> ClassParallelHead | None:
        """The class-parallel head, if the objective has one."""
        ...

    @property
    def memory(self) -> nn.Module | None:
        """What training keeps besides towers and head, the same on every rank: memory banks."""
        ...

    def losses(self, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """(loss, the same on every rank; metrics as local [sum, weight]) of each micro-batch of a step; they add up to the step's.

        Backward is called on each before the next is asked for.
        """
        ...

    def embed_query(self, batch: Batch) -> Tensor:
        """Unit embeddings float32 [q, d]."""
        ...

    def embed_document(self, batch: Batch, seen: str = "both") -> Tensor:
        """Unit embeddings float32 [n, d]; `seen` is one of the method's `views`."""
        ...


@dataclass(frozen=True, kw_only=True)
class MethodSpec(TowersSpec):
    """What there is of a method, besides its towers.

    Args:
        assemble: (configuration, towers, head, data group) -> the method.
        reads: what its batches hold.
        classifies: whether its objective has a class-parallel head.
        tasks: what it can be evaluated by (harness/evaluate/tasks.py), the usual one first.
        views: how its documents can be seen, for a modality drop.
    """

    assemble: Callable[..., Method]
    reads: Callable[[Any], Reads]
    classifies: Callable[[Any], bool] = lambda config: False
    tasks: tuple[str, ...] = ()
    views: tuple[str, ...] = ("both", "title", "image")


def _oclear_reads(config: OclearConfig) -> Reads:
    return Reads(kind="photos" if config.objective == "classification" else "pairs", text_length=config.text.max_length)


def _make_reads(config: MakeConfig) -> Reads:
    masks = config.hide_words or config.weights.mlm or config.weights.mpm
    return Reads(
        kind="texts",
        text_length=config.text.max_length,
        query_length=config.query.max_length,
        num_patches=config.vision.num_patches if masks else 0,
    )


def _item_reads(config: ItemConfig) -> Reads:
    return Reads(kind="documents", text_length=config.text.max_length, num_patches=config.vision.num_patches)


METHODS: dict[str, MethodSpec] = {
    "oclear": MethodSpec(
        **vars(TOWERS["oclear"]),
        assemble=Oclear,
        reads=_oclear_reads,
        classifies=lambda config: config.objective == "classification",
        tasks=("photo", "category"),
        views=("both",),
    ),
    "make": MethodSpec(
        **vars(TOWERS["make"]),
        assemble=Make,
        reads=_make_reads,
        tasks=("text", "same_product", "category"),
    ),
    "item": MethodSpec(
        **vars(TOWERS["item"]),
        assemble=Item,
        reads=_item_reads,
        tasks=("same_product", "category", "photo"),
    ),
}


def with_keywords(method: str, model: Any, catalogue: Path) -> Any:
    """The method's configuration with the size of the catalogue's keyword table, where it has a place for that and no size of its own.

    Raises:
        UserError: the catalogue has no queries (harness/commands/queries.py), or other keywords than the objective on them is configured for.
    """
    if method != "make":
        return model
    meta = read_meta(catalogue)
    found, size = len(meta["keywords"]), model.num_keywords
    if model.weights.keywords and size not in (0, found):
        raise UserError(
            f"model.num_keywords is {size}, {catalogue} has {found} keywords", "Leave the key out, or set it to 0"
        )
    if model.weights.keywords and not found:
        raise UserError(
            f"{catalogue} has no keywords to train on",
            "Lower `shelfmark queries --min-count`, or set model.weights.keywords to 0",
        )
    return replace(model, num_keywords=size or found, product_keywords=meta["keywords_per_product"])


def build(
    method: str,
    model: Any,
    head: ClassHeadConfig,
    mesh: Mesh,
    *,
    num_classes: int,
    vocab_size: int,
    seed: int,
    precision: str,
) -> tuple[Method, Any]:
    """The tensor-parallel method on this mesh, and its configuration with vocabulary filled in.

    Weights depend on `seed` alone, not on the layout. `num_classes` 0 builds no head (evaluation).
    """
    spec = METHODS[method]
    model = replace(model, text=replace(model.text, vocab_size=model.text.vocab_size or vocab_size))
    set_precision(precision)
    mesh.seed_streams(seed, -1)
    torch.manual_seed(seed)  # the same on every rank, unlike the streams
    towers = spec.towers(model, builder(mesh))
    towers.to(mesh.device)
    for parameter in towers.parameters():
        if parameter.requires_grad:  # what is fitted, never trained, stays float32
            parameter.data = parameter.data.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    rows = None
    if num_classes and spec.classifies(model):
        settings = replace(head, num_classes=num_classes, embedding_dim=model.embedding_dim)
        rows = ClassParallelHead(settings, mesh.row_group, mesh.dp, mesh.device, copy_group=mesh.tp)
    return spec.assemble(model, towers, rows, mesh.dp), model


def builder(mesh: Mesh) -> TransformerBuilder:
    """What builds the blocks of towers that are trained or evaluated on this mesh.

    Where they are compiled and nothing is tensor-parallel, plain layers: each is one graph, where megatron-core's break. The same names and weights.

    Raises:
        UserError: they are to be compiled on a CPU, and there is no C++ compiler.
    """
    config = mesh.config
    compiles = config.compile == "always" or (config.compile == "auto" and mesh.device.type == "cuda")
    if compiles and mesh.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError("mesh.compile is 'always', but there is no C++ compiler (g++, or what CXX names)")
    backend = "inductor" if compiles else ""
    if compiles and mesh.tp.size() == 1:
        return PlainBuilder(config.recompute, backend)
    return MegatronBuilder(
        mesh.groups,
        sequence_parallel=config.sequence_parallel,
        recompute=config.recompute,
        layer_norm=mesh.accelerators.layer_norm,
        backend=backend,
    )


def plain_query_encoder(method: str, model: Any, towers: nn.Module, mesh: Mesh) -> nn.Module:
    """The method's query encoder in plain torch, fp32 on the CPU, with the weights of tensor-parallel `towers`; collective over tp."""
    state = {name: value.float().cpu() for name, value in merged_state_dict(towers, mesh.tp).items()}
    plain = METHODS[method].towers(model, PlainBuilder())
    plain.load_state_dict(state)
    return METHODS[method].query_encoder(plain).eval()
