"""Choice of every step's groups, with no class twice while that can be avoided.

A step takes the earliest groups of each lane whose classes it does not hold yet. Where a lane has none, an augmenting
path (the classic algorithm for bipartite matching) exchanges classes between lanes. Only if there is none a class
repeats. At the end, each repetition is exchanged with a group of a near step, if one fits. Letters as in ``schedule``.
"""

from bisect import insort
from collections import Counter, deque
from operator import attrgetter
from typing import NamedTuple

NEAR = 64  # steps before and after, in which a place for a repeated class is looked for


class Group(NamedTuple):
    """K images of one class in one lane."""

    window: int
    time: float
    """Place in the lane's order; the whole part is the window."""
    label: int
    ids: tuple[int, ...]
    oldest: int
    """The earliest window that an image of the group is from: ``window`` or the one before."""


Plan = list[list[list[Group]]]
"""Step -> lane -> g groups."""


class LaneQueue:
    """A lane's groups that are still to be taken: a queue per class."""

    def __init__(self, groups: list[Group]) -> None:
        self.queues: dict[int, list[Group]] = {}  # the next group last
        # Window -> groups still to be taken that have an image of it as oldest.
        self.needs = Counter([group.oldest for group in groups])
        for group in sorted(groups, key=attrgetter("time"), reverse=True):
            self.queues.setdefault(group.label, []).append(group)
        self.heads = sorted((queue[-1].time, label) for label, queue in self.queues.items())
        self.last_open = 0

    def start_step(self) -> None:
        """Find the last window that may be open while the oldest one is still needed."""
        self.last_open = min((w for w, n in self.needs.items() if n), default=0) + 1

    def first(self, label: int) -> Group | None:
        """Return the class's next group, if its window may be open."""
        queue = self.queues.get(label)
        return queue[-1] if queue and queue[-1].window <= self.last_open else None

    def earliest(self, excluded: dict[int, int]) -> int | None:
        """Return the class of the earliest open group, but for excluded classes."""
        for time, label in self.heads:
            if time >= self.last_open + 1:
                break
            if label not in excluded:
                return label
        return None

    def take(self, label: int) -> Group:
        queue = self.queues[label]
        group = queue.pop()
        self.needs[group.oldest] -= 1
        self.heads.remove((group.time, label))
        if queue:
            insort(self.heads, (queue[-1].time, label))
        return group

    def put_back(self, group: Group) -> None:
        queue = self.queues[group.label]
        self.needs[group.oldest] += 1
        if queue:
            self.heads.remove((queue[-1].time, group.label))
        queue.append(group)
        insort(self.heads, (group.time, group.label))


def take_steps(queues: list[LaneQueue], steps: int, per_lane: int) -> Plan:
    """Choose every step's groups."""
    L = len(queues)
    plan = []
    for t in range(steps):
        chosen: list[list[Group]] = [[] for _ in range(L)]
        owner: dict[int, int] = {}  # class in this step -> lane that it was first taken from
        for queue in queues:
            queue.start_step()
        # Turn by turn, and another lane first in every step, so that no lane always chooses last.
        for turn in range(per_lane * L):
            lane = (t + turn) % L
            label = queues[lane].earliest(owner)
            if label is not None:
                owner[label] = lane
                chosen[lane].append(queues[lane].take(label))
            elif not _exchange(lane, queues, chosen, owner):
                group = _repeat(queues[lane], chosen)
                owner.setdefault(group.label, lane)
                chosen[lane].append(group)
        plan.append(chosen)
    _spread_repeats(plan)
    return plan


def _exchange(lane: int, queues: list[LaneQueue], chosen: list[list[Group]], owner: dict[int, int]) -> bool:
    """Give ``lane`` another lane's class, that lane a third one's, and so on."""
    came_from: dict[int, tuple[int, int]] = {lane: (-1, -1)}  # lane -> (lane that wants its class, class)
    waiting = deque([lane])
    while waiting:
        here = waiting.popleft()
        free = queues[here].earliest(owner) if here != lane else None
        if free is not None:
            label = free
            while here != -1:  # walk back: each takes the class that the next one in the path gave up
                wants, given = came_from[here]
                if wants != -1:
                    group = next(group for group in chosen[here] if group.label == given)
                    chosen[here].remove(group)
                    queues[here].put_back(group)
                chosen[here].append(queues[here].take(label))
                owner[label] = here
                here, label = wants, given
            return True
        for label, other in owner.items():
            if other not in came_from and queues[here].first(label) is not None:
                came_from[other] = (here, label)
                waiting.append(other)
    return False


def _repeat(queue: LaneQueue, chosen: list[list[Group]]) -> Group:
    """Take the earliest group of the open class that this step holds least often."""
    held = Counter(group.label for groups in chosen for group in groups)
    while not (firsts := [group for group in map(queue.first, queue.queues) if group is not None]):
        queue.last_open += 1  # the windows are smaller than what a step takes
    return queue.take(min(firsts, key=lambda group: (held[group.label], group.time)).label)


def _spread_repeats(plan: Plan) -> None:
    """Exchange repeated classes with near steps, in place.

    Only groups of the same lane and windows change places, so every window is in use in the same steps as before.
    """
    held = [Counter(group.label for lane in step for group in lane) for step in plan]
    for t, step in enumerate(plan):
        if max(held[t].values()) == 1:
            continue
        near = sorted(range(max(0, t - NEAR), min(len(plan), t + NEAR + 1)), key=lambda other: abs(other - t))
        for lane, groups in enumerate(step):
            for i, group in enumerate(groups):
                if held[t][group.label] > 1 and (place := _better_place(group, t, lane, plan, held, near)):
                    other, j = place
                    groups[i], plan[other][lane][j] = plan[other][lane][j], group
                    held[t][group.label] -= 1
                    held[other][group.label] += 1
                    held[other][groups[i].label] -= 1
                    held[t][groups[i].label] += 1


def _better_place(
    group: Group, t: int, lane: int, plan: Plan, held: list[Counter[int]], near: list[int]
) -> tuple[int, int] | None:
    """Find a near step to exchange a group with, so that neither has a class twice."""
    for other in near:
        if not held[other][group.label]:
            for j, theirs in enumerate(plan[other][lane]):
                same_windows = (theirs.window, theirs.oldest) == (group.window, group.oldest)
                if same_windows and not held[t][theirs.label]:
                    return other, j
    return None
