"""At which places a query finds the images of its class, without the list of what stands between them.

An average precision over a thousand neighbours needs only the places of the few relevant ones, and an image's place is
the number of those that come before it. To count them takes a comparison of a query's scores with a threshold, where a
list takes a selection, an order and a merge: counts of the parts of a gallery add up.

Who comes before whom is decided as in ``search``, by the score in fixed order (``scores``), then by id. Relevant images
are scored so. All others get a float32 score from a matrix product, and only those that lie within its error bound of a
relevant one are scored again. Where these would be many, or the bound does not hold, the query is left to ``search``.

Images go by their number in the census. Shapes: n images of this rank's part of the gallery, N of the census, C
classes, q queries of this rank, m of a travelling block, r of those that are multiplied together, t gallery images of
a tile, R images of a class at most, c candidates, k places, D embedding dimension; p pairs of a query and an image of
its class, u of those where an image of another class is close, z of such a query and such an image.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from dist_obdsd.distributed import collectives
from dist_obdsd.evaluation.scores import (
    Distance,
    error_bound,
    largest_norm,
    rough_offset,
    rough_rows,
    scores_of_pairs,
)

MANY = 256  # places from which on counting takes a CPU less time than listing
FEW = 128  # images of a class up to which it does
BLOCK = 2048  # queries that travel together
ROWS = 512  # queries multiplied at a time
TILE = 1024  # gallery images multiplied at a time: so many scores stay in the cache
SAMPLED = 16  # one image of so many is looked at to guess how high the k best score
SAMPLE = 8192  # images looked at, or twice as many
DEVIATIONS = 5  # by how many the guess is lowered, so that it is hardly ever too high
CROWD = 4  # times k: the most candidates that a query may have in a tile
CLOSE = 64  # most images within the error bound of its relevant ones
CELLS = 1 << 22  # comparisons held at a time


@dataclass(frozen=True)
class Places:
    """Where each query finds its class."""

    relevant_qk: torch.Tensor
    """bool: whether the image at a place is of the query's class."""
    best_q: torch.Tensor
    """float64: the score at the first place, off by ``error_q`` at most."""
    error_q: torch.Tensor
    sure_q: torch.Tensor
    """bool; where it is False the other fields say nothing, and the search must be asked."""

    @classmethod
    def nothing(cls, q: int, k: int) -> "Places":
        zeros_q = torch.zeros(q, dtype=torch.float64)
        return cls(torch.zeros(q, k, dtype=torch.bool), zeros_q, zeros_q.clone(), zeros_q.bool())

    def put(self, where_q: torch.Tensor, places: "Places") -> None:
        """Overwrite the queries at ``where_q`` (bool)."""
        for own, other in zip(vars(self).values(), vars(places).values(), strict=True):
            own[where_q] = other


def count_places(
    query_qD: torch.Tensor,
    query_q: torch.Tensor,
    gallery_nD: torch.Tensor,
    gallery_n: torch.Tensor,
    class_N: torch.Tensor,
    offered_N: torch.Tensor,
    k: int,
    distance: Distance = "cosine",
) -> Places:
    """At which of the first k places this rank's queries find images of their class. Collective, on the CPU.

    A query never finds itself. Memory: O((q + n) D + q k + N) and a work space of O(BLOCK (D + R) + ROWS (TILE + k)).

    Args:
        query_qD: [q, D] float32 or float64, finite.
        query_q: their numbers in the census; each has another image of its class in the gallery.
        gallery_nD: [n, D], finite, of the same type.
        gallery_n: their numbers, each on one rank only.
        class_N: int64 classes 0..C-1.
        offered_N: bool: is in the gallery, on whatever rank.
        k: the same on every rank.
    """
    counting = _Counting(query_q, gallery_nD, gallery_n, class_N, offered_N, k, distance)
    found = Places.nothing(query_q.numel(), k)
    found.error_q[:] = error_bound(query_qD, counting.largest_norm, torch.float32, distance)
    # Blocks are padded, so that every rank sends the same shapes the same number of times.
    most = max(collectives.gather_json(query_q.numel()))
    for start in range(0, most, BLOCK):
        own = slice(start, start + BLOCK)
        asked = counting.block(query_qD[own], query_q[own], found.error_q[own], min(BLOCK, most - start))
        order_mR = asked.exact_mR.argsort(dim=1, descending=True, stable=True)
        exact_mR, ahead_mR = asked.exact_mR.gather(1, order_mR), asked.ahead_mR.gather(1, order_mR)
        place_mR = ahead_mR + torch.arange(counting.R)
        query_p, nth_p = ((exact_mR > -torch.inf) & (place_mR < k)).nonzero(as_tuple=True)
        found.relevant_qk[own][query_p, place_mR[query_p, nth_p]] = True
        found.best_q[own], found.sure_q[own] = asked.best_m, asked.sure_m
    return found


@dataclass(frozen=True)
class _Asked:
    """What travels of a block of queries, besides their rows. Counting writes into it."""

    query_m: torch.Tensor
    """Numbers in the census."""
    exact_mR: torch.Tensor
    """float64 scores of the images of the query's class, by number; -inf for itself and where the class is smaller."""
    ahead_mR: torch.Tensor
    """How many images of other classes come before each; from k on there may be more."""
    e_m: torch.Tensor
    """How far a rough score may be off."""
    best_m: torch.Tensor
    """The best score, off by e at most."""
    sure_m: torch.Tensor

    def tensors(self) -> list[torch.Tensor]:
        return [self.query_m, self.exact_mR, self.ahead_mR, self.e_m, self.best_m, self.sure_m]

    def __getitem__(self, some: slice) -> "_Asked":
        return _Asked(*(tensor[some] for tensor in self.tensors()))


class _Counting:
    """This rank's part of the gallery, and the queries that come by."""

    def __init__(
        self,
        query_q: torch.Tensor,
        rows_nD: torch.Tensor,
        number_n: torch.Tensor,
        class_N: torch.Tensor,
        offered_N: torch.Tensor,
        k: int,
        distance: Distance,
    ) -> None:
        self.class_N, self.k, self.distance = class_N, k, distance
        # The whole gallery by class, then number: where each class starts, and which of its class an image is.
        listed = offered_N.nonzero().flatten()
        self.listed = listed[_order_by_class(listed, class_N)]
        self.size_C = torch.bincount(class_N[listed], minlength=int(class_N.max()) + 1)
        self.start_C = self.size_C.cumsum(0) - self.size_C
        self.nth_N = torch.zeros_like(class_N)
        self.nth_N[self.listed] = torch.arange(len(listed)) - self.start_C[class_N[self.listed]]
        # This rank's part in the same order, so that the images of a class are a range of columns.
        order_n = _order_by_class(number_n, class_N)
        self.number_n, rows_nD = number_n[order_n], rows_nD[order_n]
        self.rows_Dn = rows_nD.T.contiguous()
        self.rough_nD = rough_rows(rows_nD.float(), distance, query=False)
        self.own_size_C = torch.bincount(class_N[number_n], minlength=len(self.size_C))
        self.own_start_C = self.own_size_C.cumsum(0) - self.own_size_C
        largest = int(self.size_C[class_N[query_q]].max()) if query_q.numel() else 0
        told = collectives.gather_json([largest, largest_norm(rows_nD)])
        self.R, self.largest_norm = (max(of_rank[i] for of_rank in told) for i in (0, 1))
        # Kept between tiles: fresh memory costs a page fault per 4 KiB.
        self.buffer = torch.empty(ROWS * min(TILE, len(number_n)))

    def block(self, rows_mD: torch.Tensor, query_m: torch.Tensor, e_m: torch.Tensor, height: int) -> _Asked:
        """Send a block round all ranks twice: for the scores of the images of its class, then for what comes before.

        Collective: each rank sends one, of at most ``height`` queries.
        """
        query_m = collectives.padded(query_m, height, 0)
        exact_mR = torch.full((height, self.R), -torch.inf, dtype=torch.float64)
        _, _, exact_mR = collectives.ring_rotate(rows_mD, height, [query_m, exact_mR], self._score)
        e_m = collectives.padded(e_m, height, torch.inf)
        asked = _Asked(
            query_m, exact_mR, torch.zeros(exact_mR.shape, dtype=torch.int64), e_m, exact_mR.amax(1), e_m.isfinite()
        )
        _, *tensors = collectives.ring_rotate(rows_mD, height, asked.tensors(), self._count)
        return _Asked(*tensors)[: len(rows_mD)]

    def _pairs_of_a_class(self, query_m: torch.Tensor, tile: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """(query, column) of the pairs of one class in a tile of this rank's part, itself included."""
        class_m = self.class_N[query_m]
        first_m = self.own_start_C[class_m]
        end_m = (first_m + self.own_size_C[class_m]).clamp(tile.start, tile.stop)
        first_m = first_m.clamp(tile.start, tile.stop)
        query_p = torch.arange(len(query_m)).repeat_interleave(end_m - first_m)
        skipped_m = (end_m - first_m).cumsum(0) - end_m  # of the pairs before, less the columns before
        return query_p, torch.arange(len(query_p)) - skipped_m[query_p]

    def _score(self, hop: int, rows_mD: torch.Tensor, query_m: torch.Tensor, exact_mR: torch.Tensor) -> None:
        query_p, column_p = self._pairs_of_a_class(query_m, slice(0, len(self.number_n)))
        other_p = self.number_n[column_p] != query_m[query_p]
        query_p, column_p = query_p[other_p], column_p[other_p]
        score_p = scores_of_pairs(_columns(rows_mD), self.rows_Dn, query_p, column_p, self.distance)
        exact_mR[query_p, self.nth_N[self.number_n[column_p]]] = score_p

    def _count(self, hop: int, rows_mD: torch.Tensor, *tensors: torch.Tensor) -> None:
        asked = _Asked(*tensors)
        rough_mD = rough_rows(rows_mD.float(), self.distance, query=True)
        offset_m = rough_offset(rows_mD, self.distance)
        close = [torch.empty(3, 0, dtype=torch.int64)]
        for first in range(0, len(rows_mD) if len(self.number_n) else 0, ROWS):
            some = slice(first, first + ROWS)
            close_3z = self._count_sure(rough_mD[some], offset_m[some, None], asked[some])
            close_3z[0] += first
            close.append(close_3z)
        query_z, nth_z, column_z = torch.cat(close, dim=1)
        score_z = scores_of_pairs(_columns(rows_mD), self.rows_Dn, query_z, column_z, self.distance)
        relevant_z = asked.exact_mR[query_z, nth_z]
        number_z = self.listed[self.start_C[self.class_N[asked.query_m[query_z]]] + nth_z]
        before_z = (score_z > relevant_z) | ((score_z == relevant_z) & (self.number_n[column_z] < number_z))
        asked.ahead_mR.index_put_((query_z, nth_z), before_z.long(), accumulate=True)

    def _count_sure(self, rough_rD: torch.Tensor, offset_r1: torch.Tensor, asked: _Asked) -> torch.Tensor:
        """Count the images that come before a relevant one by more than the error of rough scores.

        Returns:
            [3, z] (query, relevant image, column) of those that the rough scores cannot tell apart.
        """
        # Between low and high, rounded outward, a rough score does not tell who comes before.
        e_r1 = asked.e_m[:, None]
        low_rR = (asked.exact_mR - offset_r1 - e_r1).float().nextafter(torch.tensor(-torch.inf))
        high_rR = (asked.exact_mR - offset_r1 + e_r1).float().nextafter(torch.tensor(torch.inf))
        open_rR = (asked.exact_mR > -torch.inf) & (asked.ahead_mR < self.k)
        floor_r1 = low_rR.masked_fill(~open_rR, torch.inf).amin(dim=1, keepdim=True)
        floor_r1 = floor_r1.minimum((asked.best_m[:, None] - offset_r1).float())
        floor_r1 = floor_r1.maximum(self._guess(rough_rD, asked.query_m))
        cell_p, score_p, count_Tr = self._candidates(rough_rD, offset_r1, asked, floor_r1)

        start_Tr = count_Tr.cumsum().reshape(count_Tr.shape) - count_Tr
        before_Tr = count_Tr.cumsum(axis=0) - count_Tr
        score_rc = np.full((len(rough_rD), max(1, count_Tr.sum(axis=0).max())), -np.inf, dtype=np.float32)
        moved_Tr = np.arange(len(rough_rD)) * score_rc.shape[1] + before_Tr - start_Tr
        score_rc.ravel()[np.arange(len(score_p)) + np.repeat(moved_Tr.ravel(), count_Tr.ravel())] = score_p
        sorted_rc = torch.from_numpy(np.sort(score_rc, axis=1))

        asked.best_m[:] = asked.best_m.maximum(sorted_rc[:, -1] + offset_r1[:, 0])
        surely_rR = sorted_rc.shape[1] - torch.searchsorted(sorted_rc, high_rR, right=True)
        perhaps_rR = sorted_rc.shape[1] - torch.searchsorted(sorted_rc, low_rR)
        asked.ahead_mR.add_(surely_rR)
        open_rR &= asked.ahead_mR < self.k
        # What is no candidate may come before, too, if too few candidates do.
        asked.sure_m[(open_rR & (low_rR < floor_r1)).any(dim=1)] = False
        close_rR = (perhaps_rR - surely_rR) * open_rR
        asked.sure_m[close_rR.sum(dim=1) > CLOSE] = False
        query_u, nth_u = (close_rR * asked.sure_m[:, None]).nonzero(as_tuple=True)

        found = [torch.empty(3, 0, dtype=torch.int64)]
        for some in torch.arange(len(query_u)).split(max(1, CELLS // score_rc.shape[1])):
            query_s, nth_s = query_u[some], nth_u[some]
            score_sc = torch.from_numpy(score_rc)[query_s]
            inside_sc = (score_sc >= low_rR[query_s, nth_s, None]) & (score_sc <= high_rR[query_s, nth_s, None])
            of_z, at_z = np.nonzero(inside_sc.numpy())
            query_z = query_s.numpy()[of_z]
            tile_z = (before_Tr[:, query_z] <= at_z).sum(axis=0) - 1
            cell_z = cell_p[start_Tr[tile_z, query_z] + at_z - before_Tr[tile_z, query_z]]
            first_z = tile_z * TILE
            column_z = first_z + cell_z - query_z * np.minimum(TILE, len(self.number_n) - first_z)
            found.append(torch.stack([query_s[of_z], nth_s[of_z], torch.from_numpy(column_z)]))
        return torch.cat(found, dim=1)

    def _guess(self, rough_rD: torch.Tensor, query_r: torch.Tensor) -> torch.Tensor:
        """Scores that hopefully somewhat more than k images reach, by a sample of the columns; [r, 1].

        -inf where the gallery is so small that all can be candidates.
        """
        n, k = len(self.number_n), self.k
        if n <= CROWD * k:
            return rough_rD.new_full((len(rough_rD), 1), -torch.inf)
        step = max(SAMPLED, n // SAMPLE)
        score_rs = rough_rD @ self.rough_nD[::step].T
        score_rs[self.class_N[self.number_n[::step]] == self.class_N[query_r][:, None]] = -torch.inf
        place = score_rs.shape[1] - math.ceil(k / step + DEVIATIONS * math.sqrt(k / step)) - 1
        return torch.from_numpy(np.partition(score_rs.numpy(), max(0, place), axis=1)[:, max(0, place), None])

    def _candidates(
        self, rough_rD: torch.Tensor, offset_r1: torch.Tensor, asked: _Asked, floor_r1: torch.Tensor
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(cells, rough scores, how many of each tile and query) of images of other classes from a floor on.

        By tile, then query; a cell is a place in a tile's matrix of scores. None of a query with too many, nor
        of any where the matrix product is not to be trusted.
        """
        cells, scores, counts = [], [], []
        room_r = np.full(len(rough_rD), CROWD * self.k)
        for start in range(0, len(self.number_n), TILE):
            tile = slice(start, min(start + TILE, len(self.number_n)))
            score_rt = self.buffer[: len(rough_rD) * (tile.stop - start)].view(len(rough_rD), -1)
            torch.mm(rough_rD, self.rough_nD[tile].T, out=score_rt)
            query_p, column_p = self._pairs_of_a_class(asked.query_m, tile)
            number_p, at_p = self.number_n[column_p], (query_p, column_p - start)
            off_p = score_rt[at_p] + offset_r1[query_p, 0] - asked.exact_mR[query_p, self.nth_N[number_p]]
            # A library told to use TF32 or bfloat16 breaks the bound, and shows it on any few scores.
            if not ((off_p.abs() <= asked.e_m[query_p]) | (number_p == asked.query_m[query_p])).all():
                asked.sure_m[:] = False
            score_rt[at_p] = -torch.inf

            floor_r1.masked_fill_(~asked.sure_m[:, None], torch.inf)
            is_candidate_rt = score_rt.numpy() >= floor_r1.numpy()
            cell_p = np.flatnonzero(is_candidate_rt)
            first_r = np.arange(len(rough_rD) + 1) * (tile.stop - start)
            count_r = np.diff(np.searchsorted(cell_p, first_r))
            room_r -= count_r
            if (room_r < 0).any():
                asked.sure_m[torch.from_numpy(room_r < 0)] = False
                is_candidate_rt[room_r < 0], count_r[room_r < 0] = False, 0
                cell_p = np.flatnonzero(is_candidate_rt)
            scores.append(score_rt.numpy().ravel()[cell_p])
            cells.append(cell_p)
            counts.append(count_r)
        return np.concatenate(cells), np.concatenate(scores), np.stack(counts)


def _order_by_class(number_n: torch.Tensor, class_N: torch.Tensor) -> torch.Tensor:
    order_n = number_n.argsort()
    return order_n[class_N[number_n[order_n]].argsort(stable=True)]


def _columns(rows_mD: torch.Tensor) -> torch.Tensor:
    return rows_mD.double().T.contiguous()
