"""Dry run of a training step: the method's real modules and losses on tensors that have shapes and no numbers (torch's
FakeTensorMode).
"""

from __future__ import annotations

import logging
import sys
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from harness.core.build import builder
from harness.core.mesh import Mesh
from harness.data.masking import MaskConfig
from harness.train.config import RunConfig
from harness.train.param_groups import freeze
from kernels.cosine_lse import CosineLse
from models.batch import TENSORS, Batch
from models.comm import share
from models.heads import class_parallel
from models.heads.class_parallel import ClassParallelHead
from models.registry import METHODS


class Shapes(FakeTensorMode):
    """FakeTensorMode in which what was made outside of it, the labels and masks of a batch, keeps its numbers, so that
    they can be asked for.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if given and not any(isinstance(x, FakeTensor) for x in given):
            return function(*args, **(kwargs or {}))
        return super().__torch_dispatch__(function, types, args, kwargs)


class Recorder(TorchDispatchMode):
    """Bytes of all tensors that are made inside and still there, the most at a time, and the bytes sent.

    Args:
        known: tensors that are there already and do not count.

    Attributes:
        alive, peak: bytes.
        sent: bytes that a rank sends in a ring's algorithm over n ranks, (n - 1) / n of the whole tensor, twice for an
            all-reduce: by the package that asks for it, megatron (inside the towers) or models (the losses).
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.sent: defaultdict[str, float] = defaultdict(float)
        self._held: dict[int, Any] = {t.untyped_storage()._cdata: None for t in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if function.namespace == "c10d":
            self._send(function, args)
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())
        return found

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._held:
            return

        def free(_: Any) -> None:
            del self._held[key]
            self.alive -= size

        self._held[key] = weakref.ref(storage, free)
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def _send(self, function: Any, args: Any) -> None:
        group = next(x for x in tree_leaves(args) if isinstance(x, torch.ScriptObject))
        ranks = dist.ProcessGroup.unbox(group).size()
        largest = max(x.nbytes for x in tree_leaves(args) if isinstance(x, Tensor))
        frame: Any = sys._getframe()
        while (package := frame.f_globals["__name__"].partition(".")[0]) not in ("megatron", "models"):
            frame = frame.f_back
        self.sent[package] += (2 if "allreduce" in str(function) else 1) * (ranks - 1) / ranks * largest


class _OnGpu(TorchFunctionMode):
    """Dropout as a GPU keeps it: a byte each for the mask, and no maps of attention."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            kwargs = {**kwargs, "dropout_p": 0.0}
        if function is F.dropout:
            return _dropout(*args, **kwargs)
        return function(*args, **kwargs)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, training)[0] if training and p else x


class _Kernel:
    """The class head's kernel by its shapes, since what it does depends on the labels: a tile of rows and their logits
    at work.
    """

    @staticmethod
    def cosine_lse(embeddings: Tensor, rows: Tensor, *_: Any) -> CosineLse:
        return CosineLse(*(embeddings.new_empty(len(embeddings)) for _ in CosineLse._fields))

    @staticmethod
    def cosine_lse_backward(embeddings: Tensor, rows: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        tile = min(len(rows), rest[-1])
        at_work = embeddings.new_empty(tile, len(embeddings) + 3 * rows.shape[1])
        gradients = torch.empty_like(embeddings), embeddings.new_empty(rows.shape)
        del at_work
        return gradients


@contextmanager
def _kernel_by_shapes() -> Iterator[None]:
    theirs, class_parallel._kernel = class_parallel._kernel, lambda _: _Kernel  # type: ignore[assignment]
    try:
        yield
    finally:
        class_parallel._kernel = theirs


@dataclass(frozen=True)
class DryRun:
    """Counts of a dry run on a rank.

    Args:
        parameters: numbers of the towers that the rank holds; trained: those that are trained, and largest, of the
            largest of these.
        bank: bytes of the memory banks.
        kept: bytes that backward finds of a micro-batch.
        peak: the most transient bytes at a time.
        sent: see Recorder.
    """

    parameters: int
    trained: int
    largest: int
    bank: int
    kept: int
    peak: int
    sent: Mapping[str, float]


def dry_run(config: RunConfig, world: int, active: float, cuda: bool, held: Sequence[str] = ()) -> DryRun:
    """Runs the losses of a step and their backward on the first of `world` ranks; weights, their gradients and images
    are not transient.

    Args:
        config: a recipe whose sizes are all known.
        world: ranks.
        active: rows of the class head that take part, over all ranks; 0: there is no head.
        cuda: as a GPU would keep activations.
        held: parts of the towers that are not trained in these steps of the run only, as in optimizer.frozen.
    """
    spec, model = METHODS[config.method], config.model
    with _mesh_of(config, world) as mesh, Shapes():
        towers = spec.towers(model, builder(mesh))
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        for p in towers.parameters():  # as harness.core.build.build, whose Module.to cannot move fake parameters
            p.data = p.data.to(dtype) if p.requires_grad else p.data
        freeze(towers, config.optimizer.frozen)
        trained = [p for p in towers.parameters() if p.requires_grad]
        for p in trained:  # gradients go on to megatron-core's buffer
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        freeze(towers, held, "train.stages")
        head = None
        if active:
            settings = replace(
                config.head, num_classes=round(active), embedding_dim=model.embedding_dim, sample_rate=1.0
            )
            head = ClassParallelHead(settings, mesh.row_group, mesh.dp, mesh.device, copy_group=mesh.tp)
        method: Any = spec.assemble(model, towers, head, mesh.dp)
        batches = [
            made_batch(config, _sizes(config, mesh.dp.size(), i), dtype) for i in range(config.data.micro_batches)
        ]
        there = [*towers.parameters(), *towers.buffers(), *([] if head is None else [head.rows])]
        there += [getattr(batch, name) for batch in batches for name in TENSORS]
        banks = method.memory
        there += [] if banks is None else banks.buffers()
        fill_banks(banks)
        kept, recorder = 0, Recorder(there)
        with (
            recorder,
            _OnGpu() if cuda else nullcontext(),
            _kernel_by_shapes(),
        ):
            mesh.seed_streams(0, 0)
            if head is not None:
                head.begin_step(torch.cat([b.host.labels for b in batches]))
            for loss, _ in method.losses(batches):
                kept = max(kept, recorder.alive)
                loss.backward()
                del loss
    counts = [p.numel() for p in trained]
    return DryRun(
        sum(p.numel() for p in towers.parameters()),
        sum(counts),
        max(counts),
        0 if banks is None else sum(b.nbytes for b in banks.buffers()),
        kept,
        recorder.peak,
        recorder.sent,
    )


def made_batch(config: RunConfig, sizes: dict[str, list[int]], dtype: torch.dtype = torch.float32) -> Batch:
    """The first rank's micro-batch of a step whose sizes are given, texts at their full length, as much of it masked as
    is to be expected.

    On the host are only its masks and the documents' tokens.
    """
    model, reads = config.model, METHODS[config.method].reads(config.model)
    n, queries, side = sizes["document"][0], sizes["query"][0], config.data.preprocess.image_size
    photos, texts = (0, queries) if reads.kind == "texts" else (queries, 0)
    hidden = masked(config.data.masking, reads.text_length, reads.num_patches)
    with _disable_current_modes():
        words, patches = (
            _first(n, count, k) for count, k in zip(hidden, (reads.text_length, reads.num_patches), strict=True)
        )
        host = Batch.of_texts(torch.zeros(0, 0))
        host = replace(
            host,
            query_labels=torch.zeros(queries, dtype=torch.int64),
            document_labels=torch.zeros(n, dtype=torch.int64),
            document_tokens=torch.full((n, reads.text_length), 1 + model.text.pad_id),
            masked_words=words,
            masked_patches=patches,
            masked_titles=torch.zeros(n, dtype=torch.bool),
        )

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    titles = ("document_tokens", "masked_tokens", "other_tokens")
    known: dict[str, Tensor] = {name: zeros(n, reads.text_length) for name in titles}
    known |= {name: zeros(n, reads.keywords) for name in ("keywords", "query_keywords")}
    known |= {name: zeros(n) for name in ("document_labels", "document_ids", "categories")}
    known |= {name: zeros(queries) for name in ("query_labels", "query_ids")}
    known |= {
        name: torch.zeros(getattr(host, name).shape, dtype=torch.bool)
        for name in ("masked_words", "masked_patches", "masked_titles")
    }
    return replace(
        host,
        **known,
        query_images=zeros(photos, 3, side, side, dtype=dtype),
        query_weights=torch.ones(queries),
        document_images=zeros(n, 3, side, side, dtype=dtype),
        document_weights=torch.ones(n),
        query_tokens=zeros(texts, reads.query_length),
        sizes=sizes,
        origin=host,
    )


def fill_banks(banks: Any) -> None:
    """Lets memory banks, or None, be full and take part."""
    with _disable_current_modes():
        for bank in [] if banks is None else banks.values():
            bank.pushed = torch.tensor(max(bank.after, len(bank.labels)))


def masked(config: MaskConfig, words: int, patches: int) -> tuple[float, float]:
    """Masked words and patches to expect in a document with room for so many: rate x max_length and the mean rate x
    patches, as if titles filled their room with ordinary pieces (padding is never masked, so there are fewer); with
    one_heavy the mean of its two ways.
    """
    rate, share = config.word_rate, sum(config.patch_rates) / 2
    if config.one_heavy:
        rate, share = (rate + config.heavy_word_rate) / 2, share / 2
    return rate * words, share * patches


def _first(rows: int, count: float, room: int) -> Tensor:
    """bool [rows, room], true at the first places of each row, at `count` of them in the mean."""
    ends = (torch.arange(rows + 1) * count + 1e-6).floor()
    return torch.arange(room) < (ends[1:] - ends[:-1])[:, None]


def samples(config: RunConfig) -> tuple[int, int]:
    """Query photos and documents of a step, over all ranks."""
    reads = METHODS[config.method].reads(config.model)
    return reads.samples(config.data.queries_per_step, config.data.documents_per_step)


def _sizes(config: RunConfig, ranks: int, micro: int) -> dict[str, list[int]]:
    """Samples of each of `ranks` in a micro-batch, the largest first."""
    reads, pieces = METHODS[config.method].reads(config.model), ranks * config.data.micro_batches
    per_step = reads.rows(config.data.queries_per_step, config.data.documents_per_step)
    places = range(pieces - 1 - micro * ranks, pieces - 1 - (micro + 1) * ranks, -1)
    return {side: [len(share(size, pieces, place)) for place in places] for side, size in per_step.items()}


@contextmanager
def _mesh_of(config: RunConfig, world: int) -> Iterator[Mesh]:
    """The groups of the first of `world` ranks, the only one that exists."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    hook = sys.excepthook  # torch puts the rank before what it prints
    with warnings.catch_warnings(action="ignore"):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
        mesh = Mesh(replace(config.mesh, device="cpu", compile="never", accelerators="torch"))
        try:
            yield mesh
        finally:
            mesh.close()
            sys.excepthook = hook
