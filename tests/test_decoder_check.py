"""The decoder of a service against the decoder of the documents: equal on a CPU, alike for Pillow and DALI, refused
where they differ.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.artefact import decoder_check
from harness.catalogue.catalogue import Catalogue
from harness.core.errors import UserError
from harness.data.images import ImageReader, Pixels
from tests.pool import ranks
from tests.runs import tiny_config, trainer
from tests.test_search import export_here


class Other(ImageReader):
    """The first reader of a check decodes with Pillow, the second with DALI; `mirrored`: and the first sees its images
    mirrored.
    """

    made: list[str]
    mirrored = False

    def __init__(self, catalogue: Any, spec: Any, backend: str, *rest: Any) -> None:
        self.first = not self.made
        self.made.append(backend)
        super().__init__(catalogue, spec, "reference" if self.first else "dali", *rest)

    def decode(self, request: Any) -> Pixels:
        images, ok = super().decode(request)
        return Pixels(images.flip(3) if self.first and self.mirrored else images, ok)


def test_decoders_are_compared_by_what_the_towers_see(
    catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trainer(tiny_config(catalogue, tmp_path / "run", **{"train.steps": 30, "optimizer.lr": 3e-3})) as t:
        for data in t.loader.steps(0, 30):
            t.train_step(data)
        t.method.towers.eval()

        def compare() -> dict[str, Any]:
            monkeypatch.setattr(Other, "made", [], raising=False)
            place = (t.method, t.config, Catalogue(catalogue), None, t.tokenizer, t.mesh)
            return decoder_check.compare_decoders(*place)

        found = compare()
        assert found["decoded_by"] == found["served_by"] == "DALI on cpu, 1 thread(s)" and found["documents"] == 6
        assert found["lowest_cosine"] == pytest.approx(1, abs=1e-12) and found["largest_difference"] == 0
        monkeypatch.setattr(decoder_check, "ImageReader", Other)
        found = compare()
        assert found["decoded_by"] == "Pillow, 1 thread(s)" and found["served_by"].startswith("DALI on cpu")
        assert decoder_check.LEAST_COSINE < found["lowest_cosine"] < 1 and found["largest_difference"] > 0
        monkeypatch.setattr(Other, "mirrored", True)
        with pytest.raises(UserError, match=r"differ: .* below 0.999. Set data.backend to dali_cpu in"):
            compare()
        with torch.no_grad():
            next(t.method.towers.parameters()).fill_(torch.nan)
        with pytest.raises(UserError, match="cosine of nan"):
            compare()


def test_an_artefact_says_how_its_documents_were_decoded(catalogue: Path, tmp_path: Path) -> None:
    with trainer(
        tiny_config(catalogue, tmp_path / "run", **{"data.threads": 0})
    ) as t:  # threads from the cores, in export too
        t.fit()
    ranks(1).run(export_here, tmp_path / "run", tmp_path / "artefact")
    found = json.loads((tmp_path / "artefact/artefact.json").read_text())["decoders"]
    assert found["documents"] == 6 and found["largest_difference"] == 0
