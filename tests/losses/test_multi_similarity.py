"""The multi-similarity loss: its mining, another library, and numbers that are not finite or large."""

import pytest
import torch

from dist_obdsd.errors import InputError
from dist_obdsd.losses.batch_view import BatchView, PartialMean
from dist_obdsd.losses.multi_similarity import MultiSimilarityLoss
from tests.losses.data import LABELS
from tests.manifold.data import B, manifolds, unit_rows

PUBLISHED = {"alpha": 2.0, "beta": 40.0, "threshold": 0.5, "margin": 0.1}


def loss(E_BD: torch.Tensor, labels: list[int], rows: slice = slice(0, B), **changes: float) -> PartialMean:
    ranking = MultiSimilarityLoss(**(PUBLISHED | changes))
    return ranking.partial_means(BatchView(E_BD[rows], E_BD, torch.tensor(labels), rows.start))["ranking"]


def test_the_cases_above_mine_something() -> None:
    counts = {loss(manifolds()[kind], labels).count.item() for kind in manifolds() for labels in LABELS.values()}
    assert {6, 12} <= counts
    dense, mined = (loss(unit_rows(0), LABELS["mixed"], margin=margin) for margin in (5.0, 0.1))
    assert dense.sum.item() != pytest.approx(mined.sum.item(), rel=1e-3)


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_it_equals_pytorch_metric_learning_up_to_the_mean(labels: list[int]) -> None:
    # That library divides by the B rows where this loss, as the method's release, divides by the counting anchors.
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    E_BD, labels_B = unit_rows(3, spread=0.6).requires_grad_(), torch.tensor(labels)
    pairs = miners.MultiSimilarityMiner(epsilon=0.1)(E_BD, labels_B)
    theirs = losses.MultiSimilarityLoss(alpha=2, beta=40, base=0.5)(E_BD, labels_B, pairs)
    ours = loss(E_BD, labels).sum / B
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-10)
    (ours_grad,) = torch.autograd.grad(ours, E_BD)
    (theirs_grad,) = torch.autograd.grad(theirs, E_BD)
    # Their similarity normalises the rows itself, so only the part along the sphere can be compared.
    along = ours_grad - (ours_grad * E_BD).sum(1, keepdim=True) * E_BD
    assert (along - theirs_grad).abs().max() < 1e-10
    assert theirs_grad.abs().max() > 1e-3


def test_a_duplicate_image_is_a_positive_and_the_anchor_itself_is_not() -> None:
    E_BD = unit_rows(0)
    E_BD[1] = E_BD[0]
    alone = loss(E_BD, [0, *range(1, B)])
    paired = loss(E_BD, [0, 0, *range(2, B)], margin=5.0)
    assert alone.count.item() == 0
    assert paired.count.item() == 2


@pytest.mark.parametrize("labels", [LABELS["pairs"], list(range(B)), [7] * B], ids=["pairs", "different", "same"])
@pytest.mark.parametrize("row", [0, 5, 11])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_reaches_the_sum_of_every_part(labels: list[int], row: int, bad: float) -> None:
    E_BD = unit_rows(0)
    E_BD[row, 1] = bad
    for first in (0, 4, 8):
        assert loss(E_BD, labels, slice(first, first + 4)).sum.isnan()


def test_large_embeddings_do_not_overflow() -> None:
    E_BD = (100 * unit_rows(0).float()).requires_grad_()  # exp(40 * 1e4) is beyond every float
    term = loss(E_BD, LABELS["mixed"], beta=1000.0)
    (grad,) = torch.autograd.grad(term.sum, E_BD)
    assert term.sum.isfinite()
    assert grad.isfinite().all()


def test_wrong_shapes_are_refused() -> None:
    E_BD, labels_B = unit_rows(0), torch.tensor(LABELS["pairs"])
    with pytest.raises(InputError, match=r"labels_B has shape \(11,\); it must be \(12,\)"):
        BatchView(E_BD[:4], E_BD, labels_B[:11], 0)
    with pytest.raises(InputError, match=r"labels_B has shape \(12, 1\); it must be \(12,\)"):
        BatchView(E_BD[:4], E_BD, labels_B[:, None], 0)
    with pytest.raises(InputError, match="first_row is 9"):
        BatchView(E_BD[:4], E_BD, labels_B, 9)
