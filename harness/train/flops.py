"""Model FLOPs of a training step, counted in a dry run of the plain towers; for `shelfmark estimate`, the meters and
the benchmarks of towers.

Counted: matrix products and convolutions, a multiplication and an addition being two operations, by the formulas of
torch.utils.flop_counter. Model FLOPs: what the mathematics needs. What is computed again to save memory (attention,
recomputation, tiles of the head) does not count, so a utilisation made of them compares between systems. Nor does
padding: what texts cost follows from their own lengths (`StepFlops`).
"""

from __future__ import annotations

import bisect
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import FakeProcessGroup
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

from harness.data.step_data import TextTokens
from harness.train.config import RunConfig
from harness.train.dry_run import Shapes, fill_banks, made_batch, samples
from harness.train.param_groups import freeze
from models.method import text_inputs
from models.plain.transformer import PlainBuilder
from models.registry import METHODS


@dataclass(frozen=True)
class Work:
    """Operations of a part, forward and backward."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        """Forward and backward together."""
        return self.forward + self.backward


class _Counter(TorchDispatchMode):
    """Counts by the child of `towers` in whose forward an operation was asked for; `losses` is the rest.

    A backward operation belongs to the part whose forward made its node: torch numbers the nodes of a graph in the
    order of their making.
    """

    def __init__(self, towers: nn.Module) -> None:
        super().__init__()
        self.found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._parts = ["losses"]
        self._marks = [(-1, "losses")]
        for name, child in towers.named_children():
            child.register_forward_pre_hook(lambda *_, name=name: self._enter(name))
            child.register_forward_hook(lambda *_: self._leave())

    def _enter(self, name: str) -> None:
        self._parts.append(name)
        self._mark()

    def _leave(self) -> None:
        self._parts.pop()
        self._mark()

    def _mark(self) -> None:
        self._marks.append((torch.autograd._get_sequence_nr(), self._parts[-1]))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if (count := flop_registry.get(function._overloadpacket)) is not None:
            node = torch._C._current_autograd_node()
            part = self._parts[-1]
            if node is not None:
                part = self._marks[bisect.bisect_right(self._marks, node._sequence_nr(), key=lambda mark: mark[0]) - 1][
                    1
                ]
            if function is torch.ops.aten.convolution_backward.default:
                found = _convolution_backward(*args)
            else:
                found = count(*args, **(kwargs or {}), out_val=out)
            self.found[part][node is not None] += found
        return out

    @property
    def work(self) -> dict[str, Work]:
        """Of each part that has any."""
        return {part: Work(*found) for part, found in self.found.items()}


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *settings: Any) -> float:
    """Operations of the wanted gradients, each as many as forward. torch's own formula takes the gradient of a grouped
    convolution's weights for that of a full one.
    """
    wanted = settings[-1]
    return (wanted[0] + wanted[1]) * conv_flop_count(list(x.shape), list(weight.shape), list(grad.shape))


def tower_flops(make: Callable[[], nn.Module], inputs: Tensor) -> float:
    """Model FLOPs of forward and backward of the plain tower that `make` builds, on inputs of this shape."""
    with Shapes(), sdpa_kernel(SDPBackend.MATH):
        tower = make()
        with _Counter(tower) as counter:
            dtype = torch.float32 if inputs.is_floating_point() else inputs.dtype
            found = tree_leaves(tower(torch.zeros(inputs.shape, dtype=dtype)))
            torch.stack([output.sum() for output in found]).sum().backward()
    return sum(part.total for part in counter.work.values())


def active_rows(num_classes: int, sample_rate: float, samples: int) -> float:
    """Expected number of classes that take part in a step: those drawn, and of the others the positives, taken as
    distinct.
    """
    return sample_rate * num_classes + (1 - sample_rate) * min(samples, num_classes)


def step_parts(config: RunConfig, num_classes: int, held: Sequence[str] = ()) -> dict[str, Work]:
    """Model FLOPs of one optimizer step over all ranks, by part of the towers, with texts of max_length tokens; the
    class head's by formula. `held`: as in `dry_run`.
    """
    spec, model = METHODS[config.method], config.model
    reads = spec.reads(model)
    per_step = config.data.queries_per_step, config.data.documents_per_step
    counts = samples(config)
    # A loss of photos is one over all of the step; others compare the samples of a micro-batch.
    pieces = 1 if counts[0] else config.data.micro_batches
    sizes = {side: [-(-count // pieces)] for side, count in reads.rows(*per_step).items()}
    head: Any = (lambda embeddings, *_: (embeddings.sum(), {})) if spec.classifies(model) else None
    with torch.random.fork_rng(devices=[]), Shapes(), sdpa_kernel(SDPBackend.MATH):
        towers = spec.towers(model, PlainBuilder())
        freeze(towers, config.optimizer.frozen)
        freeze(towers, held, "train.stages")
        method: Any = spec.assemble(model, towers, head, FakeProcessGroup._create_internal(0, 1))
        fill_banks(method.memory)
        with _Counter(towers) as counter:
            for loss, _ in method.losses([made_batch(config, sizes)]):
                loss.backward()
    times = counts[1] / sizes["document"][0]
    parts = {part: Work(work.forward * times, work.backward * times) for part, work in counter.work.items()}
    if head is not None:  # cosines of all samples with all active rows
        rows = active_rows(num_classes, config.head.sample_rate, sum(counts))
        product = 2.0 * sum(counts) * rows * model.embedding_dim
        parts["head"] = Work(product, 2 * product)
    return parts


def flops_per_step(config: RunConfig, num_classes: int) -> float:
    """Model FLOPs of one optimizer step, forward and backward, over all ranks, with texts of max_length tokens."""
    return sum(part.total for part in step_parts(config, num_classes).values())


def with_length(config: RunConfig, tower: str, tokens: int) -> RunConfig:
    """The recipe with texts of `tokens` tokens in the text input that is this field of the model."""
    model = replace(config.model, **{tower: replace(getattr(config.model, tower), max_length=tokens)})
    return replace(config, model=model)


@dataclass(frozen=True)
class StepFlops:
    """Model FLOPs of one optimizer step by the texts that are in it, a polynomial of degree 2 in a text's length.

    Args:
        fixed: over all ranks, of all but the texts' tokens; 0: not known.
        factors: of each of the sums in TextTokens.
    """

    fixed: float = 0.0
    factors: tuple[float, ...] = ()

    @classmethod
    def of(cls, config: RunConfig, num_classes: int, documents: int) -> StepFlops:
        """For steps of so many documents over all ranks, each with a text query where the method has these. Other
        titles count as long as the own.
        """
        fixed = whole = flops_per_step(config, num_classes)
        factors: list[float] = []
        for tower, text in text_inputs(config.model).items():
            n = text.max_length
            # far apart, since masked words come in whole numbers
            more, most = (flops_per_step(with_length(config, tower, k * n), num_classes) for k in (9, 17))
            square = (most - 2 * more + whole) / (2 * (8 * n) ** 2)
            linear = (more - whole) / (8 * n) - 10 * n * square
            fixed -= linear * n + square * n**2
            factors += [linear / documents, square / documents]
        return cls(fixed, tuple(factors))

    @classmethod
    def for_meters(cls, config: RunConfig, num_classes: int, documents: int, device: torch.device) -> StepFlops:
        """As `of` where `device` has a peak to compare with, else of nothing; so too, with a warning, for a method that
        cannot be counted.
        """
        if peak_flops(device, config.train.precision) is None:
            return cls()
        try:
            return cls.of(config, num_classes, documents)
        except Exception as error:  # a run is worth more than its meter
            warnings.warn(f"no model FLOPs utilisation: a dry run of {config.method} failed: {error}", stacklevel=2)
            return cls()

    def texts(self, tokens: TextTokens) -> float:
        """FLOPs of texts, beyond `fixed`."""
        return sum(factor * count for factor, count in zip(self.factors, tokens, strict=False))


# Part of the device's name -> dense peak in TFLOP/s of (bf16 tensor cores, fp32 without them), from NVIDIA's data
# sheets. The first that fits counts.
_PEAKS: dict[str, tuple[float, float]] = {
    "B200": (2250, 75),
    "H200": (989, 67),
    "GH200": (989, 67),
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H100": (989, 67),
    "A100": (312, 19.5),
    "A30": (165, 10.3),
    "L40S": (362, 91.6),
    "L4": (121, 30.3),
    "A10": (125, 31.2),
    "RTX 4090": (165, 82.6),
    "RTX 3090": (71, 35.6),
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of `device` in `precision` (of train.precision) by its data sheet; None for a CPU and for GPUs that
    are not in the table.

    A CPU has no such figure: its clock depends on the instructions and on what else runs, so a utilisation would
    mislead.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # whole words: "A100-SXM4-80GB" is an A100, "L40S" is no L4
    words = name.replace("-", " ").split()
    for key, (bf16, fp32) in _PEAKS.items():
        if all(word in words for word in key.split()):
            # tensor cores multiply TF32 at half the rate of bf16, on all of these
            return 1e12 * {"bf16": bf16, "tf32": bf16 / 2}.get(precision, fp32)
    return None


def utilisation(flops: float, seconds: float, ranks: int, device: torch.device, precision: str) -> dict[str, float]:
    """{"speed/model_flops_utilisation": share of the ranks' peak} for `flops` over all ranks in `seconds`; empty where
    either is not known.
    """
    peak = peak_flops(device, precision)
    return {"speed/model_flops_utilisation": flops / (seconds * ranks * peak)} if peak and flops and seconds > 0 else {}
