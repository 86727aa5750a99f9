"""Contrastive losses, memory bank and gradient caching against dense float64 references written term by term."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import hypothesis
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from models.comm import share
from models.heads.cached import cached_losses
from models.heads.contrastive import ContrastiveConfig, contrastive_loss, same_product_or_answer
from models.heads.memory_bank import MemoryBank
from models.oclear import OclearConfig, OclearTowers
from models.text import TextConfig
from models.vision import VisionConfig
from tests.pool import layout, ranks

D = 5
INFO_NCE = ContrastiveConfig(temperature=0.1)
AM_SOFTMAX = ContrastiveConfig(temperature=0.2, margin=0.3, symmetric=False)
CONFIGS = (INFO_NCE, AM_SOFTMAX, replace(AM_SOFTMAX, symmetric=True))


@dataclass
class Problem:
    """The pairs of all ranks, with hard negatives and the pairs of earlier steps."""

    queries: Tensor
    documents: Tensor
    negatives: Tensor
    labels: Tensor
    negative_labels: Tensor
    weights: Tensor
    log_scale: Tensor
    old_queries: Tensor
    old_documents: Tensor
    old_labels: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.queries, self.documents, self.negatives, self.log_scale]

    def part(self, own: slice) -> Problem:
        """A copy with only the pairs `own`, and leaves of its own."""
        cut = ("queries", "documents", "negatives", "labels", "negative_labels", "weights")
        parts = {name: getattr(self, name).detach()[own].clone() for name in cut}
        return replace(self, **parts, log_scale=self.log_scale.detach().clone())


def problem(n: int, k: int, old: int, products: int, zeros: bool, config: ContrastiveConfig, seed: int = 0) -> Problem:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, D, generator=g, dtype=torch.float64) * 2

    weights = torch.rand(n, generator=g, dtype=torch.float64) + 0.1
    if zeros:
        weights[::3] = 0
    return Problem(
        normal(n),
        normal(n),
        normal(n, k),
        torch.randint(-1, products, (n,), generator=g),
        torch.randint(-1, products, (n, k), generator=g),
        weights,
        torch.tensor(1 / config.temperature, dtype=torch.float64).log() + 0.2,
        normal(old),
        normal(old),
        torch.randint(-1, products, (old,), generator=g),
    )


def dense(p: Problem, config: ContrastiveConfig) -> tuple[Tensor, dict[str, float]]:
    """Loss and metrics term by term: what competes with each positive is listed by hand."""

    def cos(a: Tensor, b: Tensor) -> Tensor:
        return a @ b / (a.norm() * b.norm())

    def differ(a: Tensor, b: Tensor) -> bool:
        return bool(a != b) or bool(a == -1)  # -1: of no known product, hence not of the same

    scale, loss, cosines, right = p.log_scale.exp(), p.log_scale * 0, 0.0, 0.0
    live = [i for i in range(len(p.labels)) if p.weights[i] > 0]
    for i in live:
        label = p.labels[i]
        others = [j for j in live if j != i and differ(p.labels[j], label)]
        old = [j for j in range(len(p.old_labels)) if differ(p.old_labels[j], label)]
        hard = [x for j in live for x, y in zip(p.negatives[j], p.negative_labels[j], strict=True) if differ(y, label)]
        documents = [p.documents[j] for j in others] + hard + [p.old_documents[j] for j in old]
        queries = [p.queries[j] for j in others] + [p.old_queries[j] for j in old]
        cosine, weight = cos(p.queries[i], p.documents[i]), p.weights[i]
        positive = scale * (cosine - config.margin)
        cosines += float(weight * cosine)
        right += float(weight) * all(cos(p.queries[i], x) < cosine for x in documents)
        terms = []
        for anchor, against in ((p.queries[i], documents), (p.documents[i], queries)):
            logits = torch.stack([positive, *(scale * cos(anchor, x) for x in against)])
            terms.append(-F.log_softmax(logits, 0)[0])
        loss = loss + weight * ((terms[0] + terms[1]) / 2 if config.symmetric else terms[0])
    return loss / p.weights.sum().clamp_min(1e-300), {"positive_cosine": cosines, "accuracy": right}


def ours(local: Problem, config: ContrastiveConfig, group: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """contrastive_loss of this rank's part; the earlier pairs are in the banks, pushed by all ranks together."""
    banks = [MemoryBank(max(1, len(local.old_labels)), D, dtype=torch.float64) for _ in range(2)]
    part = share(len(local.old_labels), group.size(), group.rank())
    old = slice(part.start, part.stop)
    for bank, x in zip(banks, (local.old_documents, local.old_queries), strict=True):
        bank.push(x[old], local.old_labels[old], group)
    loss, metrics = contrastive_loss(
        local.queries,
        local.documents,
        local.labels,
        config,
        group,
        weights=local.weights,
        log_scale=local.log_scale,
        negatives=(local.negatives, local.negative_labels),
        document_bank=banks[0],
        query_bank=banks[1],
    )
    for bank in banks:  # a method pushes before the backward
        bank.push(local.documents.detach() + 1, local.labels, group)
    return loss, metrics


def compare(whole: Problem, sizes: list[int], config: ContrastiveConfig, group: Any) -> None:
    for leaf in whole.leaves:
        leaf.requires_grad_()
    wanted, wanted_metrics = dense(whole, config)
    wanted_grads = torch.autograd.grad(wanted, whole.leaves, allow_unused=True, materialize_grads=True)
    own = slice(sum(sizes[: group.rank()]), sum(sizes[: group.rank() + 1]))
    local = whole.part(own)
    for leaf in local.leaves:
        leaf.requires_grad_()
    loss, metrics = ours(local, config, group)
    loss.backward()
    everywhere = [torch.empty(0)] * group.size()
    dist.all_gather_object(everywhere, loss.detach(), group=group)
    assert all(torch.equal(x, loss) for x in everywhere), "the loss differs between ranks"
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-13)
    for name, value in metrics.items():
        dist.all_reduce(value, group=group)
        assert value.tolist() == pytest.approx([wanted_metrics[name], float(whole.weights.sum())], abs=1e-12), name
    rounding = 1e-14 * float(whole.log_scale.exp())  # of the reference, whose softmax cancels where the loss is small
    for leaf, grad in zip(local.leaves[:3], wanted_grads, strict=False):
        torch.testing.assert_close(leaf.grad, grad[own], rtol=1e-10, atol=rounding)
    dist.all_reduce(local.log_scale.grad, group=group)  # as the towers' parameters
    torch.testing.assert_close(local.log_scale.grad, wanted_grads[3], rtol=1e-10, atol=rounding)


def check_dense(tensor_parallel: int, sizes: list[int], k: int, old: int, products: int, zeros: bool) -> None:
    with layout(tensor_parallel) as mesh:
        for config in CONFIGS:
            compare(problem(sum(sizes), k, old, products, zeros, config), sizes, config, mesh.dp)


@pytest.mark.parametrize(
    ("world", "tensor_parallel", "sizes", "k", "old", "products", "zeros"),
    [
        (1, 1, [5], 2, 3, 50, False),
        (2, 1, [3, 4], 2, 7, 3, False),  # the same products again and again
        (3, 1, [4, 1, 3], 2, 5, 4, True),
        (3, 1, [0, 5, 2], 1, 0, 4, False),
        (3, 1, [0, 1, 0], 0, 0, 4, False),  # no negatives at all
        (3, 1, [0, 0, 0], 1, 2, 4, False),
        pytest.param(4, 1, [2, 3, 0, 4], 3, 4, 40, True, marks=pytest.mark.full),
        (4, 2, [3, 4], 2, 5, 4, True),
    ],
)
def test_equals_one_dense_process(
    world: int, tensor_parallel: int, sizes: list[int], k: int, old: int, products: int, zeros: bool
) -> None:
    ranks(world).run(check_dense, tensor_parallel, sizes, k, old, products, zeros)


def test_any_shape_equals_one_dense_process() -> None:
    ranks(1).run(check_shapes)


def check_shapes() -> None:
    with layout() as mesh:

        @hypothesis.settings(max_examples=60, deadline=None, database=None, derandomize=True)
        @hypothesis.given(
            shape=st.tuples(*(st.integers(0, most) for most in (7, 3, 6))),
            products=st.integers(1, 20),
            zeros=st.booleans(),
            temperature=st.floats(0.02, 2),
            margin=st.floats(0, 0.6),
            symmetric=st.booleans(),
        )
        def holds(shape: tuple[int, int, int], products: int, zeros: bool, **loss: Any) -> None:
            config = ContrastiveConfig(**loss)
            compare(problem(*shape, products, zeros, config), [shape[0]], config, mesh.dp)

        holds()


def test_pairs_of_one_product_or_of_weight_0_are_no_negatives() -> None:
    ranks(3).run(check_masks)


def check_masks() -> None:
    with layout() as mesh:
        sizes = [4, 1, 3]
        own = slice(sum(sizes[: mesh.rank]), sum(sizes[: mesh.rank + 1]))
        for name in ("one product", "others weigh nothing"):
            whole = problem(8, 2, 3, 1, False, INFO_NCE)
            for labels in (whole.labels, whole.negative_labels, whole.old_labels):
                labels[:] = 0
            if name == "others weigh nothing":
                whole.labels = torch.arange(8)
                whole.weights[1:] = 0
            local = whole.part(own)
            for leaf in local.leaves:
                leaf.requires_grad_()
            loss, _ = ours(local, INFO_NCE, mesh.dp)
            loss.backward()
            assert loss == 0, name
            assert all(leaf.grad is not None and not leaf.grad.any() for leaf in local.leaves), name


def share_any(query_labels: Tensor, document_labels: Tensor) -> Tensor:
    """Product, category, then the query's keyword and the document's: equal product or category, or the query's keyword
    is the document's.
    """
    same = query_labels[:, None, :2] == document_labels[:, :2]
    return same.any(-1) | (query_labels[:, None, 2] == document_labels[:, 3])


def test_what_counts_as_related_is_the_methods_affair() -> None:
    """The relation is not symmetric, so a mask of the wrong side would be seen."""
    ranks(2).run(check_related)


def check_related() -> None:
    with layout() as mesh:
        p = problem(6, 1, 0, 30, False, INFO_NCE)
        keys = torch.tensor(
            [[0, 7, 1, 9], [1, 7, 2, 1], [2, 8, 3, 9], [3, 9, 4, 3], [4, 10, 4, 9], [5, 11, 9, 0]], dtype=torch.int64
        )
        far = torch.full((6, 1, 4), 99)
        bank = MemoryBank(4, D, (4,), dtype=torch.float64)
        own = slice(3 * mesh.rank, 3 * mesh.rank + 3)
        bank.push(p.queries[own], keys[own], mesh.dp)  # of 6, the last 4 stay
        loss, _ = contrastive_loss(
            p.queries[own],
            p.documents[own],
            keys[own],
            INFO_NCE,
            mesh.dp,
            negatives=(p.negatives[own], far[own]),
            query_bank=bank,
            related=share_any,
        )
        hidden = share_any(keys, keys) | torch.eye(6, dtype=torch.bool)
        q, d, h = (F.normalize(x, dim=-1) for x in (p.queries, p.documents, p.negatives[:, 0]))
        positive = (q * d).sum(-1, keepdim=True) / 0.1
        forth = torch.cat([positive, ((q @ d.T) / 0.1).masked_fill(hidden, -torch.inf), (q @ h.T) / 0.1], 1)
        back = ((d @ q.T) / 0.1).masked_fill(hidden.T, -torch.inf)
        old = ((d @ q[2:].T) / 0.1).masked_fill(share_any(keys[2:], keys).T, -torch.inf)
        back = torch.cat([positive, back, old], 1)
        wanted = -(F.log_softmax(forth, 1)[:, 0] + F.log_softmax(back, 1)[:, 0]).mean() / 2
        torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("world", [1, 3])
def test_documents_that_answer_a_query_are_no_negatives(world: int) -> None:
    ranks(world).run(check_answers)


def check_answers() -> None:
    """Loss and gradients against one dense process that lists what competes; a document stands in two pairs."""
    with layout() as mesh:
        sizes = [4, 1, 3] if mesh.dp.size() == 3 else [8]
        own = slice(sum(sizes[: mesh.rank]), sum(sizes[: mesh.rank + 1]))
        products, ids = [0, 1, 2, 0, 3, -1, 4, 5], [10, 11, 12, 13, 14, 15, 11, 17]
        answers = [[11, 17], [11, -1], [-1, -1], [-1, -1], [15, 10], [-1, -1], [13, -1], [-1, -1]]
        labels = torch.cat([torch.tensor([products, ids]).T, torch.tensor(answers)], 1)
        hidden = torch.tensor(
            [[i == j or (products[i] == products[j] >= 0) or ids[j] in answers[i] for j in range(8)] for i in range(8)]
        )
        assert (hidden != hidden.T).any() and hidden.sum() == 8 + 2 + 3 + 1 + 2 + 1
        p = problem(8, 0, 0, 1, True, INFO_NCE)
        leaves = [x.clone().requires_grad_() for x in (p.queries, p.documents)]
        q, d = (F.normalize(x, dim=-1) for x in leaves)
        cosine = q @ d.T / 0.1
        dead = p.weights == 0
        terms = []
        for logits, mask in ((cosine, hidden | dead), (cosine.T, hidden.T | dead)):
            rest = logits.masked_fill(mask, -torch.inf)
            terms.append(torch.cat([logits.diag()[:, None], rest], 1).logsumexp(1) - logits.diag())
        wanted = ((terms[0] + terms[1]) / 2 * p.weights).sum() / p.weights.sum()
        wanted.backward()
        queries, documents = (x[own].clone().requires_grad_() for x in (p.queries, p.documents))
        settings: dict[str, Any] = {"weights": p.weights[own], "related": same_product_or_answer}
        loss, _ = contrastive_loss(queries, documents, labels[own], INFO_NCE, mesh.dp, **settings)
        loss.backward()
        torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-13)
        for part, leaf in ((queries, leaves[0]), (documents, leaves[1])):
            assert part.grad is not None and leaf.grad is not None
            torch.testing.assert_close(part.grad, leaf.grad[own], rtol=1e-10, atol=1e-13)


def test_a_towers_gradient_summed_over_ranks_is_that_of_the_global_batch() -> None:
    """T8: norm ratio 1 and cosine 1 for tower and temperature, with hard negatives after the positives on every rank,
    and unequal batches.
    """
    ranks(3).run(check_tower)


def check_tower() -> None:
    with layout() as mesh:
        sizes = [4, 1, 3]
        own = slice(sum(sizes[: mesh.rank]), sum(sizes[: mesh.rank + 1]))
        whole = problem(8, 1, 0, 100, False, INFO_NCE)
        grads: list[Any] = []
        for p in (whole.part(own), whole.part(slice(None))):
            torch.manual_seed(0)
            tower = nn.Linear(D, D).double()
            p.log_scale.requires_grad_()
            moved = replace(p, queries=tower(p.queries), documents=tower(p.documents), negatives=tower(p.negatives))
            loss, _ = dense(moved, INFO_NCE) if grads else ours(moved, INFO_NCE, mesh.dp)
            grads.append(torch.autograd.grad(loss, [*tower.parameters(), p.log_scale]))
        for found, wanted in zip(*grads, strict=True):
            dist.all_reduce(found, group=mesh.dp)
            assert abs(found.norm() / wanted.norm() - 1) < 1e-12
            assert abs(F.cosine_similarity(found.flatten(), wanted.flatten(), 0) - 1) < 1e-12


def test_a_sure_pair_keeps_its_small_loss_in_fp32() -> None:
    """A log-sum-exp over positive and negatives rounds it to 0, and with it the gradient."""
    ranks(1).run(check_small_loss)


def check_small_loss() -> None:
    with layout() as mesh:
        queries = torch.eye(2, requires_grad=True)
        config = ContrastiveConfig(temperature=1 / 24)
        loss, _ = contrastive_loss(queries, torch.eye(2), torch.arange(2), config, mesh.dp)
        loss.backward()
        assert loss.item() == pytest.approx(3.7751345e-11, rel=1e-5)
        assert queries.grad is not None and queries.grad.abs().max() > 1e-10


PER_STEP = 7
SIZES = (3, 10, 100)  # shorter than a step, one that wraps, one that never fills: 4 of 7 pairs of a step weigh anything


def bank_states(micro_batches: int, steps: range, before: list[dict[str, Tensor]] | None) -> list[dict[str, Tensor]]:
    """Banks of SIZES after `steps`, which are cut over ranks and micro-batches as the loader cuts them; `before` is
    resumed.
    """
    with layout() as mesh:
        banks = [MemoryBank(size, D, dtype=torch.float64) for size in SIZES]
        for bank, state in zip(banks, before or [], strict=False):
            bank.load_state_dict(state)
        for step in steps:
            p = problem(PER_STEP, 0, 0, 100, True, INFO_NCE, seed=step)
            for micro in range(micro_batches):
                pieces = share(PER_STEP, mesh.world_size * micro_batches, micro * mesh.world_size + mesh.rank)
                own = slice(pieces.start, pieces.stop)
                for bank in banks:
                    bank.push(p.documents[own], p.labels[own], mesh.dp, p.weights[own])
        return [dict(bank.state_dict()) for bank in banks]


def test_the_bank_is_the_same_at_every_world_size_and_after_a_resume() -> None:
    kept = [
        (p.documents[i], p.labels[i])
        for p in (problem(PER_STEP, 0, 0, 100, True, INFO_NCE, seed=step) for step in range(5))
        for i in range(PER_STEP)
        if p.weights[i] > 0
    ]
    (one,) = ranks(1).run(bank_states, 1, range(5), None)
    for size, state in zip(SIZES, one, strict=True):
        for place, (embedding, label) in {n % size: pair for n, pair in enumerate(kept)}.items():
            torch.testing.assert_close(state["embeddings"][place], F.normalize(embedding, dim=0))
            assert state["labels"][place] == label
        assert state["pushed"] == len(kept) and state["embeddings"].any(1).sum() == min(size, len(kept))
    half = ranks(3).run(bank_states, 1, range(2), None)[1]
    for world, micro_batches, before in ((1, 3, None), (2, 1, None), (3, 2, None), (2, 1, half)):
        for found in ranks(world).run(bank_states, micro_batches, range(2 if before else 0, 5), before):
            for state, wanted in zip(found, one, strict=True):
                assert all(torch.equal(state[name], wanted[name]) for name in wanted), (world, micro_batches)


def test_only_what_was_pushed_counts_and_only_after_enough_of_it() -> None:
    """Of the 7 samples of a step 4 weigh anything: more may have been pushed than were, and the host does not ask."""
    assert ranks(1).run(counted, 0) == [[4, 8, 10]]
    assert ranks(1).run(counted, 9) == [[0, 0, 10]]


def counted(after: int) -> list[int]:
    with layout() as mesh:
        bank, found = MemoryBank(10, D, dtype=torch.float64, after=after), []
        for step in range(3):
            p = problem(PER_STEP, 0, 0, 100, True, INFO_NCE, seed=step)
            bank.push(p.documents, p.labels, mesh.dp, p.weights)
            unit, _, counts = bank.filled()
            assert (unit[counts].norm(dim=1) > 0.99).all()
            found.append(int(counts.sum()))
        return found


TOWERS = OclearConfig(
    vision=VisionConfig(image_size=16, patch_size=8, num_layers=1, hidden_size=16, num_attention_heads=2),
    text=TextConfig(num_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=40, max_length=6),
    embedding_dim=D,
)


def dropping(rate: float) -> OclearConfig:
    """TOWERS with every kind of dropout: of residuals, attention weights (megatron-core's own stream), texts and
    transforms.
    """
    drop: dict[str, Any] = {"dropout": rate, "attention_dropout": rate}
    return replace(
        TOWERS,
        vision=replace(TOWERS.vision, **drop),
        text=replace(TOWERS.text, **drop),
        text_dropout=rate,
        transform_dropout=rate,
    )


def check_cached(tensor_parallel: int, sizes: list[list[int]], rate: float) -> None:
    """`sizes`: of each data-parallel rank, its micro-batches'."""
    from models.transformer import MegatronBuilder

    with layout(tensor_parallel) as mesh:
        torch.manual_seed(0)
        towers = OclearTowers(dropping(rate), MegatronBuilder(mesh.groups)).double()
        log_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        parameters = [*towers.parameters(), log_scale]
        own = sizes[mesh.dp.rank()]
        g = torch.Generator().manual_seed(mesh.dp.rank())
        n = sum(own)
        images = torch.randn(2, n, 3, 16, 16, generator=g, dtype=torch.float64)
        tokens = torch.randint(5, 40, (n, 6), generator=g)
        labels, weights = torch.randint(0, 6, (n,), generator=g), torch.rand(n, generator=g, dtype=torch.float64)
        batches = list(zip(images[0].split(own), images[1].split(own), tokens.split(own), strict=True))

        def encode(batch: tuple[Tensor, Tensor, Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
            queries, documents, gate = towers(*batch)
            return (queries, documents), gate

        def loss_of(queries: Tensor, documents: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return contrastive_loss(queries, documents, labels, INFO_NCE, mesh.dp, weights=weights, log_scale=log_scale)

        def grads() -> list[Tensor]:
            found = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in parameters]
            for p in parameters:
                p.grad = None
            return found

        mesh.seed_streams(7, 0)
        total, sums, gates = 0.0, None, []
        for loss, metrics, gate in cached_losses(encode, batches, loss_of, [log_scale]):
            loss.backward()
            total += loss.item()
            sums = torch.stack(list(metrics.values())) + (0 if sums is None else sums)
            gates.append(gate)
        cached, drawn = grads(), torch.rand(3)

        mesh.seed_streams(7, 0)
        if rate == 0:
            embeddings, gate = encode((images[0], images[1], tokens))  # truly one large batch
        else:  # dropout draws by micro-batch: the same draws, all graphs held at once
            pieces, rests = zip(*(encode(batch) for batch in batches), strict=True)
            embeddings, gate = tuple(torch.cat(x) for x in zip(*pieces, strict=True)), torch.cat(rests)
            assert torch.equal(drawn, torch.rand(3)), "the random streams are not where one forward leaves them"
        loss, metrics = loss_of(*embeddings)
        loss.backward()
        assert loss.item() == pytest.approx(total, rel=1e-12)
        torch.testing.assert_close(sums, torch.stack(list(metrics.values())), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.cat(gates), gate, rtol=1e-12, atol=1e-12)
        wanted = grads()
        largest = max(float(g.abs().max()) for g in wanted)
        assert largest > 1e-3 and wanted[-1].abs() > 1e-6
        for found, reference in zip(cached, wanted, strict=True):
            torch.testing.assert_close(found, reference, rtol=1e-12, atol=1e-12 * largest)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize(
    ("world", "tensor_parallel", "sizes"),
    [(1, 1, [[4]]), (1, 1, [[2, 1, 3]]), (3, 1, [[2, 3], [1, 1], [4, 2]]), (4, 2, [[1, 2, 2], [3, 1, 2]])],
)
def test_cached_micro_batches_equal_one_large_batch(
    world: int, tensor_parallel: int, sizes: list[list[int]], rate: float
) -> None:
    ranks(world).run(check_cached, tensor_parallel, sizes, rate)


def test_micro_batches_may_be_empty_and_one_alone_is_encoded_once() -> None:
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5)).double()
    x, calls = torch.randn(5, D, dtype=torch.float64), []

    def encode(batch: Tensor) -> tuple[tuple[Tensor], None]:
        calls.append(len(batch))
        return (tower(batch),), None

    def loss_of(embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return (embeddings @ embeddings.T).logsumexp(1).sum(), {}

    found = []
    for sizes in ([2, 0, 3], [5]):
        torch.manual_seed(1)
        tower.zero_grad()
        for loss, _, _ in cached_losses(encode, x.split(sizes), loss_of):
            loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in tower.parameters() if p.grad is not None]))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert calls == [2, 0, 3, 2, 0, 3, 5]
