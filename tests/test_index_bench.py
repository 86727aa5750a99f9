"""Benchmarks of indexes and exports: vectors of a mixture fitted to others, rows as soon as a kind is ready."""

from pathlib import Path

import numpy as np
import pytest

from harness.bench import export, index
from harness.bench.mixture import FASHION, Mixture, cosines, write_synthetic
from harness.core.errors import UserError
from tests.test_bench import check_report


def test_a_mixture_is_found_again_in_its_vectors() -> None:
    vectors = FASHION.vectors(2000, 24)
    fitted = Mixture.fitted(vectors)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5) and np.isfinite(vectors).all()
    again = fitted.vectors(2000, 24)
    # k-means cuts clusters smaller than they are, so that the fit is close, not equal.
    spread = [np.sqrt(np.linalg.eigvalsh(np.cov(x.T))[::-1][[0, 3, 15]]) for x in (vectors, again)]
    assert np.allclose(*spread, rtol=0.25)
    near, far = cosines(vectors), cosines(again)
    assert all(abs(near[name] - far[name]) < 0.1 for name in near)
    assert near["nearest"] > near["10th nearest"] > near["random"] + 0.2


def test_synthetic_vectors_are_unit_vectors_on_the_disk_and_queries_lie_farther_out(tmp_path: Path) -> None:
    queries = write_synthetic(FASHION, tmp_path / "v.npy", 3000, 16, 200)
    vectors = np.load(tmp_path / "v.npy")
    assert vectors.shape == (3000, 16) and vectors.dtype == np.float32 and queries.shape == (200, 16)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    products = vectors @ vectors.T
    np.fill_diagonal(products, -1)
    assert np.median((queries @ vectors.T).max(1)) < np.median(products.max(1))


def test_a_kind_that_does_not_exist_is_told() -> None:
    with pytest.raises(UserError, match=r"--kinds has hnws\. It can have flat, hnsw"):
        index.IndexBenchConfig(kinds=("hnws",))


@pytest.mark.full
def test_each_kind_is_reported_when_it_is_ready() -> None:
    config = index.IndexBenchConfig(vectors=3000, width=16, queries=60, kinds=("ivf_sq8", "flat"))
    first, second, last = index.run(config)
    assert [row["kind"] for row in first["rows"]] == ["ivf_sq8"] and second["rows"] == last["rows"]
    for report in (first, last):
        check_report(report)
    listed, flat = last["rows"]
    assert flat["recall_at_10"] == 1.0 and flat["build_cpu_s"] is None and listed["recall_at_10"] > 0.8
    assert listed["tuned_recall_at_10"] >= 0.95 and not listed["failed"] and listed["of_faiss"] > 0


@pytest.mark.full
@pytest.mark.parametrize("kind", ["flat", "ivf_sq8"])
def test_a_catalogue_without_images_is_exported_in_stages(kind: str) -> None:
    report = export.run(export.ExportBenchConfig(documents=3000, kind=kind, ranks=2))
    check_report(report)
    assert [row["stage"] for row in report["rows"]] == ["open", "documents", "index", "checksums"]
    assert report["headline"]["largest_peak_mib"] > 0


def test_documents_of_another_kind_of_index_are_refused() -> None:
    with pytest.raises(UserError, match=r"--kind is tree\. It can be flat"):
        export.ExportBenchConfig(kind="tree")
