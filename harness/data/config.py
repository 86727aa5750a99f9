"""Configuration of a run's data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from harness.data.masking import MaskConfig
from harness.data.preprocess import PreprocessSpec
from models.ranges import ClosedUnitInterval, NonNegativeInt, PositiveInt

Backend = Literal["dali", "dali_cpu", "reference"]
BACKENDS = get_args(Backend)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Configuration of a run's data.

    Args:
        catalogue: folder made by `shelfmark ingest`, with classes (`govern`) and a tokenizer (`tokenizer`).
        queries_per_step: query photos in one optimizer step, over all ranks; ignored by a method that trains on
            documents only.
        documents_per_step: documents in one optimizer step, over all ranks; ignored where every query photo brings a
            document of its own.
        micro_batches: parts into which a rank cuts its share of the step, to save memory.
        backend: dali (decodes on the GPU if there is one), dali_cpu (always on the CPU), or reference (Pillow and
            numpy, for platforms without a DALI wheel).
        threads: decoding threads of each rank; 0: the process's cores divided by the ranks of its node, less two, at
            least 1. Results do not depend on it.
        read_ahead: largest number of steps that are read ahead.
        read_ahead_bytes: most bytes of decoded images that a rank reads ahead, on the device that decodes; one step is
            always read ahead.
        max_bad_fraction: largest share of damaged samples among those read since the start; above it the run stops at a
            line of log, but not before 1,000 samples were read. Damaged samples have weight 0.
        preprocess: steps from an image to the model's input.
        mosaic: probability that a document's training image becomes a mosaic: one of four parts shows it, the others
            show other documents of the micro-batch; its text and class stay its own. 0 = off.
        query_attributes: fewest and most attributes in a text query that is made of attributes.
        masking: masks of masked modelling.
    """

    catalogue: Path = Path("catalogue")
    queries_per_step: PositiveInt = 64
    documents_per_step: PositiveInt = 64
    micro_batches: PositiveInt = 1
    backend: Backend = "dali"
    threads: NonNegativeInt = 0
    read_ahead: PositiveInt = 3
    read_ahead_bytes: PositiveInt = 1 << 30
    max_bad_fraction: ClosedUnitInterval = 0.01
    preprocess: PreprocessSpec = field(default_factory=PreprocessSpec)
    mosaic: ClosedUnitInterval = 0.0
    query_attributes: tuple[PositiveInt, PositiveInt] = (1, 4)
    masking: MaskConfig = field(default_factory=MaskConfig)

    def errors(self) -> list[str]:
        """Errors for values that do not fit together; each names its key."""
        errors = self.preprocess.errors("data.preprocess") + self.masking.errors("data.masking")
        fewest, most = self.query_attributes
        if fewest > most:
            errors.append(f"data.query_attributes is {self.query_attributes}; the first must not be above the second")
        return errors
