"""Class-uniform sampling: each class's share of an epoch, and its images.

Published code draws the classes of a batch with equal probability, and then K images of each. The sampler that OBD-SD's
released code builds on draws independently and with replacement (``class_random_sampler`` of arXiv 2002.08473,
github.com/Confusezius/Revisiting_Deep_Metric_Learning_PyTorch). pytorch-metric-learning's ``MPerClassSampler`` draws a
class at most once per batch. Here a lane holds one or two windows of its shards at a time, so a class can be drawn only
while a window with K of its images is open. These rules hold instead:

- Every class gets the same share of the epoch's groups, divided over its lanes and windows by its images there. Shares
  are rounded at random to whole groups, with the exact expectation.
- Where a lane's classes cannot have that, because all together they want more or less than it gives, they get the
  shares that iterative proportional fitting ends with. Every epoch assigns the shards to the lanes anew.
- Within a window, a class's images come in random order, each once before any comes again.
- No image stands twice in a global batch, and no class while that can be avoided. A class with too few images for this
  leaves its place to others of its window.
- A class without K images in any window does not appear in the epoch.

Letters as in ``schedule``; C classes, c classes of one window.
"""

import numpy as np

from dist_obdsd.data.batch_composer import Group, LaneQueue, Plan

FITTING_ROUNDS = 50

WindowImages = dict[int, list[int]]
"""The classes with at least K images in one window of a lane -> these images, in random order."""


def uniform_queues(
    images: list[list[WindowImages]], groups: int, per_lane: int, K: int, draw: np.random.Generator
) -> list[LaneQueue]:
    """Plan how often each class comes in each window, and when.

    Args:
        images: by lane and window; each window has ``per_lane`` groups or more that share no image.
        groups: that each lane gives in the epoch.
        per_lane: g, groups that a step takes from a lane.
    """
    numbers = {label: n for n, label in enumerate(sorted({c for lane in images for window in lane for c in window}))}
    images_CL = np.zeros((len(numbers), len(images)))
    for number, lane in enumerate(images):
        for window in lane:
            for label, ids in window.items():
                images_CL[numbers[label], number] += len(ids)
    wanted_CL = _fit(images_CL, groups)
    queues = []
    for number, lane in enumerate(images):
        per_image_C = wanted_CL[:, number] / np.maximum(images_CL[:, number], 1)
        wanted = [np.array([len(ids) * per_image_C[numbers[c]] for c, ids in window.items()]) for window in lane]
        ends = np.rint(np.cumsum([0.0, *(w.sum() for w in wanted)]) * groups / sum(w.sum() for w in wanted)).astype(int)
        capacity = {(j, label): len(ids) // K for j, window in enumerate(lane) for label, ids in window.items()}
        planned: list[Group] = []
        for j, (window, shares_c) in enumerate(zip(lane, wanted, strict=True)):
            total = int(ends[j + 1] - ends[j])
            # At most as often as there are steps for it, times the groups that can stand in one.
            most_c = np.array([capacity[j, label] for label in window]) * -(-total // per_lane)
            counts = _round(_cap(shares_c, most_c, total), total, draw)
            for label, m, u in zip(window, counts.tolist(), draw.random(len(window)).tolist(), strict=True):
                planned += [Group(window=j, time=j + (i + u) / m, label=label, ids=(), oldest=j) for i in range(m)]
        queues.append(LaneQueue(planned, capacity))
    return queues


def _fit(images_CL: np.ndarray, groups: int) -> np.ndarray:
    """Scale shares in turn until rows are equal and columns sum to ``groups``."""
    per_class = groups * images_CL.shape[1] / images_CL.shape[0]
    wanted_CL = images_CL.copy()
    for _ in range(FITTING_ROUNDS):
        wanted_CL *= per_class / wanted_CL.sum(axis=1, keepdims=True)
        wanted_CL *= groups / wanted_CL.sum(axis=0)
    return wanted_CL


def _cap(shares_c: np.ndarray, most_c: np.ndarray, total: int) -> np.ndarray:
    """Scale the shares to a sum of ``total`` with none above its bound."""
    capped = np.zeros(len(shares_c), dtype=bool)
    while True:
        free = total - most_c[capped].sum()
        scaled_c = np.where(capped, most_c, shares_c * (free / max(shares_c[~capped].sum(), 1e-300)))
        above = ~capped & (scaled_c > most_c)
        if not above.any():
            return scaled_c
        capped |= above


def _round(shares_c: np.ndarray, total: int, draw: np.random.Generator) -> np.ndarray:
    """Round to whole numbers of the same expectation and sum (systematic sampling)."""
    order = draw.permutation(len(shares_c))
    ends = np.minimum(np.cumsum(shares_c[order]), total)
    ends[-1] = total
    passed = np.floor(ends + draw.random()).astype(int)
    counts = np.zeros(len(shares_c), dtype=int)
    counts[order] = np.diff(passed, prepend=0)
    return counts


def draw_images(plan: Plan, images: list[list[WindowImages]], K: int, draw: np.random.Generator) -> None:
    """Give every group of the plan its images, in place."""
    decks: dict[tuple[int, int, int], ImageDeck] = {}
    for t, step in enumerate(plan):
        for lane, groups in enumerate(step):
            for i, group in enumerate(groups):
                where = (lane, group.window, group.label)
                if where not in decks:
                    decks[where] = ImageDeck(images[lane][group.window][group.label], draw)
                groups[i] = group._replace(ids=decks[where].take(K, t))


class ImageDeck:
    """A class's images in a window, in random order; all before any comes again."""

    def __init__(self, ids: list[int], draw: np.random.Generator) -> None:
        self._ids, self._draw = ids, draw
        self._waiting = list(ids)
        self._step, self._in_step = -1, set[int]()

    def take(self, n: int, step: int) -> tuple[int, ...]:
        """Take the next n images that the step does not have yet."""
        if step != self._step:
            self._step, self._in_step = step, set()
        taken: list[int] = []
        while len(taken) < n:
            place = next((i for i, one in enumerate(self._waiting) if one not in self._in_step), None)
            if place is None:
                assert len(self._in_step) < len(self._ids), "a step takes more images of a class than there are"
                self._waiting += [self._ids[i] for i in self._draw.permutation(len(self._ids)).tolist()]
            else:
                taken.append(self._waiting.pop(place))
                self._in_step.add(taken[-1])
        return tuple(taken)
