"""The alignment of two views: against scipy's generalised eigenvectors and dense conditioning of Gaussians; over ranks;
in checkpoints and bf16.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.linalg import eigh
from torch import Tensor

from harness.core.errors import UserError
from harness.evaluate.calibration import calibrate, documents_to_fit
from harness.evaluate.embed import Embedder
from models.alignment import RIDGE, Alignment
from models.batch import Batch
from models.method import Calibration
from tests.pool import ranks
from tests.runs import trainer
from tests.test_tasks import side
from tests.test_two_methods import config_of
from tests.twins import documents_alone

BY_TITLE = Calibration(key="aligned", needs="title", module=Alignment(4), vectors=Tensor, width=8, fit=print)


def drawn(n: int, width: int, seed: int = 0) -> Tensor:
    """Two views [n, 2 width], skewed, shifted, and correlated."""
    g = torch.Generator().manual_seed(seed)
    latent, noise = (torch.randn(n, k, generator=g, dtype=torch.float64) for k in (3, 2 * width))
    return (
        latent @ torch.randn(3, 2 * width, generator=g, dtype=torch.float64)
        + noise @ torch.diag(torch.linspace(0.1, 2, 2 * width).double())
        + torch.arange(2 * width)
    )


def fitted(vectors: Tensor, ridge: float) -> Alignment:
    alignment = Alignment(vectors.shape[1] // 2).double()
    alignment.fit(torch.tensor(float(len(vectors))).double(), vectors.sum(0), vectors.T @ vectors, ridge)
    return alignment


def test_an_embedding_is_what_the_latent_is_expected_to_be() -> None:
    """Loadings W = C u sqrt(rho) of the canonical directions u (Bach & Jordan, theorem 2), then a Gaussian conditioned
    on what is seen.
    """
    n, width = 400, 6
    vectors = drawn(n, width)
    alignment = fitted(vectors, ridge=0.0)
    centred = vectors - vectors.mean(0)
    c = centred.T @ centred / n
    own, cross = (c[:width, :width], c[width:, width:]), c[:width, width:]
    squared, left = eigh(cross @ torch.linalg.solve(own[1], cross.T), own[0])
    rho = torch.from_numpy(squared).clamp_min(0).sqrt()
    left = torch.from_numpy(left)
    right = torch.linalg.solve(own[1], cross.T @ left) / rho
    torch.testing.assert_close(alignment.correlation, rho.flip(0), rtol=1e-6, atol=1e-8)
    loadings = torch.cat([own[0] @ left * rho.sqrt(), own[1] @ right * rho.sqrt()])
    noise = torch.block_diag(*(c_i - w @ w.T for c_i, w in zip(own, loadings.split(width), strict=True)))

    def expected(seen: slice) -> Tensor:
        w, psi = loadings[seen], noise[seen, seen]
        return centred[:, seen] @ torch.linalg.solve(w @ w.T + psi, w)

    x, z = vectors.split(width, 1)
    ours = [alignment(x, None), alignment(None, z), alignment(x, z)]
    dense = [expected(slice(0, width)), expected(slice(width, None)), expected(slice(None))]
    assert all(one.std(0).min() > 0.01 for one in dense)
    for mine, theirs in zip(ours, dense, strict=True):  # the directions' signs are free: so inner products
        torch.testing.assert_close(mine @ ours[2].T, theirs @ dense[2].T, rtol=1e-6, atol=1e-7)
    some = torch.arange(n) % 3 > 0
    mixed = alignment(x, z, some)
    assert torch.equal(mixed[some], ours[2][some]) and torch.equal(mixed[~some], ours[0][~some])


def test_before_the_fit_views_are_averaged() -> None:
    x, z = torch.randn(2, 5, 4)
    alignment = Alignment(4)
    assert torch.equal(alignment(x, None), x) and torch.equal(alignment(None, z), z)
    torch.testing.assert_close(alignment(x, z), (x + z) / 2)


@pytest.mark.parametrize("vectors", [drawn(5, 8), torch.ones(5, 16).double()], ids=["few", "all equal"])
def test_few_or_equal_documents_give_finite_maps(vectors: Tensor) -> None:
    alignment = fitted(vectors, RIDGE)
    assert all(parameter.isfinite().all() for parameter in alignment.parameters())
    assert alignment(*vectors.split(8, 1)).isfinite().all()


def test_the_documents_of_a_fit_have_titles_and_are_spread_evenly() -> None:
    titles = ["a", "", "b", None, "c", "d", "e"]
    assert documents_to_fit(BY_TITLE, side({"title": titles}), 9).columns["title"].tolist() == ["a", "b", "c", "d", "e"]
    assert documents_to_fit(BY_TITLE, side({"title": titles}), 3).columns["title"].tolist() == ["a", "c", "e"]


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 documents. Read only!"""
    return documents_alone(tmp_path_factory.mktemp("documents"))


def aligned(catalogue: Path, run: Path, overrides: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """In a pool: the fit on the weights that the seed gives, and (rank's share) the vectors it is of. Ranks but the
    first fit a little off.
    """
    with trainer(config_of("item", catalogue, run, **{"evaluation.batch_size": 3, **overrides}), ready=False) as t:
        exact = t.method.towers.alignment.fit

        def fit(*moments: Any) -> None:
            exact(*moments)
            for fitted in t.method.towers.alignment.parameters():
                fitted.data += 1e-2 * t.mesh.rank

        t.method.towers.alignment.fit = fit
        t.validation.evaluation.calibrate(t.method)
        assert t.method.towers.training
        t.method.towers.eval()
        vectors, _ = t.validation.evaluation.embedder.apply(
            t.method, t.validation.evaluation.fitted_to, t.method.both_views, 32
        )
        return {name: value.clone() for name, value in t.method.towers.alignment.state_dict().items()}, vectors


@pytest.mark.parametrize("world", [1, 3])
def test_a_fit_over_ranks_equals_one_of_all_vectors(world: int, catalogue: Path, tmp_path: Path) -> None:
    found = ranks(world).run(aligned, catalogue, tmp_path / "run", {"model.text.dropout": 0.5})
    vectors = torch.cat([vectors for _, vectors in found]).double()
    assert len(vectors) == 11, "one of the 12 has no title"
    wanted = fitted(vectors, RIDGE).float()
    for own, _ in found:
        for name, value in wanted.state_dict().items():
            mine = own[name]
            assert torch.equal(mine, found[0][0][name]), "ranks disagree"
            if (
                name == "map"
            ):  # where correlations are all but equal directions are free: what they give together is not
                value, mine = (m[0] * wanted.correlation @ m[1].T for m in (value, mine))
            torch.testing.assert_close(mine, value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))


class WithDamage(Embedder):
    """To which the photos of even sample ids are damaged."""

    def _batch(self, *args: Any) -> Batch:
        batch = super()._batch(*args)
        return replace(batch, document_weights=(batch.document_ids % 2).float())


def damaged(catalogue: Path, run: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """In a pool: each parameter of the fit where some photos are damaged, and of one to the others alone."""
    with trainer(config_of("item", catalogue, run), ready=False) as t:
        whole = t.validation.evaluation.embedder
        calibrate(
            t.method, t.validation.evaluation.fitted_to, WithDamage(whole.data, whole.model, t.tokenizer, 4, t.mesh)
        )
        found = {name: value.clone() for name, value in t.method.towers.alignment.state_dict().items()}
        calibrate(
            t.method, t.validation.evaluation.fitted_to.select(t.validation.evaluation.fitted_to.ids % 2 == 1), whole
        )
        return {name: (found[name], value) for name, value in t.method.towers.alignment.state_dict().items()}


def test_damaged_photos_are_not_counted(catalogue: Path, tmp_path: Path) -> None:
    (found,) = ranks(1).run(damaged, catalogue, tmp_path / "run")
    for name in ("mean", "correlation"):
        torch.testing.assert_close(*found[name], rtol=1e-4, atol=1e-5)


def kept(catalogue: Path, run: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """In a pool: trains three steps to a checkpoint and an evaluation; the alignment, its dtype, and another fit to the
    same weights.
    """
    with trainer(config_of("item", catalogue, run, **{"train.steps": 3, **overrides})) as t:
        began = t.method.towers.alignment.correlation.clone()
        t.fit()
        left = {name: value.clone() for name, value in t.method.towers.alignment.state_dict().items()}
        with t.validation.averaged():
            t.validation.evaluation.calibrate(t.method)
        return {"began": began, "left": left, "again": dict(t.method.towers.alignment.state_dict())}


@pytest.mark.parametrize("overrides", [{}, {"train.precision": "bf16"}, {"train.ema_decay": 0.5}], ids=str)
def test_a_checkpoint_holds_the_fit_to_the_weights_that_are_evaluated(
    overrides: dict[str, Any], catalogue: Path, tmp_path: Path
) -> None:
    (first,) = ranks(1).run(kept, catalogue, tmp_path / "run", overrides)
    assert torch.equal(first["began"], torch.ones(16)) and first["left"]["correlation"].max() < 1
    for name, value in first["left"].items():
        assert value.dtype == torch.float32 and torch.equal(value, first["again"][name]), name
    (second,) = ranks(1).run(kept, catalogue, tmp_path / "run", overrides)
    assert torch.equal(second["began"], first["left"]["correlation"])


def test_documents_without_titles_are_refused(catalogue: Path) -> None:
    with pytest.raises(UserError, match=r"model\.aligned needs documents with a title, and there are 1"):
        documents = replace(side({"title": ["", None, "a"]}), catalogue=type("C", (), {"path": catalogue})())
        documents_to_fit(BY_TITLE, documents, 9)
