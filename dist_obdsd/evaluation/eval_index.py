"""All images of an evaluation: ids, labels, roles and embeddings.

Roles say what an image does: ``both``, ``query`` and ``train`` ask, ``both``, ``gallery``, ``train`` and
``gallery:NAME`` are searched (``train`` is evaluated only where its classes are held out for validation). Images with
``gallery:NAME`` form a gallery of their own; all other searched images form the one that has no name.

Shapes: n images of this rank, N different images of all ranks, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from dist_obdsd.data.manifest import ROLES, asks, gallery_of
from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.collectives import met_by_all
from dist_obdsd.errors import InputError


@dataclass(frozen=True)
class EvalIndex:
    """Every image once, by ascending id; the same on every rank."""

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
    first_N: torch.Tensor
    """int64: the place where the image came first among all that the ranks have, in rank order."""
    counts: Sequence[int]
    """Images of each rank, duplicates too."""

    @cached_property
    def classes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(class labels [C] ascending, each image's place among them [N])."""
        return self.labels_N.unique(return_inverse=True)


def check_roles(roles: Sequence[str]) -> None:
    """Raises: InputError: an unknown role."""
    for role in set(roles):
        if not asks(role) and gallery_of(role) is None:
            raise InputError(f"an image has the role {role!r}; roles are {', '.join(sorted(ROLES))} and gallery:NAME")


def build_eval_index(
    ids_n: torch.Tensor, labels_n: torch.Tensor, roles: Sequence[str], counts: Sequence[int], known: Sequence[str]
) -> EvalIndex:
    """Learn of all ranks' images. Collective.

    Args:
        ids_n: int64; an id that arrives again, here or on another rank, is dropped and counted.
        counts: images of each rank.
        known: all roles on any rank.

    Raises:
        InputError: on every rank: an id that arrives with two labels or roles.
    """
    code = {role: place for place, role in enumerate(known)}
    own_n3 = torch.stack([ids_n, labels_n, torch.tensor([code[role] for role in roles], dtype=torch.int64)], dim=1)
    all_M3 = collectives.gather_ragged(own_n3, counts)
    ids_N, place_M = all_M3[:, 0].unique(return_inverse=True)
    M = len(all_M3)
    first_N = torch.full_like(ids_N, M).scatter_reduce(0, place_M, torch.arange(M), "amin")
    contradicts_M = (all_M3 != all_M3[first_N[place_M]]).any(dim=1)
    if contradicts_M.any():
        at = int(contradicts_M.nonzero()[0])
        (one, label, role), (_, other_label, other_role) = all_M3[[int(first_N[place_M[at]]), at]].tolist()
        message = f"image id {one} arrives as class {label}, role {known[role]} and as class {other_label}, role "
        raise met_by_all(InputError(f"{message}{known[other_role]}; give every image an id of its own"))
    _, labels_N, role_N = all_M3[first_N].T.contiguous()
    gallery = [gallery_of(role) for role in known]
    galleries = tuple(sorted({name for name in gallery if name is not None}))
    number = torch.tensor([-1 if name is None else galleries.index(name) for name in gallery], dtype=torch.int64)
    asking = torch.tensor([asks(role) for role in known], dtype=torch.bool)
    return EvalIndex(ids_N, labels_N, asking[role_N], number[role_N], galleries, M - len(ids_N), first_N, counts)


def gather_by_id(rows_nD: torch.Tensor, index: EvalIndex) -> torch.Tensor:
    """Gather all ranks' rows by ascending id, [N, D]. Collective."""
    if collectives.world_size() == 1 and torch.equal(index.first_N, torch.arange(len(rows_nD))):
        return rows_nD
    rows_ND, end = rows_nD.new_empty(len(index.ids_N), rows_nD.shape[1]), 0
    for source, count in enumerate(index.counts):
        # One rank's at a time, so that no second copy of all is held.
        start, end = end, end + count
        place_m = ((index.first_N >= start) & (index.first_N < end)).nonzero().flatten()
        if source == collectives.rank():
            rows_mD = rows_nD[(index.first_N[place_m] - start).to(rows_nD.device)]
        else:
            rows_mD = rows_nD.new_empty(len(place_m), rows_nD.shape[1])
        collectives.broadcast_([rows_mD], source)
        rows_ND[place_m.to(rows_nD.device)] = rows_mD
    return rows_ND
