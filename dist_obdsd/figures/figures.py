"""The figures of a run: data in, a matplotlib figure out.

Colours are those of Okabe and Ito (Color Universal Design, 2008), which colour-blind people can tell apart. Where there
are more classes than colours, the marker changes, too. pyplot is not used, so that nothing is global.

Shapes: m images of a sample, B images of a batch, t of them shown, D embedding dimension.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dist_obdsd.config.registry import TARGETS
from dist_obdsd.evaluation.geometry import rho_spectrum
from dist_obdsd.manifold.diffusion import Diffusion
from dist_obdsd.manifold.graph import softmax
from dist_obdsd.manifold.similarity import similarity
from dist_obdsd.manifold.targets import target_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "^", "s", "P", "X")
SHOWN_IMAGES = 64  # of a batch in the heat maps: in larger ones a class of two could not be seen
DECADES = 3  # powers of ten of a logarithmic colour scale


def embedding_map(
    rows_mD: torch.Tensor, labels_m: torch.Tensor, names: Mapping[int, str], title: str, seed: int = 0
) -> "Figure":
    """Map the embeddings of a few classes to the plane by t-SNE.

    Args:
        rows_mD: finite, m at least 2.
        labels_m: their classes.
        names: label -> class name; a label without one is shown as a number.
    """
    xy_m2 = _project(rows_mD.double().numpy(), seed)
    classes = labels_m.unique().tolist()
    # In a legend "$" begins a formula, and "_" hides the name.
    plain = [names.get(label, str(label)).replace("$", r"\$") for label in classes]
    legend = [f" {name}" if name.startswith("_") else name for name in plain]
    figure = _figure(7.2 + 0.075 * max(map(len, legend)), 6, title)
    axes = figure.subplots()
    for number, label in enumerate(classes):
        of_class = (labels_m == label).numpy()
        axes.scatter(
            xy_m2[of_class, 0], xy_m2[of_class, 1], s=26, linewidths=0.4, edgecolors="white",
            color=COLOURS[number % len(COLOURS)], marker=MARKERS[number // len(COLOURS) % len(MARKERS)],
        )  # fmt: skip
    axes.set(xticks=[], yticks=[], xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)")
    axes.set_aspect("equal", adjustable="datalim")
    figure.legend(
        axes.collections, legend, loc="outside right upper",
        title=f"{len(classes)} classes, {len(rows_mD)} images", fontsize=8, title_fontsize=9, markerscale=1.2,
    )  # fmt: skip
    return figure


def batch_manifold(T_BD: torch.Tensor, labels_B: torch.Tensor, diffusion: Diffusion, title: str) -> "Figure":
    """Draw a batch as the objective sees it, with a frame round each class.

    Its panels are similarities, transition matrix, and target before and after the diffusion. A target without a
    diffusion has two panels; without a teacher there are similarities alone. All is computed over the whole batch
    (without the manifold's memory). In a large one the first whole classes of up to ``SHOWN_IMAGES`` images are shown.

    Args:
        T_BD: unit rows, of the teacher where there is one.
        labels_B: their classes.
        diffusion: the target.

    Raises:
        RunError: the diffusion cannot be solved.
    """
    from matplotlib import colormaps
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    labels_B, order_B = labels_B.sort(stable=True)
    T_BD = T_BD[order_B]
    sizes = labels_B.unique_consecutive(return_counts=True)[1]
    classes = [(end, n) for end, n in zip(sizes.cumsum(0).tolist(), sizes.tolist(), strict=True) if end <= SHOWN_IMAGES]
    rows = slice(0, classes[-1][0] if classes else min(SHOWN_IMAGES, len(T_BD)))
    panels = [("Similarity S", similarity(T_BD[rows], T_BD), {"cmap": "RdBu_r", "vmin": -1, "vmax": 1}, "cosine")]
    colours = colormaps["cividis"].with_extremes(bad="lightgrey")
    target = None if diffusion.target == "none" else TARGETS.load(diffusion.target)
    if target is not None and target.needs_teacher:
        before_tB = softmax(similarity(T_BD[rows], T_BD), diffusion.temperature, 0, diffusion.mask_self)
        named = "Target" if target.graph is None else "Target before the diffusion"
        targets = {f"{named} (temperature {diffusion.temperature:g})": before_tB}
        if target.graph is not None:
            A_tB = target.graph(T_BD, diffusion).transition(rows)
            how = f"temperature {diffusion.transition_temperature:g}" if diffusion.target == "obdsd" else "symmetric"
            shades = {"cmap": colours, "norm": _log_norm(A_tB)}
            panels.append((f"Transition A ({how})", A_tB, shades, "weight of the edge (grey: 0)"))
            after_tB = target_rows(T_BD, rows, diffusion).target_bB
            targets[f"Target after the diffusion (ω = {diffusion.omega:g})"] = after_tB
        shades = {"cmap": colours, "norm": _log_norm(*targets.values())}
        panels += [(name, matrix_tB, shades, "probability (grey: 0)") for name, matrix_tB in targets.items()]

    columns = min(len(panels), 2)
    figure = _figure(1 + 5.2 * columns, 5.6 if len(panels) < 3 else 10, title)
    grid = np.atleast_1d(figure.subplots(-(-len(panels) // columns), columns)).flat
    for number, (axes, (name, matrix_tB, shades, unit)) in enumerate(zip(grid, panels, strict=True)):
        image = axes.imshow(matrix_tB[:, rows].numpy(), interpolation="nearest", **shades)
        axes.set_title(f"{name}\n{_shares(matrix_tB, labels_B)}" if number else name, fontsize=10)
        figure.colorbar(image, ax=axes, shrink=0.85, label=unit, extend="min" if number else "neither")
        frames = [Rectangle((end - n - 0.5, end - n - 0.5), n, n) for end, n in classes]
        axes.add_collection(PatchCollection(frames, facecolor="none", edgecolor="#D55E00", linewidth=0.7))
        axes.set(xlabel=f"image, ordered by class ({rows.stop} of {len(T_BD)})", ylabel="image, ordered by class")
    return figure


def spectrum(singular: Sequence[float], title: str) -> "Figure":
    """Draw the embeddings' singular values beside those of evenly used directions."""
    values = np.maximum(np.array(singular) / (math.fsum(singular) or 1.0), 1e-12)
    figure = _figure(6.4, 4.6, title)
    axes = figure.subplots()
    label = f"these embeddings, rho = {rho_spectrum(singular):.3f}"
    axes.plot(range(1, len(values) + 1), values, color=COLOURS[0], marker=".", label=label)
    axes.axhline(1 / len(values), color=COLOURS[1], linestyle="dashed", label="all directions equally, rho = 0")
    axes.set_yscale("log")
    axes.set_ylabel("share of the sum of all singular values")
    axes.set_xlabel(
        "singular value, the largest first\n\nFlatter is better: a small rho means that many directions are used,\n"
        "which goes with better retrieval of unseen classes (Roth et al., ICML 2020)."
    )
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize=9)
    return figure


def _figure(width: float, height: float, title: str) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


def _project(rows_mD: np.ndarray, seed: int) -> np.ndarray:
    """Compute the t-SNE map [m, 2]."""
    from sklearn.manifold import TSNE  # van der Maaten and Hinton, JMLR 2008

    # Equal rows, as of a collapsed network, have no principal components, and scikit-learn would divide by zero.
    spread = rows_mD.shape[1] > 1 and np.ptp(rows_mD, axis=0).max() > 1e-9
    perplexity = min(30.0, max(1.0, (len(rows_mD) - 1) / 3))
    tsne = TSNE(perplexity=perplexity, init="pca" if spread else "random", random_state=seed, n_jobs=1)
    return tsne.fit_transform(rows_mD)


def _log_norm(*matrices: torch.Tensor) -> Any:
    """Return a log colour scale for all, cut where a sharp softmax is near 0."""
    from matplotlib.colors import LogNorm

    largest = max(float(matrix.max()) for matrix in matrices) or 1.0
    top = 10.0 ** math.ceil(math.log10(largest))
    return LogNorm(top / 10**DECADES, top)


def _shares(matrix_tB: torch.Tensor, labels_B: torch.Tensor) -> str:
    """Describe where a row's mass lies, on average over the rows shown."""
    share_tB = matrix_tB.double() / (matrix_tB.double().sum() or 1.0)
    own = float(share_tB.diagonal().sum())
    of_class = float(share_tB[labels_B[: len(matrix_tB), None] == labels_B].sum()) - own
    return f"itself {own:.0%}, its class {of_class:.0%}, others {1 - own - of_class:.0%}"
