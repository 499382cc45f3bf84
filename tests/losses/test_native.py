"""The losses of this package: against double loops."""

import pytest
import torch

from dist_obdsd.config.ranking import RankingConfig
from dist_obdsd.losses.base import RankingLoss
from dist_obdsd.losses.batch_view import BatchView
from dist_obdsd.losses.build import build_ranking
from dist_obdsd.losses.margin import uniforms
from dist_obdsd.manifold.similarity import similarity
from tests import oracle
from tests.losses.data import CLASSES, LABELS, loss_of, mean, parts, ranking
from tests.manifold.data import B, D, manifolds, unit_rows

SETTINGS = {
    "multi-similarity": ranking("multi_similarity"),
    "multi-similarity, no margin": ranking("multi_similarity", margin=0.0),
    "multi-similarity, all pairs": ranking("multi_similarity", margin=5.0, alpha=0.5, beta=3.0, threshold=0.2),
    "contrastive": ranking("contrastive"),
    "contrastive, wide": ranking("contrastive", positive_margin=0.3, negative_margin=1.3),
    "triplet": ranking("triplet"),
    "triplet, wide": ranking("triplet", margin=1.5),
    "margin": ranking("margin", nu=0.3),
    "margin, one beta": ranking("margin", per_class=False, beta=0.9, alpha=0.4, cutoff=0.1, nonzero_cutoff=1.9),
    "proxy anchor": ranking("proxy_anchor"),
    "proxy anchor, soft": ranking("proxy_anchor", alpha=3.0, delta=0.4),
}
every = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
SEED = 5
Naive = dict[str, tuple[torch.Tensor, int]]


def naive(loss: RankingLoss, settings: RankingConfig, E_BD: torch.Tensor, labels: list[int]) -> Naive:
    chosen = settings.model_dump(exclude={"name"})
    match settings.name:
        case "multi_similarity":
            return {"ranking": oracle.multi_similarity(E_BD, labels, **chosen)}
        case "contrastive":
            return oracle.contrastive(E_BD, labels, **chosen)
        case "triplet":
            return {"ranking": oracle.triplet(E_BD, labels, **chosen)}
        case "margin":
            cutoffs = {name: chosen[name] for name in ("cutoff", "nonzero_cutoff")}
            triplets = oracle.sampled_triplets(E_BD, labels, uniforms(SEED, slice(0, B), B, E_BD.device), **cutoffs)
            beta_B = loss.beta[labels] if settings.per_class else loss.beta.expand(B)
            return {"ranking": oracle.margin(E_BD, labels, triplets, beta_B, alpha=settings.alpha, nu=settings.nu)}
    return oracle.proxy_anchor(E_BD, labels, loss.proxies, alpha=settings.alpha, delta=settings.delta)


def gradients(total: torch.Tensor, loss: RankingLoss, E_BD: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(total, [E_BD, *loss.parameters()], retain_graph=True))


@every
@pytest.mark.parametrize("kind", manifolds())
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_value_and_gradient_equal_the_double_loop(settings: RankingConfig, kind: str, labels: list[int]) -> None:
    # Near duplicates, 1e-5 apart: the square of their distance keeps 6 of its 16 digits, and its root's slope is 1e5.
    tolerance = 1e-6 if kind in ("duplicates", "both") else 1e-11
    loss = loss_of(settings, D)
    E_BD, naive_BD = (manifolds()[kind].requires_grad_() for _ in range(2))
    ours, theirs = parts(loss, E_BD, labels, seed=SEED), naive(loss, settings, naive_BD, labels)
    assert list(ours) == list(theirs)
    for name, (total, count) in theirs.items():
        assert ours[name].count.item() == count
        assert ours[name].sum.item() == pytest.approx(total.item(), rel=tolerance, abs=tolerance)
    naive_mean = sum((total / max(count, 1) for total, count in theirs.values()), torch.zeros(()))
    pairs = zip(gradients(mean(ours), loss, E_BD), gradients(naive_mean, loss, naive_BD), strict=True)
    for mine, expected in pairs:
        assert (mine - expected).abs().max() <= tolerance * (1 + expected.abs().max())


@every
def test_the_cases_above_cost_something(settings: RankingConfig) -> None:
    loss = loss_of(settings, D)
    terms = [parts(loss, rows, labels, seed=SEED) for rows in manifolds().values() for labels in LABELS.values()]
    for name in terms[0]:
        assert len({term[name].count.item() for term in terms}) > ("proxy" not in settings.name)
        assert len({round(term[name].sum.item(), 6) for term in terms}) > 6


DIFFERENT, SAME = list(range(B)), [7] * B
OUTSIDE = [CLASSES] * B
"""What a share of the proxies sees when its classes are elsewhere."""


@pytest.mark.parametrize(
    ("name", "labels", "part"),
    [
        ("multi-similarity", DIFFERENT, "ranking"), ("multi-similarity", SAME, "ranking"),
        ("contrastive", DIFFERENT, "ranking_positive"), ("contrastive, wide", SAME, "ranking_negative"),
        ("triplet", DIFFERENT, "ranking"), ("triplet, wide", SAME, "ranking"), ("margin", DIFFERENT, "ranking"),
        ("proxy anchor, soft", OUTSIDE, "ranking_positive"),
    ],
)  # fmt: skip
def test_a_part_without_anchors_is_zero_with_a_usable_backward(name: str, labels: list[int], part: str) -> None:
    loss, E_BD = loss_of(SETTINGS[name], D), unit_rows(0).requires_grad_()
    term, ordinary = (parts(loss, E_BD, given)[part] for given in (labels, LABELS["mixed"]))
    assert (term.sum.item(), term.count.item()) == (0, 0)
    assert not any(grad.any() for grad in gradients(term.sum, loss, E_BD))
    assert any(grad.any() for grad in gradients(ordinary.sum, loss, E_BD))


batches = pytest.mark.parametrize("labels", [DIFFERENT, SAME, LABELS["mixed"]], ids=["different", "same", "mixed"])


@every
@batches
def test_nasty_batches_have_finite_gradients(settings: RankingConfig, labels: list[int]) -> None:
    loss = build_ranking(settings, CLASSES, D, 0)
    for kind in ("ordinary", "opposed"):  # duplicates and antipodes
        E_BD = manifolds()[kind].float().requires_grad_()
        value = mean(parts(loss, E_BD, labels))
        assert value.isfinite()
        assert all(grad.isfinite().all() for grad in gradients(value, loss, E_BD))


@every
@batches
def test_nan_reaches_a_sum_of_every_rank(settings: RankingConfig, labels: list[int]) -> None:
    loss, E_BD = loss_of(settings, D), unit_rows(0)
    E_BD[5, 1] = float("nan")
    for first in (0, 4, 8):
        terms = parts(loss, E_BD, labels, slice(first, first + 4))
        assert any(term.sum.isnan() for term in terms.values())
        assert all(term.count.isfinite() for term in terms.values())


@every
@pytest.mark.parametrize("spread", [1.0, 0.1])
def test_half_precision_is_widened_and_autocast_has_no_say(settings: RankingConfig, spread: float) -> None:
    loss = build_ranking(settings, CLASSES, D, 0)
    E_BD = unit_rows(0, spread=spread).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = parts(loss, E_BD, LABELS["mixed"], seed=SEED)
    for name, (total, count) in naive(loss, settings, E_BD.detach(), LABELS["mixed"]).items():
        assert terms[name].sum.dtype == torch.float32
        assert terms[name].sum.item() == pytest.approx(total.item(), rel=2e-5, abs=1e-6)
        assert terms[name].count.item() == count


def test_distances_keep_their_digits_where_all_rows_are_close() -> None:
    # A collapsed network: cosines so near 1 that 2 - 2 s has no digits left in float32.
    E_BD = unit_rows(0, spread=1e-4)
    loss = build_ranking(ranking("contrastive"), CLASSES, D, 0)
    ours = parts(loss, E_BD.float(), LABELS["mixed"])["ranking_positive"].sum.item()
    expected = oracle.contrastive(E_BD.float(), LABELS["mixed"], positive_margin=0, negative_margin=0.5)
    total, _ = expected["ranking_positive"]
    assert ours == pytest.approx(total.item(), rel=1e-5)
    S_BB = E_BD.float() @ E_BD.float().T
    same_BB = torch.tensor(LABELS["mixed"])[:, None] == torch.tensor(LABELS["mixed"])
    careless = ((2 - 2 * S_BB).clamp(min=0).sqrt() * same_BB.fill_diagonal_(False)).sum().item()
    assert careless != pytest.approx(total.item(), rel=1e-3)


def test_a_negative_at_either_end_of_the_margin_is_not_semi_hard() -> None:
    # Squared distances of 2, and of 4 between the first and the last, without any rounding.
    E_BD = torch.eye(4, dtype=torch.float64)
    E_BD[3] = -E_BD[0]
    view = BatchView(E_BD.requires_grad_(), E_BD, torch.tensor([0, 0, 1, 1]), 0)
    for width, count in ((2.0, 0), (2.5, 2)):
        (term,) = loss_of(ranking("triplet", margin=width), 4).partial_means(view).values()
        assert (term.sum.item(), term.count.item()) == (count * (width - 2), count)
        assert bool(torch.autograd.grad(term.sum, E_BD)[0].any()) == (count > 0)


def test_uniforms_are_those_of_splitmix64_on_any_rank() -> None:
    cpu = torch.device("cpu")
    whole, other = (uniforms(seed, slice(0, 200), 200, cpu) for seed in (3, 4))
    assert torch.equal(torch.cat([uniforms(3, slice(k, k + 40), 200, cpu) for k in range(0, 200, 40)]), whole)
    assert abs(float(torch.corrcoef(torch.stack([whole.ravel(), other.ravel()]))[0, 1])) < 0.03
    # Its first outputs from seed 0, as other implementations print them.
    words = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert uniforms(0, slice(0, 1), 4, cpu)[0].tolist() == [(word >> 32) / 2**32 for word in words]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_gradient_of_one_factor_is_that_of_two(dtype: torch.dtype) -> None:
    weights_BB, gradients = unit_rows(1, B, B), []
    for separate, autocast in ((False, False), (True, False), (False, True)):
        E_BD = unit_rows(0).to(dtype).requires_grad_()
        S_BB = similarity(E_BD, E_BD.clone() if separate else E_BD)
        assert S_BB.dtype == torch.promote_types(dtype, torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):  # it has no say in the backward
            gradients += torch.autograd.grad((S_BB * weights_BB).sum(), E_BD)
    tolerance = 4 * torch.finfo(dtype).eps
    assert torch.allclose(gradients[0], gradients[1], rtol=tolerance, atol=tolerance)
    assert torch.equal(gradients[0], gradients[2])
