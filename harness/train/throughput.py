"""Speed of a run: seconds of each part of a step, images a second, FLOPs utilisation, read-ahead."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist

from harness.core.mesh import Mesh
from harness.core.watch import Pace
from harness.data.loader import StepLoader
from harness.data.step_data import StepData
from harness.train.config import RunConfig
from harness.train.flops import StepFlops, utilisation
from models.method import TextInput

_NEXT = {"data": "forward", "forward": "backward", "backward": "optimizer", "optimizer": "what follows a step"}


class StepClock:
    """Seconds of each part of a step. On a GPU they are true only where every mark waits for the device: see `exact`.

    Attributes:
        now: the present part.
        marks: parts begun so far.
        seconds: part -> seconds, of the present step.
        waited: seconds of them in `others`, of an exact step.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.now, self.marks, self._steps = "the start", 0, 0
        self.exact, self.waited = False, 0.0
        self.seconds: dict[str, float] = {}
        self._charged: dict[str, float] = {}  # since `take_share`
        self._last = time.perf_counter()

    def start(self, exact: bool) -> None:
        """Begins a step; `exact` waits for the device at every mark."""
        self.exact, self.seconds, self.waited, self.now = exact, {}, 0.0, "data"
        self.marks, self._steps = self.marks + 1, self._steps + 1
        self._last = time.perf_counter()

    def mark(self, part: str) -> None:
        """Charges the time since the last mark to `part`."""
        if self.exact:
            self.mesh.synchronize()
        now = time.perf_counter()
        for sums in (self.seconds, self._charged):
            sums[part] = sums.get(part, 0.0) + now - self._last
        self._last, self.now, self.marks = now, _NEXT[part], self.marks + 1

    @contextmanager
    def between(self, what: str) -> Iterator[None]:
        """Around work of any length before a step, which is charged to none of its parts."""
        self.now = what
        yield
        self._steps = 0  # the step behind it may compile, and fills the read-ahead
        self.start(self.exact)

    @contextmanager
    def others(self) -> Iterator[None]:
        """Around an exchange between ranks: in an exact step its time is a wait for others, not this rank's own."""
        if not self.exact:
            yield
            return
        self.mesh.synchronize()
        began = time.perf_counter()
        yield
        self.mesh.synchronize()
        self.waited += time.perf_counter() - began

    def pace(self) -> Pace:
        """Longest time of the present part; between two steps for any length."""
        if self.now not in _NEXT:
            return Pace(self.marks)
        config = self.mesh.config
        first = self._steps == 1 or not config.step_minutes  # it compiles, and fills the read-ahead
        # Sooner than a collective ends, later than a silent rank is named as such.
        return Pace(self.marks, 66 * config.timeout_minutes if first else 60 * config.step_minutes)

    def take_share(self, part: str) -> float:
        """The part's share of all time charged since the last call."""
        share = self._charged.get(part, 0.0) / max(1e-9, sum(self._charged.values()))
        self._charged = {}
        return share


class Throughput:
    """Speed of a run, for the lines of its log and for its final figures.

    Args:
        config: of the run's first stage.
        text: configuration of the documents' texts, with its vocabulary.
        loader: of the run.
        mesh: the ranks.

    Attributes:
        images: read over all ranks since `start`.
    """

    def __init__(self, config: RunConfig, text: TextInput, loader: StepLoader, mesh: Mesh) -> None:
        self.mesh, self.loader, self.precision = mesh, loader, config.train.precision
        self._text = text
        self._config: RunConfig | None = None
        self.enter(config, 0)
        self.start()
        # (images read, seconds of reading, share of the read-ahead that was ready, FLOPs of the texts) of each step
        # since the last `local_sums`.
        self._steps: list[tuple[float, ...]] = []

    def enter(self, config: RunConfig, step: int) -> None:
        """Begins a stage of the run at `step`, which trains as `config` says."""
        if config == self._config:
            return
        self._config = config
        config = replace(config, model=replace(config.model, text=self._text))
        self.images_per_step = sum(self.loader.samples(step))  # over all ranks
        classes, documents = self.loader.order.num_classes, self.loader.samples(step)[1]
        self.flops = StepFlops.for_meters(config, classes, documents, self.mesh.device)

    def start(self) -> None:
        """Begins the run, or its continuation."""
        self.images, self._started, self._paused = 0, time.perf_counter(), 0.0
        self.start_window()

    def start_window(self) -> None:
        """Begins the window that `rate` looks at."""
        self._window_images, self._window_started = self.images, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count the time of the block: a checkpoint, an evaluation."""
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self._paused += seconds
        self._window_started += seconds

    def add(self, data: StepData) -> None:
        """Adds a step."""
        self.images += self.images_per_step
        self._steps.append((data.images, data.read_seconds, data.ready, self.flops.texts(data.texts)))

    @property
    def rate(self) -> float:
        """Images a second over all ranks in the present window."""
        return (self.images - self._window_images) / (time.perf_counter() - self._window_started)

    def local_sums(self) -> list[list[float]]:
        """This rank's sums since the last call, [3, 2]: summed over the world, each row's first by its second are the
        `means` of `figures`.
        """
        images, seconds, ready, texts = (sum(column) for column in zip(*self._steps, strict=True))
        steps, self._steps = len(self._steps), []
        return [[images, seconds], [ready, steps], [texts, steps]]

    def figures(self, rate: float, means: list[float], wait: float) -> dict[str, float]:
        """Figures of a line of the log; collective.

        Args:
            rate: see `rate`.
            means: see `local_sums`.
            wait: the share of its time in which this rank waited for data.
        """
        decode_rate, fill, texts = means
        flops = self.flops.fixed + texts * self.mesh.dp.size()
        seconds = self.images_per_step / rate
        longest = torch.tensor(wait, dtype=torch.float64, device=self.mesh.device)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)  # the others wait for the rank that waits longest
        return {
            "speed/images_per_second": rate,
            **utilisation(flops, seconds, self.mesh.world_size, self.mesh.device, self.precision),
            "speed/data_wait_share": longest.item(),
            "speed/read_ahead_fill": fill,
            "speed/decode_images_per_second": decode_rate,  # of one rank's reader: all images by all seconds
        }

    def summary(self) -> dict[str, float]:
        """Seconds since `start`, and images a second, pauses left out."""
        seconds = time.perf_counter() - self._started
        rate = self.images / max(1e-9, seconds - self._paused)
        return {"seconds": round(seconds, 1), "images_per_second": round(rate, 1)}
