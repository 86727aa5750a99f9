"""Registry of the methods: `method` in a recipe selects an entry. Trainer, evaluation and export know no method by
name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from models.batch import Batch, Reads
from models.heads.class_parallel import ClassParallelHead
from models.item import Item, ItemConfig, ItemQuery, ItemTowers
from models.make import Make, MakeConfig, MakeQuery, MakeTowers
from models.oclear import Oclear, OclearConfig, OclearQuery, OclearTowers
from models.shape import TransformerBuilder


class Method(Protocol):
    """Interface of a method to trainer, evaluation and export."""

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
        """State of training besides towers and head, the same on every rank: memory banks."""
        ...

    def losses(self, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """(loss, the same on every rank; metrics as local [sum, weight]) of each micro-batch of a step; they add up to
        the step's.

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
class MethodSpec:
    """Entry of a method.

    Args:
        config: its configuration class.
        towers: builds its towers.
        query_encoder: its query encoder for serving, of plain towers.
        assemble: (configuration, towers, head, data group) -> the method.
        reads: content of its batches.
        classifies: whether its objective has a class-parallel head.
        tasks: evaluation tasks (harness/evaluate/tasks.py), the usual one first.
        views: modalities that its documents can be reduced to.
        query: input of its query encoder: image or text.
    """

    config: type[Any]
    towers: Callable[[Any, TransformerBuilder], nn.Module]
    query_encoder: Callable[[Any], nn.Module]
    assemble: Callable[..., Method]
    reads: Callable[[Any], Reads]
    classifies: Callable[[Any], bool] = lambda config: False
    tasks: tuple[str, ...] = ()
    views: tuple[str, ...] = ("both", "title", "image")
    query: str = "image"


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
        config=OclearConfig,
        towers=OclearTowers,
        query_encoder=OclearQuery,
        assemble=Oclear,
        reads=_oclear_reads,
        classifies=lambda config: config.objective == "classification",
        tasks=("photo", "category"),
        views=("both",),
    ),
    "make": MethodSpec(
        config=MakeConfig,
        towers=MakeTowers,
        query_encoder=MakeQuery,
        query="text",
        assemble=Make,
        reads=_make_reads,
        tasks=("text", "same_product", "category"),
    ),
    "item": MethodSpec(
        config=ItemConfig,
        towers=ItemTowers,
        query_encoder=ItemQuery,
        assemble=Item,
        reads=_item_reads,
        tasks=("same_product", "category", "photo"),
    ),
}
