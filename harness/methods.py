"""The registry of methods: what `method` in a recipe selects. The loop knows no method by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from harness.mesh import Mesh
from models.batch import Batch
from models.heads.class_parallel import ClassHeadConfig, ClassParallelHead
from models.merge import merged_state_dict
from models.oclear import Oclear, OclearConfig, OclearQuery, OclearTowers
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

    def losses(self, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """(loss, the same on every rank; metrics as local [sum, weight]) of each micro-batch of a step; they add up to the step's.

        Backward is called on each before the next is asked for.
        """
        ...

    def embed_query(self, batch: Batch) -> Tensor:
        """Unit embeddings float32 [q, d]."""
        ...

    def embed_document(self, batch: Batch) -> Tensor:
        """Unit embeddings float32 [n, d]."""
        ...


@dataclass(frozen=True)
class MethodSpec:
    """A method's configuration class, its towers, its query encoder for serving, and how it is put together with a head."""

    config: type[Any]
    towers: Callable[[Any, TransformerBuilder], nn.Module]
    query_encoder: Callable[[Any], nn.Module]
    assemble: Callable[..., Method]
    paired: Callable[[Any], bool]


METHODS: dict[str, MethodSpec] = {
    "oclear": MethodSpec(
        config=OclearConfig,
        towers=OclearTowers,
        query_encoder=OclearQuery,
        assemble=Oclear,
        paired=lambda config: config.objective == "contrastive",
    )
}


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
    mesh.seed_streams(seed, -1)
    torch.manual_seed(seed)  # the same on every rank, unlike the streams
    builder = MegatronBuilder(
        mesh.groups,
        sequence_parallel=mesh.config.sequence_parallel,
        recompute=mesh.config.recompute,
        layer_norm=mesh.accelerators.layer_norm,
    )
    towers = spec.towers(model, builder)
    towers.to(mesh.device, torch.bfloat16 if precision == "bf16" else torch.float32)
    rows = None
    if num_classes and not spec.paired(model):
        settings = replace(head, num_classes=num_classes, embedding_dim=model.embedding_dim)
        rows = ClassParallelHead(settings, mesh.row_group, mesh.dp, mesh.device)
    return spec.assemble(model, towers, rows, mesh.dp), model


def plain_query_encoder(method: str, model: Any, towers: nn.Module, mesh: Mesh) -> nn.Module:
    """The method's query encoder in plain torch, fp32 on the CPU, with the weights of tensor-parallel `towers`; collective over tp."""
    state = {name: value.float().cpu() for name, value in merged_state_dict(towers, mesh.tp).items()}
    plain = METHODS[method].towers(model, PlainBuilder())
    plain.load_state_dict(state)
    return METHODS[method].query_encoder(plain).eval()
