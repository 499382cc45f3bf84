"""The index of all images of an evaluation, which every rank knows, so that counting needs no messages.

Roles say what an image does: ``both``, ``query`` and ``train`` ask, ``both``, ``gallery``, ``train`` and
``gallery:NAME`` are searched (``train`` is evaluated only where its classes are held out for validation). Images with
``gallery:NAME`` form a gallery of their own; all other searched images form the one that has no name.

Shapes: n images of this rank, N different images of all ranks, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from dist_obdsd.data.manifest import ROLES, asks, gallery_of
from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.failures import raise_on_all_ranks
from dist_obdsd.errors import InputError, RunError


@dataclass(frozen=True)
class EvalIndex:
    """Every image once, by ascending id; the same on every rank but for two fields."""

    ids_N: torch.Tensor
    """int64, ascending, each once."""
    labels_N: torch.Tensor
    """int64 class labels."""
    asks_N: torch.Tensor
    """bool: is a query."""
    gallery_N: torch.Tensor
    """int64: the place in ``galleries``, -1 for images that are not searched."""
    galleries: tuple[str, ...]
    """Names, ascending; the gallery without a name is ""."""
    duplicates: int
    """Images that arrived again under an id already seen."""
    place_n: torch.Tensor
    """int64: this rank's images as places in the N."""
    kept_n: torch.Tensor
    """bool: this rank's images that are the first with their id, in rank order."""

    def __len__(self) -> int:
        return self.ids_N.numel()

    @cached_property
    def classes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(class labels [C] ascending, each image's place among them [N])."""
        return self.labels_N.unique(return_inverse=True)


def build_eval_index(ids_n: torch.Tensor, labels_n: torch.Tensor, roles: Sequence[str]) -> EvalIndex:
    """Learn of all ranks' images. Collective.

    Args:
        ids_n: int64; an id that arrives again, here or on another rank, is dropped and counted.
        labels_n: int64.
        roles: n roles.

    Raises:
        InputError: on every rank: an unknown role, or an id that arrives with two labels or roles.
    """
    with raise_on_all_ranks("the roles of the evaluation images"):
        for role in set(roles):
            if not asks(role) and gallery_of(role) is None:
                raise InputError(
                    f"an image has the role {role!r}; roles are {', '.join(sorted(ROLES))} and gallery:NAME"
                )
    known = sorted({role for of_rank in collectives.gather_json(sorted(set(roles))) for role in of_rank})
    code = {role: place for place, role in enumerate(known)}
    own_n3 = torch.stack([ids_n, labels_n, torch.tensor([code[role] for role in roles], dtype=torch.int64)], dim=1)
    all_M3 = collectives.gather_ragged(own_n3)
    start = sum(collectives.gather_json(ids_n.numel())[: collectives.rank()])

    order_M = all_M3[:, 0].argsort(stable=True)
    sorted_M3 = all_M3[order_M]
    again_M = torch.zeros(len(order_M), dtype=torch.bool)
    again_M[1:] = sorted_M3[1:, 0] == sorted_M3[:-1, 0]
    with raise_on_all_ranks("the labels of the evaluation images"):
        contradicts = (sorted_M3[1:] != sorted_M3[:-1]).any(dim=1) & again_M[1:]
        if contradicts.any():
            at = int(contradicts.nonzero()[0])
            (one, label, role), (_, other_label, other_role) = sorted_M3[at : at + 2].tolist()
            raise InputError(
                f"image id {one} arrives as class {label}, role {known[role]} and as class {other_label}, role "
                f"{known[other_role]}; give every image an id of its own"
            )
    kept_M = torch.empty_like(again_M)
    kept_M[order_M] = ~again_M
    ids_N, labels_N, role_N = sorted_M3[~again_M].unbind(dim=1)
    galleries = tuple(sorted({name for role in known if (name := gallery_of(role)) is not None}))
    gallery_by_code = [-1 if (name := gallery_of(role)) is None else galleries.index(name) for role in known]
    return EvalIndex(
        ids_N=ids_N.contiguous(),
        labels_N=labels_N.contiguous(),
        asks_N=torch.tensor([asks(role) for role in known], dtype=torch.bool)[role_N],
        gallery_N=torch.tensor(gallery_by_code, dtype=torch.int64)[role_N],
        galleries=galleries,
        duplicates=int(again_M.sum()),
        place_n=torch.searchsorted(ids_N.contiguous(), ids_n),
        kept_n=kept_M[start : start + ids_n.numel()],
    )


def check_counts(index: EvalIndex, expected_count: int | None, expected_classes: Mapping[int, int] | None) -> None:
    """Compare with what the manifest promises. The same verdict on every rank.

    Raises:
        RunError: there is no image, there are not ``expected_count``, or a class has another number of images than
            ``expected_classes`` (label -> images) says.
    """
    with raise_on_all_ranks("the count of evaluation images"):
        if not len(index) or (expected_count is not None and len(index) != expected_count):
            wanted = "at least 1 is" if expected_count is None else f"{expected_count} are"
            raise RunError(
                f"{len(index)} images were embedded but {wanted} expected; check that every rank reads its share of "
                f"the same shards"
            )
        if expected_classes is not None:
            found = dict(zip(*(x.tolist() for x in index.labels_N.unique(return_counts=True)), strict=True))
            wrong = sorted(c for c in found.keys() | expected_classes if found.get(c, 0) != expected_classes.get(c, 0))
            if wrong:
                raise RunError(
                    f"{len(wrong)} classes have another number of images than the manifest says, the first class "
                    f"{wrong[0]} with {found.get(wrong[0], 0)} instead of {expected_classes.get(wrong[0], 0)}; check "
                    f"that the labels belong to these shards"
                )
