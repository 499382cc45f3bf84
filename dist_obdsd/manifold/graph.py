"""The batch manifold as a graph of the teacher's rows and their similarities.

K is the symmetric matrix of affinities, and D holds its row sums, the degrees. The target is defined in the coordinates
of A, the diffusion's transition matrix. It is solved in those of N = D^-1/2 K D^-1/2, which is similar to A and
symmetric, with eigenvalues in [-1, 1]. Where n x n matrices do not fit the memory, they are made a tile at a time.

Legend: n nodes, the rows of the batch first and then those of the memory; b own rows; t rows of a tile; D embedding
dimension.
"""

from collections.abc import Callable
from functools import cached_property

import torch

from dist_obdsd.manifold.diffusion import Diffusion
from dist_obdsd.manifold.similarity import LEAST_EXPONENT, LOG2_E, similarity

TILE_ENTRIES = {"cpu": 2**22, "cuda": 2**27}
"""Entries of a tile: a CPU's allocator still reuses 16 MiB; a GPU takes a few large kernels faster than many."""
SCALE_LIMIT = {torch.float32: 80.0, torch.float64: 600.0}
"""Largest exponent by which a solution is scaled back, without overflow. A correction mends what that gets wrong."""
TIE = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Similarities this close to the k-th nearest tie with it, as tiles may round S_ij and S_ji differently."""


class Graph:
    """A batch manifold with a symmetric A = N: K is max(S, 0) without its diagonal.

    Computed in the precision of ``T_nD`` and at least float32.
    """

    clips = True
    """Whether negative similarities are no edges, whatever the settings say."""

    def __init__(self, T_nD: torch.Tensor, diffusion: Diffusion) -> None:
        self.T_nD = T_nD.to(torch.promote_types(T_nD.dtype, torch.float32))
        self.diffusion, self.n = diffusion, len(T_nD)
        self.whole = diffusion.fits(self.n, self.T_nD.element_size(), T_nD.device)
        """True where n x n matrices are kept."""
        entries = TILE_ENTRIES["cpu" if T_nD.device.type == "cpu" else "cuda"]
        height = self.n if self.whole else max(entries // self.n, 1)
        self.tiles = [slice(i, min(i + height, self.n)) for i in range(0, self.n, height)]
        self._S_nn = similarity(self.T_nD, self.T_nD) if self.whole else None
        self._nearest_n = self._nearest() if diffusion.neighbours is not None else None

    def similarities(self, rows: slice) -> torch.Tensor:
        """Return S [t, n], not to be written to."""
        return similarity(self.T_nD[rows], self.T_nD) if self._S_nn is None else self._S_nn[rows]

    def start(self, rows: slice) -> torch.Tensor:
        """Compute P = softmax(S / temperature) [t, n], no diagonal if ``mask_self``."""
        return softmax(self.similarities(rows), self.diffusion.temperature, rows.start, self.diffusion.mask_self)

    def transition(self, rows: slice) -> torch.Tensor:
        """Return A [t, n], the steps from node i in row i; 0 where it is isolated."""
        return self.symmetric(rows)

    def symmetric(self, rows: slice) -> torch.Tensor:
        """Return N [t, n], the caller's own."""
        scale_n = self._scale_n  # whose matrices are gone before the next one is made
        return self._affinities(rows).mul_(scale_n[rows, None]).mul_(scale_n)

    @property
    def isolated_n(self) -> torch.Tensor:
        """Mask [n] of the nodes without an edge."""
        return self._degree_n == 0

    @cached_property
    def top_eigenvector_n(self) -> torch.Tensor:
        """Compute N's unit eigenvector [n] of eigenvalue 1: the degrees' square root."""
        return self._degree_n.sqrt() / self._degree_n.sum().sqrt().clamp_min(torch.finfo(self._degree_n.dtype).tiny)

    def initial_guess(self, rows: slice, A_nn: torch.Tensor) -> torch.Tensor:
        """Sum two terms of (I - omega A)^-1 [b, n]; for the rest, A^k tends to u u^T."""
        omega, u_n = self.diffusion.omega, self.top_eigenvector_n
        guess_bn = torch.addr(A_nn[rows], u_n[rows], u_n, beta=omega, alpha=omega**2 / (1 - omega))
        guess_bn.diagonal(offset=rows.start).add_(1)
        return guess_bn

    def to_walk_coordinates(self, rows: slice) -> torch.Tensor | None:
        """Compute factors [b, n] from N's rows to A's; None for ones."""
        return None

    def error(self, residual_bn: torch.Tensor) -> torch.Tensor:
        """Bound the target's L1 error [b], from rows e_i - y (I - omega A).

        A's eigenvalues lie in [-1, 1], so y's error is at most 1/(1 - omega) times its residual. A logit's error is at
        most that times (1 - omega) |S_j| / temperature, and softmax does not enlarge it (from max norm to L1).
        """
        return residual_bn.norm(dim=1) * self._reach

    def target(self, Y_bn: torch.Tensor, rows: slice) -> torch.Tensor:
        """Compute the target [b, n] of the own rows from those of (I - omega A)^-1.

        Row i is softmax((1 - omega) y S / temperature), and P_i where i is isolated.
        """
        diffused_bn = times_matrix(self.tiles, Y_bn, self.similarities, alpha=1 - self.diffusion.omega)
        diffused_bn = torch.where(self.isolated_n[rows, None], self.similarities(rows), diffused_bn)
        return softmax(diffused_bn, self.diffusion.temperature, rows.start, self.diffusion.mask_self)

    def _affinities(self, rows: slice) -> torch.Tensor:
        S_tn, edges_tn = self._sharpened(rows)
        if edges_tn is not None:
            S_tn = S_tn * edges_tn
        S_tn.diagonal(offset=rows.start).fill_(0)
        return S_tn

    @cached_property
    def _degree_n(self) -> torch.Tensor:
        degree_n = self._per_node()
        for tile in self.tiles:
            torch.sum(self._affinities(tile), 1, out=degree_n[tile])
        return degree_n

    @cached_property
    def _scale_n(self) -> torch.Tensor:
        return self._degree_n.masked_fill(self.isolated_n, 1).rsqrt()

    @cached_property
    def _reach(self) -> torch.Tensor:
        """Longest row of S over the temperature."""
        length_n = self._per_node()
        for tile in self.tiles:
            torch.linalg.vector_norm(self.similarities(tile), dim=1, out=length_n[tile])
        return length_n.max() / self.diffusion.temperature

    def _sharpened(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return S after clipping and power [t, n], and its mask of edges or None."""
        S_tn, edges_tn = self.similarities(rows), None
        if self._nearest_n is not None:
            mine_tn, theirs_tn = S_tn >= self._nearest_n[rows, None], S_tn >= self._nearest_n
            edges_tn = mine_tn & theirs_tn if self.diffusion.mutual else mine_tn | theirs_tn
        if self.clips or self.diffusion.clip:
            S_tn = S_tn.clamp_min(0)
        if self.diffusion.power != 1:
            S_tn = S_tn**self.diffusion.power
        return S_tn, edges_tn

    def _nearest(self) -> torch.Tensor:
        """Find each node's similarity [n] to its k-th nearest node."""
        nearest_n, k = self._per_node(), min(self.diffusion.neighbours or 0, self.n - 1)
        for tile in self.tiles:
            S_tn = self.similarities(tile).clone()
            S_tn.diagonal(offset=tile.start).fill_(-torch.inf)
            torch.sub(S_tn.topk(k, dim=1).values[:, -1], TIE[S_tn.dtype], out=nearest_n[tile])
        return nearest_n

    def _per_node(self) -> torch.Tensor:
        """Allocate a number per node [n]; a small tensor a tile would fragment memory."""
        return torch.empty(self.n, dtype=self.T_nD.dtype, device=self.T_nD.device)


class WalkGraph(Graph):
    """A random walk, A = softmax(S / transition_temperature) without its diagonal.

    K_ij = exp(S_ij / t) overflows at sharp temperatures, so only logarithms of degrees exist here, in two parts,
    m + log s, since float32 is coarse at 1/t = 200. The shift by S = 1 keeps the logits of close rows small.
    """

    clips = False

    def __init__(self, T_nD: torch.Tensor, diffusion: Diffusion) -> None:
        super().__init__(T_nD, diffusion)
        self._A_nn = None
        if self._S_nn is not None:  # else a tile of it is made whenever it is needed
            logits_nn = self._logits(slice(0, self.n))
            self._largest_n, self._A_nn = logits_nn.amax(1), self._transition(logits_nn)

    @cached_property
    def _degrees(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute m and 1/s [n], of degrees with the logarithm m + log s."""
        # 1/s is the largest entry of A's row, since the largest logit's share is exp(0) / s.
        if self._A_nn is not None:
            m_n, largest_n = self._largest_n, self._A_nn.amax(1)
        else:
            m_n, largest_n = self._per_node(), self._per_node()
            for tile in self.tiles:
                logits_tn = self._logits(tile)
                torch.amax(logits_tn, 1, out=m_n[tile])
                torch.amax(self._transition(logits_tn), 1, out=largest_n[tile])
        if self._nearest_n is None:  # then every node has an edge to every other one
            return m_n, largest_n
        isolated_n = m_n == -torch.inf
        return m_n.masked_fill(isolated_n, 0), largest_n.masked_fill(isolated_n, 1)

    @cached_property
    def _roots_n(self) -> torch.Tensor:
        """Roots of the degrees, but for a factor that keeps them finite."""
        m_n, largest_n = self._degrees
        below_n = ((m_n - m_n.max()) / 2).clamp_min_(-SCALE_LIMIT[m_n.dtype])
        return below_n.exp_().mul_(largest_n.rsqrt())

    @cached_property
    def isolated_n(self) -> torch.Tensor:
        return torch.cat([self.transition(tile).amax(1) for tile in self.tiles]) == 0

    @cached_property
    def top_eigenvector_n(self) -> torch.Tensor:
        roots_n = self._roots_n if self._nearest_n is None else self._roots_n.masked_fill(self.isolated_n, 0)
        return roots_n / roots_n.norm()

    def initial_guess(self, rows: slice, A_nn: torch.Tensor) -> torch.Tensor:
        """As k grows, the rows of A^k tend to one row, and the mean row of A is near it."""
        omega = self.diffusion.omega
        rest_n = A_nn.sum(0).mul_(omega**2 / (1 - omega) / self.n)
        guess_bn = torch.add(rest_n, A_nn[rows], alpha=omega)
        guess_bn.diagonal(offset=rows.start).add_(1)
        return guess_bn

    def _transition(self, logits_tn: torch.Tensor) -> torch.Tensor:
        A_tn = logits_tn.softmax(1)
        # Without neighbours' edges every node has one; with them a row may be all -inf.
        return A_tn if self._nearest_n is None else A_tn.nan_to_num(0)

    def _logits(self, rows: slice, unit: float = 1.0) -> torch.Tensor:
        """Compute logarithms of K, shifted by the same for all, times ``unit``."""
        S_tn, edges_tn = self._sharpened(rows)
        scale, logits_tn = unit / self.diffusion.transition_temperature, S_tn - 1
        if scale != 1:
            logits_tn.mul_(scale)
        if edges_tn is not None:
            logits_tn.masked_fill_(~edges_tn, -torch.inf)
        logits_tn.diagonal(offset=rows.start).fill_(-torch.inf)
        return logits_tn

    def transition(self, rows: slice) -> torch.Tensor:
        return self._A_nn[rows] if self._A_nn is not None else self._transition(self._logits(rows))

    def symmetric(self, rows: slice) -> torch.Tensor:
        if self._A_nn is not None:
            root_nn = self._A_nn.sqrt()
            return root_nn * root_nn.T  # N_ij^2 = A_ij A_ji; cheaper than the logarithms' way
        # In as few passes as there can be, by powers of 2. What that costs in digits, corrections mend.
        m_n, largest_n = self._degrees
        half_n = (m_n - largest_n.log()) * (LOG2_E / 2)
        exponents_tn = self._logits(rows, LOG2_E).sub_(half_n[rows, None]).sub_(half_n)
        return exponents_tn.clamp_min_(LEAST_EXPONENT).exp2_()

    def to_walk_coordinates(self, rows: slice) -> torch.Tensor:
        return self._roots_n / self._roots_n[rows, None]

    def error(self, residual_bn: torch.Tensor) -> torch.Tensor:
        """Take the residual's L1 norm; in N's coordinates it would bound nothing."""
        return residual_bn.abs().sum(1)

    def target(self, Y_bn: torch.Tensor, rows: slice) -> torch.Tensor:
        """Row i is (1 - omega) y P, and P_i where i is isolated."""
        target_bn = times_matrix(self.tiles, Y_bn, self.start, alpha=1 - self.diffusion.omega)
        if self._nearest_n is None:
            return target_bn
        return torch.where(self.isolated_n[rows, None], self.start(rows), target_bn)


def times_matrix(
    tiles: list[slice], X_bn: torch.Tensor, matrix: Callable[[slice], torch.Tensor], alpha: float = 1, beta: float = 0
) -> torch.Tensor:
    """Compute alpha X M + beta X [b, n] with tiles of rows of a matrix M."""
    product_bn = torch.addmm(X_bn, X_bn[:, tiles[0]], matrix(tiles[0]), beta=beta, alpha=alpha)
    for tile in tiles[1:]:
        product_bn.addmm_(X_bn[:, tile], matrix(tile), alpha=alpha)
    return product_bn


def softmax(S_tn: torch.Tensor, temperature: float, first_row: int, mask_self: bool) -> torch.Tensor:
    """Compute softmax(S / temperature) [t, n], if ``mask_self`` without the own node."""
    logits_tn = S_tn if temperature == 1 else S_tn / temperature
    if mask_self:
        logits_tn = logits_tn.clone()
        logits_tn.diagonal(offset=first_row).fill_(-torch.inf)
    return logits_tn.softmax(1)
