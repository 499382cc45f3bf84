"""The figures of a run: data in, a matplotlib figure out.

Colours are those of Okabe and Ito (Color Universal Design, 2008), which colour-blind people can tell apart. Where there
are more classes than colours, the marker changes, too. pyplot is not used, so that nothing is global.

Shapes: m images of a sample, B images of a batch, t of them shown, D embedding dimension.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
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
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "^", "s", "P", "X")
SHOWN_IMAGES = 64  # of a batch in the heat maps: in larger ones a class of two could not be seen
DECADES = 3  # powers of ten of a logarithmic colour scale
HEADROOM = 1.4  # factor on the height of an axis, so that its legend lies above the curves
MOST_EPOCHS = 60  # from which on their borders would only blacken the loss curves


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
    legend = [_plain(names.get(label, str(label))) for label in classes]
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


def recall_curves(lines: Mapping[str, Mapping[int, float]], title: str) -> "Figure":
    """Draw Recall@k over k, with a line per protocol.

    Args:
        lines: at least one, protocol -> {k: recall}.
    """
    percent = {name: {k: 100 * line[k] for k in sorted(line)} for name, line in lines.items()}
    named = {f"{name}: {', '.join(f'{v:.1f}' for v in line.values())}": line for name, line in percent.items()}
    figure = _line_chart(named, title)
    (axes,) = figure.axes
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks := sorted({k for line in lines.values() for k in line}), [str(k) for k in ks])
    axes.minorticks_off()
    axes.set(xlabel="k (nearest neighbours)", ylabel="Recall@k (% of the queries)")
    return figure


def validation_curves(lines: Mapping[str, Mapping[int, float]], best: int | None, title: str) -> "Figure":
    """Draw validation metrics over the epochs.

    Args:
        lines: at least one, metric -> {epochs trained: value}.
        best: the epoch that was chosen.
    """
    figure = _line_chart(lines, title)
    (axes,) = figure.axes
    axes.locator_params("x", integer=True)
    axes.set(xlabel="epochs trained", ylabel="share (1 is perfect)")
    if best is not None:
        axes.axvline(best, color="grey", linestyle="dashed", zorder=0)
        axes.set_xlabel(f"epochs trained (dashed: the best, {best})")
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


def loss_curves(
    steps: Sequence[Mapping[str, float]], title: str, batch: int | None = None, head_scale: float = 1.0
) -> "Figure":
    """Draw losses, ramp, learning rates and target entropy over the optimizer steps.

    Args:
        steps: at least one, ascending; each with ``step``, ``epoch`` and what was measured of ``ranking``,
            ``distillation``, ``ramp``, ``lr``, ``target_entropy``. What is missing (a step with an infinite loss, an
            epoch without distillation) leaves a gap.
        batch: images in a batch; the logarithm of their number bounds the entropy.
        head_scale: learning rate of the embedding layer, as a multiple of the backbone's.
    """

    def column(name: str) -> np.ndarray:
        return np.array([step.get(name, math.nan) for step in steps])

    distils = any("distillation" in step for step in steps)
    figure = _figure(11, 7.2 if distils else 3.9, title)
    panels = list(np.atleast_1d(figure.subplots(1 + distils, 2, sharex=True)).flat)
    place, (loss, rate, *more) = column("step"), panels
    _curve(loss, place, column("ranking"), "ranking loss", COLOURS[0])
    loss.set(title="Ranking loss", ylabel="loss (no unit)")
    rate.plot(place, column("lr"), color=COLOURS[2], label="network" if head_scale == 1 else "backbone")
    if head_scale != 1:
        label = f"embedding layer ({head_scale:g} times as high)"
        rate.plot(place, column("lr") * head_scale, color=COLOURS[4], label=label)
    rate.set(title="Learning rate", ylabel="learning rate")
    if distils:
        divergence, entropy = more
        _curve(divergence, place, column("distillation"), "KL(target || student)", COLOURS[1])
        divergence.set(title="Distillation and its ramp", ylabel="divergence (nats)")
        ramp = divergence.twinx()
        ramp.plot(place, column("ramp"), color=COLOURS[6], linestyle="dashed")
        ramp.set(ylabel="ramp (share of the full weight)", ylim=(0, HEADROOM), yticks=np.linspace(0, 1, 6))
        divergence.plot([], color=COLOURS[6], linestyle="dashed", label="ramp (right)")  # for the one legend
        _curve(entropy, place, column("target_entropy"), "entropy", COLOURS[3])
        if batch is not None:
            uniform = f"log {batch}, a uniform target's"
            entropy.axhline(math.log(batch), color="grey", linestyle="dotted", label=uniform)
        entropy.set(title="Entropy of the target", ylabel="nats")
    borders = [step["step"] for before, step in pairwise(steps) if before["epoch"] != step["epoch"]]
    borders = borders if len(borders) < MOST_EPOCHS else []
    for axes in panels:
        if axes is not loss:
            axes.set_ylim(0, axes.get_ylim()[1] * HEADROOM)
        axes.legend(fontsize=8, loc="best" if axes is loss else "upper left")
        axes.grid(visible=True, alpha=0.25)
        for border in borders:
            axes.axvline(border - 0.5, color="grey", linewidth=0.6, alpha=0.6, zorder=0)
    loss.locator_params("x", integer=True)  # of all, since they share it
    for axes in panels[-2:]:
        axes.set_xlabel("optimizer step" + (" (grey lines: a new epoch)" if borders else ""))
    return figure


# ---- helpers ----


def _line_chart(lines: Mapping[str, Mapping[int, float]], title: str) -> "Figure":
    """Draw lines of few points, so that those that coincide can be told apart."""
    figure = _figure(6.4, 5, title)
    axes = figure.subplots()
    for number, (name, line) in enumerate(lines.items()):
        axes.plot(
            list(line), list(line.values()), label=_plain(name), linewidth=1.8, markersize=8, fillstyle="none",
            linestyle=(0, (4, number % 4)), color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)],
        )  # fmt: skip
    axes.margins(x=0.06, y=0.08)
    axes.grid(visible=True, alpha=0.25)
    figure.legend(loc="outside lower center", fontsize=9, ncols=3 if max(map(len, lines)) < 20 else 1)
    return figure


def _figure(width: float, height: float, title: str) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


def _plain(name: str) -> str:
    """Return a name for a legend, in which "$" makes no formula and "_" hides nothing."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _project(rows_mD: np.ndarray, seed: int) -> np.ndarray:
    """Compute the t-SNE map [m, 2]."""
    from sklearn.manifold import TSNE  # van der Maaten and Hinton, JMLR 2008

    # The map depends on the ratios of distances alone; near rows keep their digits this way.
    centred_mD = rows_mD - rows_mD.mean(axis=0)
    spread = float(np.abs(centred_mD).max())
    # Equal rows, as of a collapsed network, have no principal components, and scikit-learn would divide by zero.
    init = "pca" if spread > 1e-9 and min(rows_mD.shape) > 1 else "random"
    perplexity = min(30.0, max(1.0, (len(rows_mD) - 1) / 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tsne = TSNE(perplexity=perplexity, init=init, random_state=seed, n_jobs=1)
        return tsne.fit_transform(centred_mD / max(spread, 1e-9))


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


def _curve(axes: "Axes", place: np.ndarray, values: np.ndarray, name: str, colour: str) -> None:
    """Draw a value per step, pale, and its mean over some steps round it."""
    width = max(len(values) // 25, 1)
    if width > 1:
        axes.plot(place, values, color=colour, alpha=0.3, linewidth=0.8)
        name, values = f"{name}, mean of {width} steps", smoothed(values, width)
    axes.plot(place, values, color=colour, linewidth=1.8, label=name)


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Average the finite of ``width`` values round each; NaN where it is not finite."""
    there = np.isfinite(values)
    start = (width - 1) // 2
    sums, counts = (
        np.convolve(x, np.ones(width))[start : start + len(values)] for x in (np.where(there, values, 0.0), there)
    )
    return np.where(there, sums / np.maximum(counts, 1), np.nan)
